//! A server that is locked while its volumes are switched, so that its owner does not start it in the middle.
//!
//! Only an administrator gets past a lock of Nova's, and only one locks here. The reason that is kept with the lock tells
//! it from one of the owner's, which is as good and stays.

use async_trait::async_trait;

use super::super::ProviderError;
use super::OpenStack;
use super::effect::{Effect, Look};
use crate::openstack::nova::{Server, ServerAction};
use crate::openstack::{Cloud, CloudError, if_there};

/// By which a lock is known to be poolshift's.
const REASON: &str = "poolshift: its volumes are being switched to another pool";

/// Whether a server is locked by poolshift.
pub(super) fn is_ours(server: &Server) -> bool {
    server.locked && server.locked_reason.as_deref() == Some(REASON)
}

/// A server is locked, or is not locked by poolshift.
struct Locked<'a> {
    cloud: &'a Cloud,
    id: &'a str,
    locked: bool,
}

#[async_trait]
impl Effect for Locked<'_> {
    fn wanted(&self) -> String {
        format!("server that is {}", if self.locked { "locked" } else { "unlocked" })
    }

    async fn look(&self) -> Result<Look, CloudError> {
        let server = self.cloud.server(self.id).await?;
        let done = if self.locked { server.locked } else { !is_ours(&server) };
        Ok(if done { Look::Done } else { Look::NotYet(if server.locked { "locked" } else { "not locked" }.into()) })
    }

    async fn ask(&self) -> Result<(), CloudError> {
        let action = if self.locked { ServerAction::Lock(REASON) } else { ServerAction::Unlock };
        self.cloud.act_on_server(self.id, action).await
    }
}

impl OpenStack {
    /// Locks a server that is not locked. Without it the switch is as sound, as long as nobody starts the server.
    pub(super) async fn lock_server(&self, id: &str) -> Result<(), ProviderError> {
        let operation = "lock";
        let cloud = self.cloud(operation).await?;
        // A lock keeps everybody else out, who has made it too.
        if !cloud.is_admin().await.map_err(|error| self.cloud_error(operation, &error))? {
            return Ok(());
        }
        if let Err(error) = self.bring_about(operation, &Locked { cloud, id, locked: true }).await {
            tracing::warn!(%error, "the server is not locked: nobody may start it before this is over");
        }
        Ok(())
    }

    /// Unlocks a server that poolshift has locked, this process or another one.
    pub(super) async fn unlock_server(&self, id: &str) -> Result<(), ProviderError> {
        let operation = "unlock";
        let cloud = self.cloud(operation).await?;
        match if_there(cloud.server(id).await).map_err(|error| self.cloud_error(operation, &error))? {
            Some(server) if is_ours(&server) => {
                let unlocked = self.bring_about(operation, &Locked { cloud, id, locked: false }).await;
                let by_hand = || format!("unlock it by hand: openstack server unlock {id}");
                unlocked.map_err(|error| ProviderError { hint: Some(by_hand()), ..error })
            }
            // Whoever has deleted it has left no lock.
            _ => Ok(()),
        }
    }
}
