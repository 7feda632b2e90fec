//! Failpoints: named places in durable steps at which a test kills or stops the process.
//!
//! A place is marked with [`failpoint!`], named `AREA.STEP[.DETAIL]` in lower case: `cutover.final-delta`,
//! `switch.retype.source`, `openstack.shelve-server`. It stands where a crash is of interest: right after something was
//! made durable, or right before the next step.
//!
//! Only builds with `debug_assertions` contain failpoints; release builds contain neither the names nor the code. A
//! debug build reads the variable `POOLSHIFT_FAILPOINT` once:
//!
//! ```text
//! POOLSHIFT_FAILPOINT=NAME[#COUNT]=ACTION[;NAME[#COUNT]=ACTION ...]
//! ```
//!
//! ACTION is `kill` (the process sends itself SIGKILL) or `stop` (SIGSTOP; it goes on after SIGCONT). COUNT chooses the
//! COUNT-th time that the place is reached, the first being 1, which is the default. A test knows that the place was
//! reached by the signal: a place that no longer exists leaves a process that ends by itself, and the test fails.
//!
//! Unit tests arm the places of their own thread instead ([`script`]).

/// Marks a failpoint in async code. The arguments are those of [`format!`], and are evaluated in debug builds only.
macro_rules! failpoint {
    ($($name:tt)+) => {{
        #[cfg(debug_assertions)]
        $crate::failpoint::reach(&format!($($name)+)).await;
    }};
}
pub(crate) use failpoint;

#[cfg(debug_assertions)]
mod armed {
    use std::collections::HashMap;
    use std::sync::{LazyLock, Mutex, PoisonError};
    use std::time::Duration;

    use rustix::process::{Signal, getpid, kill_process};

    /// How long a signal may take until it has stopped all threads.
    const TAKES_EFFECT: Duration = Duration::from_millis(200);

    /// What is done at a failpoint, and how often it has to be reached before.
    struct Armed {
        name: String,
        count: u64,
        signal: Signal,
    }

    impl Armed {
        /// Parses `NAME[#COUNT]=ACTION`.
        fn parse(text: &str) -> Option<Self> {
            let (place, action) = text.split_once('=')?;
            let (name, count) = match place.split_once('#') {
                Some((name, count)) => (name, count.parse().ok()?),
                None => (place, 1),
            };
            let signal = match action {
                "kill" => Signal::KILL,
                "stop" => Signal::STOP,
                _ => return None,
            };
            Some(Self { name: name.to_owned(), count, signal })
        }
    }

    static ARMED: LazyLock<Vec<Armed>> = LazyLock::new(|| {
        let text = std::env::var("POOLSHIFT_FAILPOINT").unwrap_or_default();
        let parse = |one| Armed::parse(one).unwrap_or_else(|| panic!("POOLSHIFT_FAILPOINT can't be read: {one:?}"));
        text.split(';').filter(|one| !one.is_empty()).map(parse).collect()
    });
    static REACHED: LazyLock<Mutex<HashMap<String, u64>>> = LazyLock::new(Mutex::default);

    /// Sends this process the signal that is armed for this failpoint, if one is.
    pub(crate) fn reach_blocking(name: &str) {
        if ARMED.is_empty() {
            return;
        }
        let count = {
            let mut reached = REACHED.lock().unwrap_or_else(PoisonError::into_inner);
            let count = reached.entry(name.to_owned()).or_default();
            *count += 1;
            *count
        };
        if let Some(armed) = ARMED.iter().find(|armed| armed.name == name && armed.count == count) {
            let _ = kill_process(getpid(), armed.signal);
            // The kernel may give the signal to another thread: this one goes no further until it has taken effect.
            std::thread::sleep(TAKES_EFFECT);
        }
    }

    /// The same in async code; in unit tests the future never completes where the thread's script ends the process.
    pub(crate) async fn reach(name: &str) {
        reach_blocking(name);
        #[cfg(test)]
        super::script::reach(name).await;
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn arms_a_place_by_name_count_and_action() {
            let parsed = |text| Armed::parse(text).map(|armed| (armed.name, armed.count, armed.signal == Signal::KILL));
            assert_eq!(parsed("a.b=kill"), Some(("a.b".into(), 1, true)));
            assert_eq!(parsed("a.b#3=stop"), Some(("a.b".into(), 3, false)));
            assert_eq!(["a.b", "a.b=explode", "a#x=kill"].map(parsed), [None, None, None]);
        }
    }
}
#[cfg(debug_assertions)]
#[allow(unused_imports, reason = "places in blocking code are few")]
pub(crate) use armed::{reach, reach_blocking};

/// The failpoints of one thread's unit tests: a simulated process is killed at the N-th place that it reaches.
#[cfg(all(test, debug_assertions))]
pub(crate) mod script {
    use std::cell::RefCell;
    use std::sync::Arc;

    use tokio::sync::Notify;

    #[derive(Default)]
    struct Script {
        reached: Vec<String>,
        kill_at: Option<usize>,
        /// The name of the only places that count for `kill_at`; `None`: all of them.
        name: Option<&'static str>,
        killed: Arc<Notify>,
    }

    thread_local! {
        static SCRIPT: RefCell<Script> = RefCell::default();
    }

    /// Begins to count anew; the process ends at the `kill_at`-th place, the first being 1.
    pub(crate) fn begin(kill_at: Option<usize>) {
        SCRIPT.set(Script { kill_at, ..Script::default() });
    }

    /// The same, at the `kill_at`-th place of that name.
    pub(crate) fn begin_at(name: &'static str, kill_at: usize) {
        SCRIPT.set(Script { kill_at: Some(kill_at), name: Some(name), ..Script::default() });
    }

    /// The places that were reached since [`begin`] or [`begin_at`], in their order.
    pub(crate) fn reached() -> Vec<String> {
        SCRIPT.with_borrow(|script| script.reached.clone())
    }

    /// Completes when the process has been killed: whoever runs it drops it then.
    pub(crate) async fn killed() {
        let killed = SCRIPT.with_borrow(|script| Arc::clone(&script.killed));
        killed.notified().await;
    }

    pub(super) async fn reach(name: &str) {
        let dies = SCRIPT.with_borrow_mut(|script| {
            script.reached.push(name.to_owned());
            let counts = |place: &str| script.name.is_none_or(|only| only == place);
            let so_far = script.reached.iter().filter(|place| counts(place)).count();
            let dies = counts(name) && script.kill_at == Some(so_far);
            if dies {
                script.killed.notify_one();
            }
            dies
        });
        if dies {
            std::future::pending::<()>().await;
        }
    }
}
