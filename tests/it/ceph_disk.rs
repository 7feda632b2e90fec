//! Servers' disks on a real cluster: who has one open, the fence against a real writer, names, the journal, rehearsals.

use std::time::{Duration, Instant};

use bytes::Bytes;
use poolshift::image::rbd::{Connector, CreateOptions, RbdImage, wait_until_closed};
use poolshift::image::{Disk, ErrorKind, JOURNAL_MAX, LeaseOwner, LockHolder, Point, SourceImage, TargetImage};

use crate::ceph_backend::lease::Holder;
use crate::librbd::{Librbd, MIB, connect, name};
use crate::support::{CephEnv, ceph, ceph_alone};

/// A new image, opened as a disk, and a client of librbd beside it.
struct Rig {
    librbd: Librbd,
    connector: Connector,
    disk: RbdImage,
    name: String,
    /// `sas/NAME`.
    place: String,
}

impl Rig {
    async fn new(env: &CephEnv, tag: &str, features: u64) -> Self {
        let (connector, name) = (connect(env).await, name(tag));
        let options = CreateOptions { features, ..CreateOptions::new(16 * MIB) };
        RbdImage::create(&connector, "sas", None, &name, &options).await.unwrap();
        let disk = RbdImage::open_source(&connector, "sas", None, &name).await.unwrap();
        Self { librbd: Librbd::start(env), connector, disk, place: format!("sas/{name}"), name }
    }

    async fn lock(env: &CephEnv, tag: &str) -> Self {
        Self::new(env, tag, CreateOptions::FEATURES).await
    }

    /// Writes as the server; the error if it is refused.
    async fn write(&mut self, offset: u64, byte: u8) -> Result<(), String> {
        self.librbd.try_call(&format!("write {} {offset}", self.place), &[byte; 4096]).await.map(drop)
    }

    /// The first byte at an offset, for a reader that just came.
    async fn byte(&mut self, offset: u64) -> u8 {
        self.librbd.read(&self.place).await[offset as usize]
    }

    async fn fence(&self, holder: LockHolder) -> poolshift::image::Result<()> {
        self.disk.fence(&LeaseOwner::current().unwrap(), holder).await
    }

    async fn reopen(&self) -> RbdImage {
        RbdImage::open_target(&self.connector, "sas", None, &self.name).await.unwrap()
    }

    async fn end(mut self) {
        drop(self.disk);
        self.librbd.remove(&[&self.place]).await;
    }
}

