// One task: its report, a text to try, its versions.

import { api } from "./api.js";
import { bytes, figureRow, h, milliseconds, number, percent, show, table } from "./dom.js";
import { tryOut } from "./try.js";
import { versionsCard } from "./versions.js";

export async function render(place, name) {
  const [task, versions] = await Promise.allSettled([api.task(name), api.versions(name)]);
  // A task whose versions all wait has none that answers, but versions to look at.
  if (task.status === "rejected" && versions.status === "rejected") throw task.reason;
  const details = task.value;
  const again = () => render(place, name);
  show(
    place,
    h("h1", {}, name),
    details ? facts(details) : h("p", { class: "soft" }, "No version is live."),
    details && tryOut(details),
    details && reportCard(details.report),
    versionsCard(name, versions, again),
  );
  return null;
}

function facts(task) {
  const kinds = {
    single_label_classification: "one label of several",
    multi_label_classification: "any number of labels",
    regression: "regression",
  };
  const pairs = [
    ["Live version", task.version],
    ["Kind", kinds[task.problem_type] ?? task.problem_type],
    ["Served", task.ready ? task.mode : `not ready: ${task.reason}`],
    ["Longest text", `${task.max_length} tokens`],
    ["Labels", task.labels.length > 6 ? task.labels.length : task.labels.join(", ")],
  ];
  return h(
    "dl",
    { class: "facts" },
    pairs.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
  );
}

function reportCard(report) {
  if (!report) {
    const text = "The live version came without a report, so nothing is known of its quality.";
    return h("section", { class: "card" }, h("h2", {}, "Beside the teacher"), h("p", {}, text));
  }
  return h(
    "section",
    { class: "card" },
    h("h2", {}, "Beside the teacher"),
    h("div", { class: "scroll" }, comparison(report)),
    report.student.classes && perClass(report.student.classes),
    h(
      "p",
      { class: "soft small" },
      `${report.student.rows} test rows, held against ${report.reference === "teacher" ? "the teacher's answers" : "their labels"}. ` +
        "Latency is a forward pass, measured in turns in one process.",
    ),
  );
}

/** What a report says of each model, by row. */
function figures(report) {
  const { student, teacher, control, majority } = report;
  const models = { student, teacher, control, majority };
  const each = (read, format) =>
    Object.fromEntries(
      Object.entries(models).map(([model, evaluation]) => [model, evaluation && format(read(evaluation))]),
    );
  const size = { student: report.student_model, teacher: report.teacher_model };
  const sizes = (read) =>
    Object.fromEntries(Object.entries(size).map(([model, one]) => [model, one && read(one)]));
  const latency = (batch, field) =>
    Object.fromEntries(
      ["student", "teacher"].map((model) => [
        model,
        report.latency?.[batch]?.[model] && milliseconds(report.latency[batch][model][field]),
      ]),
    );
  const interval = (score) => `${number(score.low)} to ${number(score.high)}`;
  const rows = [
    [student.score.metric.replaceAll("_", " "), each((e) => e.score.value, number)],
    ["95 % interval", each((e) => e.score, interval)],
    ["macro F1", each((e) => e.macro_f1, number)],
    ["Matthews correlation", each((e) => e.mcc, number)],
    ["Pearson", each((e) => e.pearson, number)],
    ["Spearman", each((e) => e.spearman, number)],
    ["share of the teacher's score", { student: percent(report.share_kept) }],
    ["agreement with the teacher", { student: percent(report.likeness?.agreement) }],
    ["parameters", sizes((one) => one.parameters.toLocaleString("en"))],
    ["adapter on disk", sizes((one) => bytes(one.adapter_bytes))],
    ["latency of one text, p50", latency("batch_1", "p50_ms")],
    ["latency of one text, p99", latency("batch_1", "p99_ms")],
    ["speed-up, one text", { student: factor(report.latency?.batch_1?.speed_up) }],
    ["speed-up, 32 texts", { student: factor(report.latency?.batch_32?.speed_up) }],
  ];
  const said = (value) => value && value !== "–" && !value.startsWith("– to");
  return rows.filter(([, values]) => Object.values(values).some(said));
}

function factor(value) {
  return Number.isFinite(value) ? `${number(value, 2)}×` : "–";
}

function comparison(report) {
  const models = ["student", "teacher", "control", "majority"].filter((model) => report[model]);
  const kind = { student: "who-student", teacher: "who-teacher" };
  const rows = figures(report).map(([name, values]) =>
    h(
      "tr",
      {},
      h("th", { scope: "row" }, name),
      models.map((model) => h("td", { class: `number ${kind[model] ?? ""}` }, values[model] ?? "–")),
    ),
  );
  const columns = [null, ...models.map((model) => [model, "number"])];
  return table("The live version beside its teacher", columns, rows);
}

function perClass(classes) {
  const names = ["precision", "recall", "F1", "rows"].map((name) => [name, "number"]);
  const rows = classes.map(({ label, precision, recall, f1, support }) =>
    figureRow(label, [number(precision), number(recall), number(f1), support]),
  );
  return h(
    "details",
    {},
    h("summary", {}, "Each class"),
    h("div", { class: "scroll" }, table("The student's score for each class", ["label", ...names], rows)),
  );
}
