//! librados and librbd, loaded at run time: the only unsafe code.
//!
//! One binary builds and runs anywhere, and has RBD wherever Debian's `librbd1` is installed. What stands here is a
//! thin, safe layer: handles that close themselves, blocking calls that run on threads of their own, asynchronous
//! requests as futures. What an RBD image *means* to poolshift is said in `image::rbd`.
//!
//! # Time
//!
//! Every wait is bounded by this layer, not by `rados_osd_op_timeout`, which is left off: with it, librbd takes an
//! object map update that timed out for done in memory while it may never have reached the disk, and if the OSD that
//! stands still also holds the image's header, the invalid flag is lost as well; later writes to that object would be
//! missing from fast-diff for ever. A request that takes too long is therefore reported as timed out while librbd
//! goes on with it: it lands, in order, when the OSD comes back, or never, when the client was fenced meanwhile.
//!
//! Blocking calls run on short-lived threads rather than on tokio's blocking pool, because a runtime waits for that
//! pool when it shuts down: a call that a silent OSD holds for ever would keep the process from ending.

use std::fmt;
use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;

mod aio;
mod cluster;
mod diff;
mod exit;
mod image;
mod library;
mod locks;
mod memory;
mod metadata;
mod names;
pub(crate) mod object_map;
mod pace;
mod pool_list;
mod qos;
mod relations;
mod unopened;

pub(crate) use cluster::{Cluster, ConnectOptions, Pool};
pub(crate) use diff::{Collected, DiffRange};
pub(crate) use image::{CreateSpec, Features, INVALID_FLAGS, Image, OpenMode, SnapInfo, Watcher};
pub(crate) use locks::Locker;
pub(crate) use memory::{limit_arenas, trim};
pub(crate) use names::create_image;
pub(crate) use qos::{ConfigLevel, QosLimit};
pub(crate) use relations::{LinkedImage, ParentLink};
pub(crate) use unopened::Unopened;

