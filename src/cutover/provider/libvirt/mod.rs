//! A domain of libvirt, by `virsh` and, for what libvirt does not know, by QEMU's monitor through it.
//!
//! | method | quiesce | swap | start |
//! |---|---|---|---|
//! | cold | the power button, until it is off | the definition | boots |
//! | warm | `virsh save` | the definition | `virsh restore` with the other disks, paused; then it goes on |
//! | hot | `virsh suspend` | the definition; QEMU opens the other disks below it | `virsh resume` |
//!
//! **The definition** that the domain starts from is what decides for it while it is off: it names the side that it
//! left until the swap, and the other from then on. So whoever starts the domain, or the host after a crash, starts it
//! from the side that counts.
//!
//! **The saved memory** is good once, and only with the disks as they were. Its file has a name that no other cutover
//! has, and gets another one, by which it is not found again, after the domain was restored and before it goes on: it
//! was not used if it is there and the domain is off.
//!
//! **The disks of a domain in memory** are asked of QEMU. After a hot cutover libvirt's XML of the *running* domain
//! names the images that it left, up to the next cold start. They are renamed after the commit, so that what libvirt
//! would do with them (restore a save that was made meanwhile) fails, rather than runs from old disks. Images are
//! opened when the last changes are on them and not before, so that no cache of librbd's can hold what was there
//! earlier.

mod blocks;
mod cold;
mod hot;
mod look;
mod preconditions;
mod rehearse;
mod stand_in;
mod virsh;
mod warm;
mod xml;

use std::time::Duration;

use async_trait::async_trait;

use super::{Notes, Observed, Power, Precondition, Provider, ProviderError, ServerDisk, Side, name};
use crate::failpoint::failpoint;
use crate::plan::{LibvirtCutover, Method};
use look::Look;
use virsh::{QUESTION, Virsh};
use xml::{Domain, XmlError};

/// The note that the domain is to be shut down.
const SHUT_DOWN: &str = "shut-down";
/// How long a domain stands still for a suspend, a reopening and a resume.
const HOT_PAUSE: Duration = Duration::from_secs(1);
/// The same for a save and a restore, beside the memory.
const WARM_PAUSE: Duration = Duration::from_millis(2500);
/// What of a memory is taken to be saved, or restored, in a second, in bytes, before it was tried: a disk of a host gives
/// more, and pages of zeroes are not saved. A prediction that is too long is the better mistake.
const SAVE_RATE: f64 = (400 << 20) as f64;

/// A server that is a domain of libvirt.
#[derive(Debug)]
pub struct Libvirt {
    virsh: Virsh,
    disks: Vec<ServerDisk>,
    method: Method,
    config: LibvirtCutover,
}

fn starting(side: Side) -> String {
    format!("start on the {}", name(side))
}

impl Libvirt {
    /// The domain, with the disks of its server.
    pub fn new(disks: Vec<ServerDisk>, config: LibvirtCutover, method: Option<Method>) -> Self {
        let virsh = Virsh { program: "virsh".into(), domain: config.domain.clone(), uri: config.uri.clone() };
        Self { virsh, disks, method: method.unwrap_or(config.method), config }
    }

    /// How long what is not a question may take.
    fn limit(&self) -> Duration {
        self.config.limit.max(QUESTION)
    }

    fn xml_error(&self, operation: &str, error: &XmlError) -> ProviderError {
        let hint = "compare the plan with `virsh dumpxml`";
        self.virsh.error(operation, error.to_string(), Some(hint))
    }

    /// Has the definition that it starts from name the disks on `to`; `told`: that definition, if it was told already.
    async fn define(&self, operation: &str, to: Side, told: Option<&str>) -> Result<(), ProviderError> {
        let old = match told {
            Some(definition) => definition.to_owned(),
            None => self.virsh.definition(operation).await?,
        };
        let new = xml::on_side(&old, &self.disks, to).map_err(|error| self.xml_error(operation, &error))?;
        if new == old {
            return Ok(());
        }
        self.virsh.define(operation, &new).await?;
        failpoint!("libvirt.defined");
        Ok(())
    }

    /// The last step of each way to start: it runs, and from where it should.
    async fn expect_running(&self, operation: &str, on: Side, notes: &Notes) -> Result<(), ProviderError> {
        let observed = self.look(operation, notes, Vec::new()).await?.observed;
        if observed == (Observed { power: Power::Running, side: Some(on) }) {
            return Ok(());
        }
        let side = observed.side.map_or("nobody knows which side", name);
        let problem = format!("after it the domain is {:?}, with its disks on {side}", observed.power);
        let hint = "see why with `virsh domstate --reason`, and in /var/log/libvirt/qemu";
        Err(self.virsh.error(operation, problem, Some(hint)))
    }

    async fn bring(&self, to: Side, fresh: bool, notes: &mut Notes) -> Result<(), ProviderError> {
        let operation = format!("swap to the {}", name(to));
        let more = if self.method == Method::Hot { self.disk_questions() } else { Vec::new() };
        let look = self.look(&operation, notes, more).await?;
        let definition = look.definition();
        let suspended = look.observed.power == Power::Suspended;
        match look.observed {
            Observed { power: Power::Off | Power::Saved, .. } => self.define(&operation, to, definition).await,
            Observed { side: Some(side), .. } if side == to => {
                self.define(&operation, to, definition).await?;
                // What a swap that was interrupted has left open.
                if suspended { self.close(&operation, to).await } else { Ok(()) }
            }
            // Its memory is in the file, as it is here; or it is not wanted.
            _ if suspended && (fresh || self.saved(&operation, notes, None).await?.is_some()) => {
                self.virsh.destroy(&operation, self.limit()).await?;
                self.define(&operation, to, definition).await
            }
            // It stands still after its memory counted as used: what it is now goes back.
            _ if suspended && self.method == Method::Warm => {
                self.choose_save(&operation, notes)?;
                self.save(notes).await?;
                self.define(&operation, to, definition).await
            }
            _ if suspended && self.method == Method::Hot => {
                self.define(&operation, to, definition).await?;
                self.reopen(&operation, to, &look).await
            }
            Observed { power, .. } => {
                let problem = format!("the domain is {power:?}, with its disks on the other side");
                let hint = "it has to be stopped first: `virsh shutdown`, and the same command again";
                Err(self.virsh.error(&operation, problem, Some(hint)))
            }
        }
    }
}

