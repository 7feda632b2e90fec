//! The command line: raw flags → validated [`config::Config`] → one command a file.
//!
//! [`parse`] ends in a configuration in which every value and every combination makes sense, [`run`] does what it
//! says. Results go to standard output and nothing else does; progress, log lines and errors go to standard error.
//! With `--json`, standard output is exactly one JSON value.

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory as _, Parser as _};
use tokio_util::sync::CancellationToken;

mod act;
mod args;
mod check;
pub mod config;
mod cutover;
mod cutover_args;
mod daemon;
mod demo;
mod deps;
mod diff;
mod error;
pub mod exit;
mod export_diff;
mod finalize;
mod flatten;
mod fleet;
mod fleet_args;
mod fleet_status;
mod gc;
mod images;
mod import_diff;
mod inspect;
mod merge_diff;
mod output;
mod plan;
mod plan_args;
mod progress;
mod receive;
mod rehearse;
mod replicate;
mod retype;
mod retype_args;
mod rollback;
mod send;
mod status;
mod streams;
mod sync;
mod terminal;
pub mod values;
mod verify;

pub use args::{ImageFeature, LogFormat};
pub use error::{render as render_error, show as show_error};

use config::{Command, Config, UsageError};
use exit::Exit;
use terminal::Terminal;

/// How long the end of the process waits for RBD images to close: a request that the cluster never answers holds them.
const CLOSE_PATIENCE: Duration = Duration::from_secs(5);

/// Ctrl-C or SIGTERM came, and the command stopped with nothing half done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("interrupted; run it again")]
pub struct Interrupted;

/// What there is to show instead of running: a usage error, or the help or version that was asked for.
#[derive(Debug)]
pub struct Refusal(clap::Error);

impl Refusal {
    /// Shows it, and says how the process is to end: 0 for what was asked for, 2 for an error.
    pub fn show(&self) -> ExitCode {
        // Nobody is left to be told if standard error is closed.
        let _ = self.0.print();
        if self.0.use_stderr() { Exit::Usage.into() } else { Exit::Success.into() }
    }
}

/// Parses and validates a command line, whose first item is the program's name.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Config, Refusal> {
    args::Arguments::try_parse_from(args).map_err(Refusal)?.try_into().map_err(|UsageError(text)| {
        Refusal(args::Arguments::command().error(clap::error::ErrorKind::ValueValidation, text))
    })
}

/// What every command gets beside its own settings.
struct Context<'a> {
    config: &'a Config,
    terminal: Terminal,
    /// Cancelled by the first Ctrl-C or SIGTERM: stop at the next checkpoint.
    cancel: CancellationToken,
}

/// Does what the configuration says.
pub fn run(config: &Config) -> anyhow::Result<Exit> {
    let terminal = Terminal::new(config.verbosity, config.log_format);
    terminal.start_log(config.verbosity, config.log_format);
    if let Command::Completions(shell) = config.command {
        return completions(shell);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let outcome = runtime.block_on(async {
        let cancel = CancellationToken::new();
        tokio::spawn(cancel_on_signal(cancel.clone(), terminal.clone(), stopping(&config.command)));
        let outcome = dispatch(&Context { config, terminal, cancel }).await;
        // A handle that isn't closed leaves a watch behind, and for 30 s nobody could remove the image.
        if !crate::image::rbd::wait_until_closed(CLOSE_PATIENCE).await {
            tracing::debug!("an RBD image was not closed in time");
        }
        outcome
    });
    // A blocked read of standard input, or a request that the storage never answers, must not keep the process.
    runtime.shutdown_background();
    outcome
}

async fn dispatch(context: &Context<'_>) -> anyhow::Result<Exit> {
    match &context.config.command {
        Command::Sync(settings) => sync::run(context, settings).await,
        Command::Diff(settings) => diff::run(context, settings).await,
        Command::Verify(settings) => verify::run(context, settings).await,
        Command::Status(settings) => status::run(context, settings).await,
        Command::ExportDiff(settings) => export_diff::run(context, settings).await,
        Command::ImportDiff(settings) => import_diff::run(context, settings).await,
        Command::Inspect(settings) => inspect::run(context, settings).await,
        Command::MergeDiff(settings) => merge_diff::run(context, settings).await,
        Command::Send(settings) => send::run(context, settings).await,
        Command::Receive(settings) => receive::run(context, settings).await,
        Command::FleetStatus(settings) => fleet_status::run(context, settings).await,
        Command::Act(settings) => act::run(settings).await,
        Command::Throttle(settings) => act::throttle(settings).await,
        Command::Replicate(settings) => replicate::run(context, settings).await,
        Command::Cutover(settings) => cutover::run(context, settings).await,
        Command::Rehearse(settings) => rehearse::run(context, settings).await,
        Command::Rollback(settings) => rollback::run(context, settings).await,
        Command::Finalize(settings) => finalize::run(context, settings).await,
        Command::Retype(settings) => retype::run(context, settings).await,
        Command::Deps(settings) => deps::run(context, settings).await,
        Command::Flatten(settings) => flatten::run(context, settings).await,
        Command::Gc(settings) => gc::run(context, settings).await,
        Command::Plan(settings) => plan::run(context, settings).await,
        Command::Check(settings) => check::run(context, settings).await,
        Command::Demo(settings) => demo::run(context, settings).await,
        Command::Completions(shell) => completions(*shell),
    }
}

/// What a person is told who asks for a clean stop; nothing where that takes no time.
fn stopping(command: &Command) -> Option<&'static str> {
    match command {
        Command::FleetStatus(_) | Command::Act(_) | Command::Throttle(_) => None,
        Command::Cutover(_) | Command::Rollback(_) => Some(
            "stopping: a server that stands still is brought back; once more to end at once, and leave it as it is",
        ),
        Command::Retype(_) => Some("stopping: Cinder goes on with what it has begun; run it again to see it through"),
        Command::Rehearse(_) => {
            Some("stopping: what was made is removed; once more to end at once, and leave it to gc")
        }
        _ => Some("stopping at the next checkpoint; once more to stop at once"),
    }
}

/// The first signal asks for a clean stop, the second one ends the process: what it leaves is what a crash leaves, and
/// the next run deals with it.
async fn cancel_on_signal(cancel: CancellationToken, terminal: Terminal, note: Option<&str>) {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut interrupt), Ok(mut terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        tracing::warn!("signals can't be handled here: Ctrl-C ends the process like a crash");
        return;
    };
    let mut next = async || {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    };
    next().await;
    cancel.cancel();
    if let Some(note) = note {
        terminal.note(note);
    }
    next().await;
    terminal.clear();
    std::process::exit(Exit::Interrupted.code().into());
}

fn completions(shell: clap_complete::Shell) -> anyhow::Result<Exit> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut args::Arguments::command(), "poolshift", &mut script);
    output::bytes(&script)?;
    Ok(Exit::Success)
}

#[cfg(test)]
mod tests;
