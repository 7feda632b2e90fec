//! A server that is stopped, given its disks and started by the operator's own commands.
//!
//! # The contract
//!
//! A command is run by `/bin/sh -c`, in a process group of its own, with an empty standard input, and with this in its
//! environment:
//!
//! | variable | what |
//! |---|---|
//! | `POOLSHIFT_SERVER` | the server's name in the plan |
//! | `POOLSHIFT_STEP` | `quiesce`, `stop`, `swap`, `start`, `undo`, `state` or `rehearse` |
//! | `POOLSHIFT_SIDE` | `source` or `target`: the side to go to. Not set for `quiesce`, `stop` and `state` |
//! | `POOLSHIFT_FRESH` | `1` or `0`, for `start` and `undo`: whether the disks are not what the server left |
//! | `POOLSHIFT_DISKS` | a JSON list of `{"volume": "…", "boot": true, "source": "rbd:…", "target": "rbd:…"}` |
//!
//! With `POOLSHIFT_FRESH=1` nothing that was kept of the server, a memory or a cache, may be used.
//!
//! It ends with 0 when what it is for is true, and with anything else when it is not, or when that can't be found out;
//! what it writes on its standard error is then quoted. One that has not ended within the limit is killed with all that
//! it has started in its process group, and has failed. A process that it leaves running for good belongs into a
//! session of its own (`setsid`), and must not hold its output.
//!
//! Every command must be *repeatable*: it may be killed at any point, and be run again then, or after it was done, on
//! this host or another, and ends in the same state. What was done already is no error.
//!
//! - **quiesce** has the writers come to rest, so that little is left to write at the stop. The server may go on.
//! - **stop** has the server stopped, or has it let go of its disks: nothing is written after it, and all that was
//!   written and acknowledged is on the disks of the side that it runs from. It may return before that is so, since
//!   `state` is asked until it says so.
//! - **swap** has the stopped server's configuration name the disks of `POOLSHIFT_SIDE`. It starts nothing.
//! - **start** has it run from the disks of `POOLSHIFT_SIDE`, and takes back what `quiesce` did. It may return early,
//!   as `stop` may. If the server runs there, it only has its writers go on.
//! - **undo**, where it is given, takes the place of `swap` and `start` on the way back before the commit. It may find
//!   the server in any state: still running because it was never stopped, stopped, swapped, or started in vain.
//! - **state** prints one line, `POWER SIDE`. It must ask whoever runs the server, not remember what was done last.
//!   - POWER: `running`; `suspended`, it stands still with its disks open; `saved`, its memory is kept and its disks
//!     are closed; `off`.
//!   - SIDE: `source` or `target`, of the disks that it has open, or will start from; `unknown` if they are neither all
//!     here nor all there.
//! - **rehearse** has a throw-away server boot from the clones that `POOLSHIFT_DISKS` names as `target`, check itself,
//!   and be removed again. It must touch nothing of the real server. With 0 the stand-in was well; the first words that
//!   it prints are told. After it the clones are removed: nothing may have them open. Ctrl-C does not end it: it is waited
//!   for, within its limit.
//!
//! A gateway that keeps its data in the images on SATA, for example: `quiesce` pauses its sync, `stop` flushes it and
//! closes the images, `swap` writes the other pool into its configuration, `start` opens the images there and goes on.

use std::time::{Duration, Instant};

use async_trait::async_trait;
use serde_json::json;
use tokio::process::Command;

use super::rehearse::{Boots, Judgement, Rehearse, StandIn};
use super::run::{brief, run};
use super::{Notes, Observed, Power, Precondition, Provider, ProviderError, ServerDisk, Side, Verdict, name};
use crate::failpoint::failpoint;
use crate::plan::CommandCutover;

/// How often `state` is asked while an effect is waited for.
const POLL: Duration = Duration::from_millis(500);

/// A server that is cut over by commands.
#[derive(Debug)]
pub struct Commands {
    server: String,
    disks: Vec<ServerDisk>,
    commands: CommandCutover,
}

