//! Asks a daemon's API ([`super::http`]): one connection for each question.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::token::Token;
use crate::fleet::control::Scope;
use crate::fleet::status::FleetStatus;
use crate::throttle::Rate;

/// The largest answer, in bytes: thousands of volumes are a few MiB.
pub const ANSWER_BYTES_MAX: usize = 64 << 20;

/// How long to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// For the connection.
    pub connect: Duration,
    /// For the whole answer, from then on.
    pub answer: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        // An action is noted in the storage, for which a request has 60 s by default.
        Self { connect: Duration::from_secs(3), answer: Duration::from_secs(90) }
    }
}

/// What a person may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// See [`crate::fleet::control::FleetControl::pause`].
    Pause,
    /// See [`crate::fleet::control::FleetControl::resume`].
    Resume,
    /// See [`crate::fleet::control::FleetControl::sync_now`].
    SyncNow,
}

impl Action {
    /// Its name, in the API and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::SyncNow => "sync-now",
        }
    }
}

/// Why there is no answer, or not the one that was hoped for.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nothing listens there.
    #[error("no daemon answers at {address}")]
    NoDaemon {
        /// Where.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// Something listens there, and doesn't answer.
    #[error("the daemon at {address} did not answer within {} s", .after.as_secs_f64())]
    TimedOut {
        /// Where.
        address: SocketAddr,
        /// How long was waited.
        after: Duration,
    },
    /// The daemon says no.
    #[error("the daemon at {address} refused: {message}")]
    Refused {
        /// Where.
        address: SocketAddr,
        /// The HTTP status.
        status: u16,
        /// Which refusal, for programs: see [`super::http`].
        code: String,
        /// What and where.
        message: String,
        /// What to do.
        hint: Option<String>,
    },
    /// The answer has no end.
    #[error("the answer of {address} has more than {} MiB", ANSWER_BYTES_MAX >> 20)]
    TooLarge {
        /// Where.
        address: SocketAddr,
    },
    /// The connection broke.
    #[error("the connection to {address} broke")]
    Http {
        /// Where.
        address: SocketAddr,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// What answers is no poolshift, or one of another version.
    #[error("what answers at {address} is not the daemon that this program knows: {problem}")]
    Strange {
        /// Where.
        address: SocketAddr,
        /// What is strange.
        problem: String,
    },
}

impl ClientError {
    /// What to do.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NoDaemon { .. } => Some(
                "start it with: poolshift replicate PLAN; the plan says where it listens: listen, under [api]".into(),
            ),
            Self::TimedOut { .. } => Some("try again; if that does not help, look at the daemon's log".into()),
            Self::Refused { code, .. } if code == "token-missing" || code == "token-refused" => {
                Some("give the daemon's token with --token-file PATH or in POOLSHIFT_TOKEN".into())
            }
            Self::Refused { hint, .. } => hint.clone(),
            Self::Strange { .. } => {
                Some("see that listen, under [api] in the plan, is the daemon's own address".into())
            }
            Self::TooLarge { .. } | Self::Http { .. } => None,
        }
    }
}

/// A daemon, as it is asked.
#[derive(Clone, Debug)]
pub struct Client {
    address: SocketAddr,
    token: Option<Token>,
    patience: Patience,
}

#[derive(Deserialize)]
struct Servers {
    servers: Vec<String>,
}

#[derive(Deserialize)]
struct ErrorBody {
    error: ErrorFields,
}

#[derive(Deserialize)]
struct ErrorFields {
    code: String,
    message: String,
    hint: Option<String>,
}

impl Client {
    /// Asks a daemon that listens at `listen`. One that listens at all addresses is asked on loopback.
    pub fn new(listen: SocketAddr, token: Option<Token>) -> Self {
        let mut address = listen;
        if listen.ip().is_unspecified() {
            address.set_ip(match listen.ip() {
                IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
                IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
            });
        }
        Self { address, token, patience: Patience::default() }
    }

    /// The same, with other patience.
    #[must_use]
    pub fn with_patience(mut self, patience: Patience) -> Self {
        self.patience = patience;
        self
    }

    /// How everything is.
    ///
    /// # Errors
    ///
    /// [`ClientError::NoDaemon`] if nothing listens, and every other kind of [`ClientError`].
    pub async fn fleet(&self) -> Result<FleetStatus, ClientError> {
        self.ask(Method::GET, "/v1/fleet", None).await
    }

    /// Acts; gives back the names of the servers that it concerned.
    ///
    /// # Errors
    ///
    /// See [`Self::fleet`].
    pub async fn act(&self, action: Action, scope: &Scope) -> Result<Vec<String>, ClientError> {
        let body = match scope {
            Scope::All => serde_json::json!({ "scope": "all" }),
            Scope::Named(name) => serde_json::json!({ "name": name }),
        };
        let path = format!("/v1/actions/{}", action.name());
        let Servers { servers } = self.ask(Method::POST, &path, Some(body)).await?;
        Ok(servers)
    }

