//! `poolshift replicate`: keeps a plan's volumes in step until it is told to stop.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use sd_notify::NotifyState;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::Context;
use super::config::{Replicate, UsageError};
use super::exit::Exit;
use super::fleet::{PlanImages, split_retyped};
use crate::fleet::{Fleet, Worker};
use crate::observe::http::{Access, serve};
use crate::observe::token::Token;
use crate::plan::{Api, Plan};

/// Runs the command.
pub(super) async fn run(context: &Context<'_>, replicate: &Replicate) -> anyhow::Result<Exit> {
    let plan = without_retyped(Plan::load(&replicate.plan)?);
    if plan.servers.is_empty() {
        let text = format!("{}: there is nothing to replicate in it", plan.path.display());
        return Err(UsageError(text).into());
    }
    let opener = PlanImages::new(context, &plan);
    let mut api = plan.api.clone();
    if let Some(listen) = replicate.listen {
        api.listen = listen;
    }
    refuse_open_api(&api)?;
    let (worker, fleet) = Worker::new(plan, opener);
    let cancel = context.cancel.clone();
    let served = serve_api(&api, fleet, cancel.clone()).await?;
    let (send, plans) = mpsc::channel(1);
    tokio::spawn(reload_on_signal(replicate.plan.clone(), send));
    notify(&[NotifyState::Ready]);
    let watchdog = sd_notify::watchdog_enabled().is_some();
    let beat = || {
        if watchdog {
            notify(&[NotifyState::Watchdog]);
        }
    };
    worker.run(cancel.clone(), plans, beat).await;
    notify(&[NotifyState::Stopping]);
    if let Some(served) = served {
        served.await??;
    }
    Ok(Exit::Success)
}

/// Leaves to Cinder what it moves itself, and says so.
fn without_retyped(plan: Plan) -> Plan {
    let (plan, left) = split_retyped(plan);
    if let Some(left) = left {
        tracing::warn!("{left}");
    }
    plan
}

/// The plan can't say this of itself; an address from the command line can.
fn refuse_open_api(api: &Api) -> Result<(), UsageError> {
    match api.listen {
        Some(listen) if !listen.ip().is_loopback() && api.token_file.is_none() => {
            let text = format!("the API at {listen} needs a token, as others reach it: token_file under [api]");
            Err(UsageError(text))
        }
        _ => Ok(()),
    }
}

/// Tells systemd, where it wants to know.
fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "systemd was not told");
    }
}

/// Starts the API, where the plan wants one.
async fn serve_api(
    api: &Api,
    fleet: Fleet,
    cancel: CancellationToken,
) -> anyhow::Result<Option<tokio::task::JoinHandle<std::io::Result<()>>>> {
    let Some(listen) = api.listen else { return Ok(None) };
    let token = api.token_file.as_deref().map(Token::read).transpose()?;
    let listener = TcpListener::bind(listen).await.with_context(|| {
        format!("the API can't listen on {listen}: another daemon may; give it another address under [api] listen")
    })?;
    Ok(Some(tokio::spawn(serve(listener, Arc::new(fleet), Access { token }, cancel))))
}

/// Reads the plan again at each SIGHUP. One that can't be read changes nothing.
async fn reload_on_signal(path: std::path::PathBuf, send: mpsc::Sender<Plan>) {
    use tokio::signal::unix::{SignalKind, signal};
    let Ok(mut hangup) = signal(SignalKind::hangup()) else { return };
    while hangup.recv().await.is_some() {
        if let Ok(now) = sd_notify::NotifyState::monotonic_usec_now() {
            notify(&[NotifyState::Reloading, now]);
        }
        match read_plan(&path).await {
            Ok(plan) => {
                if send.send(plan).await.is_err() {
                    return;
                }
            }
            Err(error) => tracing::error!("the plan is kept as it was: {error:#}"),
        }
        notify(&[NotifyState::Ready]);
    }
}

async fn read_plan(path: &Path) -> anyhow::Result<Plan> {
    let path = path.to_owned();
    Ok(without_retyped(tokio::task::spawn_blocking(move || Plan::load(&path)).await??))
}
