//! Volumes, and what is changed about them.
//!
//! Source of paths and fields: the Block Storage API, <https://docs.openstack.org/api-ref/block-storage/v3/>.

use std::collections::BTreeMap;

use reqwest::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::Result;
use super::session::Service;
use super::{Cloud, checked};

/// The order in which volumes and snapshots are listed.
const BY_AGE: &[(&str, &str)] = &[("sort", "created_at:asc,id:asc")];

/// A volume.
#[derive(Clone, Debug, Deserialize)]
pub struct Volume {
    /// Its id.
    pub id: String,
    /// Its name, which may be empty.
    #[serde(default, deserialize_with = "text")]
    pub name: String,
    /// What it is for, in its owner's words.
    #[serde(default)]
    pub description: Option<String>,
    /// Its size, in GiB.
    pub size: u64,
    /// `available`, `in-use`, `reserved`, `retyping`, `error` and others.
    pub status: String,
    /// The name of its type.
    #[serde(default)]
    pub volume_type: Option<String>,
    /// Whether a server can boot from it: Cinder writes a text.
    #[serde(default, deserialize_with = "flag")]
    pub bootable: bool,
    /// Whether it is encrypted by Cinder.
    #[serde(default)]
    pub encrypted: bool,
    /// Whether several servers may have it.
    #[serde(default)]
    pub multiattach: bool,
    /// What its owner has written to it.
    #[serde(default)]
    pub metadata: BTreeMap<String, String>,
    /// Who has it.
    #[serde(default)]
    pub attachments: Vec<VolumeAttachment>,
    /// The group that it is in.
    #[serde(default)]
    pub group_id: Option<String>,
    /// The consistency group that it is in.
    #[serde(default)]
    pub consistencygroup_id: Option<String>,
    /// Whether Cinder replicates it: `null` and `disabled` are no.
    #[serde(default)]
    pub replication_status: Option<String>,
    /// The host, backend and pool: `vm@sata#sata`. For administrators only.
    #[serde(default, rename = "os-vol-host-attr:host")]
    pub host: Option<String>,
    /// How a migration of it goes, or went. For administrators only.
    #[serde(default, rename = "os-vol-mig-status-attr:migstat")]
    pub migration_status: Option<String>,
    /// The id that its image is named by, where that is another one than its own, as after some migrations. For
    /// administrators only.
    #[serde(default, rename = "os-vol-mig-status-attr:name_id")]
    pub name_id: Option<String>,
    /// The project that it belongs to.
    #[serde(default, rename = "os-vol-tenant-attr:tenant_id")]
    pub project: Option<String>,
    /// What is known of the image that it was made from: it may be booted from with this only.
    #[serde(default, rename = "volume_image_metadata")]
    pub image_metadata: BTreeMap<String, Value>,
}

impl Volume {
    /// The name of its image on a backend of RBD, as long as its backend has the usual `volume_name_template`.
    pub fn image(&self) -> String {
        format!("volume-{}", self.name_id.as_deref().filter(|id| !id.is_empty()).unwrap_or(&self.id))
    }

    /// Whether something is under way with it, so that it is looked at again a little later.
    pub fn is_moving(&self) -> bool {
        let moving =
            ["retyping", "attaching", "detaching", "creating", "deleting", "downloading", "uploading", "extending"];
        let migrating = self.migration_status.as_deref().is_some_and(|status| {
            matches!(status, "starting" | "migrating" | "completing") || status.starts_with("target:")
        });
        moving.contains(&self.status.as_str()) || migrating
    }
}

/// A server that has a volume.
#[derive(Clone, Debug, Deserialize)]
pub struct VolumeAttachment {
    /// The server.
    #[serde(default, deserialize_with = "text")]
    pub server_id: String,
    /// The attachment itself.
    #[serde(default, deserialize_with = "text")]
    pub attachment_id: String,
    /// Under which name the server has it: `/dev/vda`.
    #[serde(default)]
    pub device: Option<String>,
}

/// What a server was told about how to reach a volume.
#[derive(Clone, Debug, Deserialize)]
pub struct Attachment {
    /// `attached`, `reserved` and others.
    #[serde(default, deserialize_with = "text")]
    pub status: String,
    /// Of the backend's own words only the name: there may be a key among the others.
    #[serde(default, deserialize_with = "image_of")]
    #[serde(rename = "connection_info")]
    image: Option<String>,
}

fn image_of<'de, D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<String>, D::Error> {
    Ok(Value::deserialize(deserializer)?.get("name").and_then(Value::as_str).map(str::to_owned))
}

impl Attachment {
    /// The image that the server opens: `sata/volume-3f…`; `None` where it was not told yet, or is on another backend.
    pub fn image(&self) -> Option<&str> {
        self.image.as_deref()
    }
}

/// A type of volumes.
#[derive(Clone, Debug, Deserialize)]
pub struct VolumeType {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// What is asked of its backend. For administrators only.
    #[serde(default)]
    pub extra_specs: BTreeMap<String, String>,
    /// Its QoS. For administrators only.
    #[serde(default)]
    pub qos_specs_id: Option<String>,
}

