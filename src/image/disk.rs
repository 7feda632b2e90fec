//! What a cutover needs of an image beyond replication: who has it open, its name, the fence, a journal, and what else
//! belongs to the disk.

use async_trait::async_trait;

use super::metadata::{Change, Metadata};
use super::{LeaseOwner, Result, TargetImage};

/// The longest journal, in bytes.
pub const JOURNAL_MAX: usize = 64 << 10;

/// A client that has an image open for writing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskUser {
    /// Where it is: an RBD client's address, `IP:PORT/NONCE`.
    pub address: String,
    /// Whether it is this process.
    pub is_own: bool,
}

/// What is done about a live client that has the lock, when an image is fenced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockHolder {
    /// It is named, and nothing changes ([`super::ErrorKind::Busy`]): nobody should have the image open. A server that
    /// has just ended is given some 2 s to go.
    Refuse,
    /// It is asked to give the lock, and refused it from then on, until the fence is taken down: a server that was
    /// suspended has the image open, and does not write. What it has in its cache is written first. From then on its
    /// writes fail at once, they don't wait: it must not be resumed before [`TargetImage::release_lease`]. One that
    /// does not answer (RBD: for 30 s) is shut out for good.
    Ask,
}

/// A disk that a server runs from, on either side of a cutover.
#[async_trait]
pub trait Disk: TargetImage {
    /// Whether it has a lock that nobody can write without: only then it can be fenced.
    fn has_lock(&self) -> bool;

    /// Who has it open for writing, this process included.
    async fn users(&self) -> Result<Vec<DiskUser>>;

    /// Takes the lock that nobody can write without, and keeps it until [`TargetImage::release_lease`]: it is the
    /// lease, taken on either side. A holder that is known to be dead loses it at once. Idempotent.
    ///
    /// [`super::ErrorKind::Unsupported`] where the image has no such lock (RBD: the feature exclusive-lock),
    /// [`super::ErrorKind::Busy`] where another process has it, [`super::ErrorKind::Fenced`] where this one had it and
    /// has lost it.
    async fn fence(&self, owner: &LeaseOwner, holder: LockHolder) -> Result<()>;

    /// Its name now, without pool and namespace: the image may have been renamed since it was opened.
    async fn name(&self) -> Result<String>;

    /// Gives it another name in the same pool and namespace; done already is no error, and one that was cut is
    /// finished.
    /// [`super::ErrorKind::AlreadyExists`] if another image has that name. Durable. RBD: a crash in the middle leaves
    /// the old or the new name, but the image may open by both until this is called again, on an image that was opened
    /// by the old one where the new one counts already.
    async fn rename(&self, name: &str) -> Result<()>;

    /// The journal that was stored last with this image.
    async fn load_journal(&self) -> Result<Option<String>>;

    /// Stores the journal, or with `None` takes it away: durable and atomic, at most [`JOURNAL_MAX`] bytes. Needs no
    /// lease: a server may run from the image by then.
    async fn store_journal(&self, journal: Option<&str>) -> Result<()>;

    /// Takes away the state of a cycle ([`TargetImage::store_state`]). Needs no lease: a server may run from the image.
    async fn forget_state(&self) -> Result<()>;

    /// Its metadata that is not poolshift's, to the byte.
    async fn metadata(&self) -> Result<Metadata>;

    /// Changes the metadata, key by key: first what is set, then what is removed. Each is durable and atomic, all of them
    /// together are not; may be repeated. Needs no lease. Clients that have the image open may go on with the old values.
    async fn change_metadata(&self, change: &Change) -> Result<()>;

    /// The record of the keys that both sides had when the metadata was carried last: kept with the target.
    async fn load_known_keys(&self) -> Result<Option<String>>;

    /// Stores that record, or with `None` takes it away: durable and atomic, at most
    /// [`KNOWN_MAX`](super::metadata::KNOWN_MAX) bytes. Needs no lease.
    async fn store_known_keys(&self, known: Option<&str>) -> Result<()>;
}
