//! Requests that fail: which, and how.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// It is answered with that status, and not carried out; with 429, a `Retry-After` says for how long to wait.
    Refused(u16),
    /// The same, without a `Retry-After`.
    RefusedJustSo(u16),
    /// It is not answered, and not carried out.
    Lost,
    /// It is carried out, and not answered.
    Unanswered,
    /// It is answered with 202, and not carried out.
    Pretended,
    /// The same, with every further request like it.
    AlwaysPretended,
    /// Its token is refused (401) from then on.
    TokenEnded,
    /// It is carried out, and then its token is revoked.
    TokenRevoked,
    /// It is not answered, nor is any other for [`OUTAGE`].
    Outage,
    /// It is carried out, and whoever made it is killed.
    Killed,
}

impl Trouble {
    /// All that may become of a request that changes something.
    pub const ALL: [Self; 13] = [
        Self::Refused(400),
        Self::Refused(500),
        Self::Refused(409),
        Self::Refused(429),
        Self::RefusedJustSo(429),
        Self::Lost,
        Self::Unanswered,
        Self::Pretended,
        Self::AlwaysPretended,
        Self::TokenEnded,
        Self::TokenRevoked,
        Self::Outage,
        Self::Killed,
    ];

    /// All that may become of a request that only reads.
    pub const OF_READS: [Self; 5] =
        [Self::Refused(500), Self::Refused(429), Self::Lost, Self::Unanswered, Self::TokenEnded];
}

/// How long an outage lasts: longer than any request is repeated by itself.
pub const OUTAGE: Duration = Duration::from_secs(20);

/// Which requests have trouble.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Aim {
    /// None.
    #[default]
    Nothing,
    /// The request of that number among those that change something, the first being 1.
    Change(usize, Trouble),
    /// Each of those, the first time that it is made.
    EachChange(Trouble),
    /// The request of that number among the different ones that only read, the first time that it is made.
    Read(usize, Trouble),
    /// Each of those, the first time that it is made.
    EachRead(Trouble),
}

/// The requests, and what becomes of them.
#[derive(Debug, Default)]
pub struct Script {
    aim: Aim,
    /// Those that change something, with their bodies, in their order.
    changes: Vec<String>,
    /// The different ones that only read.
    reads: Vec<String>,
    /// The request with which the trouble first came about.
    struck: Option<String>,
    outage: Option<Instant>,
    ended: Option<String>,
    killed: Arc<Notify>,
}

/// What is done with a request.
pub(super) enum Fate {
    /// The usual.
    CarriedOut,
    /// It has this trouble.
    Trouble(Trouble),
    /// It is not answered.
    Cut,
    /// Its token is refused.
    TokenRefused,
}

impl Script {
    /// Begins anew, with this trouble.
    pub fn begin(&mut self, aim: Aim) {
        *self = Self { aim, ..Self::default() };
    }

    /// The requests so far that change something, each with its body.
    pub fn changes(&self) -> &[String] {
        &self.changes
    }

    /// The different requests so far that only read.
    pub fn reads(&self) -> &[String] {
        &self.reads
    }

    /// Whether the trouble has come about.
    pub fn has_struck(&self) -> bool {
        self.struck.is_some()
    }

    /// The request with which the trouble first came about.
    pub fn struck(&self) -> Option<&str> {
        self.struck.as_deref()
    }

    /// Notified when whoever makes the requests is killed.
    pub fn killed(&self) -> Arc<Notify> {
        Arc::clone(&self.killed)
    }

    pub(super) fn kill(&self) {
        self.killed.notify_one();
    }

    /// Notes a request, and decides what becomes of it.
    pub(super) fn decide(&mut self, call: &str, changes: bool, token: Option<&str>) -> Fate {
        let now = Instant::now();
        if self.outage.is_some_and(|until| now < until) {
            return Fate::Cut;
        }
        if token.is_some() && token == self.ended.as_deref() {
            return Fate::TokenRefused;
        }
        let Some(trouble) = self.trouble(call, changes, token) else { return Fate::CarriedOut };
        self.struck.get_or_insert_with(|| call.to_owned());
        match trouble {
            Trouble::TokenEnded => {
                // Where each request has it, the next token is as good as the one before.
                if !matches!(self.aim, Aim::EachRead(_) | Aim::EachChange(_)) {
                    self.ended = token.map(str::to_owned);
                }
                Fate::TokenRefused
            }
            Trouble::Outage => {
                self.outage = Some(now + OUTAGE);
                Fate::Cut
            }
            Trouble::Lost => Fate::Cut,
            trouble => Fate::Trouble(trouble),
        }
    }

    fn trouble(&mut self, call: &str, changes: bool, token: Option<&str>) -> Option<Trouble> {
        if changes {
            let is_new = !self.changes.iter().any(|known| known == call);
            self.changes.push(call.to_owned());
            return match self.aim {
                Aim::Change(number, trouble) => {
                    let is_it = self.changes.len() == number;
                    let like_it = self.changes.get(number.wrapping_sub(1)).is_some_and(|chosen| chosen == call);
                    (is_it || like_it && trouble == Trouble::AlwaysPretended).then_some(trouble)
                }
                Aim::EachChange(trouble) => is_new.then_some(trouble),
                Aim::Nothing | Aim::Read(..) | Aim::EachRead(_) => None,
            };
        }
        if self.reads.iter().any(|known| known == call) {
            return None;
        }
        self.reads.push(call.to_owned());
        // A password that is refused is not tried again.
        let fits = |trouble: Trouble| trouble != Trouble::TokenEnded || token.is_some();
        match self.aim {
            Aim::Read(number, trouble) => Some(trouble).filter(|_| self.reads.len() == number),
            Aim::EachRead(trouble) => Some(trouble),
            Aim::Nothing | Aim::Change(..) | Aim::EachChange(_) => None,
        }
        .filter(|trouble| fits(*trouble))
    }
}
