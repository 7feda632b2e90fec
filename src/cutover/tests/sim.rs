//! A server that is simulated: it writes to the images in memory that it has open, remembers what was acknowledged, and
//! notices when its disks are not what they must be.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use futures::FutureExt as _;
use tokio::sync::Notify;

use crate::cutover::provider::{Notes, Observed, Power, Precondition, Provider, ProviderError, ServerDisk, Side};
use crate::cutover::{Server, Volume};
use crate::image::memory::MemoryImage;
use crate::image::{Disk as _, Layout, Point};
use crate::plan::{Method, Retention};

/// Small, and with objects as small, so that a delta is a part of a disk.
pub(super) const LAYOUT: Layout = Layout { object_size: 4096, stripe_unit: 4096, stripe_count: 1 };
pub(super) const SIZE: u64 = 64 << 10;
const ADDRESS: &str = "10.0.0.1:0/1";

/// Where a call to the provider fails, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// An error, and nothing was done.
    Before,
    /// It was done, and an error all the same.
    After,
    /// The process is killed before it.
    KilledBefore,
    /// The process is killed when it was done.
    KilledAfter,
}

#[derive(Debug)]
struct State {
    power: Power,
    /// The side that it starts from.
    definition: Side,
    /// The side that is open.
    open: Option<Side>,
    /// What it knows of its disks, as of when it was saved or suspended.
    memory: Option<Vec<Vec<u8>>>,
    /// What its disks hold: all of it was acknowledged.
    acknowledged: Vec<Vec<u8>>,
    /// What its disks have of metadata that an operator set where it ran.
    metadata: Vec<BTreeMap<String, Vec<u8>>>,
    counter: u8,
    calls: u64,
    trouble: Option<(u64, Trouble)>,
    /// After so many looks at it, it does what it was told by a process that is gone: it stops.
    stops_after: Option<u64>,
    stopped_late: bool,
    violations: Vec<String>,
}

/// The world: a server and its disks. Clones share it.
#[derive(Clone, Debug)]
pub(super) struct World {
    method: Method,
    disks: Vec<(MemoryImage, MemoryImage)>,
    state: Arc<Mutex<State>>,
    killed: Arc<Notify>,
}

