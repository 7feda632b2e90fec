//! Requests to a cloud's services: the token, the catalog, microversions, limits and retries.
//!
//! # What is repeated
//!
//! A request that only reads is repeated when the service fails or does not answer, a few times. One that changes
//! something is repeated only where it is known not to have been carried out: the token was not accepted (401), the
//! service had too much to do (429), or there was no connection. For all others the caller looks at what has become of
//! it.

use std::time::Duration;

use jiff::Timestamp;
use reqwest::{Method, StatusCode};
use secrecy::{ExposeSecret, SecretString};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::Mutex;
use url::Url;

use super::access::{CloudAccess, Identity, Ref};
use super::error::{CloudError, Fault, Result};
use crate::failpoint::failpoint;

/// How long a request may take.
const TIMEOUT: Duration = Duration::from_secs(60);
/// How long a connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// The largest answer that is read, in bytes: a page of a thousand servers with all their details has some 4 MiB.
const ANSWER_MAX: usize = 64 << 20;
/// How often a request is made at most.
const TRIES: u32 = 5;
/// The longest wait that a service may ask for.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(30);
/// A token is renewed this long before it ends.
const RENEW_BEFORE: Duration = Duration::from_secs(120);

/// A service, as the catalog and the header of microversions name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Service {
    /// Volumes.
    Cinder,
    /// Servers.
    Nova,
    /// Ports. Not every cloud has it.
    Neutron,
    /// Projects: where the token comes from, whatever the catalog says.
    Keystone,
}

impl Service {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Cinder => "cinder",
            Self::Nova => "nova",
            Self::Neutron => "neutron",
            Self::Keystone => "keystone",
        }
    }

    /// Its types in a catalog, the usual one first.
    fn types(self) -> &'static [&'static str] {
        match self {
            Self::Cinder => &["volumev3", "block-storage", "volume"],
            Self::Nova => &["compute"],
            Self::Neutron => &["network"],
            Self::Keystone => &["identity"],
        }
    }

    /// The microversion that is spoken, with what its header calls the service; `None` where there are none.
    fn version(self) -> Option<(&'static str, Microversion)> {
        match self {
            Self::Cinder => Some(("volume", super::CINDER)),
            Self::Nova => Some(("compute", super::NOVA)),
            Self::Neutron | Self::Keystone => None,
        }
    }
}

/// A version of a service's interface: `3.27`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Microversion(pub u16, pub u16);

impl std::fmt::Display for Microversion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

impl Microversion {
    fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.split_once('.')?;
        Some(Self(major.parse().ok()?, minor.parse().ok()?))
    }
}

/// What the cloud knows the caller as.
#[derive(Clone, Debug)]
struct Token {
    text: SecretString,
    expires: Timestamp,
    project: String,
    roles: Vec<String>,
    endpoints: [Option<Url>; 3],
}

/// A way to a cloud's services.
#[derive(Debug)]
pub(super) struct Session {
    http: reqwest::Client,
    access: CloudAccess,
    token: Mutex<Option<Token>>,
}

/// A request.
pub(super) struct Ask<'a> {
    pub(super) service: Service,
    pub(super) method: Method,
    /// Below the service's address, without a slash at its beginning.
    pub(super) path: &'a str,
    pub(super) query: &'a [(&'a str, &'a str)],
    pub(super) body: Option<&'a Value>,
    /// What is wanted, as an infinitive.
    pub(super) operation: &'a str,
}

/// What a request says besides.
#[derive(Clone, Copy)]
enum Special {
    /// It is of another microversion than the usual one.
    Version(Microversion),
    /// It is to be carried out only while what it is about has that revision.
    Revision(u64),
}

/// How long is waited before a request is made again: 0.2 s, and twice as long after each further one.
struct Pause(Duration);

impl Default for Pause {
    fn default() -> Self {
        Self(Duration::from_millis(200))
    }
}

impl Pause {
    /// Waits; as long as the service has said, where it has.
    async fn take(&mut self, told: Option<Duration>) {
        tokio::time::sleep(told.unwrap_or(self.0)).await;
        self.0 = (self.0 * 2).min(RETRY_AFTER_MAX);
    }
}

/// How one attempt ended.
enum Attempt {
    Answer(StatusCode, Option<Duration>, Vec<u8>, String),
    /// No answer; `sent` says whether the service may have had the request.
    Lost {
        error: reqwest::Error,
        sent: bool,
    },
    TooLong,
}

