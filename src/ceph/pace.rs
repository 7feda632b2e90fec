//! How many requests of an image are in librbd at a time: fewer where answers take long.
//!
//! librbd holds back what a QoS limit (`rbd_qos_*`) doesn't allow yet, in the order of issue, and an OSD that is slow
//! queues as well: the time limit of a request then has to do for all that were issued before it. So a handle begins with
//! one large request, doubles what is in flight for as long as answers are quick, and halves it where one has taken a
//! considerable part of its time limit; from then on it grows slowly.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;

/// What one permit stands for, in bytes.
const UNIT: u64 = 64 << 10;
/// What a small request counts as: limits and disks count requests as well.
const COST_MIN: u32 = 4;
/// What a large one counts as at most, 4 MiB; it is in flight alone then, if need be.
const COST_MAX: u32 = 64;
/// What is in flight at most: 64 requests of 4 MiB, more than a pipeline's budgets allow.
const WINDOW_MAX: u32 = 64 * COST_MAX;
/// An answer that took less than this part of its time limit is a quick one.
const QUICK: u32 = 16;
/// One that took more than this part is a slow one.
const SLOW: u32 = 4;

fn cost(bytes: usize) -> u32 {
    u32::try_from((bytes as u64).div_ceil(UNIT)).unwrap_or(u32::MAX).clamp(COST_MIN, COST_MAX)
}

/// How much may be in flight. Pure.
#[derive(Debug)]
struct Window {
    size: u32,
    /// Of `size`, for growth by less than one.
    fraction: u32,
    /// Whether no answer was slow yet.
    starts: bool,
    /// How many requests were issued.
    issued: u64,
    /// Requests before this one were issued before the last shrinking, which was for their sake already.
    shrunk_at: u64,
}

impl Window {
    fn new() -> Self {
        Self { size: COST_MAX, fraction: 0, starts: true, issued: 0, shrunk_at: 0 }
    }

    fn issue(&mut self) -> u64 {
        self.issued += 1;
        self.issued
    }

    fn answered(&mut self, number: u64, cost: u32, took: Duration, limit: Duration) {
        if took > limit / SLOW {
            if number > self.shrunk_at {
                self.size = (self.size / 2).max(COST_MAX);
                (self.starts, self.fraction, self.shrunk_at) = (false, 0, self.issued);
            }
        } else if took < limit / QUICK && self.size < WINDOW_MAX {
            if self.starts {
                self.size += cost;
            } else {
                // One large request more for each window that was answered.
                self.fraction += cost * COST_MAX;
                (self.size, self.fraction) = (self.size + self.fraction / self.size, self.fraction % self.size);
            }
            self.size = self.size.min(WINDOW_MAX);
        }
    }
}

/// A [`Window`], and those who wait for room in it, in the order of arrival.
#[derive(Debug)]
pub(super) struct Pace {
    free: Semaphore,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    window: Window,
    /// How many permits there are: more than the window's size until enough have come back.
    permits: u32,
}

/// A request in flight.
#[derive(Debug)]
pub(super) struct Turn<'a> {
    pace: &'a Pace,
    cost: u32,
    number: u64,
    begun: Instant,
}

impl Default for Pace {
    fn default() -> Self {
        let window = Window::new();
        Self { free: Semaphore::new(window.size as usize), state: Mutex::new(State { permits: window.size, window }) }
    }
}

impl Pace {
    /// Waits until a request of so many bytes may be issued.
    pub(super) async fn turn(&self, bytes: usize) -> Turn<'_> {
        let cost = cost(bytes);
        if let Ok(permits) = self.free.acquire_many(cost).await {
            permits.forget();
        }
        let number = self.state.lock().unwrap_or_else(PoisonError::into_inner).window.issue();
        Turn { pace: self, cost, number, begun: Instant::now() }
    }
}

