//! librbd's own limits: QoS settings that hold back what a client asks for.

use std::ffi::{CStr, c_int};
use std::ptr;

use rustix::io::Errno;

use super::library::{ConfigOptionC, library};
use super::{Image, Pool, Result, check};

/// Where a setting comes from; each overrides those before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ConfigLevel {
    /// The client's configuration file, or the monitors' configuration.
    Client,
    /// `rbd config pool set`
    Pool,
    /// `rbd config image set`
    Image,
}

/// A limit that is in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct QosLimit {
    /// Such as `rbd_qos_read_bps_limit`.
    pub(crate) option: String,
    /// Bytes or requests a second.
    pub(crate) value: u64,
    pub(crate) level: ConfigLevel,
}

/// librbd 16.2 has about 70 options.
const OPTIONS: usize = 256;

impl Image {
    /// The limits of requests to this image. Blocks.
    pub(crate) fn qos_limits(&self) -> Result<Vec<QosLimit>> {
        let rbd = self.rbd()?;
        list("rbd_config_image_list", rbd.rbd_config_image_list_cleanup, |options, count| {
            // SAFETY: the image is open, the list has room for as many as said.
            unsafe { (rbd.rbd_config_image_list)(self.raw.0, options, count) }
        })
    }
}

impl Pool {
    /// The limits of images of this pool that have none of their own. Blocks.
    pub(crate) fn qos_limits(&self) -> Result<Vec<QosLimit>> {
        let rbd = &library()?.rbd;
        list("rbd_config_pool_list", rbd.rbd_config_pool_list_cleanup, |options, count| {
            // SAFETY: the pool is open, the list has room for as many as said.
            unsafe { (rbd.rbd_config_pool_list)(self.raw.0, options, count) }
        })
    }
}

fn list(
    function: &'static str,
    clean_up: unsafe extern "C" fn(*mut ConfigOptionC, c_int),
    list: impl Fn(*mut ConfigOptionC, &mut c_int) -> c_int,
) -> Result<Vec<QosLimit>> {
    let mut room = OPTIONS;
    let (options, found) = loop {
        let mut options = vec![ConfigOptionC { name: ptr::null_mut(), value: ptr::null_mut(), source: 0 }; room];
        let mut found = c_int::try_from(room).unwrap_or(c_int::MAX);
        match check(function, list(options.as_mut_ptr(), &mut found)) {
            // It says how many there are.
            Err(error) if error.is(Errno::RANGE) && room < 16 * OPTIONS => room *= 4,
            listed => {
                listed?;
                break (options, found);
            }
        }
    };
    let filled = usize::try_from(found).unwrap_or(0).min(options.len());
    // SAFETY: librbd filled in as many names and values that end with NUL.
    let text = |text| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
    let limits =
        options[..filled].iter().filter_map(|option| limit(text(option.name), &text(option.value), option.source));
    let limits = limits.collect();
    let mut options = options;
    // SAFETY: the entries were filled in by librbd.
    unsafe { clean_up(options.as_mut_ptr(), found) };
    Ok(limits)
}

/// The limit that an option sets; 0 sets none.
fn limit(option: String, value: &str, source: c_int) -> Option<QosLimit> {
    let value = value.parse().ok().filter(|value| *value > 0)?;
    // `rbd_config_source_t`
    let level = match source {
        0 => ConfigLevel::Client,
        1 => ConfigLevel::Pool,
        _ => ConfigLevel::Image,
    };
    (option.starts_with("rbd_qos_") && option.ends_with("_limit")).then_some(QosLimit { option, value, level })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_limits_that_are_set_count() {
        let of = |option: &str, value: &str| limit(option.into(), value, 1);
        let limit = QosLimit { option: "rbd_qos_bps_limit".into(), value: 5, level: ConfigLevel::Pool };
        assert_eq!(of("rbd_qos_bps_limit", "5"), Some(limit));
        for (option, value) in [
            ("rbd_qos_bps_limit", "0"),
            ("rbd_qos_bps_limit", "x"),
            ("rbd_qos_bps_burst", "5"),
            ("rbd_cache_limit", "5"),
        ] {
            assert_eq!(of(option, value), None, "{option} = {value}");
        }
    }
}
