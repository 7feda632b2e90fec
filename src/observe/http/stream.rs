//! Events as they happen, as server-sent events.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;

use axum::response::Sse;
use axum::response::sse::{Event as Message, KeepAlive, KeepAliveStream};
use futures::Stream;
use futures::stream::BoxStream;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::broadcast::{self, error::RecvError};
use tokio_util::sync::CancellationToken;

use super::Served;
use crate::fleet::control::FleetControl;
use crate::fleet::status::Event;

/// What is sent of events as they happen.
pub(super) type Events = Sse<KeepAliveStream<BoxStream<'static, Result<Message, Infallible>>>>;

/// Begins a stream, after the event with the id `since` or with the next one. `place` is given back when it ends.
pub(super) fn follow(served: &Served, since: Option<u64>, place: OwnedSemaphorePermit) -> Events {
    let keep_alive = KeepAlive::new().interval(served.limits.keep_alive);
    let following = Following::new(served.fleet.clone(), since, served.cancel.clone());
    let messages: BoxStream<'static, _> = Box::pin(messages(following, place));
    Sse::new(messages).keep_alive(keep_alive)
}

fn messages(
    following: Following,
    place: OwnedSemaphorePermit,
) -> impl Stream<Item = Result<Message, Infallible>> + Send {
    futures::stream::unfold((following, place), async |(mut following, place)| {
        let item = following.next().await?;
        Some((Ok(message(&item)), (following, place)))
    })
}

fn message(item: &Item) -> Message {
    match item {
        // Events and numbers can always be written as JSON, which has no newline that could cut a line.
        Item::Event(event) => {
            Message::default().id(event.id.to_string()).data(serde_json::to_string(event).unwrap_or_default())
        }
        Item::Lagged(missed) => {
            Message::default().event("lagged").data(serde_json::json!({ "missed": missed }).to_string())
        }
    }
}

/// What a follower gets.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Item {
    /// Something has happened.
    Event(Event),
    /// So many events are lost to the follower; `None`: nobody knows how many.
    Lagged(Option<u64>),
}

/// One follower: what it has got, and what it gets next.
pub(in crate::observe) struct Following {
    fleet: Arc<dyn FleetControl>,
    receiver: broadcast::Receiver<Event>,
    /// The id of the last event that it has got, or that stands in `ready`.
    last: Option<u64>,
    ready: VecDeque<Item>,
    cancel: CancellationToken,
}

impl Following {
    pub(in crate::observe) fn new(fleet: Arc<dyn FleetControl>, since: Option<u64>, cancel: CancellationToken) -> Self {
        // In this order: what happens in between is in both, and told by its id.
        let receiver = fleet.events();
        let mut following = Self { fleet, receiver, last: None, ready: VecDeque::new(), cancel };
        if let Some(since) = since {
            following.replay(since);
        }
        following
    }

    /// Queues what came after `since`.
    fn replay(&mut self, since: u64) {
        let recent = self.fleet.recent_events();
        let newest = recent.last().map_or(0, |event| event.id);
        if since > newest {
            // Ids begin anew with each process: this one is another's.
            self.ready.push_back(Item::Lagged(None));
            self.last = Some(newest);
            self.ready.extend(recent.into_iter().map(Item::Event));
        } else {
            self.last = Some(since);
            self.catch_up(newest + 1, recent);
        }
    }

    /// Queues what lies between the last event and the one with the id `until`, and says what of it is lost.
    fn catch_up(&mut self, until: u64, recent: Vec<Event>) {
        let Some(last) = self.last else { return };
        let between: Vec<Event> = recent.into_iter().filter(|event| last < event.id && event.id < until).collect();
        let missed = (until - last - 1).saturating_sub(between.len() as u64);
        // The oldest go first, and so what is missing lies before the rest.
        if missed > 0 {
            self.ready.push_back(Item::Lagged(Some(missed)));
        }
        self.ready.extend(between.into_iter().map(Item::Event));
        self.last = Some(until - 1);
    }

    /// Queues an event, after those between it and the last one.
    fn take(&mut self, event: Event) {
        match self.last {
            Some(last) if event.id <= last => return,
            // The receiver was too slow, and the fleet may still have what it missed.
            Some(last) if event.id > last + 1 => self.catch_up(event.id, self.fleet.recent_events()),
            _ => {}
        }
        self.last = Some(event.id);
        self.ready.push_back(Item::Event(event));
    }

    /// The next item; `None` when the server or the fleet ends.
    pub(super) async fn next(&mut self) -> Option<Item> {
        loop {
            if let Some(item) = self.ready.pop_front() {
                return Some(item);
            }
            let received = tokio::select! {
                biased;
                () = self.cancel.cancelled() => return None,
                received = self.receiver.recv() => received,
            };
            match received {
                Ok(event) => self.take(event),
                // Else the gap shows at the next event's id.
                Err(RecvError::Lagged(missed)) if self.last.is_none() => {
                    self.ready.push_back(Item::Lagged(Some(missed)));
                }
                Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return None,
            }
        }
    }
}

#[cfg(test)]
impl Following {
    /// The next event's id, or how many are lost.
    pub(in crate::observe) async fn next_id(&mut self) -> Result<Option<u64>, Option<u64>> {
        match self.next().await {
            Some(Item::Event(event)) => Ok(Some(event.id)),
            Some(Item::Lagged(missed)) => Err(missed),
            None => Ok(None),
        }
    }
}
