//! The walk on images in memory and a simulated server, with everything going wrong once, at every place.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::journal::{Changes, kept_name};
use super::phase::Phase;
use super::provider::Side;
use super::*;
use crate::fleet::group;
use crate::image::memory::Fault;
use crate::plan::Method;
use sim::{Trouble, World};

mod sim;
mod turns;

const METHODS: [Method; 3] = [Method::Cold, Method::Warm, Method::Hot];

/// Has the server write at every phase in which it runs.
struct Writing<'a>(&'a World);

impl Observer for Writing<'_> {
    fn phase(&self, _phase: Phase) {
        self.0.write();
    }
}

/// A world whose server was replicated once.
async fn replicated(method: Method) -> World {
    let mut world = World::new(method, 2);
    let server = world.server();
    let sides = sides::Sides { server: &server, to: Side::Target };
    let cancel = CancellationToken::new();
    struct Nobody;
    impl group::Observer for Nobody {}
    group::run(&sides.members(), &sides.group_options(), &Nobody, &cancel).await.unwrap();
    world.write();
    world
}

/// Runs a command as a process of its own, which may be killed: then it is `None`.
async fn process(world: &World, command: impl Future<Output = Result<Report>>) -> Option<Result<Report>> {
    tokio::select! {
        ended = command => Some(ended),
        () = world.killed() => None,
    }
}

async fn cut_over(world: &mut World) -> Option<Result<Report>> {
    let server = world.server();
    cut_over_with(world, &server, Options::default()).await
}

async fn cut_over_with(world: &World, server: &Server, options: Options) -> Option<Result<Report>> {
    let (cancel, observer) = (CancellationToken::new(), Writing(world));
    process(world, cutover(server, &options, &observer, &cancel)).await
}

async fn roll_back(world: &mut World, changes: Option<Changes>) -> Option<Result<Report>> {
    let server = world.server();
    let (cancel, observer, options) = (CancellationToken::new(), Writing(world), Options::default());
    process(world, rollback(&server, changes, &options, &observer, &cancel)).await
}

/// Where the server is, with all that belongs to it in its place.
async fn settled(world: &mut World) -> Side {
    let side = world.verdict().unwrap_or_else(|wrong| panic!("{wrong}"));
    let server = world.server();
    let journal = journal(&server).await.unwrap();
    let cut_over = journal.as_ref().is_some_and(journal::Journal::is_cut_over);
    assert_eq!(cut_over, side == Side::Target, "{journal:?}");
    assert_eq!(journal.is_some(), side == Side::Target, "{journal:?}");
    for (index, volume) in server.volumes.iter().enumerate() {
        let name = format!("s{index}");
        let expected = if cut_over { kept_name(&name) } else { name };
        assert_eq!(volume.source.name().await.unwrap(), expected);
    }
    let note = server.volumes[0].target.load_note().await.unwrap();
    assert_eq!(note.is_some_and(|note| note.starts_with("paused: cut over")), cut_over);
    side
}

/// Whatever was left behind, `cutover` again, or `rollback`, has the server run from one side with all that it wrote.
async fn recover_either_way(world: &mut World, by_rollback: bool, what: &str) -> Side {
    for _ in 0..3 {
        let server = world.server();
        let over = match journal(&server).await.unwrap() {
            None => world.verdict().is_ok(),
            Some(found) => found.is_cut_over(),
        };
        if over {
            break;
        }
        let ended = if by_rollback { roll_back(world, Some(Changes::Carry)).await } else { cut_over(world).await };
        if let Err(error) = ended.expect("nobody kills it now") {
            panic!("{what}: {}", crate::fleet::chain_text(&error));
        }
    }
    world.verdict().unwrap_or_else(|wrong| panic!("{what}: {wrong}"));
    settled(world).await
}

#[tokio::test]
async fn there_and_back_and_there_again() {
    for method in METHODS {
        let mut world = replicated(method).await;
        let report = cut_over(&mut world).await.unwrap().unwrap();
        assert_eq!((report.ended, report.runs_from), (Phase::Committed, Side::Target));
        assert!(report.delta_bytes > 0 && report.proved_bytes > 0, "{report:?}");
        assert_eq!(settled(&mut world).await, Side::Target);
        let again = cut_over(&mut world).await.unwrap().unwrap_err();
        assert!(matches!(again, CutoverError::WrongState { .. }), "{again}");
        world.write();
        let silent = roll_back(&mut world, None).await.unwrap().unwrap_err();
        assert!(matches!(silent, CutoverError::WrongState { .. }), "{silent}");
        let back = roll_back(&mut world, Some(Changes::Carry)).await.unwrap().unwrap();
        assert_eq!((back.ended, back.runs_from), (Phase::Committed, Side::Source));
        assert_eq!(settled(&mut world).await, Side::Source);
        world.write();
        let there = cut_over(&mut world).await.unwrap().unwrap();
        assert_eq!(there.ended, Phase::Committed);
        assert_eq!(settled(&mut world).await, Side::Target);
    }
}

