//! What keeps a volume, or a server, from being moved.

use std::fmt;

/// What keeps a volume, or a group of volumes, from being moved, with what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// Cinder has snapshots of it, by these names: none of them may be there when it gets another type.
    Snapshots(Vec<String>),
    /// Cinder encrypts it.
    Encrypted,
    /// Several servers may have it.
    Multiattach,
    /// It is in the group with that id.
    Grouped(String),
    /// Cinder replicates it; its own word for how that goes.
    Replicated(String),
    /// Its status.
    Status(String),
    /// A migration of it is under way; Cinder's word for how far it is.
    Migrating(String),
    /// Cinder and Nova don't agree on whether that server has it.
    Disagreement {
        /// The server.
        server: String,
        /// Whether it is Cinder that says so.
        says_cinder: bool,
    },
    /// A server has it that is not in the projects that were looked at.
    ServerElsewhere(String),
    /// The server has a volume that is not in the projects that were looked at.
    VolumeElsewhere(String),
    /// Nobody has it, and such volumes were not asked for.
    Detached,
    /// It has no type.
    NoType,
    /// Its type is not among those of the cloud.
    UnknownType(String),
    /// The type that it is to have does not say on which backend.
    NoBackend(String),
    /// The type that it is to have encrypts.
    EncryptingType(String),
    /// The type that it is to have is for volumes of another kind: its extra spec.
    SpecialType {
        /// The type.
        name: String,
        /// The extra spec.
        spec: String,
    },
    /// A type asks more of its backend than its name, so that Cinder would copy everything, and there is no plain type of
    /// that backend for a way around.
    NoWayAround {
        /// The type.
        name: String,
        /// What it asks: `a QoS`, or the extra specs.
        asks: String,
        /// The backend of which there is no plain type.
        backend: String,
    },
    /// Both types are on the same pool.
    SamePool(String),
    /// Its server boots from a disk on its host, which is lost when the server leaves it.
    LocalBoot,
    /// Its server has a disk of so many GiB on its host, which is lost when the server leaves it.
    Ephemeral(u64),
    /// A quota of its project does not suffice.
    Quota {
        /// The project.
        project: String,
        /// Of what: `gigabytes_sas`.
        key: String,
        /// How much more of it the project may have, before anything is moved.
        room: i64,
        /// How much more all of its volumes need.
        needed: i64,
        /// The limit that would suffice.
        limit: i64,
    },
    /// There is no such image.
    NoImage {
        /// Its name.
        image: String,
        /// Where it was looked for.
        pools: Vec<String>,
    },
    /// Its image is of another size, in bytes, than Cinder says.
    OtherSize {
        /// The image.
        image: String,
        /// Its own size.
        found: u64,
        /// Cinder's.
        expected: u64,
    },
    /// Its image can't be replicated, and why.
    Image(String),
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Snapshots(names) => {
                let (count, s) = (names.len(), if names.len() == 1 { "" } else { "s" });
                let shown: Vec<_> = names.iter().take(3).map(|name| format!("{name:?}")).collect();
                let (shown, more) = (shown.join(", "), if count > 3 { ", …" } else { "" });
                write!(
                    f,
                    "Cinder has {count} snapshot{s} of it ({shown}{more}): remove what is not needed, and take the "
                )?;
                f.write_str("rest out of Cinder with cinder snapshot-unmanage")
            }
            Self::Encrypted => f.write_str("Cinder encrypts it, and takes no image over that was copied beside it"),
            Self::Multiattach => f.write_str("several servers may have it at once (multiattach)"),
            Self::Grouped(group) => {
                write!(f, "it is in the group {group}: take it out with cinder group-update --remove-volumes")
            }
            Self::Replicated(how) => write!(f, "Cinder replicates it ({how:?}): end that first"),
            Self::Status(status) => write!(f, "its status is {status:?}, and not in-use or available"),
            Self::Migrating(how) => write!(f, "a migration of it is under way ({how:?}): let it finish"),
            Self::Disagreement { server, says_cinder } => {
                let (has, has_not) = if *says_cinder { ("Cinder", "Nova") } else { ("Nova", "Cinder") };
                write!(
                    f,
                    "{has} says that the server {server} has it, and {has_not} that it has not: clear that up first"
                )
            }
            Self::ServerElsewhere(server) => {
                write!(f, "the server {server} has it, which is of another project: add that with --project")
            }
            Self::VolumeElsewhere(volume) => {
                write!(f, "it has the volume {volume}, which is of another project: add that with --project")
            }
            Self::Detached => f.write_str("nobody has it: add such volumes with --detached"),
            Self::NoType => f.write_str("it has no type"),
            Self::UnknownType(name) => write!(f, "its type {name:?} is not among the cloud's types"),
            Self::NoBackend(name) => {
                write!(f, "the type {name:?} does not say on which backend (extra spec volume_backend_name)")
            }
            Self::EncryptingType(name) => {
                write!(f, "the type {name:?} encrypts, and an image is not encrypted on its way")
            }
            Self::SpecialType { name, spec } => {
                write!(f, "the type {name:?} is for volumes of another kind (extra spec {spec})")
            }
            Self::NoWayAround { name, asks, backend } => {
                write!(
                    f,
                    "the type {name:?} has {asks}, so that Cinder would copy everything: make a type with only "
                )?;
                write!(f, "volume_backend_name={backend}, for the way")
            }
            Self::SamePool(pool) => {
                write!(f, "both types are on {pool}: nothing has to be moved, openstack volume set --type does it")
            }
            Self::LocalBoot => f.write_str(
                "it boots from a disk on its host, which is lost when the server is shelved to be brought over",
            ),
            Self::Ephemeral(size) => {
                write!(
                    f,
                    "it has an ephemeral disk of {size} GiB on its host, which is lost when the server is shelved "
                )?;
                f.write_str("to be brought over")
            }
            Self::Quota { project, key, room, needed, limit } => {
                write!(f, "the project {project} may have {room} more of {key}, and its volumes need {needed}: ")?;
                match key.split_once('_') {
                    Some((what, of)) => {
                        write!(f, "openstack quota set --{what} {limit} --volume-type {of:?} {project}")
                    }
                    None => write!(f, "openstack quota set --{key} {limit} {project}"),
                }
            }
            Self::NoImage { image, pools } => {
                let pools =
                    if pools.is_empty() { "any pool that its host names".to_owned() } else { pools.join(" or ") };
                write!(f, "there is no image {image:?} in {pools}: say which pool its type is on with --pool TYPE=POOL")
            }
            Self::OtherSize { image, found, expected } => {
                write!(f, "{image} has {found} bytes, and Cinder says {expected}")
            }
            Self::Image(why) => f.write_str(why),
        }
    }
}
