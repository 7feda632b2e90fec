//! A thin, typed client for the parts of OpenStack that a server's move to another volume type needs.
//!
//! | part | what it is |
//! |---|---|
//! | [`access`] | how to reach the cloud: `clouds.yaml`, `OS_*` |
//! | `session` | the token, the catalog, microversions, limits and retries |
//! | [`cinder`] | volumes, types, snapshots |
//! | [`manage`] | what Cinder is given as a volume, and what is taken from it |
//! | [`nova`] | servers and their attachments |
//! | [`neutron`] | ports |
//! | [`definition`] | all that a server is made again from |
//! | `keystone` | projects by their names |
//! | [`discovery`] | which servers and volumes there are, and what keeps them from being moved |
//! | [`error`] | what can go wrong |
//! | `sim` | a simulated cloud for tests; debug builds only |
//!
//! # What an answer is worth
//!
//! Cinder and Nova answer 202 and may fail later, without another word. No function here waits for an effect, and none
//! says that one has come: whoever asks looks at the volume and the server afterwards.
//!
//! # Versions
//!
//! Every call has one exact microversion, [`CINDER`] and [`NOVA`]: what a cloud answers is what was tried. An older
//! cloud is refused by name when it is connected to. What came later has a version of its own, as
//! [`definition::NOVA_ATTACHMENTS`], and is asked for before it is needed ([`Cloud::speaks`]).
//!
//! # Secrets
//!
//! Passwords, secrets and tokens are kept as [`secrecy::SecretString`], are part of no error, log or `Debug`, and are
//! read from files and the environment only.

pub mod access;
pub mod cinder;
pub mod definition;
pub mod discovery;
pub mod error;
mod keystone;
pub mod manage;
pub mod neutron;
pub mod nova;
mod session;
#[cfg(debug_assertions)]
pub mod sim;
#[cfg(test)]
mod tests;

pub use access::CloudAccess;
pub use error::{CloudError, Fault, Result, if_there};
pub use session::Microversion;

use nova::Whose;
use reqwest::Method;
use serde::de::DeserializeOwned;
use serde_json::Value;
use session::{Ask, Service, Session};

/// How many entries of a list are asked for at once.
const PAGE: &str = "500";
/// How many pages are read at most: more volumes than a plan may have.
const PAGES_MAX: usize = 200;

/// How often a list is read at most that changes meanwhile.
const LISTS_MAX: u32 = 10;

/// The version of Cinder's interface that is spoken: 3.27 (Pike) has attachments.
pub const CINDER: Microversion = Microversion(3, 27);

/// The version of Nova's interface that is spoken: 2.79 (Train) says of attachments whether they end with their server.
pub const NOVA: Microversion = Microversion(2, 79);

/// A cloud.
#[derive(Debug)]
pub struct Cloud {
    session: Session,
}

impl Cloud {
    /// Authenticates, and makes sure that the cloud speaks the versions that are needed.
    ///
    /// # Errors
    /// [`Fault::Config`] and [`Fault::Unauthorized`] for the access, [`Fault::Version`] for a cloud that is too old, and
    /// [`Fault::Unavailable`] where nobody answers.
    pub async fn connect(access: CloudAccess) -> Result<Self> {
        let session = Session::new(access)?;
        for (service, needed, release) in [(Service::Cinder, CINDER, "Pike"), (Service::Nova, NOVA, "Train")] {
            let (lowest, highest) = session.versions(service).await?;
            if !(lowest..=highest).contains(&needed) {
                let detail = format!("it speaks {lowest} to {highest}, and {needed} is needed");
                let place = format!("{} of {}", service.name(), session.access().name);
                return Err(CloudError::new(Fault::Version, "work with it", place, detail)
                    .hint(format!("{needed} came with OpenStack {release}")));
            }
        }
        Ok(Self { session })
    }

    /// Whether its Nova speaks that version.
    pub async fn speaks(&self, nova: Microversion) -> Result<bool> {
        let (lowest, highest) = self.session.versions(Service::Nova).await?;
        Ok((lowest..=highest).contains(&nova))
    }

