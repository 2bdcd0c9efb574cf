// What a user does on the page, in a real browser against the real server.
//
//   KDLORA=…      the program (default: debug/kdlora in cargo's target folder)
//   CHROMIUM=…    the browser (default: /usr/bin/chromium)
//   SCREENSHOTS=… a folder for pictures of what was seen

import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { cpSync, mkdirSync, writeFileSync } from "node:fs";
import { createServer } from "node:http";
import { join } from "node:path";

import { chromium } from "playwright-core";

import { HOSTILE, Install } from "./install.js";

// A pass runs at the lowest priority, so it takes long on a machine that has much else to do.
const PATIENCE = 240_000;
/** What the browser says of a server that was stopped before the page was closed. */
const GONE = "ERR_CONNECTION_REFUSED";
const screenshots = process.env.SCREENSHOTS;

const install = new Install();
let server;
let browser;

before(async () => {
  server = await install.start();
  const executablePath = process.env.CHROMIUM ?? "/usr/bin/chromium";
  browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
});

after(async () => {
  await browser?.close();
  await server?.stop();
  install.remove();
});

/** A page of its own, which fails the test on anything that the browser complains of. */
async function open(t, hash = "", { url = server.url, expected = [], ...options } = {}) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 900 }, ...options });
  const page = await context.newPage();
  page.setDefaultTimeout(PATIENCE);
  const complaints = [];
  page.on("pageerror", (error) => complaints.push(String(error)));
  page.on("console", (line) => line.type() === "error" && complaints.push(line.text()));
  page.on("request", (request) => {
    if (!request.url().startsWith(url)) complaints.push(`asks ${request.url()}`);
  });
  t.after(async () => {
    await context.close();
    const surprising = complaints.filter((text) => !expected.some((part) => text.includes(part)));
    assert.deepEqual(surprising, []);
  });
  await page.goto(`${url}/${hash}`);
  return page;
}

async function picture(page, name) {
  if (!screenshots) return;
  mkdirSync(screenshots, { recursive: true });
  await page.screenshot({ path: join(screenshots, `${name}.png`), fullPage: true });
}

/** What a fresh visitor can see or hear of a role and a name. */
const heading = (page, name) => page.getByRole("heading", { name, exact: true });

test("tasks are listed and a text is classified with the keyboard alone", async (t) => {
  const page = await open(t);
  await heading(page, "Tasks").waitFor();
  await page.getByText("ready", { exact: true }).waitFor();
  await page.getByRole("link", { name: "pairs" }).waitFor();
  await page.keyboard.press("Tab");
  assert.equal(await page.evaluate(() => document.activeElement.textContent), "Skip to the content");
  await page.keyboard.press("Enter");
  await page.keyboard.press("Tab");
  assert.equal(await page.evaluate(() => document.activeElement.textContent), "pairs");
  await page.keyboard.press("Enter");
  await heading(page, "pairs").waitFor();
  const text = page.getByLabel("Text", { exact: true });
  while (!(await text.evaluate((element) => element === document.activeElement))) {
    await page.keyboard.press("Tab");
  }
  await page.keyboard.type("a b c");
  await page.keyboard.press("Control+Enter");
  await heading(page, "Student, version 1").waitFor();
  assert.equal(await page.locator(".scores li").count(), 2);
  await page.getByText("to compute").waitFor();
});

test("more tasks than fit on the screen are fetched when they are asked for", async (t) => {
  const other = new Install();
  t.after(() => other.remove());
  for (let i = 10; i < 70; i += 1) {
    cpSync(other.path("adapters/pairs"), other.path(`adapters/task-${i}`), { recursive: true });
  }
  const many = await other.start();
  t.after(() => many.stop());
  const page = await open(t, "#/tasks", { url: many.url, expected: [GONE] });
  const rows = page.locator("tbody tr");
  const button = page.getByRole("button", { name: "More tasks" });
  await button.waitFor();
  assert.equal(await rows.count(), 50);
  await button.click();
  await page.getByRole("link", { name: "task-69" }).waitFor();
  assert.equal(await rows.count(), 61);
  assert.equal(await button.count(), 0);
});

