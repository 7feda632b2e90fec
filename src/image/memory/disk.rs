//! An image in memory as a server's disk, with the servers that have it open.
//!
//! A server behaves as a client of RBD does: it takes the exclusive lock with its first write, gives it when it is
//! asked, and its writes are refused for as long as somebody holds the lease.

use async_trait::async_trait;
use bytes::Bytes;

use super::{Inner, MemoryImage, Op};
use crate::image::metadata::{Change, Metadata};
use crate::image::{Disk, DiskUser, ErrorKind, JOURNAL_MAX, LeaseOwner, LockHolder, Result};

/// The handle of a lease whose holder is dead.
const ABANDONED: u64 = 0;

/// A server that has the image open.
#[derive(Debug)]
pub(super) struct Server {
    address: String,
    has_lock: bool,
}

impl Inner {
    fn server(&mut self, address: &str) -> Option<&mut Server> {
        self.servers.iter_mut().find(|server| server.address == address)
    }
}

impl MemoryImage {
    /// Lets a server open the image for writing; open already is fine.
    pub fn open_as_server(&self, address: &str) {
        let mut inner = self.lock();
        if inner.server(address).is_none() {
            inner.servers.push(Server { address: address.to_owned(), has_lock: false });
        }
    }

    /// Lets a server close the image, or die.
    pub fn close_as_server(&self, address: &str) {
        self.lock().servers.retain(|server| server.address != address);
    }

    /// Writes as a server that has the image open: durable at once, and refused ([`ErrorKind::ReadOnly`]) while
    /// somebody holds the lease. [`Self::write_as_server`] writes past every lock.
    pub fn write_at_server(&self, address: &str, offset: u64, data: &[u8]) -> Result<()> {
        let operation = format!("write {} bytes at {offset} as the server at {address}", data.len());
        let mut inner = self.alive(&operation)?;
        let refused = |detail: &str| self.error(ErrorKind::ReadOnly, &operation).detail(detail);
        match inner.lease {
            Some((ABANDONED, _)) => inner.lease = None,
            Some(_) => return Err(refused("the lock's holder does not give it")),
            None => {}
        }
        self.in_bounds(&operation, offset + data.len() as u64, inner.head.size())?;
        if inner.server(address).is_none() {
            return Err(refused("the server does not have it open"));
        }
        for server in &mut inner.servers {
            server.has_lock = server.address == address;
        }
        inner.apply(Op::Write(offset, Bytes::copy_from_slice(data)));
        inner.settle();
        Ok(())
    }

    /// Sets, or with `None` removes, a key of the metadata, as an operator does: durable at once.
    pub fn set_metadata_as_operator(&self, key: &str, value: Option<&[u8]>) -> Result<()> {
        let mut inner = self.alive("change its metadata")?;
        match value {
            Some(value) => drop(inner.metadata.insert(key.to_owned(), Bytes::copy_from_slice(value))),
            None => drop(inner.metadata.remove(key)),
        }
        Ok(())
    }

    /// Lets whoever holds the lease be dead: it stays the owner until somebody else takes the lease.
    pub fn abandon_lease(&self) {
        if let Some((handle, _)) = &mut self.lock().lease {
            *handle = ABANDONED;
        }
    }

    /// The lease of a holder that is dead ends, as one does in RBD when its watch has timed out.
    pub(super) fn forget_abandoned_lease(&self) {
        let mut inner = self.lock();
        if matches!(inner.lease, Some((ABANDONED, _))) {
            inner.lease = None;
        }
    }

    /// Lets another image have that name.
    pub fn take_name(&self, name: &str) {
        self.lock().taken.push(name.to_owned());
    }

    pub(super) fn take_lock(&self, owner: &LeaseOwner, holder: LockHolder, operation: &str) -> Result<()> {
        let mut inner = self.alive(operation)?;
        let busy = |holder: String| Err(self.error(ErrorKind::Busy { holder }, operation));
        match &inner.lease {
            Some((handle, _)) if *handle == self.handle => return Ok(()),
            Some((ABANDONED, _)) | None => {}
            Some((_, holder)) => return busy(holder.to_string()),
        }
        let owning = inner.servers.iter_mut().find(|server| server.has_lock);
        match owning {
            Some(server) if holder == LockHolder::Refuse => {
                return busy(format!("a client at {} that is not poolshift, or has just begun", server.address));
            }
            Some(server) => server.has_lock = false,
            None => {}
        }
        let client = Some(format!("memory:{}", self.handle));
        inner.lease = Some((self.handle, LeaseOwner { client, ..owner.clone() }));
        Ok(())
    }
}

