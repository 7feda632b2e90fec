//! The function tables of librados and librbd.
//!
//! Signatures follow `rados/librados.h` and `rbd/librbd.h` of Ceph 16.2.15; every function here exists there.

use std::ffi::{c_char, c_int, c_void};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{CephError, Result};

pub(super) type Handle = *mut c_void;
/// `librbd_progress_fn_t`; must never be NULL, because librbd 16.2 calls it unchecked when a snapshot is created.
pub(super) type Progress = unsafe extern "C" fn(u64, u64, *mut c_void) -> c_int;
pub(super) type AioCallback = unsafe extern "C" fn(Handle, *mut c_void);
pub(super) type DiffCallback = unsafe extern "C" fn(u64, usize, c_int, *mut c_void) -> c_int;

/// `rbd_snap_info_t`
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct SnapInfoC {
    pub(super) id: u64,
    pub(super) size: u64,
    pub(super) name: *const c_char,
}

/// `rbd_image_info_t`
#[repr(C)]
pub(super) struct ImageInfoC {
    pub(super) size: u64,
    pub(super) obj_size: u64,
    pub(super) num_objs: u64,
    pub(super) order: c_int,
    pub(super) block_name_prefix: [c_char; 24],
    pub(super) parent_pool: i64,
    pub(super) parent_name: [c_char; 96],
}

/// `struct timespec`, where time_t has 64 bits
#[repr(C)]
#[derive(Default)]
pub(super) struct TimespecC {
    pub(super) seconds: i64,
    pub(super) nanoseconds: i64,
}

/// `rbd_image_spec_t`
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct ImageSpecC {
    pub(super) id: *mut c_char,
    pub(super) name: *mut c_char,
}

/// `rbd_image_watcher_t`
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct WatcherC {
    pub(super) addr: *mut c_char,
    pub(super) id: i64,
    pub(super) cookie: u64,
}

/// `rbd_config_option_t`
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct ConfigOptionC {
    pub(super) name: *mut c_char,
    pub(super) value: *mut c_char,
    pub(super) source: c_int,
}

/// `rbd_linked_image_spec_t`
#[repr(C)]
pub(super) struct LinkedImageSpecC {
    pub(super) pool_id: i64,
    pub(super) pool_name: *mut c_char,
    pub(super) pool_namespace: *mut c_char,
    pub(super) image_id: *mut c_char,
    pub(super) image_name: *mut c_char,
    pub(super) trash: bool,
}

/// `rbd_snap_spec_t`
#[repr(C)]
pub(super) struct SnapSpecC {
    pub(super) id: u64,
    pub(super) namespace_type: c_int,
    pub(super) name: *mut c_char,
}

/// `rbd_mirror_image_info_t`
#[repr(C)]
pub(super) struct MirrorInfoC {
    pub(super) global_id: *mut c_char,
    pub(super) state: c_int,
    pub(super) primary: bool,
}

