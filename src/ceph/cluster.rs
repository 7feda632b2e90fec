//! The connection to a cluster, and its pools.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::io::Errno;

use super::library::{Library, library};
use super::{BLOCKLIST, CephError, Raw, Result, blocking, c_string, check, close_in_background, exit};

/// How to connect.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ConnectOptions {
    /// The configuration file; `None`: `CEPH_CONF`, or Ceph's default places.
    pub(crate) conf: Option<PathBuf>,
    /// The user, with or without `client.`; `None`: `client.admin`.
    pub(crate) user: Option<String>,
    /// Options set after the configuration file was read.
    pub(crate) overrides: Vec<(String, String)>,
}

/// How long a monitor may take to answer; what librados gets as `client_mount_timeout` and `rados_mon_op_timeout`.
const MONITOR_TIMEOUT: Duration = Duration::from_secs(30);

/// What poolshift sets for its own handles, unless told otherwise.
///
/// No cache: every byte is read once or written once, and what was acknowledged is on the OSDs. No readahead, for the
/// same reason. Writes are copied by librbd, as is its default: without (`rbd_disable_zero_copy_writes=false`) a copy of
/// 3.4 GiB costs 0.3 s of CPU less, but a fenced client's write is held back instead of failing at once.
const DEFAULTS: [(&str, &str); 6] = [
    ("rbd_cache", "false"),
    ("rbd_readahead_max_bytes", "0"),
    ("rbd_parent_cache_enabled", "false"),
    ("client_mount_timeout", "30"),
    ("rados_mon_op_timeout", "30"),
    ("rados_osd_op_timeout", "0"),
];

fn c_path(path: &Path) -> Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| CephError::Nul(path.display().to_string()))
}

/// Fails if a file is there, and can't be read.
fn must_be_readable(what: &'static str, path: PathBuf) -> Result<()> {
    match std::fs::File::open(&path) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(CephError::Unreadable { what, path, source })
        }
        _ => Ok(()),
    }
}

/// The configuration file that librados reads where it is given none.
fn conf_of_environment() -> Option<PathBuf> {
    std::env::var_os("CEPH_CONF").map(PathBuf::from)
}

/// The name of the cluster that a configuration file is of, as Ceph's own tools take it: that of `remote.conf` is
/// `remote`, so that the keyring `remote.client.NAME.keyring` is found. Any other file's is `ceph`.
fn cluster_name(conf: Option<&Path>) -> String {
    let named = conf.filter(|conf| conf.extension().is_some_and(|extension| extension == "conf"));
    let stem = named.and_then(|conf| conf.file_stem()?.to_str());
    stem.unwrap_or("ceph").to_owned()
}

/// A connection, shared by every image that is reached through it.
#[derive(Debug)]
pub(crate) struct Cluster {
    pub(super) raw: Raw,
    fsid: String,
    instance_id: u64,
    fenced: AtomicBool,
}

impl Cluster {
    /// Connects. Takes at most 30 s for each of the monitor's answers.
    pub(crate) async fn connect(options: ConnectOptions) -> Result<Arc<Self>> {
        blocking("rados_connect", MONITOR_TIMEOUT * 2 + Duration::from_secs(10), move || {
            Self::connect_now(&options).map(Arc::new)
        })
        .await
    }

