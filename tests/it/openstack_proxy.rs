//! A cloud that fails: a proxy in front of its services has one call fail, and the cutover that has made it ends over, or
//! back, or is brought to an end by the next command.
//!
//! All calls of all kinds of holders, with all troubles, take hours. They are tried with `POOLSHIFT_TEST_EVERY_STEP=1`,
//! and otherwise some of them with a gateway, one on the way back.

use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use rustix::process::{Pid, Signal, kill_process};

use crate::cutover_bed::Running;
use crate::openstack_bed::CloudBed;
use crate::openstack_world::{OpenStackEnv, host, openstack};
use crate::support::{Run, every_step};

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    /// It is answered with that status, and not passed on.
    Refused(u16),
    /// It is not answered, and not passed on.
    Lost,
    /// It is passed on, and not answered.
    Unanswered,
    /// It is said to be accepted, and not passed on.
    Pretended,
    /// The same, with every further call like it.
    AlwaysPretended,
    /// Its token is not accepted any more, there or later.
    TokenRevoked,
    /// It is passed on, and who has made it is killed.
    Killed,
}

const ALL: [Trouble; 9] = [
    Trouble::Refused(500),
    Trouble::Refused(409),
    Trouble::Refused(429),
    Trouble::Lost,
    Trouble::Unanswered,
    Trouble::Pretended,
    Trouble::AlwaysPretended,
    Trouble::TokenRevoked,
    Trouble::Killed,
];

/// What the proxy is to do, and what it has done.
#[derive(Default)]
struct Script {
    /// Which call that changes something has trouble, the first one being 1.
    call: usize,
    trouble: Option<Trouble>,
    /// The calls that were to change something, with what they said.
    calls: Vec<String>,
    revoked: Option<String>,
    /// The process that is at it.
    caller: Option<u32>,
}

/// A way to the cloud's services.
struct Proxy {
    address: String,
    project: String,
    script: Arc<Mutex<Script>>,
    _runtime: tokio::runtime::Runtime,
}

fn lock(script: &Mutex<Script>) -> MutexGuard<'_, Script> {
    script.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Proxy {
    fn start(env: &OpenStackEnv) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).expect("a free port");
        let address = format!("http://{}", listener.local_addr().expect("it has an address"));
        let script = Arc::<Mutex<Script>>::default();
        let (shared, http) = (Arc::clone(&script), reqwest::Client::new());
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (shared, http) = (Arc::clone(&shared), http.clone());
                let service = hyper::service::service_fn(move |request| {
                    let (shared, http) = (Arc::clone(&shared), http.clone());
                    async move { answer(request, &shared, &http).await }
                });
                let connection = hyper::server::conn::http1::Builder::new();
                // One that is cut is no error here.
                tokio::spawn(async move { connection.serve_connection(TokioIo::new(stream), service).await });
            }
        });
        Self { address, project: env.project(), script, _runtime: runtime }
    }

    /// Has `poolshift` reach the cloud through it.
    fn lead(&self, command: &mut Command) {
        let below = |path: &str| format!("{}/{path}", self.address);
        command.env("OS_AUTH_URL", below("identity/v3"));
        command.env("OS_BLOCK_STORAGE_ENDPOINT_OVERRIDE", below(&format!("volume/v3/{}", self.project)));
        command.env("OS_COMPUTE_ENDPOINT_OVERRIDE", below("compute/v2.1"));
    }

    /// Has a call fail.
    fn fail(&self, call: usize, trouble: Trouble) {
        *lock(&self.script) = Script { call, trouble: Some(trouble), ..Script::default() };
    }
}

/// The address that a path below the proxy stands for.
fn real(path: &str) -> Option<String> {
    let auth_url = std::env::var("OS_AUTH_URL").ok()?;
    let (service, rest) = path.strip_prefix('/')?.split_once('/')?;
    let port = match service {
        "identity" => 5000,
        "volume" => 8776,
        "compute" => 8774,
        _ => return None,
    };
    Some(format!("{}:{port}/{rest}", host(&auth_url)))
}

type Answer = Response<Full<Bytes>>;

/// A call that is not to be answered.
#[derive(Debug, thiserror::Error)]
#[error("the connection is cut")]
struct Cut;

fn plain(status: u16, body: &'static str) -> Answer {
    let answer = Response::builder().status(status).header("Content-Type", "application/json");
    answer.header("Retry-After", "1").body(Full::from(body)).expect("an answer")
}