impl World {
    pub(super) fn new(method: Method, volumes: usize) -> Self {
        let image = |name: String| MemoryImage::new(&name, SIZE, LAYOUT);
        let disks = (0..volumes).map(|index| (image(format!("s{index}")), image(format!("t{index}")))).collect();
        let state = State {
            power: Power::Off,
            definition: Side::Source,
            open: None,
            memory: None,
            acknowledged: vec![vec![0; SIZE as usize]; volumes],
            metadata: vec![BTreeMap::new(); volumes],
            counter: 0,
            calls: 0,
            trouble: None,
            stops_after: None,
            stopped_late: false,
            violations: Vec::new(),
        };
        let world = Self { method, disks, state: Arc::new(Mutex::new(state)), killed: Arc::default() };
        world.open(Side::Source);
        world.state().power = Power::Running;
        world.write();
        world
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn image(&self, index: usize, side: Side) -> &MemoryImage {
        let (source, target) = &self.disks[index];
        if side == Side::Source { source } else { target }
    }

    fn images(&self, side: Side) -> impl Iterator<Item = &MemoryImage> {
        (0..self.disks.len()).map(move |index| self.image(index, side))
    }

    /// The server as a process sees it that has just been started: images that had died are up again, and what another
    /// process held is its no more.
    pub(super) fn server(&mut self) -> Server {
        for (source, target) in &mut self.disks {
            for image in [source, target] {
                image.set_fault(None);
                image.abandon_lease();
                *image = image.reopen();
            }
        }
        self.state().trouble = None;
        let volume = |(index, (source, target)): (usize, &(MemoryImage, MemoryImage))| Volume {
            disk: ServerDisk {
                target_in_use: None,
                volume: format!("v{index}"),
                source: format!("rbd:sata/s{index}").parse().unwrap(),
                target: format!("rbd:sas/t{index}").parse().unwrap(),
                boot: index == 0,
            },
            source: Arc::new(source.clone()),
            target: Arc::new(target.clone()),
        };
        Server {
            name: "web".into(),
            volumes: self.disks.iter().enumerate().map(volume).collect(),
            provider: Arc::new(self.clone()),
            retention: Retention::default(),
        }
    }

    pub(super) fn make_trouble(&self, at: u64, trouble: Trouble) {
        let mut state = self.state();
        (state.calls, state.trouble) = (0, Some((at, trouble)));
    }

    /// How many calls there were since the last trouble was made.
    pub(super) fn calls(&self) -> u64 {
        self.state().calls
    }

    fn open(&self, side: Side) {
        self.images(side).for_each(|image| image.open_as_server(ADDRESS));
        self.state().open = Some(side);
    }

    fn close(&self) {
        for side in [Side::Source, Side::Target] {
            self.images(side).for_each(|image| image.close_as_server(ADDRESS));
        }
        self.state().open = None;
    }

    fn contents(&self, side: Side) -> Vec<Vec<u8>> {
        self.images(side).map(|image| image.bytes_at(&Point::Head).unwrap()).collect()
    }

    /// The server, if it runs, writes to all of its disks, and an operator changes their metadata; what is refused was not
    /// acknowledged.
    pub(super) fn write(&self) {
        let (side, counter) = {
            let mut state = self.state();
            let Some(side) = state.open.filter(|_| state.power == Power::Running) else { return };
            state.counter = state.counter.wrapping_add(1);
            (side, state.counter)
        };
        for index in 0..self.disks.len() {
            let offset = fastrand::u64(..SIZE - 64);
            let data = vec![counter.max(1); fastrand::usize(1..64)];
            if self.image(index, side).write_at_server(ADDRESS, offset, &data).is_ok() {
                let at = offset as usize;
                self.state().acknowledged[index][at..at + data.len()].copy_from_slice(&data);
            }
            // One key that changes, and one that comes and goes.
            for (key, value) in [("owner", Some(vec![counter])), ("limit", (counter % 2 == 0).then(|| vec![0, 255]))] {
                if self.image(index, side).set_metadata_as_operator(key, value.as_deref()).is_ok() {
                    let known = &mut self.state().metadata[index];
                    match value {
                        Some(value) => drop(known.insert(key.to_owned(), value)),
                        None => drop(known.remove(key)),
                    }
                }
            }
        }
    }

    /// The metadata of the disks on a side, as it is to be.
    fn metadata(&self, side: Side) -> Vec<BTreeMap<String, Vec<u8>>> {
        let of = |image: &MemoryImage| {
            let found = image.metadata().now_or_never().expect("it waits for nothing").unwrap().carried;
            found.into_iter().map(|(key, value)| (key, value.to_vec())).collect()
        };
        self.images(side).map(of).collect()
    }

    /// Has the server, if it runs, stop by itself when it was looked at so often.
    pub(super) fn stop_after(&self, looks: u64) {
        let mut state = self.state();
        state.stops_after = Some(looks).filter(|_| state.power == Power::Running);
    }

    /// Whether it has stopped by itself.
    pub(super) fn has_stopped_late(&self) -> bool {
        self.state().stopped_late
    }

    /// It stops writing.
    fn stop(&self) {
        if self.state().power != Power::Running {
            return;
        }
        // Whoever is told twice stops once.
        self.state().stops_after = None;
        self.write();
        let side = self.state().open.expect("it runs");
        let memory = self.contents(side);
        let (power, stays_open) = match self.method {
            Method::Cold => (Power::Off, false),
            Method::Warm => (Power::Saved, false),
            Method::Hot => (Power::Suspended, true),
        };
        if !stays_open {
            self.close();
        }
        let memory = Some(memory).filter(|_| self.keeps_memory());
        let mut state = self.state();
        (state.power, state.memory) = (power, memory);
    }

    /// Whether its memory was saved.
    pub(super) fn is_saved(&self) -> bool {
        self.state().power == Power::Saved
    }

    /// Somebody boots it by hand, past what was saved of it, lets it write, and ends it.
    pub(super) fn use_by_hand(&self) {
        let side = self.state().definition;
        self.images(side).for_each(MemoryImage::abandon_lease);
        self.open(side);
        self.state().power = Power::Running;
        self.write();
        self.close();
        self.state().power = Power::Saved;
    }

    /// It starts to run: its disks must hold all that was acknowledged, and be what its memory knows.
    fn run(&self, with_memory: bool) {
        let side = self.state().open.expect("it has its disks open");
        let (contents, metadata) = (self.contents(side), self.metadata(side));
        let mut state = self.state();
        if metadata != state.metadata {
            let wrong = format!("its {side:?} has the metadata {metadata:?}, and not {:?}", state.metadata);
            state.violations.push(wrong);
        }
        if contents != state.acknowledged {
            state.violations.push(format!("it starts from its {side:?} without all that it wrote"));
        }
        if with_memory && state.memory.as_ref() != Some(&contents) {
            state.violations.push(format!("it goes on from its {side:?} with a memory of other disks"));
        }
        (state.power, state.memory) = (Power::Running, None);
        drop(state);
        self.write();
    }

    /// What is wrong in the end, with the side that it runs from.
    pub(super) fn verdict(&self) -> Result<Side, String> {
        let (power, open) = {
            let state = self.state();
            (state.power, state.open)
        };
        let Some(side) = open.filter(|_| power == Power::Running) else {
            return Err(format!("it is {power} on {open:?}"));
        };
        self.write();
        let (contents, metadata) = (self.contents(side), self.metadata(side));
        let state = self.state();
        if metadata != state.metadata {
            return Err(format!("its {side:?} has the metadata {metadata:?}, and not {:?}", state.metadata));
        }
        if !state.violations.is_empty() {
            return Err(state.violations.join("; "));
        }
        if contents != state.acknowledged {
            return Err(format!("its {side:?} does not hold what it wrote"));
        }
        if state.definition != side {
            return Err(format!("it runs from its {side:?} and would not start from there"));
        }
        Ok(side)
    }

    /// The process is killed here: whoever runs it drops it.
    async fn die<T>(&self) -> T {
        self.killed.notify_one();
        std::future::pending().await
    }

    /// Waits until the process is killed.
    pub(super) async fn killed(&self) {
        self.killed.notified().await;
    }

    async fn call(&self, name: &str, effect: impl FnOnce()) -> Result<(), ProviderError> {
        let trouble = {
            let mut state = self.state();
            state.calls += 1;
            state.trouble.filter(|(at, _)| *at == state.calls).map(|(_, trouble)| trouble)
        };
        if trouble == Some(Trouble::KilledBefore) {
            self.die::<()>().await;
        }
        if trouble != Some(Trouble::Before) {
            effect();
        }
        match trouble {
            Some(Trouble::KilledAfter) => self.die().await,
            Some(Trouble::Before | Trouble::After) => Err(ProviderError {
                operation: name.to_owned(),
                server: "web".to_owned(),
                problem: "it was told to fail".to_owned(),
                hint: None,
            }),
            _ => Ok(()),
        }
    }
}

impl crate::cutover::provider::rehearse::Rehearse for World {}

#[async_trait]
impl Provider for World {
    fn describe(&self) -> String {
        format!("simulated, {:?}", self.method)
    }

