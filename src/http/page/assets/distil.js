// Start a distillation, and watch the jobs.

import { api } from "./api.js";
import { announce, check, field, h, message, show } from "./dom.js";
import { jobList } from "./jobs.js";

export async function render(place) {
  const jobs = jobList();
  const known = await Promise.allSettled([api.teachers()]);
  const refused = known[0].status === "rejected" && known[0].reason;
  show(
    place,
    h("h1", {}, "Distil"),
    h(
      "p",
      { class: "soft" },
      "A teacher answers your texts, and an adapter of the student learns from its answers and the labels.",
    ),
    refused &&
      message(
        "warn",
        refused.message,
        refused.needsToken && " Set the access token at the top of the page.",
      ),
    h(
      "div",
      { class: "columns" },
      refused ? null : form(known[0].value, jobs.refresh),
      h("section", { class: "card", "aria-label": "Jobs" }, h("h2", {}, "Jobs"), jobs.element),
    ),
  );
  jobs.start();
  return jobs.stop;
}

function form(known, queued) {
  const task = h("input", {
    type: "text",
    required: true,
    pattern: "[a-z0-9][a-z0-9\\-]*",
    maxlength: 64,
    autocomplete: "off",
    name: "task",
  });
  const train = dropZone("Training rows", true);
  const validation = dropZone("Validation rows", false);
  const test = dropZone("Test rows", false);
  const teacher = teacherFields(known);
  const options = optionFields();
  const [promote, promoteLabel] = check("Take it into service if it passes", { checked: true });
  const outcome = h("div", {});
  const button = h("button", { type: "submit" }, "Start");

  async function submit(event) {
    event.preventDefault();
    if (!train.file()) {
      show(outcome, message("bad", "Choose a file with training rows first."));
      train.focus();
      return;
    }
    const spec = {
      task: task.value.trim(),
      ...(teacher.value() ? { teacher: teacher.value() } : {}),
      ...options.value(),
      promote: promote.checked,
    };
    const body = new FormData();
    body.append("spec", JSON.stringify(spec));
    for (const [name, zone] of Object.entries({ train, validation, test })) {
      if (zone.file()) body.append(name, zone.file(), zone.file().name);
    }
    button.disabled = true;
    show(outcome, message("plain", "Sending and checking the rows…"));
    try {
      const job = await api.distil(body);
      show(outcome, message("good", `The job for ${job.task} is queued.`));
      announce(`The job for ${job.task} is queued.`);
      queued();
    } catch (error) {
      show(outcome, message("bad", error.message));
    } finally {
      button.disabled = false;
    }
  }

  return h(
    "form",
    { class: "card", onsubmit: submit, "aria-label": "New distillation" },
    h("h2", {}, "New distillation"),
    field("Task", task, "Small letters, digits and hyphens. A task that exists gets a new version."),
    train.element,
    h("details", {}, h("summary", {}, "Rows for validation and test"), validation.element, test.element),
    teacher.element,
    h("details", {}, h("summary", {}, "Options"), options.element),
    promoteLabel,
    h("div", { class: "actions" }, button),
    outcome,
  );
}

/** A file, dropped or chosen. */
function dropZone(label, required) {
  const input = h("input", { type: "file", accept: ".jsonl,.ndjson,.json,.csv,.tsv,.parquet" });
  const told = required
    ? "JSONL, CSV, TSV or Parquet with text, text_pair and label; drop it here or choose it."
    : "Cut from the training rows if left out.";
  const zone = h("div", { class: "drop field" }, field(label, input, told));
  const mark = (over) => (event) => {
    event.preventDefault();
    zone.classList.toggle("over", over);
  };
  zone.addEventListener("dragover", mark(true));
  zone.addEventListener("dragleave", mark(false));
  zone.addEventListener("drop", (event) => {
    mark(false)(event);
    if (event.dataTransfer.files.length > 0) input.files = event.dataTransfer.files;
  });
  return { element: zone, file: () => input.files[0], focus: () => input.focus() };
}

