//! What Cinder is given, and what is taken from it: images of a backend as volumes, and volumes as mere images.
//!
//! Source of paths and fields: the Block Storage API's `manageable_volumes` and `os-unmanage`,
//! <https://docs.openstack.org/api-ref/block-storage/v3/>.

use std::collections::BTreeMap;

use reqwest::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use super::cinder::Volume;
use super::error::Result;
use super::session::{Ask, Service};
use super::{Cloud, checked};

/// An image that becomes a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Managed<'a> {
    /// Of which host, backend and pool: `vm@sas#sas`.
    pub host: &'a str,
    /// The image's name in the backend's pool. Cinder renames it to `volume-ID`.
    pub image: &'a str,
    /// The volume's name.
    pub name: &'a str,
    /// What it is for, in its owner's words.
    pub description: Option<&'a str>,
    /// The name of its type, which has to be one of that backend.
    pub volume_type: &'a str,
    /// Whether a server may boot from it.
    pub bootable: bool,
    /// What is written to it.
    pub metadata: BTreeMap<String, String>,
}

/// Where Cinder keeps volumes, by what its backends tell its scheduler.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Backend {
    /// The host, backend and pool: `vm@sas#sas`.
    pub host: String,
    /// What types name it by.
    pub backend_name: String,
    /// Of RBD's driver: `ceph:CONF:FSID:USER:POOL`.
    pub location_info: String,
}

impl Backend {
    /// The cluster and the pool of RBD that it puts images in; `None` where it does not tell.
    pub fn place(&self) -> Option<(&str, &str)> {
        let mut parts = self.location_info.rsplit(':');
        let (pool, _user, fsid) = (parts.next()?, parts.next()?, parts.next()?);
        Some((fsid, pool))
    }
}

impl Cloud {
    /// All backends, by their hosts. Needs an administrator.
    pub async fn backends(&self) -> Result<Vec<Backend>> {
        #[derive(Default, Deserialize)]
        struct Capabilities {
            #[serde(default)]
            volume_backend_name: String,
            #[serde(default)]
            location_info: String,
        }
        #[derive(Deserialize)]
        struct Pool {
            name: String,
            #[serde(default)]
            capabilities: Capabilities,
        }
        #[derive(Deserialize)]
        struct Answer {
            pools: Vec<Pool>,
        }
        let (path, query) = ("scheduler-stats/get_pools", [("detail", "true")]);
        let answer: Answer = self.ask(Service::Cinder, path, &query, "list the backends").await?;
        let of = |Pool { name: host, capabilities }: Pool| {
            let Capabilities { volume_backend_name: backend_name, location_info } = capabilities;
            Backend { host, backend_name, location_info }
        };
        let mut all: Vec<Backend> = answer.pools.into_iter().map(of).collect();
        all.sort_by(|one, other| one.host.cmp(&other.host));
        Ok(all)
    }

    /// Begins to make an image a volume, of the credentials' project. The answer says nothing of whether it will be one:
    /// where the image is not there, or has not that type, the volume's status becomes `error`.
    pub async fn manage(&self, wanted: &Managed<'_>) -> Result<Volume> {
        #[derive(Deserialize)]
        struct Answer {
            volume: Volume,
        }
        let Managed { host, image, name, description, volume_type, bootable, metadata } = wanted;
        let operation = format!("manage image {image} of {host}");
        let body = json!({"volume": {
            "host": host, "ref": {"source-name": image}, "name": name, "volume_type": volume_type, "bootable": bootable,
            "description": description, "metadata": metadata,
        }});
        let (service, path) = (Service::Cinder, "manageable_volumes");
        let ask = Ask { service, method: Method::POST, path, query: &[], body: Some(&body), operation: &operation };
        Ok(self.session.get::<Answer>(ask).await?.volume)
    }

    /// Begins to make a volume a mere image, which stays under the name that it has. Nobody may have the volume.
    pub async fn unmanage(&self, volume: &str) -> Result<()> {
        let operation = format!("unmanage volume {volume}");
        let path = format!("volumes/{}/action", checked(volume, "volume", &operation)?);
        self.tell(Service::Cinder, Method::POST, &path, Some(&json!({"os-unmanage": {}})), &operation).await
    }

    /// Begins to delete a volume, and its image.
    pub async fn delete_volume(&self, volume: &str) -> Result<()> {
        let operation = format!("delete volume {volume}");
        let path = format!("volumes/{}", checked(volume, "volume", &operation)?);
        self.tell(Service::Cinder, Method::DELETE, &path, None, &operation).await
    }

    /// Writes what is known of the image that a volume was made from.
    pub async fn set_image_metadata(&self, volume: &str, metadata: &BTreeMap<String, Value>) -> Result<()> {
        let operation = format!("write the image metadata of volume {volume}");
        let path = format!("volumes/{}/action", checked(volume, "volume", &operation)?);
        let body = json!({"os-set_image_metadata": {"metadata": metadata}});
        self.tell(Service::Cinder, Method::POST, &path, Some(&body), &operation).await
    }

    /// Keeps a volume that nobody has from being attached: it is `attaching` until [`Self::unreserve`].
    pub async fn reserve(&self, volume: &str) -> Result<()> {
        self.act(volume, "reserve", &json!({"os-reserve": {}})).await
    }

    /// Gives it free again.
    pub async fn unreserve(&self, volume: &str) -> Result<()> {
        self.act(volume, "free", &json!({"os-unreserve": {}})).await
    }

    async fn act(&self, volume: &str, word: &str, body: &Value) -> Result<()> {
        let operation = format!("{word} volume {volume}");
        let path = format!("volumes/{}/action", checked(volume, "volume", &operation)?);
        self.tell(Service::Cinder, Method::POST, &path, Some(body), &operation).await
    }

    /// Begins to make a snapshot a mere snapshot of its volume's image, which keeps its name.
    pub async fn unmanage_snapshot(&self, snapshot: &str) -> Result<()> {
        let operation = format!("unmanage snapshot {snapshot}");
        let path = format!("snapshots/{}/action", checked(snapshot, "snapshot", &operation)?);
        self.tell(Service::Cinder, Method::POST, &path, Some(&json!({"os-unmanage": {}})), &operation).await
    }

    /// Begins to make a snapshot of a volume's image, by its name there, one that Cinder knows. It renames that to
    /// `snapshot-ID`, with the id that is given back.
    pub async fn manage_snapshot(
        &self,
        volume: &str,
        image_snapshot: &str,
        (name, metadata): (&str, &BTreeMap<String, String>),
    ) -> Result<String> {
        #[derive(Deserialize)]
        struct Made {
            id: String,
        }
        #[derive(Deserialize)]
        struct Answer {
            snapshot: Made,
        }
        let operation = format!("manage snapshot {image_snapshot} of volume {volume}");
        let body = json!({"snapshot": {
            "volume_id": checked(volume, "volume", &operation)?, "ref": {"source-name": image_snapshot}, "name": name,
            "metadata": metadata,
        }});
        let (service, path) = (Service::Cinder, "manageable_snapshots");
        let ask = Ask { service, method: Method::POST, path, query: &[], body: Some(&body), operation: &operation };
        Ok(self.session.get::<Answer>(ask).await?.snapshot.id)
    }
}

#[test]
fn a_backend_says_where_its_images_are() {
    let backend = |info: &str| Backend { location_info: info.into(), ..Backend::default() };
    let sas = backend("ceph:/etc/ceph/ceph.conf:7e88d898-73ea:cinder:sas");
    assert_eq!(sas.place(), Some(("7e88d898-73ea", "sas")));
    assert_eq!(backend("").place(), None);
}
