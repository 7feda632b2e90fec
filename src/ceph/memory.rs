//! Memory that the C library keeps for itself, given back to the system.
//!
//! Batches are megabytes long and librbd allocates on many threads, so that glibc's arenas grow while many volumes are
//! worked on and keep what they have grown to. Measured with 178 volumes: 412 MiB were resident after all had been copied,
//! with 64 MiB that could still be in flight and nothing that was.

use std::ffi::c_int;
use std::sync::OnceLock;

type Trim = unsafe extern "C" fn(usize) -> c_int;
type SetOption = unsafe extern "C" fn(c_int, c_int) -> c_int;

/// `M_ARENA_MAX` of glibc's malloc.h.
const ARENA_MAX: c_int = -8;

/// How many arenas there may be: threads of librbd share them, and wait for each other no more than a few cores make them.
const ARENAS: c_int = 4;

/// A function of the C library, where it has one of that name: glibc does, musl does not.
fn of_libc<T: Copy>(name: &[u8]) -> Option<T> {
    let process: libloading::Library = libloading::os::unix::Library::this().into();
    // SAFETY: the names asked for have had these types in every glibc; the process itself is never unloaded.
    let symbol = unsafe { process.get::<T>(name) }.ok().map(|symbol| *symbol);
    std::mem::forget(process);
    symbol
}

/// Keeps the C library from making an arena for every thread. To be called before there are many.
pub(crate) fn limit_arenas() {
    if let Some(option) = of_libc::<SetOption>(b"mallopt\0") {
        // SAFETY: mallopt takes any numbers, and may be called at any time.
        unsafe { option(ARENA_MAX, ARENAS) };
    }
}

/// Gives memory back that nothing uses. Takes some milliseconds.
pub(crate) fn trim() {
    static TRIM: OnceLock<Option<Trim>> = OnceLock::new();
    if let Some(trim) = TRIM.get_or_init(|| of_libc::<Trim>(b"malloc_trim\0")) {
        // SAFETY: malloc_trim may be called at any time, on any thread.
        unsafe { trim(0) };
    }
}