/// What Ceph, or the way to it, reports.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CephError {
    /// The shared library is not there.
    #[error("{file} can't be loaded; on Debian it is in the package {package}")]
    LibraryMissing {
        file: &'static str,
        package: &'static str,
        #[source]
        source: libloading::Error,
    },
    /// The shared library is too old for a function that poolshift can't do without.
    #[error("{file} has no function {symbol}; librbd 16.2 or newer is needed")]
    SymbolMissing { file: &'static str, symbol: &'static str },
    /// A function of librados or librbd failed.
    #[error("{function}: {}", std::io::Error::from_raw_os_error(*errno))]
    Call { function: &'static str, errno: i32 },
    /// A file that librados needs is there, and can't be read.
    #[error("{}", path.display())]
    Unreadable {
        /// `keyring` or `configuration file`.
        what: &'static str,
        path: std::path::PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// A function did not return, or a request did not complete, in time.
    #[error("{function}: no answer within {} s", after.as_secs_f32())]
    TimedOut { function: &'static str, after: Duration },
    /// A name with a NUL in it, which C can't take.
    #[error("{0:?} holds a NUL character")]
    Nul(String),
    /// A configuration option that librados refused.
    #[error("Ceph refuses the option {option} = {value}")]
    Option { option: String, value: String, errno: i32 },
    /// The thread for a blocking call could not be started, or panicked.
    #[error("{function}: no thread for the call")]
    Thread { function: &'static str },
    /// librbd returned something that is against its documentation.
    #[error("{function} returned {what}")]
    Nonsense { function: &'static str, what: String },
}

/// The function that adds a client to the blocklist.
pub(crate) const BLOCKLIST: &str = "rados_blocklist_add";

pub(crate) type Result<T, E = CephError> = std::result::Result<T, E>;

impl CephError {
    /// The errno (positive), if the storage gave one.
    pub(crate) fn errno(&self) -> Option<i32> {
        match self {
            Self::Call { errno, .. } | Self::Option { errno, .. } => Some(*errno),
            _ => None,
        }
    }

    /// Whether it is this function that failed.
    pub(crate) fn is_of(&self, wanted: &str) -> bool {
        matches!(self, Self::Call { function, .. } if *function == wanted)
    }

    /// Whether the storage gave this errno.
    pub(crate) fn is(&self, errno: rustix::io::Errno) -> bool {
        self.errno() == Some(errno.raw_os_error())
    }
}

/// Turns a C return value, −errno or not, into a result.
fn check(function: &'static str, value: impl Into<i64>) -> Result<u64> {
    let value = value.into();
    u64::try_from(value)
        .map_err(|_| CephError::Call { function, errno: i32::try_from(value.saturating_neg()).unwrap_or(i32::MAX) })
}

fn c_string(text: &str) -> Result<std::ffi::CString> {
    std::ffi::CString::new(text).map_err(|_| CephError::Nul(text.to_owned()))
}

/// How many blocking calls may be under way at a time. A cluster that does not answer keeps the thread of each call, and
/// a daemon goes on polling: without a limit it would reach that of its unit (`TasksMax`), and its host.
const CALLS_MAX: usize = 512;

static CALLS: Semaphore = Semaphore::const_new(CALLS_MAX);

/// Runs a blocking call on a thread of its own, and waits for it for at most `limit`.
///
/// When the time is over, or the future is dropped, the call goes on and its result is dropped when it comes. With
/// [`CALLS_MAX`] calls under way it is not begun, and timed out if none of those ends in time.
pub(crate) async fn blocking<T: Send + 'static>(
    function: &'static str,
    limit: Duration,
    call: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    blocking_among(&CALLS, function, limit, call).await
}

async fn blocking_among<T: Send + 'static>(
    calls: &'static Semaphore,
    function: &'static str,
    limit: Duration,
    call: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let result = async {
        // It is never closed.
        let permit = calls.acquire().await.map_err(|_| CephError::Thread { function })?;
        let (sender, receiver) = tokio::sync::oneshot::channel();
        std::thread::Builder::new()
            .name("ceph-call".into())
            .spawn(move || {
                // Nobody may be waiting any more; then the result, with all handles in it, is dropped here.
                drop(sender.send(call()));
                drop(permit);
            })
            .map_err(|_| CephError::Thread { function })?;
        receiver.await.map_err(|_| CephError::Thread { function })?
    };
    let timed_out = |_| Err(CephError::TimedOut { function, after: limit });
    tokio::time::timeout(limit, result).await.unwrap_or_else(timed_out)
}

/// As [`blocking`], for calls that may well take long as long as `steps` counts up: it is `limit` without a step that
/// ends the wait.
pub(crate) async fn blocking_with_progress<T: Send + 'static>(
    function: &'static str,
    limit: Duration,
    steps: Arc<AtomicU64>,
    call: impl FnOnce(&AtomicU64) -> Result<T> + Send + 'static,
) -> Result<T> {
    let counter = Arc::clone(&steps);
    // A year stands for "no limit"; the loop below is what ends the wait.
    let mut result = std::pin::pin!(blocking(function, Duration::from_secs(365 * 86_400), move || call(&counter)));
    loop {
        let before = steps.load(Ordering::Relaxed);
        match tokio::time::timeout(limit, result.as_mut()).await {
            Ok(result) => return result,
            Err(_) if steps.load(Ordering::Relaxed) != before => {}
            Err(_) => return Err(CephError::TimedOut { function, after: limit }),
        }
    }
}

/// How many handles are being closed in the background.
static CLOSING: Closing = Closing { count: Mutex::new(0), changed: Condvar::new() };

struct Closing {
    count: Mutex<usize>,
    changed: Condvar,
}

/// Runs the closing of a handle in the background: it blocks, and may be dropped on an async worker.
pub(crate) fn close_in_background(close: impl FnOnce() + Send + 'static) {
    close_with(close, |run| std::thread::Builder::new().name("ceph-close".into()).spawn(run).map(drop));
}

/// As [`close_in_background`], with what starts the thread.
fn close_with<F: FnOnce() + Send + 'static>(
    close: F,
    spawn: impl FnOnce(Box<dyn FnOnce() + Send>) -> std::io::Result<()>,
) {
    *CLOSING.count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
    let finish = || {
        *CLOSING.count.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        CLOSING.changed.notify_all();
    };
    // A closure that can't be run is dropped by `spawn`, which must not drop what it holds: the pool and the connection
    // would be destroyed under an image that is still open, perhaps with requests in flight.
    let close = ManuallyDrop::new(close);
    let spawned = spawn(Box::new(move || {
        ManuallyDrop::into_inner(close)();
        finish();
    }));
    if let Err(error) = spawned {
        // Without a thread the handle leaks, with all that it needs; the storage's watch timeout cleans up.
        tracing::warn!(%error, "no thread to close a Ceph handle with: it stays open until the process ends");
        finish();
    }
}

