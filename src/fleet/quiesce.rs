//! Freezing the writers of a server while its snapshots are made, with a thaw that comes whatever happens.
//!
//! Before the freeze a watchdog is started: a shell in a process group of its own that waits on a pipe for the word that
//! the thaw is done. If the word doesn't come within the limit, or the pipe closes because poolshift is gone, it thaws,
//! and again a few times: a freeze that was under way may get through late, and a thaw may fail once. So a frozen server
//! is thawed after an error, a panic, a dropped future and a `kill -9`. A point whose freeze took longer than its limit is
//! not one: the watchdog may have thawed in its middle.
//!
//! A watchdog that thaws would end the freeze of whoever comes next, another process too. So as long as one is there it
//! has a socket bound to an abstract name of the server's, which all processes in its network namespace see, and a freeze
//! waits until the name is free.

use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt;
use tokio::process::{Child, ChildStdin, Command};

use crate::plan::Quiesce;

/// What the watchdog runs: waits for the word, for at most `$1` seconds, or thaws with the rest of its arguments: at once,
/// a few times soon after, and when a freeze that began with it must have ended. Its standard output is the socket with
/// the server's name, which it keeps and no thaw gets. Before it thaws it closes the pipe: the word comes too late then.
const WATCHDOG: &str = r#"exec 3>&1 >/dev/null; limit=$1; shift
[ "$(timeout "$limit" head -c 6)" = thawed ] && exit
exec </dev/null
for wait in 0 1 2 4 8 "$limit"; do sleep "$wait"; "$@" 3>&-; done"#;

/// For how long after its last limit an earlier watchdog may go on: its waits, and as many thaws.
const WATCHDOG_ENDS_AFTER: Duration = Duration::from_secs(60);
/// How often it is looked whether it has ended.
const STEP: Duration = Duration::from_millis(100);

/// A server could not be frozen, or not be thawed in time.
#[derive(Debug, thiserror::Error)]
pub enum QuiesceError {
    /// A command can't be run at all.
    #[error("{what} of {server}: {command} can't be run")]
    Start {
        /// `freeze`, `thaw` or `watchdog`.
        what: &'static str,
        /// The server.
        server: String,
        /// The command.
        command: String,
        /// Why.
        #[source]
        error: std::io::Error,
    },
    /// A command said no.
    #[error("{what} of {server}: {command} failed ({status}){output}")]
    Failed {
        /// `freeze` or `thaw`.
        what: &'static str,
        /// The server.
        server: String,
        /// The command.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// What it wrote, in brief.
        output: String,
    },
    /// The watchdog of an earlier freeze, of this process or one that is gone, may still thaw the server.
    #[error(
        "{server} can't be frozen: the watchdog of an earlier freeze has not ended after {waited:?}, and may thaw it; \
         look with ps for the thaw that hangs: {command}"
    )]
    EarlierWatchdog {
        /// The server.
        server: String,
        /// For how long its end was waited for.
        waited: Duration,
        /// The thaw.
        command: String,
    },
    /// The watchdog was not there to the end of the freeze.
    #[error(
        "{server} may have been thawed too early: the watchdog of its freeze has ended or thawed it before its limit; \
         this is no point"
    )]
    WatchdogLost {
        /// The server.
        server: String,
    },
    /// The limit on the frozen time has passed; the watchdog has thawed the server.
    #[error(
        "{server} was frozen for longer than its limit of {limit:?}, and thawed: this is no point; raise the limit, or \
         find out why snapshots take so long"
    )]
    TooLong {
        /// The server.
        server: String,
        /// The limit.
        limit: Duration,
    },
}

/// A frozen server. Dropping it thaws it.
#[derive(Debug)]
pub struct Frozen {
    server: String,
    point: String,
    thaw: Vec<String>,
    limit: Duration,
    since: Instant,
    watchdog: Child,
    word: ChildStdin,
}

