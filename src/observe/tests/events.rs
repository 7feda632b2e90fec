//! Events, asked for and followed.

use super::*;
use tokio::io::{AsyncBufReadExt as _, BufReader};

/// A follower of the stream.
struct Follower {
    lines: tokio::io::Lines<BufReader<TcpStream>>,
}

/// A message as it is on the wire.
#[derive(Debug, Default, PartialEq)]
struct Message {
    id: Option<u64>,
    event: Option<String>,
    data: serde_json::Value,
}

impl Follower {
    async fn open(server: &Server, last: Option<&str>) -> Self {
        let mut stream = server.connect().await;
        let last = last.map_or_else(String::new, |id| format!("Last-Event-ID: {id}\r\n"));
        let request = format!("GET /v1/events/stream HTTP/1.1\r\nHost: localhost\r\n{last}\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut follower = Self { lines: BufReader::new(stream).lines() };
        let mut head = Vec::new();
        loop {
            match follower.line().await.expect("headers") {
                line if line.is_empty() => break,
                line => head.push(line),
            }
        }
        assert_eq!(head[0], "HTTP/1.1 200 OK");
        assert!(head.contains(&"content-type: text/event-stream".to_owned()), "{head:?}");
        follower
    }

    async fn line(&mut self) -> Option<String> {
        tokio::time::timeout(FOREVER, self.lines.next_line()).await.expect("a line").unwrap()
    }

    /// The next message, whatever comments and lengths of chunks lie between; `None` at the end.
    async fn next(&mut self) -> Option<Message> {
        let mut message = Message::default();
        let mut any = false;
        loop {
            let line = self.line().await?;
            match line.split_once(": ") {
                Some(("id", id)) => message.id = Some(id.parse().unwrap()),
                Some(("event", name)) => message.event = Some(name.into()),
                Some(("data", data)) => (message.data, any) = (serde_json::from_str(data).unwrap(), true),
                _ if line.is_empty() && any => return Some(message),
                _ => {}
            }
        }
    }

    async fn ids(&mut self, count: usize) -> Vec<u64> {
        let mut ids = Vec::new();
        for _ in 0..count {
            let message = self.next().await.expect("a message");
            assert_eq!((message.event, message.data["id"].as_u64()), (None, message.id));
            ids.push(message.id.unwrap());
        }
        ids
    }
}

#[tokio::test]
async fn recent_events_are_those_after_an_id() {
    let server = Server::start().await;
    assert_eq!(server.get("/v1/events").await.expect_ok(), serde_json::json!([]));
    for _ in 0..5 {
        server.fleet.happen();
    }
    let ids = async |path: &str| -> Vec<u64> {
        let events = server.get(path).await.expect_ok();
        events.as_array().unwrap().iter().map(|event| event["id"].as_u64().unwrap()).collect()
    };
    assert_eq!(ids("/v1/events").await, [1, 2, 3, 4, 5]);
    assert_eq!(ids("/v1/events?since=3").await, [4, 5]);
    assert_eq!(ids("/v1/events?since=5").await, [0; 0]);
    // Of another process.
    assert_eq!(ids("/v1/events?since=900").await, [1, 2, 3, 4, 5]);
}

#[tokio::test]
async fn a_follower_gets_what_happens_from_now_on() {
    let server = Server::start().await;
    server.fleet.happen();
    let mut follower = Follower::open(&server, None).await;
    server.fleet.happen();
    let message = follower.next().await.unwrap();
    assert_eq!((message.id, &message.data["message"]), (Some(2), &"event 2\nwith a second line".into()));
    server.fleet.happen();
    assert_eq!(follower.ids(1).await, [3]);
}

#[tokio::test]
async fn a_follower_that_comes_back_misses_nothing_and_gets_nothing_twice() {
    let server = Server::start().await;
    for _ in 0..20 {
        server.fleet.happen();
    }
    let fleet = server.fleet.clone();
    // Things go on happening while it connects.
    let happening = tokio::spawn(async move {
        for _ in 0..200 {
            fleet.happen();
            tokio::task::yield_now().await;
        }
    });
    let mut follower = Follower::open(&server, Some("7")).await;
    assert_eq!(follower.ids(213).await, (8..=220).collect::<Vec<u64>>());
    happening.await.unwrap();
    let mut up_to_date = Follower::open(&server, Some("220")).await;
    server.fleet.happen();
    assert_eq!(up_to_date.ids(1).await, [221]);
}

#[tokio::test]
async fn what_the_fleet_has_forgotten_is_told() {
    let server = Server::start().await;
    server.fleet.state.lock().unwrap().keep = 3;
    for _ in 0..10 {
        server.fleet.happen();
    }
    let mut follower = Follower::open(&server, Some("2")).await;
    let lagged = follower.next().await.unwrap();
    assert_eq!((lagged.id, lagged.event.as_deref(), &lagged.data["missed"]), (None, Some("lagged"), &5.into()));
    assert_eq!(follower.ids(3).await, [8, 9, 10]);
}

#[tokio::test]
async fn a_slow_receiver_catches_up_or_is_told_what_it_missed() {
    use crate::observe::http::Following;
    let server = Server::start().await;
    let fleet = server.fleet.clone();
    fleet.happen();
    let mut following = Following::new(fleet.clone(), Some(1), CancellationToken::new());
    // More than the receiver holds, and the fleet still has them all.
    for _ in 0..3 * fleet::RECEIVER_EVENTS {
        fleet.happen();
    }
    for id in 2..=13 {
        assert_eq!(following.next_id().await, Ok(Some(id)));
    }
    // And now the fleet forgets as well.
    fleet.state.lock().unwrap().keep = 6;
    for _ in 0..20 {
        fleet.happen();
    }
    assert_eq!(following.next_id().await, Err(Some(14)));
    for id in 28..=33 {
        assert_eq!(following.next_id().await, Ok(Some(id)));
    }
    // Who has got nothing yet only knows what its receiver says.
    let mut following = Following::new(fleet.clone(), None, CancellationToken::new());
    for _ in 0..fleet::RECEIVER_EVENTS + 5 {
        fleet.happen();
    }
    assert_eq!(following.next_id().await, Err(Some(5)));
    assert_eq!(following.next_id().await, Ok(Some(39)));
}

#[tokio::test]
async fn an_id_of_another_process_replays_all_of_this_one() {
    let server = Server::start().await;
    let mut early = Follower::open(&server, Some("500")).await;
    assert_eq!(early.next().await.unwrap().data["missed"], serde_json::Value::Null);
    server.fleet.happen();
    server.fleet.happen();
    assert_eq!(early.ids(2).await, [1, 2]);
    let mut late = Follower::open(&server, Some("500")).await;
    assert_eq!(late.next().await.unwrap().event.as_deref(), Some("lagged"));
    assert_eq!(late.ids(2).await, [1, 2]);
    let bad = server.ask("GET", "/v1/events/stream", &["Last-Event-ID: x"], "").await;
    bad.expect(400, "bad-event-id");
}

#[tokio::test]
async fn a_stream_says_that_it_is_alive_and_ends_with_the_server() {
    let mut server = Server::start_within(Limits { keep_alive: Duration::from_millis(20), ..Limits::default() }).await;
    let mut follower = Follower::open(&server, None).await;
    while !follower.line().await.expect("a comment").starts_with(':') {}
    let mut idle = server.connect().await;
    idle.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"ok\n") {
        answer.push(idle.read_u8().await.unwrap());
    }
    server.cancel.cancel();
    assert_eq!(follower.next().await, None);
    assert_eq!(idle.read(&mut [0; 1]).await.unwrap(), 0);
    tokio::time::timeout(FOREVER, &mut server.task).await.expect("ends").unwrap().unwrap();
    assert!(TcpStream::connect(server.address).await.is_err(), "nothing listens any more");
}
