//! RBD images, through librbd.
//!
//! # Handles
//!
//! Points in time are read through read-only handles, which register no watch and never touch the exclusive lock. A
//! read-write handle is opened only to create or remove a snapshot, and closed right after: if somebody else has the
//! lock, librbd has the owner create the snapshot, so that a server that writes keeps its lock. A target has one
//! read-write handle, from [`TargetImage::acquire_lease`](super::TargetImage::acquire_lease) to the release. Every
//! handle but the first is opened by the image's id: if the name is given to another image meanwhile, poolshift goes
//! on with the one that it was told of, or fails.
//!
//! # Time, and full pools
//!
//! A request that gets no answer within [`RbdOptions::io_timeout`] fails with
//! [`ErrorKind::TimedOut`](super::ErrorKind), which is retryable, while librbd goes on with it; it may still land
//! later, as the contract allows. The time counts from when the request is issued, and fewer are issued at a time where
//! answers take long, as under a QoS limit (`ceph/pace.rs`). Monitors get 30 s. By default a write to a full pool, or
//! beyond a pool's quota, waits in librados until there is room; poolshift's handles carry the "full try" flag
//! (`rados_set_pool_full_try`), with which the OSD refuses it (ENOSPC, EDQUOT) once it knows that the pool is full. Where neither comes, as with
//! an OSD that is full but for the last percent, the time limit does.
//!
//! # The end of the process
//!
//! Dropped handles close in the background. Await [`wait_until_closed`] before the process ends: a handle that isn't
//! closed leaves a watch behind, and for 30 s nobody can remove the image.

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use rustix::io::Errno;

use super::{ErrorKind, ImageError, ImageIdentity, Layout, Result};
use crate::ceph::{self, CephError, Cluster, ConnectOptions, CreateSpec, Features, Image, OpenMode, Pool};

mod changes;
mod disk;
mod errors;
mod in_use;
mod lease;
mod noted;
mod object_map;
mod pool_list;
mod qos;
mod records;
mod rehearsal;
mod relations;
mod source;
mod target;
mod tree;
mod view;

use errors::Failure;
use lease::Held;

pub use pool_list::{PoolImage, PoolSpace};
pub use qos::Transfer;
pub use relations::{
    FlattenBound, FlattenCost, FlattenProgress, Flattened, RbdLink, RbdParentLink, RbdRelations, RbdSnapshot,
};
pub use tree::{ImageTree, SnapshotTree, TREE_DEPTH_MAX};

/// How to reach a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RbdOptions {
    /// The cluster's configuration file; `None`: what `CEPH_CONF` names, or Ceph's default places.
    pub conf: Option<PathBuf>,
    /// The user, with or without `client.`; `None`: `client.admin`.
    pub user: Option<String>,
    /// How long a request may take before it counts as timed out.
    pub io_timeout: Duration,
}

impl Default for RbdOptions {
    fn default() -> Self {
        Self { conf: None, user: None, io_timeout: Duration::from_secs(60) }
    }
}

type Slot = Arc<tokio::sync::Mutex<Weak<Cluster>>>;
type Slots = Mutex<HashMap<ConnectOptions, Slot>>;

/// A connection to a cluster. All connectors of a process with the same configuration file and user share one.
#[derive(Clone, Debug)]
pub struct Connector {
    cluster: Arc<Cluster>,
    user: String,
    io_timeout: Duration,
}

impl Connector {
    /// Connects, or shares the connection that is there.
    ///
    /// [`ErrorKind::BackendMissing`] without librbd, [`ErrorKind::NotFound`] without a configuration file,
    /// [`ErrorKind::PermissionDenied`] without the user's key, [`ErrorKind::TimedOut`] when no monitor answers.
    pub async fn connect(options: &RbdOptions) -> Result<Self> {
        static SLOTS: OnceLock<Slots> = OnceLock::new();
        let user = options.user.as_deref().map_or("admin", |user| user.strip_prefix("client.").unwrap_or(user));
        let to = ConnectOptions { conf: options.conf.clone(), user: Some(user.to_owned()), overrides: Vec::new() };
        let slot = {
            let mut slots = SLOTS.get_or_init(Slots::default).lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(slots.entry(to.clone()).or_default())
        };
        // Held while connecting, so that two who come at once make one connection.
        let mut slot = slot.lock().await;
        let shared = slot.upgrade().filter(|cluster| !cluster.is_fenced());
        let cluster = match shared {
            Some(cluster) => cluster,
            None => {
                let made = Cluster::connect(to).await.map_err(|error| errors::connecting(options, user, error))?;
                *slot = Arc::downgrade(&made);
                made
            }
        };
        Ok(Self { cluster, user: user.to_owned(), io_timeout: options.io_timeout })
    }

