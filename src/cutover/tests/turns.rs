//! Several servers at a time, of which only so many stand still.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use futures::future::join_all;
use tokio::sync::Semaphore;

use super::*;

/// Which of all servers stand still, and how many at most did.
#[derive(Default)]
struct Still {
    now: Mutex<BTreeSet<usize>>,
    most: Mutex<usize>,
}

struct One<'a> {
    still: &'a Still,
    index: usize,
    waited: Mutex<bool>,
    /// What happens when it has to wait.
    meanwhile: &'a (dyn Fn() + Send + Sync),
}

impl Observer for One<'_> {
    fn phase(&self, phase: Phase) {
        let mut now = self.still.now.lock().unwrap();
        match phase {
            Phase::Quiescing => drop(now.insert(self.index)),
            Phase::Committed | Phase::RolledBack => drop(now.remove(&self.index)),
            _ => {}
        }
        let mut most = self.still.most.lock().unwrap();
        *most = (*most).max(now.len());
    }

    fn note(&self, text: &str) {
        if text.contains("waiting for another server") {
            *self.waited.lock().unwrap() = true;
            (self.meanwhile)();
        }
    }
}

/// Brings all over at once; how many stood still at most, and how each ended.
async fn all_at_once(worlds: &mut [World], turns: Option<usize>) -> (usize, Vec<Result<Report>>) {
    let still = Still::default();
    let options = Options { turns: turns.map(|turns| Arc::new(Semaphore::new(turns))), ..Options::default() };
    let cancel = CancellationToken::new();
    let ended = join_all(worlds.iter_mut().enumerate().map(|(index, world)| {
        let (still, options, cancel) = (&still, &options, &cancel);
        // What `server` does ends trouble that was made.
        let server = world.server();
        if index == 1 && turns == Some(2) {
            world.make_trouble(3, Trouble::Before);
        }
        async move {
            let observer = One { still, index, waited: Mutex::default(), meanwhile: &|| {} };
            cutover(&server, options, &observer, cancel).await
        }
    }));
    let ended = ended.await;
    (still.most.into_inner().unwrap(), ended)
}

async fn worlds(count: usize) -> Vec<World> {
    join_all((0..count).map(|_| replicated(Method::Cold))).await
}

#[tokio::test]
async fn no_more_stand_still_than_may() {
    for (turns, most) in [(Some(1), 1..=1), (Some(2), 1..=2), (None, 3..=5)] {
        let mut worlds = worlds(5).await;
        let (stood, ended) = all_at_once(&mut worlds, turns).await;
        assert!(most.contains(&stood), "{turns:?}: {stood}");
        let mut back = 0;
        for (world, ended) in worlds.iter_mut().zip(ended) {
            let report = ended.unwrap();
            back += usize::from(report.ended == Phase::RolledBack);
            assert_eq!(settled(world).await, report.runs_from);
        }
        // One that fails makes room all the same.
        assert_eq!(back, usize::from(turns == Some(2)));
    }
}

#[tokio::test]
async fn what_is_written_while_it_waits_is_carried_over_before_it_stands_still() {
    let mut world = replicated(Method::Cold).await;
    let (server, still, cancel) = (world.server(), Still::default(), CancellationToken::new());
    let turns = Arc::new(Semaphore::new(0));
    // Somebody else is done as soon as it has written.
    let meanwhile = || {
        (0..500).for_each(|_| world.write());
        turns.add_permits(1);
    };
    let observer = One { still: &still, index: 0, waited: Mutex::default(), meanwhile: &meanwhile };
    let options = Options { turns: Some(Arc::clone(&turns)), ..Options::default() };
    let report = cutover(&server, &options, &observer, &cancel).await.unwrap();
    assert!(*observer.waited.lock().unwrap());
    assert!(report.delta_bytes < sim::SIZE / 4, "all of it was left for the last delta: {}", report.delta_bytes);
    assert_eq!((settled(&mut world).await, turns.available_permits()), (Side::Target, 1));
}

#[tokio::test]
async fn one_that_waits_for_its_turn_runs_and_may_be_told_to_stop() {
    let mut world = replicated(Method::Cold).await;
    let (server, still, cancel) = (world.server(), Still::default(), CancellationToken::new());
    let observer = One { still: &still, index: 0, waited: Mutex::default(), meanwhile: &|| cancel.cancel() };
    let options = Options { turns: Some(Arc::new(Semaphore::new(0))), ..Options::default() };
    let ended = cutover(&server, &options, &observer, &cancel).await;
    assert!(matches!(ended, Err(CutoverError::Interrupted { .. })), "{ended:?}");
    assert!(*observer.waited.lock().unwrap());
    assert_eq!((still.most.into_inner().unwrap(), settled(&mut world).await), (0, Side::Source));
    assert_eq!(cut_over(&mut world).await.unwrap().unwrap().ended, Phase::Committed);
}
