//! The provider on a simulated cloud ([`crate::openstack::sim`]), with everything going wrong once, at every place.
//!
//! For every holder of the volumes (a server, a gateway, none) and both directions, complete loops over:
//!
//! - every request that changes something × every [`Trouble`];
//! - every request that only reads × every trouble of reads;
//! - each of these troubles with all requests of a run, the first time that each is made;
//! - every failpoint at which the process is killed × the commands that may follow: after a cutover both, after a
//!   rollback only the rollback, as the other is refused.
//!
//! After each case the next command brings the server to one side, with all that was written, and nothing is left over
//! in either pool, in Cinder or in Nova. The contract tests in `tests/it/cloud_contract.rs` hold the simulation to the
//! real services.

mod world;

use std::collections::{BTreeMap, BTreeSet};

use crate::cutover::phase::Phase;
use crate::cutover::provider::Side;
use crate::cutover::{CutoverError, Report};
use crate::failpoint::script as failpoints;
use crate::openstack::sim::trouble::{Aim, Trouble};
use world::{Held, World};

/// Which way: a cutover, or the rollback of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    There,
    Back,
}

impl Way {
    fn to(self) -> Side {
        if self == Self::There { Side::Target } else { Side::Source }
    }
}

/// How a run ended; `None` if it was killed.
type End = Option<Result<Report, CutoverError>>;

/// A run in which something goes wrong.
async fn run(held: Held, way: Way, (aim, kill_at): (Aim, Option<usize>)) -> (World, End) {
    let world = World::replicated(held).await;
    if way == Way::Back {
        let there = world.cut_over().await.expect("nothing kills it").expect("nothing goes wrong");
        assert_eq!(there.ended, Phase::Committed);
        world.write();
    }
    world.cloud.script().begin(aim);
    failpoints::begin(kill_at);
    let ended = if way == Way::There { world.cut_over().await } else { world.roll_back().await };
    (world, ended)
}

/// Brings what is left to one side by the next commands, and checks that nothing is lost and nothing left over.
async fn bring_to_an_end(world: &World, by_rollback: bool, what: &str) -> Side {
    world.cloud.script().begin(Aim::Nothing);
    failpoints::begin(None);
    let mut reported = None;
    for _ in 0..3 {
        if !world.is_unfinished().await {
            break;
        }
        let ended = if by_rollback { world.roll_back().await } else { world.cut_over().await };
        match ended.expect("nothing kills it") {
            Ok(report) => reported = Some(report),
            Err(error) => panic!("{what}: the next command: {}", crate::fleet::chain_text(&error)),
        }
    }
    let side = world.settled().await.unwrap_or_else(|wrong| panic!("{what}: {wrong}"));
    if let Some(report) = reported {
        assert_eq!(report.runs_from, side, "{what}: it reports {report:?}");
    }
    side
}

/// The requests of a run in which nothing goes wrong: those that change something, and those that only read.
async fn requests(held: Held, way: Way) -> [BTreeSet<String>; 2] {
    let (world, ended) = run(held, way, (Aim::Nothing, None)).await;
    let script = world.cloud.script();
    assert!(matches!(ended, Some(Ok(_))), "{}", world::told(&ended));
    [script.changes(), script.reads()].map(|requests| requests.iter().cloned().collect())
}

/// Counts the cases of a loop, by how they ended.
#[derive(Default)]
struct Ends(BTreeMap<&'static str, usize>);

impl Ends {
    fn count(&mut self, end: &'static str) {
        *self.0.entry(end).or_default() += 1;
    }

    fn print(&self, what: &str) {
        println!("{what}: {} cases: {:?}", self.0.values().sum::<usize>(), self.0);
    }
}

/// Judges one case: a trouble that passes must not keep the server from going over.
async fn judge(world: &World, ended: &End, way: Way, (must_arrive, what): (bool, &str)) -> &'static str {
    let arrived = matches!(ended, Some(Ok(report)) if report.ended == Phase::Committed && report.runs_from == way.to());
    if must_arrive {
        assert!(arrived, "{what}: {}", world::told(ended));
    }
    let side = bring_to_an_end(world, way == Way::Back, what).await;
    if arrived {
        assert_eq!(side, way.to(), "{what}");
    }
    match (arrived, ended) {
        (true, _) => "arrived",
        (false, Some(Ok(_))) => "went back",
        (false, Some(Err(_))) => "failed, then brought to an end",
        (false, None) => "killed, then brought to an end",
    }
}

