// Building the page. Text that comes from the server (task names, labels, reasons) only ever
// becomes a text node or an attribute's value: nothing here or elsewhere parses it as HTML.

const SVG = "http://www.w3.org/2000/svg";

/** An element. `props` with `on…` are listeners, the others attributes; `false` and `null` leave
 * an attribute out. Children are nodes, strings, numbers, or lists of them; `null` is skipped. */
export function h(tag, props, ...children) {
  return fill(document.createElement(tag), props, children);
}

/** The same for SVG. */
export function s(tag, props, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

function fill(element, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  add(element, children);
  return element;
}

function add(element, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : String(child));
  }
}

/** Replaces what is in `element`. */
export function show(element, ...children) {
  element.replaceChildren();
  add(element, children);
  return element;
}

/** A table whose caption is read out and not seen. A column is its heading, `[heading, class]`, or
 * `null` for one without. */
export function table(caption, columns, rows, props = {}) {
  const heading = (column) => {
    if (column === null) return h("td", {});
    const [name, kind] = [column].flat();
    return h("th", { scope: "col", class: kind }, name);
  };
  return h(
    "table",
    props,
    h("caption", { class: "visually-hidden" }, caption),
    h("thead", {}, h("tr", {}, columns.map(heading))),
    h("tbody", {}, rows),
  );
}

/** A row of figures behind their name. */
export function figureRow(name, figures) {
  return h(
    "tr",
    {},
    h("th", { scope: "row" }, name),
    figures.map((figure) => h("td", { class: "number" }, figure)),
  );
}

/** A labelled control. `hint` is read out with it. */
export function field(label, control, hint) {
  control.id ||= unique("field");
  const parts = [h("label", { for: control.id }, label), control];
  if (hint) {
    const id = `${control.id}-hint`;
    control.setAttribute("aria-describedby", id);
    parts.push(h("p", { class: "hint", id }, hint));
  }
  return h("div", { class: "field" }, parts);
}

/** A checkbox with its label. */
export function check(label, props) {
  const box = h("input", { type: "checkbox", ...props });
  return [box, h("label", { class: "check field" }, box, label)];
}

let count = 0;

export function unique(prefix) {
  count += 1;
  return `${prefix}-${count}`;
}

export function message(kind, ...children) {
  return h("div", { class: `message ${kind}`, role: kind === "bad" ? "alert" : "status" }, children);
}

/** Tells screen readers of a change that eyes see by themselves. */
export function announce(text) {
  show(document.getElementById("announce"), text);
}

/** A horizontal bar, `share` of 1. Decoration: the figure stands beside it as text. */
export function bar(share, kind) {
  const width = 100 * Math.min(1, Math.max(0, share));
  return s(
    "svg",
    { class: "bar", viewBox: "0 0 100 1", preserveAspectRatio: "none", "aria-hidden": "true" },
    s("rect", { class: kind, width, height: 1 }),
  );
}

/** Asks before something that others notice. Resolves to the reason typed, or `null` for no. */
export function confirm(title, text, action) {
  return new Promise((resolve) => {
    const reason = h("input", { type: "text", maxlength: 200, autocomplete: "off" });
    const heading = unique("dialog");
    let answer = null;
    const accept = () => {
      answer = reason.value.trim();
      dialog.close();
    };
    const dialog = h(
      "dialog",
      { "aria-labelledby": heading },
      h("h2", { id: heading }, title),
      h("p", {}, text),
      field("Reason, for the history (optional)", reason),
      h(
        "div",
        { class: "actions" },
        h("button", { type: "button", onclick: accept }, action),
        h("button", { type: "button", class: "quiet", onclick: () => dialog.close() }, "Cancel"),
      ),
    );
    reason.addEventListener("keydown", (event) => event.key === "Enter" && accept());
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(answer);
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}

export function number(value, digits = 3) {
  return Number.isFinite(value) ? value.toFixed(digits) : "–";
}

export function percent(value) {
  return Number.isFinite(value) ? `${(100 * value).toFixed(1)} %` : "–";
}

export function milliseconds(value) {
  if (!Number.isFinite(value)) return "–";
  return `${value < 10 ? value.toFixed(2) : value < 100 ? value.toFixed(1) : value.toFixed(0)} ms`;
}

export function bytes(value) {
  if (!Number.isFinite(value)) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = value < 1 ? 0 : Math.min(4, Math.floor(Math.log2(value) / 10));
  const scaled = value / 1024 ** power;
  return `${power === 0 ? scaled.toFixed(0) : scaled.toFixed(1)} ${units[power]}`;
}

export function duration(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

export function time(text) {
  const date = new Date(text);
  if (Number.isNaN(date.getTime())) return text ?? "–";
  return h("time", { datetime: text }, date.toLocaleString());
}