    fn connect_now(options: &ConnectOptions) -> Result<Self> {
        let rados = &library()?.rados;
        let user = options.user.as_deref().unwrap_or("admin");
        let user = c_string(&format!("client.{}", user.strip_prefix("client.").unwrap_or(user)))?;
        let mut raw = ptr::null_mut();
        let name = c_string(&cluster_name(options.conf.clone().or_else(conf_of_environment).as_deref()))?;
        // SAFETY: `raw` is a valid place for a handle, the strings end with NUL and outlive the call.
        check("rados_create2", unsafe { (rados.rados_create2)(&mut raw, name.as_ptr(), user.as_ptr(), 0) })?;
        // From here on dropped, and so shut down, on every way out.
        exit::connection_begins();
        exit::watch_the_end();
        let mut cluster = Self { raw: Raw(raw), fsid: String::new(), instance_id: 0, fenced: AtomicBool::new(false) };
        if let Some(path) = options.conf.clone().or_else(conf_of_environment) {
            must_be_readable("configuration file", path)?;
        }
        let conf = options.conf.as_deref().map(c_path).transpose()?;
        let conf = conf.as_ref().map_or(ptr::null(), |path| path.as_ptr());
        // SAFETY: the handle is fresh; NULL means CEPH_CONF or the default places.
        check("rados_conf_read_file", unsafe { (rados.rados_conf_read_file)(raw, conf) })?;
        let given = options.overrides.iter().map(|(option, value)| (option.as_str(), value.as_str()));
        for (option, value) in DEFAULTS.into_iter().chain(given) {
            let (option_c, value_c) = (c_string(option)?, c_string(value)?);
            // SAFETY: the handle is not connected yet, both strings end with NUL.
            let set = unsafe { (rados.rados_conf_set)(raw, option_c.as_ptr(), value_c.as_ptr()) };
            check("rados_conf_set", set).map_err(|error| CephError::Option {
                option: option.to_owned(),
                value: value.to_owned(),
                errno: error.errno().unwrap_or_default(),
            })?;
        }
        // SAFETY: the handle is configured and not connected.
        if let Err(error) = check("rados_connect", unsafe { (rados.rados_connect)(raw) }) {
            // librados takes the first keyring that it can open, and then has no key where that was none.
            if error.is(Errno::NOENT) || error.is(Errno::ACCESS) {
                for path in cluster.keyrings() {
                    let is_there = path.exists();
                    must_be_readable("keyring", path)?;
                    if is_there {
                        break;
                    }
                }
            }
            return Err(error);
        }
        // Again, for what connecting has made.
        exit::watch_the_end();
        let mut fsid = [0u8; 64];
        // SAFETY: the buffer is as long as said.
        let length = unsafe { (rados.rados_cluster_fsid)(raw, fsid.as_mut_ptr().cast(), fsid.len()) };
        let length = check("rados_cluster_fsid", length)? as usize;
        cluster.fsid = String::from_utf8_lossy(&fsid[..length.min(fsid.len())]).trim_end_matches('\0').to_owned();
        // SAFETY: the handle is connected.
        cluster.instance_id = unsafe { (rados.rados_get_instance_id)(raw) };
        Ok(cluster)
    }

    /// Where librados looks for a keyring, by the configuration.
    fn keyrings(&self) -> Vec<PathBuf> {
        let mut value = [0u8; 4096];
        let Ok(library) = library() else { return Vec::new() };
        // SAFETY: the handle is configured, the option ends with NUL, the buffer is as long as said.
        let got = unsafe {
            (library.rados.rados_conf_get)(self.raw.0, c"keyring".as_ptr(), value.as_mut_ptr().cast(), value.len())
        };
        let value = std::ffi::CStr::from_bytes_until_nul(&value).ok().filter(|_| got == 0);
        let value = value.map(|value| value.to_string_lossy().into_owned()).unwrap_or_default();
        value.split([',', ';', ' ', '\t']).filter(|path| !path.is_empty()).map(PathBuf::from).collect()
    }

    /// The cluster's fsid.
    pub(crate) fn fsid(&self) -> &str {
        &self.fsid
    }

    /// This connection's number: `client.NUMBER`, as in a list of watchers.
    pub(crate) fn instance_id(&self) -> u64 {
        self.instance_id
    }

    /// Notes that the cluster has blocklisted this connection: whoever wants to work on needs a new one.
    pub(crate) fn set_fenced(&self) {
        self.fenced.store(true, Ordering::Release);
    }

    /// Whether the cluster is known to have blocklisted this connection.
    pub(crate) fn is_fenced(&self) -> bool {
        self.fenced.load(Ordering::Acquire)
    }

    /// Adds a client to the cluster's blocklist for so many seconds: the OSDs refuse its requests from then on. `address`
    /// is that of its lock (`10.0.0.7:0/123`). Returns once this connection has the OSD map that says so, which its next
    /// requests take to the OSDs. An entry that is there already gets the new end. Blocks.
    pub(crate) fn blocklist(&self, address: &str, seconds: u32) -> Result<()> {
        let rados = &library()?.rados;
        let address = c_string(address)?;
        // SAFETY: the cluster is connected, the address ends with NUL, and librados only reads it.
        let added = unsafe { (rados.rados_blocklist_add)(self.raw.0, address.as_ptr().cast_mut(), seconds) };
        check(BLOCKLIST, added).map(drop)
    }