test("a distillation is watched and cancelled, a version tried beside the teacher, promoted and rolled back", async (t) => {
  const page = await open(t, "#/distil");
  await page.getByLabel("Task", { exact: true }).fill("kind");
  await page.getByLabel("Training rows").setInputFiles(install.rows(1500));
  await page.getByRole("combobox", { name: "Teacher" }).selectOption("own");
  await page.getByLabel("Model", { exact: true }).fill("teacher");
  await page.getByText("Options", { exact: true }).click();
  await page.getByLabel("Most tokens").fill("16");
  await page.getByLabel("Batch size").fill("1");
  await page.getByLabel("Keep of the teacher's score").fill("0.1");
  // A hundred thousand steps, so that there is something to watch.
  await page.getByLabel("Epochs").last().fill("100");
  await page.getByRole("button", { name: "Start" }).click();
  const job = page.locator(".job").first();
  await job.getByRole("progressbar", { name: "training the student" }).waitFor();
  await job.getByRole("img", { name: /Training loss: loss \d/ }).waitFor();
  await job.getByText("left").waitFor();
  await picture(page, "distil-running");
  await job.getByRole("button", { name: "Cancel the job" }).click();
  await page.locator(".job[data-state=cancelled]").waitFor();
  await job.getByRole("img", { name: /Training loss: loss \d/ }).waitFor();

  await page.getByLabel("Batch size").fill("4");
  await page.getByLabel("Epochs").last().fill("3");
  await page.getByRole("button", { name: "Start" }).click();
  await page.locator(".job[data-state=succeeded]").first().waitFor();
  await picture(page, "distil-done");

  // A second version, with other settings, to compare and to promote.
  await page.getByLabel("Epochs").last().fill("1");
  await page.getByLabel("Take it into service if it passes").uncheck();
  await page.getByRole("button", { name: "Start" }).click();
  await page.locator(".job[data-state=succeeded]").nth(1).waitFor();

  await page.locator(".job").first().getByRole("link", { name: "kind" }).click();
  await heading(page, "Beside the teacher").waitFor();
  await page.getByLabel("Text", { exact: true }).fill("a 1 b");
  await page.getByLabel("Ask the teacher too").check();
  await page.getByRole("button", { name: "Classify" }).click();
  await heading(page, "Student, version 1").waitFor();
  await heading(page, "Teacher, data/teacher").waitFor();
  for (const label of HOSTILE) {
    // Once for the student, once for the teacher.
    assert.equal(await page.locator(".scores").getByText(label, { exact: true }).count(), 2);
  }

  const versions = page.getByRole("region", { name: "Versions" });
  await versions.getByText("Compare two versions").click();
  await versions.getByText(/Version 2 scores [+−]/).waitFor();
  await picture(page, "task");
  await versions.getByRole("button", { name: "Promote version 2" }).click();
  const dialog = page.getByRole("dialog");
  await picture(page, "confirm");
  await dialog.getByRole("button", { name: "Cancel" }).click();
  assert.equal(await live(), 1);
  await versions.getByRole("button", { name: "Promote version 2" }).click();
  await dialog.getByLabel(/Reason/).fill("<b>because</b>");
  await dialog.getByRole("button", { name: "Promote" }).click();
  await page.getByRole("button", { name: "Promote version 1" }).waitFor();
  assert.equal(await live(), 2);
  await page.getByRole("button", { name: "Roll back" }).click();
  await dialog.getByRole("button", { name: "Roll back" }).click();
  await page.getByRole("button", { name: "Promote version 2" }).waitFor();
  assert.equal(await live(), 1);
  await page.getByText("History").click();
  await page.getByText("promoted version 2 by admin: <b>because</b>").waitFor();
  assert.equal(await page.evaluate(() => window.pwned), undefined);
  assert.equal(await page.locator("main img, main script, main b").count(), 0);

  async function live() {
    const answer = await fetch(`${server.url}/v1/tasks/kind`);
    return (await answer.json()).version;
  }
});

test("a model behind an address teaches, and the task is taken out of service", async (t) => {
  // Speaks like text-embeddings-inference.
  const teacher = createServer(async (request, answer) => {
    if (request.url !== "/predict") {
      answer.writeHead(404).end();
      return;
    }
    let body = "";
    for await (const part of request) body += part;
    const row = ([text]) =>
      [["letters", /^[a-z]/.test(text)], ["digits", /^\d/.test(text)]]
        .map(([label, yes]) => ({ label, score: yes ? 3 : -3 }))
        .sort((one, other) => other.score - one.score);
    answer.setHeader("Content-Type", "application/json");
    answer.end(JSON.stringify(JSON.parse(body).inputs.map(row)));
  });
  await new Promise((ready) => teacher.listen(0, "127.0.0.1", ready));
  t.after(() => teacher.close());

  const page = await open(t, "#/distil", { expected: ["404"] });
  await page.getByLabel("Task", { exact: true }).fill("remote");
  await page.getByLabel("Training rows").setInputFiles(install.rows(200));
  await page.getByRole("combobox", { name: "Teacher" }).selectOption("http");
  await page.getByLabel("Address").fill(`http://127.0.0.1:${teacher.address().port}/predict`);
  // Whether so few rows pass the gate is another question.
  await page.getByLabel("Take it into service if it passes").uncheck();
  await page.getByRole("button", { name: "Start" }).click();
  const job = page.locator(".job", { has: page.getByRole("link", { name: "remote" }) });
  await job.and(page.locator("[data-state=succeeded]")).waitFor();
  await job.getByRole("link", { name: "remote" }).click();
  await page.getByText("No version is live.").waitFor();
  await page.getByRole("button", { name: "Promote version 1" }).click();
  const dialog = page.getByRole("dialog");
  await dialog.getByRole("button", { name: "Promote" }).click();
  await page.getByLabel("Text", { exact: true }).fill("1 2 3");
  await page.getByRole("button", { name: "Classify" }).click();
  await heading(page, "Student, version 1").waitFor();
  for (const label of ["digits", "letters"]) {
    await page.locator(".scores").getByText(label, { exact: true }).waitFor();
  }

  await page.getByRole("button", { name: "Take out of service" }).click();
  await dialog.getByRole("button", { name: "Take out of service" }).click();
  await page.getByText("No version is live.").waitFor();
  assert.equal((await fetch(`${server.url}/v1/tasks/remote`)).status, 404);
});

