// The page: which view the address asks for, whether the server is ready, the access token.

import { request, token } from "./api.js";
import { field, h, message, show, unique } from "./dom.js";
import * as metrics from "./metrics.js";
import * as distil from "./distil.js";
import * as server from "./server.js";
import * as task from "./task.js";
import * as tasks from "./tasks.js";

const main = document.getElementById("main");

/** Views by the first part of the address after `#/`. Each fills `main` and may return what is to
 * be called when it is left. */
const views = { tasks, task, distil, server };

let leave = null;
let turn = 0;

async function route(focus) {
  const [name, ...rest] = location.hash.replace(/^#\/?/, "").split("/");
  const view = views[name] ?? tasks;
  const current = name in views ? name : "tasks";
  for (const link of document.querySelectorAll("nav a")) {
    const target = link.hash.slice(2);
    const here = target === current || (target === "tasks" && current === "task");
    if (here) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  leave?.();
  leave = null;
  turn += 1;
  const mine = turn;
  const place = h("div", {});
  show(main, place);
  if (focus) main.focus();
  try {
    const left = await view.render(place, rest.map(decodeURIComponent).join("/"));
    if (mine === turn) leave = left;
    else left?.();
  } catch (error) {
    show(place, failure(error));
  }
  document.title = `${place.querySelector("h1")?.textContent ?? "kdlora"} · kdlora`;
}

function failure(error) {
  return message("bad", h("strong", {}, error.title ?? "Something went wrong"), " – ", error.message);
}

async function watchReadiness() {
  const badge = document.getElementById("ready");
  let text = "starting";
  let kind = "";
  try {
    const response = await fetch("/readyz", { cache: "no-store" });
    const problem = response.ok ? null : await response.json();
    text = problem ? problem.detail : "ready";
    kind = problem ? "" : "ok";
  } catch {
    text = "no connection";
    kind = "down";
  }
  const before = badge.textContent;
  if (before !== text) {
    show(badge, text);
    badge.className = `ready ${kind}`;
    // What could not be shown while the server started can be shown.
    if (kind === "ok" && before !== "…") route(false);
  }
  setTimeout(watchReadiness, 5000);
}

function tokenDialog() {
  const input = h("input", { type: "password", autocomplete: "off", value: token.get() ?? "" });
  const heading = unique("dialog");
  const outcome = h("div", {});
  const save = async () => {
    const before = token.get();
    token.set(input.value.trim());
    try {
      await request("/admin/jobs?limit=1");
      dialog.close();
      route(false);
    } catch (error) {
      token.set(before);
      show(outcome, failure(error));
    }
  };
  const forget = () => {
    token.set(null);
    dialog.close();
    route(false);
  };
  input.addEventListener("keydown", (event) => event.key === "Enter" && save());
  const dialog = h(
    "dialog",
    { "aria-labelledby": heading },
    h("h2", { id: heading }, "Access token"),
    field("Token", input, "Kept for this tab only, and sent to this server only."),
    outcome,
    h(
      "div",
      { class: "actions" },
      h("button", { type: "button", onclick: save }, "Use it"),
      h("button", { type: "button", class: "quiet", onclick: forget }, "Forget it"),
      h("button", { type: "button", class: "quiet", onclick: () => dialog.close() }, "Cancel"),
    ),
  );
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}

// The address names the view, so the link's own would lead away from it.
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
document.getElementById("token-button").addEventListener("click", tokenDialog);
window.addEventListener("hashchange", () => route(true));
metrics.start();
watchReadiness();
route(false);
