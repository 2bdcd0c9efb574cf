// Small line charts. Each carries its latest figures as text, which is what screen readers get.

import { h, s } from "./dom.js";

const [WIDTH, HEIGHT] = [360, 140];
const [LEFT, RIGHT, TOP, BOTTOM] = [60, 6, 8, 18];

/** `lines`: `[{name, points: [[x, y]]}]`, gaps where y is not finite. `format` writes a value,
 * `span` says what the x axis covers, as text at its two ends. `base` is 1024 for bytes. */
export function chart({ title, lines, format, span, minimumTop = 0, base = 10 }) {
  const values = lines.flatMap((line) => line.points.map(([, y]) => y)).filter(Number.isFinite);
  const xs = lines.flatMap((line) => line.points.map(([x]) => x));
  const top = nice(Math.max(minimumTop, ...values, 1e-9), base);
  const [first, last] = [Math.min(...xs), Math.max(...xs)];
  const x = (value) => LEFT + ((WIDTH - LEFT - RIGHT) * (value - first)) / Math.max(last - first, 1e-9);
  const y = (value) => HEIGHT - BOTTOM - ((HEIGHT - TOP - BOTTOM) * Math.max(0, value)) / top;

  const grid = [0, 0.5, 1].map((share) => [
    s("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(top * share), y2: y(top * share) }),
    s("text", { x: LEFT - 6, y: y(top * share) + 4, "text-anchor": "end" }, format(top * share)),
  ]);
  const ends = [
    s("text", { x: LEFT, y: HEIGHT - 3 }, span[0]),
    s("text", { x: WIDTH - RIGHT, y: HEIGHT - 3, "text-anchor": "end" }, span[1]),
  ];
  const drawn = lines.flatMap((line, i) =>
    pieces(line.points).map((piece) =>
      s("polyline", {
        class: `line-${i % 4}`,
        points: piece.map((point) => `${x(point[0]).toFixed(1)},${y(point[1]).toFixed(1)}`).join(" "),
      }),
    ),
  );
  const latest = lines.map((line) => `${line.name} ${format(line.points.at(-1)?.[1] ?? NaN)}`);
  const image = s(
    "svg",
    {
      class: "chart",
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
      role: "img",
      "aria-label": `${title}: ${latest.join(", ")}`,
    },
    grid,
    ends,
    drawn,
  );
  const legend = lines.map((line, i) =>
    h(
      "li",
      {},
      s(
        "svg",
        { viewBox: "0 0 16 8", "aria-hidden": "true" },
        s("line", { class: `line-${i % 4}`, x1: 0, x2: 16, y1: 4, y2: 4 }),
      ),
      latest[i],
    ),
  );
  return h("figure", { class: "figure" }, image, h("ul", { class: "legend" }, legend));
}

/** Runs of points that have a value; one alone becomes a short dash. */
function pieces(points) {
  const runs = [[]];
  for (const point of points) {
    if (Number.isFinite(point[1])) runs.at(-1).push(point);
    else if (runs.at(-1).length > 0) runs.push([]);
  }
  return runs
    .filter((run) => run.length > 0)
    .map((run) => (run.length > 1 ? run : [run[0], [run[0][0] + 1e-3, run[0][1]]]));
}

/** The next round figure above `value`. */
function nice(value, base) {
  const power = base ** Math.floor(Math.log(value) / Math.log(base));
  const steps = base === 10 ? [1, 2, 4, 5, 10] : [1, 2, 4, 8, 16, 32, 64, 100, 200, 400, 600, 800, 1024];
  return power * (steps.find((step) => step * power >= value) ?? base);
}
