//! The API over a real connection, on a fleet that does what it is told.

mod access;
mod actions;
mod bounds;
mod events;
pub(in crate::observe) mod fleet;
mod reads;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::http::{Access, Limits, serve_within};
use super::token::Token;
use fleet::Scripted;

/// The token of every server here that has one.
const TOKEN: &str = "correct-horse-battery-staple";

/// Nothing in these tests takes as long; what does has failed.
const FOREVER: Duration = Duration::from_secs(60);

/// A server, which ends with the test.
struct Server {
    address: SocketAddr,
    fleet: Arc<Scripted>,
    cancel: CancellationToken,
    task: JoinHandle<std::io::Result<()>>,
}

impl Server {
    async fn start() -> Self {
        Self::start_within(Limits::default()).await
    }

    async fn start_within(limits: Limits) -> Self {
        Self::start_with("127.0.0.1:0", Some(TOKEN), limits).await
    }

    async fn start_with(address: &str, token: Option<&str>, limits: Limits) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let mut address = listener.local_addr().unwrap();
        if address.ip().is_unspecified() {
            address.set_ip([127, 0, 0, 1].into());
        }
        let fleet = Arc::new(Scripted::default());
        let cancel = CancellationToken::new();
        let access = Access { token: token.map(|token| Token::new(token).unwrap()) };
        let task = tokio::spawn(serve_within(listener, fleet.clone(), access, limits, cancel.clone()));
        Self { address, fleet, cancel, task }
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// Sends text as it is, and reads until the server hangs up.
    async fn raw(&self, request: &str) -> Answer {
        let mut stream = self.connect().await;
        stream.write_all(request.as_bytes()).await.unwrap();
        Answer::read(&mut stream).await
    }

    /// A request with further header lines and a body.
    async fn ask(&self, method: &str, path: &str, headers: &[&str], body: &str) -> Answer {
        let mut request = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\n");
        if !headers.iter().any(|line| line.starts_with("Host:")) {
            request.push_str(&format!("Host: {}\r\n", self.address));
        }
        for line in headers {
            request.push_str(&format!("{line}\r\n"));
        }
        self.raw(&format!("{request}Content-Length: {}\r\n\r\n{body}", body.len())).await
    }

    async fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, &[], "").await
    }

    /// With the token.
    async fn act(&self, method: &str, path: &str, body: &str) -> Answer {
        self.ask(method, path, &[&format!("Authorization: Bearer {TOKEN}")], body).await
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What came back.
#[derive(Debug)]
struct Answer {
    status: u16,
    /// The header lines, names in lower case.
    headers: Vec<(String, String)>,
    body: String,
}

impl Answer {
    /// Reads until the server hangs up; an answer that is chunked is put together.
    async fn read(stream: &mut TcpStream) -> Self {
        let mut bytes = Vec::new();
        tokio::time::timeout(FOREVER, stream.read_to_end(&mut bytes)).await.expect("hangs up").unwrap();
        Self::parse(&String::from_utf8(bytes).unwrap())
    }

    fn parse(text: &str) -> Self {
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {text:?}"));
        let mut lines = head.lines();
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let headers = lines
            .map(|line| line.split_once(": ").unwrap())
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
            .collect();
        Self { status, headers, body: body.to_owned() }
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The error's code; the answer must be an error as the API promises it.
    fn code(&self) -> String {
        let value = self.json();
        assert_eq!(self.header("content-type"), Some("application/json"), "{self:?}");
        assert!(value["error"]["message"].is_string(), "{self:?}");
        assert_eq!(value.as_object().unwrap().len(), 1, "{self:?}");
        value["error"]["code"].as_str().unwrap_or_else(|| panic!("{self:?}")).to_owned()
    }

    #[track_caller]
    fn expect(&self, status: u16, code: &str) {
        assert_eq!((self.status, self.code().as_str()), (status, code), "{self:?}");
    }

    #[track_caller]
    fn expect_ok(&self) -> serde_json::Value {
        assert_eq!(self.status, 200, "{self:?}");
        self.json()
    }
}
