use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::*;
use crate::extent::{ByteRange, Extent};
use crate::image::memory::MemoryImage;
use crate::image::{ChangedObjects, ErrorKind, ImageError, Layout, Point, SourceImage};

const LAYOUT: Layout = Layout { object_size: 64 << 10, stripe_unit: 64 << 10, stripe_count: 1 };

fn night() -> Schedule {
    let window = Window { from_minute: 22 * 60, until_minute: 6 * 60, rate: Rate::UNLIMITED };
    Schedule::new(bytes(10 * MIB), vec![window])
}

#[tokio::test(start_paused = true)]
async fn windows_hands_and_plans_change_the_rate_and_say_so() {
    let limiter = PoolLimiter::new("sata", night(), None, 21 * 60 + 59);
    let change = |reason: &str, rate| Some(Change { reason: reason.to_owned(), rate });
    assert_eq!((limiter.pool(), limiter.status().rate, limiter.tick(21 * 60 + 59)), ("sata", bytes(10 * MIB), None));
    assert_eq!(limiter.tick(22 * 60), change("window 22:00-06:00", Rate::UNLIMITED));
    assert_eq!((limiter.tick(0), limiter.tick(6 * 60 - 1)), (None, None));
    assert_eq!(limiter.set_override(Some(bytes(MIB))), change("set by hand", bytes(MIB)));
    assert_eq!(limiter.set_override(Some(bytes(2 * MIB))), change("set by hand", bytes(2 * MIB)));
    assert_eq!((limiter.tick(6 * 60), limiter.status().rate), (None, bytes(2 * MIB)));
    assert_eq!(limiter.set_override(None), change("plan", bytes(10 * MIB)));
    limiter.set_override(Some(bytes(MIB)));
    assert_eq!(limiter.configure(Schedule::new(bytes(5 * MIB), vec![]), None), change("plan", bytes(5 * MIB)));
}

#[tokio::test(start_paused = true)]
async fn slow_reads_lower_the_rate_and_quick_ones_bring_it_back() {
    let limiter = PoolLimiter::new("sata", Schedule::new(bytes(100 * MIB), vec![]), Some(Duration::from_millis(20)), 0);
    let mut changes = Vec::new();
    for second in 0..200 {
        let latency = if second < 2 { 80 } else { 5 };
        for _ in 0..8 {
            limiter.take(MIB).await;
            let read = async {
                sleep(Duration::from_millis(latency)).await;
                Ok::<_, ImageError>(())
            };
            limiter.measure(MIB, read).await.unwrap();
        }
        sleep(Duration::from_secs(1)).await;
        changes.extend(limiter.tick(0));
    }
    let reasons: Vec<&str> = changes.iter().map(|change| change.reason.as_str()).collect();
    assert_eq!(reasons, ["lowered: reads take 80 ms", "recovering: reads take 5.0 ms", "plan"]);
    assert!(changes[0].rate.bytes_per_second.unwrap().get() < 8 * MIB && changes[2].rate == bytes(100 * MIB));
    let status = limiter.status();
    assert!((0.004..0.007).contains(&status.latency_seconds.unwrap()), "{status:?}");
    let used = status.used_bytes_per_second / MIB as f64;
    assert!((6.5..9.0).contains(&used) && (6.5..9.0).contains(&status.used_operations_per_second), "{status:?}");
}

#[tokio::test(start_paused = true)]
async fn failed_and_dropped_reads_are_no_quick_ones() {
    let limiter = PoolLimiter::new("sata", Schedule::default(), None, 0);
    let fail = |kind| async move { Err::<(), _>(ImageError::new(kind, "memory:a", "read")) };
    limiter.measure(MIB, fail(ErrorKind::NotFound)).await.unwrap_err();
    let dropped = limiter.measure(MIB, std::future::pending::<crate::image::Result<()>>());
    tokio::time::timeout(Duration::from_secs(1), dropped).await.unwrap_err();
    assert_eq!(limiter.status().used_operations_per_second, 0.0);
    limiter.measure(MIB, fail(ErrorKind::TimedOut)).await.unwrap_err();
    let status = limiter.status();
    assert!(status.used_operations_per_second > 0.0 && status.used_bytes_per_second == 0.0);
}

#[tokio::test(start_paused = true)]
async fn a_throttled_image_is_the_same_image_and_slower() {
    let image = MemoryImage::new("source", 2 * MIB, LAYOUT);
    image.write_as_server(MIB, &[7; 4096]);
    let volume = Arc::new(Bucket::new(Rate { bytes_per_second: bytes(MIB).bytes_per_second, ..operations(100) }));
    let pool = Arc::new(PoolLimiter::new("sata", Schedule::default(), None, 0));
    let throttled = ThrottledSource::new(Arc::new(image.clone()), Some(volume.clone()), Some(pool.clone()));
    let start = Instant::now();
    assert_eq!((throttled.location(), throttled.identity()), (image.location(), image.identity()));
    assert_eq!((throttled.layout(), throttled.snapshot_support()), (LAYOUT, image.snapshot_support()));
    assert_eq!((throttled.remarks(), throttled.change_token().await.unwrap()), (image.remarks(), None));
    let first = throttled.create_snapshot("a").await.unwrap();
    assert_eq!(throttled.snapshots().await.unwrap(), image.snapshots().await.unwrap());
    assert_eq!(throttled.size().await.unwrap(), 2 * MIB);
    let view = throttled.view(&Point::Snapshot(first.clone())).await.unwrap();
    assert_eq!((view.point(), view.size()), (&Point::Snapshot(first.clone()), 2 * MIB));
    assert_eq!(start.elapsed(), Duration::ZERO);

    let range = |offset, length| ByteRange::new(offset, length).unwrap();
    assert_eq!(view.read(range(MIB, 4096)).await.unwrap(), vec![7; 4096]);
    let objects = view.changed_objects(None).await.unwrap();
    assert_eq!(objects, ChangedObjects::Runs(vec![range(MIB, 64 << 10)]));
    let extents = view.diff(None, range(0, 2 * MIB)).await.unwrap();
    assert_eq!(extents, [Extent::data(range(MIB, 4096))]);
    // 1 and 1 and 32 operations, of which the bucket holds ten: the last ones are owed.
    let before = start.elapsed();
    view.changed_objects(None).await.unwrap();
    assert!((start.elapsed() - before).as_secs_f64() > 0.2);

    // Eight MiB at one a second, of which four were in the bucket.
    let before = start.elapsed();
    for _ in 0..4 {
        view.read(range(0, 2 * MIB)).await.unwrap();
    }
    let waited = (start.elapsed() - before).as_secs_f64();
    assert!((3.9..4.1).contains(&waited), "{waited}");
    assert!(pool.status().used_operations_per_second > 0.0);
    // The waiting is not part of the latency.
    assert!(pool.tick(0).is_none() && pool.status().latency_seconds == Some(0.0));
    throttled.remove_snapshot(&first).await.unwrap();
    assert!(image.snapshots().await.unwrap().is_empty());
}
