//! The exit codes: one table, from which the help text, the README's list and the choice are made.

use std::io;
use std::process::ExitCode;

use super::Interrupted;
use super::config::UsageError;
use super::cutover::errors::AskError;
use crate::cutover::CutoverError;
use crate::cutover::journal::JournalError;
use crate::delta::stream::{DiffError, DiffFault, MergeError};
use crate::image::{ErrorKind, ImageError};
use crate::observe::client::ClientError;
use crate::openstack::{CloudError, Fault};
use crate::pipeline::PipelineError;
use crate::plan::PlanError;
use crate::replicate::CycleError;
use crate::wire::{InspectError, WireError, WireFault};

/// How a run ended, for the calling script. The numbers are part of the interface and never change their meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// All done.
    Success,
    /// Failed for a reason that has no code of its own; the same again would fail again.
    Failed,
    /// The command line, or the plan, makes no sense.
    Usage,
    /// `verify`, or the proof of a cutover, found differences.
    Different,
    /// Source and target have no common, undisturbed past: somebody has to decide.
    Conflict,
    /// An image, pool, snapshot or file is not there.
    NotFound,
    /// Another process works on the target.
    Busy,
    /// The storage did not answer, or failed in passing: run it again.
    Temporary,
    /// A stream or a state record is damaged, or made to do harm.
    Damaged,
    /// The image or its backend can't do it, or the backend is not installed.
    Unsupported,
    /// No space, or a quota is reached.
    NoSpace,
    /// Another process took the target over while this one worked.
    Fenced,
    /// A server was brought back to where it ran, instead of where it was to go.
    WentBack,
    /// A server may be down, or both its sides were written: what comes next is a person's to decide.
    NeedsPerson,
    /// A server is not ready to be brought over, or would stand still for too long. Nothing was changed.
    NotReady,
    /// A server's stand-in did not come up from its clones. Nothing of the server was changed.
    RehearsalFailed,
    /// A cloud does not accept the credentials, or does not let them do what is needed.
    NotAllowed,
    /// Stopped by Ctrl-C or SIGTERM. The next run resumes.
    Interrupted,
}

/// Every exit with its number and what it means, in ascending order.
pub const TABLE: &[(Exit, u8, &str)] = &[
    (Exit::Success, 0, "done"),
    (Exit::Failed, 1, "failed; the same again would fail again"),
    (Exit::Usage, 2, "the command line or the plan makes no sense"),
    (Exit::Different, 3, "verify found differences"),
    (Exit::Conflict, 4, "source and target have no common, undisturbed past: needs a decision"),
    (Exit::NotFound, 5, "an image, pool, snapshot or file is not there"),
    (Exit::Busy, 6, "another process works on the target"),
    (Exit::Temporary, 7, "the storage or the cloud failed or did not answer in time: run it again"),
    (Exit::Damaged, 8, "a stream or a state record is damaged"),
    (Exit::Unsupported, 9, "the image or the cloud can't do it, or the image's backend is not installed"),
    (Exit::NoSpace, 10, "no space left, or a quota is reached"),
    (Exit::Fenced, 11, "another process took the target over"),
    (Exit::WentBack, 12, "the server was brought back to where it ran: nothing has changed"),
    (Exit::NeedsPerson, 13, "the server may be down, or both sides were written: needs a person"),
    (Exit::NotReady, 14, "the server is not ready to be brought over: nothing was changed"),
    (Exit::RehearsalFailed, 15, "a rehearsal failed: what booted from the copies is not well; nothing was changed"),
    (Exit::NotAllowed, 16, "the cloud does not accept the credentials, or does not let them do this"),
    (Exit::Interrupted, 130, "interrupted; the next run resumes"),
];

impl Exit {
    /// The number.
    pub fn code(self) -> u8 {
        TABLE.iter().find(|(exit, ..)| *exit == self).map_or(1, |(_, code, _)| *code)
    }

    /// Which exit an error stands for: the outermost error of a known type in its chain decides.
    pub fn of(error: &anyhow::Error) -> Self {
        error.chain().find_map(known).unwrap_or(Self::Failed)
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        exit.code().into()
    }
}

/// The table as `--help` shows it.
pub fn help() -> String {
    let mut text = String::from("Exit codes:\n");
    for (_, code, meaning) in TABLE {
        text.push_str(&format!("  {code:>3}  {meaning}\n"));
    }
    text.trim_end().to_owned()
}

