//! Who stops and starts a server, and names its disks: one contract, and the ways of doing it.
//!
//! # The contract
//!
//! The driver calls, in this order: [`Provider::preconditions`], [`Provider::prepare`], [`Provider::quiesce`],
//! [`Provider::swap`], [`Provider::start`], [`Provider::settle`]. Each may be called again at any time, by this process or
//! by one on another host, after a crash in its middle as well, and then ends in the same state; what was done already is
//! no error. To go back before the commit, the driver calls [`Provider::undo`] instead of what is left.
//!
//! **Truth.** [`Provider::observe`] asks the hypervisor, and nothing that poolshift has noted down.
//!
//! **Effect, not answer.** A call returns when what it is for is true, not when it was asked for: a cloud that answers yes
//! and fails later is polled until the effect is there, or the provider's own limit has passed.
//!
//! **Notes.** What a provider must remember over a crash (the definition as it was, where the memory was saved) it leaves
//! in [`Notes`]; the driver stores them in its journal before it calls the next step.
//!
//! **Cancellation.** A dropped call is like a crash in its middle.
//!
//! The contract of the commands that [`crate::plan::CommandCutover`] has is in [`command`]; that of rehearsals in
//! [`rehearse`].

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::image::ImageSpec;
use crate::plan::{self, Cutover, Method};
pub use crate::replicate::state::Side;

pub mod command;
pub mod libvirt;
pub mod none;
pub mod openstack;
pub mod rehearse;
mod run;

pub use command::Commands;
pub use libvirt::Libvirt;
pub use none::ByHand;
pub use openstack::OpenStack;
use rehearse::Rehearse;

/// A volume of a server, with where it is on both sides, by the names that it has while it is in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerDisk {
    /// The volume's name in the plan.
    pub volume: String,
    /// Its image on the side that is left.
    pub source: ImageSpec,
    /// Its image on the side that the server is to run from.
    pub target: ImageSpec,
    /// The name that this has while a server uses it, where that is another one than while it is replicated.
    pub target_in_use: Option<ImageSpec>,
    /// Whether the server boots from it.
    pub boot: bool,
}

impl ServerDisk {
    /// The image on that side.
    pub fn on(&self, side: Side) -> &ImageSpec {
        match side {
            Side::Source => &self.source,
            Side::Target => &self.target,
        }
    }
}

/// A side, for people and for commands.
fn name(side: Side) -> &'static str {
    match side {
        Side::Source => "source",
        Side::Target => "target",
    }
}

/// What a server is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Power {
    /// It runs.
    Running,
    /// It is in memory and stands still; its disks are open.
    Suspended,
    /// Its memory was saved, and its disks are closed.
    Saved,
    /// It is off.
    Off,
}

impl std::fmt::Display for Power {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Running => "running",
            Self::Suspended => "suspended",
            Self::Saved => "saved",
            Self::Off => "off",
        })
    }
}

/// What is true of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observed {
    /// What it is doing.
    pub power: Power,
    /// Which side its disks are on: those that it has open if it is in memory, those that it will start from otherwise.
    /// `None` where they are neither all here nor all there, or nobody can tell.
    pub side: Option<Side>,
}

/// What a provider remembers over a crash, by keys of its own. At most 40 KiB in all.
pub type Notes = BTreeMap<String, String>;

/// Whether something stands in the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// All is well.
    Ok,
    /// It goes on, and somebody should know.
    Warning,
    /// It does not begin.
    Error,
}

/// Something that has to be so before a server is stopped.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Precondition {
    /// What was looked at: `domain web-1`.
    pub what: String,
    /// How it is.
    pub verdict: Verdict,
    /// What was found, and what to do about it if that is not well.
    pub found: String,
}

impl Precondition {
    /// A precondition as it was found.
    pub fn new(what: impl Into<String>, verdict: Verdict, found: impl Into<String>) -> Self {
        Self { what: what.into(), verdict, found: found.into() }
    }

    /// One that could not be looked at, which is as bad as one that is not so.
    pub fn failed(what: impl Into<String>, error: ProviderError) -> Self {
        let hint = error.hint.map(|hint| format!("; {hint}")).unwrap_or_default();
        Self::new(what, Verdict::Error, format!("{}{hint}", error.problem))
    }
}

/// A provider could not do, or find out, something.
#[derive(Debug, thiserror::Error)]
#[error("{operation} of {server}: {problem}")]
pub struct ProviderError {
    /// What was wanted: `save`, `start on the target`.
    pub operation: String,
    /// The server, as the provider calls it: `domain web-1`.
    pub server: String,
    /// What happened, with what a command wrote.
    pub problem: String,
    /// What to do about it.
    pub hint: Option<String>,
}

/// Stops and starts one server, and names its disks.
#[async_trait]
pub trait Provider: Rehearse + Debug {
    /// For people: `libvirt domain web-1, warm`.
    fn describe(&self) -> String;

    /// Whether the server, once quiesced, still has the disks open that it is about to leave (a suspended one).
    fn stays_open(&self) -> bool {
        false
    }

    /// Whether the server goes on without a boot, from its memory: then its disks must be, to the byte, what they were.
    fn keeps_memory(&self) -> bool {
        false
    }

    /// Whether it is the provider itself that gives the images the names under which servers use them, and others: in
    /// [`Self::swap`], whatever the direction.
    fn names_images(&self) -> bool {
        false
    }