/// Every request that changes something × every trouble, and each trouble with all of them.
async fn every_change(held: Held, way: Way) {
    let mut ends = Ends::default();
    let [mut left, _] = requests(held, way).await;
    for trouble in Trouble::ALL {
        let lasts = matches!(trouble, Trouble::AlwaysPretended | Trouble::Outage | Trouble::Killed);
        for number in 1.. {
            let what = format!("{held:?}, {way:?}, change {number}, {trouble:?}");
            let (world, ended) = run(held, way, (Aim::Change(number, trouble), None)).await;
            if !world.cloud.script().has_struck() {
                assert!(number > 1, "{what}: nothing was changed");
                judge(&world, &ended, way, (true, &what)).await;
                break;
            }
            if let Some(call) = world.cloud.script().struck() {
                left.remove(call);
            }
            ends.count(judge(&world, &ended, way, (!lasts, &what)).await);
        }
        if !lasts {
            let what = format!("{held:?}, {way:?}, each change, {trouble:?}");
            let (world, ended) = run(held, way, (Aim::EachChange(trouble), None)).await;
            ends.count(judge(&world, &ended, way, (false, &what)).await);
        }
    }
    ends.print(&format!("{held:?}, {way:?}, changes, {} requests left out", left.len()));
}

/// Every request that only reads × every trouble of reads, and each trouble with all of them.
async fn every_read(held: Held, way: Way) {
    let mut ends = Ends::default();
    let [_, mut left] = requests(held, way).await;
    for trouble in Trouble::OF_READS {
        for number in 1.. {
            let what = format!("{held:?}, {way:?}, read {number}, {trouble:?}");
            let (world, ended) = run(held, way, (Aim::Read(number, trouble), None)).await;
            let reads = world.cloud.script().reads().len();
            // The request for a token has none that could end.
            let first_token = number == 1 && trouble == Trouble::TokenEnded;
            assert!(first_token || world.cloud.script().has_struck(), "{what}: nothing was read");
            if let Some(call) = world.cloud.script().struck() {
                left.remove(call);
            }
            ends.count(judge(&world, &ended, way, (true, &what)).await);
            if number >= reads {
                break;
            }
        }
        let what = format!("{held:?}, {way:?}, each read, {trouble:?}");
        let (world, ended) = run(held, way, (Aim::EachRead(trouble), None)).await;
        ends.count(judge(&world, &ended, way, (true, &what)).await);
    }
    ends.print(&format!("{held:?}, {way:?}, reads, {} requests left out", left.len()));
}

/// Every failpoint at which the process is killed × the commands that may follow.
async fn every_kill(held: Held, way: Way) {
    let mut ends = Ends::default();
    for by_rollback in [false, true] {
        // A cutover is refused while a rollback is under way.
        if way == Way::Back && !by_rollback {
            continue;
        }
        for number in 1.. {
            let (world, ended) = run(held, way, (Aim::Nothing, Some(number))).await;
            let reached = failpoints::reached();
            let what = format!("{held:?}, {way:?}, killed at {number}, {:?}, rollback {by_rollback}", reached.last());
            if ended.is_some() {
                assert!(number > 10 && reached.len() < number, "{what}: {} places", reached.len());
                judge(&world, &ended, way, (true, &what)).await;
                break;
            }
            bring_to_an_end(&world, by_rollback, &what).await;
            ends.count("killed, then brought to an end");
        }
    }
    ends.print(&format!("{held:?}, {way:?}, kills"));
}

/// One test for each loop, holder and direction: they run beside each other.
macro_rules! matrix {
    ($($name:ident: $every:ident($held:ident, $way:ident);)+) => {
        $(
            #[tokio::test(start_paused = true)]
            async fn $name() {
                $every(Held::$held, Way::$way).await;
            }
        )+
    };
}

