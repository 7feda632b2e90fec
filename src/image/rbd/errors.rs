//! What Ceph reports, in the terms of the image contract.

use rustix::io::Errno;

use super::{Place, RbdOptions};
use crate::ceph::{CephError, Unopened};
use crate::image::{ErrorKind, ImageError};

/// What an error message needs to know.
pub(super) struct Failure {
    pub(super) location: String,
    pub(super) user: String,
    pub(super) pool: String,
}

impl Failure {
    /// The error of a failed operation.
    pub(super) fn of(&self, operation: impl Into<String>, error: CephError) -> ImageError {
        let kind = kind_of(&error);
        let failed = ImageError::new(kind.clone(), &self.location, operation);
        let failed = match (&kind, &error) {
            (ErrorKind::BackendMissing, _) => missing_backend(failed, &error),
            (ErrorKind::TimedOut, _) => failed
                .detail("the storage did not answer in time")
                .hint("look at the cluster's health: ceph -s; poolshift goes on from where it was when run again"),
            (ErrorKind::PermissionDenied, _) => failed
                .detail(format!("client.{} is not allowed to", self.user))
                .hint(caps_hint(&self.user, Some(&self.pool))),
            (ErrorKind::NoSpace, _) if error.is(Errno::DQUOT) => failed
                .detail(format!("the quota of pool {:?} is reached", self.pool))
                .hint(format!("raise it: ceph osd pool set-quota {} max_bytes BYTES", self.pool)),
            (ErrorKind::NoSpace, _) => {
                failed.detail(format!("pool {:?} is full", self.pool)).hint("look at the room left: ceph df")
            }
            (ErrorKind::Fenced, _) => failed.detail("another process has taken the lease over and shut this one out"),
            _ => failed,
        };
        failed.caused_by(error)
    }
}

impl Failure {
    /// The error of an image that could not be opened.
    pub(super) fn opening(&self, place: &Place, why: Unopened, error: CephError) -> ImageError {
        let is_old = error.is(Errno::INVAL);
        let failed = self.of("open the image", error);
        let (parent, image) = (place.parent(), &place.image);
        match why {
            Unopened::NoName => {
                failed.detail(format!("{parent} has no image {image:?}")).hint(format!("list the images: rbd ls {parent}"))
            }
            Unopened::Missing { object, id } => failed
                .detail(format!("{parent} lists the name {image:?}, and its object {object} is missing"))
                .hint(format!(
                    "an interrupted creation or removal leaves it so, and so does the loss of that object; its data, if \
                     there is any, is in objects with {id} in their names, of pool {} or of its data pool: have it looked \
                     for before anything is removed",
                    self.pool
                )),
            Unopened::UnreadableParent { pool } => failed
                .detail(format!("it is a clone of an image in pool {pool}, which client.{} may not read", self.user))
                .hint(format!(
                    "that needs osd 'profile rbd-read-only' on pool {pool}: compare ceph auth get client.{}",
                    self.user
                )),
            Unopened::Unknown if is_old => {
                failed.hint("images of format 1 have no id: make one of format 2 of it with rbd deep cp")
            }
            Unopened::Unknown => failed,
        }
    }
}

fn kind_of(error: &CephError) -> ErrorKind {
    match error {
        CephError::LibraryMissing { .. } | CephError::SymbolMissing { .. } => ErrorKind::BackendMissing,
        CephError::TimedOut { .. } => ErrorKind::TimedOut,
        CephError::Call { errno, .. } => ImageError::kind_of_errno(*errno),
        CephError::Unreadable { .. } => ErrorKind::PermissionDenied,
        CephError::Nul(_) | CephError::Option { .. } => ErrorKind::Unsupported,
        CephError::Thread { .. } => ErrorKind::Io,
        CephError::Nonsense { .. } => ErrorKind::Corrupt,
    }
}

fn missing_backend(failed: ImageError, error: &CephError) -> ImageError {
    let hint = match error {
        CephError::LibraryMissing { package, .. } => format!("install it: apt-get install {package}"),
        _ => "upgrade it: apt-get install librbd1 (16.2 or newer)".to_owned(),
    };
    failed.detail(error.to_string()).hint(hint)
}

