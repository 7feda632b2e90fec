//! The lease on a target: librbd's exclusive lock, and who holds it, for a person and for the next process.
//!
//! The lock itself decides; the record, in the image's metadata under [`LEASE_KEY`], only tells who it is. A record
//! counts if the address in it is that of the lock's owner, and is forgotten otherwise. As tried with librbd 16.2:
//!
//! - A live owner that took the lock as poolshift does refuses to give it: EROFS at once.
//! - Any other live owner (a server with the image attached) would give it away when asked, and be unable to write
//!   afterwards. It isn't asked: whoever has the image open and locked without a record is reported as the holder, after
//!   its watch had the time to run out, for it could also be a poolshift that was killed before it wrote the record.
//! - Who gives a lease back removes its record first, and who takes one leaves its record after: in between, neither is
//!   told from a stranger but by looking again.
//! - A server that begins in the instant between the look, by which nobody has the lock, and the request for it, is
//!   asked as librbd asks: it gives the lock, and its next write fails. No call of librbd's takes the lock only where it
//!   is free. It is a server on a target that is being copied to; what it had written before is found by the next look at
//!   HEAD.
//! - A silent owner is waited for until its watch has timed out (30 s).
//! - An owner that is known dead is not waited for.
//!
//! Whoever loses the lock without having given it back is on the cluster's blocklist first, by poolshift's own request,
//! and for [`BLOCKLISTED_FOR`]: a host that hung goes on at any time, and its writes have to be refused then. librbd
//! would do so only where `rbd_blocklist_on_break_lock` is set, on cluster, pool or image, and for
//! `rbd_blocklist_expire_seconds`. Where the monitors refuse the request, the lock is not taken.
//!
//! A fence is the same lock, taken for a cutover: see [`LockHolder`] for what it does about another live owner. As
//! tried with librbd 16.2, an owner that is asked writes what it has in its cache, gives the lock, and from then on
//! its writes, flushes and discards fail with EROFS at once, which a guest sees as errors of its disk; reads go on.
//! Once the lock is released, or its holder's handle closed, it takes the lock again by itself with its next write.
//!
//! Without the exclusive-lock feature an advisory lock takes its place. Nothing but poolshift looks at it, and it
//! doesn't time out; a holder that has no watch any more is taken for dead.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, Weak};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::{Inner, RbdImage};
use crate::ceph::{self, CephError, Features, Image, Locker, OpenMode};
use crate::image::{ErrorKind, ImageError, LeaseOwner, LockHolder, Result};

/// The metadata key of the lease's record.
pub(super) const LEASE_KEY: &str = "poolshift.lease";

/// How long taking the lock may take beyond the usual: a silent holder's watch times out after 30 s, here and once more
/// within librbd.
const WATCH_TIMEOUT: Duration = Duration::from_secs(90);

/// How long a client that lost its lock stays on the blocklist, in seconds: ten years.
const BLOCKLISTED_FOR: u32 = 10 * 365 * 86_400;

/// The lease, while this image holds it.
#[derive(Debug)]
pub(super) struct Held {
    /// The handle that holds the lock, and through which everything is written.
    pub(super) image: Arc<Image>,
    /// The size of HEAD, which nobody else changes.
    pub(super) size: AtomicU64,
    owner: LeaseOwner,
    lock: Lock,
    given_back: AtomicBool,
}

impl Drop for Held {
    /// Gives the lease back where that was not done: its user was cancelled, or has failed. A record that stays behind
    /// would tell the next one that the lock was broken, and an advisory lock would stay as well.
    fn drop(&mut self) {
        if !self.given_back.load(Ordering::Acquire) {
            let (image, lock) = (Arc::clone(&self.image), self.lock.clone());
            ceph::close_in_background(move || {
                if let Err(error) = give_back(&image, &lock) {
                    tracing::debug!(%error, "a lease was not given back cleanly");
                }
            });
        }
    }
}

