// Jobs: the latest ones, with loss and time left while they run.

import { api } from "./api.js";
import { chart } from "./chart.js";
import { announce, duration, h, message, number, show, time } from "./dom.js";

const EVERY_MS = 1000;
const IDLE_MS = 5000;

const STAGES = {
  data: "reading the rows",
  teacher_training: "tuning the teacher",
  teacher_logits: "asking the teacher",
  student_training: "training the student",
  evaluation: "evaluating",
  latency: "measuring latency",
};

const KINDS = { queued: "plain", running: "warn", succeeded: "good", failed: "bad", cancelled: "plain" };

/** Losses seen by this page, by job: `{stage, points: [[step, loss]]}`. */
const losses = new Map();

export function jobList() {
  const element = h("div", {}, h("p", { class: "soft" }, "Loading…"));
  const list = h("ol", { class: "jobs" });
  const cards = new Map();
  let timer = null;
  let stopped = false;

  async function refresh() {
    clearTimeout(timer);
    let busy = false;
    try {
      const jobs = await api.jobs();
      if (stopped) return;
      busy = jobs.some((job) => !over(job));
      draw(jobs);
    } catch (error) {
      if (stopped) return;
      show(element, message(error.needsToken ? "warn" : "bad", error.message));
    }
    if (!stopped) timer = setTimeout(refresh, busy ? EVERY_MS : IDLE_MS);
  }

  function draw(jobs) {
    if (jobs.length === 0) {
      show(element, h("p", { class: "soft" }, "There has been none yet."));
      return;
    }
    for (const job of jobs) {
      if (!cards.has(job.id)) cards.set(job.id, card(job.id));
      cards.get(job.id).update(job);
    }
    const wanted = jobs.map((job) => cards.get(job.id).element);
    // Only what has moved is touched, so that the focus stays where it is.
    if (wanted.some((element, i) => list.children[i] !== element)) show(list, wanted);
    if (list.parentNode !== element) show(element, list);
  }

  return {
    element,
    refresh,
    start: refresh,
    stop() {
      stopped = true;
      clearTimeout(timer);
    },
  };
}

function over(job) {
  return job.state !== "queued" && job.state !== "running";
}

function card(id) {
  const title = h("h3", {});
  const badge = h("span", { class: "badge plain" });
  const body = h("div", {});
  const actions = h("div", { class: "actions" });
  const element = h("li", { class: "job" }, h("header", {}, title, badge), body, actions);
  let state = null;
  const cancel = h("button", { type: "button", class: "danger" }, "Cancel the job");
  cancel.addEventListener("click", async () => {
    cancel.disabled = true;
    try {
      update(await api.cancel(id));
    } catch (error) {
      cancel.disabled = false;
      show(body, message("bad", error.message));
    }
  });

  function update(job) {
    if (job.state !== state) {
      if (state !== null) announce(`Job for ${job.task}: ${job.state}`);
      state = job.state;
      show(badge, job.state);
      badge.className = `badge ${KINDS[job.state] ?? "plain"}`;
      show(title, h("a", { href: `#/task/${encodeURIComponent(job.task)}` }, job.task));
      show(actions, over(job) ? null : cancel);
      element.setAttribute("data-state", job.state);
    }
    show(body, job.state === "running" ? running(job) : still(job));
  }

  return { element, update };
}

function running(job) {
  remember(job);
  const stage = STAGES[job.stage] ?? job.stage ?? "starting";
  const facts = [
    stage,
    job.steps > 0 && `${job.step} of ${job.steps}`,
    Number.isFinite(job.loss) && `loss ${number(job.loss, 4)}`,
    Number.isFinite(job.tokens_per_second) && `${Math.round(job.tokens_per_second)} tokens/s`,
    Number.isFinite(job.eta_seconds) && `${duration(job.eta_seconds)} left`,
  ];
  return [
    h("p", { class: "small" }, facts.filter(Boolean).join(" · ")),
    job.steps > 0 && h("progress", { max: job.steps, value: job.step, "aria-label": stage }),
    lossChart(job),
  ];
}

/** The losses that this page has seen of a job; they stay when it is over. */
function lossChart(job) {
  const points = losses.get(job.id)?.points ?? [];
  if (points.length < 2) return null;
  return chart({
    title: "Training loss",
    lines: [{ name: "loss", points }],
    format: (value) => number(value, value < 1 ? 3 : 2),
    span: [`step ${points[0][0]}`, `step ${points.at(-1)[0]}`],
  });
}

function remember(job) {
  if (!Number.isFinite(job.loss)) return;
  let kept = losses.get(job.id);
  if (!kept || kept.stage !== job.stage) {
    kept = { stage: job.stage, points: [] };
    losses.set(job.id, kept);
  }
  const last = kept.points.at(-1);
  if (!last || last[0] < job.step) kept.points.push([job.step, job.loss]);
}

function still(job) {
  if (job.state === "queued") return h("p", { class: "small soft" }, "Asked for ", time(job.created_at));
  const made = job.version ? `Version ${job.version}, ` : "";
  const seconds = (new Date(job.finished_at) - new Date(job.started_at)) / 1000;
  const took = Number.isFinite(seconds) ? `, after ${duration(seconds)}` : "";
  return [
    h("p", { class: "small soft" }, made, time(job.finished_at ?? job.created_at), took),
    job.error && message("bad", job.error),
    lossChart(job),
  ];
}
