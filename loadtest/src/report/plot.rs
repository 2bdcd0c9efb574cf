//! Latency over rate, as an SVG that follows the reader's light or dark scheme.

use std::fmt::{self, Write};

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 460.0;
/// The area of the curves.
const LEFT: f64 = 72.0;
const RIGHT: f64 = WIDTH - 24.0;
const TOP: f64 = 72.0;
const BOTTOM: f64 = HEIGHT - 56.0;

/// Curves that have a colour of their own; those after them begin again.
const COLOURS: usize = 4;

/// The x axis is logarithmic where curves differ so much that a linear one would squeeze the
/// slower into a corner.
const LINEAR_UP_TO: f64 = 4.0;

/// Colours after Okabe and Ito, which differ for colour-blind readers as well; those of the dark
/// scheme are lighter.
const STYLE: &str = "\
.ground{fill:#ffffff}\
text{font:13px system-ui,sans-serif;fill:#1f2328}\
.small{font-size:12px;fill:#57606a}\
.grid{stroke:#d8dee4;stroke-width:1}\
.bound{stroke:#57606a;stroke-width:1.5;stroke-dasharray:2 4}\
.line{fill:none;stroke-width:2}\
.p50{stroke-dasharray:6 4}\
.s0{stroke:#0072b2}.f0{fill:#0072b2}\
.s1{stroke:#c25100}.f1{fill:#c25100}\
.s2{stroke:#007a5a}.f2{fill:#007a5a}\
.s3{stroke:#a3477f}.f3{fill:#a3477f}\
.open{fill:#ffffff;stroke-width:2}\
@media(prefers-color-scheme:dark){\
.ground{fill:#0d1117}\
text{fill:#e6edf3}\
.small{fill:#9da7b3}\
.grid{stroke:#30363d}\
.bound{stroke:#9da7b3}\
.s0{stroke:#56b4e9}.f0{fill:#56b4e9}\
.s1{stroke:#f0a350}.f1{fill:#f0a350}\
.s2{stroke:#3fc79a}.f2{fill:#3fc79a}\
.s3{stroke:#e08fc0}.f3{fill:#e08fc0}\
.open{fill:#0d1117}\
}";

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

/// A scale from figures to places.
struct Axis {
    logarithmic: bool,
    low: f64,
    high: f64,
    from: f64,
    to: f64,
    ticks: Vec<f64>,
}

impl Axis {
    fn linear(most: f64, from: f64, to: f64) -> Self {
        let step = round_step(most / 6.0);
        let count = (most / step).ceil().max(1.0);
        Self {
            logarithmic: false,
            low: 0.0,
            high: step * count,
            from,
            to,
            ticks: (0..=count as u32).map(|i| f64::from(i) * step).collect(),
        }
    }

    /// Ticks at 1, 2 and 5 times the powers of ten.
    fn logarithmic(least: f64, most: f64, from: f64, to: f64) -> Self {
        let mut ticks = Vec::new();
        let mut power = 10_f64.powf(least.log10().floor());
        let mut wide = false;
        while !wide {
            for factor in [1.0, 2.0, 5.0] {
                let tick = factor * power;
                // The last one at or below the least is where the axis begins.
                if tick <= least {
                    ticks.clear();
                }
                ticks.push(tick);
                if tick >= most && ticks.len() > 1 {
                    wide = true;
                    break;
                }
            }
            power *= 10.0;
        }
        Self {
            logarithmic: true,
            low: ticks[0],
            high: ticks[ticks.len() - 1],
            from,
            to,
            ticks,
        }
    }

    fn place(&self, value: f64) -> f64 {
        let share = if self.logarithmic {
            (value / self.low).ln() / (self.high / self.low).ln()
        } else {
            (value - self.low) / (self.high - self.low)
        };
        self.from + share.clamp(0.0, 1.0) * (self.to - self.from)
    }
}

/// The next of 1, 2 and 5 times a power of ten.
fn round_step(step: f64) -> f64 {
    let power = 10_f64.powf(step.log10().floor());
    let factors = [1.0, 2.0, 5.0];
    let factor = factors.into_iter().find(|factor| factor * power >= step);
    factor.unwrap_or(10.0) * power
}

/// The plot; curves must have points.
pub(super) fn svg(curves: &[Curve], bound_ms: Option<f64>) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = write_svg(&mut text, curves, bound_ms);
    text
}

