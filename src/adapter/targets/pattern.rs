//! Regular expressions of an adapter's configuration. They come from whoever uploads an adapter, so
//! they are compiled and matched within a time and a number that all of an adapter's patterns share.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use fancy_regex::{Regex, RegexBuilder};
use rustix::time::{ClockId, clock_gettime};

use super::ends_with_name;

/// Processor time for all patterns of an adapter. Usual ones take milliseconds together.
const BUDGET: Duration = Duration::from_secs(1);

/// Steps back that one match may take: a hundredth of a second.
const MAX_BACKTRACKS: usize = 100_000;

/// Regular expressions of an adapter. Names, of which an adapter may have many, are none.
const MAX_REGEXES: usize = 128;

/// Bytes that a compiled expression may take.
const MAX_COMPILED: usize = 512 << 10;

/// What is left for an adapter's patterns. Clones share it.
#[derive(Clone, Debug)]
pub(in crate::adapter) struct Budget(Arc<Left>);

#[derive(Debug)]
struct Left {
    nanos: AtomicU64,
    regexes: AtomicUsize,
}

impl Default for Budget {
    fn default() -> Self {
        let nanos = u64::try_from(BUDGET.as_nanos()).unwrap_or(u64::MAX);
        Self(Arc::new(Left {
            nanos: AtomicU64::new(nanos),
            regexes: AtomicUsize::new(MAX_REGEXES),
        }))
    }
}

/// A budget plays no part when configurations are compared.
impl PartialEq for Budget {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Budget {
    /// Whether the patterns have been matched in time. If not, some modules were taken as ones that
    /// no pattern fits.
    pub(in crate::adapter) fn is_kept(&self) -> bool {
        self.0.nanos.load(Ordering::Relaxed) > 0
    }

    /// Takes one regular expression off, if there is one left.
    fn take_regex(&self) -> bool {
        let less = |left: usize| left.checked_sub(1);
        let regexes = &self.0.regexes;
        regexes
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less)
            .is_ok()
    }

    /// Does work on the calling thread, and takes its time off; `None` when none is left.
    fn spend<T>(&self, work: impl FnOnce() -> T) -> Option<T> {
        if !self.is_kept() {
            return None;
        }
        let start = processor_time();
        let outcome = work();
        let taken = processor_time().saturating_sub(start);
        let taken = u64::try_from(taken.as_nanos()).unwrap_or(u64::MAX);
        let less = |left: u64| Some(left.saturating_sub(taken));
        // The closure never fails.
        let _ = self
            .0
            .nanos
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        Some(outcome)
    }

    fn use_up(&self) {
        self.0.nanos.store(0, Ordering::Relaxed);
    }
}

/// Of this thread: however busy the machine is, the same pattern costs the same.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    let part = |number: i64| u64::try_from(number).unwrap_or_default();
    Duration::from_secs(part(time.tv_sec)) + Duration::from_nanos(part(time.tv_nsec))
}

/// A text that can't be used as a pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::adapter) enum PatternError {
    /// It is no regular expression, or one that is too large.
    Malformed,
    /// The time for the adapter's patterns is over, or there are too many.
    OverBudget,
}

/// A name, or a regular expression of names, in PEFT's spelling.
#[derive(Clone)]
pub struct Pattern {
    text: String,
    /// `None` for a name, which fits itself and the endings of names from a dot on.
    regex: Option<Arc<Compiled>>,
}

struct Compiled {
    regex: Regex,
    budget: Budget,
    /// What is known of modules that were looked at: an adapter asks for each of them many times.
    known: Mutex<HashMap<String, Option<Fit>>>,
}

/// How a pattern fits a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fit {
    /// The number that the pattern catches, if it is one that catches a number.
    number: Option<usize>,
}

impl Pattern {
    /// A regular expression of whole names.
    pub(in crate::adapter) fn whole(text: &str, budget: &Budget) -> Result<Self, PatternError> {
        Self::compile(text, &format!("^(?:{text})$"), budget)
    }

    /// A key of `rank_pattern` or `alpha_pattern`: a name or a regular expression, which fits a
    /// module's name from its beginning or from a dot on.
    pub(in crate::adapter) fn ending(text: &str, budget: &Budget) -> Result<Self, PatternError> {
        let is_name = text
            .chars()
            .all(|c| c.is_alphanumeric() || "_.-".contains(c));
        match is_name {
            true => Ok(Self {
                text: text.to_owned(),
                regex: None,
            }),
            false => Self::compile(text, &format!(r"^(?:.*\.)?(?:{text})$"), budget),
        }
    }

    /// The name, as a regular expression, of the list that holds the layers.
    pub(in crate::adapter) fn layers(text: &str, budget: &Budget) -> Result<Self, PatternError> {
        let regex = format!(r"^(?:|.*?\.)(?:{text})\.(\d+)\.");
        Self::compile(text, &regex, budget)
    }

    fn compile(text: &str, regex: &str, budget: &Budget) -> Result<Self, PatternError> {
        if !budget.take_regex() {
            return Err(PatternError::OverBudget);
        }
        let compile = || {
            // The text alone must be an expression too: `a)(b` is none, whatever stands around it.
            build(text)?;
            build(regex)
        };
        let regex = match budget.spend(compile) {
            Some(Ok(regex)) => regex,
            Some(Err(_)) => return Err(PatternError::Malformed),
            None => return Err(PatternError::OverBudget),
        };
        Ok(Self {
            text: text.to_owned(),
            regex: Some(Arc::new(Compiled {
                regex,
                budget: budget.clone(),
                known: Mutex::default(),
            })),
        })
    }