impl Turn<'_> {
    /// The request was answered, or its time is over.
    pub(super) fn answered(self, limit: Duration) {
        let mut state = self.pace.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.window.answered(self.number, self.cost, self.begun.elapsed(), limit);
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = self.pace.state.lock().unwrap_or_else(PoisonError::into_inner);
        let others = state.permits - self.cost;
        let back = state.window.size.saturating_sub(others);
        state.permits = others + back;
        self.pace.free.add_permits(back as usize);
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);
    const MIB: u64 = 1 << 20;

    /// A storage that answers in order, at a rate: how long each of so many requests of 4 MiB took, in milliseconds.
    fn served(window: &mut Window, requests: u64, rate: impl Fn(u64) -> u64) -> Vec<u64> {
        let (mut now, mut done, mut took) = (0, 0, Vec::new());
        let mut queue = std::collections::VecDeque::new();
        for served in 0..requests {
            while queue.len() as u32 * COST_MAX + COST_MAX <= window.size {
                queue.push_back((window.issue(), now));
            }
            let (number, issued) = queue.pop_front().unwrap();
            done = now.max(done) + 4 * MIB * 1000 / rate(served);
            now = done;
            took.push(now - issued);
            window.answered(number, COST_MAX, Duration::from_millis(now - issued), LIMIT);
        }
        took
    }

    #[test]
    fn no_request_waits_too_long_at_any_rate_and_a_fast_storage_gets_many() {
        for mib in [1, 2, 5, 20] {
            let took = served(&mut Window::new(), 200, |_| mib * MIB);
            assert!(took.iter().all(|took| *took < 20_000), "{mib} MiB/s: {took:?}");
        }
        let mut window = Window::new();
        served(&mut window, 70, |_| 500 * MIB);
        assert_eq!(window.size, WINDOW_MAX);
    }

    #[test]
    fn it_shrinks_once_for_what_was_in_flight_together_and_grows_back_slowly() {
        let mut window = Window { size: 16 * COST_MAX, ..Window::new() };
        let numbers: Vec<u64> = (0..16).map(|_| window.issue()).collect();
        numbers.iter().for_each(|number| window.answered(*number, COST_MAX, LIMIT / 3, LIMIT));
        assert_eq!(window.size, 8 * COST_MAX);
        let number = window.issue();
        window.answered(number, COST_MAX, LIMIT / 8, LIMIT);
        assert_eq!(window.size, 8 * COST_MAX, "neither quick nor slow");
        for _ in 0..8 {
            let number = window.issue();
            window.answered(number, COST_MAX, LIMIT / 100, LIMIT);
        }
        assert!((8 * COST_MAX..=9 * COST_MAX).contains(&window.size) && window.size > 8 * COST_MAX + COST_MAX / 2);
        for _ in 0..10 {
            let number = window.issue();
            window.answered(number, COST_MAX, LIMIT, LIMIT);
        }
        assert_eq!(window.size, COST_MAX, "one large request is always let through");
        let took = served(&mut window, 4000, |_| 500 * MIB);
        assert!(window.size > 32 * COST_MAX, "{}: {took:?}", window.size);
    }

    #[test]
    fn permits_follow_the_window() {
        let pace = Pace::default();
        let large = pace.turn(4 << 20).now_or_never().expect("there is room for one");
        assert!(pace.turn(1).now_or_never().is_none());
        large.answered(LIMIT);
        // It was quick: twice as much.
        let (first, second) = (pace.turn(4 << 20).now_or_never().unwrap(), pace.turn(32 << 20).now_or_never().unwrap());
        assert!(pace.turn(1).now_or_never().is_none());
        // Slow: the second comes back to a window of one.
        first.answered(Duration::ZERO);
        assert!(pace.turn(4 << 20).now_or_never().is_none());
        drop(second);
        let small: Vec<Turn<'_>> = (0..16).map(|_| pace.turn(1).now_or_never().expect("small ones")).collect();
        assert!(pace.turn(1).now_or_never().is_none());
        drop(small);
        // One who gives up waiting keeps nothing.
        let large = pace.turn(4 << 20).now_or_never().unwrap();
        assert!(pace.turn(4 << 20).now_or_never().is_none());
        drop(large);
        assert!(pace.turn(4 << 20).now_or_never().is_some());
    }
}
