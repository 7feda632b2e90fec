//! `poolshift status PLAN`: how all servers of a plan are, once or live.

use std::io::IsTerminal as _;
use std::time::Duration;

use super::config::{self, UsageError};
use super::exit::Exit;
use super::fleet::{PlanImages, without_retyped};
use super::{Context, daemon, output};
use crate::fleet::status::{FleetStatus, Origin};
use crate::observe::client::{Client, ClientError};
use crate::observe::human::plain;
use crate::observe::table::{Look, fleet_table};
use crate::plan::Plan;

/// How often a daemon is asked while somebody watches.
const PACE: Duration = Duration::from_secs(1);

/// How often the images are read instead: each time is a few requests for every volume.
const PACE_OF_IMAGES: Duration = Duration::from_secs(10);

/// The width of a table that no terminal shows.
const WIDTH: usize = 120;

/// Runs the command.
pub(super) async fn run(context: &Context<'_>, settings: &config::FleetStatus) -> anyhow::Result<Exit> {
    if settings.watch && !std::io::stdout().is_terminal() {
        let text = "--watch draws on a terminal, and standard output is none; without it the status is printed once";
        return Err(UsageError(text.into()).into());
    }
    let plan = without_retyped(&context.terminal, daemon::load(&settings.plan).await?);
    let client = daemon::reader(&plan, settings.token_file.as_deref())?;
    if settings.watch {
        return watch(context, &plan, client.as_ref(), settings.volumes).await;
    }
    let status = tokio::select! {
        status = current(client.as_ref(), images(context, &plan)) => status?,
        () = context.cancel.cancelled() => return Err(super::Interrupted.into()),
    };
    if settings.json {
        output::json(&status)?;
    } else {
        let look = Look { width: size().map_or(WIDTH, |(width, _)| width), ..look(settings.volumes) };
        output::bytes(fleet_table(&status, look).as_bytes())?;
    }
    Ok(Exit::Success)
}

fn look(volumes: bool) -> Look {
    let no_colour = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    Look { width: WIDTH, colour: !no_colour && std::io::stdout().is_terminal(), volumes }
}

/// The terminal's columns and rows, if standard output is one that knows them.
fn size() -> Option<(usize, usize)> {
    let size = rustix::termios::tcgetwinsize(std::io::stdout()).ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then(|| (size.ws_col.into(), size.ws_row.into()))
}

/// What the images tell, without a daemon.
async fn images(context: &Context<'_>, plan: &Plan) -> FleetStatus {
    crate::fleet::status_from_images(plan, PlanImages::new(context, plan).as_ref()).await
}

/// Asks the daemon, and the images only where there is none: one that is there and refuses, or hangs, is to be heard of.
async fn current(
    client: Option<&Client>,
    images: impl Future<Output = FleetStatus>,
) -> Result<FleetStatus, ClientError> {
    if let Some(client) = client {
        match client.fleet().await {
            Err(error @ ClientError::NoDaemon { .. }) => tracing::debug!("{error}: the images are read"),
            answer => return answer,
        }
    }
    Ok(images.await)
}

/// Draws until Ctrl-C. Once there is something to show, what goes wrong is shown under it.
async fn watch(context: &Context<'_>, plan: &Plan, client: Option<&Client>, volumes: bool) -> anyhow::Result<Exit> {
    let mut shown: Option<FleetStatus> = None;
    loop {
        let status = tokio::select! {
            status = current(client, images(context, plan)) => status,
            () = context.cancel.cancelled() => return Ok(Exit::Success),
        };
        let problem = match status {
            Ok(status) => {
                if shown.is_none() {
                    output::bytes(b"\x1b[2J")?;
                }
                shown = Some(status);
                None
            }
            Err(error) if shown.is_none() => return Err(error.into()),
            Err(error) => Some(format!("no news: {error}")),
        };
        let Some(status) = &shown else { continue };
        let (width, height) = size().unwrap_or((80, 24));
        let table = fleet_table(status, Look { width, ..look(volumes) });
        output::bytes(frame(&table, problem.as_deref(), &status.at, height).as_bytes())?;
        let pace = if status.origin == Origin::Images { PACE_OF_IMAGES } else { PACE };
        tokio::select! {
            () = tokio::time::sleep(pace) => {}
            () = context.cancel.cancelled() => return Ok(Exit::Success),
        }
    }
}

/// A screen: drawn over the one before, line by line, which flickers less than clearing it first. What does not fit is
/// left out with a word, because a terminal would scroll.
fn frame(table: &str, problem: Option<&str>, at: &str, height: usize) -> String {
    let lines: Vec<&str> = table.lines().collect();
    let footer = problem.map_or_else(|| format!("at {}; Ctrl-C ends", plain(at)), plain);
    // The footer has a line, and the cursor stands in one below.
    let room = height.saturating_sub(2);
    let (fitting, left_out) = match lines.len() {
        all if all <= room => (all, 0),
        all => (room.saturating_sub(1), all - room.saturating_sub(1)),
    };
    let mut text = String::from("\x1b[H");
    for line in &lines[..fitting] {
        text.push_str(&format!("{line}\x1b[K\n"));
    }
    if left_out > 0 {
        text.push_str(&format!("… and {left_out} more lines, for a larger window\x1b[K\n"));
    }
    text + &format!("{footer}\x1b[K\n\x1b[J")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn empty() -> FleetStatus {
        FleetStatus {
            plan: "plan.toml".into(),
            origin: Origin::Images,
            at: "2026-01-02T03:04:05Z".into(),
            worker: None,
            servers: Vec::new(),
            throttles: Vec::new(),
        }
    }

    #[tokio::test]
    async fn the_images_are_read_only_where_there_is_no_daemon() {
        assert_eq!(current(None, async { empty() }).await.unwrap(), empty());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = Client::new(listener.local_addr().unwrap(), None);
        // Hangs up without a word.
        let daemon = tokio::spawn(async move { drop(listener.accept().await) });
        let answer = current(Some(&client), async { panic!("there is something") }).await;
        assert!(matches!(answer, Err(ClientError::Http { .. })), "{answer:?}");
        daemon.await.unwrap();
        assert_eq!(current(Some(&client), async { empty() }).await.unwrap(), empty());
    }

    #[test]
    fn a_frame_fits_the_window() {
        let screen = |text: &str| text.replace("\x1b[K", "").replace("\x1b[H", "").replace("\x1b[J", "");
        assert_eq!(screen(&frame("a\nb\n", None, "now", 24)), "a\nb\nat now; Ctrl-C ends\n");
        let cut = screen(&frame("a\nb\nc\nd\n", Some("no news: x\ny"), "now", 5));
        assert_eq!(cut, "a\nb\n… and 2 more lines, for a larger window\nno news: x y\n");
        for height in 0..8 {
            let lines = screen(&frame("a\nb\nc\nd\n", None, "now", height)).lines().count();
            assert!(lines < height.max(3), "{height}: {lines}");
        }
    }
}