/// Waits until every handle that was dropped is closed, or `limit` is over; says whether all are.
///
/// A process that ends before leaves watches behind, which the storage forgets after 30 s only, and until then
/// nobody can remove those images.
pub(crate) fn wait_until_closed(limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    let mut count = CLOSING.count.lock().unwrap_or_else(PoisonError::into_inner);
    while *count > 0 {
        let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) else {
            return false;
        };
        count = CLOSING.changed.wait_timeout(count, left).unwrap_or_else(PoisonError::into_inner).0;
    }
    true
}

/// A pointer that C gave and that may be used from any thread, as librados and librbd document for their handles.
struct Raw(*mut std::ffi::c_void);

// SAFETY: librados_t, rados_ioctx_t and rbd_image_t may be used and freed from any thread (librados.h, librbd.h; the
// exceptions, settings of an ioctx and snap_set, are made before the handle is shared).
unsafe impl Send for Raw {}
// SAFETY: as above; the libraries lock inside.
unsafe impl Sync for Raw {}

impl fmt::Debug for Raw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:p}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_cluster_that_does_not_answer_keeps_so_many_threads_and_no_more() {
        static TWO: Semaphore = Semaphore::const_new(2);
        let (answer, silent) = std::sync::mpsc::channel::<()>();
        let silent = Arc::new(Mutex::new(silent));
        let begun = Arc::new(AtomicU64::new(0));
        let call = |limit| {
            let (silent, begun) = (Arc::clone(&silent), Arc::clone(&begun));
            blocking_among(&TWO, "rbd_x", limit, move || {
                begun.fetch_add(1, Ordering::SeqCst);
                // Until the sender is gone.
                let _ = silent.lock().unwrap_or_else(PoisonError::into_inner).recv();
                Ok(())
            })
        };
        for _ in 0..5 {
            let late = call(Duration::from_millis(100)).await.unwrap_err();
            assert!(matches!(late, CephError::TimedOut { .. }), "{late:?}");
        }
        drop(answer);
        // All who were waited for have ended, and those who were not begun never are.
        call(Duration::from_secs(60)).await.unwrap();
        assert_eq!(begun.load(Ordering::SeqCst), 3);
    }

    #[test]
    fn what_no_thread_can_close_leaks_with_all_that_it_needs() {
        let pool = Arc::new(());
        let needed = Arc::clone(&pool);
        close_with(
            move || drop(needed),
            |run| {
                drop(run);
                Err(std::io::ErrorKind::WouldBlock.into())
            },
        );
        assert_eq!(Arc::strong_count(&pool), 2);
        let needed = Arc::clone(&pool);
        close_in_background(move || drop(needed));
        assert!(wait_until_closed(Duration::from_secs(60)));
        assert_eq!(Arc::strong_count(&pool), 2);
    }
}
