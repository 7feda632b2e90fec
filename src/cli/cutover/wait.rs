//! Waiting for the hour of a cutover, while the servers stay in step.

use std::time::Duration;

use jiff::Timestamp;

use crate::cli::{Context, Interrupted};
use crate::observe::human::human_duration;

/// The longest sleep: a clock may be set, and a host may sleep as well.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Waits until then, with what is left of it on a terminal. Ctrl-C ends it, and has changed nothing.
pub(in crate::cli) async fn until(context: &Context<'_>, what: &str, at: Timestamp) -> anyhow::Result<()> {
    context.terminal.say(&format!("{what}: waits until {at}; Ctrl-C ends that, and nothing was changed"));
    let bar = context.terminal.progress(what);
    while let Some(left) = left(Timestamp::now(), at) {
        // Rounded up, so that it ends with 1 s.
        let seconds = left.as_secs() + u64::from(left.subsec_nanos() > 0);
        bar.say(format!("{what}: begins in {}", human_duration(seconds)));
        tokio::select! {
            () = tokio::time::sleep(left.min(LOOK_EVERY)) => {}
            () = context.cancel.cancelled() => return Err(Interrupted.into()),
        }
    }
    Ok(())
}

fn left(now: Timestamp, at: Timestamp) -> Option<Duration> {
    Duration::try_from(at.duration_since(now)).ok().filter(|left| !left.is_zero())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_that_has_come_is_not_waited_for() {
        let at: Timestamp = "2026-11-25T22:00:00Z".parse().unwrap();
        assert_eq!(left("2026-11-25T21:59:30Z".parse().unwrap(), at), Some(Duration::from_secs(30)));
        assert_eq!(left(at, at), None);
        assert_eq!(left("2026-11-26T00:00:00Z".parse().unwrap(), at), None);
    }
}