#[async_trait]
impl Disk for MemoryImage {
    fn has_lock(&self) -> bool {
        true
    }

    async fn users(&self) -> Result<Vec<DiskUser>> {
        let inner = self.alive("list the watchers")?;
        let servers = inner.servers.iter().map(|server| DiskUser { address: server.address.clone(), is_own: false });
        let holder = inner.lease.as_ref().map(|(handle, owner)| DiskUser {
            address: owner.client.clone().unwrap_or_default(),
            is_own: *handle == self.handle,
        });
        Ok(servers.chain(holder).collect())
    }

    async fn fence(&self, owner: &LeaseOwner, holder: LockHolder) -> Result<()> {
        self.take_lock(owner, holder, "fence it")
    }

    async fn name(&self) -> Result<String> {
        Ok(self.alive("read its name")?.name.clone())
    }

    async fn rename(&self, name: &str) -> Result<()> {
        let operation = format!("rename it to {name:?}");
        if self.alive(&operation)?.name == name {
            return Ok(());
        }
        let is_taken = self.is_taken(name);
        self.step(&operation, |inner| {
            if is_taken || inner.taken.iter().any(|taken| taken == name) {
                return Err(self.error(ErrorKind::AlreadyExists, &operation));
            }
            name.clone_into(&mut inner.name);
            Ok(())
        })
    }

    async fn load_journal(&self) -> Result<Option<String>> {
        Ok(self.alive("read the journal")?.journal.clone())
    }

    async fn store_journal(&self, journal: Option<&str>) -> Result<()> {
        let operation = "store the journal";
        if let Some(journal) = journal.filter(|journal| journal.len() > JOURNAL_MAX) {
            let large = self.error(ErrorKind::OutOfBounds, operation);
            return Err(large.detail(format!("it has {} bytes; the most is {JOURNAL_MAX}", journal.len())));
        }
        let silent = self.lock().silent;
        if let Some(limit) = silent {
            tokio::time::sleep(limit).await;
            return Err(self.error(ErrorKind::TimedOut, operation));
        }
        self.step(operation, |inner| {
            inner.journal = journal.map(str::to_owned);
            Ok(())
        })
    }

    async fn forget_state(&self) -> Result<()> {
        self.step("forget the state", |inner| {
            inner.state = None;
            Ok(())
        })
    }

    async fn metadata(&self) -> Result<Metadata> {
        let inner = self.alive("read its metadata")?;
        Ok(Metadata::of(inner.metadata.iter().map(|(key, value)| (key.clone().into_bytes(), value.to_vec()))))
    }

    async fn change_metadata(&self, change: &Change) -> Result<()> {
        for (key, value) in &change.set {
            self.step("set a key of its metadata", |inner| {
                inner.metadata.insert(key.clone(), value.clone());
                Ok(())
            })?;
        }
        for key in &change.remove {
            self.step("remove a key of its metadata", |inner| {
                inner.metadata.remove(key);
                Ok(())
            })?;
        }
        Ok(())
    }

    async fn load_known_keys(&self) -> Result<Option<String>> {
        Ok(self.alive("read which metadata was carried")?.known.clone())
    }

