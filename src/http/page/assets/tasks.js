// All tasks: which version answers, how good it is beside its teacher, how fast it is.

import { api } from "./api.js";
import { bar, h, message, milliseconds, number, percent, show, table } from "./dom.js";
import { latencyNow, onSample, requestsNow } from "./metrics.js";

// Reports don't change: each is fetched once for each version.
const known = new Map();

async function details(task) {
  const key = `${task.task}@${task.version}`;
  if (!known.has(key)) known.set(key, await api.task(task.task));
  return known.get(key);
}

export async function render(place) {
  const { tasks, next } = await api.tasks();
  const heading = [
    h("h1", {}, "Tasks"),
    h("p", { class: "soft" }, "Each is an adapter of the one student encoder that is in memory."),
  ];
  if (tasks.length === 0) {
    show(
      place,
      heading,
      h("p", { class: "card" }, "There are none yet. ", h("a", { href: "#/distil" }, "Distil one.")),
    );
    return null;
  }
  const live = [];
  const names = ["Task", "Live version", "Score beside the teacher", "Kept"];
  const figures = ["Speed-up", "Latency now", "Requests/s"].map((name) => [name, "number"]);
  const rows = tasks.map((task) => row(task, live));
  const all = table("Tasks with their live versions", [...names, ...figures], rows, { class: "stack" });
  show(
    place,
    heading,
    h("div", { class: "card" }, all, next && more(next, all.tBodies[0], live)),
    h(
      "p",
      { class: "soft small" },
      h("span", { class: "who-student" }, "Student"),
      " above ",
      h("span", { class: "who-teacher" }, "teacher"),
      ", from the report of the live version. Latency is the median of the last minute as the server " +
        "saw it; in brackets: since it started.",
    ),
  );
  const update = () => live.forEach((refresh) => refresh());
  update();
  return onSample(update);
}

/** A button for the tasks behind the one named `after`. */
function more(after, body, live) {
  const outcome = h("div", {});
  const button = h("button", { type: "button", class: "quiet" }, "More tasks");
  const place = h("div", {}, outcome, h("div", { class: "actions" }, button));
  button.addEventListener("click", async () => {
    button.disabled = true;
    try {
      const { tasks, next } = await api.tasks(after);
      const rows = tasks.map((task) => row(task, live));
      body.append(...rows);
      rows[0]?.querySelector("a").focus();
      if (next) {
        after = next;
        button.disabled = false;
      } else {
        place.remove();
      }
    } catch (error) {
      button.disabled = false;
      show(outcome, message("bad", error.message));
    }
  });
  return place;
}

function row(task, live) {
  const score = h("td", { "data-name": "Score", class: "wide" }, "…");
  const kept = h("td", { "data-name": "Kept" });
  const speedUp = h("td", { "data-name": "Speed-up", class: "number" });
  const latency = h("td", { "data-name": "Latency now", class: "number" });
  const rate = h("td", { "data-name": "Requests/s", class: "number" });
  details(task).then(
    ({ report }) => {
      show(score, report ? versus(report) : h("span", { class: "soft" }, "no report"));
      show(kept, percent(report?.share_kept));
      const factor = report?.latency?.batch_1?.speed_up;
      show(speedUp, Number.isFinite(factor) ? `${number(factor, 1)}×` : "–");
    },
    (error) => show(score, error.message),
  );
  live.push(() => {
    const { value, recent } = latencyNow(task.task);
    const text = milliseconds(value);
    show(latency, Number.isFinite(value) && !recent ? `(${text})` : text);
    show(rate, number(requestsNow(task.task), 1));
  });
  return h(
    "tr",
    {},
    h("th", { scope: "row" }, h("a", { href: `#/task/${encodeURIComponent(task.task)}` }, task.task)),
    h(
      "td",
      { "data-name": "Live version" },
      h("span", {}, `${task.version} `, readiness(task)),
    ),
    score,
    kept,
    speedUp,
    latency,
    rate,
  );
}

/** How a task is served, or that it is not, with the reason. */
function readiness(task) {
  return task.ready
    ? h("span", { class: "soft small" }, task.mode)
    : h("span", { class: "badge bad", title: task.reason }, "not ready");
}

/** The student's score above the teacher's, as bars with their figures. */
export function versus(report) {
  const line = (evaluation, kind) =>
    evaluation && [
      bar(evaluation.score.value, kind),
      h(
        "span",
        { class: `who-${kind}`, title: evaluation.score.metric },
        h("span", { class: "visually-hidden" }, `${kind} `),
        number(evaluation.score.value),
      ),
    ];
  return h("div", { class: "versus" }, line(report.student, "student"), line(report.teacher, "teacher"));
}
