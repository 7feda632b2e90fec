//! The end of the process.
//!
//! librados has threads for as long as a connection is open, and `exit` destroys the global objects of its libraries
//! under their feet: a process that ends while a handle is still being closed crashed in 4 of 25 runs. So the last
//! thing before those destructors is a look whether every connection is shut down; if not, after a short wait, the
//! process ends without them, with the status that it was to end with.

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// How many connections there are that `rados_shutdown` has not ended yet.
static CONNECTIONS: AtomicUsize = AtomicUsize::new(0);

/// How long an ending process waits for handles that are being closed: the usual time is some 50 ms.
const PATIENCE: Duration = Duration::from_secs(3);

/// Notes that there is a connection.
pub(super) fn connection_begins() {
    CONNECTIONS.fetch_add(1, Ordering::SeqCst);
}

/// Notes that `rados_shutdown` has returned.
pub(super) fn connection_ended() {
    CONNECTIONS.fetch_sub(1, Ordering::SeqCst);
}

/// Has the look taken before the destructors that are registered by now. To be called again when more may have been:
/// they run in the opposite order.
#[cfg(target_env = "gnu")]
pub(super) fn watch_the_end() {
    unsafe extern "C" {
        /// glibc's `atexit` with the status; see on_exit(3).
        safe fn on_exit(handler: unsafe extern "C" fn(c_int, *mut c_void), argument: *mut c_void) -> c_int;
        /// See _exit(2).
        safe fn _exit(status: c_int) -> !;
    }
    unsafe extern "C" fn end(status: c_int, _: *mut c_void) {
        // Rust has flushed its standard output before it calls `exit`.
        if CONNECTIONS.load(Ordering::SeqCst) > 0
            && !(super::wait_until_closed(PATIENCE) && CONNECTIONS.load(Ordering::SeqCst) == 0)
        {
            _exit(status);
        }
    }
    // It fails only without memory; then the process ends as it would without.
    let _registered = on_exit(end, std::ptr::null_mut());
}

/// Other C libraries have no `on_exit`; librados is not to be had for them either.
#[cfg(not(target_env = "gnu"))]
pub(super) fn watch_the_end() {}
