//! Requests and answers: what Keystone does, and which service a request is for.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use super::PROJECT;
use super::state::State;
use super::trouble::{Fate, Script, Trouble};

/// A status and a body.
pub(super) type Answer = (u16, Value);

/// A failure as Nova and Cinder put it.
pub(super) fn failure(status: u16, message: impl Into<String>) -> Answer {
    let kind = match status {
        400 => "badRequest",
        404 => "itemNotFound",
        409 => "conflictingRequest",
        _ => "computeFault",
    };
    (status, json!({kind: {"code": status, "message": message.into()}}))
}

/// A request, in the parts that count.
pub(super) struct Call<'a> {
    pub(super) method: &'a str,
    /// Below the service's address.
    pub(super) path: Vec<&'a str>,
    pub(super) query: &'a str,
    pub(super) body: &'a Value,
}

/// The connection ends without an answer.
#[derive(Debug, thiserror::Error)]
#[error("the connection is cut")]
struct Cut;

struct Shared {
    state: Arc<Mutex<State>>,
    script: Arc<Mutex<Script>>,
    base: String,
}

/// Serves for ever.
pub(super) async fn serve(listener: TcpListener, state: Arc<Mutex<State>>, script: Arc<Mutex<Script>>, base: String) {
    let shared = Arc::new(Shared { state, script, base });
    // Its connections end with it.
    let mut connections = tokio::task::JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let _ = stream.set_nodelay(true);
        let shared = Arc::clone(&shared);
        let service = hyper::service::service_fn(move |request| {
            let shared = Arc::clone(&shared);
            async move { shared.serve(request).await }
        });
        let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
        connections.spawn(async move {
            // One that is cut is no error here.
            let _ = connection.await;
        });
        while connections.try_join_next().is_some() {}
    }
}

impl Shared {
    async fn serve(&self, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Cut> {
        let (head, body) = request.into_parts();
        let body = body.collect().await.map_err(|_| Cut)?.to_bytes();
        let path = head.uri.path().to_owned();
        let query = head.uri.query().unwrap_or_default();
        let token = head.headers.get("X-Auth-Token").and_then(|token| token.to_str().ok());
        let method = head.method.as_str();
        let changes = method != "GET" && !path.starts_with("/identity/");
        let said = if changes { String::from_utf8_lossy(&body).into_owned() } else { String::new() };
        let call = format!("{method} {path}?{query} {said}");
        let fate = self.script.lock().unwrap_or_else(PoisonError::into_inner).decide(&call, changes, token);
        let body = if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).map_err(|_| Cut)? };
        let call = Call { method, path: path.split('/').filter(|part| !part.is_empty()).collect(), query, body: &body };
        let trouble = match fate {
            Fate::Cut => return Err(Cut),
            Fate::TokenRefused => return Ok(answer(unauthorized(), &[])),
            Fate::CarriedOut => None,
            Fate::Trouble(trouble) => Some(trouble),
        };
        match trouble {
            Some(Trouble::Refused(status)) => {
                let headers: &[_] = if status == 429 { &[("Retry-After", "1".to_owned())] } else { &[] };
                return Ok(answer(failure(status, "this request was to fail"), headers));
            }
            Some(Trouble::RefusedJustSo(status)) => {
                return Ok(answer(failure(status, "this request was to fail"), &[]));
            }
            Some(Trouble::Pretended | Trouble::AlwaysPretended) => return Ok(answer((202, json!({})), &[])),
            _ => {}
        }
        let (answered, headers) = self.carry_out(&call, token);
        match trouble {
            Some(Trouble::TokenRevoked) => {
                let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                state.tokens.retain(|known| Some(known.as_str()) != token);
            }
            Some(Trouble::Unanswered) => return Err(Cut),
            Some(Trouble::Killed) => {
                self.script.lock().unwrap_or_else(PoisonError::into_inner).kill();
                return Err(Cut);
            }
            _ => {}
        }
        Ok(answer(answered, &headers))
    }

    fn carry_out(&self, call: &Call<'_>, token: Option<&str>) -> (Answer, Vec<(&'static str, String)>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.happen(tokio::time::Instant::now());
        if (call.method, call.path.as_slice()) == ("POST", &["identity", "v3", "auth", "tokens"]) {
            return self.authenticate(&mut state, call.body);
        }
        if !token.is_some_and(|token| state.tokens.iter().any(|known| known == token)) {
            return (unauthorized(), Vec::new());
        }
        let versions =
            |lowest, highest| (300, json!({"versions": [{"id": "v", "version": highest, "min_version": lowest}]}));
        let below = |count: usize| Call { path: call.path[count..].to_vec(), ..*call };
        let answered = match call.path.as_slice() {
            ["identity", "v3", "auth", "tokens"] => {
                state.tokens.retain(|known| Some(known.as_str()) != token);
                (204, Value::Null)
            }
            ["volume", "v3"] => versions("3.0", "3.70"),
            ["compute", "v2.1"] => versions("2.1", "2.93"),
            ["volume", "v3", project, ..] if *project == PROJECT => state.cinder(&below(3)),
            ["compute", "v2.1", ..] => state.nova(&below(2)),
            _ => failure(404, "nothing is here"),
        };
        (answered, Vec::new())
    }

    fn authenticate(&self, state: &mut State, body: &Value) -> (Answer, Vec<(&'static str, String)>) {
        if body["auth"]["identity"]["password"]["user"]["password"] != "poolshift" {
            return (unauthorized(), Vec::new());
        }
        state.tokens_made += 1;
        let token = format!("token-{}", state.tokens_made);
        state.tokens.push(token.clone());
        let base = &self.base;
        let endpoint = |path: String| json!([{"interface": "public", "region_id": "RegionOne", "url": path}]);
        let expires = jiff::Timestamp::now() + jiff::SignedDuration::from_hours(1);
        let body = json!({"token": {
            "expires_at": expires.to_string(), "project": {"id": PROJECT}, "roles": [{"name": "admin"}],
            "catalog": [
                {"type": "volumev3", "endpoints": endpoint(format!("{base}/volume/v3/{PROJECT}"))},
                {"type": "compute", "endpoints": endpoint(format!("{base}/compute/v2.1"))},
            ],
        }});
        ((201, body), vec![("X-Subject-Token", token)])
    }
}

fn unauthorized() -> Answer {
    let message = "The request you have made requires authentication.";
    (401, json!({"error": {"code": 401, "message": message, "title": "Unauthorized"}}))
}

fn answer((status, body): Answer, headers: &[(&'static str, String)]) -> Response<Full<Bytes>> {
    let body = if body.is_null() { Bytes::new() } else { body.to_string().into() };
    let mut response = Response::builder().status(status).header("Content-Type", "application/json");
    for (name, value) in headers {
        response = response.header(*name, value);
    }
    response.body(Full::from(body)).unwrap_or_default()
}
