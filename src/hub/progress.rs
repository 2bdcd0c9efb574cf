//! What the user sees while an encoder is fetched.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Bars and sentences on standard error. Without a terminal there are no bars, and sentences go
/// to the log.
pub(super) struct Progress {
    /// Draw bars.
    bars: bool,
}

impl Progress {
    pub(super) fn new(wanted: bool) -> Self {
        Self {
            bars: wanted && std::io::stderr().is_terminal(),
        }
    }

    /// Says a sentence once.
    pub(super) fn say(&self, sentence: &str) {
        if self.bars {
            eprintln!("{sentence}");
        } else {
            tracing::info!("{sentence}");
        }
    }

    /// A bar over `bytes`; it is gone when dropped.
    pub(super) fn bytes(&self, what: &str, bytes: u64) -> Bar {
        let template = "{msg:24} [{wide_bar}] {bytes:>10}/{total_bytes:10} {binary_bytes_per_sec:>12} {eta:>4}";
        self.bar(ProgressBar::new(bytes), template, what)
    }

    /// A sign of life while it is not known how long something takes.
    pub(super) fn waiting(&self, what: &str) -> Bar {
        let bar = self.bar(
            ProgressBar::new_spinner(),
            "{spinner} {wide_msg} {elapsed}",
            what,
        );
        bar.0.enable_steady_tick(Duration::from_millis(120));
        bar
    }

    fn bar(&self, bar: ProgressBar, template: &str, what: &str) -> Bar {
        bar.set_draw_target(if self.bars {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        });
        // A template that indicatif does not like costs the layout, not the pull.
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(what.to_owned());
        Bar(bar)
    }
}

/// A bar that clears itself.
pub(super) struct Bar(ProgressBar);

impl Bar {
    pub(super) fn advance(&self, bytes: u64) {
        self.0.inc(bytes);
    }

    pub(super) fn message(&self, text: &str) {
        self.0.set_message(text.to_owned());
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
