//! How many requests of an image are in librbd at a time: fewer where answers take long.
//!
//! librbd holds back what a QoS limit (`rbd_qos_*`) doesn't allow yet, in the order of issue, and an OSD that is slow
//! queues as well: the time limit of a request then has to do for all that were issued before it. So a handle begins with
//! one large request, doubles what is in flight for as long as answers are quick, and halves it where one has taken a
//! considerable part of its time limit; from then on it grows slowly.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;

use super::{CephError, Result};

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
    /// How many requests were answered in time.
    answers: AtomicU64,
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
        Self {
            free: Semaphore::new(window.size as usize),
            state: Mutex::new(State { permits: window.size, window }),
            answers: AtomicU64::new(0),
        }
    }
}

impl Pace {
    /// Waits until a request of so many bytes may be issued: for as long as others are answered, and for `limit` where
    /// none is.
    pub(super) async fn turn(&self, function: &'static str, bytes: usize, limit: Duration) -> Result<Turn<'_>> {
        let cost = cost(bytes);
        loop {
            let before = self.answers.load(Ordering::Relaxed);
            match tokio::time::timeout(limit, self.free.acquire_many(cost)).await {
                Ok(permits) => {
                    if let Ok(permits) = permits {
                        permits.forget();
                    }
                    break;
                }
                Err(_) if self.answers.load(Ordering::Relaxed) != before => {}
                Err(_) => return Err(CephError::TimedOut { function, after: limit }),
            }
        }
        let number = self.state.lock().unwrap_or_else(PoisonError::into_inner).window.issue();
        Ok(Turn { pace: self, cost, number, begun: Instant::now() })
    }
}

impl Turn<'_> {
    /// The request was answered, or its time is over.
    pub(super) fn answered(self, limit: Duration) {
        let took = self.begun.elapsed();
        if took < limit {
            self.pace.answers.fetch_add(1, Ordering::Relaxed);
        }
        let mut state = self.pace.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.window.answered(self.number, self.cost, took, limit);
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

    #[tokio::test]
    async fn permits_follow_the_window() {
        let pace = Pace::default();
        let turn = |bytes| pace.turn("rbd_x", bytes, LIMIT).now_or_never().map(Result::unwrap);
        let large = turn(4 << 20).expect("there is room for one");
        assert!(turn(1).is_none());
        large.answered(LIMIT);
        // It was quick: twice as much.
        let (first, second) = (turn(4 << 20).unwrap(), turn(32 << 20).unwrap());
        assert!(turn(1).is_none());
        // Slow: the second comes back to a window of one.
        first.answered(Duration::ZERO);
        assert!(turn(4 << 20).is_none());
        drop(second);
        let small: Vec<Turn<'_>> = (0..16).map(|_| turn(1).expect("small ones")).collect();
        assert!(turn(1).is_none());
        drop(small);
        // One who gives up waiting keeps nothing.
        let large = turn(4 << 20).unwrap();
        assert!(turn(4 << 20).is_none());
        drop(large);
        assert!(turn(4 << 20).is_some());
    }
    /// However many wait: a storage that answers nothing is an error after two limits at most, and one that answers slowly
    /// is waited for.
    #[tokio::test(start_paused = true)]
    async fn who_waits_for_a_storage_that_answers_nothing_is_told_in_time() {
        for answers in [false, true] {
            let pace = Pace::default();
            let begun = tokio::time::Instant::now();
            let request = async || {
                let turn = pace.turn("rbd_x", 4 << 20, LIMIT).await?;
                tokio::time::sleep(if answers { LIMIT / 2 } else { LIMIT }).await;
                // The clock of a turn is the real one, which stands still here: it is told what came in time.
                turn.answered(if answers { LIMIT } else { Duration::ZERO });
                Ok(())
            };
            let all: Vec<Result<()>> = futures::future::join_all((0..16).map(|_| request())).await;
            let late = all.iter().filter(|one| one.is_err()).count();
            if answers {
                assert_eq!(late, 0);
            } else {
                assert!(late >= 14 && begun.elapsed() <= LIMIT * 2, "{late} after {:?}", begun.elapsed());
            }
        }
    }
}