/** Which model answers the rows. */
function teacherFields(known) {
  const ready = known.adapters.map(({ name, encoder }) =>
    h("option", { value: `ready:${name}` }, encoder ? `${name} (${encoder})` : name),
  );
  const kind = h(
    "select",
    { name: "teacher" },
    ready.length > 0 && h("optgroup", { label: "Ready-made" }, ready),
    h("option", { value: "tune" }, "An encoder, tuned on these rows first"),
    h("option", { value: "own" }, "A model of your own"),
    h("option", { value: "http" }, "A model behind an address"),
    h("option", { value: "none" }, "None: learn from the labels alone"),
  );
  const encoder = h(
    "select",
    {},
    known.encoders.map((one) =>
      h("option", { value: one.name }, one.fetched ? one.name : `${one.name} (is fetched first)`),
    ),
  );
  const mode = h(
    "select",
    {},
    h("option", { value: "lora" }, "LoRA"),
    h("option", { value: "full" }, "all weights"),
  );
  const epochs = h("input", { type: "number", min: 1, max: 100, value: 2 });
  const tune = h(
    "div",
    { class: "fields" },
    field("Encoder", encoder),
    field("Tune", mode),
    field("Epochs", epochs),
  );
  const model = h("input", { type: "text", autocomplete: "off" });
  const adapter = h("input", { type: "text", autocomplete: "off" });
  const own = h(
    "div",
    {},
    field("Model", model, "A catalog name, or a folder below the server's data root."),
    field("Adapter (optional)", adapter, "A PEFT folder below the data root."),
  );
  const url = h("input", { type: "url", autocomplete: "off" });
  const protocol = h(
    "select",
    {},
    h("option", { value: "text_embeddings_inference" }, "text-embeddings-inference"),
    h("option", { value: "hugging_face" }, "Hugging Face"),
  );
  const elsewhere = h(
    "div",
    {},
    field("Address", url, "With the route, as /predict. The server asks it, so it must be reachable from there."),
    field("Speaks like", protocol),
  );
  const update = () => {
    tune.hidden = kind.value !== "tune";
    own.hidden = kind.value !== "own";
    elsewhere.hidden = kind.value !== "http";
  };
  kind.addEventListener("change", update);
  update();

  function value() {
    if (kind.value === "none") return null;
    if (kind.value === "tune") {
      const finetune = { mode: mode.value, epochs: Number(epochs.value) };
      return { model: encoder.value, finetune };
    }
    if (kind.value === "own") {
      const given = adapter.value.trim();
      return { model: model.value.trim(), ...(given ? { adapter: given } : {}) };
    }
    if (kind.value === "http") return { http: { url: url.value.trim(), api: protocol.value } };
    const name = kind.value.slice("ready:".length);
    const ready = known.adapters.find((one) => one.name === name);
    return { model: ready.encoder ?? encoder.value, adapter: name };
  }

  const element = h("fieldset", {}, h("legend", {}, "Teacher"), field("Teacher", kind), tune, own, elsewhere);
  return { element, value };
}

/** LoRA, training and gate. What is left as it is, is left out of the request. */
function optionFields() {
  const targets = h(
    "select",
    {},
    h("option", { value: "all-linear" }, "every linear"),
    h("option", { value: "query,value" }, "query and value"),
  );
  const figure = (value, min, max, step) => h("input", { type: "number", value, min, max, step });
  const lora = { r: figure(8, 1, 256, 1), alpha: figure(16, 1, 512, "any"), dropout: figure(0.1, 0, 0.9, 0.05) };
  const training = {
    epochs: figure(4, 1, 100, 1),
    batch_size: figure(32, 1, 1024, 1),
    learning_rate: figure(0.001, 0.000001, 1, "any"),
    temperature: figure(2, 0.1, 20, "any"),
    alpha: figure(0.5, 0, 1, 0.05),
    max_length: figure(128, 8, 512, 1),
    seed: figure(42, 0, 4294967295, 1),
  };
  const keep = figure(0.95, 0, 1, 0.01);
  const numbers = (inputs) =>
    Object.fromEntries(Object.entries(inputs).map(([name, input]) => [name, Number(input.value)]));
  const group = (title, ...fields) =>
    h("fieldset", {}, h("legend", {}, title), h("div", { class: "fields" }, fields));
  const element = [
    group(
      "LoRA",
      field("Linears", targets),
      field("Rank", lora.r),
      field("Alpha", lora.alpha),
      field("Dropout", lora.dropout),
    ),
    group(
      "Training",
      field("Epochs", training.epochs),
      field("Batch size", training.batch_size),
      field("Learning rate", training.learning_rate),
      field("Temperature", training.temperature),
      field("Share of the teacher", training.alpha),
      field("Most tokens", training.max_length),
      field("Seed", training.seed),
    ),
    group("Gate", field("Keep of the teacher's score", keep)),
  ];
  const value = () => ({
    lora: { ...numbers(lora), targets: targets.value.split(",") },
    training: numbers(training),
    gate: { keep: Number(keep.value) },
  });
  return { element, value };
}
