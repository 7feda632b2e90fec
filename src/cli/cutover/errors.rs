//! What can be wrong with asking for a cutover, and what to do about that and about a cutover that failed.

use std::path::PathBuf;

use crate::cutover::CutoverError;
use crate::cutover::journal::JournalError;

/// Why a command on a server ends before it has begun.
#[derive(Debug, thiserror::Error)]
pub(in crate::cli) enum AskError {
    /// The plan has no such server.
    #[error("{}: there is no server {name:?}", plan.display())]
    UnknownServer {
        /// The plan file.
        plan: PathBuf,
        /// What was asked for.
        name: String,
        /// The server whose volume has that name.
        owner: Option<String>,
        /// All servers.
        servers: Vec<String>,
    },
    /// A person did not agree.
    #[error("{server}: not agreed to; nothing was changed")]
    NotAgreed {
        /// The server, or `all servers`.
        server: String,
    },
    /// It is for another command.
    #[error("{server} {problem}")]
    OtherStrategy {
        /// The server.
        server: String,
        /// `is left to Cinder itself (strategy retype)`.
        problem: &'static str,
        /// The command that it is for.
        command: &'static str,
    },
    /// Which of the two ways back is not said.
    #[error("{server} has run from its targets since {since}: what becomes of what it has written there?")]
    WhichWay {
        /// The server.
        server: String,
        /// When it was cut over.
        since: String,
    },
}

/// How many servers a message lists.
const LISTED: usize = 20;

impl AskError {
    /// What to do.
    pub(in crate::cli) fn hint(&self) -> Option<String> {
        match self {
            Self::UnknownServer { owner: Some(owner), .. } => {
                Some(format!("it is a disk of server {owner}, which is brought over as a whole: name that"))
            }
            Self::UnknownServer { servers, .. } => {
                let more = servers.len().saturating_sub(LISTED);
                let more = if more > 0 { format!(" and {more} more") } else { String::new() };
                Some(format!("its servers are: {}{more}", servers[..servers.len().min(LISTED)].join(", ")))
            }
            Self::NotAgreed { .. } => None,
            Self::OtherStrategy { command, .. } => Some(format!("use {command}, or change the strategy in the plan")),
            Self::WhichWay { .. } => Some(
                "--with-changes carries it back to the sources, and nothing is lost; --discard-changes gives it up, and \
                 the sources are as they were at the cutover"
                    .to_owned(),
            ),
        }
    }
}

/// What to do about a cutover that failed; `None` where nothing more is known than the error says.
pub(in crate::cli) fn hint(error: &CutoverError) -> Option<String> {
    match error {
        CutoverError::NotReady { .. } => {
            Some("nothing was changed; mend what is listed, and look again with --dry-run".to_owned())
        }
        CutoverError::NoStage { .. } => Some("nothing was made; mend what is listed, and run it again".to_owned()),
        CutoverError::Bound { .. } | CutoverError::NotRetyped { .. } => {
            Some("mend what is listed, and look again with --dry-run".to_owned())
        }
        CutoverError::WrongState { hint, .. } | CutoverError::Diverged { hint, .. } => Some(hint.clone()),
        CutoverError::Different { volume, .. } => Some(format!(
            "nothing runs from it. poolshift verify SOURCE@SNAPSHOT TARGET@SNAPSHOT names what differs in {volume}, with \
             --repair it is written anew"
        )),
        CutoverError::TooLong { .. } => Some(
            "try again when less is written, or with a longer --max-outage; poolshift status PLAN predicts it".into(),
        ),
        CutoverError::NotBrought { error, .. } => {
            let inner = hint(error).map(|inner| format!("; {inner}")).unwrap_or_default();
            Some(format!(
                "look at the server first. What was done is noted: poolshift rollback PLAN SERVER goes on from \
                 there, on any host{inner}"
            ))
        }
        CutoverError::Unfinished { .. } => None,
        CutoverError::Interrupted { .. } => Some("nothing was changed; run it again".to_owned()),
        CutoverError::Provider(error) => error.hint.clone(),
        CutoverError::Journal { error: JournalError::Version { .. }, .. } => {
            Some("go on with the version of poolshift that has begun it".to_owned())
        }
        CutoverError::Journal { error: JournalError::Damaged(_), .. } => Some(
            "look at where the server runs, and keep what `rbd image-meta get POOL/IMAGE poolshift.cutover` prints; \
             nothing is done before it can be read"
                .to_owned(),
        ),
        CutoverError::Cycle(error) => super::super::error::hint_of(error),
        CutoverError::Group(error) => super::super::error::hint_of(&error.error),
        CutoverError::Image(error) => error.hint.clone(),
    }
}