impl Session {
    pub(super) fn new(access: CloudAccess) -> Result<Self> {
        // Another library of the process may have installed one, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let failed = |detail: String| CloudError::new(Fault::Config, "reach the cloud", access.name.clone(), detail);
        let mut builder = reqwest::Client::builder()
            .timeout(TIMEOUT)
            .connect_timeout(CONNECT_TIMEOUT)
            // A token goes to nobody whom the catalog does not name.
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("poolshift/", env!("CARGO_PKG_VERSION")));
        if let Some(file) = &access.ca_file {
            let pem = std::fs::read(file)
                .map_err(|error| failed(format!("its CA file {} can't be read", file.display())).caused_by(error))?;
            let certificates = reqwest::Certificate::from_pem_bundle(&pem).ok().filter(|found| !found.is_empty());
            let certificates =
                certificates.ok_or_else(|| failed(format!("{} holds no certificate (PEM)", file.display())))?;
            builder = builder.tls_certs_merge(certificates);
        }
        if !access.verify {
            tracing::warn!(cloud = access.name, "its certificates are not checked, as its configuration asks for");
            builder = builder.tls_danger_accept_invalid_certs(true);
        }
        let http =
            builder.build().map_err(|error| failed("there is no way to make requests".into()).caused_by(error))?;
        Ok(Self { http, access, token: Mutex::default() })
    }

    pub(super) fn access(&self) -> &CloudAccess {
        &self.access
    }

    /// The project that the token is for.
    pub(super) async fn project(&self) -> Result<String> {
        Ok(self.token(None).await?.project)
    }

    /// The roles that the token has.
    pub(super) async fn roles(&self) -> Result<Vec<String>> {
        Ok(self.token(None).await?.roles)
    }

    /// Asks, and reads the answer.
    pub(super) async fn get<T: DeserializeOwned>(&self, ask: Ask<'_>) -> Result<T> {
        let (place, operation) = (self.place(ask.service).await?, ask.operation.to_owned());
        let body = self.send(ask).await?;
        serde_json::from_slice(&body).map_err(|error| {
            CloudError::new(Fault::Strange, operation, place, "its answer is not what it should be").caused_by(error)
        })
    }

    /// Asks; what is answered does not matter.
    pub(super) async fn tell(&self, ask: Ask<'_>) -> Result<()> {
        self.send(ask).await.map(drop)
    }

    /// The same in a microversion of the call's own, which the caller has made sure of.
    pub(super) async fn tell_in(&self, version: Microversion, ask: Ask<'_>) -> Result<()> {
        self.send_as(Some(Special::Version(version)), ask).await.map(drop)
    }

    /// The same where what it is about still has the revision that it was seen with; otherwise that is a
    /// [`Fault::Conflict`], and nothing was done.
    pub(super) async fn tell_if_still(&self, revision: u64, ask: Ask<'_>) -> Result<()> {
        self.send_as(Some(Special::Revision(revision)), ask).await.map(drop)
    }

    async fn place(&self, service: Service) -> Result<String> {
        let token = self.token(None).await?;
        Ok(place(service.name(), &self.endpoint(&token, service)?))
    }

    async fn send(&self, ask: Ask<'_>) -> Result<Vec<u8>> {
        self.send_as(None, ask).await
    }

    async fn send_as(&self, special: Option<Special>, ask: Ask<'_>) -> Result<Vec<u8>> {
        let reads = ask.method == Method::GET;
        let (mut refused_token, mut renewed) = (None, false);
        let mut pause = Pause::default();
        for tried in 1.. {
            let mut told = None;
            let token = self.token(refused_token.take()).await?;
            let base = self.endpoint(&token, ask.service)?;
            let place = place(ask.service.name(), &base);
            let failed = |fault, detail: String| CloudError::new(fault, ask.operation, place.clone(), detail);
            let mut url = below(&base, ask.path);
            if !ask.query.is_empty() {
                url.query_pairs_mut().extend_pairs(ask.query);
            }
            let mut request = self.http.request(ask.method.clone(), url);
            request = request.header("X-Auth-Token", token.text.expose_secret()).header("Accept", "application/json");
            if let Some((service, usual)) = ask.service.version() {
                let version = if let Some(Special::Version(own)) = special { own } else { usual };
                request = request.header("OpenStack-API-Version", format!("{service} {version}"));
            }
            if let Some(Special::Revision(revision)) = special {
                request = request.header("If-Match", format!("revision_number={revision}"));
            }
            if let Some(body) = ask.body {
                request = request.json(body);
            }
            let begun = std::time::Instant::now();
            let attempt = attempt(request).await;
            let took = begun.elapsed();
            let (error, again) = match attempt {
                Attempt::Answer(status, after, body, id) => {
                    let (method, path) = (&ask.method, ask.path);
                    tracing::debug!(%method, path, status = status.as_u16(), request = id, ?took, "{}", ask.operation);
                    if status.is_success() {
                        if !reads {
                            failpoint!("openstack.{}", first_words(ask.operation));
                        }
                        return Ok(body);
                    }
                    let error = failed(fault(status, &body), said(status, &body, &id));
                    if status == StatusCode::UNAUTHORIZED && !std::mem::replace(&mut renewed, true) {
                        // It has ended before its time, or was taken back: with a new one the request is the same.
                        refused_token = Some(token.text);
                        continue;
                    }
                    told = after;
                    (error, status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error() && reads)
                }
                Attempt::Lost { error, sent } => {
                    let detail = if sent { "no answer came" } else { "there is no connection to it" };
                    (failed(Fault::Unavailable, detail.into()).caused_by(error.without_url()), reads || !sent)
                }
                Attempt::TooLong => {
                    return Err(failed(Fault::Strange, format!("its answer has more than {ANSWER_MAX} bytes")));
                }
            };
            if !again || tried >= TRIES {
                return Err(error);
            }
            tracing::debug!(%error, "asking once more");
            pause.take(told).await;
        }
        unreachable!("the loop ends by itself")
    }

    /// The address of a service, by the configuration or the catalog.
    fn endpoint(&self, token: &Token, service: Service) -> Result<Url> {
        let given = service.types().iter().find_map(|name| self.access.endpoints.get(name));
        let named = match service {
            Service::Cinder => token.endpoints[0].as_ref(),
            Service::Nova => token.endpoints[1].as_ref(),
            Service::Neutron => token.endpoints[2].as_ref(),
            Service::Keystone => return Ok(self.keystone()),
        };
        let found = given.or(named).map(|url| match service {
            // Most catalogs name it without its version.
            Service::Neutron if !url.path().trim_end_matches('/').ends_with("/v2.0") => below(url, "v2.0"),
            _ => url.clone(),
        });
        let url = found.ok_or_else(|| {
            let (region, interface) = (&self.access.region, self.access.interface.name());
            let region = region.as_ref().map_or_else(String::new, |region| format!(" in the region {region}"));
            CloudError::new(
                Fault::Config,
                format!("find {}", service.name()),
                self.access.name.clone(),
                format!("the catalog has no {interface} address of a service {}{region}", service.types()[0]),
            )
            .hint("look at what it has with: openstack catalog list")
        })?;
        if given.is_none() && self.access.auth_url.scheme() == "https" && url.scheme() != "https" {
            let error = CloudError::new(
                Fault::Config,
                format!("connect to {}", service.name()),
                url.to_string(),
                "Keystone is reached by https, and the catalog's address of this service would send the token in clear",
            );
            let key = service.types()[0].trim_end_matches("v3").replace('-', "_");
            return Err(error
                .hint(format!("give its https address as {key}_endpoint_override, or this one if you accept that")));
        }
        Ok(url)
    }

    /// A token that is good for a while; never the one that was refused.
    async fn token(&self, refused: Option<SecretString>) -> Result<Token> {
        let mut slot = self.token.lock().await;
        let good = |token: &&Token| {
            let left = Duration::try_from(token.expires.duration_since(Timestamp::now())).unwrap_or_default();
            let is_refused = refused.as_ref().is_some_and(|old| old.expose_secret() == token.text.expose_secret());
            left > RENEW_BEFORE && !is_refused
        };
        if let Some(token) = slot.as_ref().filter(good) {
            return Ok(token.clone());
        }
        let token = self.authenticate().await?;
        *slot = Some(token.clone());
        Ok(token)
    }

    /// Keystone's address, down to its version.
    fn keystone(&self) -> Url {
        let url = &self.access.auth_url;
        if url.path().trim_end_matches('/').ends_with("/v3") { url.clone() } else { below(url, "v3") }
    }

    async fn authenticate(&self) -> Result<Token> {
        let url = below(&self.keystone(), "auth/tokens");
        let place = place("keystone", &url);
        let failed = |fault, detail: String| CloudError::new(fault, "get a token", place.clone(), detail);
        let body = SecretBody(auth_body(&self.access.identity));
        let mut pause = Pause::default();
        for tried in 1.. {
            let mut told = None;
            let request = self.http.post(url.clone()).json(&body.0);
            #[cfg(test)]
            let clock = super::tests::stop_clock();
            let sent = request.send().await;
            let (error, again) = match sent {
                Ok(response) => {
                    let status = response.status();
                    let id = request_id(&response);
                    told = retry_after(&response);
                    let text = header(&response, "X-Subject-Token").map(SecretString::from);
                    let body = bounded(response).await.unwrap_or_default();
                    match (status, text) {
                        (StatusCode::CREATED, Some(text)) => return self.read_token(text, &body, &place),
                        (StatusCode::CREATED, None) => {
                            return Err(failed(Fault::Strange, "its answer has no token".into()));
                        }
                        (StatusCode::UNAUTHORIZED, _) => {
                            return Err(failed(Fault::Unauthorized, said(status, &body, &id)).hint(format!(
                                "look at the user, the password, the project and their domains in {}",
                                self.access.name
                            )));
                        }
                        (status, _) => {
                            let again = status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error();
                            (failed(fault(status, &body), said(status, &body, &id)), again)
                        }
                    }
                }
                Err(error) => {
                    (failed(Fault::Unavailable, "no answer came".into()).caused_by(error.without_url()), true)
                }
            };
            #[cfg(test)]
            drop(clock);
            if !again || tried >= TRIES {
                return Err(error);
            }
            pause.take(told).await;
        }
        unreachable!("the loop ends by itself")
    }

    fn read_token(&self, text: SecretString, body: &[u8], place: &str) -> Result<Token> {
        let strange = |what: &str| {
            CloudError::new(Fault::Strange, "get a token", place.to_owned(), format!("its answer has no {what}"))
        };
        let answer: Value = serde_json::from_slice(body).map_err(|error| strange("JSON").caused_by(error))?;
        let token = answer.get("token").ok_or_else(|| strange("token"))?;
        let expires = token["expires_at"].as_str().and_then(|at| at.parse().ok()).ok_or_else(|| strange("end"))?;
        let project = token["project"]["id"].as_str().ok_or_else(|| {
            strange("project")
                .hint("the credentials have to be for a project; poolshift can't use a domain's or the system's")
        })?;
        let roles = token["roles"].as_array().into_iter().flatten();
        let roles = roles.filter_map(|role| role["name"].as_str()).map(str::to_owned).collect();
        let endpoints =
            [Service::Cinder, Service::Nova, Service::Neutron].map(|service| self.of_catalog(token, service));
        Ok(Token { text, expires, project: project.to_owned(), roles, endpoints })
    }

    fn of_catalog(&self, token: &Value, service: Service) -> Option<Url> {
        let catalog = token["catalog"].as_array()?;
        let of_type = |name: &str| {
            catalog.iter().filter(|entry| entry["type"].as_str() == Some(name)).find_map(|entry| {
                let right = entry["endpoints"].as_array()?.iter().find(|endpoint| {
                    let region = endpoint["region_id"].as_str().or_else(|| endpoint["region"].as_str());
                    endpoint["interface"].as_str() == Some(self.access.interface.name())
                        && self.access.region.as_deref().is_none_or(|wanted| region == Some(wanted))
                })?;
                Url::parse(right["url"].as_str()?).ok()
            })
        };
        service.types().iter().find_map(|name| of_type(name))
    }

    /// Which microversions a service speaks, the lowest and the highest.
    pub(super) async fn versions(&self, service: Service) -> Result<(Microversion, Microversion)> {
        let token = self.token(None).await?;
        let base = self.endpoint(&token, service)?;
        let place = place(service.name(), &base);
        let strange = || {
            CloudError::new(Fault::Version, "ask for its versions", place.clone(), "it names none that poolshift knows")
        };
        // The root of its version: what the catalog has may end with the project's id.
        let mut root = base.clone();
        let kept: Vec<&str> = base.path().split('/').filter(|part| !part.is_empty()).collect();
        let end =
            kept.iter().position(|part| part.starts_with('v') && part[1..].starts_with(|c: char| c.is_ascii_digit()));
        root.set_path(&format!("/{}/", end.map_or(String::new(), |end| kept[..=end].join("/"))));
        let operation = "ask for its versions";
        let (mut refused_token, mut pause) = (None, Pause::default());
        let mut tried = 0;
        let body = loop {
            tried += 1;
            let mut told = None;
            let token = self.token(refused_token.take()).await?;
            let request = self.http.get(root.clone()).header("X-Auth-Token", token.text.expose_secret());
            let (error, again) = match attempt(request).await {
                Attempt::Answer(status, _, body, _)
                    if status.is_success() || status == StatusCode::MULTIPLE_CHOICES =>
                {
                    break body;
                }
                Attempt::Answer(status, after, body, id) => {
                    told = after;
                    let error =
                        CloudError::new(fault(status, &body), operation, place.clone(), said(status, &body, &id));
                    let refused = status == StatusCode::UNAUTHORIZED && tried == 1;
                    refused_token = refused.then_some(token.text);
                    (error, refused || status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error())
                }
                Attempt::Lost { error, .. } => {
                    let lost = CloudError::new(Fault::Unavailable, operation, place.clone(), "no answer came");
                    (lost.caused_by(error.without_url()), true)
                }
                Attempt::TooLong => return Err(strange()),
            };
            if !again || tried >= TRIES {
                return Err(error);
            }
            pause.take(told).await;
        };
        let answer: Value = serde_json::from_slice(&body).map_err(|error| strange().caused_by(error))?;
        let all = answer["versions"].as_array().cloned().unwrap_or_else(|| vec![answer["version"].clone()]);
        let wanted = if service == Service::Cinder { 3 } else { 2 };
        let found = all.iter().filter_map(|entry| {
            let highest = Microversion::parse(entry["version"].as_str()?)?;
            let lowest = Microversion::parse(entry["min_version"].as_str()?)?;
            (highest.0 == wanted).then_some((lowest, highest))
        });
        found.max().ok_or_else(strange)
    }
}

