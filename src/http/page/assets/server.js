// The server over the last minutes, from samples of /metrics that this page has taken.

import { chart } from "./chart.js";
import { bytes, duration, h, number, show } from "./dom.js";
import { NAMES, history, onSample, quantile, rate, total } from "./metrics.js";

/** Samples that a rate or quantile looks back over: ten seconds. */
const BACK = 5;

const seconds = (value) => (Number.isFinite(value) ? `${number(1000 * value, value < 0.01 ? 1 : 0)} ms` : "–");
const each = (value) => number(value, value < 10 ? 1 : 0);
const whole = (value) => (Number.isFinite(value) ? String(Math.round(value)) : "–");

/** `read(before, after)` gives a figure between two samples. */
const CHARTS = [
  {
    title: "Requests a second",
    format: each,
    minimumTop: 1,
    lines: [
      ["answered", (before, after) => rate(before, after, NAMES.requests, { outcome: "ok" })],
      [
        "not answered",
        (before, after) =>
          rate(before, after, NAMES.requests) - (rate(before, after, NAMES.requests, { outcome: "ok" }) || 0),
      ],
    ],
  },
  {
    title: "Latency of requests",
    format: seconds,
    lines: [
      ["p50", (before, after) => quantile(before, after, NAMES.requestSeconds, 0.5)],
      ["p99", (before, after) => quantile(before, after, NAMES.requestSeconds, 0.99)],
    ],
  },
  {
    title: "Waiting and in flight",
    format: whole,
    minimumTop: 2,
    lines: [
      ["texts in the queue", (_, after) => total(after, NAMES.queue)],
      ["requests in flight", (_, after) => total(after, NAMES.inFlight)],
    ],
  },
  {
    title: "Memory",
    format: bytes,
    base: 1024,
    lines: [
      ["process", (_, after) => total(after, NAMES.memory)],
      ["adapters", (_, after) => total(after, NAMES.adapterMemory)],
    ],
  },
  {
    title: "Tokens a second",
    format: whole,
    minimumTop: 10,
    lines: [["computed", (before, after) => rate(before, after, `${NAMES.batchTokens}_sum`)]],
  },
];

export async function render(place) {
  const grid = h("div", { class: "columns" });
  show(
    place,
    h("h1", {}, "Server"),
    h("p", { class: "soft" }, "The last five minutes, as long as this page has been open."),
    grid,
  );
  const draw = () => show(grid, CHARTS.map(card));
  draw();
  return onSample(draw);
}

function card({ title, lines, ...looks }) {
  const samples = history();
  const body =
    samples.length < 3
      ? h("p", { class: "soft" }, "Collecting…")
      : chart({
          title,
          ...looks,
          lines: lines.map(([name, read]) => ({ name, points: points(samples, read) })),
          span: [`${duration(samples.at(-1).at - samples[0].at)} ago`, "now"],
        });
  return h("section", { class: "card", "aria-label": title }, h("h2", {}, title), body);
}

function points(samples, read) {
  return samples.slice(1).map((after, i) => {
    const before = samples[Math.max(0, i + 1 - BACK)];
    return [after.at, read(before, after)];
  });
}
