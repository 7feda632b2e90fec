use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use super::*;

/// What each of `readers` got in `seconds`, in requests of `size` bytes.
async fn shares(bucket: &Arc<Bucket>, readers: usize, size: u64, seconds: u64) -> Vec<u64> {
    let mut tasks = JoinSet::new();
    for _ in 0..readers {
        let bucket = bucket.clone();
        tasks.spawn(async move {
            let mut taken = 0;
            let reading = async {
                loop {
                    bucket.take(size).await;
                    taken += size;
                }
            };
            let _ = timeout(Duration::from_secs(seconds), reading).await;
            taken
        });
    }
    tasks.join_all().await
}

#[tokio::test(start_paused = true)]
async fn the_rate_is_kept_within_two_percent_by_many_readers_with_equal_shares() {
    // From a request every eight seconds to three requests a millisecond.
    for (rate, size) in
        [(MIB / 2, 4 * MIB), (50 * MIB, MIB), (300 * MIB, 4 * MIB), (4096 * MIB, 4 * MIB), (99_991, 4096)]
    {
        let bucket = Arc::new(Bucket::new(bytes(rate)));
        let burst = (rate / 10).max(4 * MIB);
        bucket.take(burst).await;
        let shares = shares(&bucket, 8, size, 60).await;
        let (sum, expected) = (shares.iter().sum::<u64>() as f64, (60 * rate) as f64);
        let slack = (0.02 * expected).max(size as f64);
        assert!((sum - expected).abs() <= slack, "{sum} instead of {expected} at {rate}");
        let (least, most) = (shares.iter().min().unwrap(), shares.iter().max().unwrap());
        assert!(most - least <= size, "{shares:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn operations_are_limited_as_bytes_are() {
    let bucket = Arc::new(Bucket::new(operations(250)));
    let sum = shares(&bucket, 8, 1, 60).await.iter().sum::<u64>();
    assert!((14_700..=15_300).contains(&sum), "{sum}");
    let both = Arc::new(Bucket::new(Rate { bytes_per_second: NonZeroU64::new(100 * MIB), ..operations(10) }));
    let sum = shares(&both, 8, MIB, 60).await.iter().sum::<u64>();
    assert!((588 * MIB..=612 * MIB).contains(&sum), "{sum}");
}

#[tokio::test(start_paused = true)]
async fn waiters_are_served_in_order_whatever_they_want() {
    let bucket = Arc::new(Bucket::new(bytes(MIB)));
    bucket.take(4 * MIB).await;
    let served = Arc::new(Mutex::new(Vec::new()));
    let mut tasks = JoinSet::new();
    for (index, size) in [4 * MIB, 1, MIB, 4096, 2 * MIB, 1].into_iter().enumerate() {
        let (bucket, served) = (bucket.clone(), served.clone());
        tasks.spawn(async move {
            bucket.take(size).await;
            served.lock().unwrap().push(index);
        });
        tokio::task::yield_now().await;
    }
    tasks.join_all().await;
    assert_eq!(*served.lock().unwrap(), [0, 1, 2, 3, 4, 5]);
}

#[tokio::test(start_paused = true)]
async fn a_request_larger_than_the_burst_goes_through_and_is_paid_for_afterwards() {
    let bucket = Bucket::new(bytes(MIB));
    let start = Instant::now();
    bucket.take(32 * MIB).await;
    assert_eq!(start.elapsed(), Duration::ZERO);
    bucket.take(MIB).await;
    let waited = start.elapsed().as_secs_f64();
    assert!((29.0..29.1).contains(&waited), "{waited}");
    // Operations alone pay no debt of bytes.
    bucket.take_operations(1_000_000).await;
    assert_eq!(start.elapsed().as_secs_f64(), waited);
}

#[tokio::test(start_paused = true)]
async fn a_new_rate_counts_for_who_waits_already() {
    let waited = async |then: Rate| {
        let bucket = Arc::new(Bucket::new(bytes(MIB)));
        bucket.take(4 * MIB).await;
        let start = Instant::now();
        let waiter = tokio::spawn({
            let bucket = bucket.clone();
            async move { bucket.take(4 * MIB).await }
        });
        sleep(Duration::from_secs(1)).await;
        bucket.set(then);
        assert_eq!(bucket.rate(), then);
        waiter.await.unwrap();
        start.elapsed().as_secs_f64()
    };
    let close = |found: f64, expected: f64| assert!((found - expected).abs() < 0.01, "{found}, not {expected}");
    close(waited(bytes(100 * MIB)).await, 1.03);
    close(waited(bytes(MIB / 2)).await, 7.0);
    close(waited(Rate::UNLIMITED).await, 1.0);
    // The operations' bucket is empty when they are limited for the first time.
    close(waited(operations(5)).await, 1.2);
    close(waited(bytes(MIB)).await, 4.0);
}

#[tokio::test(start_paused = true)]
async fn a_limit_that_is_set_again_begins_with_an_empty_bucket() {
    let bucket = Bucket::new(Rate::UNLIMITED);
    let start = Instant::now();
    for _ in 0..1000 {
        bucket.take(4 * MIB).await;
    }
    assert_eq!(start.elapsed(), Duration::ZERO);
    bucket.set(bytes(MIB));
    bucket.take(MIB).await;
    assert!(start.elapsed() >= Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn a_dropped_waiter_takes_nothing_and_blocks_nobody() {
    let bucket = Arc::new(Bucket::new(bytes(MIB)));
    bucket.take(4 * MIB).await;
    let start = Instant::now();
    let take = |size: u64| {
        let bucket = bucket.clone();
        tokio::spawn(async move { bucket.take(size).await })
    };
    let (first, second, third) = (take(4 * MIB), take(4 * MIB), take(MIB));
    sleep(Duration::from_millis(500)).await;
    second.abort();
    sleep(Duration::from_millis(500)).await;
    first.abort();
    third.await.unwrap();
    let waited = start.elapsed().as_secs_f64();
    assert!((1.0..1.01).contains(&waited), "{waited}");
}

#[derive(Clone, Debug)]
enum Step {
    Take(u64),
    Wait(u64),
    Set(Option<u64>),
    /// Drops the waiter that was started last.
    Drop,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let rate = prop::option::weighted(0.9, prop_oneof![1u64..5000, MIB..400 * MIB]);
    let step = prop_oneof![
        6 => (1u64..8 * MIB).prop_map(Step::Take),
        3 => (0u64..700).prop_map(Step::Wait),
        2 => rate.prop_map(Step::Set),
        1 => Just(Step::Drop),
    ];
    prop::collection::vec(step, 1..60)
}

/// What may have been granted since the bytes were limited last, at most.
struct Allowance {
    rate: Option<u64>,
    at: Instant,
    bytes: f64,
}

impl Allowance {
    fn now(&self) -> f64 {
        self.bytes + self.at.elapsed().as_secs_f64() * self.rate.unwrap_or(0) as f64
    }

    fn set(&mut self, rate: Option<u64>, granted: &AtomicU64) {
        let limited = self.rate.is_some() && rate.is_some();
        if !limited {
            granted.store(0, Ordering::Relaxed);
        }
        *self = Self { bytes: if limited { self.now() } else { 0.0 }, rate, at: Instant::now() };
    }
}

async fn check_grants(first_rate: u64, steps: Vec<Step>) -> Result<(), TestCaseError> {
    let bucket = Arc::new(Bucket::new(bytes(first_rate)));
    let burst = (first_rate as f64 / 10.0).max(4.0 * MIB as f64);
    let mut allowance = Allowance { rate: Some(first_rate), at: Instant::now(), bytes: burst };
    let granted = Arc::new(AtomicU64::new(0));
    let mut waiters = Vec::new();
    for step in steps {
        match step {
            Step::Take(size) => {
                let (bucket, granted) = (bucket.clone(), granted.clone());
                waiters.push(tokio::spawn(async move {
                    bucket.take(size).await;
                    if !bucket.rate().is_unlimited() {
                        granted.fetch_add(size, Ordering::Relaxed);
                    }
                }));
                tokio::task::yield_now().await;
            }
            Step::Wait(milliseconds) => sleep(Duration::from_millis(milliseconds)).await,
            Step::Set(rate) => {
                bucket.set(rate.map_or(Rate::UNLIMITED, bytes));
                allowance.set(rate, &granted);
            }
            Step::Drop => drop(waiters.pop().inspect(|waiter| waiter.abort())),
        }
        if allowance.rate.is_some() {
            // What a request is larger than the burst is the debt.
            let (granted, allowed) = (granted.load(Ordering::Relaxed) as f64, allowance.now() + 4.0 * MIB as f64);
            prop_assert!(granted <= allowed + 1.0, "{granted} of {allowed}");
        }
    }
    // Everybody who still waits is served in the end.
    bucket.set(Rate::UNLIMITED);
    for waiter in waiters {
        prop_assert!(waiter.await.is_ok());
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn never_more_is_granted_than_the_burst_and_the_rate(first_rate in 1u64..200 * MIB, steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(check_grants(first_rate, steps))?;
    }
}