/// Removes the record, and releases the lock. What fails because the lock is gone already is what was wanted.
fn give_back(image: &Image, lock: &Lock) -> ceph::Result<()> {
    if matches!(lock, Lock::Advisory { .. }) {
        // Nothing keeps a write back that is still under way, of a request that was dropped or came too late.
        image.wait_until_idle();
    }
    let forgotten = image.set_metadata(LEASE_KEY, None);
    let released = match lock {
        Lock::Exclusive => image.release_lock(),
        Lock::Advisory { cookie } => image.release_advisory_lock(cookie),
    };
    let gone = [Errno::NOENT, Errno::INVAL, Errno::ROFS, Errno::SHUTDOWN];
    match released.and(forgotten.map(drop)) {
        Err(error) if !gone.iter().any(|&errno| error.is(errno)) => Err(error),
        _ => Ok(()),
    }
}

#[derive(Clone, Debug)]
enum Lock {
    Exclusive,
    Advisory { cookie: String },
}

/// What the lock is taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    Lease,
    Fence(LockHolder),
}

impl Purpose {
    fn operation(self) -> &'static str {
        match self {
            Self::Lease => "take the lease",
            Self::Fence(_) => "fence it",
        }
    }

    /// For how long a live holder that left no record is waited for before it is reported; `None`: it is asked.
    fn patience(self) -> Option<Duration> {
        match self {
            Self::Lease => Some(Patience::FOR_A_RECORD),
            Self::Fence(LockHolder::Refuse) => Some(Patience::FOR_AN_EXIT),
            Self::Fence(LockHolder::Ask) => None,
        }
    }
}

/// How long a holder that left no record is given. What counts is what was waited between looks: where looking itself
/// is slow, as asking for a lock that changes hands may be for half a minute, there are as many looks as elsewhere.
#[derive(Debug)]
struct Patience {
    limit: Duration,
    waited: Duration,
    since: Option<Instant>,
    /// Gone when nobody wants the lock any more.
    wanted: Weak<()>,
}

impl Patience {
    /// To write the record, or to be found dead. It is a server that uses the image, a poolshift that has just begun,
    /// or one that was killed before it wrote the record: that one's watch times out after 30 s
    /// (`osd_client_watch_timeout`), and only then it is told from the first.
    const FOR_A_RECORD: Duration = Duration::from_secs(35);
    /// To close the image after its server has ended, while that server's users wait.
    const FOR_AN_EXIT: Duration = Duration::from_secs(2);
    /// To be through with taking the lock, or with giving it back.
    const FOR_A_CHANGE: Duration = Duration::from_secs(2);

    /// What all looks together may take: the caller gives up a little later, and would not know who has it.
    const FOR_SLOW_LOOKS: Duration = Duration::from_secs(60);

    fn new(limit: Duration, wanted: &Weak<()>) -> Self {
        Self { limit, waited: Duration::ZERO, since: None, wanted: wanted.clone() }
    }

    /// Waits a moment, and says whether to look again. Not to be called on a thread that must not block.
    fn wait(&mut self, holder: &str) -> bool {
        let since = *self.since.get_or_insert_with(Instant::now);
        let is_over = self.waited >= self.limit || since.elapsed() >= self.limit + Self::FOR_SLOW_LOOKS;
        if is_over || self.wanted.strong_count() == 0 {
            return false;
        }
        tracing::debug!(holder, "the lock is to be had from nobody who has left a record: waiting");
        // What takes longer than a change of hands may take long.
        let step = Duration::from_millis(if self.waited < Self::FOR_A_CHANGE { 50 } else { 250 });
        std::thread::sleep(step);
        self.waited += step;
        true
    }
}

/// Who holds a lock that can't be had and that nobody has.
const JUST_GIVEN_BACK: &str = "a client that has just given it back; try again";

/// How taking the lock went. Errors of the storage are apart.
enum Taken {
    Yes { address: String, size: u64 },
    HeldBy(String),
}

