// Versions of a task: compared, promoted, rolled back.

import { api } from "./api.js";
import { bytes, confirm, field, figureRow, h, message, number, percent, show, table, time } from "./dom.js";
import { versus } from "./tasks.js";

/** `answer` is what `Promise.allSettled` made of the request for the versions; `again` shows the
 * task anew. */
export function versionsCard(task, answer, again) {
  const heading = h("h2", {}, "Versions");
  if (answer.status === "rejected") {
    const hint = answer.reason.needsToken
      ? "Versions can be seen and promoted with an admin token. Set it at the top of the page."
      : answer.reason.message;
    return h("section", { class: "card" }, heading, message("warn", hint));
  }
  const { versions, live, history } = answer.value;
  const outcome = h("div", {});
  const change = (act) => async () => {
    try {
      await act();
      await again();
    } catch (error) {
      show(outcome, message("bad", error.message));
    }
  };
  const promote = (version) =>
    change(async () => {
      const now = live ? `Version ${live} answers until then. ` : "";
      const text = `${now}Requests that have begun end with the version they began with.`;
      const reason = await confirm(`Let version ${version} of ${task} answer?`, text, "Promote");
      if (reason !== null) await api.promote(task, version, reason);
    });
  const rollback = change(async () => {
    const text = "The version that was live before the last promotion answers again.";
    const reason = await confirm(`Roll ${task} back?`, text, "Roll back");
    if (reason !== null) await api.rollback(task, reason);
  });
  const withdraw = change(async () => {
    const text = "Requests for it are refused until a version is promoted. Its versions stay.";
    const reason = await confirm(`Take ${task} out of service?`, text, "Take out of service");
    if (reason !== null) await api.withdraw(task, reason);
  });
  return h(
    "section",
    { class: "card", "aria-label": "Versions" },
    heading,
    h("div", {}, all(task, [...versions].reverse(), promote)),
    h(
      "div",
      { class: "actions" },
      h(
        "button",
        { type: "button", class: "danger", onclick: rollback, disabled: history.length < 2 },
        "Roll back",
      ),
      live &&
        h("button", { type: "button", class: "danger", onclick: withdraw }, "Take out of service"),
    ),
    outcome,
    versions.filter((version) => version.report).length > 1 && compare(task, versions, live),
    changes(history),
  );
}

function all(task, versions, promote) {
  const columns = ["Version", "Made", "Score beside the teacher", "Kept", "Gate", "Size"];
  const actions = h("span", { class: "visually-hidden" }, "Actions");
  const rows = versions.map((version) => row(version, promote));
  return table(`Versions of ${task}, newest first`, [...columns, [actions]], rows, { class: "stack" });
}

function row(version, promote) {
  const { report } = version;
  const action = version.live
    ? h("span", { class: "badge good" }, "live")
    : h(
        "button",
        {
          type: "button",
          class: "quiet",
          disabled: version.missing,
          onclick: promote(version.version),
          "aria-label": `Promote version ${version.version}`,
        },
        "Promote",
      );
  return h(
    "tr",
    {},
    h("th", { scope: "row" }, version.version),
    h("td", { "data-name": "Made" }, h("span", {}, version.origin, h("br"), time(version.created_at))),
    h("td", { "data-name": "Score", class: "wide" }, report ? versus(report) : "no report"),
    h("td", { "data-name": "Kept" }, percent(report?.share_kept)),
    h("td", { "data-name": "Gate" }, gate(report?.gate)),
    h("td", { "data-name": "Size" }, version.missing ? "files are gone" : bytes(version.bytes)),
    h("td", { "data-name": "" }, action),
  );
}

function gate(found) {
  if (!found) return h("span", { class: "soft" }, "–");
  if (found.passed) return h("span", { class: "badge good" }, "passed");
  return h(
    "details",
    {},
    h("summary", {}, h("span", { class: "badge warn" }, "not passed")),
    (found.reasons ?? []).map((reason) => h("p", { class: "small" }, reason)),
  );
}

function compare(task, versions, live) {
  const with_report = versions.filter((version) => version.report);
  const choice = (chosen) =>
    h(
      "select",
      {},
      with_report.map(({ version }) =>
        h("option", { value: version, selected: version === chosen }, `version ${version}`),
      ),
    );
  const last = with_report.at(-1).version;
  const other = with_report.findLast((one) => one.version !== last);
  const start = with_report.find((one) => one.version === live && live !== last) ?? other;
  const [a, b] = [choice(start.version), choice(last)];
  const place = h("div", { class: "scroll" });
  const refresh = async () => {
    try {
      show(place, difference(await api.compare(task, a.value, b.value)));
    } catch (error) {
      show(place, message("bad", error.message));
    }
  };
  a.addEventListener("change", refresh);
  b.addEventListener("change", refresh);
  refresh();
  return h(
    "details",
    {},
    h("summary", {}, "Compare two versions"),
    h("div", { class: "fields" }, field("One", a), field("Another", b)),
    place,
  );
}

/** What the server says of two versions beside each other. */
function difference({ versions: [one, other], figures, comparable, reason, significant }) {
  const written = (value) =>
    Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : number(value, 4);
  const rows = figures.map(({ name, first, second, difference }) =>
    figureRow(name, [first, second, difference].map(written)),
  );
  const columns = [`version ${one}`, `version ${other}`, "difference"].map((name) => [name, "number"]);
  const change = figures[0].difference;
  const apart = significant ? "The 95 % intervals are apart." : "The 95 % intervals overlap.";
  return [
    table("The students of two versions", [null, ...columns], rows),
    h(
      "p",
      { class: "small" },
      Number.isFinite(change) &&
        `Version ${other} scores ${change < 0 ? "−" : "+"}${number(Math.abs(change))} beside version ${one}. `,
      comparable ? apart : `The scores can't be compared: ${reason}.`,
    ),
  ];
}

function changes(history) {
  if (history.length === 0) return null;
  const verb = { promote: "promoted", rollback: "rolled back to", withdraw: "took out of service" };
  return h(
    "details",
    {},
    h("summary", {}, "History"),
    h(
      "ol",
      { class: "small" },
      history.map((change) =>
        h(
          "li",
          {},
          time(change.at),
          ` ${verb[change.kind] ?? change.kind} version ${change.version} by ${change.actor}: ${change.reason}`,
        ),
      ),
    ),
  );
}