/// The part of a failpoint's name that is the operation's: `shelve-server` of `shelve server 3f…`.
#[cfg(debug_assertions)]
fn first_words(operation: &str) -> String {
    operation.split(' ').take(2).collect::<Vec<_>>().join("-")
}

/// The request for a token. Never shown.
struct SecretBody(Value);

fn auth_body(identity: &Identity) -> Value {
    let domain = |domain: &Ref| match domain {
        Ref::Id(id) => json!({"id": id}),
        Ref::Name(name) => json!({"name": name}),
    };
    let within = |what: &Ref, of: &Ref| match what {
        Ref::Id(id) => json!({"id": id}),
        Ref::Name(name) => json!({"name": name, "domain": domain(of)}),
    };
    match identity {
        Identity::Password { user, user_domain, password, project, project_domain } => {
            let mut user = within(user, user_domain);
            user["password"] = password.expose_secret().into();
            json!({"auth": {
                "identity": {"methods": ["password"], "password": {"user": user}},
                "scope": {"project": within(project, project_domain)},
            }})
        }
        Identity::ApplicationCredential { credential, user, secret } => {
            let mut body = domain(credential);
            body["secret"] = secret.expose_secret().into();
            if let Some((user, of)) = user {
                body["user"] = within(user, of);
            }
            json!({"auth": {"identity": {"methods": ["application_credential"], "application_credential": body}}})
        }
    }
}

