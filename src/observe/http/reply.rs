//! Answers: JSON, and errors as JSON.

use axum::Json;
use axum::body::Body;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::time::Duration;

use super::BODY_BYTES_MAX;
use crate::fleet::control::ActionError;

/// An answer that is no success.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    status: StatusCode,
    /// For programs; never changes its meaning.
    code: &'static str,
    /// What and where.
    message: String,
    /// What to do.
    hint: Option<String>,
}

#[derive(Serialize)]
struct ErrorBody<'a> {
    error: ErrorFields<'a>,
}

#[derive(Serialize)]
struct ErrorFields<'a> {
    code: &'a str,
    message: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<&'a str>,
}

impl Refusal {
    pub(super) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into(), hint: None }
    }

    pub(super) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub(super) fn unknown(code: &'static str, message: String) -> Self {
        Self::new(StatusCode::NOT_FOUND, code, message).hint("GET /v1/servers and /v1/fleet name what there is")
    }

    /// The body: one JSON value.
    pub(super) fn json(&self) -> String {
        let error = ErrorFields { code: self.code, message: &self.message, hint: self.hint.as_deref() };
        // Three strings can always be written.
        serde_json::to_string(&ErrorBody { error }).unwrap_or_default()
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut response = (self.status, [(header::CONTENT_TYPE, "application/json")], self.json()).into_response();
        let headers = response.headers_mut();
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, header::HeaderValue::from_static("Bearer"));
        }
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(header::RETRY_AFTER, header::HeaderValue::from_static("5"));
        }
        response
    }
}

impl From<ActionError> for Refusal {
    fn from(error: ActionError) -> Self {
        let message = error.to_string();
        match error {
            ActionError::UnknownName(_) => Self::unknown("unknown-name", message),
            ActionError::UnknownPool(_) => {
                Self::new(StatusCode::NOT_FOUND, "unknown-pool", message).hint("GET /v1/fleet names the sources")
            }
            ActionError::CutOver(_) => Self::new(StatusCode::CONFLICT, "cut-over", message)
                .hint("it goes on by itself once it is back on its sources: poolshift rollback PLAN SERVER"),
            ActionError::NotStored(_) => Self::new(StatusCode::SERVICE_UNAVAILABLE, "not-stored", message)
                .hint("nothing has changed for certain; try again when the storage answers"),
        }
    }
}

/// What a handler gives back.
pub(super) type Answer<T> = Result<Json<T>, Refusal>;

/// Reads a JSON body, within the limit of bytes and of time. The content type does not matter: `curl -d` sends another.
pub(super) async fn read_json<T: DeserializeOwned>(body: Body, patience: Duration) -> Result<T, Refusal> {
    let too_large = || {
        let text = format!("the body has more than {} KiB", BODY_BYTES_MAX >> 10);
        Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "body-too-large", text)
    };
    // Announced is enough: such a body is not even waited for.
    if axum::body::HttpBody::size_hint(&body).lower() > BODY_BYTES_MAX as u64 {
        return Err(too_large());
    }
    let collected = match tokio::time::timeout(patience, Limited::new(body, BODY_BYTES_MAX).collect()).await {
        Ok(Ok(collected)) => collected.to_bytes(),
        Ok(Err(error)) if error.is::<LengthLimitError>() => return Err(too_large()),
        Ok(Err(error)) => {
            return Err(Refusal::new(StatusCode::BAD_REQUEST, "bad-body", format!("the body can't be read: {error}")));
        }
        Err(_) => {
            let text = format!("the body did not come within {} s", patience.as_secs_f64());
            return Err(Refusal::new(StatusCode::REQUEST_TIMEOUT, "body-too-slow", text));
        }
    };
    serde_json::from_slice(&collected).map_err(|error| {
        let hint = "GET /v1 lists what each path takes";
        match error.classify() {
            serde_json::error::Category::Data => {
                let text = format!("the body is JSON, but not what this path takes: {error}");
                Refusal::new(StatusCode::UNPROCESSABLE_ENTITY, "wrong-fields", text).hint(hint)
            }
            _ => Refusal::new(StatusCode::BAD_REQUEST, "bad-json", format!("the body is no JSON: {error}")).hint(hint),
        }
    })
}
