//! Clients that are slow, loud or many.

use super::*;

fn impatient() -> Limits {
    Limits { patience: Duration::from_millis(100), ..Limits::default() }
}

#[tokio::test]
async fn a_body_over_the_limit_is_refused() {
    let server = Server::start().await;
    let auth = format!("Authorization: Bearer {TOKEN}");
    let within = format!("{{\"name\":\"{}\"}}", "x".repeat(16_000));
    server.act("POST", "/v1/actions/pause", &within).await.expect(404, "unknown-name");
    let over = format!("{{\"name\":\"{}\"}}", "x".repeat(16 << 10));
    server.act("POST", "/v1/actions/pause", &over).await.expect(413, "body-too-large");
    // Announced is enough.
    let announced = format!(
        "POST /v1/actions/pause HTTP/1.1\r\nHost: localhost\r\n{auth}\r\nContent-Length: 1000000000000\r\n\r\n"
    );
    server.raw(&announced).await.expect(413, "body-too-large");
    // Not announced, in chunks.
    let chunk = format!("1000\r\n{}\r\n", "x".repeat(0x1000));
    let chunked = format!(
        "POST /v1/actions/pause HTTP/1.1\r\nHost: localhost\r\n{auth}\r\nTransfer-Encoding: chunked\r\n\r\n{}",
        chunk.repeat(5)
    );
    server.raw(&chunked).await.expect(413, "body-too-large");
    assert_eq!(server.fleet.state.lock().unwrap().asked.len(), 1);
}

#[tokio::test]
async fn a_client_that_sends_half_a_header_is_cut_off() {
    let server = Server::start_within(impatient()).await;
    for start in ["", "GET /v1/fleet HTTP/1.1\r\nHost: local"] {
        let mut stream = server.connect().await;
        stream.write_all(start.as_bytes()).await.unwrap();
        let mut rest = Vec::new();
        tokio::time::timeout(FOREVER, stream.read_to_end(&mut rest)).await.expect("cut off").unwrap();
    }
    // One that idles between two requests as well.
    let mut stream = server.connect().await;
    stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    assert_eq!(Answer::read(&mut stream).await.status, 200);
}

#[tokio::test]
async fn a_client_that_sends_half_a_body_is_told_and_cut_off() {
    let server = Server::start_within(impatient()).await;
    let half = format!(
        "POST /v1/actions/pause HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n\
         Content-Length: 15\r\n\r\n{{\"scope\""
    );
    server.raw(&half).await.expect(408, "body-too-slow");
}

#[tokio::test]
async fn a_client_that_takes_no_answer_is_cut_off() {
    let server = Server::start_within(Limits { connections: 1, ..impatient() }).await;
    // More than the kernel's buffers hold, so that the server is left with the rest.
    server.fleet.state.lock().unwrap().status.plan = "x".repeat(32 << 20);
    let mut stream = server.connect().await;
    stream.write_all(b"GET /v1/fleet HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    stream.read_exact(&mut [0; 12]).await.unwrap();
    // What the kernel has taken is still in its buffers; that the place is free shows that the server has gone.
    let served = async { while server.get("/healthz").await.status != 200 {} };
    tokio::time::timeout(FOREVER, served).await.expect("a place is free");
    drop(stream);
}

#[tokio::test]
async fn one_connection_too_many_is_told_so() {
    let server = Server::start_within(Limits { connections: 2, ..Limits::default() }).await;
    let mut first = server.connect().await;
    let mut second = server.connect().await;
    // Both are served before the third comes.
    for stream in [&mut first, &mut second] {
        stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
        stream.read_exact(&mut [0; 12]).await.unwrap();
    }
    let refused = server.get("/healthz").await;
    refused.expect(503, "too-many-connections");
    assert_eq!(refused.header("connection"), Some("close"));
    drop(first);
    // Its place is free as soon as the server has seen it go.
    let served = async { while server.get("/healthz").await.status != 200 {} };
    tokio::time::timeout(FOREVER, served).await.expect("a place is free");
}

#[tokio::test]
async fn one_stream_too_many_is_told_so() {
    let server = Server::start_within(Limits { streams: 2, ..Limits::default() }).await;
    let open = b"GET /v1/events/stream HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let mut streams = Vec::new();
    for _ in 0..2 {
        let mut stream = server.connect().await;
        stream.write_all(open).await.unwrap();
        stream.read_exact(&mut [0; 12]).await.unwrap();
        streams.push(stream);
    }
    server.get("/v1/events/stream").await.expect(503, "too-many-streams");
    server.get("/v1/fleet").await.expect_ok();
    streams.pop();
    let free = async {
        while server.fleet.followers() > 1 {
            tokio::task::yield_now().await
        }
    };
    tokio::time::timeout(FOREVER, free).await.expect("its place is free");
    let mut stream = server.connect().await;
    stream.write_all(open).await.unwrap();
    let mut status = [0; 12];
    stream.read_exact(&mut status).await.unwrap();
    assert_eq!(&status, b"HTTP/1.1 200");
}

#[tokio::test]
async fn headers_over_the_limit_are_refused() {
    let server = Server::start().await;
    let long = format!("GET /v1 HTTP/1.1\r\nHost: localhost\r\nX: {}", "x".repeat(64 << 10));
    let mut stream = server.connect().await;
    // The server may hang up before all of it is written.
    let _ = stream.write_all(long.as_bytes()).await;
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(FOREVER, stream.read_to_end(&mut answer)).await.expect("hangs up");
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 431"), "{}", String::from_utf8_lossy(&answer));
}
