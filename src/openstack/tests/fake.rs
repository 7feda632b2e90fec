//! A Keystone, a Cinder and a Nova on one port, that answer by a script.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Response};
use serde_json::{Value, json};

use super::super::access::{Identity, Interface, Ref};
use super::super::{Cloud, CloudAccess, Result};

/// A password that must never be seen again.
pub(super) const PASSWORD: &str = "hunter2-and-more";

/// The project of the tokens.
pub(super) const PROJECT: &str = "0123456789abcdef0123456789abcdef";

/// A request that came.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    /// `GET /volume/v3/…/types?is_public=None`.
    pub(super) line: String,
    pub(super) headers: HeaderMap,
    /// `Null` without one.
    pub(super) body: Value,
}

impl Seen {
    pub(super) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("-", |value| value.to_str().unwrap())
    }
}

/// An answer.
pub(super) struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Body,
}

impl Answer {
    pub(super) fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }
}

/// An answer in JSON.
pub(super) fn answer(status: u16, body: Value) -> Answer {
    text(status, body.to_string())
}

/// Any answer.
pub(super) fn text(status: u16, body: impl Into<Body>) -> Answer {
    Answer { status, headers: Vec::new(), body: body.into() }
}

/// A token with that number, which is good for so many seconds, and the usual catalog.
pub(super) fn token(number: usize, seconds: i64, base: &str) -> Answer {
    let endpoint = |path: &str| json!([{"interface": "public", "region_id": "r1", "url": format!("{base}{path}")}]);
    let catalog = json!([
        {"type": "volumev3", "endpoints": endpoint(&format!("/volume/v3/{PROJECT}"))},
        {"type": "compute", "endpoints": endpoint("/compute/v2.1")},
    ]);
    token_with(number, seconds, catalog)
}

/// The same with a catalog of one's own.
pub(super) fn token_with(number: usize, seconds: i64, catalog: Value) -> Answer {
    let expires = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(seconds);
    let body = json!({"token": {
        "expires_at": expires.to_string(), "project": {"id": PROJECT}, "roles": [{"name": "admin"}], "catalog": catalog,
    }});
    answer(201, body).header("X-Subject-Token", format!("token-{number}"))
}

/// What a service of such versions answers at its root.
pub(super) fn versions(lowest: &str, highest: &str) -> Answer {
    answer(300, json!({"versions": [{"id": "v", "version": highest, "min_version": lowest}]}))
}

/// What is answered to a request, of which so many of the same method and path came before, and the address of all this;
/// `None` for what a usual cloud says.
type Script = dyn Fn(&Seen, usize, &str) -> Option<Answer> + Send + Sync;

struct Inner {
    base: String,
    seen: Mutex<(Vec<Seen>, BTreeMap<String, usize>)>,
    script: Box<Script>,
}

/// The services.
#[derive(Clone)]
pub(super) struct Fake(Arc<Inner>);

impl Fake {
    pub(super) async fn start(script: impl Fn(&Seen, usize, &str) -> Option<Answer> + Send + Sync + 'static) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let fake = Self(Arc::new(Inner { base, seen: Mutex::default(), script: Box::new(script) }));
        let router = axum::Router::new().fallback(handle).with_state(fake.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        fake
    }

    /// With nothing out of the ordinary, but for what it is asked with `GET` below a service's address.
    pub(super) async fn with(path: &'static str, body: Value) -> Self {
        Self::start(move |seen, _, _| seen.line.contains(path).then(|| answer(200, body.clone()))).await
    }

    pub(super) fn base(&self) -> &str {
        &self.0.base
    }

    pub(super) fn access(&self) -> CloudAccess {
        CloudAccess {
            name: "the cloud test".into(),
            auth_url: format!("{}/identity", self.0.base).parse().unwrap(),
            identity: Identity::Password {
                user: Ref::Name("ann".into()),
                user_domain: Ref::Id("default".into()),
                password: PASSWORD.into(),
                project: Ref::Name("p".into()),
                project_domain: Ref::Name("d".into()),
            },
            region: None,
            interface: Interface::Public,
            ca_file: None,
            verify: true,
            endpoints: BTreeMap::new(),
        }
    }

    pub(super) async fn connect(&self) -> Result<Cloud> {
        Cloud::connect(self.access()).await
    }

    /// The requests that came, whose lines have this in them.
    pub(super) fn seen(&self, part: &str) -> Vec<Seen> {
        let seen = self.0.seen.lock().unwrap();
        seen.0.iter().filter(|seen| seen.line.contains(part)).cloned().collect()
    }

    pub(super) fn count(&self, part: &str) -> usize {
        self.seen(part).len()
    }
}

async fn handle(State(fake): State<Fake>, request: Request) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let bytes: Bytes = axum::body::to_bytes(body, 1 << 20).await.unwrap();
    let body = if bytes.is_empty() { Value::Null } else { serde_json::from_slice(&bytes).unwrap() };
    let seen = Seen { line: format!("{} {}", parts.method, parts.uri), headers: parts.headers, body };
    let key = format!("{} {}", parts.method, parts.uri.path());
    let before = {
        let mut all = fake.0.seen.lock().unwrap();
        all.0.push(seen.clone());
        let count = all.1.entry(key.clone()).or_default();
        *count += 1;
        *count - 1
    };
    let Answer { status, headers, body } =
        (fake.0.script)(&seen, before, &fake.0.base).unwrap_or_else(|| match key.as_str() {
            "POST /identity/v3/auth/tokens" => token(before, 3600, &fake.0.base),
            "GET /volume/v3/" => versions("3.0", "3.70"),
            "GET /compute/v2.1/" => answer(200, json!({"version": {"version": "2.93", "min_version": "2.1"}})),
            _ => answer(404, json!({"itemNotFound": {"code": 404, "message": "nothing is here"}})),
        });
    let mut response = Response::builder().status(status);
    for (name, value) in headers {
        response = response.header(name, value);
    }
    response.body(body).unwrap()
}