#[async_trait]
impl Provider for Libvirt {
    fn describe(&self) -> String {
        let method = match self.method {
            Method::Cold => "cold",
            Method::Warm => "warm",
            Method::Hot => "hot",
        };
        format!("libvirt domain {}, {method}", self.virsh.domain)
    }

    fn stays_open(&self) -> bool {
        self.method == Method::Hot
    }

    fn keeps_memory(&self) -> bool {
        self.method != Method::Cold
    }

    /// A definition keeps its monitors and its key when its disks are exchanged.
    fn needs_one_cluster(&self) -> bool {
        true
    }

    async fn usual_pause(&self) -> Option<Duration> {
        match self.method {
            Method::Cold => None,
            Method::Hot => Some(HOT_PAUSE),
            Method::Warm => {
                let memory = preconditions::memory(&self.virsh).await.ok()??;
                Some(WARM_PAUSE + 2 * Duration::from_secs_f64(memory as f64 / SAVE_RATE))
            }
        }
    }

    async fn preconditions(&self, from: Side) -> Vec<Precondition> {
        preconditions::of(self, from).await
    }

    async fn observe(&self, notes: &Notes) -> Result<Observed, ProviderError> {
        Ok(self.look("state", notes, Vec::new()).await?.observed)
    }

    async fn prepare(&self, from: Side, notes: &mut Notes) -> Result<(), ProviderError> {
        // Whatever can't be read or rewritten is found before the server stands still.
        let operation = "preparation";
        let definition = self.virsh.definition(operation).await?;
        xml::on_side(&definition, &self.disks, from.other()).map_err(|error| self.xml_error(operation, &error))?;
        match self.method {
            Method::Cold => drop(notes.insert(SHUT_DOWN.to_owned(), "yes".to_owned())),
            Method::Warm | Method::Hot => drop(notes.remove(SHUT_DOWN)),
        }
        // It runs: what an earlier walk has saved of it is old.
        self.remove_save(operation, notes)?;
        self.choose_save(operation, notes)
    }

    async fn quiesce(&self, notes: &mut Notes) -> Result<(), ProviderError> {
        match self.method {
            Method::Cold => self.shut_down().await,
            Method::Warm => self.save(notes).await,
            Method::Hot => self.suspend().await,
        }
    }

    async fn finish_stop(&self, notes: &mut Notes) -> Result<(), ProviderError> {
        if notes.contains_key(SHUT_DOWN) { self.shut_down().await } else { Ok(()) }
    }

    async fn swap(&self, to: Side, notes: &mut Notes) -> Result<(), ProviderError> {
        self.bring(to, false, notes).await
    }

    async fn start(&self, on: Side, fresh: bool, notes: &mut Notes) -> Result<(), ProviderError> {
        let operation = starting(on);
        let Look { observed, saved, .. } = self.look(&operation, notes, Vec::new()).await?;
        if observed.side != Some(on) {
            let problem = format!("the domain is {:?}, and its disks are not on the {}", observed.power, name(on));
            return Err(self.virsh.error(&operation, problem, Some("compare the plan with `virsh dumpxml`")));
        }
        match (observed.power, saved.filter(|_| !fresh)) {
            // Whoever started it: what was saved before is of no use any more.
            (Power::Running, _) => return self.spend_save(&operation, notes),
            (Power::Suspended, _) if fresh => {
                self.virsh.destroy(&operation, self.limit()).await?;
                self.spend_save(&operation, notes)?;
                self.boot(&operation, fresh).await?;
            }
            (Power::Suspended, _) => self.go_on(&operation, notes).await?,
            (_, Some(definition)) => {
                self.restore(&operation, on, notes, &definition).await?;
                self.go_on(&operation, notes).await?;
            }
            (_, None) => {
                self.spend_save(&operation, notes)?;
                self.boot(&operation, fresh).await?;
            }
        }
        self.expect_running(&operation, on, notes).await
    }

    async fn undo(&self, from: Side, fresh: bool, notes: &mut Notes) -> Result<(), ProviderError> {
        self.bring(from, fresh, notes).await?;
        self.start(from, fresh, notes).await
    }

    async fn settle(&self, on: Side, notes: &mut Notes) -> Result<Vec<String>, ProviderError> {
        let operation = "cleaning up";
        // The next start is from here, whatever was interrupted.
        self.define(operation, on, None).await?;
        self.remove_save(operation, notes)?;
        if self.virsh.power(operation).await? == Power::Off {
            return Ok(Vec::new());
        }
        let live = self.virsh.with_domain(operation, "dumpxml", &[], QUESTION).await?;
        let live = Domain::read(&live, &self.disks).map_err(|error| self.xml_error(operation, &error))?;
        Ok(if live.side(self.disks.len()) == Some(on) { Vec::new() } else { vec![self.stale(on)] })
    }
}

#[cfg(test)]
mod tests;
