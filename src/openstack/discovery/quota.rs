//! Whether the projects may have that much of the new types.

use std::collections::BTreeMap;

use super::super::cinder::Quota;
use super::{Group, Obstacle, World};

/// By project and by what (`gigabytes_sas`), a number.
type Sums = BTreeMap<(String, String), i64>;

/// What a group's volumes need, and of that what they need on their way only.
fn needs(group: &Group) -> (Sums, Sums) {
    let (mut stays, mut passes) = (Sums::new(), Sums::new());
    for one in &group.moves {
        let Some(project) = &one.volume.project else { continue };
        let size = i64::try_from(one.volume.size).unwrap_or(i64::MAX);
        let add = |sums: &mut Sums, of: &str| {
            for (what, number) in [("gigabytes", size), ("volumes", 1)] {
                let sum = sums.entry((project.clone(), format!("{what}_{of}"))).or_default();
                *sum = sum.saturating_add(number);
            }
        };
        add(&mut stays, &one.cinder.to_type);
        if let Some(helpers) = &one.cinder.by_way_of {
            for helper in [&helpers.from, &helpers.to] {
                if ![&one.cinder.from_type, &one.cinder.to_type].contains(&helper) {
                    add(&mut passes, helper);
                }
            }
        }
    }
    (stays, passes)
}

/// Notes which groups don't fit into the quotas any more, once those before them have been moved; groups that something
/// else keeps count for nothing. A volume's old type is given back by its move, and all types together don't change.
pub fn hold_against_quotas(groups: &mut [Group], world: &World) {
    let mut all = Sums::new();
    for group in groups.iter().filter(|group| group.is_ready()) {
        let (stays, passes) = needs(group);
        for (key, number) in stays {
            let sum = all.entry(key).or_default();
            *sum = sum.saturating_add(number);
        }
        // One server after the other passes through the helper types.
        for (key, number) in passes {
            let most = all.entry(key).or_default();
            *most = number.max(*most);
        }
    }
    let quota = |(project, key): &(String, String)| world.quotas.get(project)?.get(key).copied();
    let room = |quota: Quota| quota.limit.saturating_sub(quota.in_use).saturating_sub(quota.reserved).max(0);
    let mut taken = Sums::new();
    for group in groups.iter_mut().filter(|group| group.is_ready()) {
        let (stays, passes) = needs(group);
        let mut missing = Vec::new();
        for (key, number) in stays.iter().chain(&passes) {
            let Some(quota) = quota(key) else { continue };
            let before = taken.get(key).copied().unwrap_or_default();
            if quota.has_room(before.saturating_add(*number)) {
                continue;
            }
            let (room, needed) = (room(quota), all.get(key).copied().unwrap_or(*number));
            let limit = quota.in_use.saturating_add(quota.reserved).saturating_add(needed);
            let (project, key) = key.clone();
            missing.push(Obstacle::Quota { project, key, room, needed, limit });
        }
        if missing.is_empty() {
            for (key, number) in stays {
                let sum = taken.entry(key).or_default();
                *sum = sum.saturating_add(number);
            }
        }
        group.obstacles.extend(missing);
    }
}
