//! A cloud that fails: a proxy in front of its services has one call fail, and the cutover that has made it ends over, or
//! back, or is brought to an end by the next command.
//!
//! All calls of all kinds of holders, with all troubles, take hours, or those with some troubles
//! (`POOLSHIFT_TEST_TROUBLES="Lost Refused(500)"`).

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use poolshift::openstack::sim::trouble::{OUTAGE, Trouble};
use rustix::process::{Pid, Signal, kill_process};

use crate::cutover_bed::Running;
use crate::openstack_bed::CloudBed;
use crate::openstack_env::{OpenStackEnv, host, openstack};
use crate::support::Run;

/// The two ways: the command, what it is told, and the side that the server is on then.
const OVER_AND_BACK: [(&str, &[&str], &str); 2] =
    [("cutover", &[], "target"), ("rollback", &["--with-changes"], "source")];

/// Those that are tried.
fn troubles() -> Vec<Trouble> {
    let some = std::env::var("POOLSHIFT_TEST_TROUBLES").unwrap_or_default();
    let is_wanted = |trouble: &Trouble| some.split_whitespace().any(|name| name == format!("{trouble:?}"));
    Trouble::ALL.into_iter().filter(|trouble| some.is_empty() || is_wanted(trouble)).collect()
}

/// What the proxy is to do, and what it has done.
#[derive(Default)]
struct Script {
    /// Which call that changes something has trouble, the first one being 1.
    call: usize,
    trouble: Option<Trouble>,
    /// The calls that were to change something, with what they said.
    calls: Vec<String>,
    /// The token that is not accepted any more.
    ended: Option<String>,
    /// Until when nobody is answered.
    outage: Option<Instant>,
    /// What becomes of each call that only reads, the first time.
    reads: Option<Trouble>,
    /// Those calls.
    read: BTreeSet<String>,
    /// What becomes of each call that changes something, the first time.
    each: Option<Trouble>,
    /// The process that is at it.
    caller: Option<u32>,
    /// What Nova lags behind with, if it is to.
    lag: Option<Lag>,
}

/// A Nova that goes on saying for a while that a server has a volume which Cinder has taken from it, and does not give
/// it to it again in that time; and a Cinder that has it reserved for somebody as soon as nobody has it.
#[derive(Default)]
struct Lag {
    /// The volumes that the server had before the first was taken from it.
    list: Bytes,
    taken: bool,
    /// How often it is still to be told.
    reads: usize,
    /// How often it was.
    told: usize,
    /// The requests for a volume that were refused once.
    refused: BTreeSet<String>,
    /// Until when volumes are reserved, and how often that was told; nothing before they were shown to be nobody's.
    reserved: BTreeMap<String, Option<(Instant, usize)>>,
    /// What was to be done with them in that time.
    hasty: Vec<String>,
}

impl Lag {
    const READS: usize = 3;
    /// Longer, by much, than it takes from a detach to where its images are given other names.
    const RESERVED: Duration = Duration::from_secs(5);

    fn is_list(call: &str) -> bool {
        call.starts_with("GET ") && call.trim_end().ends_with("/os-volume_attachments")
    }

    /// What is answered, if it is not to be passed on.
    fn answer(&mut self, call: &str) -> Option<Answer> {
        if Self::is_list(call) && self.reads > 0 {
            (self.reads, self.told) = (self.reads - 1, self.told + 1);
            return Some(json_answer(200, Full::from(self.list.clone())));
        }
        if call.starts_with("DELETE ")
            && let Some((_, volume)) = call.trim_end().split_once("/os-volume_attachments/")
        {
            (self.reads, self.taken) = (Self::READS, true);
            self.reserved.entry(volume.to_owned()).or_default();
        }
        let of_reserved = |(volume, until): (&String, &Option<(Instant, usize)>)| {
            call.contains(&format!("/volumes/{volume}/action "))
                && until.is_some_and(|(until, _)| Instant::now() < until)
        };
        if self.reserved.iter().any(of_reserved) {
            self.hasty.push(call.to_owned());
        }
        let give = call.starts_with("POST ") && call.contains("/os-volume_attachments ");
        if give && self.refused.insert(call.to_owned()) {
            // Nova has crossed it out when it is asked about the second.
            self.reads = usize::from(self.refused.len() == 1);
            let body = r#"{"badRequest": {"message": "Invalid volume: it is already attached", "code": 400}}"#;
            return Some(json_answer(400, Full::from(body)));
        }
        None
    }

