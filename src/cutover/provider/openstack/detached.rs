//! Volumes that nobody has: kept from being attached by the status `maintenance` while they are switched.

use super::super::{Observed, Power, ProviderError};
use super::OpenStack;
use crate::openstack::cinder::Status;

impl OpenStack {
    /// Running: anybody may have them, on one side. Off: nobody may.
    pub(super) async fn observe_detached(&self) -> Result<Observed, ProviderError> {
        for volume in &self.volumes {
            self.until_still("state", volume).await?;
        }
        let volumes = self.look("state").await?;
        let free = volumes.iter().all(|(volume, _)| volume.status == Status::Available.name());
        let side = self.side_of(&volumes);
        // Cinder gives another type to what is available only: in the midst of that they are, and no good to anybody.
        let power = if free && side.is_some() { Power::Running } else { Power::Off };
        Ok(Observed { power, side })
    }
}
