//! `poolshift rehearse`: a throw-away server boots from clones of a server's newest point, and is removed.
//!
//! The steps as they go by, then one line, or with `--json` one value, on standard output.

use std::time::Instant;

use super::config::Rehearse;
use super::cutover::{find, open_stage};
use super::exit::Exit;
use super::fleet::PlanImages;
use super::terminal::Terminal;
use super::{Context, daemon, output};
use crate::cutover::rehearsal::Rehearsed;
use crate::cutover::{CutoverError, Observer};
use crate::observe::human::{human_moment, plain};

/// Runs the command.
pub(super) async fn run(context: &Context<'_>, settings: &Rehearse) -> anyhow::Result<Exit> {
    let plan = daemon::load(&settings.plan).await?;
    let planned = find(&plan, &settings.server)?;
    let plan_images = PlanImages::new(context, &plan);
    let context = &plan_images.context();
    let bar = context.terminal.progress(&format!("{}: rehearsing", planned.name));
    let Some(stage) = open_stage(context, planned).await? else {
        return Err(CutoverError::WrongState {
            server: planned.name.clone(),
            problem: "has a target that is a file, or is not there yet: there is nothing to clone".to_owned(),
            hint: format!("run poolshift replicate {} first", plan.path.display()),
        }
        .into());
    };
    let steps = Steps { terminal: context.terminal.clone(), server: planned.name.clone(), begun: Instant::now() };
    let done = stage.rehearse(settings.keep, &steps, &context.cancel).await?;
    drop(bar);
    match settings.json {
        true => output::json(&done)?,
        false => output::bytes(shown(&done).as_bytes())?,
    }
    Ok(match (done.passed, done.left.is_empty()) {
        (Some(false), _) => Exit::RehearsalFailed,
        (_, false) => Exit::Failed,
        (_, true) => Exit::Success,
    })
}

struct Steps {
    terminal: Terminal,
    server: String,
    begun: Instant,
}

impl Observer for Steps {
    fn note(&self, text: &str) {
        let after = self.begun.elapsed().as_secs_f64();
        self.terminal.say(&format!("[{after:>7.2} s] {}: {}", plain(&self.server), plain(text)));
    }
}

/// How it ended. Ends with a newline.
fn shown(done: &Rehearsed) -> String {
    let (server, at) = (plain(&done.server), human_moment(&done.point_at));
    let found = plain(done.found.as_deref().unwrap_or_default());
    let mut text = match done.passed {
        Some(false) => format!("{server} as of {at} is NOT well: {found}"),
        Some(true) => format!("{server} as of {at} is well: {found}"),
        None => format!("{server} as of {at} was there to boot from; whether it is well, a person knows"),
    };
    text.push_str(if done.left.is_empty() { "; all that was made is removed\n" } else { "\n" });
    for left in &done.left {
        text.push_str(&format!("not removed: {}; poolshift gc PLAN --yes tries again\n", plain(left)));
    }
    text
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn how_it_ended_is_a_line() {
        let mut done = Rehearsed {
            server: "web".into(),
            by: "libvirt domain web, warm".into(),
            point: "p".into(),
            point_at: "2026-11-26T12:00:00Z".into(),
            stand_in: "web.poolshift-rehearsal".into(),
            clones: Vec::new(),
            passed: Some(true),
            found: Some("its console showed \"login:\"".into()),
            took: Duration::from_secs(8),
            remarks: Vec::new(),
            left: Vec::new(),
        };
        insta::assert_snapshot!(shown(&done), @r#"web as of 2026-11-26T12:00:00Z is well: its console showed "login:"; all that was made is removed"#);
        done.left = vec!["rbd:sas/web.poolshift-rehearsal: it is open".into()];
        (done.passed, done.found) = (Some(false), Some("it is off after 3.0 s\x1b[2J".into()));
        let failed = "web as of 2026-11-26T12:00:00Z is NOT well: it is off after 3.0 s\u{fffd}[2J\n\
                      not removed: rbd:sas/web.poolshift-rehearsal: it is open; poolshift gc PLAN --yes tries again\n";
        assert_eq!(shown(&done), failed);
    }
}
