//! A stand-in for a server: who has one boot from clones, judges it, and removes it.
//!
//! The `check` of a plan ([`crate::plan::LibvirtRehearsal`], [`crate::plan::OpenStackRehearsal`]) is run by `/bin/sh -c` once
//! the stand-in has booted, or where the plan names nothing that says so, once it was started. With 0 the stand-in is well,
//! and the first words that it prints are told. It has in its environment:
//!
//! | variable | what |
//! |---|---|
//! | `POOLSHIFT_SERVER` | the server's name in the plan |
//! | `POOLSHIFT_STEP` | `check` |
//! | `POOLSHIFT_CONSOLE` | the file with what the stand-in has printed: all of it, or in a cloud the end that Nova keeps |
//! | `POOLSHIFT_DISKS` | as in [`super::command`], with the clones as targets, by the names that they have then |
//! | `POOLSHIFT_DOMAIN` | for libvirt: the stand-in's domain; and `LIBVIRT_DEFAULT_URI`, where the plan names one |
//! | `POOLSHIFT_STAND_IN` | for OpenStack: the stand-in's id |

use std::ffi::OsStr;
use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use tokio::process::Command;

use super::run::{brief, run};
use super::{Precondition, ProviderError, ServerDisk, command};

/// How much of a console's end an error tells, in bytes.
const LAST_WORDS: usize = 300;

/// A throw-away server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StandIn {
    /// What it is called.
    pub name: String,
    /// Which rehearsal it belongs to: no other one has this.
    pub id: String,
    /// The server that it stands in for, by its name in the plan.
    pub server: String,
    /// The disks of that server, with the clones as their targets: it runs from those, and from nothing else.
    pub disks: Vec<ServerDisk>,
}

/// Who has a stand-in boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Boots {
    /// A person, who is told of the clones.
    Person,
    /// A command that has it boot, judges it and removes it.
    Command,
    /// The provider itself; it stays until it is struck.
    Provider,
}

/// A server with the name of a stand-in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Staged {
    /// The rehearsal that it belongs to; `None` if poolshift has not made it.
    pub id: Option<String>,
}

/// How a stand-in is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// It is well, and what says so.
    Well(String),
    /// It is not, and what says so.
    NotWell(String),
    /// Nobody can be asked: a person knows.
    Unknown,
}

/// Has a stand-in boot, and removes it. Left out by a provider, all of it is a person's.
///
/// The driver calls [`Self::rehearsal_preconditions`], [`Self::stage`], [`Self::judge`], and in any case
/// [`Self::strike`], which may as well be called alone, by another process, after a crash anywhere.
#[async_trait]
pub trait Rehearse: Send + Sync {
    /// Who does it.
    fn boots(&self) -> Boots {
        Boots::Person
    }

    /// What the server is called where it runs; `None` where only the plan has a name for it.
    fn runs_as(&self) -> Option<&str> {
        None
    }

    /// Whether a stand-in can be removed from any host, and not only from the one that has made it.
    fn strikes_from_anywhere(&self) -> bool {
        false
    }

    /// Whether the clones are given other names while a stand-in has them. They keep them, for whoever removes them.
    fn renames_clones(&self) -> bool {
        false
    }

    /// How long staging and judging may take.
    fn rehearsal_limit(&self) -> Duration {
        Duration::ZERO
    }

    /// What is in the way. Changes nothing.
    async fn rehearsal_preconditions(&self, _stand_in: &StandIn) -> Vec<Precondition> {
        Vec::new()
    }

    /// Whether there is a server of the stand-in's name, and if so, of which rehearsal it is: of none that is known, where
    /// poolshift has not made it.
    async fn staged(&self, _stand_in: &StandIn) -> Result<Option<Staged>, ProviderError> {
        Ok(None)
    }

    /// Starts it, on no network that the server is on. Gives back what it has not of what the server has.
    async fn stage(&self, _stand_in: &StandIn) -> Result<Vec<String>, ProviderError> {
        Ok(Vec::new())
    }

    /// Waits until it has booted and is known to be well, or not to be. An error says that nobody could find out.
    async fn judge(&self, _stand_in: &StandIn) -> Result<Judgement, ProviderError> {
        Ok(Judgement::Unknown)
    }

    /// Removes it, with all that it has left but its disks. Gone already is no error; one of the same name that is of
    /// another rehearsal, or of none, is left alone, which is no error either.
    async fn strike(&self, _stand_in: &StandIn) -> Result<(), ProviderError> {
        Ok(())
    }
}

/// Runs the `check` of a plan; `more` is more of its environment.
pub(super) async fn check(
    script: &str,
    stand_in: &StandIn,
    (console, more): (&Path, &[(&str, &OsStr)]),
    limit: Duration,
) -> Judgement {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", script]).env("POOLSHIFT_STEP", "check").env("POOLSHIFT_SERVER", &stand_in.server);
    command.env("POOLSHIFT_CONSOLE", console).env("POOLSHIFT_DISKS", command::list(&stand_in.disks));
    command.envs(more.iter().copied());
    let ended = match run(command, Vec::new(), limit).await {
        Ok(ended) => ended,
        Err(error) => return Judgement::NotWell(format!("{script:?}: {error}")),
    };
    if ended.status.success() {
        let said = brief(&ended.output);
        return Judgement::Well(if said.is_empty() { "its check said so".into() } else { said });
    }
    Judgement::NotWell(format!("{script:?} {}", ended.failure()))
}

/// The last words of a console, for an error.
pub(super) fn last_words(console: &[u8]) -> String {
    let words = brief(&String::from_utf8_lossy(&console[console.len().saturating_sub(LAST_WORDS)..]));
    if words.is_empty() { "; its console shows nothing".into() } else { format!("; its console ends: {words}") }
}