    /// What stands in the configuration.
    pub fn text(&self) -> &str {
        &self.text
    }

    pub(in crate::adapter) fn fits(&self, module: &str) -> bool {
        match &self.regex {
            None => ends_with_name(module, &self.text),
            Some(regex) => regex.fit(module).is_some(),
        }
    }

    /// The number behind the name of the list that holds the layers.
    pub(in crate::adapter) fn layer_of(&self, module: &str) -> Option<usize> {
        self.regex.as_ref()?.fit(module)?.number
    }
}

impl Compiled {
    /// How the pattern fits; not at all once the time is over.
    fn fit(&self, module: &str) -> Option<Fit> {
        // Nothing in here can leave the map half changed.
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(fit) = known.get(module) {
            return *fit;
        }
        let fit = match self.budget.spend(|| self.regex.captures(module))? {
            Ok(found) => found.map(|found| Fit {
                number: found.get(1).and_then(|digits| digits.as_str().parse().ok()),
            }),
            // Too many steps back.
            Err(_) => {
                self.budget.use_up();
                return None;
            }
        };
        known.insert(module.to_owned(), fit);
        fit
    }
}

fn build(regex: &str) -> Result<Regex, fancy_regex::Error> {
    RegexBuilder::new(regex)
        .backtrack_limit(MAX_BACKTRACKS)
        .delegate_size_limit(MAX_COMPILED)
        .build()
}

/// Two patterns are the same if their texts are.
impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl fmt::Debug for Pattern {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.text.fmt(formatter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_number_behind_a_name_is_the_layer() {
        let module = "bert.encoder.layer.3.experts.5.dense";
        let layer = |text| {
            let pattern = Pattern::layers(text, &Budget::default()).expect("a pattern");
            pattern.layer_of(module)
        };
        assert_eq!(layer("experts"), Some(5));
        assert_eq!(layer("lay[a-z]*"), Some(3));
        assert_eq!(layer("h"), None);
    }

    #[test]
    fn patterns_that_never_end_use_up_the_time_of_all() {
        let text = format!("{}!", "a".repeat(60));
        for never_ending in ["(?=(a+)+b)a*", r"(?:(a|\1)+)+\1b", "(?=(\\w+\\.?)+!)a"] {
            let budget = Budget::default();
            let slow = Pattern::whole(never_ending, &budget).expect("a pattern");
            let quick = Pattern::whole("a+!", &budget).expect("a pattern");
            assert!(quick.fits(&text) && budget.is_kept());
            let other = Pattern::whole("a+.", &budget).expect("a pattern");
            let start = processor_time();
            let fits = (0..2_000)
                .filter(|n| slow.fits(&format!("{text}{n}")))
                .count();
            let taken = processor_time() - start;
            assert!(fits == 0 && taken < 3 * BUDGET, "{never_ending}: {taken:?}");
            // Either it was quick after all, or nothing fits any more.
            assert_eq!(other.fits(&text), budget.is_kept(), "{never_ending}");
        }
    }

    #[test]
    fn a_module_is_matched_once() {
        let budget = Budget::default();
        let pattern = Pattern::ending(r"(?!x)layer\.\d+", &budget).expect("a pattern");
        assert!(pattern.fits("bert.layer.1"));
        let left = budget.0.nanos.load(Ordering::Relaxed);
        for _ in 0..1_000 {
            assert!(pattern.fits("bert.layer.1"));
        }
        assert_eq!(budget.0.nanos.load(Ordering::Relaxed), left);
    }

    #[test]
    fn huge_and_malformed_patterns_are_refused() {
        let refusal = |text: &str| Pattern::whole(text, &Budget::default()).err();
        for text in [r"(?:(?:\w{1000}){1000}){1000}", "(query", "a)(b", "(?P<n"] {
            assert_eq!(refusal(text), Some(PatternError::Malformed), "{text}");
        }
        let spent = Budget::default();
        spent.use_up();
        let late = Pattern::whole("a", &spent).err();
        assert_eq!(late, Some(PatternError::OverBudget));
    }

    #[test]
    fn usual_patterns_are_small_and_more_than_enough() {
        let budget = Budget::default();
        for number in 0..MAX_REGEXES {
            let text = format!("^model.decoder.layers.{number}.encoder_attn.k_proj");
            let pattern = Pattern::ending(&text, &budget).expect("a pattern");
            assert!(pattern.fits(&text[1..]));
        }
        let more = Pattern::ending("one.*more", &budget).err();
        assert_eq!(more, Some(PatternError::OverBudget));
        assert!(Pattern::ending("a.name", &budget).is_ok_and(|name| name.fits("a.name")));
        let classes = r"\w+\.layers\.\d+\.(self_attn|mlp)\.\w+_proj";
        let classes = Pattern::whole(classes, &Budget::default()).expect("a pattern");
        assert!(classes.fits("model.layers.11.mlp.up_proj"));
    }
}