impl Commands {
    /// The server of that name, with its disks.
    pub fn new(server: impl Into<String>, disks: Vec<ServerDisk>, commands: CommandCutover) -> Self {
        Self { server: server.into(), disks, commands }
    }

    fn error(&self, operation: impl Into<String>, problem: String, hint: Option<&str>) -> ProviderError {
        let (operation, server) = (operation.into(), format!("server {}", self.server));
        ProviderError { operation, server, problem, hint: hint.map(str::to_owned) }
    }

    /// Runs a command and gives back what it wrote.
    async fn run(
        &self,
        step: &'static str,
        script: &str,
        side: Option<Side>,
        fresh: Option<bool>,
        disks: &[ServerDisk],
    ) -> Result<String, ProviderError> {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]).env("POOLSHIFT_SERVER", &self.server).env("POOLSHIFT_STEP", step);
        command.env("POOLSHIFT_DISKS", list(disks));
        for (key, value) in
            [("POOLSHIFT_SIDE", side.map(name)), ("POOLSHIFT_FRESH", fresh.map(|fresh| if fresh { "1" } else { "0" }))]
        {
            match value {
                Some(value) => command.env(key, value),
                None => command.env_remove(key),
            };
        }
        let operation = || side.map_or_else(|| step.to_owned(), |side| format!("{step} on the {}", name(side)));
        let hint = "run the command of the plan by hand; src/cutover/provider/command.rs has its contract";
        let ended = run(command, Vec::new(), self.commands.limit).await;
        let ended = ended.map_err(|error| self.error(operation(), format!("{script:?}: {error}"), Some(hint)))?;
        if !ended.status.success() {
            let problem = format!("{script:?} {}", ended.failure());
            return Err(self.error(operation(), problem, Some(hint)));
        }
        Ok(ended.output)
    }

    async fn step(
        &self,
        step: &'static str,
        script: &str,
        side: Option<Side>,
        fresh: Option<bool>,
    ) -> Result<(), ProviderError> {
        self.run(step, script, side, fresh, &self.disks).await?;
        failpoint!("command.{step}");
        Ok(())
    }

    /// Asks for the state until it is what it should be.
    async fn until(&self, operation: &str, wanted: &str, is: impl Fn(&Observed) -> bool) -> Result<(), ProviderError> {
        let deadline = Instant::now() + self.commands.limit;
        loop {
            let observed = self.state().await?;
            if is(&observed) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                let limit = self.commands.limit;
                let problem = format!("after {limit:?} the server is {}, and not {wanted}", told(&observed));
                return Err(self.error(operation, problem, Some("see what keeps it, or raise the limit in the plan")));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    async fn state(&self) -> Result<Observed, ProviderError> {
        let output = self.run("state", &self.commands.state, None, None, &self.disks).await?;
        parse(&output).ok_or_else(|| {
            let problem = format!("{:?} printed {:?}", self.commands.state, brief(&output));
            let hint = "it has to print one line: running, suspended, saved or off, and source, target or unknown";
            self.error("state", problem, Some(hint))
        })
    }
}

fn told(observed: &Observed) -> String {
    format!("{} {}", observed.power, observed.side.map_or("unknown", name))
}

pub(super) fn list(disks: &[ServerDisk]) -> String {
    let disk = |disk: &ServerDisk| {
        let ServerDisk { volume, source, target, boot, target_in_use: _ } = disk;
        json!({"volume": volume, "boot": boot, "source": source.to_string(), "target": target.to_string()})
    };
    serde_json::Value::from(disks.iter().map(disk).collect::<Vec<_>>()).to_string()
}

fn parse(output: &str) -> Option<Observed> {
    let line = output.strip_suffix('\n').unwrap_or(output);
    let (power, side) = line.split_once(' ')?;
    let power = match power {
        "running" => Power::Running,
        "suspended" => Power::Suspended,
        "saved" => Power::Saved,
        "off" => Power::Off,
        _ => return None,
    };
    let side = match side {
        "source" => Some(Side::Source),
        "target" => Some(Side::Target),
        "unknown" => None,
        _ => return None,
    };
    Some(Observed { power, side })
}

#[async_trait]
impl Rehearse for Commands {
    fn boots(&self) -> Boots {
        if self.commands.rehearse.is_some() { Boots::Command } else { Boots::Person }
    }

    fn rehearsal_limit(&self) -> Duration {
        self.commands.limit
    }

    async fn judge(&self, stand_in: &StandIn) -> Result<Judgement, ProviderError> {
        let Some(script) = &self.commands.rehearse else { return Ok(Judgement::Unknown) };
        Ok(match self.run("rehearse", script, Some(Side::Target), None, &stand_in.disks).await {
            Ok(said) if brief(&said).is_empty() => Judgement::Well("its command said so".to_owned()),
            Ok(said) => Judgement::Well(brief(&said)),
            Err(error) => Judgement::NotWell(error.problem),
        })
    }
}

#[async_trait]
impl Provider for Commands {
    fn describe(&self) -> String {
        "commands of the plan".into()
    }

    async fn preconditions(&self, from: Side) -> Vec<Precondition> {
        let what = format!("server {}", self.server);
        let (verdict, found) = match self.state().await {
            Err(error) => {
                let hint = error.hint.map(|hint| format!("; {hint}")).unwrap_or_default();
                (Verdict::Error, format!("{}{hint}", error.problem))
            }
            Ok(observed @ Observed { power: Power::Running, side: Some(side) }) if side == from => {
                (Verdict::Ok, told(&observed))
            }
            Ok(observed @ Observed { power: Power::Off, side: Some(side) }) if side == from => {
                (Verdict::Warning, format!("{}: it will be started at the end", told(&observed)))
            }
            Ok(observed) => {
                let found = format!("its state is {:?}, and has to be \"running {}\"", told(&observed), name(from));
                (Verdict::Error, format!("{found}; start it there, or correct the command"))
            }
        };
        vec![Precondition::new(what, verdict, found)]
    }

    async fn observe(&self, _notes: &Notes) -> Result<Observed, ProviderError> {
        self.state().await
    }

    async fn prepare(&self, _from: Side, _notes: &mut Notes) -> Result<(), ProviderError> {
        Ok(())
    }

    async fn quiesce(&self, _notes: &mut Notes) -> Result<(), ProviderError> {
        if let Some(quiesce) = &self.commands.quiesce {
            self.step("quiesce", quiesce, None, None).await?;
        }
        self.step("stop", &self.commands.stop, None, None).await?;
        self.until("stop", "stopped", |observed| observed.power != Power::Running).await
    }

    async fn finish_stop(&self, notes: &mut Notes) -> Result<(), ProviderError> {
        self.quiesce(notes).await
    }

    async fn swap(&self, to: Side, _notes: &mut Notes) -> Result<(), ProviderError> {
        self.step("swap", &self.commands.swap, Some(to), None).await
    }

    async fn start(&self, on: Side, fresh: bool, _notes: &mut Notes) -> Result<(), ProviderError> {
        self.step("start", &self.commands.start, Some(on), Some(fresh)).await?;
        self.until_running("start", on).await
    }

    async fn undo(&self, from: Side, fresh: bool, notes: &mut Notes) -> Result<(), ProviderError> {
        let Some(undo) = &self.commands.undo else {
            // One that was never stopped keeps its configuration; `start` takes back what `quiesce` did.
            if self.state().await? != (Observed { power: Power::Running, side: Some(from) }) {
                self.swap(from, notes).await?;
            }
            return self.start(from, fresh, notes).await;
        };
        self.step("undo", undo, Some(from), Some(fresh)).await?;
        self.until_running("undo", from).await
    }

    async fn settle(&self, _on: Side, _notes: &mut Notes) -> Result<Vec<String>, ProviderError> {
        Ok(Vec::new())
    }
}

impl Commands {
    async fn until_running(&self, operation: &str, on: Side) -> Result<(), ProviderError> {
        let wanted = Observed { power: Power::Running, side: Some(on) };
        self.until(operation, &told(&wanted), |observed| *observed == wanted).await
    }
}

#[cfg(test)]
#[path = "command_tests.rs"]
mod tests;
