//! Connections: how many, for how long, and their end.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::http::StatusCode;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::Sleep;
use tokio_util::sync::CancellationToken;

use super::Limits;
use super::reply::Refusal;

/// The buffer of a connection, in bytes: headers must fit into it.
const BUFFER_BYTES: usize = 64 << 10;

/// Connections that are being told that there are too many; those beyond are closed without a word.
const REFUSALS_MAX: usize = 16;

/// How long accepting rests after an error that is not the client's, such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// Serves until cancelled, and then until all connections have ended or [`Limits::grace`] is over.
pub(super) async fn run(listener: TcpListener, router: Router, limits: Limits, cancel: CancellationToken) {
    let places = Arc::new(Semaphore::new(limits.connections));
    let refusals = Arc::new(Semaphore::new(REFUSALS_MAX));
    // Whatever is left in it when this future is dropped is aborted.
    let mut tasks: JoinSet<()> = JoinSet::new();
    loop {
        let stream = tokio::select! {
            biased;
            () = cancel.cancelled() => break,
            Some(_) = tasks.join_next() => continue,
            stream = accept(&listener) => stream,
        };
        if let Ok(place) = places.clone().try_acquire_owned() {
            let (router, cancel) = (router.clone(), cancel.clone());
            tasks.spawn(async move {
                connection(stream, router, limits, cancel).await;
                drop(place);
            });
        } else if let Ok(place) = refusals.clone().try_acquire_owned() {
            tasks.spawn(async move {
                // It is gone either way.
                let _ = tokio::time::timeout(limits.patience, refuse(stream)).await;
                drop(place);
            });
        }
    }
    drop(listener);
    let all = async { while tasks.join_next().await.is_some() {} };
    if tokio::time::timeout(limits.grace, all).await.is_err() {
        tracing::debug!("the API's last requests were cut off");
    }
}

async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            Err(error) if is_clients(&error) => {}
            Err(error) => {
                tracing::warn!(%error, "the API can't accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn is_clients(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

async fn connection(stream: TcpStream, router: Router, limits: Limits, cancel: CancellationToken) {
    // Events are small and should go out at once. Where that can't be set they come a little later.
    let _ = stream.set_nodelay(true);
    let io = TokioIo::new(Patient { stream, patience: limits.patience, stalled: None });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(limits.patience).max_buf_size(BUFFER_BYTES);
    let serving = builder.serve_connection(io, TowerToHyperService::new(router));
    tokio::pin!(serving);
    let outcome = tokio::select! {
        outcome = serving.as_mut() => outcome,
        () = cancel.cancelled() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = outcome {
        tracing::debug!(%error, "a connection of the API ended early");
    }
}

/// Tells a client that there are too many, and waits until it has hung up: closing with its request unread would reset
/// the connection, and take the answer away from it.
async fn refuse(mut stream: TcpStream) -> io::Result<()> {
    let refusal =
        Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "too-many-connections", "too many connections are open")
            .hint("try again in a few seconds, or close some");
    let body = refusal.json();
    let head = format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
         cache-control: no-store\r\nretry-after: 5\r\nconnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(format!("{head}{body}").as_bytes()).await?;
    stream.shutdown().await?;
    let mut unread = [0; 1024];
    while stream.read(&mut unread).await? > 0 {}
    Ok(())
}

/// A connection that fails if its other end takes nothing for too long. hyper sees to what is read, nobody else to what
/// is written: a client that follows the events and sleeps would hold its place for good.
struct Patient {
    stream: TcpStream,
    patience: Duration,
    /// Runs while something can't be written.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl Patient {
    fn bounded(&mut self, cx: &mut Context<'_>, wrote: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if wrote.is_ready() {
            self.stalled = None;
            return wrote;
        }
        let patience = self.patience;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(patience)));
        stalled.as_mut().poll(cx).map(|()| Err(io::Error::new(io::ErrorKind::TimedOut, "the client takes no answer")))
    }
}

impl AsyncRead for Patient {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Patient {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let wrote = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.bounded(cx, wrote)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let wrote = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.bounded(cx, wrote)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
