//! The bridge from async tasks to the rayon pool.

use tokio::sync::oneshot;

/// Runs `work` on the rayon pool and waits for it without blocking the async worker.
///
/// # Panics
/// If `work` panics: the panic is raised again in the caller's task.
pub async fn on_cpu<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (send, receive) = oneshot::channel();
    rayon::spawn(move || {
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
