//! How an error reaches a person: what failed, why, and what to do about it.

use std::error::Error;
use std::io::Write;

use super::args::LogFormat;
use super::cutover::errors::{self, AskError};
use super::daemon::DaemonError;
use super::exit::{self, Exit};
use crate::cutover::CutoverError;
use crate::observe::client::ClientError;
use crate::openstack::CloudError;
use crate::replicate::CycleError;

/// Shows an error on standard error; returns the exit it stands for.
pub fn show(error: &anyhow::Error, format: LogFormat) -> Exit {
    let exit = Exit::of(error);
    let text = match format {
        LogFormat::Text => render(error),
        LogFormat::Json => {
            let causes = causes(error);
            let value = serde_json::json!({
                "level": "ERROR",
                "error": causes[0],
                "caused_by": causes[1..],
                "hint": hint(error),
                "exit_code": exit.code(),
            });
            format!("{value}\n")
        }
    };
    // Nobody is left to be told if standard error is closed.
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
    exit
}

/// The text: `error: …`, a `caused by: …` line for every error below, and `hint: …` if one of them has one.
pub fn render(error: &anyhow::Error) -> String {
    let causes = causes(error);
    let mut text = format!("error: {}\n", causes[0]);
    for cause in &causes[1..] {
        text.push_str(&format!("caused by: {cause}\n"));
    }
    if let Some(hint) = hint(error) {
        text.push_str(&format!("hint: {hint}\n"));
    }
    text
}

/// The chain from the outermost error down; at least one. What an error only repeats of the one above is left out.
fn causes(error: &anyhow::Error) -> Vec<String> {
    let mut causes: Vec<String> = Vec::new();
    for cause in error.chain().map(plain) {
        if !causes.last().is_some_and(|above| above.ends_with(&cause)) {
            causes.push(cause);
        }
    }
    causes
}

/// An error's own text without control characters, further lines indented: names in it may come from anywhere, and
/// must not look like a line of ours.
fn plain(error: &(dyn Error + 'static)) -> String {
    let text = error.to_string();
    let lines = text.lines().map(|line| line.trim().replace(char::is_control, "\u{fffd}"));
    lines.collect::<Vec<_>>().join("\n    ")
}

/// The outermost advice in the chain.
fn hint(error: &anyhow::Error) -> Option<String> {
    error.chain().find_map(|cause| {
        if let Some(error) = cause.downcast_ref::<CutoverError>() {
            return errors::hint(error);
        }
        if let Some(error) = cause.downcast_ref::<AskError>() {
            return error.hint();
        }
        if let Some(error) = cause.downcast_ref::<ClientError>() {
            return error.hint();
        }
        if let Some(error) = cause.downcast_ref::<DaemonError>() {
            return Some(error.hint());
        }
        if let Some(error) = cause.downcast_ref::<CloudError>() {
            return error.hint.clone();
        }
        hint_of(cause)
    })
}

/// The advice of a cycle's error, or of an image's that it is.
pub(super) fn hint_of(error: &(dyn Error + 'static)) -> Option<String> {
    if let Some(CycleError::Conflict(conflict)) = error.downcast_ref() {
        return Some(conflict.kind.hint().to_owned());
    }
    exit::image_error(error)?.hint.clone()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{ErrorKind, ImageError};

    #[test]
    fn an_error_says_what_where_why_and_what_to_do() {
        let error = ImageError::from_errno(2, "rbd:sata/vm", "open the image")
            .detail("pool \"sata\" has no such image")
            .hint("list them with: rbd ls sata");
        insta::assert_snapshot!(render(&anyhow::Error::new(error).context("the source can't be read")), @r#"
        error: the source can't be read
        caused by: rbd:sata/vm: cannot open the image: pool "sata" has no such image
        caused by: No such file or directory (os error 2)
        hint: list them with: rbd ls sata
        "#);
    }

    #[test]
    fn what_a_cloud_says_comes_with_its_hint() {
        let error =
            CloudError::new(crate::openstack::Fault::Forbidden, "list servers", "nova at http://c", "it answers 403");
        insta::assert_snapshot!(render(&error.hint("ask an administrator").into()), @r"
        error: nova at http://c: cannot list servers: it answers 403
        hint: ask an administrator
        ");
    }

    #[test]
    fn repetitions_and_control_characters_are_left_out() {
        let below = ImageError::new(ErrorKind::Io, "file:a\u{1b}[31m\nb", "read");
        let text = below.to_string();
        let error = anyhow::Error::new(below).context(format!("failed: {text}"));
        insta::assert_snapshot!(render(&error), @r"
        error: failed: file:a�[31m
            b: cannot read
        ");
    }
}
