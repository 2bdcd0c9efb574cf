//! How many requests somebody may send: a bucket for each token and each address.

use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use governor::Quota;
use governor::clock::Clock;
use governor::middleware::NoOpMiddleware;
use governor::nanos::Nanos;
use governor::state::StateStore;
use serde::Deserialize;

use super::Role;

/// So many requests in a time: as many at once, and as many again as that time passes.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(try_from = "String")]
pub struct Rate {
    requests: NonZeroU32,
    per: Duration,
}

/// A rate that can't be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a rate; write requests per second, minute or hour, as 50/s, 600/m or 1000/h")]
pub struct RateError(String);

impl Rate {
    pub const fn new(requests: NonZeroU32, per: Duration) -> Self {
        Self { requests, per }
    }

    fn quota(self) -> Quota {
        // More requests a second than nanoseconds are as good as any number of them.
        let each = (self.per / self.requests.get()).max(Duration::from_nanos(1));
        let quota = Quota::with_period(each);
        // The period is not 0.
        quota
            .unwrap_or(Quota::per_second(self.requests))
            .allow_burst(self.requests)
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
            let requests = requests.trim().parse().ok()?;
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

/// Whoever has one IPv6 address has the other 2⁶⁴ of its network. Addresses are counted by what
/// this returns.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::from((address.to_bits() >> 64 << 64).to_be_bytes()),
        address => address,
    }
}

/// The addresses that are remembered at a time.
const MOST_ADDRESSES: usize = 10_000;

type Limiter<K> = governor::RateLimiter<K, Buckets<K>, TokioClock, NoOpMiddleware<Instant>>;

/// A key for a token: its name, and whether it is an admin's. The two files may use the same names.
type TokenKey = (Role, String);

/// Counts requests: those with a token by the token, the others by their address, and attempts with
/// a wrong token by their address once more. No one of these can push another out of memory.
#[derive(Debug)]
pub(super) struct RateLimits {
    /// Each with the rate that it was made for.
    tokens: Mutex<HashMap<TokenKey, (Rate, Limiter<()>)>>,
    addresses: Option<Limiter<Option<IpAddr>>>,
    guesses: Limiter<Option<IpAddr>>,
}

impl RateLimits {
    /// `addresses` is the rate of an address that sends no token, `guesses` that of wrong tokens.
    pub(super) fn new(addresses: Option<Rate>, guesses: Rate) -> Self {
        Self {
            tokens: Mutex::default(),
            addresses: addresses.map(limiter),
            guesses: limiter(guesses),
        }
    }

    /// Counts a request with a token, or tells how long it is until there is room for one more.
    pub(super) fn token(&self, role: Role, name: &str, rate: Rate) -> Result<(), Duration> {
        let mut tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        let bucket = tokens
            .entry((role, name.to_owned()))
            .and_modify(|bucket| {
                // The token file has been changed.
                if bucket.0 != rate {
                    *bucket = (rate, limiter(rate));
                }
            })
            .or_insert_with(|| (rate, limiter(rate)));
        take(&bucket.1, &())
    }

    /// Counts a request without a token.
    pub(super) fn address(&self, peer: Option<IpAddr>) -> Result<(), Duration> {
        match &self.addresses {
            Some(addresses) => take(addresses, &peer.map(network)),
            None => Ok(()),
        }
    }

    /// Counts an attempt with a wrong token.
    pub(super) fn guess(&self, peer: Option<IpAddr>) -> Result<(), Duration> {
        take(&self.guesses, &peer.map(network))
    }
}

fn limiter<K: Clone + Eq + Hash>(rate: Rate) -> Limiter<K> {
    Limiter::new(rate.quota(), Buckets::default(), TokioClock)
}

fn take<K: Clone + Eq + Hash>(limiter: &Limiter<K>, key: &K) -> Result<(), Duration> {
    let outcome = limiter.check_key(key);
    outcome.map_err(|until| until.wait_time_from(TokioClock.now()))
}

/// Tokio's clock, which tests can pause.
#[derive(Clone, Copy, Debug)]
struct TokioClock;

