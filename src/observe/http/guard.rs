//! Who may ask for what: the token, and the `Host` of those who need none.

use std::net::IpAddr;
use std::sync::Arc;

use axum::extract::{FromRequestParts, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};

use super::Served;
use super::reply::Refusal;

/// The path that tells nothing, and so is for everybody.
pub(super) const HEALTH: &str = "/healthz";

/// Lets a request through that may at least read; actions ask for [`Authorised`] besides.
pub(super) async fn check(State(served): State<Arc<Served>>, request: Request, next: Next) -> Response {
    let outcome = if request.uri().path() == HEALTH { Ok(()) } else { may_read(&served, request.headers()) };
    let mut response = match outcome {
        Ok(()) => next.run(request).await,
        Err(refusal) => refusal.into_response(),
    };
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

fn may_read(served: &Served, headers: &HeaderMap) -> Result<(), Refusal> {
    // A token that is given is held to, even where none is needed: who sends a wrong one should learn of it here.
    let has_token = served.access.token.is_some() && headers.contains_key(header::AUTHORIZATION);
    if !served.loopback || has_token {
        return needs_token(served, headers);
    }
    if is_local_host(headers) {
        return Ok(());
    }
    let text = "the Host header is not localhost or a loopback address";
    Err(Refusal::new(StatusCode::FORBIDDEN, "foreign-host", text)
        .hint("ask by 127.0.0.1 or localhost, or send the token: Authorization: Bearer TOKEN"))
}

fn needs_token(served: &Served, headers: &HeaderMap) -> Result<(), Refusal> {
    let Some(token) = &served.access.token else {
        return Err(Refusal::new(
            StatusCode::FORBIDDEN,
            "no-token-configured",
            "this needs a token, and none is set up",
        )
        .hint("write one to a file with mode 600, name it in the plan as token_file under [api], and restart"));
    };
    let unauthorised = |code, text| {
        Refusal::new(StatusCode::UNAUTHORIZED, code, text)
            .hint("send Authorization: Bearer TOKEN, as in api.token_file")
    };
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let value = values.next().ok_or_else(|| unauthorised("token-missing", "this needs the token"))?;
    let given = value.as_bytes();
    // The scheme's name is the same in any case (RFC 9110, 11.1).
    let bearer = given.split_at_checked(7).filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"Bearer "));
    match bearer {
        Some((_, secret)) if values.next().is_none() && token.matches(secret.trim_ascii()) => Ok(()),
        _ => Err(unauthorised("token-refused", "the token is not the right one")),
    }
}

/// Exactly one `Host`, whose name can't be rebound: `localhost` or an address of loopback, with any port.
fn is_local_host(headers: &HeaderMap) -> bool {
    let mut values = headers.get_all(header::HOST).iter();
    let (Some(value), None) = (values.next(), values.next()) else { return false };
    value.to_str().is_ok_and(is_local_name)
}

fn is_local_name(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((name, rest)) if rest.is_empty() || rest.starts_with(':') => name,
            _ => return false,
        },
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    name.eq_ignore_ascii_case("localhost")
        || name.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
}

/// The request has the token.
pub(super) struct Authorised;

impl FromRequestParts<Arc<Served>> for Authorised {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, served: &Arc<Served>) -> Result<Self, Refusal> {
        needs_token(served, &parts.headers).map(|()| Self)
    }
}

#[cfg(test)]
mod tests {
    use super::is_local_name;

    #[test]
    fn only_names_of_loopback_are_local() {
        for name in
            ["localhost", "LOCALHOST:80", "127.0.0.1", "127.9.9.9:9100", "[::1]", "[::1]:80", "[::ffff:127.0.0.1]:1"]
        {
            assert!(is_local_name(name), "{name}");
        }
        for name in
            ["", "evil.example", "localhost.evil.example:80", "10.0.0.1", "[::2]:80", "[::1]evil", "[::1", "0.0.0.0"]
        {
            assert!(!is_local_name(name), "{name}");
        }
    }
}