    /// What is answered in the place of what the cloud has answered.
    fn passed_on(&mut self, call: &str, answer: Bytes) -> Bytes {
        if Self::is_list(call) && !self.taken {
            self.list = answer.clone();
        }
        let of_it = |(volume, _): &(&String, _)| call.trim_end().ends_with(&format!("/volumes/{volume}"));
        let Some((_, until)) = self.reserved.iter_mut().find(of_it).filter(|_| call.starts_with("GET ")) else {
            return answer;
        };
        let mut shown: serde_json::Value = serde_json::from_slice(&answer).expect("one JSON value");
        if shown["volume"]["status"] == "available" {
            let (until, told) = until.get_or_insert_with(|| (Instant::now() + Self::RESERVED, 0));
            if Instant::now() < *until {
                *told += 1;
                shown["volume"]["status"] = "reserved".into();
                return shown.to_string().into();
            }
        }
        answer
    }
}

/// What is to become of a call, or the status that it is answered with at once.
enum Fate {
    Trouble(Option<Trouble>),
    TokenEnded,
    Cut,
}

impl Script {
    /// Notes a call, and decides.
    fn decide(&mut self, call: &str, changes: bool, token: Option<&str>) -> Fate {
        if self.outage.is_some_and(|until| Instant::now() < until) {
            return Fate::Cut;
        }
        if !changes {
            // Whose password is not accepted is not asked for it again.
            let trouble = self.reads.filter(|trouble| *trouble != Trouble::TokenEnded || token.is_some());
            return match trouble.filter(|_| self.read.insert(call.to_owned())) {
                Some(Trouble::TokenEnded) => Fate::TokenEnded,
                trouble => Fate::Trouble(trouble),
            };
        }
        let is_first = !self.calls.iter().any(|known| known == call);
        self.calls.push(call.to_owned());
        if let Some(trouble) = self.each.filter(|_| is_first) {
            return if trouble == Trouble::TokenEnded { Fate::TokenEnded } else { Fate::Trouble(Some(trouble)) };
        }
        let chosen = self.calls.get(self.call.wrapping_sub(1)).is_some_and(|chosen| chosen == call);
        let first = chosen && self.calls.len() == self.call;
        match self.trouble {
            Some(Trouble::TokenEnded) if first => self.ended = token.map(str::to_owned),
            Some(Trouble::Outage) if first => {
                self.outage = Some(Instant::now() + OUTAGE);
                return Fate::Cut;
            }
            _ => {}
        }
        let always = chosen && self.trouble == Some(Trouble::AlwaysPretended);
        Fate::Trouble(self.trouble.filter(|_| first || always))
    }
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

    /// Has `poolshift` do it by way of this.
    fn run(&self, bed: &CloudBed<'_>, command: &str, words: &[&str]) -> Run {
        let words: Vec<&str> = words.iter().copied().chain(["--yes", "--json"]).collect();
        let mut told = bed.command(0, command, &words);
        self.lead(&mut told);
        let run = Running::start(told);
        lock(&self.script).caller = Some(run.id());
        run.finish()
    }

    /// Has each call that only reads fail once.
    fn fail_reads(&self, trouble: Trouble) {
        *lock(&self.script) = Script { reads: Some(trouble), ..Script::default() };
    }

    /// Has each call that changes something fail once.
    fn fail_each(&self, trouble: Trouble) {
        *lock(&self.script) = Script { each: Some(trouble), ..Script::default() };
    }

