//! A simulated cloud for tests: Keystone, Cinder and Nova as one state machine behind HTTP, over images in memory.
//!
//! It answers as the real services do, and lies as they do: a request is accepted (202) before anything is done, and
//! may come to nothing; lists lag behind; states are passed through one after the other. All of its time is tokio's, so
//! with a paused clock hours pass in an instant. Its states, answers and times were recorded on OpenStack Zed;
//! `tests/it/cloud_contract.rs` holds most of them to the real services. Not simulated are types with QoS, quotas, lists in
//! pages, Neutron, and the strategies recreate and retype.
//!
//! | part | what it is |
//! |---|---|
//! | `state` | volumes, servers, and what happens at which time |
//! | `cinder`, `nova` | what the requests do |
//! | `guest` | what a running server does with the images it has open |
//! | `http` | requests and answers, tokens |
//! | [`trouble`] | requests that fail |
//!
//! What must never happen is noted as a violation: Cinder moves an image that is no placeholder, or deletes one of the
//! volume's name in the pool it moves to; a server starts from images that lack what it wrote, or to which it may not
//! write; a volume that Cinder is at is to be kept for a shelved server; a server is unshelved before Nova has forgotten its
//! host.

mod cinder;
mod guest;
mod http;
mod nova;
mod state;
pub mod trouble;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::CloudAccess;
use super::access::{Identity, Interface, Ref};
use crate::image::memory::MemoryPools;
use state::State;
use trouble::Script;

/// The project of all volumes and servers.
pub const PROJECT: &str = "0123456789abcdef0123456789abcdef";

/// A cloud. Clones share it.
#[derive(Clone, Debug)]
pub struct SimCloud {
    state: Arc<Mutex<State>>,
    script: Arc<Mutex<Script>>,
    pools: MemoryPools,
    base: String,
    _tasks: Arc<Tasks>,
}

/// Ends with the last clone.
#[derive(Debug)]
struct Tasks([AbortHandle; 2]);

impl Drop for Tasks {
    fn drop(&mut self) {
        self.0.iter().for_each(AbortHandle::abort);
    }
}

impl SimCloud {
    /// Starts it on a free port of this host, with the backends and volume types `sata` and `sas` over the pools of
    /// these names.
    ///
    /// # Panics
    /// If there is no port, or outside of a tokio runtime.
    pub async fn start(pools: MemoryPools) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let base = format!("http://{}", listener.local_addr().expect("it has an address"));
        let state = Arc::new(Mutex::new(State::new(pools.clone())));
        let script = Arc::<Mutex<Script>>::default();
        let served = http::serve(listener, Arc::clone(&state), Arc::clone(&script), base.clone());
        let tasks = [tokio::spawn(served).abort_handle(), tokio::spawn(happen(Arc::clone(&state))).abort_handle()];
        Self { state, script, pools, base, _tasks: Arc::new(Tasks(tasks)) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The requests, and what is to become of them.
    pub fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its images.
    pub fn pools(&self) -> &MemoryPools {
        &self.pools
    }

    /// How an administrator reaches it.
    ///
    /// # Panics
    /// Never: its own address is one.
    pub fn access(&self) -> CloudAccess {
        CloudAccess {
            name: "the simulated cloud".into(),
            auth_url: format!("{}/identity", self.base).parse().expect("an address"),
            identity: Identity::Password {
                user: Ref::Name("admin".into()),
                user_domain: Ref::Id("default".into()),
                password: "poolshift".into(),
                project: Ref::Name("admin".into()),
                project_domain: Ref::Id("default".into()),
            },
            region: None,
            interface: Interface::Public,
            ca_file: None,
            // There is no TLS, and each client would read all of the CAs of the host, which takes longer than a run.
            verify: false,
            endpoints: BTreeMap::new(),
        }
    }

    /// Makes a volume of 1 GiB of a type, with its image, and gives back its id.
    pub fn create_volume(&self, volume_type: &str) -> String {
        self.lock().create_volume(volume_type)
    }

    /// Writes something to the image of a volume that no server has.
    pub fn fill(&self, volume: &str) {
        self.lock().fill(volume);
    }

    /// Makes a server that runs from these volumes, the first of which it boots from, and gives back its id.
    pub fn create_server(&self, volumes: &[String]) -> String {
        self.lock().create_server(volumes)
    }

    /// Has Nova name a volume for so long among a server's after Cinder has released it, and Cinder reserve it.
    pub fn set_lag(&self, lag: Option<Duration>) {
        self.lock().lag = lag;
    }

    /// Has Nova fail the next so many shelves half way: the guest is shut down, and the server shown as it was.
    pub fn fail_shelves(&self, many: usize) {
        self.lock().shelves_to_fail = many;
    }

    /// Has every running server write to all of its volumes.
    pub fn write(&self) {
        self.lock().write();
    }

    /// What has happened that must never happen.
    pub fn violations(&self) -> Vec<String> {
        self.lock().violations.clone()
    }

    /// What a volume is like in the end: its type, pool, status and migration status, and the bytes it is to hold.
    ///
    /// # Errors
    /// If there is no such volume.
    pub fn volume(&self, id: &str) -> Result<VolumeEnd, String> {
        let state = self.lock();
        let volume = state.volume(id).ok_or_else(|| format!("there is no volume {id}"))?;
        Ok(VolumeEnd {
            volume_type: volume.volume_type.clone(),
            pool: volume.pool.clone(),
            status: volume.status.clone(),
            migration: volume.migration.clone(),
            acknowledged: volume.acknowledged.clone(),
        })
    }

    /// What is wrong with a server that is to run from these images, by volume; and how it has its volumes.
    ///
    /// # Errors
    /// What is wrong.
    pub fn server(&self, id: &str, images: &BTreeMap<String, String>) -> Result<Vec<(String, String, bool)>, String> {
        self.lock().judge_server(id, images)
    }
}

/// How a volume has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeEnd {
    /// Its type.
    pub volume_type: String,
    /// The pool of its backend.
    pub pool: String,
    /// Its status.
    pub status: String,
    /// How its last migration went.
    pub migration: Option<String>,
    /// All that its servers were told is written.
    pub acknowledged: Vec<u8>,
}

/// Lets happen what is due, for ever.
async fn happen(state: Arc<Mutex<State>>) {
    loop {
        let (next, more) = {
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            state.happen(Instant::now());
            (state.next(), Arc::clone(&state.more))
        };
        let due = async {
            match next {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = due => {}
            () = more.notified() => {}
        }
    }
}
