//! Bytes that may be taken together, and are given back when they are free.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::timeout;

/// How often it is looked whether something can be freed that could not be before.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// A number of bytes, of which parts are reserved.
pub(super) struct Budget {
    limit: u64,
    reserved: Mutex<Reserved>,
    freed: Notify,
    /// Told of each change.
    observer: Box<dyn Fn(Reserved) + Send + Sync>,
}

/// What is reserved of a budget.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Reserved {
    /// Number of reservations.
    pub(super) count: usize,
    pub(super) bytes: u64,
}

/// Bytes of a budget, until this is dropped. The default one is of no budget.
#[derive(Default)]
pub struct Reservation {
    budget: Weak<Budget>,
    bytes: u64,
}

impl Budget {
    pub(super) fn new(
        limit: u64,
        observer: impl Fn(Reserved) + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self {
            limit,
            reserved: Mutex::default(),
            freed: Notify::new(),
            observer: Box::new(observer),
        })
    }

    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    /// The bytes, if they are free at this moment.
    fn try_reserve(self: &Arc<Self>, bytes: u64) -> Option<Reservation> {
        let mut reserved = self.lock();
        let sum = reserved.bytes.checked_add(bytes);
        reserved.bytes = sum.filter(|sum| *sum <= self.limit)?;
        reserved.count += 1;
        (self.observer)(*reserved);
        Some(Reservation {
            budget: Arc::downgrade(self),
            bytes,
        })
    }

    /// The bytes, as soon as they are free. `make_room` frees some, and says whether it could.
    ///
    /// Waits for ever for more than the limit: check that first.
    pub(super) async fn reserve(
        self: &Arc<Self>,
        bytes: u64,
        make_room: impl Fn() -> bool,
    ) -> Reservation {
        loop {
            // Enabled before the look, so that nothing freed after it is missed.
            let mut freed = std::pin::pin!(self.freed.notified());
            freed.as_mut().enable();
            loop {
                if let Some(reservation) = self.try_reserve(bytes) {
                    return reservation;
                }
                if !make_room() {
                    break;
                }
            }
            // Not every change of what can be freed is told.
            let _ = timeout(LOOK_AGAIN, freed).await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Reserved> {
        self.reserved.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Reserved)) {
        let mut reserved = self.lock();
        change(&mut reserved);
        (self.observer)(*reserved);
        drop(reserved);
        self.freed.notify_waiters();
    }
}

impl Reservation {
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Gives back what is over `bytes`.
    pub(super) fn shrink(&mut self, bytes: u64) {
        let over = self.bytes.saturating_sub(bytes);
        self.bytes -= over;
        if let Some(budget) = self.budget.upgrade() {
            budget.change(|reserved| reserved.bytes -= over);
        }
    }

    /// Takes over the bytes of another reservation of the same budget.
    pub(super) fn absorb(&mut self, mut other: Self) {
        self.bytes += std::mem::take(&mut other.bytes);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Some(budget) = self.budget.upgrade() {
            budget.change(|reserved| {
                reserved.count -= 1;
                reserved.bytes -= self.bytes;
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn no_more_than_the_limit_is_reserved() {
        let budget = Budget::new(10, |_| ());
        let six = budget.try_reserve(6).expect("room for six");
        assert!(budget.try_reserve(5).is_none());
        assert!(budget.try_reserve(u64::MAX).is_none());
        let four = budget.try_reserve(4).expect("room for four");
        drop(six);
        assert_eq!(*budget.lock(), Reserved { count: 1, bytes: 4 });
        drop(four);
        assert_eq!(*budget.lock(), Reserved::default());
    }

    #[test]
    fn reservations_are_adjusted_to_what_is_used() {
        let budget = Budget::new(10, |_| ());
        let mut first = budget.try_reserve(8).expect("room for eight");
        first.shrink(9);
        assert_eq!(first.bytes(), 8);
        first.shrink(3);
        let second = budget.try_reserve(6).expect("room for six");
        first.absorb(second);
        assert_eq!(*budget.lock(), Reserved { count: 1, bytes: 9 });
        drop(first);
        assert_eq!(*budget.lock(), Reserved::default());
    }

    #[tokio::test]
    async fn who_waits_gets_what_is_freed() {
        let budget = Budget::new(10, |_| ());
        let held = budget.try_reserve(10).expect("room");
        let waits = tokio::spawn({
            let budget = Arc::clone(&budget);
            async move { budget.reserve(7, || false).await }
        });
        tokio::task::yield_now().await;
        assert!(!waits.is_finished());
        drop(held);
        let _seven = waits.await.expect("no panic");
        assert_eq!(budget.lock().bytes, 7);
    }

    #[tokio::test]
    async fn room_is_made_until_it_is_enough() {
        let budget = Budget::new(10, |_| ());
        let held: Vec<_> = (0..5).filter_map(|_| budget.try_reserve(2)).collect();
        let held = Mutex::new(held);
        let make_room = || held.lock().expect("no panic").pop().is_some();
        let _three = budget.reserve(3, make_room).await;
        assert_eq!(held.lock().expect("no panic").len(), 3);
    }
}
