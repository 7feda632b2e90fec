//! stub
use super::Context;
use super::config::Check;
use super::exit::Exit;
pub(super) async fn run(_context: &Context<'_>, settings: &Check) -> anyhow::Result<Exit> {
    crate::plan::Plan::load(&settings.plan)?;
    Ok(Exit::Success)
}
