//! What is read: JSON, metrics, health.

use std::collections::{HashMap, HashSet};

use super::*;

#[tokio::test]
async fn everything_of_a_fleet_can_be_read() {
    let server = Server::start().await;
    let fleet = server.get("/v1/fleet").await.expect_ok();
    assert_eq!(fleet, serde_json::to_value(fleet::status()).unwrap());
    let servers = server.get("/v1/servers").await.expect_ok();
    assert_eq!((&servers[1]["name"], &servers[1]["volumes"]), (&"db-1".into(), &2.into()));
    assert_eq!(server.get("/v1/servers/db-1").await.expect_ok(), fleet["servers"][1]);
    let escaped = server.get("/v1/servers/mail%20%22x%22%5C1").await.expect_ok();
    assert_eq!(escaped["activity"], "held");
    let mut volume = server.get("/v1/volumes/db-1-data").await.expect_ok();
    assert_eq!(volume.as_object_mut().unwrap().remove("server"), Some("db-1".into()));
    assert_eq!(volume, fleet["servers"][1]["volumes"][1]);
    assert_eq!(server.get("/v1/servers/web-1/history").await.expect_ok().as_array().unwrap().len(), 2);
    server.get("/v1/servers/none").await.expect(404, "unknown-server");
    server.get("/v1/servers/none/history").await.expect(404, "unknown-server");
    server.get("/v1/volumes/db-1").await.expect(404, "unknown-volume");
}

#[tokio::test]
async fn the_index_names_every_path_of_the_documentation() {
    let server = Server::start().await;
    let index = server.get("/v1").await;
    assert_eq!(index.status, 200);
    let documented =
        include_str!("../http.rs").lines().filter_map(|line| line.strip_prefix("//! | `")?.split('`').next());
    let mut count = 0;
    for line in documented.filter(|line| line.contains('/') && *line != "GET /v1") {
        let (method, path) = line.split_once(' ').unwrap();
        assert!(index.body.contains(&format!("{method:<6} {path} ")), "the index lacks {line}");
        count += 1;
    }
    assert_eq!(count, 14);
}

#[tokio::test]
async fn paths_and_methods_that_are_none_are_told_as_json() {
    let server = Server::start().await;
    for path in ["/", "/v2/fleet", "/v1/", "/v1/fleet/x", "/v1/servers/", "/V1/fleet"] {
        server.get(path).await.expect(404, "unknown-path");
    }
    for (method, path, allow) in [
        ("POST", "/v1/fleet", "GET,HEAD"),
        ("GET", "/v1/actions/pause", "POST"),
        ("GET", "/v1/throttles/sata", "PUT,DELETE"),
        ("OPTIONS", "/v1/fleet", "GET,HEAD"),
        ("BREW", "/metrics", "GET,HEAD"),
    ] {
        let answer = server.ask(method, path, &[], "").await;
        answer.expect(405, "wrong-method");
        assert_eq!(answer.header("allow"), Some(allow), "{method} {path}");
    }
    assert_eq!(server.ask("HEAD", "/v1/fleet", &[], "").await.status, 200);
    server.get("/v1/events?since=x").await.expect(400, "bad-query");
    server.get("/v1/events?after=1").await.expect(400, "bad-query");
    server.get("/v1/servers/%ff").await.expect(400, "bad-path");
}

#[tokio::test]
async fn health_is_the_heartbeat() {
    let server = Server::start().await;
    let answer = server.get("/healthz").await;
    assert_eq!((answer.status, answer.body.as_str()), (200, "ok\n"));
    for age in [60.1, f64::INFINITY, f64::NAN] {
        server.fleet.state.lock().unwrap().heartbeat_age_seconds = age;
        server.get("/healthz").await.expect(503, "stale");
    }
    server.fleet.state.lock().unwrap().heartbeat_age_seconds = 60.0;
    assert_eq!(server.get("/healthz").await.status, 200);
}

/// One sample: its name, its labels, its value.
type Sample = (String, Vec<(String, String)>, f64);

/// Reads OpenMetrics' text strictly: every line is a description or a sample of the family that was described last.
fn parse(text: &str) -> (HashMap<String, String>, Vec<Sample>) {
    let mut kinds = HashMap::new();
    let (mut helped, mut family, mut samples) = (HashSet::new(), String::new(), Vec::new());
    let body = text.strip_suffix("# EOF\n").expect("ends with # EOF");
    for line in body.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').unwrap_or_else(|| panic!("{line}"));
            assert!(helped.insert(name.to_owned()) && !help.is_empty(), "{line}");
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap_or_else(|| panic!("{line}"));
            assert!(helped.contains(name) && ["gauge", "counter", "info"].contains(&kind), "{line}");
            assert!(kinds.insert(name.to_owned(), kind.to_owned()).is_none(), "described twice: {line}");
            family = name.to_owned();
        } else {
            let sample = parse_sample(line);
            let suffix = match kinds[&family].as_str() {
                "counter" => "_total",
                "info" => "_info",
                _ => "",
            };
            assert_eq!(sample.0, format!("{family}{suffix}"), "{line}");
            samples.push(sample);
        }
    }
    (kinds, samples)
}

