//! What has become of a server of a cloud that its plan does not know of: as pure functions of what Cinder and Nova say.

use futures::future::try_join_all;

use super::recreate::find_marked;
use crate::fleet::Drift;
use crate::openstack::cinder::Volume;
use crate::openstack::nova::ServerAttachment;
use crate::openstack::{Cloud, CloudError, if_there};
use crate::plan::{CinderVolume, Cutover, Holder, Server, Strategy};

/// Asks.
///
/// # Errors
/// If it could not be asked: nothing is known then.
pub async fn look(cloud: &Cloud, server: &Server) -> Result<Vec<Drift>, CloudError> {
    let Cutover::OpenStack(config) = &server.cutover else { return Ok(Vec::new()) };
    let cinder = server.volumes.iter().filter_map(|volume| Some((volume.name.as_str(), volume.cinder.as_ref()?)));
    let shown = cinder.map(|(name, cinder)| async move {
        Ok::<_, CloudError>((name, cinder, if_there(cloud.volume(&cinder.volume).await)?))
    });
    let shown = try_join_all(shown).await?;
    let mut drift: Vec<Drift> =
        shown.iter().filter_map(|(name, cinder, shown)| of_volume(name, cinder, shown)).collect();
    let holder = match &config.holder {
        Holder::Server(id) => Some((id, "server")),
        Holder::Gateway { server, .. } => Some((server, "gateway")),
        Holder::Nobody => None,
    };
    match holder {
        Some((id, what)) => {
            let mut attached = if_there(cloud.server_attachments(id).await)?;
            let is_server = what == "server";
            if attached.is_none()
                && config.strategy == Strategy::Recreate
                && let Some(now) = find_marked(cloud, id).await?
            {
                attached = if_there(cloud.server_attachments(&now.id).await)?;
            }
            drift.extend(of_holder(server, (id, what), attached.as_deref(), is_server));
        }
        None => drift.extend(shown.iter().filter_map(|(name, _, shown)| of_detached(name, shown.as_ref()))),
    }
    Ok(drift)
}

/// One that is gone, or has another type, has no image any more where the plan has its source.
fn of_volume(name: &str, planned: &CinderVolume, shown: &Option<Volume>) -> Option<Drift> {
    let about = name.to_owned();
    let Some(shown) = shown else {
        let text = format!("the cloud has no volume {} any more: take it out of the plan", planned.volume);
        return Some(Drift { about, text, holds: true });
    };
    let now = shown.volume_type.as_deref().unwrap_or("none");
    if now == planned.from_type || planned.by_way_of.as_ref().is_some_and(|helpers| now == helpers.from) {
        return None;
    }
    let text = match shown.is_moving() {
        true => format!("volume {} is {}", planned.volume, shown.status),
        false => format!(
            "somebody has given volume {} the type {now:?}, where the plan has {:?}: make the plan anew",
            planned.volume, planned.from_type
        ),
    };
    Some(Drift { about, text, holds: true })
}

/// Which disks a server has. What is replicated of the others is right all the same.
fn of_holder(
    server: &Server,
    (id, what): (&str, &str),
    attached: Option<&[ServerAttachment]>,
    has_all: bool,
) -> Vec<Drift> {
    let shown = |about: &str, text: String| Drift { about: about.to_owned(), text, holds: false };
    let Some(attached) = attached else {
        return vec![shown(&server.name, format!("the cloud has no {what} {id} any more"))];
    };
    let mut drift = Vec::new();
    for volume in &server.volumes {
        let Some(cinder) = &volume.cinder else { continue };
        if !attached.iter().any(|found| found.volume == cinder.volume) {
            let text = format!("volume {} is not with its {what} {id}", cinder.volume);
            drift.push(shown(&volume.name, text));
        }
    }
    let is_planned = |found: &&ServerAttachment| {
        server.volumes.iter().any(|volume| volume.cinder.as_ref().is_some_and(|cinder| cinder.volume == found.volume))
    };
    let more = attached.iter().filter(|found| has_all && !is_planned(found));
    drift.extend(more.map(|found| {
        let text = format!("it has a volume {} that the plan does not have: it stays where it is", found.volume);
        shown(&server.name, text)
    }));
    drift
}

fn of_detached(name: &str, shown: Option<&Volume>) -> Option<Drift> {
    let attachment = shown?.attachments.first()?;
    let text = format!("it was attached to server {}: make the plan anew", attachment.server_id);
    Some(Drift { about: name.to_owned(), text, holds: false })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVER: &str = "11111111-1111-1111-1111-111111111111";
    const VOLUME: &str = "22222222-2222-2222-2222-222222222222";

    fn planned() -> Server {
        let text = format!(
            "[[server]]\nname = \"web\"\ncutover = {{ openstack = {{ server = \"{SERVER}\" }} }}\n[[server.volume]]\nname = \
             \"root\"\nsource = \"rbd:sata/volume-{VOLUME}\"\ntarget = \"rbd:sas/poolshift-{VOLUME}\"\ncinder = {{ volume = \
             \"{VOLUME}\", from_type = \"sata\", to_type = \"sas\" }}\n"
        );
        crate::plan::Plan::parse(&text, std::path::Path::new("plan.toml")).unwrap().servers.remove(0)
    }

    fn volume(status: &str, volume_type: &str) -> Option<Volume> {
        let shown = serde_json::json!({"id": VOLUME, "size": 1, "status": status, "volume_type": volume_type});
        Some(serde_json::from_value(shown).unwrap())
    }

    fn attached(volume: &str) -> ServerAttachment {
        ServerAttachment { volume: volume.into(), device: None, delete_on_termination: false, tag: None }
    }

    #[test]
    fn only_what_takes_the_source_away_holds() {
        let planned = planned();
        let cinder = planned.volumes[0].cinder.as_ref().unwrap();
        let of = |shown| of_volume("root", cinder, &shown);
        assert_eq!(of(volume("in-use", "sata")), None);
        for (shown, words) in [
            (None, "no volume 2222"),
            (volume("in-use", "sas"), "given volume 2222"),
            (volume("retyping", "sas"), "is retyping"),
        ] {
            let drift = of(shown).expect(words);
            assert!(drift.holds && drift.about == "root" && drift.text.contains(words), "{drift:?}");
        }
        let holder = |attached: Option<&[ServerAttachment]>| of_holder(&planned, (SERVER, "server"), attached, true);
        assert_eq!(holder(Some(&[attached(VOLUME)])), []);
        for (attached, about, words) in [
            (None, "web", "no server 1111"),
            (Some(vec![]), "root", "is not with its server"),
            (Some(vec![attached(VOLUME), attached("3")]), "web", "a volume 3 that the plan does not have"),
        ] {
            let [drift] = &holder(attached.as_deref())[..] else { panic!("{words}") };
            assert!(!drift.holds && drift.about == about && drift.text.contains(words), "{drift:?}");
        }
        // A gateway has disks of others.
        assert_eq!(of_holder(&planned, (SERVER, "gateway"), Some(&[attached(VOLUME), attached("3")]), false), []);
    }
}
