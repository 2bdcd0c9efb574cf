//! Latency over rate, as an SVG that follows the reader's light or dark scheme.

use std::fmt::{self, Write};

use plot::{Axis, BOTTOM, COLOURS, LEFT, RIGHT, TOP, escape, figure};

/// The x axis is logarithmic where curves differ so much that a linear one would squeeze the
/// slower into a corner.
const LINEAR_UP_TO: f64 = 4.0;

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Point {
    pub(super) rate: f64,
    pub(super) p50_ms: f64,
    pub(super) p99_ms: f64,
    /// Drawn open if false.
    pub(super) held: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Curve {
    pub(super) name: String,
    /// By rate.
    pub(super) points: Vec<Point>,
}

/// The plot; curves must have points.
pub(super) fn svg(curves: &[Curve], bound_ms: Option<f64>) -> String {
    let points = || curves.iter().flat_map(|curve| &curve.points);
    let least = points()
        .map(|point| point.p50_ms)
        .fold(f64::INFINITY, f64::min);
    let most = points().map(|point| point.p99_ms).fold(0.0, f64::max);
    let with_bound = bound_ms.map_or(most, |bound| most.max(bound));
    let y = Axis::logarithmic(least.max(1e-3), with_bound.max(1e-3), BOTTOM, TOP);
    let x = rates(curves);
    let names: Vec<&str> = curves.iter().map(|curve| &*curve.name).collect();
    let title = format!("Latency over the rate of requests: {}", names.join(", "));
    plot::svg(
        &title,
        (&x, "requests offered a second"),
        (&y, "latency of answered requests, ms"),
        |out| {
            if let Some(bound) = bound_ms {
                draw_bound(out, bound, &y)?;
            }
            for (i, curve) in curves.iter().enumerate() {
                draw(out, curve, i % COLOURS, &x, &y)?;
            }
            legend(out, curves)
        },
    )
}

fn draw_bound(out: &mut String, bound: f64, y: &Axis) -> fmt::Result {
    let place = y.place(bound);
    writeln!(
        out,
        "<line class=\"bound\" x1=\"{LEFT}\" x2=\"{RIGHT}\" y1=\"{place:.1}\" \
         y2=\"{place:.1}\"/>\n<text class=\"small\" x=\"{:.1}\" y=\"{:.1}\">bound of p99: {} \
         ms</text>",
        LEFT + 8.0,
        place - 6.0,
        figure(bound)
    )
}

fn rates(curves: &[Curve]) -> Axis {
    let ends = curves.iter().filter_map(|curve| curve.points.last());
    let ends: Vec<f64> = ends.map(|point| point.rate).collect();
    let most = ends.iter().copied().fold(0.0, f64::max);
    let shortest = ends.iter().copied().fold(f64::INFINITY, f64::min);
    if most <= shortest * LINEAR_UP_TO {
        return Axis::linear(most, LEFT, RIGHT);
    }
    let starts = curves.iter().filter_map(|curve| curve.points.first());
    let least = starts.map(|point| point.rate).fold(f64::INFINITY, f64::min);
    Axis::logarithmic(least, most, LEFT, RIGHT)
}

fn draw(out: &mut String, curve: &Curve, colour: usize, x: &Axis, y: &Axis) -> fmt::Result {
    for class in ["p50", "p99"] {
        let value = |point: &Point| match class {
            "p50" => point.p50_ms,
            _ => point.p99_ms,
        };
        let places: Vec<String> = curve
            .points
            .iter()
            .map(|point| format!("{:.1},{:.1}", x.place(point.rate), y.place(value(point))))
            .collect();
        writeln!(
            out,
            "<polyline class=\"line {class} s{colour}\" points=\"{}\"/>",
            places.join(" ")
        )?;
    }
    for point in &curve.points {
        let (class, name) = (if point.held { "f" } else { "open s" }, &curve.name);
        writeln!(
            out,
            "<circle class=\"{class}{colour}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"4\"><title>{}: p99 \
             {:.1} ms, p50 {:.1} ms at {:.1} requests a second</title></circle>",
            x.place(point.rate),
            y.place(point.p99_ms),
            escape(name),
            point.p99_ms,
            point.p50_ms,
            point.rate
        )?;
    }
    Ok(())
}

fn legend(out: &mut String, curves: &[Curve]) -> fmt::Result {
    let mut left = LEFT;
    for (i, curve) in curves.iter().enumerate() {
        let colour = i % COLOURS;
        writeln!(
            out,
            "<line class=\"line s{colour}\" x1=\"{left:.1}\" x2=\"{:.1}\" y1=\"24\" y2=\"24\"/>\n\
             <text x=\"{:.1}\" y=\"28\">{}</text>",
            left + 26.0,
            left + 34.0,
            escape(&curve.name)
        )?;
        left += 64.0 + 7.5 * curve.name.chars().count() as f64;
    }
    let open = curves
        .iter()
        .flat_map(|curve| &curve.points)
        .any(|point| !point.held);
    let remark = if open {
        "solid: p99, dashed: p50; open circles: the bounds did not hold"
    } else {
        "solid: p99, dashed: p50"
    };
    writeln!(
        out,
        "<text class=\"small\" x=\"{LEFT}\" y=\"50\">{remark}</text>"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(name: &str, rates: &[f64]) -> Curve {
        let point = |rate: &f64| Point {
            rate: *rate,
            p50_ms: 10.0,
            p99_ms: 10.0 + rate,
            held: *rate < 90.0,
        };
        Curve {
            name: name.to_owned(),
            points: rates.iter().map(point).collect(),
        }
    }

    #[test]
    fn a_plot_of_two_curves_looks_as_it_should() {
        let curves = [
            curve("student", &[20.0, 50.0, 100.0]),
            curve("teacher", &[2.0, 8.0]),
        ];
        insta::assert_snapshot!(svg(&curves, Some(200.0)));
    }

    #[test]
    fn names_cannot_break_the_markup() {
        let text = svg(&[curve("<a> & b", &[1.0, 2.0])], None);
        assert!(text.contains("&lt;a&gt; &amp; b") && !text.contains("<a>"));
    }

    #[test]
    fn rates_are_on_a_linear_axis_unless_the_curves_differ_much() {
        assert!(!rates(&[curve("a", &[1.0, 100.0]), curve("b", &[30.0])]).logarithmic);
        assert!(rates(&[curve("a", &[1.0, 100.0]), curve("b", &[10.0])]).logarithmic);
    }
}