impl RbdImage {
    /// The lease, if this image holds it.
    pub(super) fn held(&self) -> Option<Arc<Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The lease, or the error of whoever writes without it.
    pub(super) fn held_for(&self, operation: &str) -> Result<Arc<Held>> {
        self.held().ok_or_else(|| {
            let refused = ImageError::new(ErrorKind::ReadOnly, self.inner.location.clone(), operation);
            refused.detail("the lease on the image was not taken")
        })
    }

    pub(super) async fn take_lease(&self, owner: &LeaseOwner) -> Result<()> {
        self.take_lock(owner, Purpose::Lease).await
    }

    /// See [`Disk::fence`](crate::image::Disk::fence).
    pub(super) async fn take_fence(&self, owner: &LeaseOwner, holder: LockHolder) -> Result<()> {
        let purpose = Purpose::Fence(holder);
        let error = |kind| ImageError::new(kind, self.inner.location.clone(), purpose.operation());
        if !self.inner.features.has(Features::EXCLUSIVE_LOCK) {
            return Err(error(ErrorKind::Unsupported)
                .detail("it has no exclusive lock, and nothing else keeps a server from writing it")
                .hint(format!("enable it: rbd feature enable {} exclusive-lock", self.inner.place)));
        }
        self.take_lock(owner, purpose).await?;
        // It may be a lease that was taken long ago.
        if self.has_lost_lease().await { Err(error(ErrorKind::Fenced)) } else { Ok(()) }
    }

    async fn take_lock(&self, owner: &LeaseOwner, purpose: Purpose) -> Result<()> {
        let _changing = self.lease_change.lock().await;
        if self.held().is_some() {
            return Ok(());
        }
        let operation = purpose.operation();
        if self.inner.features.has(Features::NON_PRIMARY) {
            let refused = ImageError::new(ErrorKind::ReadOnly, self.inner.location.clone(), operation);
            return Err(refused
                .detail("it is the non-primary side of mirroring")
                .hint("give a target that is not mirrored"));
        }
        let (inner, owner) = (Arc::clone(&self.inner), owner.clone());
        let limit = self.inner.timeout() + WATCH_TIMEOUT;
        // The thread goes on when nobody waits for it any more: then it must not ask a server for its lock.
        let wanted = Arc::new(());
        let still = Arc::downgrade(&wanted);
        let take = move || take(&inner, &owner, purpose, &still);
        match ceph::blocking("rbd_lock_acquire", limit, take).await {
            Ok((Taken::HeldBy(holder), _)) => {
                Err(ImageError::new(ErrorKind::Busy { holder }, self.inner.location.clone(), operation))
            }
            Ok((_, held)) => {
                *self.held.lock().unwrap_or_else(PoisonError::into_inner) = held.map(Arc::new);
                Ok(())
            }
            Err(error) if error.is_of(ceph::BLOCKLIST) => Err(self.inner.fail(operation, error).detail(
                "the client that has its lock is silent or dead, and may write again as long as it is not blocklisted",
            )),
            Err(error) => Err(self.inner.fail(operation, error)),
        }
    }

    /// Whether the exclusive lock that this image took is no longer its own.
    pub(super) async fn has_lost_lease(&self) -> bool {
        let Some(held) = self.held().filter(|held| matches!(held.lock, Lock::Exclusive)) else { return false };
        let image = Arc::clone(&held.image);
        let look = move || image.lock_owner();
        match self.inner.call("look who holds the lease", "rbd_lock_get_owners", look).await {
            Ok(owner) => owner != held.owner.client,
            Err(error) => error.kind == ErrorKind::Fenced,
        }
    }

    pub(super) async fn find_lease_owner(&self) -> Result<Option<LeaseOwner>> {
        if let Some(held) = self.held() {
            return Ok(Some(held.owner.clone()));
        }
        let exclusive = self.inner.features.has(Features::EXCLUSIVE_LOCK);
        let look = move |image: &Image| {
            let client = holder(image, exclusive)?;
            Ok((client, image.metadata(LEASE_KEY)?))
        };
        let (client, record) = self.inner.look("look who holds the lease", look).await?;
        Ok(client.map(|client| parse_record(record.as_deref(), &client).unwrap_or_else(|| stranger(client))))
    }

