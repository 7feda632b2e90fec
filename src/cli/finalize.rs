//! `poolshift finalize`: the kept sources of a server that runs from its targets are removed.
//!
//! First all that would be lost, and what stands in the way; then somebody's consent; then the steps as they go by, and
//! one line, or with `--json` one value, on standard output.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::Serialize;

use super::config::Finalize;
use super::cutover::{consent, find, open_kept};
use super::exit::Exit;
use super::fleet::PlanImages;
use super::terminal::{Terminal, drawing};
use super::values::human_bytes;
use super::{Context, Interrupted, daemon, deps, output};
use crate::cutover::farewell::{Farewell, Going, SourceFarewell, VolumeFarewell, Whose};
use crate::cutover::{CutoverError, Observer};
use crate::image::metadata::LostKey;
use crate::image::rbd::FlattenProgress;
use crate::observe::human::{human_moment, plain};

/// What a dry run says.
#[derive(Serialize)]
struct Summary<'a> {
    #[serde(flatten)]
    farewell: &'a Farewell,
    ready: bool,
    obstacles: Vec<String>,
}

/// Runs the command.
pub(super) async fn run(context: &Context<'_>, settings: &Finalize) -> anyhow::Result<Exit> {
    let plan = daemon::load(&settings.plan).await?;
    let planned = find(&plan, &settings.server)?;
    let plan_images = PlanImages::new(context, &plan);
    let context = &plan_images.context();
    let (consent, name) = (settings.consent, planned.name.as_str());
    let bar = context.terminal.progress(&format!("{name}: looking"));
    let look = async {
        let kept = open_kept(context, planned).await?;
        let farewell = kept.look().await?;
        anyhow::Ok((kept, farewell))
    };
    let (kept, farewell) = tokio::select! {
        looked = look => looked?,
        () = context.cancel.cancelled() => return Err(Interrupted.into()),
    };
    drop(bar);
    let obstacles = farewell.obstacles(settings.flatten);
    let text = shown(&farewell, settings.flatten, &obstacles);
    if consent.dry_run {
        let ready = obstacles.is_empty();
        match consent.json {
            true => output::json(&Summary { farewell: &farewell, ready, obstacles })?,
            false => output::bytes(text.as_bytes())?,
        }
        return Ok(if ready { Exit::Success } else { Exit::Failed });
    }
    context.terminal.say(text.trim_end());
    if !obstacles.is_empty() {
        return Err(CutoverError::Bound { server: name.to_owned(), obstacles }.into());
    }
    let what = format!("what is listed for {name} is REMOVED, and there is no way back to its sources");
    consent::ask(context, consent, &what, name).await?;
    let progress = Arc::new(FlattenProgress::default());
    let bar = context.terminal.progress(&format!("{name}: finalizing"));
    let draw = || {
        let total = progress.total.load(Ordering::Relaxed);
        if total > 0 {
            bar.set(progress.done.load(Ordering::Relaxed), total);
        }
    };
    let steps = Steps { terminal: context.terminal.clone(), server: name.to_owned() };
    let work = kept.carry_out(&farewell, settings.flatten, (&steps, &progress), &context.cancel);
    let done = drawing(work, draw).await;
    drop(bar);
    let done = done?;
    if consent.json {
        output::json(&done)?;
    } else if done.done {
        let (images, snapshots) = (done.removed_images.len(), done.removed_snapshots);
        let flattened = match done.flattened.len() {
            0 => String::new(),
            clones => format!("{} flattened, ", count(clones, "clone")),
        };
        let text = format!(
            "{} is finalized: {flattened}{} and {} removed\ntake it out of the plan: its sources are gone\n",
            plain(name),
            count(images, "source"),
            count(snapshots, "snapshot"),
        );
        output::bytes(text.as_bytes())?;
    }
    if done.done { Ok(Exit::Success) } else { Err(Interrupted.into()) }
}

fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

struct Steps {
    terminal: Terminal,
    server: String,
}

impl Observer for Steps {
    fn note(&self, text: &str) {
        self.terminal.say(&format!("{}: {}", plain(&self.server), plain(text)));
    }
}

/// What would be lost, and what stands in the way. Ends with a newline.
fn shown(farewell: &Farewell, flatten: bool, obstacles: &[String]) -> String {
    let mut text = format!(
        "{}: {}; from its targets since {}\n",
        plain(&farewell.server),
        plain(&farewell.by),
        human_moment(&farewell.since)
    );
    if farewell.begun {
        text.push_str("  finalizing was begun, and has not ended: it is finished\n");
    }
    for VolumeFarewell { volume, source, target } in &farewell.volumes {
        text.push_str(&format!("  {}\n", plain(volume)));
        match source {
            Some(source) => text.push_str(&source_lines(source, flatten)),
            None => text.push_str("    its source has gone already\n"),
        }
        let location = plain(&target.location);
        if target.snapshots.is_empty() {
            text.push_str(&format!("    stays {location}, with all its snapshots\n"));
        } else {
            let loses = count(target.snapshots.len(), "snapshot");
            text.push_str(&format!("    stays {location}, and loses {loses} of poolshift's\n"));
            text.push_str(&snapshot_lines(&target.snapshots));
            for clone in target.snapshots.iter().flat_map(|going| &going.clones) {
                text.push_str(&format!("      clone {} keeps its snapshot in the trash\n", plain(&clone.to_string())));
            }
        }
    }
    for obstacle in obstacles {
        text.push_str(&format!("  error    {}\n", plain(obstacle)));
    }
    text
}

