//! Which volumes are to get another type.

use super::super::cinder::Volume;
use super::super::nova::Server;
use crate::plan::Strategy;
use crate::plan::values::matches_glob;

/// Which volumes are to get which type.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// The type for volumes that a server boots from; without it they stay.
    pub boot_type: Option<String>,
    /// The type for all others; without it they stay.
    pub data_type: Option<String>,
    /// Which volumes are meant at all.
    pub filter: Filter,
    /// Servers, by id or name, whose data disks are those of servers to come.
    pub gateways: Vec<String>,
    /// The key of a volume's metadata that says for which server to come it is.
    pub group_by: Option<String>,
    /// Whether volumes that nobody has are meant as well.
    pub detached: bool,
    /// How the volumes get their type.
    pub strategy: Strategy,
}

impl Rules {
    /// The type that a volume is to have; `None` where it stays as it is.
    pub fn target(&self, is_boot: bool) -> Option<&str> {
        if is_boot { self.boot_type.as_deref() } else { self.data_type.as_deref() }
    }
}

/// Which volumes are meant. What is left out does not narrow.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// What the volume's name or id fits, or its server's, with `*` and `?`.
    pub name: Option<String>,
    /// What the volume's metadata has, or its server's: all of these.
    pub metadata: Vec<(String, String)>,
    /// The type that it has: one of these.
    pub types: Vec<String>,
    /// The least size, in bytes.
    pub min_size: Option<u64>,
    /// The largest size, in bytes.
    pub max_size: Option<u64>,
}

impl Filter {
    /// Whether a volume is meant, which that server has.
    pub fn fits(&self, volume: &Volume, server: Option<&Server>) -> bool {
        let names =
            [&volume.name, &volume.id].into_iter().chain(server.iter().flat_map(|server| [&server.name, &server.id]));
        let named = |pattern: &String| names.into_iter().any(|name| matches_glob(pattern, name));
        let has = |(key, value): &(String, String)| {
            let of_server = server.and_then(|server| server.metadata.get(key));
            volume.metadata.get(key) == Some(value) || of_server == Some(value)
        };
        let size = bytes(volume);
        self.name.as_ref().is_none_or(named)
            && self.metadata.iter().all(has)
            && (self.types.is_empty() || volume.volume_type.as_ref().is_some_and(|name| self.types.contains(name)))
            && self.min_size.is_none_or(|least| size >= least)
            && self.max_size.is_none_or(|most| size <= most)
    }
}

/// A volume's size in bytes.
pub(super) fn bytes(volume: &Volume) -> u64 {
    volume.size.saturating_mul(1 << 30)
}