fn parse_sample(line: &str) -> Sample {
    let end = line.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap();
    let (name, mut rest) = line.split_at(end);
    assert!(name.starts_with("poolshift_"), "{line}");
    let mut labels = Vec::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        while !rest.starts_with('}') {
            let (label, after) = rest.split_once("=\"").unwrap_or_else(|| panic!("{line}"));
            assert!(label.chars().all(|c| c.is_ascii_lowercase() || c == '_'), "{line}");
            let mut value = String::new();
            let mut chars = after.char_indices();
            let end = loop {
                match chars.next().unwrap_or_else(|| panic!("{line}")) {
                    (at, '"') => break at,
                    (_, '\\') => match chars.next().unwrap().1 {
                        'n' => value.push('\n'),
                        c @ ('"' | '\\') => value.push(c),
                        c => panic!("\\{c}: {line}"),
                    },
                    (_, c) => value.push(c),
                }
            };
            labels.push((label.to_owned(), value));
            rest = &after[end + 1..];
            rest = rest.strip_prefix(',').unwrap_or(rest);
        }
        rest = &rest[1..];
    }
    let value = rest.strip_prefix(' ').unwrap_or_else(|| panic!("{line}")).parse().unwrap_or_else(|_| panic!("{line}"));
    (name.to_owned(), labels, value)
}

fn value(samples: &[Sample], name: &str, labels: &[(&str, &str)]) -> Option<f64> {
    let wanted: Vec<_> = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    samples.iter().find(|sample| sample.0 == name && sample.1 == wanted).map(|sample| sample.2)
}

#[tokio::test]
async fn metrics_are_well_formed_and_say_what_the_status_says() {
    let server = Server::start().await;
    server.fleet.state.lock().unwrap().status.servers[0].volumes[0].change_rate = Some(f64::NAN);
    let answer = server.get("/metrics").await;
    assert!(answer.header("content-type").unwrap().starts_with("application/openmetrics-text; version=1.0.0"));
    let (kinds, samples) = parse(&answer.body);
    assert!(kinds.len() > 25, "{kinds:?}");
    for (name, labels, expected) in [
        ("poolshift_server_lag_seconds", &[("server", "web-1")][..], Some(42.0)),
        ("poolshift_server_lag_seconds", &[("server", "mail \"x\"\\1")], Some(200_000.0)),
        ("poolshift_server_predicted_outage_seconds", &[("server", "mail \"x\"\\1")], None),
        ("poolshift_server_converging", &[("server", "mail \"x\"\\1")], Some(0.0)),
        ("poolshift_server_converging", &[("server", "db-1")], Some(1.0)),
        ("poolshift_server_failures", &[("server", "mail \"x\"\\1")], Some(3.0)),
        ("poolshift_server_activity", &[("server", "db-1"), ("state", "syncing")], Some(1.0)),
        ("poolshift_server_activity", &[("server", "db-1"), ("state", "held")], Some(0.0)),
        ("poolshift_volume_cycle_done_bytes", &[("server", "db-1"), ("volume", "db-1-data")], Some(1_073_741_824.0)),
        ("poolshift_volume_change_rate_bytes_per_second", &[("server", "web-1"), ("volume", "web-1")], None),
        ("poolshift_throttle_limit_bytes_per_second", &[("pool", "sata")], Some(104_857_600.0)),
        ("poolshift_throttle_limit_operations_per_second", &[("pool", "sata")], None),
        ("poolshift_throttle_latency_seconds", &[("pool", "sata")], Some(0.012)),
        ("poolshift_worker_cycles_completed_total", &[], Some(1200.0)),
        ("poolshift_worker_resident_memory_bytes", &[], Some(188_743_680.0)),
        ("poolshift_worker_start_time_seconds", &[], Some(1_767_225_600.0)),
        ("poolshift_build_info", &[("version", env!("CARGO_PKG_VERSION"))], Some(1.0)),
    ] {
        assert_eq!(value(&samples, name, labels), expected, "{name} {labels:?}\n{}", answer.body);
    }
    let states: Vec<_> = samples.iter().filter(|s| s.0 == "poolshift_server_activity").collect();
    assert_eq!((states.len(), states.iter().map(|s| s.2).sum::<f64>()), (27, 3.0));
}

#[test]
fn the_metrics_name_activities_as_the_json_does() {
    let text = crate::observe::metrics::encode(fleet::status(), 0.0).unwrap();
    for activity in [crate::fleet::status::Activity::BackingOff, crate::fleet::status::Activity::NeverSynced] {
        let name = serde_json::to_value(activity).unwrap();
        assert!(text.contains(&format!("state={name}")), "{name}");
    }
}
