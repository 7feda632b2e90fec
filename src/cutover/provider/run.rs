//! Running an external command to its end: with a limit, a process group of its own, and a bounded memory of what it
//! says.

use std::io;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

/// The most of a command's standard output that is kept, in bytes: the XML of a domain, the block nodes of a QEMU.
const OUTPUT_MAX: usize = 4 << 20;

/// The most of its standard error that is kept, in bytes.
const ERROR_MAX: usize = 4 << 10;

/// How long what a command has written may take to arrive after its end: something that it left running may hold the
/// pipe.
const GRACE: Duration = Duration::from_millis(500);

/// How a command ended, and what it said.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) status: ExitStatus,
    pub(super) output: String,
    /// Whether `output` is not all of it.
    pub(super) cut: bool,
    pub(super) error: String,
}

impl Ended {
    /// How it failed, with what it said of that: `failed (exit status: 1): no such domain`.
    pub(super) fn failure(&self) -> String {
        let said = if self.error.trim().is_empty() { &self.output } else { &self.error };
        format!("failed ({}){}", self.status, also(said))
    }
}

/// Why there is no end to tell of.
#[derive(Debug, thiserror::Error)]
pub(super) enum RunError {
    #[error("it can't be run: {0}")]
    Start(#[from] io::Error),
    #[error("it was not through after {0:?}, and was killed{1}")]
    TooLong(Duration, String),
}

/// Kills a command with all that it has started, unless it has ended.
struct Group(Option<Pid>);

impl Group {
    fn kill(&mut self) {
        if let Some(group) = self.0.take() {
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What was read of a pipe, up to a bound. The rest is read and forgotten, so that no writer waits for ever.
#[derive(Clone, Debug, Default)]
struct Kept {
    bytes: Vec<u8>,
    cut: bool,
}

impl Kept {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }
}

async fn keep(mut pipe: impl AsyncRead + Unpin, max: usize, kept: Arc<Mutex<Kept>>) {
    let mut buffer = [0; 8192];
    while let Ok(length @ 1..) = pipe.read(&mut buffer).await {
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        let room = max.saturating_sub(kept.bytes.len()).min(length);
        kept.bytes.extend_from_slice(&buffer[..room]);
        kept.cut |= room < length;
    }
}

/// Runs a command with `input` as its standard input. Dropped, or after `limit`, it is killed with all that it has
/// started; after its end, what it has left running goes on.
pub(super) async fn run(mut command: Command, input: Vec<u8>, limit: Duration) -> Result<Ended, RunError> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.process_group(0).kill_on_drop(true).spawn()?;
    let mut group = Group(child.id().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?)));
    let (Some(mut stdin), Some(stdout), Some(stderr)) = (child.stdin.take(), child.stdout.take(), child.stderr.take())
    else {
        return Err(io::Error::from(io::ErrorKind::BrokenPipe).into());
    };
    let (output, error) = (Arc::default(), Arc::default());
    let pipes = async {
        let write = async {
            // Who doesn't read its input says why at its end.
            let _ = stdin.write_all(&input).await;
            drop(stdin);
        };
        tokio::join!(write, keep(stdout, OUTPUT_MAX, Arc::clone(&output)), keep(stderr, ERROR_MAX, Arc::clone(&error)));
    };
    tokio::pin!(pipes);
    let ended = tokio::time::timeout(limit, async {
        tokio::select! {
            status = child.wait() => {
                let _ = tokio::time::timeout(GRACE, &mut pipes).await;
                return status;
            }
            // It has closed its pipes, and may still run.
            () = &mut pipes => {}
        }
        child.wait().await
    });
    let said = |kept: &Arc<Mutex<Kept>>| kept.lock().unwrap_or_else(PoisonError::into_inner).clone();
    match ended.await {
        Ok(status) => {
            let status = status?;
            group.0 = None;
            let (output, error) = (said(&output), said(&error));
            Ok(Ended { status, output: output.text(), cut: output.cut, error: error.text() })
        }
        Err(_) => {
            group.kill();
            Err(RunError::TooLong(limit, also(&said(&error).text())))
        }
    }
}

/// What somebody said, after a colon, or nothing.
pub(super) fn also(said: &str) -> String {
    let said = brief(said);
    if said.is_empty() { said } else { format!(": {said}") }
}

/// The beginning of what somebody said, in one line, without what could do something to a terminal.
pub(super) fn brief(said: &str) -> String {
    let words: Vec<&str> = said.split_whitespace().collect();
    words.join(" ").chars().filter(|c| !c.is_control()).take(500).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        command
    }

    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn what_a_command_reads_and_writes_does_not_block_it() {
        let ended = run(shell("cat; echo no >&2; exit 3"), vec![b'x'; 1 << 20], LONG).await.unwrap();
        assert_eq!((ended.output.len(), ended.cut, ended.error.as_str()), (1 << 20, false, "no\n"));
        assert_eq!(ended.status.code(), Some(3));
        let ended = run(shell("head -c 9000000 /dev/zero; exec true"), vec![b'x'; 1 << 20], LONG).await.unwrap();
        assert_eq!((ended.output.len(), ended.cut), (OUTPUT_MAX, true));
        assert!(matches!(run(Command::new("/no/such"), Vec::new(), LONG).await, Err(RunError::Start(_))));
    }

    #[tokio::test]
    async fn what_hangs_is_killed_with_all_that_it_has_started() {
        let folder = tempfile::tempdir().unwrap();
        let pid = folder.path().join("pid");
        let script = format!("sleep 600 & echo $! > {}; echo still here >&2; exec >&- 2>&-; wait", pid.display());
        let error = run(shell(&script), Vec::new(), Duration::from_secs(5)).await.unwrap_err();
        assert!(error.to_string().ends_with("and was killed: still here"), "{error}");
        let pid = std::fs::read_to_string(pid).unwrap();
        let gone = || {
            let status = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
            status.map_or(true, |status| status.contains(") Z "))
        };
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while !gone() {
            assert!(std::time::Instant::now() < deadline, "process {pid} goes on");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    #[tokio::test]
    async fn what_a_command_leaves_running_goes_on_and_keeps_nobody() {
        let ended = run(shell("sleep 30 & echo $!"), Vec::new(), Duration::from_secs(20)).await.unwrap();
        let pid = Pid::from_raw(ended.output.trim().parse().unwrap()).unwrap();
        rustix::process::kill_process(pid, Signal::KILL).expect("it went on");
    }

    #[test]
    fn what_is_quoted_is_short_and_harmless() {
        assert_eq!(also(" \n"), "");
        assert_eq!(also("error: a\n\u{1b}[2Jb\n"), ": error: a [2Jb");
        assert_eq!(brief(&"ä".repeat(10_000)).chars().count(), 500);
    }
}