/// What a user needs, and how its caps are looked at. `ceph auth caps` is not named: it replaces what a user has.
pub(super) fn caps_hint(user: &str, pool: Option<&str>) -> String {
    let pool = pool.map_or_else(|| "the pools of source and target".into(), |pool| format!("pool {pool}"));
    format!(
        "compare what it has, ceph auth get client.{user}, with what it needs: mon 'profile rbd', and osd 'profile rbd' \
         on {pool} and on the pools of the parents of its clones"
    )
}

/// The error of a failed connection.
pub(super) fn connecting(options: &RbdOptions, user: &str, error: CephError) -> ImageError {
    let conf = options.conf.as_ref().map(|path| path.display().to_string());
    let location = conf.clone().unwrap_or_else(|| "Ceph".into());
    let failure = Failure { location: location.clone(), user: user.to_owned(), pool: "sata".into() };
    let errno = |wanted: Errno| error.is(wanted);
    match &error {
        CephError::Unreadable { what, path, .. } => {
            let (detail, hint) = (
                format!("the {what} {} can't be read", path.display()),
                format!("look at its mode: ls -l {}", path.display()),
            );
            ImageError::new(ErrorKind::PermissionDenied, location, format!("connect as client.{user}"))
                .detail(detail)
                .hint(format!("{hint}; poolshift has to run as a user who may read it"))
                .caused_by(error)
        }
        CephError::Call { function: "rados_conf_read_file", .. } => {
            let kind = if errno(Errno::NOENT) { ErrorKind::NotFound } else { kind_of(&error) };
            ImageError::new(kind, location, "read Ceph's configuration file")
                .hint("name it with --ceph-conf or CEPH_CONF")
                .caused_by(error)
        }
        CephError::Call { function: "rados_connect", .. } if errno(Errno::NOENT) => {
            ImageError::new(ErrorKind::PermissionDenied, location, format!("connect as client.{user}"))
                .detail(format!("there is no keyring with a key for client.{user}"))
                .hint(format!(
                    "name the file with its key in the configuration file (keyring = ...), or another user with \
                     --ceph-user; {}",
                    caps_hint(user, None)
                ))
                .caused_by(error)
        }
        CephError::Call { function: "rados_connect", .. } if errno(Errno::ACCESS) => ImageError::new(
            ErrorKind::PermissionDenied,
            location,
            format!("connect as client.{user}"),
        )
        .detail("the monitors know no such user, or not with the key that its keyring has")
        .hint(format!(
            "compare the key in its keyring with that of ceph auth get client.{user}, and name another user with \
                     --ceph-user"
        ))
        .caused_by(error),
        CephError::Call { function: "rados_connect", .. } | CephError::TimedOut { .. }
            if kind_of(&error) == ErrorKind::TimedOut =>
        {
            ImageError::new(ErrorKind::TimedOut, location, format!("connect as client.{user}"))
                .detail("no monitor answered in time")
                .hint("check mon_host in the configuration file, and the network to it")
                .caused_by(error)
        }
        _ => failure.of(format!("connect as client.{user}"), error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(errno: Errno) -> CephError {
        CephError::Call { function: "rbd_x", errno: errno.raw_os_error() }
    }

    #[test]
    fn every_class_says_what_to_do() {
        let failure = Failure { location: "rbd:sas/vm".into(), user: "poolshift".into(), pool: "sas".into() };
        let denied = failure.of("open", call(Errno::PERM));
        assert_eq!(denied.kind, ErrorKind::PermissionDenied);
        let hint = denied.hint.clone().unwrap();
        assert!(hint.contains("pool sas") && !hint.contains("sata") && !hint.contains("auth caps"), "{hint}");
        let quota = failure.of("write", call(Errno::DQUOT));
        assert!(quota.kind == ErrorKind::NoSpace && quota.to_string().contains("quota of pool \"sas\""));
        assert_eq!(failure.of("write", call(Errno::SHUTDOWN)).kind, ErrorKind::Fenced);
        let late = CephError::TimedOut { function: "rbd_x", after: std::time::Duration::from_secs(1) };
        assert!(failure.of("write", late).is_retryable());
    }

    #[test]
    fn a_missing_library_names_its_package() {
        let failure = Failure { location: "rbd:sas/vm".into(), user: "admin".into(), pool: "sas".into() };
        // SAFETY is of no concern: the library doesn't exist, so that nothing of it runs.
        let symbol = CephError::SymbolMissing { file: "librbd.so.1", symbol: "rbd_open" };
        let error = failure.of("open", symbol);
        assert!(error.kind == ErrorKind::BackendMissing && error.hint.unwrap().contains("librbd1"));
    }
}
