//! Budgets: how many bytes may be in memory, of one image and in the whole process.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Limits;

/// A number of bytes that may be in flight. Clones share it.
///
/// # Why nobody waits for ever
///
/// 1. Who waits is served in the order of arrival, and nothing is asked for that is more than the whole budget.
/// 2. A pipeline asks for one unit after the other, in the order in which it delivers them: for the next only when it
///    has what it asked for the last. So whoever holds something has all it needs for it, and every unit that must be
///    delivered before it as well; it is read, applied, and gives its share back, without asking for anything more.
///    (A verification asks for many pieces at a time, and gives each back when it is read and compared.)
/// 3. A pipeline takes from its own budget first, then from the shared one. What it holds of its own in the meantime,
///    nobody else waits for.
///
/// So a share comes back after a bounded time, as long as the storages answer, and the first in the queue gets it. A
/// volume whose target hangs, or whose throttle is low, keeps what it has: its own limit says how much that can be, and
/// should be well below the shared one.
///
/// The second point would not hold for two ends of one pipe, of which one waits for what the other holds: they must not
/// share a budget.
#[derive(Clone, Debug)]
pub struct Budget {
    free: Arc<Semaphore>,
    total: usize,
}

impl Budget {
    /// A budget of `bytes` bytes, at least one. One that is smaller than a unit (4 MiB; 8 MiB for a received batch) lets
    /// one at a time through.
    pub fn new(bytes: u64) -> Self {
        let total = usize::try_from(bytes).map_or(Semaphore::MAX_PERMITS, |bytes| bytes.min(Semaphore::MAX_PERMITS));
        let total = total.max(1);
        Self { free: Arc::new(Semaphore::new(total)), total }
    }

    /// How many bytes there are in all.
    pub fn total(&self) -> u64 {
        self.total as u64
    }

    /// How many bytes are taken.
    pub fn used(&self) -> u64 {
        self.total.saturating_sub(self.free.available_permits()) as u64
    }

    /// Waits for `bytes` bytes, or all there are. Dropping the wait gives back what was put aside for it.
    pub(crate) async fn take(&self, bytes: u64) -> Option<OwnedSemaphorePermit> {
        let wanted = u32::try_from(bytes.min(self.total())).unwrap_or(u32::MAX);
        // It is never closed.
        self.free.clone().acquire_many_owned(wanted).await.ok()
    }
}

/// The budget of one pipeline, and the one that it shares with others.
#[derive(Clone, Debug)]
pub(crate) struct Budgets {
    pub(crate) own: Budget,
    pub(crate) shared: Option<Budget>,
}

impl Budgets {
    /// The budgets of a pipeline within `limits`; its own is at least `least`, what its largest unit takes.
    pub(crate) fn new(limits: &Limits, least: u64) -> Self {
        Self { own: Budget::new(limits.bytes.max(least)), shared: limits.shared.clone() }
    }

    /// Waits for `bytes` bytes of both. To be called in the order of delivery, and for one unit at a time: see
    /// [`Budget`].
    pub(crate) async fn take(&self, bytes: u64) -> Permit {
        let own = self.own.take(bytes).await;
        self.add_shared(own, bytes).await
    }

    /// Waits for the shared part of a permit.
    pub(crate) async fn add_shared(&self, own: Option<OwnedSemaphorePermit>, bytes: u64) -> Permit {
        let shared = match &self.shared {
            Some(shared) if bytes > 0 => shared.take(bytes).await,
            _ => None,
        };
        Permit { _own: own, _shared: shared }
    }
}

/// A share of the budgets; comes back on drop.
#[derive(Debug, Default)]
pub struct Permit {
    _own: Option<OwnedSemaphorePermit>,
    _shared: Option<OwnedSemaphorePermit>,
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[test]
    fn what_is_larger_than_the_budget_takes_all_of_it() {
        let budget = Budget::new(100);
        let all = budget.take(1 << 40).now_or_never().expect("it is free");
        assert_eq!((budget.used(), budget.take(1).now_or_never().is_none()), (100, true));
        drop(all);
        assert_eq!((budget.used(), budget.total(), Budget::new(0).total()), (0, 100, 1));
        assert!(Budget::new(u64::MAX).take(u64::MAX).now_or_never().is_some());
    }

    #[test]
    fn who_waits_for_the_shared_budget_is_served_in_order_and_gives_back_what_it_had_when_dropped() {
        let shared = Budget::new(10);
        let limits = Limits { bytes: 8, shared: Some(shared.clone()), ..Limits::default() };
        let (one, two) = (Budgets::new(&limits, 1), Budgets::new(&limits, 1));
        let held = one.take(8).now_or_never().expect("it is free");
        {
            let mut waiting = Box::pin(two.take(6));
            assert!(waiting.as_mut().now_or_never().is_none());
            // Two bytes are free, and put aside for the one who came first.
            assert!(shared.take(1).now_or_never().is_none());
            assert_eq!(two.own.used(), 6);
        }
        assert_eq!((two.own.used(), shared.used()), (0, 8));
        let nothing = two.take(0).now_or_never();
        assert!(nothing.is_some());
        drop((held, nothing));
        assert_eq!((one.own.used(), shared.used()), (0, 0));
    }
}