    /// The cluster's fsid.
    pub fn fsid(&self) -> &str {
        self.cluster.fsid()
    }

    async fn pool(&self, place: &Place) -> Result<Arc<Pool>> {
        let (cluster, wanted) = (Arc::clone(&self.cluster), place.clone());
        let limit = self.io_timeout.max(Duration::from_secs(30));
        let opened = ceph::blocking("rados_ioctx_create", limit, move || {
            let pool = cluster.pool(&wanted.pool, wanted.namespace.as_deref())?;
            let there = wanted.namespace.as_deref().is_none_or(|name| pool.namespace_exists(name).unwrap_or(true));
            Ok((pool, there))
        })
        .await;
        match opened {
            Ok((pool, true)) => Ok(pool),
            Ok((_, false)) => Err(ImageError::new(ErrorKind::NotFound, place.location(), "open the namespace")
                .detail(format!("pool {:?} has no such namespace", place.pool))
                .hint(format!("create it: rbd namespace create {}", place.parent()))),
            Err(error) if error.is(Errno::NOENT) => {
                Err(ImageError::new(ErrorKind::NotFound, place.location(), "open the pool")
                    .detail(format!("the cluster has no pool {:?}", place.pool))
                    .hint("list the pools: ceph osd lspools"))
            }
            Err(error) => Err(self.failure(place).of("open the pool", error)),
        }
    }

    fn failure(&self, place: &Place) -> Failure {
        Failure { location: place.location(), user: self.user.clone(), pool: place.pool.clone() }
    }
}

/// Waits until every RBD handle that was dropped is closed, for at most `limit`; says whether all are.
pub async fn wait_until_closed(limit: Duration) -> bool {
    // One's own thread rather than tokio's pool, for the reason given in `ceph`.
    let patience = limit + Duration::from_secs(1);
    ceph::blocking("rbd_close", patience, move || Ok(ceph::wait_until_closed(limit))).await.unwrap_or(false)
}

/// For a process that works on many images for a long time: keeps the C library from growing with its threads. To be
/// called once, early.
pub fn prepare_for_many() {
    ceph::limit_arenas();
}

/// Gives memory back to the system that a burst of work has left behind.
pub async fn release_memory() {
    let trim = || {
        ceph::trim();
        Ok(())
    };
    // It can't fail; where it takes long nobody waits for it.
    let _ = ceph::blocking("malloc_trim", Duration::from_secs(10), trim).await;
}

/// Where an image is, by names; with an empty one, where images are.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    pool: String,
    namespace: Option<String>,
    image: String,
}

impl Place {
    fn new(pool: &str, namespace: Option<&str>, image: &str) -> Self {
        // Ceph names the default namespace with an empty string.
        let namespace = namespace.filter(|name| !name.is_empty()).map(str::to_owned);
        Self { pool: pool.to_owned(), namespace, image: image.to_owned() }
    }

    fn parent(&self) -> String {
        self.namespace.as_ref().map_or_else(|| self.pool.clone(), |namespace| format!("{}/{namespace}", self.pool))
    }

    fn location(&self) -> String {
        format!("rbd:{self}")
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.image.as_str() {
            "" => f.write_str(&self.parent()),
            image => write!(f, "{}/{image}", self.parent()),
        }
    }
}

/// What a new image is to be like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// The size, in bytes.
    pub size: u64,
    /// The size of an object, in bytes: a power of two from 4 KiB to 32 MiB.
    pub object_size: u64,
    /// `RBD_FEATURE_*` bits of librbd's `features.h`; those for striping and data pools are set as needed.
    pub features: u64,
    /// How much goes to one object before the next is taken, in bytes; equal to `object_size` for none.
    pub stripe_unit: u64,
    /// Over how many objects; 1 for none.
    pub stripe_count: u64,
    /// Another pool for the data (an erasure-coded one), by name.
    pub data_pool: Option<String>,
}

