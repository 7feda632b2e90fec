//! `poolshift status SOURCE TARGET`: how far a volume is.

use super::config::Status;
use super::exit::Exit;
use super::output::{self, Facts};
use super::values::human_bytes;
use super::{Context, images};
use crate::observe::human::human_duration;
use crate::replicate;

/// Runs the command.
pub(super) async fn run(context: &Context<'_>, settings: &Status) -> anyhow::Result<Exit> {
    let source = images::source(context, &settings.source).await?.image();
    let target = images::existing_target(context, &settings.target, settings.state_dir.as_deref()).await?;
    let status = replicate::status(source.as_ref(), target.as_ref()).await?;
    if settings.json {
        output::json(&status)?
    } else {
        facts(&status).print()?
    }
    Ok(Exit::Success)
}

fn facts(status: &replicate::Status) -> Facts {
    let mut facts = Facts::default();
    facts.add("state", status.state);
    facts.add("source", &status.source).add("target", &status.target);
    let point = |point: &Option<replicate::StatusPoint>| match point {
        Some(point) => format!("{}, {}", point.snapshot, point.age_seconds.map_or_else(|| point.at.clone(), age)),
        None => "none".to_owned(),
    };
    facts.add("base", point(&status.base)).add("last commit", point(&status.last_commit));
    if let Some(in_flight) = &status.in_flight {
        let done = match (in_flight.applied, in_flight.size) {
            (true, _) => "applied, not committed".to_owned(),
            (false, Some(size)) => {
                format!("done up to {} of {}", human_bytes(in_flight.progress_to), human_bytes(size))
            }
            (false, None) => "not begun".to_owned(),
        };
        facts.add("in flight", format!("{}, {done}", in_flight.snapshot));
    }
    facts.add("target HEAD", if status.head_dirty { "dirty" } else { "clean" });
    match status.changed_bytes_at_most {
        Some(bytes) => facts.add("changed", format!("at most {} since the base", human_bytes(bytes))),
        None => facts.add("changed", "not known without reading"),
    };
    match &status.lease {
        Some(owner) => facts.add("lease", owner),
        None => facts.add("lease", "nobody works on the target"),
    };
    if let Some(conflict) = &status.conflict {
        facts.add("conflict", conflict);
    }
    for remark in &status.remarks {
        facts.add("note", remark);
    }
    facts
}

/// How long ago something was, for people.
fn age(seconds: i64) -> String {
    match u64::try_from(seconds) {
        Ok(seconds @ 1..) => format!("{} ago", human_duration(seconds)),
        _ => "just now".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn ages_are_told_in_their_two_largest_units() {
        let told = [-1, 0, 59, 60, 3_660, 90_061].map(super::age);
        assert_eq!(told, ["just now", "just now", "59 s ago", "1 min ago", "1 h 1 min ago", "1 d 1 h ago"]);
    }
}
