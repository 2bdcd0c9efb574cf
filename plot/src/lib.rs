//! What the plots of this workspace have in common: axes, colours and the frame of an SVG that
//! follows the reader's light or dark scheme.

use std::fmt::{self, Write};

pub const WIDTH: f64 = 760.0;
pub const HEIGHT: f64 = 460.0;
/// The area of the figures.
pub const LEFT: f64 = 72.0;
pub const RIGHT: f64 = WIDTH - 24.0;
pub const TOP: f64 = 72.0;
pub const BOTTOM: f64 = HEIGHT - 56.0;

/// Colours that differ; what comes after them begins again. The classes `s0`, `s1`, … draw lines
/// in them, `f0`, `f1`, … fill.
pub const COLOURS: usize = 4;

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

/// A scale from figures to places.
pub struct Axis {
    pub logarithmic: bool,
    low: f64,
    high: f64,
    from: f64,
    to: f64,
    pub ticks: Vec<f64>,
}

impl Axis {
    /// From 0 to a round figure at or above `most`, drawn between the places `from` and `to`.
    pub fn linear(most: f64, from: f64, to: f64) -> Self {
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

    /// Around `least` and `most`, with round ticks, not from 0 on.
    pub fn around(least: f64, most: f64, from: f64, to: f64) -> Self {
        let step = round_step(((most - least) / 4.0).max(1e-3));
        let low = (least / step).floor();
        let count = ((most / step).ceil() - low).max(1.0);
        Self {
            logarithmic: false,
            low: step * low,
            high: step * (low + count),
            from,
            to,
            ticks: (0..=count as u32)
                .map(|i| step * (low + f64::from(i)))
                .collect(),
        }
    }

    /// Ticks at 1, 2 and 5 times the powers of ten around `least` and `most`.
    pub fn logarithmic(least: f64, most: f64, from: f64, to: f64) -> Self {
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

    /// Where a figure stands; one beyond the axis stands at its end.
    pub fn place(&self, value: f64) -> f64 {
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

/// The SVG of a plot: title, background, axes with their names, and what `draw` adds.
pub fn svg(
    title: &str,
    (x, x_name): (&Axis, &str),
    (y, y_name): (&Axis, &str),
    draw: impl FnOnce(&mut String) -> fmt::Result,
) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = write_svg(&mut text, title, (x, x_name), (y, y_name), draw);
    text
}

fn write_svg(
    out: &mut String,
    title: &str,
    x: (&Axis, &str),
    y: (&Axis, &str),
    draw: impl FnOnce(&mut String) -> fmt::Result,
) -> fmt::Result {
    writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         width=\"{WIDTH}\" height=\"{HEIGHT}\" role=\"img\">"
    )?;
    writeln!(out, "<title>{}</title>", escape(title))?;
    writeln!(out, "<style>{STYLE}</style>")?;
    writeln!(
        out,
        "<rect class=\"ground\" width=\"{WIDTH}\" height=\"{HEIGHT}\"/>"
    )?;
    axes(out, x, y)?;
    draw(out)?;
    writeln!(out, "</svg>")
}

fn axes(out: &mut String, (x, x_name): (&Axis, &str), (y, y_name): (&Axis, &str)) -> fmt::Result {
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
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
        f64::midpoint(LEFT, RIGHT),
        HEIGHT - 12.0,
        escape(x_name)
    )?;
    let middle = f64::midpoint(TOP, BOTTOM);
    writeln!(
        out,
        "<text x=\"18\" y=\"{middle:.1}\" text-anchor=\"middle\" transform=\"rotate(-90 18 \
         {middle:.1})\">{}</text>",
        escape(y_name)
    )
}

/// Without digits that say nothing.
pub fn figure(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Text that cannot break the markup.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_axis_around_figures_encloses_them_with_round_ticks() {
        let axis = Axis::around(0.81, 0.93, 100.0, 0.0);
        let ticks: Vec<String> = axis.ticks.iter().map(|tick| figure(*tick)).collect();
        assert_eq!(ticks, ["0.8", "0.85", "0.9", "0.95"]);
        assert!((axis.place(0.8) - 100.0).abs() < 1e-9 && axis.place(0.95).abs() < 1e-9);
        assert_eq!(Axis::around(0.5, 0.5, 0.0, 1.0).ticks.len(), 2);
    }

    #[test]
    fn names_cannot_break_the_markup() {
        assert_eq!(escape("<a> & b"), "&lt;a&gt; &amp; b");
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