    fn stays_open(&self) -> bool {
        self.method == Method::Hot
    }

    fn keeps_memory(&self) -> bool {
        self.method != Method::Cold
    }

    async fn preconditions(&self, _from: Side) -> Vec<Precondition> {
        Vec::new()
    }

    async fn observe(&self, _notes: &Notes) -> Result<Observed, ProviderError> {
        self.call("observe", || {}).await?;
        let left = self.state().stops_after.take();
        match left {
            Some(0) => {
                self.stop();
                self.state().stopped_late = true;
            }
            Some(left) => self.state().stops_after = Some(left - 1),
            None => {}
        }
        let state = self.state();
        Ok(Observed { power: state.power, side: Some(state.open.unwrap_or(state.definition)) })
    }

    async fn prepare(&self, _from: Side, notes: &mut Notes) -> Result<(), ProviderError> {
        self.write();
        notes.insert("prepared".into(), "yes".into());
        self.call("prepare", || {}).await
    }

    async fn quiesce(&self, _notes: &mut Notes) -> Result<(), ProviderError> {
        self.call("quiesce", || self.stop()).await
    }

    async fn finish_stop(&self, notes: &mut Notes) -> Result<(), ProviderError> {
        if self.method == Method::Cold { self.quiesce(notes).await } else { Ok(()) }
    }

    async fn swap(&self, to: Side, _notes: &mut Notes) -> Result<(), ProviderError> {
        let swap = || {
            let elsewhere = {
                let state = self.state();
                state.power == Power::Suspended && state.open != Some(to)
            };
            if elsewhere {
                self.close();
                self.open(to);
            }
            self.state().definition = to;
        };
        self.call("swap", swap).await
    }

    async fn start(&self, on: Side, fresh: bool, _notes: &mut Notes) -> Result<(), ProviderError> {
        let start = || {
            let power = self.state().power;
            let with_memory = matches!(power, Power::Saved | Power::Suspended) && !fresh;
            if power == Power::Running {
                return;
            }
            if power == Power::Suspended && fresh {
                self.close();
            }
            let closed = self.state().open.is_none();
            if closed {
                self.open(on);
            }
            self.run(with_memory);
        };
        self.call("start", start).await
    }

    async fn settle(&self, _on: Side, _notes: &mut Notes) -> Result<Vec<String>, ProviderError> {
        self.call("settle", || {}).await?;
        Ok(Vec::new())
    }
}
