//! Who may do what.

use super::*;

const PAUSE: &str = "/v1/actions/pause";
const ALL: &str = r#"{"scope":"all"}"#;

#[tokio::test]
async fn an_action_needs_the_token() {
    let server = Server::start().await;
    let missing = server.ask("POST", PAUSE, &[], ALL).await;
    missing.expect(401, "token-missing");
    assert_eq!(missing.header("www-authenticate"), Some("Bearer"));
    for value in [
        "Bearer wrong-horse-battery-staple".to_owned(),
        "Bearer ".into(),
        "Basic Y29ycmVjdA==".into(),
        TOKEN.into(),
        format!("Bearer {TOKEN}x"),
        format!("Bearer {}", &TOKEN[1..]),
    ] {
        let answer = server.ask("POST", PAUSE, &[&format!("Authorization: {value}")], ALL).await;
        answer.expect(401, "token-refused");
        assert!(!answer.body.contains(TOKEN));
    }
    let twice = format!("Authorization: Bearer {TOKEN}");
    server.ask("POST", PAUSE, &[&twice, &twice], ALL).await.expect(401, "token-refused");
    assert!(server.fleet.state.lock().unwrap().asked.is_empty());

    for scheme in ["Bearer", "bearer"] {
        let header = format!("Authorization: {scheme} {TOKEN}");
        server.ask("POST", PAUSE, &[&header], ALL).await.expect_ok();
    }
    assert_eq!(server.fleet.state.lock().unwrap().asked, ["pause All", "pause All"]);
}

#[tokio::test]
async fn without_a_configured_token_nobody_acts() {
    let server = Server::start_with("127.0.0.1:0", None, Limits::default()).await;
    for headers in [&[][..], &[&*format!("Authorization: Bearer {TOKEN}")]] {
        let answer = server.ask("POST", PAUSE, headers, ALL).await;
        answer.expect(403, "no-token-configured");
        assert!(answer.json()["error"]["hint"].as_str().unwrap().contains("token_file"));
    }
    server.get("/v1/fleet").await.expect_ok();
}

#[tokio::test]
async fn beyond_loopback_everything_but_healthz_needs_the_token() {
    let server = Server::start_with("0.0.0.0:0", Some(TOKEN), Limits::default()).await;
    for path in ["/v1", "/v1/fleet", "/v1/events/stream", "/metrics", "/nowhere"] {
        server.get(path).await.expect(401, "token-missing");
    }
    assert_eq!(server.get("/healthz").await.status, 200);
    server.act("GET", "/v1/fleet", "").await.expect_ok();
    // Known by the token, and so by any name.
    let header = format!("Authorization: Bearer {TOKEN}");
    server.ask("GET", "/v1/fleet", &["Host: poolshift.example", &header], "").await.expect_ok();

    let server = Server::start_with("0.0.0.0:0", None, Limits::default()).await;
    server.get("/v1/fleet").await.expect(403, "no-token-configured");
    assert_eq!(server.get("/healthz").await.status, 200);
}

#[tokio::test]
async fn a_rebound_name_reads_nothing() {
    let server = Server::start().await;
    for host in ["evil.example", "evil.example:80", "localhost.evil.example", "10.0.0.1"] {
        for path in ["/v1/fleet", "/metrics", "/v1/events/stream"] {
            server.ask("GET", path, &[&format!("Host: {host}")], "").await.expect(403, "foreign-host");
        }
    }
    server.raw("GET /v1/fleet HTTP/1.0\r\n\r\n").await.expect(403, "foreign-host");
    let twice = ["Host: localhost", "Host: evil.example"];
    assert!([400, 403].contains(&server.ask("GET", "/v1/fleet", &twice, "").await.status));
    for host in ["localhost", "localhost:9000", "127.0.0.1", "[::1]:9000"] {
        server.ask("GET", "/v1/fleet", &[&format!("Host: {host}")], "").await.expect_ok();
    }
    assert_eq!(server.ask("GET", "/healthz", &["Host: evil.example"], "").await.status, 200);
    let header = format!("Authorization: Bearer {TOKEN}");
    server.ask("GET", "/v1/fleet", &["Host: proxy.example", &header], "").await.expect_ok();
    // A wrong token is not as good as none.
    server.ask("GET", "/v1/fleet", &["Authorization: Bearer nonsense"], "").await.expect(401, "token-refused");
}

#[tokio::test]
async fn no_answer_is_cached_or_shared_across_origins() {
    let server = Server::start().await;
    for (method, path) in
        [("GET", "/v1/fleet"), ("GET", "/nowhere"), ("POST", PAUSE), ("PUT", "/v1"), ("GET", "/healthz")]
    {
        let answer = server.ask(method, path, &["Origin: http://evil.example"], "").await;
        assert_eq!(answer.header("cache-control"), Some("no-store"), "{answer:?}");
        assert!(answer.headers.iter().all(|(name, _)| !name.starts_with("access-control")), "{answer:?}");
    }
}
