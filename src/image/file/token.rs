//! How a file looks from outside, so that a later look tells whether somebody wrote to it.
//!
//! A regular file has times which every write moves. Up to Linux 6.12 they move in ticks of 1 to 10 ms, so that a
//! write right after a look may leave them as they were: [`settled`] therefore waits until the last change is older
//! than any tick. A block device has no such times; there the token only says which device it is, because the name
//! `/dev/sdb` may mean another disk after a reboot.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::raw;

/// Twice the longest tick of a Linux kernel (`CONFIG_HZ=100`).
const TICK_MAX: Duration = Duration::from_millis(20);

/// How often [`settled`] looks at a file that somebody keeps writing.
const ATTEMPTS: u32 = 3;

/// How a file looked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Token {
    /// Bytes.
    pub(super) size: u64,
    /// 0 for a device.
    pub(super) inode: u64,
    /// The last change of the content, nanoseconds since 1970; 0 for a device.
    pub(super) mtime_ns: i64,
    /// The last change of content or attributes, which no program can set; 0 for a device.
    pub(super) ctime_ns: i64,
    /// What identifies a device.
    pub(super) device: Option<String>,
}

impl Token {
    /// The file as it looks now.
    pub(super) fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            let device = Some(device_fingerprint(metadata.rdev())?);
            return Ok(Self { size: raw::size(file)?, inode: 0, mtime_ns: 0, ctime_ns: 0, device });
        }
        let ns = |seconds: i64, ns: i64| seconds.saturating_mul(1_000_000_000).saturating_add(ns);
        Ok(Self {
            size: metadata.len(),
            inode: metadata.ino(),
            mtime_ns: ns(metadata.mtime(), metadata.mtime_nsec()),
            ctime_ns: ns(metadata.ctime(), metadata.ctime_nsec()),
            device: None,
        })
    }

    /// How long until a further write is sure to leave another time; `None` if that is so already. A time in the
    /// future (a clock that was set back, another host's clock) is not waited for.
    fn unsettled_for(&self) -> Option<Duration> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
        let changed = Duration::from_nanos(u64::try_from(self.ctime_ns).ok().filter(|&ns| ns > 0)?);
        TICK_MAX.checked_sub(now.checked_sub(changed)?).filter(|wait| !wait.is_zero())
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { size, inode, mtime_ns, ctime_ns, device } = self;
        write!(f, "inode {inode}, {size} bytes, written {mtime_ns}, changed {ctime_ns}")?;
        device.as_ref().map_or(Ok(()), |device| write!(f, ", {device}"))
    }
}

/// The file as it looks when its last change is older than a tick; as it looks after some 60 ms if it is written all
/// the time, in which case later writes show anyway. Blocks.
pub(super) fn settled(file: &File) -> io::Result<Token> {
    let mut token = Token::of(file)?;
    for _ in 0..ATTEMPTS {
        let Some(wait) = token.unsettled_for() else { break };
        std::thread::sleep(wait);
        token = Token::of(file)?;
    }
    Ok(token)
}

/// What tells this block device from others across reboots, from sysfs; where the driver names nothing of the kind,
/// its number and the boot, so that the device counts as another one after a reboot.
fn device_fingerprint(rdev: u64) -> io::Result<String> {
    let number = format!("{}:{}", rustix::fs::major(rdev), rustix::fs::minor(rdev));
    let mut folder = fs::canonicalize(Path::new("/sys/dev/block").join(&number))?;
    let mut parts = Vec::new();
    if let (Ok(partition), Ok(start)) = (read(&folder, "partition"), read(&folder, "start")) {
        parts.push(format!("partition {partition} at {start}"));
        folder.pop();
    }
    let names = [
        "wwid",
        "device/wwid",
        "serial",
        "device/serial",
        "dm/uuid",
        "md/uuid",
        "loop/backing_file",
        "device/config_info",
    ];
    let named: Vec<String> = names
        .iter()
        .filter_map(|name| read(&folder, name).ok().filter(|value| !value.is_empty()).map(|v| format!("{name} {v}")))
        .collect();
    if named.is_empty() {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        parts.push(format!("device {number} in boot {}", boot.trim()));
    }
    parts.extend(named);
    Ok(parts.join(", "))
}

fn read(folder: &Path, name: &str) -> io::Result<String> {
    Ok(fs::read_to_string(folder.join(name))?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn a_write_right_after_the_look_is_noticed() {
        let file = tempfile::tempfile().unwrap();
        for round in 0..20 {
            file.write_all_at(b"mine", 0).unwrap();
            let token = settled(&file).unwrap();
            assert_eq!(token, Token::of(&file).unwrap());
            file.write_all_at(b"your", 0).unwrap();
            assert_ne!(token, Token::of(&file).unwrap(), "round {round}");
        }
    }

    #[test]
    fn a_time_in_the_future_is_not_waited_for() {
        let token = Token { size: 0, inode: 0, mtime_ns: 0, ctime_ns: i64::MAX, device: None };
        assert_eq!(token.unsettled_for(), None);
        assert_eq!(Token { ctime_ns: -5, ..token }.unsettled_for(), None);
    }
}