impl VolumeType {
    /// Whether Cinder has the backend itself move volumes to and from it, which takes an instant. With any other extra
    /// spec, or a QoS, it copies everything.
    pub fn is_plain(&self) -> bool {
        self.qos_specs_id.is_none() && self.extra_specs.keys().all(|key| key == "volume_backend_name")
    }
}

/// A snapshot that Cinder knows of.
#[derive(Clone, Debug, Deserialize)]
pub struct Snapshot {
    /// Its id.
    pub id: String,
    /// The volume's.
    pub volume_id: String,
    /// Its name, which may be empty.
    #[serde(default, deserialize_with = "text")]
    pub name: String,
    /// `available` and others.
    pub status: String,
}

/// What a project may have of one thing, and has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct Quota {
    /// The most; -1 for no limit.
    pub limit: i64,
    /// What is there.
    pub in_use: i64,
    /// What is being made.
    #[serde(default)]
    pub reserved: i64,
}

impl Quota {
    /// Whether there is room for so much more.
    pub fn has_room(&self, more: i64) -> bool {
        self.limit < 0 || self.in_use.saturating_add(self.reserved).saturating_add(more) <= self.limit
    }
}

/// What is written about a volume by hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Nobody has it, and anybody may.
    Available,
    /// A server has it.
    InUse,
    /// A server is about to have it.
    Reserved,
    /// Nobody may have it.
    Maintenance,
}

impl Status {
    /// As Cinder writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Available => "available",
            Self::InUse => "in-use",
            Self::Reserved => "reserved",
            Self::Maintenance => "maintenance",
        }
    }
}

/// Whether a retype may move a volume to another backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MigrationPolicy {
    /// If need be.
    OnDemand,
    /// No.
    Never,
}

fn text<'de, D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<String, D::Error> {
    Ok(Option::<String>::deserialize(deserializer)?.unwrap_or_default())
}

fn flag<'de, D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<bool, D::Error> {
    Ok(match Value::deserialize(deserializer)? {
        Value::Bool(flag) => flag,
        Value::String(text) => text.eq_ignore_ascii_case("true"),
        _ => false,
    })
}

impl Cloud {
    /// A volume.
    pub async fn volume(&self, id: &str) -> Result<Volume> {
        #[derive(Deserialize)]
        struct Answer {
            volume: Volume,
        }
        let operation = format!("show volume {id}");
        let id = checked(id, "volume", &operation)?;
        Ok(self.ask::<Answer>(Service::Cinder, &format!("volumes/{id}"), &[], &operation).await?.volume)
    }

    /// All volumes of the project, of another one, or of all.
    pub async fn volumes(&self, whose: &super::nova::Whose) -> Result<Vec<Volume>> {
        #[derive(Deserialize)]
        struct Answer {
            volumes: Vec<Volume>,
        }
        let (service, order) = (Service::Cinder, BY_AGE);
        let listed = |page: Answer| page.volumes;
        self.pages((service, "volumes/detail", "list volumes"), order, whose, listed, |volume| &volume.id).await
    }

    /// The volumes of all projects to which that was written as metadata. Needs an administrator.
    pub async fn volumes_with(&self, key: &str, value: &str) -> Result<Vec<Volume>> {
        let wanted = json!({key: value}).to_string();
        let all = self.volumes_by(("metadata", &wanted), "look for volumes by their metadata").await?;
        Ok(all.into_iter().filter(|volume| volume.metadata.get(key).is_some_and(|found| found == value)).collect())
    }

    /// The volumes of all projects that have that name. Needs an administrator.
    pub async fn volumes_named(&self, name: &str) -> Result<Vec<Volume>> {
        let all = self.volumes_by(("name", name), "look for volumes by their name").await?;
        Ok(all.into_iter().filter(|volume| volume.name == name).collect())
    }

    async fn volumes_by(&self, wanted: (&str, &str), operation: &str) -> Result<Vec<Volume>> {
        #[derive(Deserialize)]
        struct Answer {
            volumes: Vec<Volume>,
        }
        let (query, listed) = ([BY_AGE[0], wanted], |page: Answer| page.volumes);
        let what = (Service::Cinder, "volumes/detail", operation);
        self.pages(what, &query, &super::nova::Whose::All, listed, |volume| &volume.id).await
    }

    /// All types.
    pub async fn volume_types(&self) -> Result<Vec<VolumeType>> {
        #[derive(Deserialize)]
        struct Answer {
            volume_types: Vec<VolumeType>,
        }
        let query = [("is_public", "None")];
        Ok(self.ask::<Answer>(Service::Cinder, "types", &query, "list volume types").await?.volume_types)
    }