matrix! {
    every_change_for_a_server_may_fail: every_change(Server, There);
    every_change_for_a_server_s_rollback_may_fail: every_change(Server, Back);
    every_change_below_a_gateway_may_fail: every_change(Gateway, There);
    every_change_of_a_rollback_below_a_gateway_may_fail: every_change(Gateway, Back);
    every_change_of_unattached_volumes_may_fail: every_change(Nobody, There);
    every_change_of_a_rollback_of_unattached_volumes_may_fail: every_change(Nobody, Back);
    every_read_for_a_server_may_fail: every_read(Server, There);
    every_read_for_a_server_s_rollback_may_fail: every_read(Server, Back);
    every_read_below_a_gateway_may_fail: every_read(Gateway, There);
    every_read_of_a_rollback_below_a_gateway_may_fail: every_read(Gateway, Back);
    every_read_of_unattached_volumes_may_fail: every_read(Nobody, There);
    every_read_of_a_rollback_of_unattached_volumes_may_fail: every_read(Nobody, Back);
    a_server_s_cutover_may_be_killed_anywhere: every_kill(Server, There);
    a_server_s_rollback_may_be_killed_anywhere: every_kill(Server, Back);
    a_cutover_below_a_gateway_may_be_killed_anywhere: every_kill(Gateway, There);
    a_rollback_below_a_gateway_may_be_killed_anywhere: every_kill(Gateway, Back);
    a_cutover_of_unattached_volumes_may_be_killed_anywhere: every_kill(Nobody, There);
    a_rollback_of_unattached_volumes_may_be_killed_anywhere: every_kill(Nobody, Back);
}

/// There, back with what was written there, and there again, without any trouble.
#[tokio::test(start_paused = true)]
async fn there_and_back_and_there_again() {
    for held in [Held::Server, Held::Gateway, Held::Nobody] {
        let world = World::replicated(held).await;
        for way in [Way::There, Way::Back, Way::There] {
            let ended = if way == Way::There { world.cut_over().await } else { world.roll_back().await };
            judge(&world, &ended, way, (true, &format!("{held:?}, {way:?}"))).await;
            world.write();
        }
    }
}

/// A Nova that names a volume for a while after Cinder has released it, and a Cinder that reserves it meanwhile.
#[tokio::test(start_paused = true)]
async fn a_nova_that_lags_behind_cinder_is_waited_for() {
    for (milliseconds, way) in [200, 2_000, 6_000].into_iter().flat_map(|lag| [(lag, Way::There), (lag, Way::Back)]) {
        let world = World::replicated(Held::Gateway).await;
        if way == Way::Back {
            world.cut_over().await.expect("nothing kills it").expect("nothing goes wrong");
        }
        world.cloud.set_lag(Some(std::time::Duration::from_millis(milliseconds)));
        let ended = if way == Way::There { world.cut_over().await } else { world.roll_back().await };
        judge(&world, &ended, way, (true, &format!("{milliseconds} ms, {way:?}"))).await;
    }
}

/// A Nova that shuts a server down and does not take it from its host, once, more often or always, and a process that is
/// killed then: the server is switched, or runs where it was.
#[tokio::test(start_paused = true)]
async fn a_server_that_its_cloud_fails_to_shelve_is_switched_or_comes_back() {
    const ASKED: &str = "openstack.shelve-server";
    let (mut ends, mut kills) = (Ends::default(), 0);
    for (fails, way) in [1, 2, 100].into_iter().flat_map(|fails| [(fails, Way::There), (fails, Way::Back)]) {
        for kill_at in 0.. {
            let world = World::replicated(Held::Server).await;
            if way == Way::Back {
                world.cut_over().await.expect("nothing kills it").expect("nothing goes wrong");
            }
            world.cloud.fail_shelves(fails);
            failpoints::begin_at(ASKED, kill_at);
            let ended = if way == Way::There { world.cut_over().await } else { world.roll_back().await };
            world.cloud.fail_shelves(0);
            let what = format!("{fails} shelves fail, {way:?}, killed when asked for {kill_at} times");
            ends.count(judge(&world, &ended, way, (false, &what)).await);
            kills += usize::from(ended.is_none());
            if kill_at > 0 && ended.is_some() {
                break;
            }
        }
    }
    assert!(kills >= 10, "{kills} kills");
    ends.print("Server, shelves that fail, with kills");
}