async fn attempt(request: reqwest::RequestBuilder) -> Attempt {
    #[cfg(test)]
    let _clock = super::tests::stop_clock();
    match request.send().await {
        Ok(response) => {
            let (status, id) = (response.status(), request_id(&response));
            let after = retry_after(&response);
            match bounded(response).await {
                Ok(body) => Attempt::Answer(status, after, body, id),
                Err(Some(error)) => Attempt::Lost { error, sent: true },
                Err(None) => Attempt::TooLong,
            }
        }
        Err(error) => {
            let sent = !error.is_connect() && !error.is_builder();
            Attempt::Lost { error, sent }
        }
    }
}

/// The whole answer, or `None` as an error where it is too long.
async fn bounded(mut response: reqwest::Response) -> std::result::Result<Vec<u8>, Option<reqwest::Error>> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(Some)? {
        if body.len() + chunk.len() > ANSWER_MAX {
            return Err(None);
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

fn header(response: &reqwest::Response, name: &str) -> Option<String> {
    response.headers().get(name)?.to_str().ok().map(str::to_owned)
}

/// For how long a service wants to be left alone, but not for longer than a caller can wait.
fn retry_after(response: &reqwest::Response) -> Option<Duration> {
    let seconds = header(response, "Retry-After")?.parse().ok()?;
    Some(Duration::from_secs(seconds).min(RETRY_AFTER_MAX))
}

/// By which the service's own log finds it again.
fn request_id(response: &reqwest::Response) -> String {
    let id = header(response, "X-Openstack-Request-Id").or_else(|| header(response, "X-Compute-Request-Id"));
    id.unwrap_or_default().chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').take(64).collect()
}

/// An address below another one.
fn below(base: &Url, path: &str) -> Url {
    let mut url = base.clone();
    let root = base.path().trim_end_matches('/').to_owned();
    url.set_path(&format!("{root}/{path}"));
    url
}

/// A service, for people: without a project's id.
fn place(service: &str, url: &Url) -> String {
    format!("{service} at {}", url.origin().ascii_serialization())
}

fn fault(status: StatusCode, body: &[u8]) -> Fault {
    let over_quota = || {
        let text = String::from_utf8_lossy(&body[..body.len().min(4096)]).to_lowercase();
        text.contains("quota") || text.contains("exceed")
    };
    match status.as_u16() {
        401 => Fault::Unauthorized,
        413 => Fault::OverQuota,
        403 if over_quota() => Fault::OverQuota,
        403 => Fault::Forbidden,
        404 => Fault::NotFound,
        // 412: it has another revision by now.
        409 | 412 => Fault::Conflict,
        406 => Fault::Version,
        429 => Fault::Busy,
        300..=499 => Fault::Refused(status.as_u16()),
        _ => Fault::Unavailable,
    }
}

/// What a service says about a failure: `{"conflictingRequest": {"code": 409, "message": "…"}}`, or `{"error": …}`.
fn said(status: StatusCode, body: &[u8], id: &str) -> String {
    let message = serde_json::from_slice::<Value>(body).ok().and_then(|answer| {
        let inner = answer.as_object()?.values().find_map(|value| value.get("message")?.as_str().map(str::to_owned));
        inner.or_else(|| answer.get("message")?.as_str().map(str::to_owned))
    });
    let message: String = message.unwrap_or_default().chars().take(500).collect();
    let message = message.replace(char::is_control, " ");
    let id = if id.is_empty() { String::new() } else { format!(" ({id})") };
    match message.trim() {
        "" => format!("it answers {status}{id}"),
        message => format!("it answers {}: {message}{id}", status.as_u16()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openstack::access::{Identity, Interface};

    #[test]
    fn no_token_goes_out_in_clear_where_keystone_is_reached_by_https() {
        let url = |text: &str| Url::parse(text).unwrap();
        let session = |keystone: &str, given: Option<&str>| {
            let access = CloudAccess {
                name: "lab".into(),
                auth_url: url(keystone),
                identity: Identity::ApplicationCredential {
                    credential: Ref::Id("c".into()),
                    user: None,
                    secret: "s".into(),
                },
                region: None,
                interface: Interface::Public,
                ca_file: None,
                verify: true,
                endpoints: given.iter().map(|address| ("volumev3", url(address))).collect(),
            };
            Session::new(access).unwrap()
        };
        let token = Token {
            text: "t".to_owned().into(),
            expires: Timestamp::MAX,
            project: "p".into(),
            roles: Vec::new(),
            endpoints: [Some(url("http://cinder/v3/p")), Some(url("https://nova/v2.1")), None],
        };
        let refused = session("https://keystone", None).endpoint(&token, Service::Cinder).unwrap_err();
        assert_eq!(refused.fault, Fault::Config);
        assert!(refused.hint.is_some_and(|hint| hint.contains("volume_endpoint_override")));
        let accepted = [
            session("https://keystone", None).endpoint(&token, Service::Nova),
            session("http://keystone", None).endpoint(&token, Service::Cinder),
            session("https://keystone", Some("http://cinder/v3/p")).endpoint(&token, Service::Cinder),
        ];
        assert!(accepted.iter().all(Result::is_ok), "{accepted:?}");
    }
}