impl CreateOptions {
    /// The features that poolshift wants: layering, exclusive-lock, object-map, fast-diff, deep-flatten.
    pub const FEATURES: u64 = Features::LAYERING
        | Features::EXCLUSIVE_LOCK
        | Features::OBJECT_MAP
        | Features::FAST_DIFF
        | Features::DEEP_FLATTEN;

    /// A plain image of `size` bytes with 4 MiB objects and [`Self::FEATURES`].
    pub fn new(size: u64) -> Self {
        let Layout { object_size, stripe_unit, stripe_count } = Layout::DEFAULT;
        Self { size, object_size, features: Self::FEATURES, stripe_unit, stripe_count, data_pool: None }
    }
}

/// What poolshift can say of a client that has an image open for writing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RbdWatcher {
    /// Its address, `IP:PORT/NONCE`.
    pub address: String,
    /// Its number: `client.NUMBER`.
    pub client: i64,
    /// Whether it is this process's connection.
    pub is_own: bool,
}

/// Whose clone an image is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RbdParent {
    /// The parent, `pool/[namespace/]image@snapshot`.
    pub snapshot: String,
    /// How many bytes from the start may still be shared with it.
    pub overlap: u64,
}

/// What all handles of an image share.
#[derive(Debug)]
struct Inner {
    connector: Connector,
    pool: Arc<Pool>,
    place: Place,
    location: String,
    /// The image's id, by which it is opened from now on.
    id: String,
    identity: ImageIdentity,
    layout: Layout,
    features: Features,
}

impl Inner {
    fn timeout(&self) -> Duration {
        self.connector.io_timeout
    }

    /// Turns what Ceph reports into what the layers above understand.
    fn fail(&self, operation: impl Into<String>, error: CephError) -> ImageError {
        if error.is(Errno::SHUTDOWN) {
            self.pool.cluster().set_fenced();
        }
        self.connector.failure(&self.place).of(operation, error)
    }

    /// Runs a blocking call against the image.
    async fn call<T: Send + 'static>(
        &self,
        operation: impl Into<String>,
        function: &'static str,
        call: impl FnOnce() -> ceph::Result<T> + Send + 'static,
    ) -> Result<T> {
        ceph::blocking(function, self.timeout(), call).await.map_err(|error| self.fail(operation, error))
    }

    /// Opens the image anew, at HEAD, and looks at it with a blocking function.
    async fn look<T: Send + 'static>(
        self: &Arc<Self>,
        operation: impl Into<String>,
        look: impl FnOnce(&Image) -> ceph::Result<T> + Send + 'static,
    ) -> Result<T> {
        let inner = Arc::clone(self);
        self.call(operation, "rbd_open_by_id_read_only", move || {
            look(&Image::open_by_id(&inner.pool, &inner.id, OpenMode::ReadOnly)?)
        })
        .await
    }
}

/// An RBD image, as a source and as a target.
#[derive(Debug)]
pub struct RbdImage {
    inner: Arc<Inner>,
    remarks: Vec<String>,
    /// Whether the image is known to have records of its own: see [`records`].
    has_records: AtomicBool,
    /// The read-write handle for single operations, while any is under way.
    idle_writer: tokio::sync::Mutex<Weak<Image>>,
    /// The lease, with its handle. Only ever locked for a moment.
    held: Mutex<Option<Arc<Held>>>,
    /// Held while the lease is taken or given back.
    lease_change: tokio::sync::Mutex<()>,
}

impl RbdImage {
    /// Opens an image to read from. Nothing of it is locked or watched.
    ///
    /// [`ErrorKind::NotFound`] when the pool, the namespace or the image is not there.
    pub async fn open_source(connector: &Connector, pool: &str, namespace: Option<&str>, image: &str) -> Result<Self> {
        Self::open(connector, Place::new(pool, namespace, image), None, false).await
    }

    /// Opens an image to write to. Nothing is locked before the lease is taken.
    ///
    /// [`ErrorKind::NotFound`] when the pool, the namespace or the image is not there.
    pub async fn open_target(connector: &Connector, pool: &str, namespace: Option<&str>, image: &str) -> Result<Self> {
        Self::open(connector, Place::new(pool, namespace, image), None, true).await
    }

