//! Score over latency, as an SVG.

use std::fmt::{self, Write as _};

use plot::{Axis, BOTTOM, COLOURS, LEFT, RIGHT, TOP, escape};

use super::table::{Comparison, RowSummary};

/// A point a row with its 95 % interval; rows without a latency are left out.
pub(super) fn svg(comparison: &Comparison) -> String {
    let rows: Vec<(&RowSummary, f64)> = comparison
        .rows
        .iter()
        .filter_map(|row| Some((row, row.latency?.batch_1.p50_ms)))
        .collect();
    let least = |values: &mut dyn Iterator<Item = f64>| values.fold(f64::INFINITY, f64::min);
    let most = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0, f64::max);
    let fastest = least(&mut rows.iter().map(|(_, ms)| *ms)).clamp(1e-3, 1e6);
    let slowest = most(&mut rows.iter().map(|(_, ms)| *ms)).max(fastest);
    let lowest = least(&mut rows.iter().map(|(row, _)| row.low)).min(1.0);
    let highest = most(&mut rows.iter().map(|(row, _)| row.high)).max(lowest);
    let x = Axis::logarithmic(fastest * 0.8, slowest * 1.5, LEFT, RIGHT);
    let y = Axis::around(lowest, highest, BOTTOM, TOP);
    let title = format!("{}: score over latency", comparison.task);
    plot::svg(
        &title,
        (&x, "p50 of one text on one thread, ms"),
        (&y, &comparison.metric.to_string()),
        |out| {
            rows.iter()
                .enumerate()
                .try_for_each(|(i, (row, ms))| draw(out, row, *ms, i, rows.len(), &x, &y))
        },
    )
}

fn draw(
    out: &mut String,
    row: &RowSummary,
    ms: f64,
    index: usize,
    count: usize,
    x: &Axis,
    y: &Axis,
) -> fmt::Result {
    let colour = index % COLOURS;
    // Rows of one encoder are equally fast: side by side, their intervals can be told apart.
    let shift = 9.0 * (index as f64 - (count as f64 - 1.0) / 2.0);
    let (cx, cy) = (x.place(ms) + shift, y.place(row.mean));
    writeln!(
        out,
        "<line class=\"line s{colour}\" x1=\"{cx:.1}\" x2=\"{cx:.1}\" y1=\"{:.1}\" y2=\"{:.1}\"/>\n\
         <circle class=\"f{colour}\" cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"4\"><title>{}: {:.3} ({:.3} \
         to {:.3}), {ms:.1} ms</title></circle>",
        y.place(row.low),
        y.place(row.high),
        escape(&row.row),
        row.mean,
        row.low,
        row.high,
    )?;
    // Names stand in a list, each at its colour: beside the points they would cover each other.
    let (left, top) = (
        LEFT + 220.0 * (index / 3) as f64,
        20.0 + 17.0 * (index % 3) as f64,
    );
    writeln!(
        out,
        "<circle class=\"f{colour}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"4\"/>\n<text x=\"{:.1}\" \
         y=\"{top:.1}\">{}: {:.3}</text>",
        left + 4.0,
        top - 4.0,
        left + 16.0,
        escape(&row.row),
        row.mean
    )
}
