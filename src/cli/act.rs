//! `poolshift pause`, `resume`, `sync-now` and `throttle`: what a person tells a daemon.

use super::config::{Act, Throttle};
use super::exit::Exit;
use super::values::human_bytes;
use super::{daemon, output};
use crate::observe::client::Action;
use crate::observe::human::plain;
use crate::throttle::Rate;

/// Runs `pause`, `resume` and `sync-now`.
pub(super) async fn run(settings: &Act) -> anyhow::Result<Exit> {
    let plan = daemon::load(&settings.plan).await?;
    let client = daemon::client(&plan, settings.token_file.as_deref())?;
    let servers = client.act(settings.action, &settings.scope).await?;
    output::bytes(told(settings.action, &servers).as_bytes())?;
    Ok(Exit::Success)
}

fn told(action: Action, servers: &[String]) -> String {
    let done = match action {
        Action::Pause => "paused",
        Action::Resume => "resumed",
        Action::SyncNow => "due now",
    };
    servers.iter().map(|server| format!("{}: {done}\n", plain(server))).collect()
}

/// Runs `throttle`.
pub(super) async fn throttle(settings: &Throttle) -> anyhow::Result<Exit> {
    let plan = daemon::load(&settings.plan).await?;
    let client = daemon::client(&plan, settings.token_file.as_deref())?;
    client.set_throttle(&settings.pool, settings.rate).await?;
    output::bytes(limited(&settings.pool, settings.rate).as_bytes())?;
    Ok(Exit::Success)
}

fn limited(pool: &str, rate: Option<Rate>) -> String {
    let pool = plain(pool);
    let Some(Rate { bytes_per_second, operations_per_second }) = rate else {
        return format!("{pool}: what the plan says\n");
    };
    let bytes = bytes_per_second.map_or_else(|| "any bytes".to_owned(), |limit| human_bytes(limit.get()));
    let operations =
        operations_per_second.map_or_else(|| "any requests".to_owned(), |limit| format!("{limit} requests"));
    format!("{pool}: {bytes} and {operations} a second, until the plan is read again\n")
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use super::*;

    #[test]
    fn what_was_done_is_told() {
        assert_eq!(told(Action::Pause, &["web-1".into(), "db\n".into()]), "web-1: paused\ndb: paused\n");
        assert_eq!(limited("sata", None), "sata: what the plan says\n");
        let rate = Rate { bytes_per_second: NonZeroU64::new(100 << 20), operations_per_second: None };
        let text = "sata: 100.0 MiB and any requests a second, until the plan is read again\n";
        assert_eq!(limited("sata", Some(rate)), text);
    }
}