    /// Whether there is an image of that name. [`ErrorKind::NotFound`] when the pool or the namespace isn't there.
    pub async fn exists(connector: &Connector, pool: &str, namespace: Option<&str>, image: &str) -> Result<bool> {
        let place = Place::new(pool, namespace, image);
        let (pool, name) = (connector.pool(&place).await?, place.image.clone());
        let opened = ceph::blocking("rbd_open_read_only", connector.io_timeout, move || {
            Image::open(&pool, &name, OpenMode::ReadOnly).map(drop)
        });
        match opened.await {
            Ok(()) => Ok(true),
            Err(error) if error.is(Errno::NOENT) => Ok(false),
            Err(error) => Err(connector.failure(&place).of("look for the image", error)),
        }
    }

    /// Creates an image. [`ErrorKind::AlreadyExists`] if the name is taken.
    pub async fn create(
        connector: &Connector,
        pool: &str,
        namespace: Option<&str>,
        image: &str,
        options: &CreateOptions,
    ) -> Result<()> {
        let place = Place::new(pool, namespace, image);
        let operation = format!("create an image of {} bytes", options.size);
        let wrong = |detail: String| {
            ImageError::new(ErrorKind::Unsupported, place.location(), operation.clone()).detail(detail)
        };
        if !options.object_size.is_power_of_two() || !(4 << 10..=32 << 20).contains(&options.object_size) {
            let size = options.object_size;
            return Err(wrong(format!("an object of {size} bytes is no power of two from 4 KiB to 32 MiB")));
        }
        let striped = (options.stripe_unit, options.stripe_count) != (options.object_size, 1);
        if striped && (options.stripe_count == 0 || options.stripe_unit == 0) {
            return Err(wrong("a stripe unit or count of 0".into()));
        }
        let opened = connector.pool(&place).await?;
        let spec = CreateSpec {
            size: options.size,
            order: options.object_size.trailing_zeros(),
            features: Features(options.features),
            striping: if striped { (options.stripe_unit, options.stripe_count) } else { (options.object_size, 1) },
            data_pool: options.data_pool.clone().unwrap_or_else(|| pool.to_owned()),
        };
        let (name, own_pool) = (place.image.clone(), pool.to_owned());
        let create = move || create_as_asked(&opened, &own_pool, &name, &spec);
        ceph::blocking("rbd_create4", connector.io_timeout, create)
            .await
            .map_err(|error| connector.failure(&place).of(operation, error))
    }

    /// Opens an image by its id, if that is known, and by its name otherwise.
    async fn open(connector: &Connector, place: Place, id: Option<String>, to_write: bool) -> Result<Self> {
        let pool = connector.pool(&place).await?;
        let (opened, name) = (Arc::clone(&pool), place.image.clone());
        let open = move || {
            let image = match &id {
                Some(id) => Image::open_by_id(&opened, id, OpenMode::ReadOnly),
                None => Image::open(&opened, &name, OpenMode::ReadOnly),
            };
            let facts = |image: Image| Ok((image.id()?, image.layout()?, image.features()?, image.flags()?));
            Ok(image.and_then(facts).map_err(|error| (opened.why_unopened(&name, id.as_deref(), &error), error)))
        };
        let failure = connector.failure(&place);
        let facts = ceph::blocking("rbd_open_read_only", connector.io_timeout, open).await;
        let facts = facts.map_err(|error| failure.of("open the image", error))?;
        let (id, (object_size, stripe_unit, stripe_count), features, flags) =
            facts.map_err(|(why, error)| failure.opening(&place, why, error))?;
        let namespace = place.namespace.as_ref().map(|name| format!("/{name}")).unwrap_or_default();
        let inner = Inner {
            connector: connector.clone(),
            identity: ImageIdentity {
                cluster: connector.fsid().to_owned(),
                pool: format!("{}{namespace}", pool.id()),
                image: id.clone(),
            },
            pool,
            location: place.location(),
            place,
            id,
            layout: Layout { object_size, stripe_unit, stripe_count },
            features,
        };
        Ok(Self {
            remarks: remarks(&inner, flags, to_write),
            inner: Arc::new(inner),
            has_records: AtomicBool::new(false),
            idle_writer: tokio::sync::Mutex::default(),
            held: Mutex::default(),
            lease_change: tokio::sync::Mutex::default(),
        })
    }