    /// Whether what a server has left keeps its name, because somebody else goes on keeping books of it: then that is
    /// removed by [`Self::remove_source`].
    fn keeps_source_names(&self) -> bool {
        false
    }

    /// Whether both sides have to be in one cluster, because the server's configuration can name one only.
    fn needs_one_cluster(&self) -> bool {
        false
    }

    /// Whether poolshift is to end with the proof, and leave the rest to a person. Then all steps do nothing, nobody
    /// can be asked ([`Self::observe`] gives a running server on no side), and only the images' watchers tell whether
    /// it is stopped; [`Self::settle`] gives what to swap.
    fn by_hand(&self) -> bool {
        false
    }

    /// How long the server stands still for the provider's own part, as far as can be told: stopping and starting it.
    async fn usual_pause(&self) -> Option<Duration> {
        None
    }

    /// What is in the way of leaving `from`. Changes nothing.
    async fn preconditions(&self, from: Side) -> Vec<Precondition>;

    /// What is true now.
    async fn observe(&self, notes: &Notes) -> Result<Observed, ProviderError>;

    /// Does, while the server runs, what need not be done while it stands still.
    async fn prepare(&self, from: Side, notes: &mut Notes) -> Result<(), ProviderError>;

    /// Has the server stop writing, with all that it wrote on its disks.
    async fn quiesce(&self, notes: &mut Notes) -> Result<(), ProviderError>;

    /// Where a process that is gone may have told the running server to stop, and it may still do so: waits until it has.
    /// `notes` are those of that process, which may have had another method. Left out, it stops at once or not at all.
    async fn finish_stop(&self, _notes: &mut Notes) -> Result<(), ProviderError> {
        Ok(())
    }

    /// Gives the quiesced server its disks on `to`. It does not run.
    async fn swap(&self, to: Side, notes: &mut Notes) -> Result<(), ProviderError>;

    /// Has the server go on, or start, from `on`, to which it was swapped. Whoever had the lock of an image there has
    /// let go of it before: a guest that goes on and can't get it has I/O errors, and its file systems become
    /// read-only. `fresh` says that its memory is not to be used, whatever was saved: the disks are not what they were.
    async fn start(&self, on: Side, fresh: bool, notes: &mut Notes) -> Result<(), ProviderError>;

    /// Brings the server back to `from`, which it was about to leave, and has it run there. It may never have been
    /// stopped. The locks of the images on `from` are free, as for [`Self::start`].
    async fn undo(&self, from: Side, fresh: bool, notes: &mut Notes) -> Result<(), ProviderError> {
        self.swap(from, notes).await?;
        self.start(from, fresh, notes).await
    }

    /// What keeps what the server has left from being removed, beside what the images tell; a sentence.
    async fn keeps_sources(&self) -> Result<Option<String>, ProviderError> {
        Ok(None)
    }

    /// Removes what the server has left of a volume, with its image, of which no snapshot is left and which nobody has
    /// open. `false`: it is poolshift that removes the image.
    async fn remove_source(&self, _volume: &str) -> Result<bool, ProviderError> {
        Ok(false)
    }

    /// Cleans up, after the server was seen running on `on`. Gives back what a person has to know or to do.
    async fn settle(&self, on: Side, notes: &mut Notes) -> Result<Vec<String>, ProviderError>;
}

/// The disks of a plan's server.
pub fn disks_of(server: &plan::Server) -> Vec<ServerDisk> {
    let disk = |volume: &plan::Volume| ServerDisk {
        volume: volume.name.clone(),
        source: volume.source.clone(),
        target: volume.target.clone(),
        target_in_use: volume.target_in_use(),
        boot: volume.boot,
    };
    server.volumes.iter().map(disk).collect()
}

/// The provider that the plan has for a server; `method` is another one than the plan's, for a libvirt domain.
///
/// `connectors` are asked for where a provider names images.
///
/// # Errors
/// If a method is asked for that the server has no choice of.
pub fn of(
    server: &plan::Server,
    method: Option<Method>,
    connectors: Option<&openstack::Connectors>,
) -> Result<Arc<dyn Provider>, ProviderError> {
    let disks = disks_of(server);
    if let (Some(_), Cutover::None | Cutover::Command(_) | Cutover::OpenStack(_)) = (method, &server.cutover) {
        return Err(ProviderError {
            operation: "cutover".into(),
            server: format!("server {}", server.name),
            problem: "there is a choice of methods for libvirt domains only".into(),
            hint: Some("leave the method out, or name the domain in the plan".into()),
        });
    }
    Ok(match &server.cutover {
        Cutover::None => Arc::new(ByHand::new(&server.name, disks)),
        Cutover::Libvirt(config) => Arc::new(Libvirt::new(disks, config.clone(), method)),
        Cutover::Command(config) => Arc::new(Commands::new(&server.name, disks, config.clone())),
        Cutover::OpenStack(config) => match connectors {
            Some(connectors) if config.strategy == plan::Strategy::Recreate => {
                Arc::new(openstack::Recreate::new(server, config.clone(), connectors)?)
            }
            Some(connectors) => Arc::new(OpenStack::new(server, config.clone(), connectors)),
            None => Arc::new(ByHand::new(&server.name, disks)),
        },
    })
}