test("a refused request says why, and a failed one too", async (t) => {
  const page = await open(t, "#/distil", { expected: ["422"] });
  await page.getByLabel("Task", { exact: true }).fill("kind");
  const rows = install.path("bad.csv");
  writeFileSync(rows, "text,label\n");
  await page.getByLabel("Training rows").setInputFiles(rows);
  await page.getByRole("combobox", { name: "Teacher" }).selectOption("none");
  await page.getByRole("button", { name: "Start" }).click();
  const alert = page.getByRole("alert");
  await alert.waitFor();
  assert.match(await alert.textContent(), /row/);
});

test("the documentation of the API comes from the server alone", async (t) => {
  const page = await open(t, "docs/");
  await page.locator('[data-path="/v1/classify/{task}"]').first().waitFor();
  await picture(page, "docs");
});

test("requests, latency, queue and memory are drawn", async (t) => {
  const page = await open(t, "#/server");
  await page.getByRole("img", { name: /^Memory: process \d/ }).waitFor();
  for (let i = 0; i < 20; i += 1) {
    await fetch(`${server.url}/v1/classify/pairs`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ inputs: "a b c" }),
    });
  }
  await page.getByRole("img", { name: /^Requests a second: answered (?!0\.0)\d/ }).waitFor();
  await page.getByRole("img", { name: /^Latency of requests: p50 [\d.]+ ms/ }).waitFor();
  for (const name of ["Waiting and in flight", "Tokens a second"]) {
    assert.equal(await page.getByRole("img", { name }).count(), 1, name);
  }
  await picture(page, "server");
});

test("every metric that the page reads is in the scrape", async (t) => {
  const page = await open(t);
  await heading(page, "Tasks").waitFor();
  const names = await page.evaluate(async () => Object.values((await import("/page/metrics.js")).NAMES));
  const scrape = await (await fetch(`${server.url}/metrics`)).text();
  assert.ok(names.length > 5);
  for (const name of names) assert.match(scrape, new RegExp(`^# TYPE ${name} `, "m"));
});

test("with a token set, what needs it asks for it, and the tab keeps it", async (t) => {
  const other = new Install();
  t.after(() => other.remove());
  const file = other.path("token");
  writeFileSync(file, "s3cret-token-of-the-page-tests\n");
  const guarded = await other.start(`--admin-token-file=${file}`);
  t.after(() => guarded.stop());
  const page = await open(t, "#/distil", { url: guarded.url, expected: ["401", GONE] });
  await page.getByText("Set the access token").first().waitFor();
  await page.getByRole("button", { name: "Access token" }).click();
  await page.getByLabel("Token", { exact: true }).fill("wrong");
  await page.keyboard.press("Enter");
  await page.getByRole("dialog").getByRole("alert").waitFor();
  await page.getByLabel("Token", { exact: true }).fill("s3cret-token-of-the-page-tests");
  await page.keyboard.press("Enter");
  await heading(page, "New distillation").waitFor();
  await page.reload();
  await heading(page, "New distillation").waitFor();
  const kept = await page.evaluate(() => [localStorage.length, document.cookie]);
  assert.deepEqual(kept, [0, ""]);
});

test("it looks right in the dark and on a phone, and nothing sticks out", async (t) => {
  for (const [name, options] of [
    ["dark", { colorScheme: "dark" }],
    ["light", { colorScheme: "light" }],
    ["phone", { viewport: { width: 360, height: 740 } }],
  ]) {
    for (const view of ["tasks", "task/kind", "distil", "server"]) {
      const page = await open(t, `#/${view}`, options);
      await page.locator(view === "server" ? "main .chart" : "main .card").first().waitFor();
      const [content, window] = await page.evaluate(() => [
        document.documentElement.scrollWidth,
        document.documentElement.clientWidth,
      ]);
      assert.ok(content <= window, `${name}, ${view}: ${content} of ${window}`);
      await picture(page, `${view.replace("/", "-")}-${name}`);
    }
  }
});

test("every control has a name", async (t) => {
  for (const view of ["tasks", "task/kind", "distil", "server"]) {
    const page = await open(t, `#/${view}`);
    await page.locator("main .card").first().waitFor();
    const nameless = await page.evaluate(() =>
      [...document.querySelectorAll("button, a, input, select, textarea, summary, [role=img]")]
        .filter((element) => !(element.labels?.length || element.textContent.trim() || element.ariaLabel))
        .map((element) => element.outerHTML),
    );
    assert.deepEqual(nameless, [], view);
  }
});
