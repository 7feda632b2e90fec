//! A storage that stands still or is full, and requests that nobody waits for.

use std::sync::Arc;
use std::time::{Duration, Instant};

use poolshift::image::rbd::{Connector, CreateOptions, RbdImage, RbdOptions};
use poolshift::image::{ErrorKind, Point, SourceImage, TargetImage};

use super::{MIB, content, leased, make, name, noise, options, range, remove};
use crate::support::{Disturbed, ceph, ceph_alone};

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_dropped_request_harms_nobody() {
    let env = ceph();
    let image = name("drop");
    let (_connector, target) = make(&env, "sas", &image, &CreateOptions::new(16 * MIB)).await;
    leased(&target).await;
    let target = Arc::new(target);
    for round in 0..50u64 {
        let tasks: Vec<_> = (0..8)
            .map(|i| {
                let target = Arc::clone(&target);
                tokio::spawn(async move {
                    target.write(i * 2 * MIB, noise(MIB as usize, round)).await.unwrap();
                    target.view(&Point::Head).await.unwrap().read(range(i * 2 * MIB, MIB)).await.unwrap();
                })
            })
            .collect();
        tokio::task::yield_now().await;
        tasks.iter().for_each(tokio::task::JoinHandle::abort);
    }
    // Every write that was dropped has landed, or never will, once the lease is given back.
    target.release_lease().await.unwrap();
    leased(&target).await;
    target.write_zeroes(range(0, 16 * MIB)).await.unwrap();
    target.flush().await.unwrap();
    let view = target.view(&Point::Head).await.unwrap();
    assert!(content(&*view).await.iter().all(|&byte| byte == 0));
    drop((view, target));
    remove(&env, &format!("sas/{image}")).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph alone"]
async fn a_stopped_osd_is_a_bounded_wait_and_a_retryable_error() {
    let env = ceph_alone();
    let image = name("osd");
    let hasty = RbdOptions { io_timeout: Duration::from_secs(5), ..options(&env) };
    let (patient, maker) = make(&env, "sas", &image, &CreateOptions::new(8 * MIB)).await;
    drop(maker);
    let connector = Connector::connect(&hasty).await.unwrap();
    let target = RbdImage::open_target(&connector, "sas", None, &image).await.unwrap();
    leased(&target).await;
    target.write(0, noise(4096, 1)).await.unwrap();
    let view = target.view(&Point::Head).await.unwrap();
    let stopped = Disturbed::osd_stopped(&env, 1);
    let begun = Instant::now();
    let late = [
        target.write(4096, noise(4096, 2)).await.err(),
        view.read(range(0, 10)).await.err(),
        target.flush().await.err(),
        target.snapshots().await.err(),
        target.store_state("x").await.err(),
        RbdImage::open_source(&connector, "sas", None, &image).await.err(),
    ];
    assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
    stopped.undo();
    for error in late {
        let error = error.expect("nobody was there to answer");
        assert!(error.kind == ErrorKind::TimedOut && error.is_retryable(), "{error}");
    }
    // The same handles go on, and what was issued meanwhile has landed.
    let begun = Instant::now();
    let landed = async || {
        target.write(8192, noise(4096, 3)).await?;
        target.flush().await
    };
    while let Err(error) = landed().await {
        assert!(error.is_retryable() && begun.elapsed() < Duration::from_secs(60), "{error}");
    }
    let again = RbdImage::open_source(&patient, "sas", None, &image).await.unwrap();
    let view = again.view(&Point::Head).await.unwrap();
    for (block, seed) in [(0, 1), (1, 2), (2, 3)] {
        assert_eq!(view.read(range(block * 4096, 4096)).await.unwrap(), noise(4096, seed));
    }
    drop((view, again, target));
    remove(&env, &format!("sas/{image}")).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph alone"]
async fn a_quota_that_is_reached_is_no_space() {
    let env = ceph_alone();
    let image = name("quota");
    let (_connector, target) = make(&env, "sata", &image, &CreateOptions::new(MIB << 20)).await;
    leased(&target).await;
    target.write(0, noise(MIB as usize, 1)).await.unwrap();
    let quota = Disturbed::quota(&env, "sata", 4096);
    // The monitors hear from the manager what a pool holds: every few seconds, on a busy host much later.
    let begun = Instant::now();
    let mut object = 0;
    let refused = loop {
        // A new one each time: what makes a pool no fuller is written to a full one as well.
        object += 1;
        match target.write(object * 4 * MIB, noise(4096, object)).await {
            Ok(()) => assert!(begun.elapsed() < Duration::from_secs(300), "the quota never came"),
            Err(error) => break error,
        }
    };
    quota.undo();
    assert!(refused.kind == ErrorKind::NoSpace && refused.is_retryable(), "{refused:?}");
    assert!(refused.to_string().contains("quota of pool \"sata\""), "{refused}");
    target.write(0, noise(4096, 5)).await.unwrap();
    target.flush().await.unwrap();
    drop(target);
    remove(&env, &format!("sata/{image}")).await;
}
