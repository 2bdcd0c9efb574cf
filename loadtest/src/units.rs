//! Values of flags: times, phases, weights.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Serialize, Serializer};

/// A time as people write it: `200ms`, `1m 30s`. Reports have it in the same form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Time(pub(crate) Duration);

impl FromStr for Time {
    type Err = humantime::DurationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        humantime::parse_duration(text).map(Self)
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_duration(self.0).fmt(f)
    }
}

impl Serialize for Time {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// `RATE:TIME`, a stretch of time with one rate of requests.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Phase {
    /// Requests a second.
    pub(crate) rate: f64,
    pub(crate) time: Time,
}

impl FromStr for Phase {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (rate, time) = text
            .split_once(':')
            .ok_or("expected RATE:TIME, as in 120:30s")?;
        Ok(Self {
            rate: rate_or_silence(rate)?,
            time: time.parse().map_err(|error| format!("{time:?}: {error}"))?,
        })
    }
}

/// A rate above 0.
pub(crate) fn rate(text: &str) -> Result<f64, String> {
    match rate_or_silence(text)? {
        0.0 => Err("a rate must be above 0".to_owned()),
        rate => Ok(rate),
    }
}

fn rate_or_silence(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate.is_finite() && rate >= 0.0 => Ok(rate),
        _ => Err(format!("{text:?} is not a rate of requests a second")),
    }
}

/// A share of all requests.
pub(crate) fn share(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(share) if (0.0..=1.0).contains(&share) => Ok(share),
        _ => Err(format!("{text:?} is not a share between 0 and 1")),
    }
}

/// `NAME` or `NAME=WEIGHT`; the weight is 1 where it is left out.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Weighted {
    pub(crate) name: String,
    pub(crate) weight: f64,
}

impl FromStr for Weighted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, weight) = text.split_once('=').unwrap_or((text, "1"));
        let weight = weight
            .parse::<f64>()
            .ok()
            .filter(|weight| weight.is_finite() && *weight > 0.0)
            .ok_or_else(|| format!("{text:?}: the weight must be a number above 0"))?;
        if name.is_empty() {
            return Err(format!("{text:?}: the name is empty"));
        }
        Ok(Self {
            name: name.to_owned(),
            weight,
        })
    }
}

/// `K=WEIGHT`: how many texts one input is made of.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Length {
    pub(crate) texts: usize,
    pub(crate) weight: f64,
}

impl FromStr for Length {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Weighted { name, weight } = text.parse()?;
        match name.parse() {
            Ok(texts) if texts > 0 => Ok(Self { texts, weight }),
            _ => Err(format!("{name:?} is not a number of texts")),
        }
    }
}

/// `TASK=V1,V2,..`: versions to promote in turn; all that the task has where none is named.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Turns {
    pub(crate) task: String,
    pub(crate) versions: Vec<u64>,
}

impl FromStr for Turns {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some((task, versions)) = text.split_once('=') else {
            return Ok(Self {
                task: text.to_owned(),
                versions: Vec::new(),
            });
        };
        let versions: Result<Vec<u64>, _> = versions.split(',').map(str::parse).collect();
        match versions {
            Ok(versions) if versions.len() >= 2 => Ok(Self {
                task: task.to_owned(),
                versions,
            }),
            _ => Err(format!(
                "{text:?}: expected TASK=V1,V2 with the numbers of two versions or more"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_phase_is_a_rate_and_a_time() {
        let phase: Phase = "2.5:1m 30s".parse().expect("a phase");
        assert_eq!(
            (phase.rate, phase.time),
            (2.5, Time(Duration::from_secs(90)))
        );
        assert_eq!("0:5s".parse::<Phase>().map(|phase| phase.rate), Ok(0.0));
        for wrong in ["30", "x:5s", "-1:5s", "inf:5s", "3:soon"] {
            assert!(wrong.parse::<Phase>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn weights_are_1_unless_given() {
        let weighted = |text: &str| text.parse::<Weighted>().map(|w| (w.name, w.weight));
        assert_eq!(weighted("mood"), Ok(("mood".to_owned(), 1.0)));
        assert_eq!(weighted("mood=2.5"), Ok(("mood".to_owned(), 2.5)));
        for wrong in ["=2", "mood=", "mood=0", "mood=-1", "mood=NaN"] {
            assert!(wrong.parse::<Weighted>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn turns_name_two_versions_or_none() {
        let turns = |text: &str| text.parse::<Turns>().map(|t| (t.task, t.versions));
        assert_eq!(turns("mood"), Ok(("mood".to_owned(), vec![])));
        assert_eq!(turns("mood=1,2"), Ok(("mood".to_owned(), vec![1, 2])));
        for wrong in ["mood=", "mood=1", "mood=1,x"] {
            assert!(wrong.parse::<Turns>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn rates_and_shares_have_bounds() {
        assert_eq!(rate("12.5"), Ok(12.5));
        assert!(rate("0").is_err() && rate("NaN").is_err());
        assert_eq!(share("0.02"), Ok(0.02));
        assert!(share("1.5").is_err() && share("-0.1").is_err());
    }
}