    pub(super) async fn give_lease_back(&self) -> Result<()> {
        let _changing = self.lease_change.lock().await;
        // Out of the slot first: no write begins from here on.
        let Some(held) = self.held.lock().unwrap_or_else(PoisonError::into_inner).take() else { return Ok(()) };
        let release = move || {
            // Not before: where this is never run, the lease is given back when it is dropped.
            held.given_back.store(true, Ordering::Release);
            give_back(&held.image, &held.lock)
        };
        self.inner.call("give the lease back", "rbd_lock_release", release).await
    }
}

/// Who holds the lock, as the record calls it. A read-only handle can't be asked for the owner of the exclusive lock
/// (EINVAL), but for the lockers of the object that stands for either kind.
fn holder(image: &Image, exclusive: bool) -> ceph::Result<Option<String>> {
    let locker = image.lockers()?.into_iter().next();
    Ok(locker.map(|locker| if exclusive { locker.address } else { advisory_name(&locker) }))
}

/// The holder of an advisory lock on an image with the exclusive-lock feature: librbd gives nobody the exclusive lock
/// meanwhile.
pub(super) fn by_advisory_lock(Locker { client, cookie, address }: &Locker) -> String {
    format!("{client} at {address} with `rbd lock add` (lock id {cookie:?})")
}

/// How a record calls the holder of an advisory lock: unique for each time that it is taken.
fn advisory_name(locker: &Locker) -> String {
    format!("{} {}", locker.client, locker.cookie)
}

fn parse_record(record: Option<&str>, client: &str) -> Option<LeaseOwner> {
    let owner: LeaseOwner = serde_json::from_str(record?).ok()?;
    (owner.client.as_deref() == Some(client)).then_some(owner)
}

/// What the holder of the lock has left of itself, if it has.
fn record_of(image: &Image, client: &str) -> ceph::Result<Option<LeaseOwner>> {
    Ok(parse_record(image.metadata(LEASE_KEY)?.as_deref(), client))
}

/// A holder that left no record: something other than poolshift, or a poolshift that has just begun.
fn stranger(client: String) -> LeaseOwner {
    let unknown = || "unknown".to_owned();
    LeaseOwner {
        host: unknown(),
        boot_id: unknown(),
        pid: 0,
        start_ticks: 0,
        namespaces: None,
        since: unknown(),
        client: Some(client),
    }
}

fn take(inner: &Inner, owner: &LeaseOwner, purpose: Purpose, wanted: &Weak<()>) -> ceph::Result<(Taken, Option<Held>)> {
    let image = Image::open_by_id(&inner.pool, &inner.id, OpenMode::ReadWrite)?;
    let (taken, lock) = if inner.features.has(Features::EXCLUSIVE_LOCK) {
        (take_exclusive(inner, &image, purpose, wanted)?, Lock::Exclusive)
    } else {
        let cookie = new_cookie(owner);
        (take_advisory(inner, &image, &cookie, wanted)?, Lock::Advisory { cookie })
    };
    let Taken::Yes { address, size } = &taken else { return Ok((taken, None)) };
    let owner = LeaseOwner { client: Some(address.clone()), ..owner.clone() };
    let record = serde_json::to_string(&owner).unwrap_or_default();
    // Without the record the lock still holds, and still keeps others out; only nobody could tell who it is.
    image.set_metadata(LEASE_KEY, Some(&record))?;
    let size = AtomicU64::new(*size);
    let given_back = AtomicBool::new(false);
    Ok((taken, Some(Held { image: Arc::new(image), size, owner, lock, given_back })))
}

fn describe(record: Option<LeaseOwner>, address: &str) -> String {
    record.unwrap_or_else(|| stranger(address.to_owned())).to_string()
}