/// The commands for a freeze and for a thaw, and the limit; `None` where there is nothing to freeze.
fn commands(quiesce: &Quiesce) -> Option<(Vec<String>, Vec<String>, Duration)> {
    let shell = |command: &String| vec!["/bin/sh".to_owned(), "-c".to_owned(), command.clone()];
    match quiesce {
        Quiesce::None => None,
        Quiesce::Command { freeze, thaw, limit } => Some((shell(freeze), shell(thaw), *limit)),
        Quiesce::Virsh { domain, uri, limit } => {
            let virsh = |verb: &str| {
                let mut words = vec!["virsh".to_owned()];
                words.extend(uri.iter().flat_map(|uri| ["--connect".to_owned(), uri.clone()]));
                words.extend([verb.to_owned(), "--domain".to_owned(), domain.clone()]);
                words
            };
            Some((virsh("domfsfreeze"), virsh("domfsthaw"), *limit))
        }
    }
}

/// A command as errors name it. The text of one of the plan's own is left out: errors are shown to everybody who may read
/// the API, and it may have a password in it.
fn shown(words: &[String]) -> String {
    match words {
        [shell, option, _] if (shell.as_str(), option.as_str()) == ("/bin/sh", "-c") => "the plan's command".to_owned(),
        words => words.join(" "),
    }
}

fn command(words: &[String], server: &str, point: &str) -> Command {
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).env("POOLSHIFT_SERVER", server).env("POOLSHIFT_POINT", point);
    command
}

/// The error of a watchdog that can't be started.
fn cannot_start(server: &str, thaw: &[String], error: std::io::Error) -> QuiesceError {
    QuiesceError::Start { what: "watchdog", server: server.to_owned(), command: shown(thaw), error }
}

/// A socket bound to the name that the watchdogs of a server have, once no earlier one has it any more.
async fn name_of(server: &str, thaw: &[String], limit: Duration) -> Result<UnixDatagram, QuiesceError> {
    let of_server = blake3::hash(format!("{server}\0{}", thaw.join("\0")).as_bytes());
    let name = format!("poolshift-freeze-{}", of_server.to_hex());
    let (begun, patience) = (Instant::now(), limit + WATCHDOG_ENDS_AFTER);
    loop {
        match SocketAddr::from_abstract_name(&name).and_then(|name| UnixDatagram::bind_addr(&name)) {
            Ok(bound) => return Ok(bound),
            Err(error) if error.kind() != std::io::ErrorKind::AddrInUse => {
                return Err(cannot_start(server, thaw, error));
            }
            Err(_) if begun.elapsed() >= patience => {
                let (server, command) = (server.to_owned(), shown(thaw));
                return Err(QuiesceError::EarlierWatchdog { server, waited: patience, command });
            }
            Err(_) => tokio::time::sleep(STEP).await,
        }
    }
}

/// Freezes a server; `None` where its plan asks for nothing. On an error the server is thawed again.
pub async fn freeze(quiesce: &Quiesce, server: &str, point: &str) -> Result<Option<Frozen>, QuiesceError> {
    let Some((freeze, thaw, limit)) = commands(quiesce) else { return Ok(None) };
    let name = name_of(server, &thaw, limit).await?;
    let mut words = vec!["/bin/sh".to_owned(), "-c".to_owned(), WATCHDOG.to_owned(), "watchdog".to_owned()];
    words.push(format!("{:.3}", limit.as_secs_f64()));
    words.extend(thaw.iter().cloned());
    // Not later than the watchdog counts from.
    let since = Instant::now();
    // A group of its own: what a terminal or a supervisor sends to poolshift's does not reach it.
    let watchdog = command(&words, server, point)
        .stdin(Stdio::piped())
        .stdout(Stdio::from(std::os::fd::OwnedFd::from(name)))
        .stderr(Stdio::null())
        .process_group(0)
        .spawn();
    let mut watchdog = watchdog.map_err(|error| cannot_start(server, &thaw, error))?;
    let no_pipe = || cannot_start(server, &thaw, std::io::ErrorKind::BrokenPipe.into());
    let word = watchdog.stdin.take().ok_or_else(no_pipe)?;
    let (server, point) = (server.to_owned(), point.to_owned());
    let frozen = Frozen { server, point, thaw, limit, since, watchdog, word };
    match frozen.run("freeze", &freeze).await {
        Ok(()) => Ok(Some(frozen)),
        Err(error) => {
            // It may have frozen a part, or be about to: thawed now, and once more by the watchdog, which gets no word.
            // What the thaw says comes second to why it was needed.
            let _ = frozen.run("thaw", &frozen.thaw).await;
            Err(error)
        }
    }
}