    /// Whether volumes of a type, given by its id, are encrypted. Needs an administrator.
    pub async fn is_encrypting(&self, volume_type: &str) -> Result<bool> {
        let operation = format!("show the encryption of volume type {volume_type}");
        let path = format!("types/{}/encryption", checked(volume_type, "volume type", &operation)?);
        // Without one it answers an empty object.
        Ok(self
            .ask::<Value>(Service::Cinder, &path, &[], &operation)
            .await?
            .get("provider")
            .is_some_and(|it| !it.is_null()))
    }

    /// The snapshots of a volume.
    pub async fn snapshots(&self, volume: &str) -> Result<Vec<Snapshot>> {
        #[derive(Deserialize)]
        struct Answer {
            snapshots: Vec<Snapshot>,
        }
        let operation = format!("list the snapshots of volume {volume}");
        let query = [("volume_id", checked(volume, "volume", &operation)?), ("all_tenants", "1")];
        Ok(self.ask::<Answer>(Service::Cinder, "snapshots/detail", &query, &operation).await?.snapshots)
    }

    /// All snapshots of the project, of another one, or of all.
    pub async fn all_snapshots(&self, whose: &super::nova::Whose) -> Result<Vec<Snapshot>> {
        #[derive(Deserialize)]
        struct Answer {
            snapshots: Vec<Snapshot>,
        }
        let (service, order) = (Service::Cinder, BY_AGE);
        let listed = |page: Answer| page.snapshots;
        self.pages((service, "snapshots/detail", "list snapshots"), order, whose, listed, |snapshot| &snapshot.id).await
    }

    /// How much a project may have of a type of volumes, by what: `gigabytes_sas`, `volumes_sas`, `gigabytes`.
    pub async fn quotas(&self, project: &str) -> Result<BTreeMap<String, Quota>> {
        #[derive(Deserialize)]
        struct Answer {
            quota_set: BTreeMap<String, Value>,
        }
        let operation = format!("show the quotas of project {project}");
        let path = format!("os-quota-sets/{}", checked(project, "project", &operation)?);
        let answer: Answer = self.ask(Service::Cinder, &path, &[("usage", "True")], &operation).await?;
        let quotas = answer.quota_set.into_iter();
        Ok(quotas.filter_map(|(key, value)| Some((key, serde_json::from_value(value).ok()?))).collect())
    }

    /// What a server was told about a volume, by the attachment's id.
    pub async fn attachment(&self, id: &str) -> Result<Attachment> {
        #[derive(Deserialize)]
        struct Answer {
            attachment: Attachment,
        }
        let operation = format!("show attachment {id}");
        let id = checked(id, "attachment", &operation)?;
        Ok(self.ask::<Answer>(Service::Cinder, &format!("attachments/{id}"), &[], &operation).await?.attachment)
    }

    async fn act_on_volume(&self, id: &str, body: Value, operation: &str) -> Result<()> {
        let path = format!("volumes/{}/action", checked(id, "volume", operation)?);
        self.tell(Service::Cinder, Method::POST, &path, Some(&body), operation).await
    }

    /// Begins to give a volume another type. The answer says nothing of whether it will have it.
    pub async fn retype(&self, volume: &str, new_type: &str, policy: MigrationPolicy) -> Result<()> {
        let policy = match policy {
            MigrationPolicy::OnDemand => "on-demand",
            MigrationPolicy::Never => "never",
        };
        let body = json!({"os-retype": {"new_type": new_type, "migration_policy": policy}});
        self.act_on_volume(volume, body, &format!("retype volume {volume} to {new_type:?}")).await
    }

    /// Writes what a volume's status is. Needs an administrator.
    pub async fn reset_status(&self, volume: &str, status: Status) -> Result<()> {
        let body = json!({"os-reset_status": {"status": status.name()}});
        self.act_on_volume(volume, body, &format!("reset volume {volume} to {}", status.name())).await
    }

    /// Writes one entry of a volume's metadata, and leaves the others.
    pub async fn set_metadata(&self, volume: &str, key: &str, value: &str) -> Result<()> {
        let operation = format!("write the metadata {key:?} of volume {volume}");
        let path = format!("volumes/{}/metadata", checked(volume, "volume", &operation)?);
        let body = json!({"metadata": {key: value}});
        self.tell(Service::Cinder, Method::POST, &path, Some(&body), &operation).await
    }

    /// Removes one entry of a volume's metadata. `key` stands in the path as it is: letters, digits, `.`, `-` and `_`.
    pub async fn remove_metadata(&self, volume: &str, key: &str) -> Result<()> {
        let operation = format!("remove the metadata {key:?} of volume {volume}");
        let path = format!("volumes/{}/metadata/{key}", checked(volume, "volume", &operation)?);
        self.tell(Service::Cinder, Method::DELETE, &path, None, &operation).await
    }

    /// Takes away that a migration failed. Needs an administrator.
    pub async fn forget_migration(&self, volume: &str) -> Result<()> {
        let body = json!({"os-reset_status": {"migration_status": "none"}});
        self.act_on_volume(volume, body, &format!("reset the migration of volume {volume}")).await
    }
}