/// The world of a test in which something goes wrong at a place, and whether there is such a place.
async fn with_trouble(method: Method, way_back: bool, trouble: &dyn Fn(&World)) -> (World, Option<Result<Report>>) {
    let mut world = replicated(method).await;
    if way_back {
        cut_over(&mut world).await.unwrap().unwrap();
        world.write();
        let server = world.server();
        trouble(&world);
        let (cancel, observer, options) = (CancellationToken::new(), Writing(&world), Options::default());
        let ended = process(&world, rollback(&server, Some(Changes::Carry), &options, &observer, &cancel)).await;
        return (world.clone(), ended);
    }
    let server = world.server();
    trouble(&world);
    let ended = cut_over_with(&world, &server, Options::default()).await;
    (world, ended)
}

#[tokio::test]
async fn whatever_call_of_the_provider_fails_or_is_the_last() {
    for (method, way_back) in METHODS.into_iter().flat_map(|method| [(method, false), (method, true)]) {
        for trouble in [Trouble::Before, Trouble::After, Trouble::KilledBefore, Trouble::KilledAfter] {
            for by_rollback in [false, true] {
                for at in 1.. {
                    let what =
                        format!("{method:?}, way back {way_back}, call {at} {trouble:?}, rollback {by_rollback}");
                    let (mut world, ended) =
                        with_trouble(method, way_back, &|world| world.make_trouble(at, trouble)).await;
                    if world.calls() < at {
                        assert!(matches!(ended, Some(Ok(_))), "{what}: {ended:?}");
                        break;
                    }
                    if let Some(Ok(report)) = &ended {
                        // Brought back, or brought over all the same: it runs, now.
                        assert_eq!(world.verdict().expect(&what), report.runs_from, "{what}");
                    }
                    let by_rollback = by_rollback || way_back;
                    recover_either_way(&mut world, by_rollback, &what).await;
                }
            }
        }
    }
}

#[tokio::test]
async fn whatever_image_dies_at_whatever_step() {
    for (method, way_back) in METHODS.into_iter().flat_map(|method| [(method, false), (method, true)]) {
        for (index, side) in [(0, Side::Source), (0, Side::Target), (1, Side::Source), (1, Side::Target)] {
            for (after, by_rollback) in [(false, false), (true, true)] {
                for at in 1.. {
                    let what = format!("{method:?}, way back {way_back}, {side:?} {index} dies at {at}, after {after}");
                    let fault = Fault { at, after, seed: at };
                    let (mut world, ended) =
                        with_trouble(method, way_back, &|world| world.image(index, side).set_fault(Some(fault))).await;
                    if !world.image(index, side).has_crashed() {
                        assert!(matches!(ended, Some(Ok(_))), "{what}: {ended:?}");
                        break;
                    }
                    recover_either_way(&mut world, by_rollback || way_back, &what).await;
                }
            }
        }
    }
}

/// Does something when a phase begins, and notes when each one did.
struct At<F> {
    phase: Phase,
    what: F,
    begun: std::sync::Mutex<Vec<(Phase, tokio::time::Instant)>>,
}

impl<F: Fn() + Send + Sync> Observer for At<F> {
    fn phase(&self, phase: Phase) {
        self.begun.lock().unwrap().push((phase, tokio::time::Instant::now()));
        if phase == self.phase {
            (self.what)();
        }
    }
}

/// A cutover during which something happens at a phase; how it ended, and when the phases began.
async fn cut_over_while<F: Fn() + Send + Sync>(
    server: &Server,
    options: &Options,
    (phase, what): (Phase, F),
) -> (Report, Vec<(Phase, tokio::time::Instant)>) {
    let observer = At { phase, what, begun: Default::default() };
    let report = cutover(server, options, &observer, &CancellationToken::new()).await.unwrap();
    (report, observer.begun.into_inner().unwrap())
}

