// A text, and what the student and its teacher make of it.

import { api } from "./api.js";
import { announce, bar, check, field, h, message, milliseconds, number, show } from "./dom.js";

const SHOWN = 12;

/** The card for a task that answers. */
export function tryOut(task) {
  const text = h("textarea", { maxlength: 20000, required: true, rows: 3 });
  const pair = h("textarea", { maxlength: 20000, rows: 2 });
  const [ask, askLabel] = check("Ask the teacher too", {
    checked: sessionStorage.getItem("kdlora-ask-teacher") === "yes",
  });
  const student = h("div", {});
  const teacher = h("div", {});
  const button = h("button", { type: "submit" }, "Classify");
  let pending = null;

  async function submit(event) {
    event.preventDefault();
    if (!text.value.trim()) {
      text.focus();
      return;
    }
    pending?.abort();
    pending = new AbortController();
    const { signal } = pending;
    sessionStorage.setItem("kdlora-ask-teacher", ask.checked ? "yes" : "no");
    const input = pair.value.trim() ? { text: text.value, text_pair: pair.value } : text.value;
    show(teacher);
    const answers = [answer(student, () => askStudent(task.task, input, signal))];
    if (ask.checked) {
      show(teacher, message("plain", "Asking the teacher; it is loaded first if it isn't in memory…"));
      answers.push(answer(teacher, () => askTeacher(task.task, input, signal)));
    }
    await Promise.all(answers);
  }

  // Ctrl+Enter sends, as in other multi-line fields.
  text.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit(event);
  });
  return h(
    "section",
    { class: "card", "aria-label": "Try a text" },
    h(
      "form",
      { onsubmit: submit },
      h("h2", {}, "Try a text"),
      field("Text", text, "Ctrl+Enter sends it."),
      h("details", {}, h("summary", {}, "With a second text"), field("Second text of the pair", pair)),
      askLabel,
      h("div", { class: "actions" }, button),
    ),
    h("div", { class: "answers" }, student, teacher),
  );
}

async function answer(place, ask) {
  place.setAttribute("aria-busy", "true");
  try {
    show(place, await ask());
  } catch (error) {
    if (error.name === "AbortError") return;
    const hint = error.needsToken && " Set the access token at the top of the page.";
    show(place, message("bad", error.message, hint));
  } finally {
    place.removeAttribute("aria-busy");
  }
}

async function askStudent(task, input, signal) {
  const started = performance.now();
  const { version, predictions, timings, usage } = await api.classify(task, input, signal);
  const took = performance.now() - started;
  announce(`Student: ${inWords(predictions[0])}`);
  const computed = timings.compute ? `${milliseconds(timings.compute)} to compute, ` : "";
  return [
    h("h3", {}, h("span", { class: "who-student" }, "Student"), `, version ${version}`),
    scores(predictions[0], "student"),
    h("p", { class: "soft small" }, `${computed}${milliseconds(took)} in all, ${usage.tokens} tokens`),
  ];
}

async function askTeacher(task, input, signal) {
  const { teacher, predictions, compute_ms, load_ms } = await api.askTeacher(task, input, signal);
  announce(`Teacher: ${inWords(predictions[0])}`);
  const loaded = load_ms ? `, after ${milliseconds(load_ms)} to load it` : "";
  return [
    h("h3", {}, h("span", { class: "who-teacher" }, "Teacher"), `, ${teacher}`),
    scores(predictions[0], "teacher"),
    h("p", { class: "soft small" }, `${milliseconds(compute_ms)} to compute${loaded}`),
  ];
}

function inWords(prediction) {
  if ("value" in prediction) return number(prediction.value);
  return prediction.label ?? (prediction.labels.join(", ") || "no label");
}

function scores(prediction, kind) {
  if ("value" in prediction) {
    return h("p", {}, h("strong", { class: `value who-${kind}` }, number(prediction.value)));
  }
  const chosen = new Set(prediction.labels ?? [prediction.label]);
  const all = Object.entries(prediction.scores);
  const items = all.slice(0, SHOWN).map(([label, score]) =>
    h(
      "li",
      { class: chosen.has(label) && "best" },
      h("span", {}, label),
      h("span", {}, number(score)),
      bar(score, kind),
    ),
  );
  const rest = all.length - items.length;
  return [
    h("ol", { class: "scores" }, items),
    rest > 0 && h("p", { class: "soft small" }, `and ${rest} labels with lower scores`),
  ];
}
