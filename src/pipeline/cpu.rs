//! The bridge from async tasks to the rayon pool.

use tokio::sync::oneshot;

/// Runs `work` on the rayon pool and waits for it without blocking the async worker.
///
/// # Panics
/// If `work` panics: the panic is raised again in the caller's task.
pub async fn on_cpu<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (send, receive) = oneshot::channel();
    #[cfg(test)]
    let clock = hold_paused_clock();
    rayon::spawn(move || {
        #[cfg(test)]
        let _clock = clock;
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        // The caller may have gone; then nobody wants the outcome.
        let _ = send.send(outcome);
    });
    match receive.await {
        Ok(Ok(value)) => value,
        Ok(Err(panic)) => std::panic::resume_unwind(panic),
        Err(_) => unreachable!("the work always sends its outcome"),
    }
}

/// A paused clock goes on by itself whenever the runtime has nothing to do, and the runtime knows nothing of the pool: what
/// takes long there would seem to take as long as the next timer. It stands still as long as a blocking task runs: this one
/// does until what is given back is dropped.
#[cfg(test)]
fn hold_paused_clock() -> std::sync::mpsc::Sender<()> {
    let (sender, ended) = std::sync::mpsc::channel();
    tokio::task::spawn_blocking(move || ended.recv());
    sender
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test(start_paused = true)]
    async fn a_paused_clock_stands_still_meanwhile() {
        let begun = tokio::time::Instant::now();
        let work = on_cpu(|| std::thread::sleep(Duration::from_millis(50)));
        tokio::select! {
            biased;
            () = tokio::time::sleep(Duration::from_secs(3600)) => panic!("an hour has passed"),
            () = work => {}
        }
        assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    }
}