async fn answer(request: Request<Incoming>, script: &Mutex<Script>, http: &reqwest::Client) -> Result<Answer, Cut> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.map_err(|_| Cut)?.to_bytes();
    let path = head.uri.path_and_query().map(ToString::to_string).unwrap_or_default();
    let token = head.headers.get("X-Auth-Token").and_then(|token| token.to_str().ok()).map(str::to_owned);
    let changes = head.method != "GET" && !path.starts_with("/identity/");
    let call = format!("{} {path} {}", head.method, String::from_utf8_lossy(&body));
    let trouble = {
        let mut script = lock(script);
        if changes {
            script.calls.push(call.clone());
        }
        let chosen = script.calls.get(script.call.wrapping_sub(1)) == Some(&call);
        let once = script.calls.len() == script.call;
        if script.trouble == Some(Trouble::TokenRevoked) && changes && once {
            script.revoked.clone_from(&token);
        }
        if token.is_some() && token == script.revoked {
            return Ok(plain(401, r#"{"error": {"code": 401, "message": "this token was revoked"}}"#));
        }
        let always = script.trouble == Some(Trouble::AlwaysPretended);
        script.trouble.filter(|_| changes && chosen && (once || always))
    };
    match trouble {
        Some(Trouble::Refused(status)) => {
            return Ok(plain(status, r#"{"computeFault": {"message": "this call was to fail"}}"#));
        }
        Some(Trouble::Lost) => return Err(Cut),
        Some(Trouble::Pretended | Trouble::AlwaysPretended) => return Ok(plain(202, "{}")),
        _ => {}
    }
    let url = real(&path).ok_or(Cut)?;
    let mut passed_on = http.request(head.method, url).body(body);
    for (name, value) in &head.headers {
        if !["host", "content-length", "connection", "transfer-encoding"].contains(&name.as_str()) {
            passed_on = passed_on.header(name, value);
        }
    }
    let answered = passed_on.send().await.map_err(|_| Cut)?;
    let mut answer = Response::builder().status(answered.status());
    for (name, value) in answered.headers() {
        if !["content-length", "connection", "transfer-encoding"].contains(&name.as_str()) {
            answer = answer.header(name, value);
        }
    }
    let body = answered.bytes().await.map_err(|_| Cut)?;
    match trouble {
        Some(Trouble::Unanswered) => Err(Cut),
        Some(Trouble::Killed) => {
            let caller = lock(script).caller.and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
            kill_process(caller.ok_or(Cut)?, Signal::KILL).map_err(|_| Cut)?;
            Err(Cut)
        }
        _ => Ok(answer.body(Full::from(body)).unwrap_or_else(|error| panic!("{error}"))),
    }
}

/// Runs a command of which a call has trouble; the call is `None` where it needs fewer.
fn with_trouble_on_the_way(
    bed: &CloudBed<'_>,
    proxy: &Proxy,
    command: &str,
    words: &[&str],
    (call, trouble): (usize, Trouble),
) -> (Option<String>, Run) {
    proxy.fail(call, trouble);
    let words: Vec<&str> = words.iter().copied().chain(["--yes", "--json"]).collect();
    let mut told = bed.command(0, command, &words);
    proxy.lead(&mut told);
    let begun = Instant::now();
    let run = Running::start(told);
    lock(&proxy.script).caller = Some(run.id());
    let run = run.finish();
    let failed = lock(&proxy.script).calls.get(call - 1).cloned();
    println!("{command}, call {call}, {trouble:?}: {:?} in {:?}: {failed:?}\n{run:?}", run.code, begun.elapsed());
    (failed, run)
}

/// One cutover of which a call has trouble, and back; `None` where it needs fewer calls.
fn with_trouble(
    bed: &CloudBed<'_>,
    proxy: &Proxy,
    (call, trouble): (usize, Trouble),
    undo: bool,
) -> Option<&'static str> {
    let (failed, run) = with_trouble_on_the_way(bed, proxy, "cutover", &[], (call, trouble));
    if failed.is_none() {
        run.expect_code(0);
        bed.expect_well(0, "target");
        bed.bring_back(0);
        return None;
    }
    let ended = bed.brought_to_an_end(0, run.code, undo);
    bed.bring_back(0);
    println!("it is {ended}");
    Some(ended)
}

/// What may come of it. What is lost on the way is asked for once more.
#[track_caller]
fn expect_end(call: usize, trouble: Trouble, end: &str) {
    let allowed: &[&str] = match trouble {
        Trouble::AlwaysPretended => &["back", "finished", "undone"],
        Trouble::Killed => &["finished", "undone", "refused"],
        _ => &["over"],
    };
    assert!(allowed.contains(&end), "call {call}, {trouble:?}: {end}");
}

fn every_call_with_every_trouble(bed: &CloudBed<'_>, proxy: &Proxy) {
    let mut undo = false;
    for trouble in ALL {
        for call in 1.. {
            undo = !undo;
            let Some(end) = with_trouble(bed, proxy, (call, trouble), undo) else { break };
            expect_end(call, trouble, end);
        }
    }
}

#[test]
fn a_call_of_a_cloud_that_fails_anywhere_loses_nothing() {
    let Some(env) = openstack() else { return };
    let proxy = Proxy::start(&env);
    let mut bed = CloudBed::gateway(&env, 1, "");
    bed.note_contents(0);
    bed.replicate();
    if every_step() {
        every_call_with_every_trouble(&bed, &proxy);
        return;
    }
    // The calls are: two detach, two retype, two attach; on the way back, too.
    let over = |call, trouble| {
        let (_, run) = with_trouble_on_the_way(&bed, &proxy, "cutover", &[], (call, trouble));
        bed.brought_to_an_end(0, run.code, true)
    };
    let back = |call, trouble| {
        let (failed, run) = with_trouble_on_the_way(&bed, &proxy, "rollback", &["--with-changes"], (call, trouble));
        run.expect_code(0);
        assert!(failed.is_some(), "there are so many calls");
        bed.expect_well(0, "source");
    };
    assert_eq!(over(2, Trouble::Unanswered), "over");
    back(4, Trouble::TokenRevoked);
    assert_eq!(over(3, Trouble::AlwaysPretended), "back");
    assert_eq!(over(5, Trouble::Killed), "undone");
}

#[test]
fn a_call_for_a_server_or_for_volumes_that_fails_anywhere_loses_nothing() {
    if !every_step() {
        return;
    }
    let Some(env) = openstack() else { return };
    let proxy = Proxy::start(&env);
    {
        let mut bed = CloudBed::detached(&env, 1, "");
        bed.note_contents(0);
        bed.replicate();
        every_call_with_every_trouble(&bed, &proxy);
    }
    let mut bed = CloudBed::server(&env, "calls", "");
    bed.replicate();
    every_call_with_every_trouble(&bed, &proxy);
}
