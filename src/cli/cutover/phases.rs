//! The phases of a cutover as they go by: a live line on a terminal, a line for each phase elsewhere.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::cli::Context;
use crate::cli::terminal::{Bar, Terminal, drawing};
use crate::cutover::Observer;
use crate::cutover::phase::Phase;

/// Awaits `work` on a server, which tells its phases to the observer that it is given.
pub(in crate::cli) async fn shown<T>(
    context: &Context<'_>,
    server: &str,
    work: impl AsyncFnOnce(&dyn Observer) -> T,
) -> T {
    let phases = Phases {
        bar: context.terminal.progress(server),
        terminal: context.terminal.clone(),
        server: server.to_owned(),
        seen: Mutex::new(Seen { begun: Instant::now(), phase: None, stopped: None }),
    };
    drawing(work(&phases), || phases.draw()).await
}

struct Phases {
    bar: Bar,
    terminal: Terminal,
    server: String,
    seen: Mutex<Seen>,
}

#[derive(Clone, Copy)]
struct Seen {
    begun: Instant,
    phase: Option<(Phase, Instant)>,
    /// Since when the server may stand still.
    stopped: Option<Instant>,
}

impl Seen {
    fn enter(&mut self, phase: Phase, now: Instant) {
        self.phase = Some((phase, now));
        self.stopped = match phase {
            Phase::Syncing | Phase::Converged => None,
            phase if phase.is_over() => None,
            // A server that is brought back before it was stopped has no outage.
            Phase::RollingBack => self.stopped,
            _ => Some(self.stopped.unwrap_or(now)),
        };
    }

    /// What a live line says.
    fn line(&self, server: &str, now: Instant) -> String {
        let Some((phase, since)) = self.phase else { return format!("{server}: looking") };
        let seconds = |since: Instant| now.saturating_duration_since(since).as_secs_f64();
        let stopped = self.stopped.map(|since| format!("; stands still for at most {:.1} s", seconds(since)));
        format!("{server}: {phase} for {:.1} s{}", seconds(since), stopped.unwrap_or_default())
    }
}

impl Phases {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn draw(&self) {
        let line = self.seen().line(&self.server, Instant::now());
        self.bar.say(line);
    }

    fn say(&self, text: &str) {
        let after = self.seen().begun.elapsed();
        self.terminal.say(&stamped(after, &self.server, text));
    }
}

/// A line with the time since the beginning: `[  1.20 s] web-1: final delta`.
fn stamped(after: Duration, server: &str, text: &str) -> String {
    format!("[{:>7.2} s] {server}: {text}", after.as_secs_f64())
}

impl Observer for Phases {
    fn phase(&self, phase: Phase) {
        self.seen().enter(phase, Instant::now());
        self.say(phase.title());
        self.draw();
    }

    fn note(&self, text: &str) {
        self.say(text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_live_line_counts_the_phase_and_the_outage() {
        let begun = Instant::now();
        let at = |ms: u64| begun + Duration::from_millis(ms);
        let mut seen = Seen { begun, phase: None, stopped: None };
        assert_eq!(seen.line("web-1", at(0)), "web-1: looking");
        seen.enter(Phase::Syncing, at(0));
        assert_eq!(seen.line("web-1", at(1200)), "web-1: syncing for 1.2 s");
        seen.enter(Phase::Quiescing, at(2000));
        seen.enter(Phase::FinalDelta, at(2500));
        assert_eq!(seen.line("web-1", at(3000)), "web-1: final delta for 0.5 s; stands still for at most 1.0 s");
        seen.enter(Phase::RollingBack, at(3000));
        assert_eq!(seen.line("web-1", at(3100)), "web-1: rolling back for 0.1 s; stands still for at most 1.1 s");
        seen.enter(Phase::RolledBack, at(4000));
        assert_eq!(seen.line("web-1", at(4000)), "web-1: rolled back for 0.0 s");
        let mut early = Seen { begun, phase: None, stopped: None };
        early.enter(Phase::Converged, at(0));
        early.enter(Phase::RollingBack, at(1));
        assert!(early.stopped.is_none());
        assert_eq!(stamped(Duration::from_millis(61_234), "web-1", "committed"), "[  61.23 s] web-1: committed");
    }
}
