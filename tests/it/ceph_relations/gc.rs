//! Orphans on a real cluster: what poolshift made goes, what it did not make stays.

use std::sync::Arc;

use poolshift::image::{LeaseOwner, SourceImage, TargetImage};
use poolshift::replicate::orphans::Why;
use poolshift::replicate::state::{Retired, Side, TargetState};
use poolshift::replicate::{find_orphans, gc, survey};

use super::{Family, close};

const STRAY: &str = "poolshift-20200101T000000.000Z";

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn foreign_snapshots_stay_and_retired_ones_go_once_nothing_holds_them() {
    let family = Family::new();
    family.rbd("create sata/NAME --size 8M");
    family.fill("sata/NAME", 4);
    family.run(0, "sync rbd:sata/NAME rbd:sas/NAME");
    for name in ["nightly", STRAY] {
        family.rbd(&format!("snap create --no-progress sata/NAME@{name}"));
        family.rbd(&format!("snap create --no-progress sas/NAME@{name}"));
    }
    family.rbd("snap create --no-progress sata/NAME@poolshift-20200101T000000.001Z");
    let source = Arc::new(family.open("sata", "NAME").await);
    let target: Arc<dyn TargetImage> = Arc::new(family.open("sas", "NAME").await);

    // One that an earlier prune could not remove, because it is protected.
    let held = source.snapshots().await.unwrap().into_iter().find(|snapshot| snapshot.name.ends_with("001Z")).unwrap();
    family.rbd(&format!("snap protect sata/NAME@{}", held.name));
    let mut state = TargetState::parse(&target.load_state().await.unwrap().unwrap()).unwrap();
    state.retired.push(Retired::of(Side::Source, held.id, &held.name));
    target.acquire_lease(&LeaseOwner::current().unwrap()).await.unwrap();
    target.store_state(&state.render().unwrap()).await.unwrap();
    target.release_lease().await.unwrap();

    let volume: (Arc<dyn SourceImage>, Arc<dyn TargetImage>) = (source.clone(), target.clone());
    let known = survey(std::slice::from_ref(&volume)).await.unwrap();
    let found = find_orphans(volume.0.as_ref(), volume.1.as_ref(), &known).await.unwrap().orphans;
    let found: Vec<_> = found.iter().map(|orphan| (orphan.side, orphan.name.as_str(), orphan.why)).collect();
    let retired = (Side::Source, held.name.as_str(), Why::Retired);
    assert_eq!(found, [retired, (Side::Source, STRAY, Why::Unknown), (Side::Target, STRAY, Why::Unknown)]);

    let report = gc(&volume.0, &volume.1, &known, false).await.unwrap();
    assert_eq!((report.removed.source.len(), report.removed.left.len()), (0, 1), "{report:?}");
    source.unprotect_snapshot(&held.name).await.unwrap();
    let report = gc(&volume.0, &volume.1, &known, false).await.unwrap();
    assert_eq!(report.removed.source, [held.name]);
    assert_eq!((source.snapshots().await.unwrap().len(), target.snapshots().await.unwrap().len()), (3, 3));

    let report = gc(&volume.0, &volume.1, &known, true).await.unwrap();
    assert_eq!((report.removed.source, report.removed.target), (vec![STRAY.to_owned()], vec![STRAY.to_owned()]));
    for image in [&volume.0.snapshots().await.unwrap(), &target.snapshots().await.unwrap()] {
        assert!(image.len() == 2 && image.iter().any(|snapshot| snapshot.name == "nightly"), "{image:?}");
    }
    drop((source, target, volume));
    close().await;
    family.run(0, "sync rbd:sata/NAME rbd:sas/NAME");
}
