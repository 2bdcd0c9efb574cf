//! Cores that lend themselves to one forward pass.
//!
//! Under load each core runs a whole forward of its own, and nobody waits for anybody. A request
//! that comes alone would leave the other cores idle: a [`Crew`] has a helper thread for each of
//! them, which takes parts of the ops of a forward that is under way, for as long as fewer threads
//! work than there are cores. An op shares out its work by [`in_parts`]; on a thread that leads no
//! forward of a crew, as in training, all parts run there.
//!
//! Helpers sleep while there is nothing to help with. During a forward they spin: an op's part
//! takes some ten microseconds, less than it takes to wake a thread.

use std::cell::{Cell, UnsafeCell};
use std::hint::spin_loop;
use std::io;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

/// More helpers than this wait for each other longer than they compute.
const MOST_HELPERS: usize = 7;
/// Looks at an idle forward before the core is offered to other threads.
const SPINS: u32 = 2_000;

/// Helper threads for forwards on other threads; they end when it is dropped.
pub struct Crew {
    shared: Arc<Shared>,
}

struct Shared {
    cores: usize,
    /// Leaders and the helpers that are with them.
    working: AtomicUsize,
    /// One for each forward that can be helped at a time.
    seats: Box<[Arc<Seat>]>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    sleeping: usize,
    closed: bool,
}

/// A forward that may have helpers.
#[derive(Default)]
struct Seat {
    taken: AtomicBool,
    helpers: AtomicUsize,
    region: Region,
}

thread_local! {
    /// The seat of the forward that this thread leads; none inside a part.
    static SEAT: Cell<Option<Arc<Seat>>> = const { Cell::new(None) };
}

impl Crew {
    /// Helpers for all of `cores` but the one that leads.
    pub fn start(cores: usize) -> io::Result<Self> {
        let cores = cores.max(1);
        let shared = Arc::new(Shared {
            cores,
            working: AtomicUsize::new(0),
            seats: (0..cores).map(|_| Arc::default()).collect(),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let crew = Self { shared };
        for i in 1..cores {
            let shared = Arc::clone(&crew.shared);
            thread::Builder::new()
                .name(format!("helper-{i}"))
                .spawn(move || shared.help())?;
        }
        Ok(crew)
    }

    /// Runs `forward` on this thread, with the help of cores that have nothing else to do.
    pub fn lead<R>(&self, forward: impl FnOnce() -> R) -> R {
        let working = self.shared.working.fetch_add(1, Ordering::SeqCst) + 1;
        let seat = self.shared.seats.iter().find(|seat| {
            let was_taken = seat.taken.swap(true, Ordering::SeqCst);
            !was_taken
        });
        let seat = seat.map(Arc::clone);
        let _leave = LeaveSeat {
            shared: &self.shared,
            seat: seat.clone(),
        };
        SEAT.set(seat);
        self.shared.wake(self.shared.cores.saturating_sub(working));
        forward()
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
    }
}

/// The end of a forward, also by a panic.
struct LeaveSeat<'a> {
    shared: &'a Shared,
    seat: Option<Arc<Seat>>,
}

impl Drop for LeaveSeat<'_> {
    fn drop(&mut self) {
        SEAT.set(None);
        if let Some(seat) = &self.seat {
            seat.taken.store(false, Ordering::SeqCst);
        }
        self.shared.working.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self, helpers: usize) {
        let sleeping = self.lock().sleeping;
        for _ in 0..helpers.min(sleeping).min(MOST_HELPERS) {
            self.changed.notify_one();
        }
    }

    /// A helper thread.
    fn help(&self) {
        loop {
            let mut state = self.lock();
            while !state.closed && self.find_seat().is_none() {
                state.sleeping += 1;
                state = self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                state.sleeping -= 1;
            }
            if state.closed {
                return;
            }
            drop(state);
            if let Some(seat) = self.find_seat() {
                self.help_with(seat);
            }
        }
    }

    /// The forward with the fewest helpers, if a core is free for it.
    fn find_seat(&self) -> Option<&Seat> {
        if self.working.load(Ordering::SeqCst) >= self.cores {
            return None;
        }
        let open = self.seats.iter().filter(|seat| {
            seat.taken.load(Ordering::SeqCst) && seat.helpers.load(Ordering::Relaxed) < MOST_HELPERS
        });
        let seat = open.min_by_key(|seat| seat.helpers.load(Ordering::Relaxed));
        seat.map(Arc::as_ref)
    }

    fn help_with(&self, seat: &Seat) {
        if self.working.fetch_add(1, Ordering::SeqCst) < self.cores {
            let lane = 1 + seat.helpers.fetch_add(1, Ordering::Relaxed);
            let mut idle = 0;
            while seat.taken.load(Ordering::SeqCst)
                && self.working.load(Ordering::SeqCst) <= self.cores
            {
                if seat.region.join(lane) {
                    idle = 0;
                } else if idle < SPINS {
                    idle += 1;
                    spin_loop();
                } else {
                    // The leader may be waiting for this very core.
                    thread::yield_now();
                }
            }
            seat.helpers.fetch_sub(1, Ordering::Relaxed);
        }
        self.working.fetch_sub(1, Ordering::SeqCst);
    }
}

/// An op whose parts are being computed.
#[derive(Default)]
struct Region {
    /// [`OPEN`] while parts are left, and how many helpers are inside.
    state: AtomicUsize,
    /// Parts of each lane that are taken.
    taken: [Counter; MOST_HELPERS + 1],
    panicked: AtomicBool,
    /// Written by the leader while the region is closed and nobody inside.
    work: UnsafeCell<Option<Work>>,
}

/// A cache line of its own: the threads of other lanes write others.
#[derive(Default)]
#[repr(align(64))]
struct Counter(AtomicUsize);