fn kind<T>(result: poolshift::image::Result<T>) -> ErrorKind {
    result.err().expect("an error").kind
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn the_fence_refuses_a_server_that_is_there() {
    let env = ceph();
    let mut rig = Rig::lock(&env, "fence-refuse").await;
    assert_eq!(rig.disk.users().await.unwrap(), []);
    rig.write(0, b'a').await.unwrap();
    let users = rig.disk.users().await.unwrap();
    assert!(users.len() == 1 && !users[0].is_own, "{users:?}");
    let begun = Instant::now();
    let busy = rig.fence(LockHolder::Refuse).await.unwrap_err();
    let took = begun.elapsed();
    println!("refused after {took:?}");
    assert!(matches!(&busy.kind, ErrorKind::Busy { holder } if holder.contains(&users[0].address)), "{busy}");
    assert!(took > Duration::from_secs(2) && took < Duration::from_secs(25), "{took:?}");
    // Nothing has changed for it.
    assert_eq!(rig.librbd.call(format!("owns {}", rig.place)).await, b"1");
    rig.write(0, b'b').await.unwrap();
    // One that has it open and has never written keeps nobody from the lock, and is among the users.
    rig.librbd.call(format!("close {}", rig.place)).await;
    rig.librbd.call(format!("open {}", rig.place)).await;
    rig.fence(LockHolder::Refuse).await.unwrap();
    let users = rig.disk.users().await.unwrap();
    let own = users.iter().filter(|user| user.is_own).count();
    assert_eq!((users.len(), own), (2, 1), "{users:?}");
    assert!(rig.write(0, b'c').await.is_err());
    assert_eq!(rig.byte(0).await, b'b');
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph alone"]
async fn a_server_that_has_just_ended_is_waited_for() {
    let env = ceph_alone();
    let mut rig = Rig::lock(&env, "fence-exit").await;
    rig.write(0, b'a').await.unwrap();
    let (place, owner) = (rig.place.clone(), LeaseOwner::current().unwrap());
    let mut fenced = rig.disk.fence(&owner, LockHolder::Refuse);
    // It is under way, and not over, when the server ends.
    let early = tokio::time::timeout(Duration::from_millis(300), &mut fenced).await;
    assert!(early.is_err(), "nobody was waited for: {early:?}");
    rig.librbd.call(format!("close {place}")).await;
    fenced.await.unwrap();
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_suspended_server_gives_the_lock_and_is_refused_until_the_release() {
    let env = ceph();
    let mut rig = Rig::lock(&env, "fence-ask").await;
    let bytes: Vec<u8> = (0..100).collect();
    for &byte in &bytes {
        rig.write(u64::from(byte) * 4096, byte).await.unwrap();
    }
    // A reader that came before doesn't matter.
    let view = rig.disk.view(&Point::Head).await.unwrap();
    let begun = Instant::now();
    rig.fence(LockHolder::Ask).await.unwrap();
    println!("asked and got the lock in {:?}", begun.elapsed());
    rig.fence(LockHolder::Ask).await.unwrap();
    rig.fence(LockHolder::Refuse).await.unwrap();
    assert_eq!(rig.librbd.call(format!("owns {}", rig.place)).await, b"0");
    // What it had written is there, whether it had flushed it or not.
    let before = rig.librbd.read(&rig.place.clone()).await;
    assert!(bytes.iter().all(|&byte| before[usize::from(byte) * 4096] == byte));
    let owner = rig.reopen().await.lease_owner().await.unwrap().unwrap();
    assert_eq!(owner.pid, std::process::id());
    let begun = Instant::now();
    let refused = rig.write(0, b'x').await.unwrap_err();
    println!("the server's write was refused in {:?}: {refused}", begun.elapsed());
    assert!(refused.contains("ReadOnlyImage"), "{refused}");
    assert!(rig.librbd.try_call(&format!("discard {} 0 65536", rig.place), b"").await.is_err());
    assert!(rig.librbd.try_call(&format!("zero {} 0 65536", rig.place), b"").await.is_err());
    // It still reads, and has the fence's holder make snapshots for it.
    assert_eq!(rig.librbd.call(format!("peek {} 4096 1", rig.place)).await, [1]);
    rig.disk.create_snapshot("final").await.unwrap();
    assert!(rig.librbd.read(&rig.place.clone()).await == before, "something of the server's landed");
    rig.disk.release_lease().await.unwrap();
    rig.write(0, b'y').await.unwrap();
    assert_eq!(rig.byte(0).await, b'y');
    assert_eq!(rig.librbd.call(format!("owns {}", rig.place)).await, b"1");
    // And once more, to the end of the handle instead of a release.
    rig.fence(LockHolder::Ask).await.unwrap();
    assert!(rig.write(0, b'z').await.is_err());
    let again = rig.reopen().await;
    drop(std::mem::replace(&mut rig.disk, again));
    assert!(wait_until_closed(Duration::from_secs(60)).await);
    rig.write(0, b'z').await.unwrap();
    drop(view);
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn nothing_of_a_server_that_goes_on_writing_lands_beyond_the_fence() {
    let env = ceph();
    let mut rig = Rig::lock(&env, "fence-hammer").await;
    rig.librbd.call(format!("hammer {} 7", rig.place)).await;
    let place = rig.place.clone();
    let (begun, mut writes) = (Instant::now(), 0);
    while writes < 50 {
        assert!(begun.elapsed() < Duration::from_secs(60), "it writes no more: {writes}");
        tokio::time::sleep(Duration::from_millis(10)).await;
        writes = rig.librbd.hammered(&place).await;
    }
    rig.fence(LockHolder::Ask).await.unwrap();
    let first = rig.librbd.digest(&place).await;
    let refused = rig.librbd.try_call(&format!("rest {place}"), b"").await.unwrap_err();
    assert!(refused.contains("ReadOnlyImage"), "{refused}");
    assert_eq!(rig.librbd.digest(&place).await, first);
    rig.disk.write(0, Bytes::from_static(b"ours")).await.unwrap();
    rig.disk.flush().await.unwrap();
    assert_eq!(rig.byte(0).await, b'o');
    rig.disk.release_lease().await.unwrap();
    rig.write(0, b's').await.unwrap();
    assert_eq!(rig.byte(0).await, b's');
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph alone"]
async fn the_fence_of_another_process_stands_until_that_is_dead() {
    let env = ceph_alone();
    let mut rig = Rig::lock(&env, "fence-killed").await;
    rig.write(0, b'a').await.unwrap();
    let holder = Holder::fencing(&rig.name);
    for how in [LockHolder::Refuse, LockHolder::Ask] {
        let begun = Instant::now();
        let busy = rig.fence(how).await.unwrap_err();
        let process = format!("process {} on ", holder.child.id());
        assert!(matches!(&busy.kind, ErrorKind::Busy { holder } if holder.contains(&process)), "{busy}");
        assert!(begun.elapsed() < Duration::from_secs(25), "{:?}", begun.elapsed());
    }
    assert!(rig.write(0, b'b').await.is_err());
    // `kill -9`.
    drop(holder);
    let begun = Instant::now();
    rig.fence(LockHolder::Refuse).await.unwrap();
    println!("a dead holder was broken in {:?}", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(25), "{:?}", begun.elapsed());
    assert!(rig.write(0, b'c').await.is_err());
    assert_eq!(rig.byte(0).await, b'a');
    rig.disk.release_lease().await.unwrap();
    rig.write(0, b'd').await.unwrap();
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn an_image_without_the_exclusive_lock_has_no_fence() {
    let env = ceph();
    let rig = Rig::new(&env, "fence-none", 1).await;
    for how in [LockHolder::Refuse, LockHolder::Ask] {
        let refused = rig.fence(how).await.unwrap_err();
        assert_eq!(refused.kind, ErrorKind::Unsupported, "{refused}");
        assert_eq!(refused.hint.unwrap(), format!("enable it: rbd feature enable {} exclusive-lock", rig.place));
    }
    // Its lease is another matter.
    rig.disk.acquire_lease(&LeaseOwner::current().unwrap()).await.unwrap();
    assert_eq!(kind(rig.fence(LockHolder::Refuse).await), ErrorKind::Unsupported);
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn an_image_is_renamed_under_its_lock_and_its_readers() {
    let env = ceph();
    let (mut rig, mut other) = (Rig::lock(&env, "rename").await, Rig::lock(&env, "rename-other").await);
    rig.write(0, b'a').await.unwrap();
    rig.fence(LockHolder::Ask).await.unwrap();
    let view = rig.disk.view(&Point::Head).await.unwrap();
    assert_eq!(rig.disk.name().await.unwrap(), rig.name);
    rig.disk.rename(&rig.name).await.unwrap();
    let taken = rig.disk.rename(&other.name).await.unwrap_err();
    assert!(taken.kind == ErrorKind::AlreadyExists && taken.to_string().contains(&other.name), "{taken}");
    for odd in ["", "a/b", "a@b"] {
        assert_eq!(kind(rig.disk.rename(odd).await), ErrorKind::Unsupported);
    }
    let (old, new) = (rig.name.clone(), format!("{}.kept", rig.name));
    for _ in 0..2 {
        let begun = Instant::now();
        rig.disk.rename(&new).await.unwrap();
        println!("renamed in {:?}", begun.elapsed());
        assert_eq!(rig.disk.name().await.unwrap(), new);
    }
    assert!(!RbdImage::exists(&rig.connector, "sas", None, &old).await.unwrap());
    // Everything goes on by id: the lock, the readers, new looks.
    rig.disk.write(1, Bytes::from_static(b"b")).await.unwrap();
    rig.disk.flush().await.unwrap();
    rig.disk.store_journal(Some("{}")).await.unwrap();
    let range = poolshift::extent::ByteRange::new(0, 2).unwrap();
    assert_eq!(&view.read(range).await.unwrap()[..], b"ab");
    assert_eq!(rig.disk.view(&Point::Head).await.unwrap().size(), 16 * MIB);
    rig.disk.create_snapshot("s").await.unwrap();
    rig.disk.release_lease().await.unwrap();
    // The server's open handle doesn't mind either.
    rig.write(0, b'c').await.unwrap();
    let again = RbdImage::open_by_id(&rig.connector, "sas", None, &rig.disk.identity().image).await.unwrap();
    assert_eq!((again.identity(), again.location()), (rig.disk.identity(), format!("rbd:sas/{new}").as_str()));
    assert_eq!(kind(RbdImage::open_by_id(&rig.connector, "sas", None, "0").await), ErrorKind::NotFound);
    // Another image may have the old name now: this one stays what it is.
    other.disk.rename(&old).await.unwrap();
    assert_eq!(rig.disk.name().await.unwrap(), new);
    rig.disk.rename(&new).await.unwrap();
    assert!(RbdImage::exists(&rig.connector, "sas", None, &old).await.unwrap());
    rig.librbd.call(format!("close {}", rig.place)).await;
    (rig.place, other.place) = (format!("sas/{new}"), format!("sas/{old}"));
    drop((view, again));
    rig.end().await;
    other.end().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_rename_that_was_cut_is_finished() {
    let env = ceph();
    let mut rig = Rig::lock(&env, "rename-cut").await;
    let (old, new) = (rig.name.clone(), format!("{}.kept", rig.name));
    let exists = |name: String| {
        let connector = rig.connector.clone();
        async move { RbdImage::exists(&connector, "sas", None, &name).await.unwrap() }
    };
    // Before it counted: both names open the image, which has the old one.
    rig.librbd.call(format!("cut-rename sas/{old} {new}")).await;
    assert!(exists(old.clone()).await && exists(new.clone()).await);
    assert_eq!(rig.disk.name().await.unwrap(), old);
    rig.disk.rename(&new).await.unwrap();
    assert!(!exists(old.clone()).await && exists(new.clone()).await);
    // After it counted: both names open the image, which has the new one.
    rig.librbd.call(format!("cut-rename sas/{new} {old}")).await;
    let found = rig.reopen().await;
    assert_eq!(found.name().await.unwrap(), new);
    found.rename(&new).await.unwrap();
    assert!(!exists(old.clone()).await && exists(new.clone()).await);
    // And back.
    rig.disk.rename(&old).await.unwrap();
    assert_eq!(rig.disk.name().await.unwrap(), old);
    assert!(exists(old).await && !exists(new).await);
    drop(found);
    rig.end().await;
}

/// A placeholder that was being renamed by a process that was killed, and was then removed by its other name.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_name_that_opens_nothing_keeps_no_placeholder_from_it() {
    let env = ceph();
    let (connector, name) = (connect(&env).await, name("stale"));
    let mut librbd = Librbd::start(&env);
    for prepared in [true, false] {
        let placeholder = connector.prepare_placeholder("sas", None, &name).await.unwrap();
        placeholder.rename(&name).await.unwrap();
        drop(placeholder);
        librbd.call(format!("cut-rename sas/{name} {name}.poolshift-placeholder")).await;
        librbd.remove(&[&format!("sas/{name}")]).await;
        if prepared {
            let again = connector.prepare_placeholder("sas", None, &name).await.unwrap();
            assert!(again.is_placeholder().await.unwrap());
        }
        connector.remove_placeholder("sas", None, &name).await.unwrap();
    }
    // So does one whose creation was cut: it is in the pool's directory as well.
    for prepared in [true, false] {
        librbd.call(format!("cut-create sas/{name}.poolshift-placeholder")).await;
        if prepared {
            let again = connector.prepare_placeholder("sas", None, &name).await.unwrap();
            assert!(again.is_placeholder().await.unwrap());
        }
        connector.remove_placeholder("sas", None, &name).await.unwrap();
    }
    // And the name is free.
    let options = CreateOptions::new(MIB);
    RbdImage::create(&connector, "sas", None, &format!("{name}.poolshift-placeholder"), &options).await.unwrap();
    librbd.remove(&[&format!("sas/{name}.poolshift-placeholder")]).await;
}

/// What poolshift keeps with an image is that image's: a copy that somebody has made of it has none of it.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_copy_of_an_image_has_none_of_its_records() {
    let env = ceph();
    let mut rig = Rig::lock(&env, "records").await;
    rig.disk.acquire_lease(&LeaseOwner::current().unwrap()).await.unwrap();
    rig.disk.store_state("state").await.unwrap();
    rig.disk.store_journal(Some("journal")).await.unwrap();
    rig.disk.store_note(Some("note")).await.unwrap();
    rig.disk.release_lease().await.unwrap();
    let of = async |image: &RbdImage| {
        let (state, journal) = (image.load_state().await.unwrap(), image.load_journal().await.unwrap());
        [state, journal, image.load_note().await.unwrap()]
    };
    let all = ["state", "journal", "note"].map(|text| Some(text.to_owned()));
    assert_eq!(of(&rig.disk).await, all);
    let copied = format!("{}-copy", rig.name);
    crate::vm::rbd(&env, &["deep", "cp", "--no-progress", &rig.place, &format!("sas/{copied}")]);
    let copy = RbdImage::open_target(&rig.connector, "sas", None, &copied).await.unwrap();
    assert_eq!(of(&copy).await, [None, None, None]);
    // With its first own record those of the other one are gone, and with its last own one all.
    copy.store_note(Some("own")).await.unwrap();
    assert_eq!(of(&copy).await, [None, None, Some("own".to_owned())]);
    let listed = || crate::vm::rbd(&env, &["image-meta", "ls", &format!("sas/{copied}")]);
    assert!(!listed().contains("poolshift.state"), "{}", listed());
    copy.store_note(None).await.unwrap();
    assert!(!listed().contains("poolshift"), "{}", listed());
    assert_eq!(of(&rig.disk).await, all);
    drop(copy);
    rig.librbd.remove(&[&format!("sas/{copied}")]).await;
    rig.end().await;
}

/// A new image is as it was asked for, whatever the pool's configuration has for new images.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph alone"]
async fn an_image_is_made_as_it_was_asked_for() {
    let env = ceph_alone();
    let (connector, name) = (connect(&env).await, name("as-asked"));
    let config = |words: &[&str]| crate::vm::rbd(&env, &[&["config", "pool"], words].concat());
    let defaults =
        [("rbd_default_data_pool", "sata"), ("rbd_default_stripe_unit", "65536"), ("rbd_default_stripe_count", "4")];
    for (option, value) in defaults {
        config(&["set", "sas", option, value]);
    }
    let made = RbdImage::create(&connector, "sas", None, &name, &CreateOptions::new(16 * MIB)).await;
    for (option, _) in defaults {
        config(&["remove", "sas", option]);
    }
    made.unwrap();
    let place = format!("sas/{name}");
    let info = crate::vm::rbd(&env, &["info", "--format", "json", &place]);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(
        (&info["data_pool"], &info["stripe_count"]),
        (&serde_json::Value::Null, &serde_json::Value::Null),
        "{info:#}"
    );
    Librbd::start(&env).remove(&[&place]).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn the_journal_is_kept_with_the_image() {
    let env = ceph();
    let rig = Rig::lock(&env, "journal").await;
    assert_eq!(rig.disk.load_journal().await.unwrap(), None);
    rig.fence(LockHolder::Refuse).await.unwrap();
    let most = "x".repeat(JOURNAL_MAX);
    for journal in ["{}", &most] {
        rig.disk.store_journal(Some(journal)).await.unwrap();
        assert_eq!(rig.reopen().await.load_journal().await.unwrap().as_deref(), Some(journal));
    }
    let large = rig.disk.store_journal(Some(&format!("{most}x"))).await.unwrap_err();
    assert!(large.kind == ErrorKind::OutOfBounds && large.to_string().contains("65537"), "{large}");
    rig.disk.store_state("state").await.unwrap();
    for _ in 0..2 {
        rig.disk.store_journal(None).await.unwrap();
        rig.disk.forget_state().await.unwrap();
    }
    let other = rig.reopen().await;
    assert_eq!((other.load_journal().await.unwrap(), other.load_state().await.unwrap()), (None, None));
    drop(other);
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_rehearsal_is_a_marked_clone_that_is_found_and_removed() {
    let env = ceph();
    let mut rig = Rig::lock(&env, "rehearse").await;
    rig.write(0, b'a').await.unwrap();
    rig.librbd.call(format!("close {}", rig.place)).await;
    rig.fence(LockHolder::Refuse).await.unwrap();
    rig.disk.store_journal(Some("{}")).await.unwrap();
    rig.disk.store_state("state").await.unwrap();
    let snapshot = rig.disk.create_snapshot("s").await.unwrap();
    let child = format!("{}.rehearsal", rig.name);
    let clone = rig.disk.clone_of_snapshot(&snapshot, &child, "web-1").await.unwrap();
    assert_eq!(kind(rig.disk.clone_of_snapshot(&snapshot, &child, "web-1").await), ErrorKind::AlreadyExists);
    let gone = poolshift::image::Snapshot { id: snapshot.id + 1, ..snapshot.clone() };
    assert_eq!(kind(rig.disk.clone_of_snapshot(&gone, "never", "x").await), ErrorKind::NotFound);
    assert_eq!((clone.load_journal().await.unwrap(), clone.load_state().await.unwrap()), (None, None));
    assert_eq!(clone.parent().await.unwrap().unwrap().snapshot, format!("{}@s", rig.place));
    clone.acquire_lease(&LeaseOwner::current().unwrap()).await.unwrap();
    clone.write(4096, Bytes::from_static(b"b")).await.unwrap();
    clone.flush().await.unwrap();
    assert_eq!(rig.byte(4096).await, 0);
    assert_eq!(rig.librbd.read(&format!("sas/{child}")).await[0], b'a');
    let found = RbdImage::open_target(&rig.connector, "sas", None, &child).await.unwrap();
    assert_eq!(found.rehearsal_mark().await.unwrap().as_deref(), Some("web-1"));
    drop(found);
    assert_eq!(rig.disk.rehearsal_mark().await.unwrap(), None);
    rig.disk.release_lease().await.unwrap();
    // What is needed stays: clones, snapshots, users.
    let refused = rig.reopen().await.remove().await.unwrap_err();
    assert!(matches!(refused.kind, ErrorKind::Busy { .. }), "{refused}");
    assert!(refused.to_string().contains(&format!("has clones: rbd:sas/{child}")), "{refused}");
    clone.release_lease().await.unwrap();
    rig.librbd.call(format!("open sas/{child}")).await;
    let used = RbdImage::open_by_id(&rig.connector, "sas", None, &clone.identity().image).await.unwrap();
    let refused = used.remove().await.unwrap_err();
    assert!(refused.to_string().contains("has it open"), "{refused}");
    rig.librbd.call(format!("close sas/{child}")).await;
    clone.acquire_lease(&LeaseOwner::current().unwrap()).await.unwrap();
    clone.remove().await.unwrap();
    let refused = rig.reopen().await.remove().await.unwrap_err();
    assert!(refused.to_string().contains("it has snapshots: s"), "{refused}");
    rig.disk.remove_snapshot(&snapshot).await.unwrap();
    rig.reopen().await.remove().await.unwrap();
    assert!(!RbdImage::exists(&rig.connector, "sas", None, &rig.name).await.unwrap());
    rig.end().await;
}

/// Prints what the outage is made of here; nothing is asserted but an order of magnitude.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph alone"]
async fn the_fence_is_quick_where_nobody_uses_the_image() {
    let env = ceph_alone();
    let mut rig = Rig::lock(&env, "quick").await;
    let owner = LeaseOwner::current().unwrap();
    let mut times: [Vec<Duration>; 6] = Default::default();
    for _ in 0..10 {
        let mut lap = Instant::now();
        let mut note = |which: usize| {
            times[which].push(lap.elapsed());
            lap = Instant::now();
        };
        rig.disk.fence(&owner, LockHolder::Refuse).await.unwrap();
        note(0);
        rig.disk.store_journal(Some("{}")).await.unwrap();
        note(1);
        rig.disk.release_lease().await.unwrap();
        note(2);
        rig.disk.acquire_lease(&owner).await.unwrap();
        note(3);
        drop(rig.disk.view(&Point::Head).await.unwrap());
        note(4);
        rig.disk.release_lease().await.unwrap();
        lap = Instant::now();
        rig.disk.users().await.unwrap();
        times[5].push(lap.elapsed());
    }
    let asked = async {
        let mut times = Vec::new();
        for _ in 0..5 {
            rig.write(0, b'a').await.unwrap();
            let begun = Instant::now();
            rig.fence(LockHolder::Ask).await.unwrap();
            times.push(begun.elapsed());
            rig.disk.release_lease().await.unwrap();
        }
        times
    };
    let asked = asked.await;
    let what = ["fence", "journal", "release", "lease", "view of HEAD", "users"];
    for (what, mut times) in what.into_iter().zip(times).chain([("fence that asks", asked)]) {
        times.sort_unstable();
        let median = times[times.len() / 2];
        println!("{what}: {median:?}, {:?} to {:?}", times[0], times[times.len() - 1]);
        assert!(median < Duration::from_secs(2), "{what}: {median:?}");
    }
    rig.end().await;
}