fn known(error: &(dyn std::error::Error + 'static)) -> Option<Exit> {
    if let Some(error) = image_error(error) {
        return Some(of_image(error));
    }
    if let Some(error) = error.downcast_ref::<CutoverError>() {
        return Some(of_cutover(error));
    }
    if let Some(error) = error.downcast_ref::<AskError>() {
        return Some(match error {
            AskError::UnknownServer { .. } => Exit::NotFound,
            AskError::WhichWay { .. } | AskError::OtherStrategy { .. } => Exit::Usage,
            AskError::NotAgreed { .. } => Exit::Failed,
        });
    }
    if let Some(error) = error.downcast_ref::<CycleError>() {
        return Some(of_cycle(error));
    }
    if let Some(error) = error.downcast_ref::<PipelineError>() {
        return Some(of_pipeline(error));
    }
    if let Some(error) = error.downcast_ref::<WireError>() {
        return Some(of_wire(error));
    }
    if let Some(error) = error.downcast_ref::<DiffError>() {
        return Some(of_diff(error));
    }
    if let Some(error) = error.downcast_ref::<MergeError>() {
        return Some(match error {
            MergeError::NotConsecutive { .. } => Exit::Conflict,
            MergeError::Input { source, .. } | MergeError::Output(source) => of_diff(source),
        });
    }
    if let Some(error) = error.downcast_ref::<InspectError>() {
        return Some(match error {
            InspectError::Wire(error) => of_wire(error),
            InspectError::Diff(error) => of_diff(error),
            InspectError::Io(error) => of_io(error).unwrap_or(Exit::Temporary),
            InspectError::UnknownFormat { .. } | InspectError::Batch { .. } => Exit::Damaged,
            InspectError::Interrupted(_) => Exit::Failed,
        });
    }
    if let Some(error) = error.downcast_ref::<PlanError>() {
        return Some(match error {
            PlanError::Read { source, .. } => of_io(source).unwrap_or(Exit::Failed),
            PlanError::TooLarge { .. } | PlanError::Invalid { .. } => Exit::Usage,
        });
    }
    if let Some(error) = error.downcast_ref::<ClientError>() {
        return Some(of_client(error));
    }
    if let Some(error) = error.downcast_ref::<CloudError>() {
        return Some(of_cloud(error.fault));
    }
    if let Some(error) = error.downcast_ref::<io::Error>() {
        return of_io(error);
    }
    if error.is::<UsageError>() {
        return Some(Exit::Usage);
    }
    error.is::<Interrupted>().then_some(Exit::Interrupted)
}

/// The image's error that an error is, or passes through as its own: such a one doesn't stand in the chain by itself.
pub(super) fn image_error<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a ImageError> {
    if let Some(CycleError::Image(error)) = error.downcast_ref() {
        return Some(error);
    }
    match error.downcast_ref::<CycleError>() {
        Some(CycleError::Pipeline(PipelineError::Image(error))) => return Some(error),
        Some(_) => return None,
        None => {}
    }
    match error.downcast_ref::<PipelineError>() {
        Some(PipelineError::Image(error)) => Some(error),
        _ => error.downcast_ref::<ImageError>(),
    }
}

fn of_cutover(error: &CutoverError) -> Exit {
    match error {
        CutoverError::NotReady { .. }
        | CutoverError::NoStage { .. }
        | CutoverError::TooLong { .. }
        | CutoverError::Bound { .. }
        | CutoverError::NotRetyped { .. } => Exit::NotReady,
        CutoverError::Diverged { .. } | CutoverError::NotBrought { .. } => Exit::NeedsPerson,
        CutoverError::Different { .. } => Exit::Different,
        CutoverError::Interrupted { .. } => Exit::Interrupted,
        CutoverError::WrongState { .. } | CutoverError::Unfinished { .. } | CutoverError::Provider(_) => Exit::Failed,
        CutoverError::Cycle(error) => of_cycle(error),
        CutoverError::Group(error) => of_cycle(&error.error),
        CutoverError::Image(error) => of_image(error),
        CutoverError::Journal { error: JournalError::Version { .. }, .. } => Exit::Unsupported,
        CutoverError::Journal { error: JournalError::Damaged(_), .. } => Exit::Damaged,
    }
}

fn of_cycle(error: &CycleError) -> Exit {
    match error {
        CycleError::Conflict(_) => Exit::Conflict,
        CycleError::Defect(_) => Exit::Failed,
        CycleError::State { .. } => Exit::Damaged,
        CycleError::SnapshotLost { .. } => Exit::Temporary,
        CycleError::Interrupted { .. } => Exit::Interrupted,
        CycleError::Pipeline(error) => of_pipeline(error),
        CycleError::Diff(error) => of_diff(error),
        CycleError::Image(error) => of_image(error),
    }
}

fn of_pipeline(error: &PipelineError) -> Exit {
    match error {
        PipelineError::Image(error) => of_image(error),
        PipelineError::Wire(error) => of_wire(error),
        PipelineError::Diff(error) => of_diff(error),
        PipelineError::Batch(_) => Exit::Damaged,
        PipelineError::Task(_) => Exit::Failed,
    }
}

fn of_wire(error: &WireError) -> Exit {
    match &error.fault {
        WireFault::Io { source, .. } => of_io(source).unwrap_or(Exit::Temporary),
        WireFault::Version { .. } | WireFault::UnknownFeature { .. } | WireFault::UnknownKind { .. } => {
            Exit::Unsupported
        }
        _ => Exit::Damaged,
    }
}

fn of_diff(error: &DiffError) -> Exit {
    match &error.fault {
        DiffFault::Io { source, .. } => of_io(source).unwrap_or(Exit::Temporary),
        _ => Exit::Damaged,
    }
}

fn of_cloud(fault: Fault) -> Exit {
    match fault {
        Fault::Config => Exit::Usage,
        Fault::Unauthorized | Fault::Forbidden => Exit::NotAllowed,
        Fault::NotFound => Exit::NotFound,
        Fault::OverQuota => Exit::NoSpace,
        Fault::Version => Exit::Unsupported,
        Fault::Unavailable | Fault::Busy => Exit::Temporary,
        Fault::Conflict | Fault::Refused(_) | Fault::Strange => Exit::Failed,
    }
}

fn of_client(error: &ClientError) -> Exit {
    match error {
        ClientError::Refused { status: 404, .. } => Exit::NotFound,
        ClientError::Refused { status: 503, .. } | ClientError::TimedOut { .. } | ClientError::Http { .. } => {
            Exit::Temporary
        }
        ClientError::NoDaemon { .. }
        | ClientError::Refused { .. }
        | ClientError::TooLarge { .. }
        | ClientError::Strange { .. } => Exit::Failed,
    }
}

fn of_io(error: &io::Error) -> Option<Exit> {
    match error.kind() {
        io::ErrorKind::NotFound => Some(Exit::NotFound),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Some(Exit::NoSpace),
        _ => None,
    }
}

fn of_image(error: &ImageError) -> Exit {
    match error.kind {
        ErrorKind::NotFound => Exit::NotFound,
        ErrorKind::Busy { .. } => Exit::Busy,
        ErrorKind::Fenced => Exit::Fenced,
        ErrorKind::NoSpace => Exit::NoSpace,
        ErrorKind::Unsupported | ErrorKind::BackendMissing => Exit::Unsupported,
        ErrorKind::Corrupt => Exit::Damaged,
        ErrorKind::TimedOut | ErrorKind::Io => Exit::Temporary,
        ErrorKind::AlreadyExists | ErrorKind::ReadOnly | ErrorKind::OutOfBounds | ErrorKind::PermissionDenied => {
            Exit::Failed
        }
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    #[test]
    fn codes_are_distinct_and_ascending() {
        assert!(TABLE.windows(2).all(|pair| pair[0].1 < pair[1].1));
        assert_eq!(Exit::Interrupted.code(), 130);
        assert_eq!(Exit::Success.code(), 0);
    }

    #[test]
    fn how_a_cutover_failed_is_told_by_its_code() {
        let server = || "web-1".to_owned();
        let of = |error: CutoverError| Exit::of(&error.into());
        let space = || ImageError::new(ErrorKind::NoSpace, "rbd:sas/web-1", "write");
        assert_eq!(of(CutoverError::NotReady { server: server(), preconditions: Vec::new() }), Exit::NotReady);
        assert_eq!(of(CutoverError::Interrupted { server: server() }), Exit::Interrupted);
        // What is passed through keeps its code; a server that may be down is worse than what brought it down.
        assert_eq!(of(space().into()), Exit::NoSpace);
        assert_eq!(of(CycleError::Image(space()).into()), Exit::NoSpace);
        let inner = Box::new(CutoverError::Image(space()));
        let error = CutoverError::NotBrought { server: server(), error: inner, because: "no space".into() };
        assert_eq!(of(error), Exit::NeedsPerson);
    }

    #[test]
    fn what_a_cloud_says_has_its_exit() {
        for (fault, exit) in [
            (Fault::Config, Exit::Usage),
            (Fault::Unauthorized, Exit::NotAllowed),
            (Fault::Forbidden, Exit::NotAllowed),
            (Fault::NotFound, Exit::NotFound),
            (Fault::Conflict, Exit::Failed),
            (Fault::Refused(400), Exit::Failed),
            (Fault::OverQuota, Exit::NoSpace),
            (Fault::Version, Exit::Unsupported),
            (Fault::Unavailable, Exit::Temporary),
            (Fault::Busy, Exit::Temporary),
            (Fault::Strange, Exit::Failed),
        ] {
            let error = CloudError::new(fault, "show volume 1", "cinder", "it answers");
            assert_eq!(Exit::of(&anyhow::Error::new(error).context("outside")), exit, "{fault:?}");
        }
        assert_eq!(Exit::NotAllowed.code(), 16);
    }

    #[test]
    fn the_outermost_known_error_decides() {
        let inner = ImageError::new(ErrorKind::TimedOut, "rbd:sata/vm", "read");
        let outer = ImageError::new(ErrorKind::Busy { holder: "x".into() }, "rbd:sas/vm", "lease").caused_by(inner);
        let error = anyhow::Error::new(outer).context("the cycle failed");
        assert_eq!(Exit::of(&error), Exit::Busy);
        assert_eq!(Exit::of(&anyhow::anyhow!("something")), Exit::Failed);
        let wrapped = Err::<(), _>(ImageError::new(ErrorKind::NoSpace, "file:x", "write")).context("a").context("b");
        assert_eq!(Exit::of(&wrapped.unwrap_err()), Exit::NoSpace);
    }
}
