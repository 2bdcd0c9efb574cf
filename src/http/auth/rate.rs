//! How many requests somebody may send: a token bucket for each name.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::Deserialize;
use tokio::time::Instant;

/// So many requests in a time: as many at once, and as many again as that time passes.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(try_from = "String")]
pub struct Rate {
    requests: u32,
    per: Duration,
}

/// A rate that can't be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a rate; write requests per second, minute or hour, as 50/s, 600/m or 1000/h")]
pub struct RateError(String);

impl Rate {
    pub const fn new(requests: u32, per: Duration) -> Self {
        Self { requests, per }
    }
}

impl FromStr for Rate {
    type Err = RateError;

    fn from_str(text: &str) -> Result<Self, RateError> {
        let parse = || {
            let (requests, unit) = text.trim().split_once('/')?;
            let seconds = match unit.trim() {
                "s" => 1,
                "m" => 60,
                "h" => 3600,
                _ => return None,
            };
            let requests = requests.trim().parse().ok().filter(|count| *count > 0)?;
            Some(Self::new(requests, Duration::from_secs(seconds)))
        };
        parse().ok_or_else(|| RateError(text.to_owned()))
    }
}

impl TryFrom<String> for Rate {
    type Error = RateError;

    fn try_from(text: String) -> Result<Self, RateError> {
        text.parse()
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = match self.per.as_secs() {
            1 => "s",
            60 => "m",
            _ => "h",
        };
        write!(f, "{}/{unit}", self.requests)
    }
}

/// Whom a request is counted for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Caller {
    /// A token, by its place in the token files.
    Token(String),
    /// Somebody without a token.
    Address(Option<IpAddr>),
    /// Somebody with a wrong one.
    Guesser(Option<IpAddr>),
}

impl Caller {
    pub(super) fn address(address: Option<IpAddr>) -> Self {
        Self::Address(address.map(network))
    }

    pub(super) fn guesser(address: Option<IpAddr>) -> Self {
        Self::Guesser(address.map(network))
    }
}

/// Whoever has one IPv6 address has the other 2⁶⁴ of its network.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::from((address.to_bits() >> 64 << 64).to_be_bytes()),
        address => address,
    }
}

/// Callers that are remembered at a time. A caller whose bucket is full need not be.
const MOST_CALLERS: usize = 10_000;

#[derive(Clone, Copy, Debug)]
struct Bucket {
    /// Requests that are left.
    left: f64,
    at: Instant,
}

/// Counts requests. Taking one is a look into a map.
#[derive(Debug, Default)]
pub(super) struct RateLimiter {
    buckets: Mutex<HashMap<Caller, (Rate, Bucket)>>,
}

impl RateLimiter {
    /// Takes one request out of the caller's bucket, or tells how long it is until there is one.
    pub(super) fn take(&self, caller: Caller, rate: Rate) -> Result<(), Duration> {
        let now = Instant::now();
        // Nothing in here can leave the map half changed.
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if buckets.len() >= MOST_CALLERS && !buckets.contains_key(&caller) {
            buckets.retain(|_, (rate, bucket)| refilled(*rate, *bucket, now) < capacity(*rate));
            // As many addresses at once as this are no single caller's: better to let them in than
            // to grow, or to turn everybody away.
            if buckets.len() >= MOST_CALLERS {
                buckets.clear();
            }
        }
        let full = Bucket {
            left: capacity(rate),
            at: now,
        };
        let (_, bucket) = buckets
            .entry(caller)
            .and_modify(|(old, bucket)| {
                bucket.left = refilled(rate, *bucket, now);
                bucket.at = now;
                *old = rate;
            })
            .or_insert((rate, full));
        if bucket.left >= 1.0 {
            bucket.left -= 1.0;
            return Ok(());
        }
        Err(rate.per.div_f64(capacity(rate)).mul_f64(1.0 - bucket.left))
    }
}

fn capacity(rate: Rate) -> f64 {
    f64::from(rate.requests)
}

fn refilled(rate: Rate, bucket: Bucket, now: Instant) -> f64 {
    let passed = now.duration_since(bucket.at).div_duration_f64(rate.per);
    (bucket.left + passed * capacity(rate)).min(capacity(rate))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_read_as_they_are_written() {
        for text in ["50/s", "600/m", "1000/h"] {
            assert_eq!(
                text.parse::<Rate>().map(|rate| rate.to_string()),
                Ok(text.to_owned())
            );
        }
        for text in ["", "5", "5/d", "0/s", "-1/s", "1.5/s", "/s"] {
            assert!(text.parse::<Rate>().is_err(), "{text}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_bucket_empties_and_fills_again() {
        let limiter = RateLimiter::default();
        let rate = Rate::new(2, Duration::from_secs(1));
        let take = |name: &str| limiter.take(Caller::Token(name.to_owned()), rate);
        assert_eq!((take("a"), take("a")), (Ok(()), Ok(())));
        assert_eq!(take("a"), Err(Duration::from_millis(500)));
        assert_eq!(take("b"), Ok(()));
        tokio::time::advance(Duration::from_millis(500)).await;
        assert_eq!(take("a"), Ok(()));
        assert!(take("a").is_err());
        tokio::time::advance(Duration::from_secs(60)).await;
        assert_eq!(
            (take("a"), take("a"), take("a").is_err()),
            (Ok(()), Ok(()), true)
        );
    }

    #[tokio::test(start_paused = true)]
    async fn many_addresses_do_not_grow_the_map_for_ever() {
        let limiter = RateLimiter::default();
        let rate = Rate::new(1, Duration::from_secs(60));
        for number in 0..25_000_u32 {
            let address = IpAddr::from(number.to_be_bytes());
            assert_eq!(limiter.take(Caller::address(Some(address)), rate), Ok(()));
        }
        assert!(limiter.buckets.lock().expect("no panic").len() <= MOST_CALLERS);
    }

    #[test]
    fn an_ipv6_network_is_one_caller() {
        let caller = |text: &str| Caller::address(text.parse().ok());
        assert_eq!(caller("2001:db8::1"), caller("2001:db8::ffff:2"));
        assert_ne!(caller("2001:db8::1"), caller("2001:db8:0:1::1"));
        assert_eq!(caller("::ffff:10.0.0.1"), caller("10.0.0.1"));
        assert_ne!(caller("10.0.0.1"), caller("10.0.0.2"));
    }
}