    /// What the cloud is called, for people.
    pub fn name(&self) -> &str {
        &self.session.access().name
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        service: Service,
        path: &str,
        query: &[(&str, &str)],
        operation: &str,
    ) -> Result<T> {
        self.session.get(Ask { service, method: Method::GET, path, query, body: None, operation }).await
    }

    async fn tell(
        &self,
        service: Service,
        method: Method,
        path: &str,
        body: Option<&Value>,
        operation: &str,
    ) -> Result<()> {
        self.session.tell(Ask { service, method, path, query: &[], body, operation }).await
    }

    /// All of a list that comes in pages. Where it changes while it is read it is read anew.
    async fn pages<A: DeserializeOwned, T>(
        &self,
        what: (Service, &str, &str),
        order: &[(&str, &str)],
        whose: &Whose,
        listed: fn(A) -> Vec<T>,
        id: fn(&T) -> &String,
    ) -> Result<Vec<T>> {
        for _ in 1..LISTS_MAX {
            match self.pages_once(what, order, whose, listed, id).await? {
                Ok(all) => return Ok(all),
                Err(error) => tracing::debug!(%error, "listing them anew"),
            }
        }
        let last = self.pages_once(what, order, whose, listed, id).await?;
        last.map_err(|error| CloudError { fault: Fault::Busy, ..error })
    }

    /// Each page begins behind the last one's last id. Where what has that id is gone by then, Cinder answers 404 and Nova
    /// 400, which is the inner error: the newest volume, which is the last, is often the next to go.
    async fn pages_once<A: DeserializeOwned, T>(
        &self,
        (service, path, operation): (Service, &str, &str),
        order: &[(&str, &str)],
        whose: &Whose,
        listed: fn(A) -> Vec<T>,
        id: fn(&T) -> &String,
    ) -> Result<Result<Vec<T>>> {
        let mut all: Vec<T> = Vec::new();
        for _ in 0..PAGES_MAX {
            let marker = all.last().map(|last| id(last).clone());
            let mut query = vec![("limit", PAGE)];
            query.extend(order);
            query.extend(marker.as_deref().map(|marker| ("marker", marker)));
            whose.narrow(&mut query, "project_id");
            let page = match self.ask(service, path, &query, operation).await {
                Err(error) if marker.is_some() && matches!(error.fault, Fault::NotFound | Fault::Refused(400)) => {
                    return Ok(Err(error));
                }
                page => listed(page?),
            };
            match page.last() {
                Some(last) if Some(id(last)) != marker.as_ref() => all.extend(page),
                _ => return Ok(Ok(all)),
            }
        }
        let detail = format!("it has more than {} of them", all.len());
        Err(CloudError::new(Fault::Strange, operation, service.name(), detail))
    }

    /// The id of the project that the credentials are for.
    pub async fn project(&self) -> Result<String> {
        self.session.project().await
    }

    /// The roles that the credentials have there.
    pub async fn roles(&self) -> Result<Vec<String>> {
        self.session.roles().await
    }

    /// Whether one of them is that of an administrator.
    pub async fn is_admin(&self) -> Result<bool> {
        Ok(is_admin(&self.roles().await?))
    }
}

/// Whether one of these roles is that of an administrator. Their names are the same in capitals.
pub fn is_admin(roles: &[String]) -> bool {
    roles.iter().any(|role| role.eq_ignore_ascii_case("admin"))
}

/// Ids are put into paths: whatever is none is refused.
fn checked<'a>(id: &'a str, what: &str, operation: &str) -> Result<&'a str> {
    let fits = !id.is_empty() && id.len() <= 64 && id.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
    if fits {
        return Ok(id);
    }
    let shown: String = id.chars().take(64).collect();
    Err(CloudError::new(Fault::NotFound, operation, "the cloud", format!("{shown:?} is no id of a {what}")))
}