    /// Has Nova lag behind.
    fn lag(&self) {
        *lock(&self.script) = Script { lag: Some(Lag::default()), ..Script::default() };
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

fn json_answer(status: u16, body: Full<Bytes>) -> Answer {
    Response::builder().status(status).header("Content-Type", "application/json").body(body).expect("an answer")
}

fn plain(status: u16, body: &'static str, retry_after: bool) -> Answer {
    let mut answer = json_answer(status, Full::from(body));
    if retry_after {
        answer.headers_mut().insert("Retry-After", hyper::header::HeaderValue::from_static("1"));
    }
    answer
}

fn token_ended() -> Answer {
    plain(401, r#"{"error": {"code": 401, "message": "this token is not known"}}"#, false)
}

/// Revokes a token where it comes from.
async fn revoke(token: &str, http: &reqwest::Client) -> Result<(), Cut> {
    let url = real("/identity/v3/auth/tokens").ok_or(Cut)?;
    let revoked = http.delete(url).header("X-Auth-Token", token).header("X-Subject-Token", token).send().await;
    let status = revoked.map_err(|_| Cut)?.status();
    println!("its token is revoked: {status}");
    Ok(())
}

async fn answer(request: Request<Incoming>, script: &Mutex<Script>, http: &reqwest::Client) -> Result<Answer, Cut> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.map_err(|_| Cut)?.to_bytes();
    let path = head.uri.path_and_query().map(ToString::to_string).unwrap_or_default();
    let token = head.headers.get("X-Auth-Token").and_then(|token| token.to_str().ok()).map(str::to_owned);
    let changes = head.method != "GET" && !path.starts_with("/identity/");
    let told = if changes { String::from_utf8_lossy(&body).into_owned() } else { String::new() };
    let call = format!("{} {path} {told}", head.method);
    let trouble = {
        let mut script = lock(script);
        let fate = script.decide(&call, changes, token.as_deref());
        if token.is_some() && token == script.ended {
            return Ok(token_ended());
        }
        if let Some(answer) = script.lag.as_mut().and_then(|lag| lag.answer(&call)) {
            return Ok(answer);
        }
        match fate {
            Fate::Trouble(trouble) => trouble,
            Fate::TokenEnded => return Ok(token_ended()),
            Fate::Cut => return Err(Cut),
        }
    };
    let failed = r#"{"computeFault": {"message": "this call was to fail"}}"#;
    match trouble {
        Some(Trouble::Refused(status)) => return Ok(plain(status, failed, status == 429)),
        Some(Trouble::RefusedJustSo(status)) => return Ok(plain(status, failed, false)),
        Some(Trouble::Lost) => return Err(Cut),
        Some(Trouble::Pretended | Trouble::AlwaysPretended) => return Ok(plain(202, "{}", false)),
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
    let mut body = answered.bytes().await.map_err(|_| Cut)?;
    if let Some(lag) = lock(script).lag.as_mut() {
        body = lag.passed_on(&call, body);
    }
    if let (Some(Trouble::TokenRevoked), Some(token)) = (trouble, &token) {
        revoke(token, http).await?;
    }
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
    let begun = Instant::now();
    let run = proxy.run(bed, command, words);
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
        Trouble::AlwaysPretended => &["over", "back", "finished", "undone"],
        Trouble::Killed => &["finished", "undone", "refused"],
        Trouble::Outage => &["over", "back", "finished", "undone", "refused"],
        _ => &["over"],
    };
    assert!(allowed.contains(&end), "call {call}, {trouble:?}: {end}");
}

/// A cutover in which each call that changes something has the same trouble once, and the way back.
fn each_call_with(bed: &CloudBed<'_>, proxy: &Proxy, trouble: Trouble) {
    for (command, words, side) in OVER_AND_BACK {
        proxy.fail_each(trouble);
        let run = proxy.run(bed, command, words);
        let calls = lock(&proxy.script).calls.clone();
        let failed = calls.iter().collect::<BTreeSet<_>>().len();
        let end = match command {
            "cutover" => bed.brought_to_an_end(0, run.code, false),
            _ if run.code == Some(0) => "over",
            _ => "not over",
        };
        println!("{command}, each of {failed} calls, {trouble:?}, {} calls in all: it is {end}\n{run:?}", calls.len());
        if command == "cutover" && ["back", "refused"].contains(&end) {
            return;
        }
        if command == "rollback" {
            bed.bring_back(0);
        }
        bed.expect_well(0, side);
    }
}

fn each_call_with_every_trouble(bed: &CloudBed<'_>, proxy: &Proxy) {
    let never_over = [Trouble::AlwaysPretended, Trouble::Outage, Trouble::Killed];
    for trouble in troubles().into_iter().filter(|trouble| !never_over.contains(trouble)) {
        each_call_with(bed, proxy, trouble);
    }
}

/// All of it. A guest that goes on writes for hours what it has no room for: each trouble has one of its own.
fn every_call_with_every_trouble<'a>(proxy: &Proxy, make: impl Fn() -> CloudBed<'a>) {
    {
        let bed = make();
        every_read_with_every_trouble(&bed, proxy);
        each_call_with_every_trouble(&bed, proxy);
    }
    let mut undo = false;
    for trouble in troubles() {
        let bed = make();
        let mut ends = BTreeMap::<&str, usize>::new();
        for call in 1.. {
            undo = !undo;
            let Some(end) = with_trouble(&bed, proxy, (call, trouble), undo) else { break };
            *ends.entry(end).or_default() += 1;
            expect_end(call, trouble, end);
        }
        println!("all calls with {trouble:?}: {ends:?}");
    }
}

/// A cutover, or the way back, in which all that is read is read in vain first.
fn with_reads_that_fail(
    bed: &CloudBed<'_>,
    proxy: &Proxy,
    trouble: Trouble,
    (command, words, side): (&str, &[&str], &str),
) {
    proxy.fail_reads(trouble);
    let run = proxy.run(bed, command, words);
    let failed = lock(&proxy.script).read.len();
    println!("{command}, {failed} calls that read, {trouble:?}: {run:?}");
    run.expect_code(0);
    assert!(failed > 5, "{failed}");
    bed.expect_well(0, side);
}

/// A cutover and the way back, in which Nova lags behind Cinder.
fn with_a_nova_that_lags(bed: &CloudBed<'_>, proxy: &Proxy) {
    for (command, words, side) in OVER_AND_BACK {
        proxy.lag();
        let run = proxy.run(bed, command, words);
        println!("{command}, with a Nova that lags: {run:?}");
        run.expect_code(0);
        let script = lock(&proxy.script);
        let lag = script.lag.as_ref().expect("it was told to");
        assert!(lag.told > Lag::READS && lag.reads == 0 && lag.refused.len() == 2, "it was told {} times", lag.told);
        // It was looked at again and again.
        let told = lag.reserved.values().filter(|until| until.is_some_and(|(_, told)| told > 5)).count();
        assert!(told == 2 && lag.hasty.is_empty(), "{:?}, {:?}", lag.reserved, lag.hasty);
        bed.expect_well(0, side);
    }
}

fn every_read_with_every_trouble(bed: &CloudBed<'_>, proxy: &Proxy) {
    for trouble in Trouble::OF_READS {
        for way in OVER_AND_BACK {
            with_reads_that_fail(bed, proxy, trouble, way);
        }
    }
}

/// With a point, and what is in its volumes noted.
fn replicated(mut bed: CloudBed<'_>) -> CloudBed<'_> {
    bed.note_contents(0);
    bed.replicate();
    bed
}

#[test]
#[ignore = "exhaustive; needs OpenStack"]
fn a_nova_that_lags_behind_cinder_is_waited_for() {
    let env = openstack();
    with_a_nova_that_lags(&replicated(CloudBed::gateway(&env, 1, "")), &Proxy::start(&env));
}

#[test]
#[ignore = "exhaustive; needs OpenStack"]
fn a_call_for_a_gateway_that_fails_anywhere_loses_nothing() {
    let env = openstack();
    every_call_with_every_trouble(&Proxy::start(&env), || replicated(CloudBed::gateway(&env, 1, "")));
}

#[test]
#[ignore = "exhaustive; needs OpenStack"]
fn a_call_for_volumes_that_fails_anywhere_loses_nothing() {
    let env = openstack();
    every_call_with_every_trouble(&Proxy::start(&env), || replicated(CloudBed::detached(&env, 1, "")));
}

#[test]
#[ignore = "exhaustive; needs OpenStack"]
fn a_call_for_a_server_that_fails_anywhere_loses_nothing() {
    let env = openstack();
    every_call_with_every_trouble(&Proxy::start(&env), || {
        let mut bed = CloudBed::server(&env, "calls", "");
        bed.replicate();
        bed
    });
}