fn source_lines(source: &SourceFarewell, flatten: bool) -> String {
    let own = source.own_bytes.map(|own| format!(", {} of its own", human_bytes(own))).unwrap_or_default();
    let mut text = format!("    lost  {}, {}{own}\n", plain(&source.location), human_bytes(source.size));
    text.push_str(&snapshot_lines(&source.snapshots));
    for clone in &source.clones {
        let what = match (flatten, &clone.cost) {
            (true, Some(cost)) => format!("is cut loose; {}", deps::cost_text(cost)),
            (false, Some(cost)) => format!("hangs on it; {}", deps::cost_text(cost)),
            (_, None) => "hangs on it by its snapshots".to_owned(),
        };
        text.push_str(&format!("      clone {} {what}\n", plain(&clone.image.to_string())));
    }
    for LostKey { key, bytes, differs } in &source.metadata {
        let bytes = bytes.map(|bytes| format!(", {}", count(bytes, "byte"))).unwrap_or_default();
        let how = if *differs { "the target has another value" } else { "NOT on the target" };
        text.push_str(&format!("      metadata {}{bytes}; {how}\n", plain(key)));
    }
    for user in &source.users {
        text.push_str(&format!("      open at {}\n", plain(user)));
    }
    text
}

fn snapshot_lines(snapshots: &[Going]) -> String {
    let line = |going: &Going| {
        let whose = match going.whose {
            Whose::Poolshift => "",
            Whose::Unknown => "; named like poolshift's, of unknown origin",
            Whose::Foreign => "; FOREIGN: not made by poolshift",
        };
        let protected = if going.protected { ", protected" } else { "" };
        let size = human_bytes(going.size);
        format!("      @{} (id {}), {size}{protected}{whose}\n", plain(&going.name), going.id)
    };
    snapshots.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cutover::farewell::{CloneFarewell, TargetFarewell};
    use crate::image::rbd::{FlattenBound, FlattenCost, RbdLink};

    #[test]
    fn what_is_lost_is_said_whole() {
        let going = |id, name: &str, whose| Going {
            id,
            name: name.into(),
            size: 8 << 20,
            whose,
            protected: id == 4,
            user: true,
            clones: Vec::new(),
        };
        let clone = CloneFarewell {
            image: RbdLink { pool: "sata".into(), namespace: None, image: "c".into(), id: "9".into(), trash: false },
            cost: Some(FlattenCost { bytes_at_most: 4 << 20, bound: FlattenBound::ObjectMap }),
            bound_snapshots: Vec::new(),
        };
        let source = SourceFarewell {
            location: "rbd:sata/a.poolshift-kept".into(),
            named_as_kept: true,
            size: 8 << 20,
            own_bytes: Some(4 << 20),
            snapshots: vec![
                going(3, "poolshift-20261123T220511.123Z", Whose::Poolshift),
                going(4, "before\nupgrade", Whose::Foreign),
            ],
            clones: vec![clone],
            metadata: vec![
                LostKey { key: "conf_rbd_qos_bps_limit".into(), bytes: Some(8), differs: true },
                LostKey { key: "rbd.csi.ceph.com/dek".into(), bytes: Some(1), differs: false },
                LostKey { key: ".rbd_mirror.4f2c".into(), bytes: None, differs: false },
            ],
            users: vec!["10.0.0.1:0/1".into()],
        };
        let target =
            |location: &str, snapshots| TargetFarewell { location: location.into(), snapshots, follows_another: None };
        let ours = vec![going(11, "poolshift-20261123T220511.123Z", Whose::Poolshift)];
        let volume = |volume: &str, source, target| VolumeFarewell { volume: volume.into(), source, target };
        let farewell = Farewell {
            server: "web".into(),
            by: "commands of the plan".into(),
            since: "2026-11-25T22:00:00Z".into(),
            begun: true,
            wrong_side: None,
            volumes: vec![
                volume("root", Some(source), target("rbd:sas/a", ours)),
                volume("data", None, target("rbd:sas/b", vec![])),
            ],
        };
        insta::assert_snapshot!(shown(&farewell, false, &farewell.obstacles(false)), @r"
        web: commands of the plan; from its targets since 2026-11-25T22:00:00Z
          finalizing was begun, and has not ended: it is finished
          root
            lost  rbd:sata/a.poolshift-kept, 8.0 MiB, 4.0 MiB of its own
              @poolshift-20261123T220511.123Z (id 3), 8.0 MiB
              @before upgrade (id 4), 8.0 MiB, protected; FOREIGN: not made by poolshift
              clone rbd:sata/c hangs on it; flattening copies at most 4.0 MiB
              metadata conf_rbd_qos_bps_limit, 8 bytes; the target has another value
              metadata rbd.csi.ceph.com/dek, 1 byte; NOT on the target
              metadata .rbd_mirror.4f2c; NOT on the target
              open at 10.0.0.1:0/1
            stays rbd:sas/a, and loses 1 snapshot of poolshift's
              @poolshift-20261123T220511.123Z (id 11), 8.0 MiB
          data
            its source has gone already
            stays rbd:sas/b, with all its snapshots
          error    rbd:sata/c is a clone that hangs on rbd:sata/a.poolshift-kept: give --flatten, or remove it
        ");
    }
}
