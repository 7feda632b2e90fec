//! What the commands of a fleet share: how its images are opened, with the plan's clusters.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

use super::config::{CephAccess, Config, Create};
use super::terminal::Terminal;
use super::{Context, images};
use crate::cutover::provider::openstack::drift;
use crate::fleet::{Drift, Images, Opener, chain_text};
use crate::image::{ErrorKind, ImageError, TargetImage};
use crate::openstack::{Cloud, CloudAccess, CloudError};
use crate::plan::{ClusterAccess, Cutover, Plan, Server, Volume};
use crate::replicate::CycleError;

/// How long a cloud has to say what has become of a server.
const CLOUD_PATIENCE: Duration = Duration::from_secs(5);

/// How many servers a line names.
const LISTED: usize = 10;

/// Names in a line, not too many of them.
pub(super) fn listed<'n>(names: impl ExactSizeIterator<Item = &'n str>) -> String {
    let more = names.len().saturating_sub(LISTED);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{}{more}", names.take(LISTED).collect::<Vec<_>>().join(", "))
}

/// The plan without the servers that are left to Cinder, and which these are, for people.
pub(super) fn split_retyped(mut plan: Plan) -> (Plan, Option<String>) {
    let (left, ours): (Vec<Server>, Vec<Server>) = plan.servers.into_iter().partition(Server::is_left_to_cinder);
    plan.servers = ours;
    let names = listed(left.iter().map(|server| server.name.as_str()));
    let text = format!("left to Cinder itself, by poolshift retype, and not looked at here: {names}");
    (plan, (!left.is_empty()).then_some(text))
}

/// The same, and says so.
pub(super) fn without_retyped(terminal: &Terminal, plan: Plan) -> Plan {
    let (plan, left) = split_retyped(plan);
    if let Some(left) = left {
        terminal.say(&left);
    }
    plan
}

/// Opens the images of a plan, as the command line would.
pub(super) struct PlanImages {
    config: Config,
    /// The clouds that were asked, by their names.
    clouds: tokio::sync::Mutex<HashMap<Option<String>, Arc<Cloud>>>,
    terminal: Terminal,
    cancel: CancellationToken,
}

/// The plan's own word first, then the command line's and the environment's.
fn access(plan: &ClusterAccess, given: &CephAccess) -> CephAccess {
    CephAccess {
        conf: plan.conf.clone().or_else(|| given.conf.clone()),
        user: plan.user.clone().or_else(|| given.user.clone()),
    }
}

impl PlanImages {
    pub(super) fn new(context: &Context<'_>, plan: &Plan) -> Arc<Self> {
        let mut config = context.config.clone();
        config.source_ceph = access(&plan.source_cluster, &config.source_ceph);
        config.target_ceph = access(&plan.target_cluster, &config.target_ceph);
        let clouds = tokio::sync::Mutex::default();
        Arc::new(Self { config, clouds, terminal: context.terminal.clone(), cancel: context.cancel.clone() })
    }

    /// A cloud, connected to once.
    async fn cloud(&self, name: Option<&str>) -> Result<Arc<Cloud>, CloudError> {
        let mut clouds = self.clouds.lock().await;
        let key = name.map(str::to_owned);
        if let Some(cloud) = clouds.get(&key) {
            return Ok(Arc::clone(cloud));
        }
        let cloud = Arc::new(Cloud::connect(CloudAccess::load(name)?).await?);
        clouds.insert(key, Arc::clone(&cloud));
        Ok(cloud)
    }

    /// The context in which commands open images of the plan.
    pub(super) fn context(&self) -> Context<'_> {
        Context { config: &self.config, terminal: self.terminal.clone(), cancel: self.cancel.clone() }
    }
}

/// What opening an image says, as the error of a cycle.
fn cycle_error(volume: &Volume, error: anyhow::Error) -> CycleError {
    match error.downcast::<ImageError>() {
        Ok(error) => error.into(),
        Err(error) => {
            let text = format!("{error:#}");
            ImageError::new(ErrorKind::Unsupported, volume.source.to_string(), "open both sides").detail(text).into()
        }
    }
}

fn was_there(error: &anyhow::Error) -> bool {
    error.downcast_ref::<ImageError>().is_some_and(|error| error.kind == ErrorKind::AlreadyExists)
}

#[async_trait]
impl Opener for PlanImages {
    async fn open(&self, volume: &Volume, to_look: bool) -> Result<Images, CycleError> {
        let context = self.context();
        let open = async || -> anyhow::Result<Images> {
            let source = images::source(&context, &volume.source).await?;
            if volume.cinder.is_some() {
                images::refuse_placeholder(&source, &volume.source).await?;
            }
            let existing = images::target_of_plan(&context, volume).await;
            let target = if to_look {
                existing?
            } else {
                match images::or_none(&context, &volume.target, existing).await? {
                    Some(target) => target,
                    None => {
                        let model = source.model().await?;
                        match images::create(&context, &volume.target, model, &Create::default()).await {
                            // Another worker was faster.
                            Err(error) if was_there(&error) => images::target_of_plan(&context, volume).await?,
                            created => created?,
                        }
                    }
                }
            };
            images::refuse_same(&source, target.as_ref())?;
            Ok((source.image(), target))
        };
        open().await.map_err(|error| cycle_error(volume, error))
    }

    async fn open_target(&self, volume: &Volume) -> Result<Arc<dyn TargetImage>, CycleError> {
        Ok(images::target_of_plan(&self.context(), volume).await?)
    }

    async fn drift(&self, server: &Server) -> Option<Vec<Drift>> {
        let Cutover::OpenStack(config) = &server.cutover else { return Some(Vec::new()) };
        let look = async { drift::look(self.cloud(config.cloud.as_deref()).await?.as_ref(), server).await };
        // It is replicated all the same: a cloud that does not answer keeps nobody waiting.
        match tokio::time::timeout(CLOUD_PATIENCE, look).await {
            Ok(Ok(drift)) => return Some(drift),
            Ok(Err(error)) => {
                tracing::warn!(
                    server = server.name,
                    error = chain_text(&error),
                    "the cloud could not be asked about it"
                );
            }
            Err(_) => tracing::warn!(server = server.name, "the cloud does not answer"),
        }
        None
    }
}