fn is_watched(image: &Image, address: &str) -> ceph::Result<bool> {
    Ok(image.watchers()?.iter().any(|watcher| watcher.address == address))
}

/// Whether an error of asking for the lock says that somebody has it, and keeps it.
fn is_held(error: &CephError) -> bool {
    [Errno::ROFS, Errno::BUSY, Errno::AGAIN].iter().any(|&errno| error.is(errno))
}

/// Takes the lock from a client that is dead or silent, which is blocklisted before.
fn break_lock(inner: &Inner, image: &Image, locker: &Locker) -> ceph::Result<()> {
    inner.pool.cluster().blocklist(&locker.address, BLOCKLISTED_FOR)?;
    match image.break_lock(locker) {
        // Somebody else was faster.
        Err(error) if error.is(Errno::NOENT) => Ok(()),
        result => result,
    }
}

/// The lock that the client at an address has.
fn locker_at(image: &Image, address: &str) -> ceph::Result<Option<Locker>> {
    Ok(image.lockers()?.into_iter().find(|locker| locker.address == address))
}

/// The lock of a client whose watch has timed out: it is dead. Whoever gives the lock back does so before it closes the
/// image; taken once more since, it is another lock, with another cookie.
fn silent_locker(image: &Image, address: &str) -> ceph::Result<Option<Locker>> {
    let before = locker_at(image, address)?;
    if before.is_none() || is_watched(image, address)? || locker_at(image, address)? != before {
        return Ok(None);
    }
    Ok(before)
}

/// Whether a client that had the lock before it was acquired did not give it: it fell silent just then, and librbd may
/// have broken its lock without blocklisting it. A poolshift (`had_record`) that gives its lease back removes its record
/// before; a server that is asked for its lock keeps the image open.
fn was_broken(image: &Image, address: &str, had_record: bool) -> ceph::Result<bool> {
    Ok(if had_record { record_of(image, address)?.is_some() } else { !is_watched(image, address)? })
}

fn take_exclusive(inner: &Inner, image: &Image, purpose: Purpose, wanted: &Weak<()>) -> ceph::Result<Taken> {
    let mut patience = purpose.patience().map(|limit| Patience::new(limit, wanted));
    let mut change = Patience::new(Patience::FOR_A_CHANGE, wanted);
    let mut refused = false;
    loop {
        let mut before = None;
        let owner = match image.lock_owner() {
            Err(error) if error.is(Errno::BUSY) => match image.lockers()?.first() {
                Some(locker) => return Ok(Taken::HeldBy(by_advisory_lock(locker))),
                // Released meanwhile.
                None if change.wait("an advisory lock's holder") => continue,
                None => return Ok(Taken::HeldBy(JUST_GIVEN_BACK.into())),
            },
            owner => owner?,
        };
        if let Some(address) = owner {
            let record = record_of(image, &address)?;
            let dead = match &record {
                Some(record) if record.is_known_dead() => locker_at(image, &address)?,
                _ => silent_locker(image, &address)?,
            };
            if let Some(locker) = dead {
                tracing::warn!(holder = describe(record, &address), "the lock's holder is dead: breaking its lock");
                break_lock(inner, image, &locker)?;
            } else {
                // It would give the lock away, and stop writing.
                if let (None, Some(patience)) = (&record, &mut patience) {
                    if patience.wait(&address) || refused && change.wait(&address) {
                        continue;
                    }
                    return Ok(Taken::HeldBy(describe(None, &address)));
                }
                before = Some((address, record.is_some()));
            }
        }
        match image.acquire_lock() {
            Ok(()) => {
                let own = image.lock_owner()?.ok_or_else(|| super::view::no_entry("rbd_lock_get_owners"))?;
                // Another handle of this process has the same address: one that was closed without giving its lease back.
                if let Some((address, had_record)) = before.filter(|(address, _)| *address != own)
                    && was_broken(image, &address, had_record)?
                {
                    // The image is closed without a write where this fails, and the lock with it.
                    inner.pool.cluster().blocklist(&address, BLOCKLISTED_FOR)?;
                }
                return Ok(Taken::Yes { address: own, size: image.size()? });
            }
            Err(error) if is_held(&error) => {}
            Err(error) => match &before {
                // librbd could not take the lock from a client that fell silent.
                Some((address, _)) if silent_locker(image, address)?.is_some() => continue,
                _ => return Err(error),
            },
        }
        // Most who refuse to give it have a record; who gives it back has one no more, and who has just taken it not yet.
        refused = true;
        let address = image.lock_owner()?;
        let record = address.as_deref().map(|address| record_of(image, address)).transpose()?.flatten();
        if record.is_none() && change.wait(address.as_deref().unwrap_or("nobody")) {
            continue;
        }
        return Ok(Taken::HeldBy(match address {
            Some(address) => describe(record, &address),
            None => JUST_GIVEN_BACK.into(),
        }));
    }
}