    /// The name of the pool of that id.
    pub(super) fn pool_name(&self, id: i64) -> Result<String> {
        let mut name = [0u8; 1024];
        // SAFETY: the cluster is connected, the buffer is as long as said.
        let length = unsafe {
            (library()?.rados.rados_pool_reverse_lookup)(self.raw.0, id, name.as_mut_ptr().cast(), name.len())
        };
        let length = usize::try_from(check("rados_pool_reverse_lookup", length)?).unwrap_or(0).min(name.len());
        Ok(String::from_utf8_lossy(&name[..length]).trim_end_matches('\0').to_owned())
    }

    /// Opens a pool, and a namespace of it. Blocks.
    pub(crate) fn pool(self: &Arc<Self>, name: &str, namespace: Option<&str>) -> Result<Arc<Pool>> {
        let rados = &library()?.rados;
        let (name, namespace) = (c_string(name)?, c_string(namespace.unwrap_or_default())?);
        let mut raw = ptr::null_mut();
        // SAFETY: the cluster is connected, `raw` is a valid place for a handle.
        check("rados_ioctx_create", unsafe { (rados.rados_ioctx_create)(self.raw.0, name.as_ptr(), &mut raw) })?;
        // SAFETY: the handle is valid, and nobody else has it yet: settings of an ioctx are not thread-safe.
        let id = unsafe {
            (rados.rados_ioctx_set_namespace)(raw, namespace.as_ptr());
            // Without it a write to a full pool, or one beyond its quota, waits until there is room again; with it
            // the OSD answers ENOSPC or EDQUOT.
            (rados.rados_set_pool_full_try)(raw);
            (rados.rados_ioctx_get_id)(raw)
        };
        Ok(Arc::new(Pool { raw: Raw(raw), last: Mutex::default(), id, cluster: Arc::clone(self) }))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let raw = Raw(self.raw.0);
        close_in_background(move || {
            let raw = raw;
            if let Ok(Library { rados, .. }) = library() {
                // SAFETY: every ioctx and image keeps an `Arc` of the cluster, so that none is left.
                unsafe { (rados.rados_shutdown)(raw.0) };
                exit::connection_ended();
            }
        });
    }
}

/// A pool, and a namespace in it: a `rados_ioctx_t`.
#[derive(Debug)]
pub(crate) struct Pool {
    pub(super) raw: Raw,
    /// Held for each request and the question for its object's version, which the handle answers for its last request.
    pub(super) last: Mutex<()>,
    id: i64,
    cluster: Arc<Cluster>,
}

impl Pool {
    /// The pool's id.
    pub(crate) fn id(&self) -> i64 {
        self.id
    }

    /// The connection.
    pub(crate) fn cluster(&self) -> &Arc<Cluster> {
        &self.cluster
    }

    /// Whether the pool has that namespace. Blocks.
    pub(crate) fn namespace_exists(&self, namespace: &str) -> Result<bool> {
        let name = c_string(namespace)?;
        let mut exists = false;
        // SAFETY: the handle is valid, `exists` is a valid place.
        let value = unsafe { (library()?.rbd.rbd_namespace_exists)(self.raw.0, name.as_ptr(), &mut exists) };
        check("rbd_namespace_exists", value)?;
        Ok(exists)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if let Ok(Library { rados, .. }) = library() {
            // SAFETY: images keep an `Arc` of their pool, so that nobody uses it any more. Doesn't block.
            unsafe { (rados.rados_ioctx_destroy)(self.raw.0) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_has_the_name_of_its_configuration_file() {
        let of = |path: &str| cluster_name(Some(Path::new(path)));
        assert_eq!([of("/etc/ceph/ceph.conf"), of("remote.conf"), of("/tmp/a.b.conf")], ["ceph", "remote", "a.b"]);
        assert_eq!([of("/etc/ceph/conf"), of("/x/.conf"), cluster_name(None)], ["ceph", "ceph", "ceph"]);
    }
}
