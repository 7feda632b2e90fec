//! Who works on a target, told well enough that another process can judge whether the holder is still alive.
//!
//! A judgement needs the holder's own view of the processes: containers on one host share its boot id, may share its
//! name, and have process ids, and with a time namespace start times, of their own (pid_namespaces(7),
//! time_namespaces(7)). So the namespaces belong to the record, and in another one nobody is known dead.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The process that holds a lease. A process is named by host, boot, pid *and* start time, because pids come again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseOwner {
    /// The host's name.
    pub host: String,
    /// The kernel's boot id (`/proc/sys/kernel/random/boot_id`).
    pub boot_id: String,
    /// The process id.
    pub pid: u32,
    /// When the process started, in clock ticks since boot (field 22 of `/proc/PID/stat`).
    pub start_ticks: u64,
    /// The namespaces in which pid and start time mean something: the links of `/proc/self/ns/pid` and `…/time`. `None`
    /// where they can't be read, or where `/proc` shows another namespace than the process's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespaces: Option<String>,
    /// Since when it holds the lease, RFC 3339.
    pub since: String,
    /// What the backend calls it (RBD: the lock owner's address), to match state with the lock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<String>,
}

impl LeaseOwner {
    /// This process, from now on.
    pub fn current() -> std::io::Result<Self> {
        let pid = std::process::id();
        Ok(Self {
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            boot_id: boot_id()?,
            pid,
            start_ticks: std::fs::read_to_string(format!("/proc/{pid}/stat"))
                .ok()
                .and_then(|stat| Some(parse_stat(&stat)?.1))
                .ok_or_else(|| std::io::Error::other(format!("/proc/{pid}/stat can't be read")))?,
            namespaces: namespaces(),
            since: jiff::Timestamp::now().to_string(),
            client: None,
        })
    }

    /// Whether a text is how one of these is shown: then the holder is a poolshift, which gives a lease back when it is
    /// done.
    pub fn is_description(text: &str) -> bool {
        text.starts_with("process ")
    }

    /// Whether it has said who it is: what has not is something other than poolshift, or has just begun.
    pub fn is_known(&self) -> bool {
        self.pid != 0
    }

    /// Whether the holder is certainly dead: it ran on this host in this boot and in these namespaces, and no such
    /// process is left. Any doubt is `false`.
    pub fn is_known_dead(&self) -> bool {
        self.is_of_this_host()
            && boot_id().is_ok_and(|boot| boot == self.boot_id)
            && self.namespaces.is_some()
            && self.namespaces == namespaces()
            && !may_run(self.pid, self.start_ticks)
    }

    /// Whether it ran on a host of this name, in another boot. Another host may have the same name: a look at who has
    /// the image open has to confirm that it is gone.
    pub fn is_of_another_boot_here(&self) -> bool {
        self.is_of_this_host() && boot_id().is_ok_and(|boot| boot != self.boot_id)
    }

    /// Whether it ran on a host of this name.
    pub fn is_of_this_host(&self) -> bool {
        rustix::system::uname().nodename().to_string_lossy() == self.host
    }
}

impl fmt::Display for LeaseOwner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.is_known() {
            let at = self.client.as_ref().map(|client| format!(" at {client}")).unwrap_or_default();
            return write!(f, "a client{at} that is not poolshift, or has just begun");
        }
        write!(f, "process {} on {} since {}", self.pid, self.host, self.since)?;
        self.client.as_ref().map_or(Ok(()), |client| write!(f, " ({client})"))
    }
}

fn boot_id() -> std::io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// See [`LeaseOwner::namespaces`].
fn namespaces() -> Option<String> {
    // With another namespace's /proc mounted, "self" is another number, or nothing.
    let own = std::fs::read_link("/proc/self").ok()?;
    let link = |name: &str| std::fs::read_link(format!("/proc/self/ns/{name}")).ok();
    let pid = link("pid").filter(|_| own.to_str() == Some(&std::process::id().to_string()))?;
    // Kernels before 5.6 have no time namespaces.
    let time = link("time").unwrap_or_default();
    Some(format!("{} {}", pid.display(), time.display()).trim_end().to_owned())
}

/// Whether a process may be running that has this id and started then.
fn may_run(pid: u32, started: u64) -> bool {
    match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        // Of a zombie nothing is left but its exit status: it can write nothing any more.
        Ok(stat) => parse_stat(&stat).is_none_or(|(state, ticks)| ticks == started && !matches!(state, "Z" | "X")),
        // /proc mounted with `hidepid` hides the processes of others; signalling one of them gives EPERM.
        Err(_) => i32::try_from(pid)
            .ok()
            .and_then(rustix::process::Pid::from_raw)
            .is_none_or(|pid| rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH)),
    }
}

/// The state and the start time in a `/proc/PID/stat`.
fn parse_stat(stat: &str) -> Option<(&str, u64)> {
    // The second field, the command in parentheses, may hold anything: count from behind its last parenthesis.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    Some((fields.next()?, fields.nth(18)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_dead_only_when_it_is_surely_gone() {
        let me = LeaseOwner::current().unwrap();
        assert!(!me.is_known_dead());
        assert!(LeaseOwner { start_ticks: me.start_ticks + 1, ..me.clone() }.is_known_dead());
        assert!(!LeaseOwner { host: "elsewhere".into(), pid: u32::MAX, ..me.clone() }.is_known_dead());
        assert!(!LeaseOwner { boot_id: "another".into(), pid: u32::MAX, ..me.clone() }.is_known_dead());
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let dead = LeaseOwner { pid: child.id(), start_ticks: 1, ..me };
        child.wait().unwrap();
        assert!(dead.is_known_dead());
        for pid in [0, u32::MAX] {
            assert!(!LeaseOwner { pid, ..dead.clone() }.is_known_dead());
        }
        for namespaces in [None, Some(String::new()), Some("pid:[1] time:[1]".into())] {
            assert!(!LeaseOwner { namespaces, ..dead.clone() }.is_known_dead());
        }
    }

    #[test]
    fn a_record_without_namespaces_is_read_and_never_known_dead() {
        let record = r#"{"host":"h","boot_id":"b","pid":7,"start_ticks":1,"since":"s"}"#;
        let owner: LeaseOwner = serde_json::from_str(record).unwrap();
        assert_eq!(serde_json::to_string(&owner).unwrap(), record);
        let me = LeaseOwner::current().unwrap();
        assert!(me.namespaces.as_ref().is_some_and(|names| names.starts_with("pid:[")));
        let gone = LeaseOwner { start_ticks: me.start_ticks + 1, ..me };
        assert!(gone.is_known_dead() && !LeaseOwner { namespaces: None, ..gone }.is_known_dead());
    }

    #[test]
    fn a_command_may_look_like_the_rest_of_the_line() {
        let rest = " 1 1 1 0 -1 4194560 1 1 0 0 0 0 0 0 20 0 1 0 777 1 1";
        for command in ["a", "x) Z 9", ") ) (", "a\nb"] {
            assert_eq!(parse_stat(&format!("7 ({command}) S{rest}")), Some(("S", 777)));
        }
        for bad in ["", "7 (a", "7 (a) S", "7 (a) S 1 1 1 0 -1 4194560 1 1 0 0 0 0 0 0 20 0 1 0 x"] {
            assert_eq!(parse_stat(bad), None);
        }
    }
}