/// A cookie that no other lease has, of this process or any other.
fn new_cookie(owner: &LeaseOwner) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("poolshift-{}-{}-{}-{number}", owner.boot_id, owner.pid, owner.start_ticks)
}

fn take_advisory(inner: &Inner, image: &Image, cookie: &str, wanted: &Weak<()>) -> ceph::Result<Taken> {
    let mut patience = Patience::new(Patience::FOR_A_RECORD, wanted);
    let mut broken = false;
    loop {
        match image.acquire_advisory_lock(cookie) {
            Ok(()) => {
                let own = format!("client.{} {cookie}", inner.pool.cluster().instance_id());
                return Ok(Taken::Yes { address: own, size: image.size()? });
            }
            Err(error) if error.is(Errno::BUSY) || error.is(Errno::EXIST) => {}
            Err(error) => return Err(error),
        }
        let Some(locker) = image.lockers()?.into_iter().next() else {
            if patience.wait("nobody") {
                continue;
            }
            return Ok(Taken::HeldBy(JUST_GIVEN_BACK.into()));
        };
        let record = record_of(image, &advisory_name(&locker))?;
        let watched = is_watched(image, &locker.address)?;
        if record.is_none() && watched && patience.wait(&locker.address) {
            continue;
        }
        let dead = record.as_ref().is_some_and(LeaseOwner::is_known_dead) || !watched;
        let holder = describe(record, &locker.address);
        if !dead || broken {
            return Ok(Taken::HeldBy(holder));
        }
        // One that has given it back and closed the image has no watch either; and it may have taken it once more since.
        let is_still_there = image.lockers()?.into_iter().next().as_ref() == Some(&locker);
        if is_still_there {
            tracing::warn!(%holder, "the lease's holder is dead: breaking its lock");
            break_lock(inner, image, &locker)?;
            broken = true;
            continue;
        }
        // It has gone meanwhile.
        if !patience.wait(&locker.address) {
            return Ok(Taken::HeldBy(holder));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_counts_only_for_the_client_that_holds_the_lock() {
        let owner = LeaseOwner { client: Some("127.0.0.1:0/7".into()), ..stranger(String::new()) };
        let record = serde_json::to_string(&owner).unwrap();
        assert_eq!(parse_record(Some(&record), "127.0.0.1:0/7"), Some(owner));
        assert_eq!(parse_record(Some(&record), "127.0.0.1:0/8"), None);
        for bad in ["", "{}", "null", &record[..record.len() - 1]] {
            assert_eq!(parse_record(Some(bad), "127.0.0.1:0/7"), None);
        }
        assert_eq!(parse_record(None, "127.0.0.1:0/7"), None);
    }

    #[test]
    fn a_stranger_is_never_known_dead() {
        assert!(!stranger("127.0.0.1:0/7".into()).is_known_dead());
    }

    #[test]
    fn cookies_differ_within_a_process() {
        let owner = LeaseOwner::current().unwrap();
        assert_ne!(new_cookie(&owner), new_cookie(&owner));
    }
}
