//! Volumes that nobody has: kept from being attached by the status `maintenance` while they are switched.

use super::super::{Observed, Power, ProviderError};
use super::OpenStack;
use crate::openstack::cinder::Status;

/// Whether a volume of that status is kept from nobody: somebody has it, or is about to, or may.
fn is_free(status: &str) -> bool {
    [Status::Available, Status::Reserved, Status::InUse].iter().any(|free| free.name() == status)
}

impl OpenStack {
    /// Running: anybody may have them, or has them by now, on one side. Off: nobody may.
    pub(super) async fn observe_detached(&self) -> Result<Observed, ProviderError> {
        for volume in &self.volumes {
            self.until_still("state", volume).await?;
        }
        let volumes = self.look("state").await?;
        let free = volumes.iter().all(|(volume, _)| is_free(&volume.status));
        let side = self.side_of(&volumes);
        // Cinder gives another type to what is available only: in the midst of that they are, and no good to anybody.
        let power = if free && side.is_some() { Power::Running } else { Power::Off };
        Ok(Observed { power, side })
    }
}

#[cfg(test)]
mod tests {
    use super::is_free;

    #[test]
    fn what_somebody_has_is_kept_from_nobody() {
        let found = ["available", "reserved", "in-use", "maintenance", "error", "retyping"].map(is_free);
        assert_eq!(found, [true, true, true, false, false, false]);
    }
}
