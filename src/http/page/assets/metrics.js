// What /metrics says, sampled while the page is open. Nothing is stored on the server for it.

import { request } from "./api.js";

/** The metrics that the page reads; a test holds them against a running server. */
export const NAMES = {
  requests: "kdlora_requests_total",
  requestSeconds: "kdlora_request_seconds",
  queue: "kdlora_queue_sequences",
  inFlight: "kdlora_in_flight_requests",
  memory: "kdlora_process_resident_memory_bytes",
  adapterMemory: "kdlora_adapter_memory_bytes",
  batchTokens: "kdlora_batch_tokens",
};

const EVERY_MS = 2000;
/** Five minutes of samples. */
const KEPT = 150;

const samples = [];
const listeners = new Set();

/** The samples, oldest first: `{at, series}` with `at` in seconds. */
export function history() {
  return samples;
}

/** Calls `listener` after each sample until the returned function is called. */
export function onSample(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

export async function sample() {
  const text = await (await request("/metrics")).text();
  samples.push({ at: performance.now() / 1000, series: parse(text) });
  if (samples.length > KEPT) samples.shift();
  for (const listener of listeners) listener();
}

/** Samples for as long as the page can be seen. */
export function start() {
  const tick = async () => {
    if (!document.hidden) await sample().catch(() => {});
    setTimeout(tick, EVERY_MS);
  };
  tick();
}

/** Series of the text format by name: `[{labels, value}]`. */
export function parse(text) {
  const series = new Map();
  for (const line of text.split("\n")) {
    const match = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/.exec(line);
    if (!match) continue;
    const [, name, labels, value] = match;
    if (!series.has(name)) series.set(name, []);
    series.get(name).push({ labels: parseLabels(labels ?? ""), value: toNumber(value) });
  }
  return series;
}

function parseLabels(text) {
  const labels = {};
  const unescape = { n: "\n", "\\": "\\", '"': '"' };
  for (const [, name, value] of text.matchAll(/([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g)) {
    labels[name] = value.replace(/\\(.)/g, (_, character) => unescape[character] ?? character);
  }
  return labels;
}

function toNumber(text) {
  if (text === "+Inf") return Infinity;
  if (text === "-Inf") return -Infinity;
  return Number(text);
}

/** Sum of the series of `name` that carry all of `labels`. */
export function total(sample, name, labels = {}) {
  const wanted = Object.entries(labels);
  const all = sample.series.get(name);
  if (!all) return NaN;
  return all
    .filter((one) => wanted.every(([label, value]) => one.labels[label] === value))
    .reduce((sum, one) => sum + one.value, 0);
}

/** Increase a second between two samples; a restart of the server counts from 0. */
export function rate(before, after, name, labels) {
  const [from, to] = [total(before, name, labels), total(after, name, labels)];
  if (!Number.isFinite(to)) return NaN;
  const increase = to - (Number.isFinite(from) && from <= to ? from : 0);
  return increase / (after.at - before.at);
}

/** A quantile of what a histogram has seen between two samples, as Prometheus reckons it; NaN if
 * nothing came. Without `before`: of all that it has seen. */
export function quantile(before, after, name, q, labels = {}) {
  const counts = buckets(after, name, labels);
  if (before) {
    const earlier = buckets(before, name, labels);
    const restarted = [...counts].some(([le, count]) => (earlier.get(le) ?? 0) > count);
    if (!restarted) for (const [le, count] of counts) counts.set(le, count - (earlier.get(le) ?? 0));
  }
  const ordered = [...counts].sort(([a], [b]) => a - b);
  const all = ordered.at(-1)?.[1] ?? 0;
  if (all === 0) return NaN;
  const rank = q * all;
  let [bound, below] = [0, 0];
  for (const [le, count] of ordered) {
    if (count >= rank) {
      if (le === Infinity) return bound;
      return bound + ((le - bound) * (rank - below)) / Math.max(count - below, 1e-12);
    }
    [bound, below] = [le, count];
  }
  return bound;
}

function buckets(sample, name, labels) {
  const wanted = Object.entries(labels);
  const counts = new Map();
  for (const one of sample.series.get(`${name}_bucket`) ?? []) {
    if (!wanted.every(([label, value]) => one.labels[label] === value)) continue;
    const le = toNumber(one.labels.le);
    counts.set(le, (counts.get(le) ?? 0) + one.value);
  }
  return counts;
}

/** The newest sample and the oldest one not more than `seconds` before it. */
export function window(seconds) {
  const after = samples.at(-1);
  if (!after) return [undefined, undefined];
  const before = samples.find((one) => after.at - one.at <= seconds);
  return [before === after ? undefined : before, after];
}

/** Median latency of a task over the last minute in milliseconds, else since the server started. */
export function latencyNow(task, q = 0.5) {
  const [before, after] = window(60);
  if (!after) return { value: NaN };
  const labels = { task };
  if (before) {
    const value = quantile(before, after, NAMES.requestSeconds, q, labels);
    if (Number.isFinite(value)) return { value: 1000 * value, recent: true };
  }
  return { value: 1000 * quantile(undefined, after, NAMES.requestSeconds, q, labels), recent: false };
}

/** Requests a second of a task over the last minute. */
export function requestsNow(task) {
  const [before, after] = window(60);
  return before ? rate(before, after, NAMES.requests, { task }) : NaN;
}
