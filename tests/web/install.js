// A server made of the golden files, as in tests/common.

import { spawn } from "node:child_process";
import { cpSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";

const tree = join(dirname(fileURLToPath(import.meta.url)), "../..");
const target = process.env.CARGO_TARGET_DIR ?? join(tree, "target");
const PROGRAM = process.env.KDLORA ?? join(target, "debug/kdlora");
const golden = (path) => join(tree, "tests/golden", path);

/** Words that the tiny encoders have. */
const VOCABULARY = 60;

/** Labels that would run, were they taken for markup. */
export const HOSTILE = ["<img src=x onerror=window.pwned=1>", "\"><script>window.pwned=1</script>"];

function model(folder) {
  mkdirSync(folder, { recursive: true });
  for (const file of ["config.json", "model.safetensors"]) {
    cpSync(golden(`models/bert-pairs/${file}`), join(folder, file));
  }
  const tokenizer = JSON.parse(readFileSync(golden("tokenizers/bert/tokenizer.json"), "utf8"));
  const words = Object.entries(tokenizer.model.vocab).filter(([, id]) => id < VOCABULARY);
  tokenizer.model.vocab = Object.fromEntries(words);
  writeFileSync(join(folder, "tokenizer.json"), JSON.stringify(tokenizer));
}

function edit(path, change) {
  const value = JSON.parse(readFileSync(path, "utf8"));
  change(value);
  writeFileSync(path, JSON.stringify(value));
}

/** Folders of a server: a tiny student, the task `pairs` without a report, and below the data root
 * a teacher whose labels are hostile. */
export class Install {
  constructor() {
    this.folder = mkdtempSync(join(tmpdir(), "kdlora-page-"));
    model(this.path("student"));
    cpSync(golden("adapters/bert-pairs-qv"), this.path("adapters/pairs/student"), { recursive: true });
    model(this.path("data/teacher"));
    edit(this.path("data/teacher/config.json"), (config) => {
      config.id2label = { 0: HOSTILE[0], 1: HOSTILE[1] };
      config.label2id = { [HOSTILE[0]]: 0, [HOSTILE[1]]: 1 };
    });
  }

  path(name) {
    return join(this.folder, name);
  }

  /** Rows without labels for the teacher to answer. */
  rows(count) {
    const letters = "abcdefgh12345678";
    const text = (i) => [0, 1, 2, 3].map((place) => letters[(i * (place + 3) + (i >> (place * 2))) % 16]).join(" ");
    const lines = Array.from({ length: count }, (_, i) => JSON.stringify({ text: text(i) }));
    const path = this.path("rows.jsonl");
    writeFileSync(path, `${lines.join("\n")}\n`);
    return path;
  }

  async start(...flags) {
    const child = spawn(
      PROGRAM,
      [
        "--log=warn",
        "serve",
        "--bind=127.0.0.1:0",
        "--threads=1",
        `--student=${this.path("student")}`,
        `--adapters=${this.path("adapters")}`,
        `--data-root=${this.path("data")}`,
        `--state=${this.path("state")}`,
        `--cache=${this.path("cache")}`,
        ...flags,
      ],
      { stdio: ["ignore", "pipe", "inherit"] },
    );
    for await (const line of createInterface({ input: child.stdout })) {
      const url = line.match(/^kdlora listens on (.*)$/)?.[1];
      if (url) return { url, stop: () => stop(child) };
    }
    throw new Error("the server ended before it was ready");
  }

  remove() {
    rmSync(this.folder, { recursive: true, force: true });
  }
}

function stop(child) {
  const ended = new Promise((resolve) => child.once("exit", resolve));
  child.kill("SIGTERM");
  return ended;
}