    /// The options that make a target like this source: its size now, object size, features and striping. Not its
    /// data pool, which belongs to the source's pool, nor journaling, which would write everything twice.
    pub async fn source_create_options(&self) -> Result<CreateOptions> {
        const LIKE: u64 = CreateOptions::FEATURES;
        let Layout { object_size, stripe_unit, stripe_count } = self.inner.layout;
        let size = self.inner.look("read the size", Image::size).await?;
        let features = self.inner.features.0 & LIKE;
        Ok(CreateOptions { size, object_size, features, stripe_unit, stripe_count, data_pool: None })
    }

    /// Who has the image open for writing.
    pub async fn watchers(&self) -> Result<Vec<RbdWatcher>> {
        let own = self.inner.pool.cluster().instance_id();
        let watchers = self.inner.look("list the watchers", Image::watchers).await?;
        let describe = |watcher: ceph::Watcher| RbdWatcher {
            is_own: u64::try_from(watcher.client) == Ok(own),
            address: watcher.address,
            client: watcher.client,
        };
        Ok(watchers.into_iter().map(describe).collect())
    }

    /// Whose clone the image is; `None` if it is none.
    pub async fn parent(&self) -> Result<Option<RbdParent>> {
        let parent = self.inner.look("look for a parent", Image::parent).await?;
        Ok(parent.map(|parent| {
            let namespace = Some(parent.namespace.as_str());
            let image = Place::new(&parent.pool, namespace, &parent.image);
            RbdParent { snapshot: format!("{image}@{}", parent.snapshot), overlap: parent.overlap }
        }))
    }
}

/// What is missing for full speed or full safety.
fn remarks(inner: &Inner, flags: u64, to_write: bool) -> Vec<String> {
    let (place, features) = (&inner.place, inner.features);
    let mut remarks = Vec::new();
    if !features.has(Features::OBJECT_MAP | Features::FAST_DIFF) {
        remarks.push(format!(
            "{place} has no object map with fast-diff: finding changes looks at every object; enable it: rbd feature \
             enable {place} exclusive-lock object-map fast-diff, then rbd object-map rebuild {place}"
        ));
    } else if flags & ceph::INVALID_FLAGS != 0 {
        remarks.push(format!(
            "the object map of {place} is flagged invalid: finding changes looks at every object; repair it: rbd \
             object-map rebuild {place}"
        ));
    }
    if to_write && !features.has(Features::EXCLUSIVE_LOCK) {
        remarks.push(format!(
            "{place} has no exclusive lock: the lease binds poolshift only, and fencing is weaker; enable it: rbd \
             feature enable {place} exclusive-lock"
        ));
    }
    if to_write && features.has(Features::JOURNALING) {
        remarks.push(format!("{place} has journaling enabled: everything is written twice"));
    }
    if features.has(Features::NON_PRIMARY) {
        remarks
            .push(format!("{place} is the non-primary side of mirroring: it can be read, not snapshotted or written"));
    }
    if features.has(Features::MIGRATING) {
        remarks.push(format!("{place} is being moved by rbd migration; let that finish first"));
    }
    remarks
}

/// Creates an image, and looks at what has become of it: nothing but what was asked for may say where its data is, and
/// how it lies.
fn create_as_asked(opened: &Arc<Pool>, pool: &str, name: &str, spec: &CreateSpec) -> ceph::Result<()> {
    ceph::create_image(opened, name, spec)?;
    let made = Image::open(opened, name, OpenMode::ReadOnly)?;
    let found = (made.size()?, made.layout()?, made.features()?.has(Features::DATA_POOL));
    let (unit, count) = spec.striping;
    if found == (spec.size, (1 << spec.order, unit, count), spec.data_pool != pool) {
        return Ok(());
    }
    drop(made);
    opened.remove_image(name, &AtomicU64::new(0))?;
    let (size, (object_size, unit, count), aside) = found;
    let what = format!(
        "an image of {size} bytes with objects of {object_size}, stripes of {unit} × {count} and its data in {} pool",
        if aside { "another" } else { "its own" }
    );
    Err(CephError::Nonsense { function: "rbd_create4", what })
}
