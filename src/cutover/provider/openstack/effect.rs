//! Asking a cloud for something, and looking until it is so: Cinder and Nova answer yes and fail later.

use std::time::Duration;

use async_trait::async_trait;
use futures::future::join_all;
use tokio::time::Instant;

use super::super::ProviderError;
use super::OpenStack;
use crate::openstack::{CloudError, Fault};

/// How long it is waited between two looks, at least and at most. Looking more often, or first at who has the images open,
/// shortens no outage: measured on a cloud whose services share 2 cores.
const POLL: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(1)];
/// The part of the time that it takes which may be lost by looking late: what lasts is looked at less often.
const POLL_SHARE: u32 = 20;
/// After so long without a sign of its having been heard, a request is made once more.
const DEAF: Duration = Duration::from_secs(10);
/// How often a request is made at most.
const ASKS_MAX: u32 = 5;
/// How long after its first failure a request is made once more; twice as long after each further one.
const AGAIN: Duration = Duration::from_secs(1);

/// How it is with what was asked for.
#[derive(Debug)]
pub(super) enum Look {
    /// It is so.
    Done,
    /// Something is under way; in the cloud's words.
    Working(String),
    /// It is not so, and nothing is under way.
    NotYet(String),
    /// It can't come about by waiting or asking again.
    Hopeless(String),
}

/// Something that is to be so.
#[async_trait]
pub(super) trait Effect: Send + Sync {
    /// How it is to be, for people: `volume web-1-root that nobody has`.
    fn wanted(&self) -> String;

    /// Whether it takes as long as there is to do: then the time counts from when [`Look::Working`] last said something
    /// else.
    fn lasts(&self) -> bool {
        false
    }

    /// Looks.
    async fn look(&self) -> Result<Look, CloudError>;

    /// Asks for it. Left out, it comes about by itself.
    async fn ask(&self) -> Result<(), CloudError> {
        Ok(())
    }
}

impl OpenStack {
    /// Looks, asks if need be, and looks until it is so, for as long as the plan allows. What passes is no failure: a
    /// service that does not answer, a conflict with what is still under way, a yes that comes to nothing twice, a no
    /// that may be for how it was in that moment.
    pub(super) async fn bring_about(&self, operation: &str, effect: &dyn Effect) -> Result<(), ProviderError> {
        self.bring_about_from(operation, effect, None).await
    }

    /// The same for many, beside each other. All are seen to their ends, also where one fails: what was begun goes on in the
    /// cloud, and nobody would look. Gives back the first failure.
    pub(super) async fn bring_all_about<E: Effect>(&self, operation: &str, effects: &[E]) -> Result<(), ProviderError> {
        join_all(effects.iter().map(|effect| self.bring_about(operation, effect))).await.into_iter().collect()
    }

    /// What [`Self::bring_about`] does; `is` says how it is, where it was just seen that it is not so, and that nothing is under way.
    pub(super) async fn bring_about_from(
        &self,
        operation: &str,
        effect: &dyn Effect,
        is: Option<String>,
    ) -> Result<(), ProviderError> {
        let wanted = effect.wanted();
        let since = Instant::now();
        let mut begun = since;
        let (mut asks, mut asked, mut worked, mut doubted) = (0u32, None::<Instant>, false, false);
        let (mut seen, mut refused, mut unseen) = (String::from("not to be seen"), None, None::<CloudError>);
        let passing = |error: &CloudError| error.is_passing() || error.fault == Fault::Conflict;
        let mut known = is.map(Look::NotYet);
        loop {
            let look = match known.take() {
                Some(known) => Ok(known),
                None => effect.look().await,
            };
            match look {
                Ok(Look::Done) => return Ok(()),
                Ok(Look::Working(how)) => {
                    if effect.lasts() && how != seen {
                        begun = Instant::now();
                    }
                    (worked, seen) = (true, how);
                }
                Ok(Look::NotYet(how)) => {
                    seen = how;
                    // It has ended without success, or was never begun.
                    let again = AGAIN * 2u32.pow(asks.saturating_sub(1));
                    let wait = if worked || refused.is_some() { again } else { DEAF };
                    let due = asked.is_none_or(|at| at.elapsed() >= wait);
                    if due && asks >= ASKS_MAX {
                        let problem =
                            format!("asked {asks} times for {wanted}, and it is {seen}{}", also(refused.as_ref()));
                        let hint = refused.and_then(|error| error.hint);
                        let usual = "the service's own log says why; the request's id is in it";
                        return Err(self.error(operation, problem, Some(hint.as_deref().unwrap_or(usual))));
                    }
                    if due {
                        (asks, asked, worked, refused) = (asks + 1, Some(Instant::now()), false, None);
                        match effect.ask().await {
                            Ok(()) => {}
                            Err(error) if passing(&error) => refused = Some(error),
                            Err(error) if is_of_a_state(&error) && !doubted => (doubted, refused) = (true, Some(error)),
                            Err(error) => return Err(self.cloud_error(operation, &error)),
                        }
                        continue;
                    }
                }
                Ok(Look::Hopeless(how)) => return Err(self.error(operation, how, None)),
                Err(error) if error.is_passing() => unseen = Some(error),
                Err(error) => return Err(self.cloud_error(operation, &error)),
            }
            if begun.elapsed() >= self.config.limit {
                let limit = self.config.limit;
                let problem =
                    format!("after {limit:?} there is no {wanted}: it is {seen}{}", also(refused.or(unseen).as_ref()));
                return Err(self.error(operation, problem, Some("see what keeps it, or raise the limit in the plan")));
            }
            pause(since).await;
        }
    }
}

/// Waits until it is time for the next look at what has been waited for since then.
pub(super) async fn pause(since: Instant) {
    let [least, most] = POLL;
    tokio::time::sleep((since.elapsed() / POLL_SHARE).clamp(least, most)).await;
}

/// Whether a refusal may be for how things are just now, and not for what was asked: Cinder says 400 for both, and Nova
/// passes it on, and says 404 of an attachment that is going. Looked at once more it may be as wanted, or be granted.
fn is_of_a_state(error: &CloudError) -> bool {
    matches!(error.fault, Fault::Refused(400) | Fault::NotFound)
}

fn also(error: Option<&CloudError>) -> String {
    error.map(|error| format!("; {}", crate::fleet::chain_text(error))).unwrap_or_default()
}
