// The dashboard and the alert rules against a real Prometheus that scrapes the real server.
//
//   KDLORA=…  the program (default: debug/kdlora in cargo's target folder)

import assert from "node:assert/strict";
import { execFileSync, spawn } from "node:child_process";
import { readFileSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { dirname, join } from "node:path";
import { after, before, test } from "node:test";
import { fileURLToPath } from "node:url";

import { Install } from "./install.js";

const deploy = join(dirname(fileURLToPath(import.meta.url)), "../../deploy");
const rules = join(deploy, "prometheus/kdlora.rules.yml");
const dashboard = JSON.parse(readFileSync(join(deploy, "grafana/dashboards/kdlora.json"), "utf8"));

const PATIENCE_MS = 60_000;
const install = new Install();
let server;
let prometheus;
let api;

before(async () => {
  server = await install.start();
  const port = await freePort();
  api = `http://127.0.0.1:${port}/api/v1`;
  // The configuration that is shipped, with the address of this server and a test's patience.
  const config = readFileSync(join(deploy, "prometheus/prometheus.yml"), "utf8")
    .replace("kdlora:8080", new URL(server.url).host)
    .replace("kdlora.rules.yml", rules)
    .replaceAll("interval: 15s", "interval: 1s");
  const file = install.path("prometheus.yml");
  writeFileSync(file, config);
  prometheus = spawn(
    "prometheus",
    [
      `--config.file=${file}`,
      `--storage.tsdb.path=${install.path("tsdb")}`,
      `--web.listen-address=127.0.0.1:${port}`,
      "--log.level=error",
    ],
    { stdio: ["ignore", "inherit", "inherit"] },
  );
  await distilled();
  for (let i = 0; i < 5; i += 1) await classify();
  await eventually(async () => (await query('kdlora_requests_total{outcome="ok"} >= 5')).length > 0);
});

after(async () => {
  if (prometheus) {
    const ended = new Promise((resolve) => prometheus.once("exit", resolve));
    prometheus.kill("SIGTERM");
    await ended;
  }
  await server?.stop();
  install.remove();
});

function freePort() {
  return new Promise((resolve) => {
    const socket = createServer().listen(0, "127.0.0.1", () => {
      const { port } = socket.address();
      socket.close(() => resolve(port));
    });
  });
}

async function post(path, body) {
  const response = await fetch(server.url + path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
  assert.ok(response.ok, await response.clone().text());
  return response.json();
}

const classify = () => post("/v1/classify/pairs", { inputs: "a b c" });

/** A version with a report, for the metrics that come from it. */
async function distilled() {
  const rows = readFileSync(install.rows(100), "utf8").trim().split("\n").map(JSON.parse);
  const job = await post("/admin/distill", {
    task: "kind",
    data: { train: { rows } },
    teacher: { model: "teacher" },
    training: { epochs: 1, max_length: 16 },
    gate: { keep: 0 },
  });
  await eventually(async () => {
    const { state, error } = await (await fetch(`${server.url}/admin/jobs/${job.id}`)).json();
    assert.notEqual(state, "failed", error);
    return state === "succeeded";
  });
  await post("/admin/tasks/kind/promote", { version: 1 });
}

async function eventually(holds) {
  const deadline = Date.now() + PATIENCE_MS;
  while (!(await holds().catch(() => false))) {
    assert.ok(Date.now() < deadline, "it does not come about");
    await new Promise((resolve) => setTimeout(resolve, 200));
  }
}

async function query(expression) {
  const response = await fetch(`${api}/query?${new URLSearchParams({ query: expression })}`);
  const { status, error, data } = await response.json();
  assert.equal(status, "success", `${error} in ${expression}`);
  return data.result;
}

/** Names of a text's own metrics, without the suffixes of histograms. */
function names(text) {
  return new Set([...text.matchAll(/\bkdlora_\w+/g)].map(([name]) => name.replace(/_(bucket|sum|count)$/, "")));
}

test("promtool finds nothing wrong with configuration, rules and scrape", async () => {
  const folder = join(deploy, "prometheus");
  execFileSync("promtool", ["check", "config", "prometheus.yml"], { cwd: folder });
  execFileSync("promtool", ["test", "rules", "kdlora.rules.test.yml"], { cwd: folder });
  const input = await (await fetch(`${server.url}/metrics`)).text();
  execFileSync("promtool", ["check", "metrics"], { input });
});

// The machine of the tests has no GPU, and then there is no series of its memory.
const ofGpu = (text) => text.includes("kdlora_gpu_memory_");

test("every metric of the dashboard and the rules is scraped", async () => {
  const all = new Set([...names(JSON.stringify(dashboard)), ...names(readFileSync(rules, "utf8"))]);
  const used = new Set([...all].filter((name) => !ofGpu(name)));
  assert.ok(used.size < all.size, "memory of the GPU is on the dashboard");
  assert.ok(used.size > 15, [...used].join());
  const response = await fetch(`${api}/label/__name__/values`);
  const scraped = new Set((await response.json()).data);
  const missing = [...used].filter((name) => !scraped.has(name) && !scraped.has(`${name}_bucket`));
  assert.deepEqual(missing, []);
});

test("every panel has something to show", async () => {
  const empty = [];
  const panels = dashboard.panels.flatMap((panel) =>
    (panel.targets ?? []).filter(({ expr }) => !ofGpu(expr)).map(({ expr }) => [panel.title, expr]),
  );
  assert.ok(panels.length > 20);
  const fill = (expression) =>
    expression.replaceAll("$__rate_interval", "1m").replaceAll("$instance", ".*").replaceAll("$task", ".*");
  for (const [title, expression] of panels) {
    await classify();
    // A rate needs two scrapes with requests before it.
    await eventually(async () => (await query(fill(expression))).length > 0).catch(() => empty.push(title));
  }
  assert.deepEqual(empty, []);
  for (const { expr } of dashboard.annotations.list) await query(fill(expr));
});

test("Prometheus has the rules loaded and healthy", async () => {
  await eventually(async () => {
    const { data } = await (await fetch(`${api}/rules`)).json();
    const loaded = data.groups.flatMap((group) => group.rules);
    const ill = loaded.filter((rule) => rule.lastError);
    assert.deepEqual(ill, []);
    return loaded.length > 7 && loaded.every((rule) => rule.health === "ok");
  });
});