impl Frozen {
    async fn run(&self, what: &'static str, words: &[String]) -> Result<(), QuiesceError> {
        let server = || self.server.clone();
        let start = |error| QuiesceError::Start { what, server: server(), command: shown(words), error };
        let child = command(words, &self.server, &self.point)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(start)?;
        let group = child.id().and_then(|pid| rustix::process::Pid::from_raw(i32::try_from(pid).ok()?));
        let output = match tokio::time::timeout(self.limit, child.wait_with_output()).await {
            Ok(output) => output.map_err(start)?,
            Err(_) => {
                // With all that it has started: what is left of a freeze must not freeze any more.
                if let Some(group) = group {
                    let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
                }
                return Err(QuiesceError::TooLong { server: server(), limit: self.limit });
            }
        };
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(if output.stderr.is_empty() { &output.stdout } else { &output.stderr });
        let said: String = said.trim().chars().take(500).collect();
        let output_text = if said.is_empty() { String::new() } else { format!(": {said}") };
        let command = shown(words);
        Err(QuiesceError::Failed { what, server: server(), command, status: output.status, output: output_text })
    }

    /// Thaws the server. An error means that it was not frozen all the time up to this call, or that the thaw failed;
    /// the watchdog thaws it then as well. Gives back how long the server was frozen.
    pub async fn thaw(mut self) -> Result<Duration, QuiesceError> {
        let in_time = self.since.elapsed() < self.limit;
        let is_there = matches!(self.watchdog.try_wait(), Ok(None));
        // Whatever the watchdog does: a thaw can be repeated.
        self.run("thaw", &self.thaw).await?;
        let frozen_for = self.since.elapsed();
        // Nobody reads it any more where the watchdog thaws.
        let was_there = self.word.write_all(b"thawed").await.is_ok() && is_there;
        let Self { server, limit, mut watchdog, word, .. } = self;
        drop(word);
        let _ = watchdog.wait().await;
        match () {
            () if !in_time => Err(QuiesceError::TooLong { server, limit }),
            () if !was_there => Err(QuiesceError::WatchdogLost { server }),
            () => Ok(frozen_for),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Hooks that write what they do into a file.
    fn hooks(folder: &std::path::Path, freeze: &str, limit: Duration) -> Quiesce {
        let log = folder.join("log");
        let log = log.display();
        Quiesce::Command {
            freeze: format!("echo freeze $POOLSHIFT_SERVER $POOLSHIFT_POINT >> {log}; {freeze}"),
            thaw: format!("echo thaw >> {log}"),
            limit,
        }
    }

    fn log(folder: &std::path::Path) -> String {
        std::fs::read_to_string(folder.join("log")).unwrap_or_default()
    }

    async fn until_thawed(folder: &std::path::Path) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !log(folder).contains("thaw") {
            assert!(Instant::now() < deadline, "nobody thawed: {}", log(folder));
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    #[tokio::test]
    async fn a_freeze_is_thawed_once_and_in_time() {
        let folder = tempfile::tempdir().unwrap();
        let quiesce = hooks(folder.path(), "true", Duration::from_secs(20));
        let frozen = freeze(&quiesce, "web", "p1").await.unwrap().unwrap();
        assert_eq!(log(folder.path()), "freeze web p1\n");
        assert!(frozen.thaw().await.unwrap() < Duration::from_secs(20));
        assert_eq!(log(folder.path()), "freeze web p1\nthaw\n");
        assert!(freeze(&Quiesce::None, "web", "p1").await.unwrap().is_none());
    }

    #[tokio::test]
    async fn dropping_a_frozen_server_thaws_it() {
        let folder = tempfile::tempdir().unwrap();
        let quiesce = hooks(folder.path(), "true", Duration::from_secs(3600));
        drop(freeze(&quiesce, "web", "p1").await.unwrap().unwrap());
        until_thawed(folder.path()).await;
    }

    #[tokio::test]
    async fn a_freeze_beyond_its_limit_is_thawed_and_refused() {
        let folder = tempfile::tempdir().unwrap();
        let quiesce = hooks(folder.path(), "true", Duration::from_secs(3));
        let frozen = freeze(&quiesce, "web", "p1").await.unwrap().unwrap();
        until_thawed(folder.path()).await;
        assert!(matches!(frozen.thaw().await, Err(QuiesceError::TooLong { .. })));
    }

    #[tokio::test]
    async fn a_failed_freeze_is_thawed_and_says_why() {
        let folder = tempfile::tempdir().unwrap();
        let quiesce = hooks(folder.path(), "echo no agent >&2; exit 3", Duration::from_secs(20));
        let error = freeze(&quiesce, "web", "p1").await.unwrap_err();
        assert!(error.to_string().contains("no agent"), "{error}");
        assert!(log(folder.path()).starts_with("freeze web p1\nthaw\n"));
        let quiesce = hooks(folder.path(), "sleep 60", Duration::from_millis(100));
        // Another server: the first one's watchdog is still at it.
        assert!(matches!(freeze(&quiesce, "db", "p2").await, Err(QuiesceError::TooLong { .. })));
    }

    /// The watchdog of a process that is gone thaws several times: whoever freezes next waits until it has ended.
    #[tokio::test]
    async fn a_freeze_waits_for_the_watchdog_of_an_earlier_one() {
        let folder = tempfile::tempdir().unwrap();
        let quiesce = hooks(folder.path(), "true", Duration::from_millis(1500));
        drop(freeze(&quiesce, "web", "p1").await.unwrap().unwrap());
        let quiesce = hooks(folder.path(), "true", Duration::from_secs(300));
        let frozen = freeze(&quiesce, "web", "p2").await.unwrap().unwrap();
        assert_eq!(log(folder.path()), format!("freeze web p1\n{}freeze web p2\n", "thaw\n".repeat(6)));
        frozen.thaw().await.unwrap();
    }

    #[tokio::test]
    async fn a_freeze_whose_watchdog_has_ended_is_no_point() {
        let folder = tempfile::tempdir().unwrap();
        let quiesce = hooks(folder.path(), "true", Duration::from_secs(20));
        let mut frozen = freeze(&quiesce, "web", "p1").await.unwrap().unwrap();
        let watchdog = i32::try_from(frozen.watchdog.id().unwrap()).unwrap();
        let watchdog = rustix::process::Pid::from_raw(watchdog).unwrap();
        rustix::process::kill_process_group(watchdog, rustix::process::Signal::KILL).unwrap();
        frozen.watchdog.wait().await.unwrap();
        assert!(matches!(frozen.thaw().await, Err(QuiesceError::WatchdogLost { .. })));
    }

    #[tokio::test]
    async fn an_error_has_nothing_of_the_text_of_a_command() {
        let folder = tempfile::tempdir().unwrap();
        let quiesce = hooks(folder.path(), "false --password=secret", Duration::from_secs(60));
        let refused = freeze(&quiesce, "web", "p1").await.unwrap_err();
        assert!(matches!(refused, QuiesceError::Failed { .. }), "{refused:?}");
        assert!(!format!("{refused} {refused:?}").contains("secret"), "{refused:?}");
    }

    #[test]
    fn virsh_gets_its_domain_as_one_word() {
        let quiesce =
            Quiesce::Virsh { domain: "a b".into(), uri: Some("qemu:///system".into()), limit: Duration::ZERO };
        let (freeze, thaw, _) = commands(&quiesce).unwrap();
        assert_eq!(freeze, ["virsh", "--connect", "qemu:///system", "domfsfreeze", "--domain", "a b"]);
        assert_eq!(thaw[3], "domfsthaw");
    }
}
