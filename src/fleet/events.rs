//! What happened: the newest events, and a channel for those to come.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use tokio::sync::broadcast;

use super::status::{Event, EventKind};

/// How many events are kept.
const KEPT: usize = 1000;

/// How many events a receiver may be behind.
const BEHIND: usize = 256;

/// The events of a process.
#[derive(Debug)]
pub(super) struct Events {
    recent: Mutex<VecDeque<Event>>,
    sender: broadcast::Sender<Event>,
}

impl Default for Events {
    fn default() -> Self {
        Self { recent: Mutex::default(), sender: broadcast::channel(BEHIND).0 }
    }
}

impl Events {
    /// Tells everybody, the log included.
    pub(super) fn tell(&self, kind: EventKind, server: Option<&str>, volume: Option<&str>, message: String) {
        let owned = |name: Option<&str>| name.map(str::to_owned);
        // Sent under the lock, so that every receiver sees the ids in their order.
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let id = recent.back().map_or(1, |last| last.id + 1);
        let at = crate::clock::now().to_string();
        let event = Event { id, at, server: owned(server), volume: owned(volume), kind, message };
        match kind {
            EventKind::CycleFailed | EventKind::Held => {
                tracing::warn!(server, volume, "{}", event.message);
            }
            EventKind::NothingChanged | EventKind::CycleStarted => {
                tracing::debug!(server, volume, "{}", event.message);
            }
            _ => tracing::info!(server, volume, "{}", event.message),
        }
        if recent.len() >= KEPT {
            recent.pop_front();
        }
        recent.push_back(event.clone());
        // Nobody may be listening.
        let _ = self.sender.send(event);
    }

    pub(super) fn recent(&self) -> Vec<Event> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    pub(super) fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.sender.subscribe()
    }
}
