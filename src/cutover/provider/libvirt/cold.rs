//! Shut down, and booted.

use std::time::{Duration, Instant};

use super::super::{Power, ProviderError};
use super::Libvirt;
use super::virsh::{POLL, QUESTION};
use crate::failpoint::failpoint;

/// How long a guest has before the button is pressed again: it may have been at its boot loader, or without acpid yet.
const PRESS_AGAIN: Duration = Duration::from_secs(10);

impl Libvirt {
    /// Presses the power button until the domain is off.
    pub(super) async fn shut_down(&self) -> Result<(), ProviderError> {
        let operation = "shutdown";
        let deadline = Instant::now() + self.config.limit;
        // By the agent in the guest, if there is one that answers; after that by the button alone.
        let mut how: &[&str] = &[];
        let mut press_at = Instant::now();
        loop {
            match self.virsh.power(operation).await? {
                Power::Off | Power::Saved => return Ok(()),
                Power::Suspended => {
                    let hint = "it can't see its power button: `virsh resume` it, or use another method";
                    return Err(self.virsh.error(operation, "the domain is paused", Some(hint)));
                }
                Power::Running => {}
            }
            let now = Instant::now();
            if now >= deadline {
                let problem = format!("the guest has ignored its power button for {:?}", self.config.limit);
                let hint = "have it run acpid or an agent, raise the limit in the plan, or use another method; it may \
                            still shut down by itself";
                return Err(self.virsh.error(operation, problem, Some(hint)));
            }
            if now >= press_at {
                let first = how.is_empty();
                let limit = if first { PRESS_AGAIN.min(deadline - now) } else { QUESTION };
                match self.virsh.with_domain(operation, "shutdown", how, limit).await {
                    Ok(_) => {
                        press_at = now + PRESS_AGAIN;
                        failpoint!("libvirt.button-pressed");
                    }
                    // An agent that hangs says nothing at all: libvirt would wait for it for minutes.
                    Err(_) if first => {}
                    Err(_) if self.virsh.power(operation).await? == Power::Off => return Ok(()),
                    Err(error) => return Err(error),
                }
                how = &["--mode=acpi"];
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Whether libvirt would restore a memory that it manages by itself, instead of booting.
    pub(super) async fn has_managed_save(&self, operation: &str) -> Result<bool, ProviderError> {
        let info = self.virsh.with_domain(operation, "dominfo", &[], QUESTION).await?;
        Ok(info.lines().any(|line| line.split_whitespace().eq(["Managed", "save:", "yes"])))
    }

    /// Starts it from its definition.
    pub(super) async fn boot(&self, operation: &str, fresh: bool) -> Result<(), ProviderError> {
        if !fresh && self.has_managed_save(operation).await? {
            let hint = "it is of other disks: look at it, then `virsh managedsave-remove`, and the same command again";
            return Err(self.virsh.error(
                operation,
                "libvirt has a managed save of it, and would restore that",
                Some(hint),
            ));
        }
        let options: &[&str] = if fresh { &["--force-boot"] } else { &[] };
        self.virsh.with_domain(operation, "start", options, self.limit()).await?;
        failpoint!("libvirt.booted");
        Ok(())
    }
}