const OPEN: usize = 1 << (usize::BITS - 1);

/// Parts in lanes, one for each thread: who takes the parts of a lane in order finds in its cache
/// what the part before has fetched. A thread whose lane is empty goes on with those of others.
#[derive(Clone, Copy)]
struct Work {
    parts: usize,
    lanes: usize,
    /// Borrowed by the leader's call of [`Region::lead`], which outlives everybody inside.
    part: *const (dyn Fn(usize) + Sync),
}

// SAFETY: `work` is written only while nobody is inside, see `lead`; what it points to is `Sync`.
#[allow(unsafe_code)]
unsafe impl Sync for Region {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Send for Region {}

impl Region {
    /// Runs all parts, some of them on helpers; returns when the last has ended.
    fn lead(&self, parts: usize, helpers: usize, part: &(dyn Fn(usize) + Sync)) {
        let pointer: *const (dyn Fn(usize) + Sync + '_) = part;
        // SAFETY: the lifetime is erased, not outlived: `Close` waits for every helper inside.
        #[allow(unsafe_code)]
        let pointer: *const (dyn Fn(usize) + Sync + 'static) =
            unsafe { std::mem::transmute(pointer) };
        let work = Work {
            parts,
            lanes: 1 + helpers.min(MOST_HELPERS),
            part: pointer,
        };
        // SAFETY: the region is closed and empty, as `Close` left it, and only its leader opens it.
        #[allow(unsafe_code)]
        unsafe {
            *self.work.get() = Some(work);
        }
        for taken in &self.taken[..work.lanes] {
            taken.0.store(0, Ordering::Relaxed);
        }
        self.panicked.store(false, Ordering::Relaxed);
        self.state.store(OPEN, Ordering::Release);
        {
            let _close = Close(self);
            self.take(work, 0, part);
        }
        assert!(
            !self.panicked.load(Ordering::Relaxed),
            "a helper panicked in an op"
        );
    }

    /// Takes parts, first those of the lane `own`.
    fn take(&self, work: Work, own: usize, part: &(dyn Fn(usize) + Sync)) {
        for lane in (own..own + work.lanes).map(|lane| lane % work.lanes) {
            let parts = work.lane(lane);
            loop {
                let i = self.taken[lane].0.fetch_add(1, Ordering::Relaxed);
                if i >= parts.len() {
                    break;
                }
                part(parts.start + i);
            }
        }
    }

    fn is_left(&self, work: Work) -> bool {
        (0..work.lanes).any(|lane| {
            let taken = self.taken[lane].0.load(Ordering::Relaxed);
            taken < work.lane(lane).len()
        })
    }

    /// Helps if there is anything to help with, first with what is in a lane.
    fn join(&self, lane: usize) -> bool {
        let mut state = self.state.load(Ordering::Relaxed);
        loop {
            if state & OPEN == 0 {
                return false;
            }
            let entered = self.state.compare_exchange_weak(
                state,
                state + 1,
                Ordering::Acquire,
                Ordering::Relaxed,
            );
            match entered {
                Ok(_) => break,
                Err(now) => state = now,
            }
        }
        // SAFETY: the region was open when this thread was counted in, so the leader has written
        // the work before and will not leave `lead` until this thread is counted out.
        #[allow(unsafe_code)]
        let (work, part) = unsafe {
            let work = (*self.work.get()).unwrap_unchecked();
            (work, &*work.part)
        };
        let left = self.is_left(work);
        if left {
            let taken = catch_unwind(AssertUnwindSafe(|| self.take(work, lane, part)));
            if taken.is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
        }
        self.state.fetch_sub(1, Ordering::Release);
        left
    }
}

impl Work {
    /// The parts of a lane.
    fn lane(self, lane: usize) -> Range<usize> {
        self.parts * lane / self.lanes..self.parts * (lane + 1) / self.lanes
    }
}

/// Closes a region and waits for the helpers inside.
struct Close<'a>(&'a Region);

impl Drop for Close<'_> {
    fn drop(&mut self) {
        let region = self.0;
        // A panic of the leader must not leave parts for helpers.
        for taken in &region.taken {
            taken.0.store(usize::MAX / 2, Ordering::Relaxed);
        }
        region.state.fetch_and(!OPEN, Ordering::Relaxed);
        let mut spins = 0;
        while region.state.load(Ordering::Acquire) != 0 {
            if spins < SPINS {
                spins += 1;
                spin_loop();
            } else {
                thread::yield_now();
            }
        }
    }
}

/// Runs `part(0)` … `part(parts - 1)`, in any order and, where this thread leads a forward of a
/// crew, on several cores.
pub(super) fn in_parts(parts: usize, part: &(dyn Fn(usize) + Sync)) {
    let seat = match parts {
        0 | 1 => None,
        _ => SEAT.take(),
    };
    match seat {
        // Parts of a part run where they are: the seat is put back behind it.
        Some(seat) => {
            let back = PutBack(Some(seat));
            if let Some(seat) = &back.0 {
                let helpers = seat.helpers.load(Ordering::Relaxed);
                seat.region.lead(parts, helpers, part);
            }
        }
        None => (0..parts).for_each(part),
    }
}

/// Whether other cores may take parts of this thread's ops.
pub(super) fn is_helped() -> bool {
    let seat = SEAT.take();
    let helped = seat
        .as_ref()
        .is_some_and(|seat| seat.helpers.load(Ordering::Relaxed) > 0);
    SEAT.set(seat);
    helped
}

struct PutBack(Option<Arc<Seat>>);

impl Drop for PutBack {
    fn drop(&mut self) {
        SEAT.set(self.0.take());
    }
}