impl Clock for TokioClock {
    type Instant = Instant;

    fn now(&self) -> Instant {
        tokio::time::Instant::now().into_std()
    }
}

/// For each key the time at which its bucket is full again; at most [`MOST_ADDRESSES`] of them.
///
/// governor's own maps grow for ever. When this one is full, the quarter goes whose buckets are
/// full first: these have sent the least, so whoever has used up a bucket stays remembered
/// however many others come.
#[derive(Debug)]
struct Buckets<K>(Mutex<HashMap<K, Nanos>>);

impl<K> Default for Buckets<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Clone + Eq + Hash> StateStore for Buckets<K> {
    type Key = K;

    fn measure_and_replace<T, F, E>(&self, key: &K, measure: F) -> Result<T, E>
    where
        F: Fn(Option<Nanos>) -> Result<(T, Nanos), E>,
    {
        // Nothing in here can leave the map half changed.
        let mut buckets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (outcome, full_at) = measure(buckets.get(key).copied())?;
        if buckets.len() >= MOST_ADDRESSES && !buckets.contains_key(key) {
            let mut times: Vec<Nanos> = buckets.values().copied().collect();
            let (_, quarter, _) = times.select_nth_unstable(MOST_ADDRESSES / 4);
            let mut left = MOST_ADDRESSES / 4;
            buckets.retain(|_, time| {
                let goes = *time <= *quarter && left > 0;
                left -= usize::from(goes);
                !goes
            });
        }
        buckets.insert(key.clone(), full_at);
        Ok(outcome)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate(text: &str) -> Rate {
        text.parse().expect("a rate")
    }

    fn address(number: u32) -> Option<IpAddr> {
        Some(IpAddr::from(number.to_be_bytes()))
    }

    #[test]
    fn rates_read_as_they_are_written() {
        for text in ["50/s", "600/m", "1000/h", "4294967295/s"] {
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
        let limits = RateLimits::new(None, rate("1/s"));
        let take = |name: &str| limits.token(Role::Reader, name, rate("2/s"));
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
    async fn a_reader_and_an_admin_of_one_name_have_a_bucket_each() {
        let limits = RateLimits::new(None, rate("1/s"));
        let once = rate("1/h");
        assert_eq!(limits.token(Role::Reader, "ada", once), Ok(()));
        assert!(limits.token(Role::Reader, "ada", once).is_err());
        assert_eq!(limits.token(Role::Admin, "ada", once), Ok(()));
        // A changed token file counts from its change on.
        assert_eq!(limits.token(Role::Reader, "ada", rate("2/h")), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_flood_of_addresses_makes_nobody_forgotten_and_does_not_grow_for_ever() {
        let limits = RateLimits::new(Some(rate("100/h")), rate("3/h"));
        let (greedy, guesser) = (address(1), address(2));
        while limits.address(greedy).is_ok() {}
        while limits.guess(guesser).is_ok() {}
        let token = || limits.token(Role::Reader, "ray", rate("1/h"));
        assert_eq!(token(), Ok(()));
        for number in 0..50_000_u32 {
            assert_eq!(limits.address(address(1_000 + number)), Ok(()));
            assert_eq!(limits.guess(address(1_000 + number)), Ok(()));
        }
        assert!(limits.address(greedy).is_err());
        assert!(limits.guess(guesser).is_err());
        assert!(token().is_err());
        let addresses = limits.addresses.expect("a rate").into_state_store();
        for store in [addresses, limits.guesses.into_state_store()] {
            assert!(store.0.lock().expect("no panic").len() <= MOST_ADDRESSES);
        }
    }

    #[test]
    fn an_ipv6_network_is_one_caller() {
        let network = |text: &str| network(text.parse().expect("an address"));
        assert_eq!(network("2001:db8::1"), network("2001:db8::ffff:2"));
        assert_ne!(network("2001:db8::1"), network("2001:db8:0:1::1"));
        assert_eq!(network("::ffff:10.0.0.1"), network("10.0.0.1"));
        assert_ne!(network("10.0.0.1"), network("10.0.0.2"));
    }
}