    async fn store_known_keys(&self, known: Option<&str>) -> Result<()> {
        self.step("note which metadata was carried", |inner| {
            inner.known = known.map(str::to_owned);
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::memory::Fault;
    use crate::image::{Layout, TargetImage};

    const A: &str = "10.0.0.1:0/1";
    const B: &str = "10.0.0.2:0/2";

    fn disk() -> (MemoryImage, LeaseOwner) {
        (MemoryImage::new("vm", 1 << 20, Layout::DEFAULT), LeaseOwner::current().unwrap())
    }

    fn kind<T: std::fmt::Debug>(result: Result<T>) -> ErrorKind {
        result.unwrap_err().kind
    }

    #[tokio::test]
    async fn a_server_with_the_lock_is_refused_or_asked() {
        let (disk, owner) = disk();
        assert_eq!(kind(disk.write_at_server(A, 0, b"a")), ErrorKind::ReadOnly);
        disk.open_as_server(A);
        disk.open_as_server(A);
        disk.write_at_server(A, 0, b"a").unwrap();
        for refused in [disk.fence(&owner, LockHolder::Refuse).await, disk.acquire_lease(&owner).await] {
            assert!(matches!(kind(refused), ErrorKind::Busy { holder } if holder.contains(A)));
        }
        disk.fence(&owner, LockHolder::Ask).await.unwrap();
        disk.fence(&owner, LockHolder::Refuse).await.unwrap();
        assert_eq!(kind(disk.write_at_server(A, 0, b"b")), ErrorKind::ReadOnly);
        assert!(matches!(kind(disk.reopen().fence(&owner, LockHolder::Ask).await), ErrorKind::Busy { .. }));
        disk.write(1, Bytes::from_static(b"ours")).await.unwrap();
        disk.release_lease().await.unwrap();
        disk.write_at_server(A, 5, b"c").unwrap();
        assert_eq!(&disk.lock().head.bytes()[..6], b"aoursc");
    }

    #[tokio::test]
    async fn a_server_that_has_not_written_keeps_nobody_from_the_lock() {
        let (disk, owner) = disk();
        disk.open_as_server(A);
        disk.open_as_server(B);
        disk.fence(&owner, LockHolder::Refuse).await.unwrap();
        let users = disk.users().await.unwrap();
        assert_eq!(users.iter().map(|user| user.is_own).collect::<Vec<_>>(), [false, false, true]);
        assert!(disk.reopen().users().await.unwrap().iter().all(|user| !user.is_own));
        disk.release_lease().await.unwrap();
        disk.write_at_server(A, 0, b"a").unwrap();
        disk.write_at_server(B, 0, b"b").unwrap();
        disk.close_as_server(B);
        disk.fence(&owner, LockHolder::Refuse).await.unwrap();
        disk.close_as_server(A);
        assert_eq!(disk.users().await.unwrap().len(), 1);
    }

    #[tokio::test]
    async fn names_are_given_once() {
        let (disk, _) = disk();
        disk.take_name("other");
        assert_eq!(kind(disk.rename("other").await), ErrorKind::AlreadyExists);
        disk.set_fault(None);
        disk.rename("vm").await.unwrap();
        assert_eq!(disk.steps(), 0);
        disk.rename("vm.kept").await.unwrap();
        assert_eq!((disk.name().await.unwrap().as_str(), disk.steps()), ("vm.kept", 1));
    }

    #[tokio::test]
    async fn the_journal_has_its_bound_and_needs_no_lease() {
        let (disk, owner) = disk();
        disk.take_lock(&owner, LockHolder::Refuse, "take it").unwrap();
        let other = disk.reopen();
        let most = "x".repeat(JOURNAL_MAX);
        other.store_journal(Some(&most)).await.unwrap();
        assert_eq!(kind(disk.store_journal(Some(&format!("{most}x"))).await), ErrorKind::OutOfBounds);
        assert_eq!(other.load_journal().await.unwrap(), Some(most));
        disk.store_journal(None).await.unwrap();
        assert_eq!(other.load_journal().await.unwrap(), None);
        disk.store_state("{}").await.unwrap();
        other.forget_state().await.unwrap();
        assert_eq!(disk.load_state().await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_crash_leaves_the_old_or_the_new() {
        for (at, after) in [1, 2, 3].into_iter().flat_map(|at| [(at, false), (at, true)]) {
            let (disk, owner) = disk();
            disk.fence(&owner, LockHolder::Refuse).await.unwrap();
            disk.store_state("state").await.unwrap();
            disk.set_fault(Some(Fault { at, after, seed: 1 }));
            let all = async {
                disk.store_journal(Some("journal")).await?;
                disk.rename("new").await?;
                disk.forget_state().await
            };
            assert_eq!(kind(all.await), ErrorKind::Io);
            let disk = disk.reopen();
            let done = if after { at } else { at - 1 };
            assert_eq!(disk.load_journal().await.unwrap().is_some(), done >= 1);
            assert_eq!(disk.name().await.unwrap() == "new", done >= 2);
            assert_eq!(disk.load_state().await.unwrap().is_none(), done >= 3);
        }
    }
}