    /// Limits a source pool; `None`: what the plan says.
    ///
    /// # Errors
    ///
    /// See [`Self::fleet`].
    pub async fn set_throttle(&self, pool: &str, rate: Option<Rate>) -> Result<(), ClientError> {
        let path = format!("/v1/throttles/{}", segment(pool));
        let (method, body) = match rate {
            Some(rate) => (
                Method::PUT,
                Some(serde_json::json!({
                    "bytes_per_second": rate.bytes_per_second,
                    "operations_per_second": rate.operations_per_second,
                })),
            ),
            None => (Method::DELETE, None),
        };
        let _: serde::de::IgnoredAny = self.ask(method, &path, body).await?;
        Ok(())
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<serde_json::Value>,
    ) -> Result<T, ClientError> {
        let address = self.address;
        let within = async |limit: Duration| {
            tokio::time::sleep(limit).await;
            ClientError::TimedOut { address, after: limit }
        };
        let stream = tokio::select! {
            stream = TcpStream::connect(address) => {
                stream.map_err(|source| ClientError::NoDaemon { address, source })?
            }
            error = within(self.patience.connect) => return Err(error),
        };
        let request = self.request(method, path, body).map_err(|error| self.broken(error))?;
        let (status, answer) = tokio::select! {
            answer = self.exchange(stream, request) => answer?,
            error = within(self.patience.answer) => return Err(error),
        };
        self.read(status, &answer)
    }

    fn request(
        &self,
        method: Method,
        path: &str,
        body: Option<serde_json::Value>,
    ) -> Result<Request<Full<Bytes>>, hyper::http::Error> {
        let mut request = Request::builder().method(method).uri(path).header(HOST, self.address.to_string());
        if let Some(token) = &self.token {
            let mut value = HeaderValue::try_from(token.authorization())?;
            value.set_sensitive(true);
            request = request.header(AUTHORIZATION, value);
        }
        if body.is_some() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        request.body(Full::new(body.map_or_else(Bytes::new, |body| body.to_string().into())))
    }

    async fn exchange(
        &self,
        stream: TcpStream,
        request: Request<Full<Bytes>>,
    ) -> Result<(StatusCode, Bytes), ClientError> {
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| self.broken(error))?;
        // Ends with this call, however that ends.
        let mut driver = JoinSet::new();
        driver.spawn(connection);
        let response: Response<_> = sender.send_request(request).await.map_err(|error| self.broken(error))?;
        let status = response.status();
        let answer = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await.map_err(|error| {
            if error.is::<LengthLimitError>() {
                ClientError::TooLarge { address: self.address }
            } else {
                ClientError::Http { address: self.address, source: error }
            }
        })?;
        Ok((status, answer.to_bytes()))
    }

    fn broken(&self, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ClientError {
        ClientError::Http { address: self.address, source: error.into() }
    }

    fn read<T: DeserializeOwned>(&self, status: StatusCode, answer: &[u8]) -> Result<T, ClientError> {
        let address = self.address;
        if status.is_success() {
            return serde_json::from_slice(answer)
                .map_err(|error| ClientError::Strange { address, problem: format!("its answer: {error}") });
        }
        match serde_json::from_slice(answer) {
            Ok(ErrorBody { error: ErrorFields { code, message, hint } }) => {
                Err(ClientError::Refused { address, status: status.as_u16(), code, message, hint })
            }
            Err(_) => Err(ClientError::Strange { address, problem: format!("it answers {status}") }),
        }
    }
}

/// A name as one segment of a path: everything but RFC 3986's unreserved characters is escaped.
fn segment(name: &str) -> String {
    let mut text = String::with_capacity(name.len());
    for byte in name.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => text.push(char::from(byte)),
            _ => text.push_str(&format!("%{byte:02X}")),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_that_listens_everywhere_is_asked_on_loopback() {
        for (listen, asked) in [("0.0.0.0:9", "127.0.0.1:9"), ("[::]:9", "[::1]:9"), ("10.0.0.1:9", "10.0.0.1:9")] {
            assert_eq!(Client::new(listen.parse().unwrap(), None).address.to_string(), asked);
        }
    }

    #[test]
    fn a_name_is_one_segment_of_a_path() {
        assert_eq!(segment("sata-1.a_b~c"), "sata-1.a_b~c");
        assert_eq!(segment("a/b ä?#%"), "a%2Fb%20%C3%A4%3F%23%25");
    }
}