fn write_svg(out: &mut String, curves: &[Curve], bound_ms: Option<f64>) -> fmt::Result {
    let points = || curves.iter().flat_map(|curve| &curve.points);
    let least = points()
        .map(|point| point.p50_ms)
        .fold(f64::INFINITY, f64::min);
    let most = points().map(|point| point.p99_ms).fold(0.0, f64::max);
    let with_bound = bound_ms.map_or(most, |bound| most.max(bound));
    let y = Axis::logarithmic(least.max(1e-3), with_bound.max(1e-3), BOTTOM, TOP);
    let x = rates(curves);
    writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         width=\"{WIDTH}\" height=\"{HEIGHT}\" role=\"img\">"
    )?;
    let names: Vec<&str> = curves.iter().map(|curve| &*curve.name).collect();
    writeln!(
        out,
        "<title>Latency over the rate of requests: {}</title>",
        escape(&names.join(", "))
    )?;
    writeln!(out, "<style>{STYLE}</style>")?;
    writeln!(
        out,
        "<rect class=\"ground\" width=\"{WIDTH}\" height=\"{HEIGHT}\"/>"
    )?;
    axes(out, &x, &y)?;
    if let Some(bound) = bound_ms {
        let place = y.place(bound);
        writeln!(
            out,
            "<line class=\"bound\" x1=\"{LEFT}\" x2=\"{RIGHT}\" y1=\"{place:.1}\" \
             y2=\"{place:.1}\"/>\n<text class=\"small\" x=\"{:.1}\" y=\"{:.1}\">bound of p99: {} \
             ms</text>",
            LEFT + 8.0,
            place - 6.0,
            figure(bound)
        )?;
    }
    for (i, curve) in curves.iter().enumerate() {
        draw(out, curve, i % COLOURS, &x, &y)?;
    }
    legend(out, curves)?;
    writeln!(out, "</svg>")
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

fn axes(out: &mut String, x: &Axis, y: &Axis) -> fmt::Result {
    for tick in &y.ticks {
        let place = y.place(*tick);
        writeln!(
            out,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{RIGHT}\" y1=\"{place:.1}\" \
             y2=\"{place:.1}\"/>\n<text class=\"small\" x=\"{:.1}\" y=\"{:.1}\" \
             text-anchor=\"end\">{}</text>",
            LEFT - 8.0,
            place + 4.0,
            figure(*tick)
        )?;
    }
    for tick in &x.ticks {
        let place = x.place(*tick);
        writeln!(
            out,
            "<line class=\"grid\" x1=\"{place:.1}\" x2=\"{place:.1}\" y1=\"{TOP}\" \
             y2=\"{BOTTOM}\"/>\n<text class=\"small\" x=\"{place:.1}\" y=\"{:.1}\" \
             text-anchor=\"middle\">{}</text>",
            BOTTOM + 20.0,
            figure(*tick)
        )?;
    }
    writeln!(
        out,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">requests offered a second</text>",
        f64::midpoint(LEFT, RIGHT),
        HEIGHT - 12.0
    )?;
    let middle = f64::midpoint(TOP, BOTTOM);
    writeln!(
        out,
        "<text x=\"18\" y=\"{middle:.1}\" text-anchor=\"middle\" transform=\"rotate(-90 18 \
         {middle:.1})\">latency of answered requests, ms</text>"
    )
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

/// Without digits that say nothing.
fn figure(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
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

    #[test]
    fn logarithmic_ticks_enclose_the_figures() {
        let ticks = |least, most| Axis::logarithmic(least, most, 0.0, 1.0).ticks;
        assert_eq!(ticks(3.0, 40.0), [2.0, 5.0, 10.0, 20.0, 50.0]);
        assert_eq!(ticks(0.4, 0.5), [0.2, 0.5]);
        assert_eq!(ticks(1.0, 1.0), [1.0, 2.0]);
        let axis = Axis::logarithmic(1.0, 100.0, 0.0, 1.0);
        assert!((axis.place(10.0) - 0.5).abs() < 1e-12);
    }

    #[test]
    fn linear_ticks_are_round() {
        assert_eq!(Axis::linear(110.0, 0.0, 1.0).ticks.last(), Some(&120.0));
        assert_eq!(Axis::linear(0.7, 0.0, 1.0).ticks.len(), 5);
    }
}
