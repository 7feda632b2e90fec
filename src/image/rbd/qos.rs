//! What is said of librbd's QoS limits, which make a copy slow, and requests too late where they are low.

use std::time::Duration;

use super::{Connector, Inner, Place, RbdImage};
use crate::ceph::{self, ConfigLevel, Image, QosLimit};
use crate::image::{ErrorKind, ImageError, Result};

/// How long an error that is known already may wait for its explanation.
const PATIENCE: Duration = Duration::from_secs(5);

/// What of an image is limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// Reads, as of a source.
    Read,
    /// Writes, as of a target.
    Write,
}

impl Transfer {
    fn concerns(self, limit: &QosLimit) -> bool {
        let other = match self {
            Self::Read => "rbd_qos_write_",
            Self::Write => "rbd_qos_read_",
        };
        !limit.option.starts_with(other)
    }
}

/// A limit, and what shows it.
fn describe(limit: &QosLimit, place: &Place, user: &str) -> (String, String) {
    let QosLimit { option, value, level } = limit;
    let unit = if option.contains("iops") { "requests" } else { "bytes" };
    let (whose, shown) = match level {
        ConfigLevel::Image => (format!("image {place}"), format!("rbd config image get {place} {option}")),
        ConfigLevel::Pool => (format!("pool {}", place.pool), format!("rbd config pool get {} {option}", place.pool)),
        ConfigLevel::Client => (
            format!("client.{user}"),
            format!("ceph config get client.{user} {option}, or the client's configuration file"),
        ),
    };
    (format!("{option} = {value} of {whose} allows {value} {unit} a second"), shown)
}

/// Sentences for `check`.
fn remarks(limits: &[QosLimit], transfer: Transfer, place: &Place, user: &str) -> Vec<String> {
    let concerned = limits.iter().filter(|limit| transfer.concerns(limit));
    let verb = match transfer {
        Transfer::Read => "reading",
        Transfer::Write => "writing",
    };
    let remark = |limit| {
        let (text, shown) = describe(limit, place, user);
        format!("{verb} is limited: {text}; see {shown}")
    };
    concerned.map(remark).collect()
}

impl Inner {
    /// Adds the limits that hold requests back to the error of one that came too late.
    pub(super) async fn explain_slow(&self, error: ImageError, transfer: Transfer) -> ImageError {
        if error.kind != ErrorKind::TimedOut {
            return error;
        }
        let (pool, id) = (std::sync::Arc::clone(&self.pool), self.id.clone());
        let look = move || Image::open_by_id(&pool, &id, ceph::OpenMode::ReadOnly)?.qos_limits();
        // Where the cluster doesn't answer at all, there is nothing to add.
        let Ok(limits) = ceph::blocking("rbd_config_image_list", PATIENCE, look).await else { return error };
        let found: Vec<_> = limits.iter().filter(|limit| transfer.concerns(limit)).collect();
        let described = found.iter().map(|limit| describe(limit, &self.place, &self.connector.user));
        let (texts, shown): (Vec<_>, Vec<_>) = described.unzip();
        if texts.is_empty() {
            return error;
        }
        error.detail(format!("the storage did not answer in time; {}", texts.join("; "))).hint(format!(
            "see {}; raise the limit for the copy, or allow requests more time with --io-timeout; poolshift goes on from \
             where it was when run again",
            shown.join("; ")
        ))
    }
}

impl RbdImage {
    /// The QoS limits that hold this client's requests back, a sentence each.
    pub async fn qos_remarks(&self, transfer: Transfer) -> Result<Vec<String>> {
        let limits = self.inner.look("look for QoS limits", Image::qos_limits).await?;
        Ok(remarks(&limits, transfer, &self.inner.place, &self.inner.connector.user))
    }
}

impl Connector {
    /// The QoS limits that hold requests back to an image of a pool that has none of its own, a sentence each.
    pub async fn qos_remarks(&self, pool: &str, transfer: Transfer) -> Result<Vec<String>> {
        let place = Place::new(pool, None, "");
        let opened = self.pool(&place).await?;
        let limits = ceph::blocking("rbd_config_pool_list", self.io_timeout, move || opened.qos_limits()).await;
        let limits = limits.map_err(|error| self.failure(&place).of("look for QoS limits", error))?;
        Ok(remarks(&limits, transfer, &place, &self.user))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_named_with_its_level_and_what_shows_it() {
        let limit = |option: &str, level| QosLimit { option: option.into(), value: 7, level };
        let all = [
            limit("rbd_qos_read_bps_limit", ConfigLevel::Image),
            limit("rbd_qos_iops_limit", ConfigLevel::Pool),
            limit("rbd_qos_write_bps_limit", ConfigLevel::Client),
        ];
        let place = Place::new("sata", Some("tenant"), "vm");
        insta::assert_snapshot!(remarks(&all, Transfer::Read, &place, "u").join("\n"), @r"
        reading is limited: rbd_qos_read_bps_limit = 7 of image sata/tenant/vm allows 7 bytes a second; see rbd config image get sata/tenant/vm rbd_qos_read_bps_limit
        reading is limited: rbd_qos_iops_limit = 7 of pool sata allows 7 requests a second; see rbd config pool get sata rbd_qos_iops_limit
        ");
        insta::assert_snapshot!(remarks(&all[2..], Transfer::Write, &place, "u").join("\n"), @"writing is limited: rbd_qos_write_bps_limit = 7 of client.u allows 7 bytes a second; see ceph config get client.u rbd_qos_write_bps_limit, or the client's configuration file");
    }
}
