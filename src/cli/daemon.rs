//! What the commands share that ask or tell a daemon: its plan, its address, its token.

use std::path::{Path, PathBuf};

use crate::observe::client::Client;
use crate::observe::token::{Token, TokenFault};
use crate::plan::Plan;

/// The environment variable with the token itself.
const TOKEN_VARIABLE: &str = "POOLSHIFT_TOKEN";

/// Why a daemon can't even be asked.
#[derive(Debug, thiserror::Error)]
pub(super) enum DaemonError {
    /// It listens nowhere.
    #[error("{}: the daemon of this plan has no API that could be asked", .plan.display())]
    NoApi {
        /// The plan file.
        plan: PathBuf,
    },
    /// The environment's token can't be one.
    #[error("{TOKEN_VARIABLE} in the environment is no token")]
    Variable(#[source] TokenFault),
}

impl DaemonError {
    /// What to do.
    pub(super) fn hint(&self) -> String {
        match self {
            Self::NoApi { .. } => "set listen under [api] in the plan, and restart the daemon".to_owned(),
            Self::Variable(_) => format!("give {TOKEN_VARIABLE} the token, or unset it and give --token-file PATH"),
        }
    }
}

/// Reads a plan file.
pub(super) async fn load(path: &Path) -> anyhow::Result<Plan> {
    let path = path.to_owned();
    Ok(tokio::task::spawn_blocking(move || Plan::load(&path)).await??)
}

/// What asks the plan's daemon, which listens somewhere, with the token that was given, if any.
///
/// # Errors
///
/// A token that can't be read; [`DaemonError::NoApi`].
pub(super) fn client(plan: &Plan, token_file: Option<&Path>) -> anyhow::Result<Client> {
    let listen = plan.api.listen.ok_or_else(|| DaemonError::NoApi { plan: plan.path.clone() })?;
    Ok(Client::new(listen, token(plan, token_file)?))
}

/// The same for somebody who only reads: the plan's own token file may be the daemon's alone.
pub(super) fn reader(plan: &Plan, token_file: Option<&Path>) -> anyhow::Result<Option<Client>> {
    let Some(listen) = plan.api.listen else { return Ok(None) };
    let token = match given(token_file)? {
        Some(token) => Some(token),
        None => plan.api.token_file.as_deref().and_then(|path| match Token::read(path) {
            Ok(token) => Some(token),
            Err(error) => {
                tracing::debug!("asking without a token: {error}: {}", error.fault);
                None
            }
        }),
    };
    Ok(Some(Client::new(listen, token)))
}

fn token(plan: &Plan, token_file: Option<&Path>) -> anyhow::Result<Option<Token>> {
    match given(token_file)? {
        Some(token) => Ok(Some(token)),
        None => Ok(plan.api.token_file.as_deref().map(Token::read).transpose()?),
    }
}

/// The flag's token, or the environment's; an empty variable is none.
fn given(token_file: Option<&Path>) -> anyhow::Result<Option<Token>> {
    if let Some(path) = token_file {
        return Ok(Some(Token::read(path)?));
    }
    match std::env::var_os(TOKEN_VARIABLE).filter(|value| !value.is_empty()) {
        Some(value) => Ok(Some(Token::new(&value.to_string_lossy()).map_err(DaemonError::Variable)?)),
        None => Ok(None),
    }
}
