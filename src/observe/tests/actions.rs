//! Actions and throttles.

use std::num::NonZeroU64;

use super::*;
use crate::fleet::control::{ActionError, Scope};
use crate::observe::client::{Action, Client, ClientError, Patience};
use crate::throttle::Rate;

fn client(server: &Server, token: &str) -> Client {
    Client::new(server.address, Some(Token::new(token).unwrap()))
}

#[tokio::test]
async fn actions_reach_the_fleet_and_name_the_servers() {
    let server = Server::start().await;
    for action in ["pause", "resume", "sync-now"] {
        let answer = server.act("POST", &format!("/v1/actions/{action}"), r#"{"name":"web-1"}"#).await;
        assert_eq!(answer.expect_ok(), serde_json::json!({ "servers": ["web-1"] }));
        let answer = server.act("POST", &format!("/v1/actions/{action}"), r#"{"scope":"all"}"#).await;
        assert_eq!(answer.expect_ok()["servers"].as_array().unwrap().len(), 3);
    }
    let asked = server.fleet.state.lock().unwrap().asked.clone();
    assert_eq!(asked.len(), 6);
    assert_eq!(asked[4..], ["sync-now Named(\"web-1\")", "sync-now All"]);
}

#[tokio::test]
async fn bodies_that_are_not_understood_change_nothing() {
    let server = Server::start().await;
    for (body, status, code) in [
        ("", 400, "bad-json"),
        ("{", 400, "bad-json"),
        (r#"{"scope":"all"} x"#, 400, "bad-json"),
        ("[]", 422, "wrong-fields"),
        ("{}", 422, "wrong-fields"),
        (r#"{"scope":"some"}"#, 422, "wrong-fields"),
        (r#"{"scope":"all","name":"web-1"}"#, 422, "wrong-fields"),
        (r#"{"name":1}"#, 422, "wrong-fields"),
        (r#"{"name":"web-1","force":true}"#, 422, "wrong-fields"),
    ] {
        server.act("POST", "/v1/actions/pause", body).await.expect(status, code);
    }
    for body in [
        "{}",
        r#"{"bytes_per_second":1}"#,
        r#"{"bytes_per_second":0,"operations_per_second":null}"#,
        r#"{"bytes_per_second":-1,"operations_per_second":null}"#,
        r#"{"bytes_per_second":1.5,"operations_per_second":null}"#,
        r#"{"bytes_per_second":1,"operations_per_second":null,"x":1}"#,
    ] {
        server.act("PUT", "/v1/throttles/sata", body).await.expect(422, "wrong-fields");
    }
    assert!(server.fleet.state.lock().unwrap().asked.is_empty());
}

#[tokio::test]
async fn a_throttle_is_set_and_given_back_to_the_plan() {
    let server = Server::start().await;
    let body = r#"{"bytes_per_second":1048576,"operations_per_second":null}"#;
    let answer = server.act("PUT", "/v1/throttles/sata", body).await.expect_ok();
    assert_eq!(answer["rate"]["bytes_per_second"], 1 << 20);
    let answer = server.act("DELETE", "/v1/throttles/sata", "").await.expect_ok();
    assert_eq!(answer, serde_json::json!({ "pool": "sata", "rate": null }));
    server.act("DELETE", "/v1/throttles/none", "").await.expect(404, "unknown-pool");
    server.act("DELETE", "/v1/throttles/%ff", "").await.expect(400, "bad-path");
    server.ask("DELETE", "/v1/throttles/sata", &[], "").await.expect(401, "token-missing");
    let asked = server.fleet.state.lock().unwrap().asked.clone();
    assert_eq!(asked, ["throttle sata Some((Some(1048576), None))", "throttle sata None", "throttle none None"]);
}

#[tokio::test]
async fn refusals_of_the_fleet_are_told() {
    let server = Server::start().await;
    let answer = server.act("POST", "/v1/actions/pause", r#"{"name":"nobody"}"#).await;
    answer.expect(404, "unknown-name");
    server.fleet.state.lock().unwrap().refusal = Some(ActionError::NotStored("no answer of the cluster".into()));
    let answer = server.act("POST", "/v1/actions/pause", r#"{"scope":"all"}"#).await;
    answer.expect(503, "not-stored");
    assert!(answer.body.contains("no answer of the cluster") && answer.header("retry-after").is_some());
}

#[tokio::test]
async fn the_client_asks_what_the_server_takes() {
    let server = Server::start().await;
    let client = client(&server, TOKEN);
    assert_eq!(client.fleet().await.unwrap(), fleet::status());
    assert_eq!(client.act(Action::Pause, &Scope::All).await.unwrap().len(), 3);
    assert_eq!(client.act(Action::SyncNow, &Scope::Named("web-1".into())).await.unwrap(), ["web-1"]);
    let rate = Rate { bytes_per_second: NonZeroU64::new(7), operations_per_second: None };
    client.set_throttle("a/b ä", Some(rate)).await.unwrap();
    client.set_throttle("sata", None).await.unwrap();
    let asked = server.fleet.state.lock().unwrap().asked.clone();
    assert_eq!(asked[2..], ["throttle a/b ä Some((Some(7), None))", "throttle sata None"]);
}

#[tokio::test]
async fn the_client_says_why_there_is_no_answer() {
    let server = Server::start().await;
    let error = client(&server, "another-horse-battery").fleet().await.unwrap_err();
    assert!(matches!(&error, ClientError::Refused { status: 401, code, .. } if code == "token-refused"), "{error}");
    assert!(error.hint().unwrap().contains("--token-file"));
    let error = client(&server, TOKEN).act(Action::Resume, &Scope::Named("x".into())).await.unwrap_err();
    assert!(error.to_string().contains("no server or volume \"x\""), "{error}");

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let patience = Patience { connect: FOREVER, answer: Duration::from_millis(50) };
    let silent = Client::new(address, None).with_patience(patience);
    assert!(matches!(silent.fleet().await, Err(ClientError::TimedOut { .. })));
    drop(listener);
    assert!(matches!(silent.fleet().await, Err(ClientError::NoDaemon { .. })));
}

#[tokio::test]
async fn the_client_knows_a_stranger() {
    for (answer, strange) in [
        ("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello", true),
        ("HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n", true),
        ("220 mail.example ESMTP\r\n", false),
        ("", false),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stranger = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            // Read first: closing with the request unread would reset the connection.
            let mut request = [0; 4096];
            assert!(stream.read(&mut request).await.unwrap() > 0);
            stream.write_all(answer.as_bytes()).await.unwrap();
        });
        let error = Client::new(address, None).fleet().await.unwrap_err();
        assert_eq!(matches!(error, ClientError::Strange { .. }), strange, "{answer}: {error:?}");
        assert_eq!(matches!(error, ClientError::Http { .. }), !strange, "{answer}: {error:?}");
        stranger.await.unwrap();
    }
}