#[tokio::test(start_paused = true)]
async fn a_journal_without_an_answer_keeps_no_server_longer_than_was_allowed() {
    for (method, phase) in METHODS
        .into_iter()
        .flat_map(|method| [Phase::FinalDelta, Phase::Verifying, Phase::Swapping].map(|phase| (method, phase)))
    {
        let mut world = replicated(method).await;
        let server = world.server();
        let options = Options { max_outage: Some(Duration::from_secs(20)), ..Options::default() };
        let silence = || world.image(0, Side::Target).set_silent(Some(Duration::from_secs(60)));
        let (report, begun) = cut_over_while(&server, &options, (phase, silence)).await;
        assert_eq!(report.ended, Phase::RolledBack, "{method:?} {phase}: {report:?}");
        assert!(report.rolled_back_because.unwrap().contains("has passed its limit of 20s"), "{method:?} {phase}");
        let at = |phase| begun.iter().find(|(begun, _)| *begun == phase).expect("it was there").1;
        let stood = at(Phase::RolledBack) - at(Phase::Quiescing);
        assert!(stood <= Duration::from_secs(26), "{method:?} {phase}: {stood:?}");
        assert_eq!(world.verdict(), Ok(Side::Source));
        world.image(0, Side::Target).set_silent(None);
        assert_eq!(recover_either_way(&mut world, true, "silent").await, Side::Source);
        assert_eq!(cut_over(&mut world).await.unwrap().unwrap().ended, Phase::Committed);
        settled(&mut world).await;
    }
}

#[tokio::test(start_paused = true)]
async fn nobody_else_has_open_what_is_left() {
    const STRANGER: &str = "10.0.0.9:0/9";
    for (method, phase) in METHODS.into_iter().flat_map(|method| [(method, Phase::Syncing), (method, Phase::Quiescing)])
    {
        let mut world = replicated(method).await;
        let server = world.server();
        let come = || world.image(1, Side::Source).open_as_server(STRANGER);
        let (report, begun) = cut_over_while(&server, &Options::default(), (phase, come)).await;
        let because = report.rolled_back_because.expect("it went back");
        assert!(because.contains("memory:s1 is open at ") && because.contains(STRANGER), "{method:?}: {because}");
        let stopped = begun.iter().any(|(phase, _)| *phase == Phase::Quiescing);
        assert_eq!(stopped, phase == Phase::Quiescing, "a server is not stopped for nothing: {begun:?}");
        assert!(!begun.iter().any(|(phase, _)| *phase == Phase::FinalDelta), "{begun:?}");
        assert_eq!(settled(&mut world).await, Side::Source);
        world.image(1, Side::Source).close_as_server(STRANGER);
        assert_eq!(cut_over(&mut world).await.unwrap().unwrap().ended, Phase::Committed);
        settled(&mut world).await;
    }
}

#[tokio::test]
async fn a_stop_that_comes_late_is_no_other_process() {
    // Killed when it was told to stop and had not done it yet: it does while the next process looks at it.
    let mut late = 0;
    for (looks, by_rollback) in (0..4).flat_map(|looks| [(looks, false), (looks, true)]) {
        for at in 1.. {
            let kill = |world: &World| world.make_trouble(at, Trouble::KilledBefore);
            let (mut world, _) = with_trouble(Method::Cold, false, &kill).await;
            if world.calls() < at {
                break;
            }
            let server = world.server();
            if journal(&server).await.unwrap().is_none_or(|found| found.phase != Phase::Quiescing) {
                continue;
            }
            world.stop_after(looks);
            let ended = match by_rollback {
                true => roll_back(&mut world, None).await,
                false => cut_over(&mut world).await,
            };
            ended.expect("nobody kills it").unwrap_or_else(|error| panic!("{looks} looks, {by_rollback}: {error}"));
            late += u32::from(world.has_stopped_late());
            settled(&mut world).await;
        }
    }
    assert!(late > 0);
}

#[tokio::test]
async fn a_memory_is_not_restored_once_somebody_has_written_to_its_disks() {
    let mut used = 0;
    for (again, by_rollback) in (0..10).flat_map(|again| [(again, false), (again, true)]) {
        for at in 1.. {
            let kill = |world: &World| world.make_trouble(at, Trouble::KilledAfter);
            let (mut world, _) = with_trouble(Method::Warm, false, &kill).await;
            if world.calls() < at {
                break;
            }
            if !world.is_saved() {
                continue;
            }
            world.use_by_hand();
            used += 1;
            // Whoever goes on is killed as well, and then somebody else goes on.
            let server = world.server();
            world.make_trouble(again, Trouble::KilledAfter);
            let _ = cut_over_with(&world, &server, Options::default()).await;
            let what = format!("killed at call {at}, and {again} after it was used by hand, rollback {by_rollback}");
            recover_either_way(&mut world, by_rollback, &what).await;
        }
    }
    assert!(used > 0);
}
