//! Nothing that stops a server is begun before somebody has agreed to it.

use std::io::IsTerminal as _;

use super::errors::AskError;
use crate::cli::config::{Consent, UsageError};
use crate::cli::{Context, Interrupted};

/// Asks on the terminal, unless it was agreed to already: `word` is to be typed, for `what` to happen.
///
/// # Errors
///
/// A usage error where there is no terminal; [`AskError::NotAgreed`]; [`Interrupted`].
pub(in crate::cli) async fn ask(context: &Context<'_>, consent: Consent, what: &str, word: &str) -> anyhow::Result<()> {
    if consent.yes {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
        let text = format!("{what}: nobody is there to be asked; give --yes to go on, or --dry-run to look only");
        return Err(UsageError(text).into());
    }
    context.terminal.ask(&format!("{what}\ntype {word} to go on: "));
    let read = tokio::task::spawn_blocking(|| {
        let mut line = String::new();
        std::io::stdin().read_line(&mut line).map(|_| line)
    });
    let line = tokio::select! {
        line = read => line??,
        () = context.cancel.cancelled() => return Err(Interrupted.into()),
    };
    if line.trim() != word {
        return Err(AskError::NotAgreed { server: word.to_owned() }.into());
    }
    Ok(())
}