macro_rules! table {
    ($(#[$doc:meta])* $name:ident, $file:literal, $package:literal;
     $($function:ident: fn($($argument:ty),*) $(-> $result:ty)?;)*) => {
        $(#[$doc])*
        pub(super) struct $name {
            $(pub(super) $function: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
        }

        impl $name {
            fn load() -> Result<Self> {
                // SAFETY: the libraries' initialisers are those of Ceph, which every client of it runs; nothing here
                // depends on the state of this process.
                let library = unsafe { libloading::Library::new($file) }
                    .map_err(|source| CephError::LibraryMissing { file: $file, package: $package, source })?;
                // Never unloaded: librados' threads outlive every handle.
                let library: &'static libloading::Library = Box::leak(Box::new(library));
                $(
                    // SAFETY: the type is that of the function's declaration in Ceph 16.2's headers, whose C
                    // interface only ever grows.
                    let $function = *unsafe {
                        library.get::<unsafe extern "C" fn($($argument),*) $(-> $result)?>(
                            concat!(stringify!($function), "\0").as_bytes(),
                        )
                    }
                    .map_err(|_| CephError::SymbolMissing { file: $file, symbol: stringify!($function) })?;
                )*
                Ok(Self { $($function,)* })
            }
        }
    };
}

table! {
    /// librados: the connection to a cluster.
    Rados, "librados.so.2", "librados2";
    rados_create2: fn(*mut Handle, *const c_char, *const c_char, u64) -> c_int;
    rados_conf_read_file: fn(Handle, *const c_char) -> c_int;
    rados_conf_set: fn(Handle, *const c_char, *const c_char) -> c_int;
    rados_conf_get: fn(Handle, *const c_char, *mut c_char, usize) -> c_int;
    rados_connect: fn(Handle) -> c_int;
    rados_shutdown: fn(Handle);
    rados_cluster_fsid: fn(Handle, *mut c_char, usize) -> c_int;
    rados_get_instance_id: fn(Handle) -> u64;
    rados_pool_reverse_lookup: fn(Handle, i64, *mut c_char, usize) -> c_int;
    rados_ioctx_create: fn(Handle, *const c_char, *mut Handle) -> c_int;
    rados_ioctx_destroy: fn(Handle);
    rados_ioctx_set_namespace: fn(Handle, *const c_char);
    rados_ioctx_get_id: fn(Handle) -> i64;
    rados_set_pool_full_try: fn(Handle);
    rados_exec: fn(Handle, *const c_char, *const c_char, *const c_char, *const c_char, usize, *mut c_char, usize)
        -> c_int;
    rados_get_last_version: fn(Handle) -> u64;
    rados_remove: fn(Handle, *const c_char) -> c_int;
    rados_mon_command: fn(Handle, *mut *const c_char, usize, *const c_char, usize, *mut *mut c_char, *mut usize,
        *mut *mut c_char, *mut usize) -> c_int;
    rados_buffer_free: fn(*mut c_char);
    rados_break_lock: fn(Handle, *const c_char, *const c_char, *const c_char, *const c_char) -> c_int;
    rados_blocklist_add: fn(Handle, *mut c_char, u32) -> c_int;
}

table! {
    /// librbd: images.
    Rbd, "librbd.so.1", "librbd1";
    rbd_image_options_create: fn(*mut Handle);
    rbd_image_options_destroy: fn(Handle);
    rbd_image_options_set_uint64: fn(Handle, c_int, u64) -> c_int;
    rbd_image_options_set_string: fn(Handle, c_int, *const c_char) -> c_int;
    rbd_create4: fn(Handle, *const c_char, u64, Handle) -> c_int;
    rbd_clone3: fn(Handle, *const c_char, *const c_char, Handle, *const c_char, Handle) -> c_int;
    rbd_rename: fn(Handle, *const c_char, *const c_char) -> c_int;
    rbd_remove_with_progress: fn(Handle, *const c_char, Progress, *mut c_void) -> c_int;
    rbd_list2: fn(Handle, *mut ImageSpecC, *mut usize) -> c_int;
    rbd_image_spec_list_cleanup: fn(*mut ImageSpecC, usize);
    rbd_namespace_exists: fn(Handle, *const c_char, *mut bool) -> c_int;
    rbd_open: fn(Handle, *const c_char, *mut Handle, *const c_char) -> c_int;
    rbd_open_by_id: fn(Handle, *const c_char, *mut Handle, *const c_char) -> c_int;
    rbd_open_read_only: fn(Handle, *const c_char, *mut Handle, *const c_char) -> c_int;
    rbd_open_by_id_read_only: fn(Handle, *const c_char, *mut Handle, *const c_char) -> c_int;
    rbd_close: fn(Handle) -> c_int;
    rbd_stat: fn(Handle, *mut ImageInfoC, usize) -> c_int;
    rbd_get_id: fn(Handle, *mut c_char, usize) -> c_int;
    rbd_get_name: fn(Handle, *mut c_char, *mut usize) -> c_int;
    rbd_get_size: fn(Handle, *mut u64) -> c_int;
    rbd_get_features: fn(Handle, *mut u64) -> c_int;
    rbd_get_create_timestamp: fn(Handle, *mut TimespecC) -> c_int;
    rbd_get_flags: fn(Handle, *mut u64) -> c_int;
    rbd_get_stripe_unit: fn(Handle, *mut u64) -> c_int;
    rbd_get_stripe_count: fn(Handle, *mut u64) -> c_int;
    rbd_get_overlap: fn(Handle, *mut u64) -> c_int;
    rbd_get_parent: fn(Handle, *mut LinkedImageSpecC, *mut SnapSpecC) -> c_int;
    rbd_linked_image_spec_cleanup: fn(*mut LinkedImageSpecC);
    rbd_snap_spec_cleanup: fn(*mut SnapSpecC);
    rbd_list_children3: fn(Handle, *mut LinkedImageSpecC, *mut usize) -> c_int;
    rbd_linked_image_spec_list_cleanup: fn(*mut LinkedImageSpecC, usize);
    rbd_snap_is_protected: fn(Handle, *const c_char, *mut c_int) -> c_int;
    rbd_snap_unprotect: fn(Handle, *const c_char) -> c_int;
    rbd_flatten_with_progress: fn(Handle, Progress, *mut c_void) -> c_int;
    rbd_resize2: fn(Handle, u64, bool, Progress, *mut c_void) -> c_int;
    rbd_snap_list: fn(Handle, *mut SnapInfoC, *mut c_int) -> c_int;
    rbd_snap_list_end: fn(*mut SnapInfoC);
    rbd_snap_get_namespace_type: fn(Handle, u64, *mut c_int) -> c_int;
    rbd_snap_create2: fn(Handle, *const c_char, u32, Progress, *mut c_void) -> c_int;
    rbd_snap_remove_by_id: fn(Handle, u64) -> c_int;
    rbd_snap_set_by_id: fn(Handle, u64) -> c_int;
    rbd_snap_get_limit: fn(Handle, *mut u64) -> c_int;
    rbd_diff_iterate2: fn(Handle, *const c_char, u64, u64, u8, u8, DiffCallback, *mut c_void) -> c_int;
    rbd_aio_create_completion: fn(*mut c_void, AioCallback, *mut Handle) -> c_int;
    rbd_aio_release: fn(Handle);
    rbd_aio_get_return_value: fn(Handle) -> isize;
    rbd_aio_read2: fn(Handle, u64, usize, *mut c_char, Handle, c_int) -> c_int;
    rbd_aio_write2: fn(Handle, u64, usize, *const c_char, Handle, c_int) -> c_int;
    rbd_aio_write_zeroes: fn(Handle, u64, usize, Handle, c_int, c_int) -> c_int;
    rbd_aio_flush: fn(Handle, Handle) -> c_int;
    rbd_metadata_get: fn(Handle, *const c_char, *mut c_char, *mut usize) -> c_int;
    rbd_metadata_set: fn(Handle, *const c_char, *const c_char) -> c_int;
    rbd_metadata_remove: fn(Handle, *const c_char) -> c_int;
    rbd_watchers_list: fn(Handle, *mut WatcherC, *mut usize) -> c_int;
    rbd_watchers_list_cleanup: fn(*mut WatcherC, usize);
    rbd_lock_acquire: fn(Handle, c_int) -> c_int;
    rbd_lock_release: fn(Handle) -> c_int;
    rbd_lock_get_owners: fn(Handle, *mut c_int, *mut *mut c_char, *mut usize) -> c_int;
    rbd_lock_get_owners_cleanup: fn(*mut *mut c_char, usize);
    rbd_config_pool_list: fn(Handle, *mut ConfigOptionC, *mut c_int) -> c_int;
    rbd_config_pool_list_cleanup: fn(*mut ConfigOptionC, c_int);
    rbd_config_image_list: fn(Handle, *mut ConfigOptionC, *mut c_int) -> c_int;
    rbd_config_image_list_cleanup: fn(*mut ConfigOptionC, c_int);
    rbd_mirror_image_get_info: fn(Handle, *mut MirrorInfoC, usize) -> c_int;
    rbd_mirror_image_get_info_cleanup: fn(*mut MirrorInfoC);
    rbd_lock_exclusive: fn(Handle, *const c_char) -> c_int;
    rbd_unlock: fn(Handle, *const c_char) -> c_int;
    rbd_list_lockers: fn(Handle, *mut c_int, *mut c_char, *mut usize, *mut c_char, *mut usize, *mut c_char,
        *mut usize, *mut c_char, *mut usize) -> isize;
}

/// Both libraries.
pub(super) struct Library {
    pub(super) rados: Rados,
    pub(super) rbd: Rbd,
}

/// The libraries, loaded at the first call. Takes some 50 ms then: call it on a thread that may block.
pub(super) fn library() -> Result<&'static Library> {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    if let Some(library) = LIBRARY.get() {
        return Ok(library);
    }
    // Two threads may both load; the second table is dropped, and the libraries stay mapped once.
    let loaded = Library { rados: Rados::load()?, rbd: Rbd::load()? };
    Ok(LIBRARY.get_or_init(|| loaded))
}

/// The progress callback that does nothing and goes on.
pub(super) unsafe extern "C" fn no_progress(_: u64, _: u64, _: *mut c_void) -> c_int {
    0
}

/// The progress callback that counts up and goes on. Its argument points to an [`AtomicU64`] that outlives the call.
pub(super) unsafe extern "C" fn count_progress(_: u64, _: u64, steps: *mut c_void) -> c_int {
    // SAFETY: as said above; the counter is atomic, so that librbd may call from any thread.
    unsafe { &*steps.cast::<AtomicU64>() }.fetch_add(1, Ordering::Relaxed);
    0
}
