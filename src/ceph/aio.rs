//! Asynchronous requests as futures.
//!
//! librbd calls back on its own threads, one at a time for each image, so that the callback does no more than hand the
//! result over. What the request reads from or writes to belongs to the callback until then, whether or not anybody
//! still waits: dropping the future never frees memory that librbd uses.

use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::oneshot;

use super::library::{Handle, Rbd, library};
use super::{CephError, Image, Result, check};

/// `LIBRADOS_OP_FLAG_FADVISE_SEQUENTIAL | LIBRADOS_OP_FLAG_FADVISE_NOCACHE` of `rados/librados.h`: what is read or
/// written here is not wanted a second time, so that a copy doesn't push out of an OSD's cache what the servers use.
/// `rbd export-diff` and `rbd deep cp` say the same.
const ACCESSED_ONCE: c_int = 0x8 | 0x40;

/// How many requests of an image are under way; it may be closed when there are none.
#[derive(Debug, Default)]
pub(super) struct InFlight {
    count: Mutex<usize>,
    none: Condvar,
}

impl InFlight {
    fn add(&self) {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
    }

    fn done(&self) {
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        *count -= 1;
        if *count == 0 {
            self.none.notify_all();
        }
    }

    /// Blocks until no request is under way.
    pub(super) fn wait_until_none(&self) {
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        while *count > 0 {
            count = self.none.wait(count).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// What a request owns until it completes.
struct Request<B> {
    buffer: B,
    sender: oneshot::Sender<(isize, B)>,
    in_flight: Arc<InFlight>,
    rbd: &'static Rbd,
}

/// librbd's completion callback.
unsafe extern "C" fn completed<B: Send>(completion: Handle, argument: *mut c_void) {
    // SAFETY: the argument is the box that `submit` leaked for this completion, and a completion comes once.
    let request = unsafe { Box::from_raw(argument.cast::<Request<B>>()) };
    // SAFETY: the completion is finished, and nobody else releases it; librbd allows that in its callback.
    let value = unsafe {
        let value = (request.rbd.rbd_aio_get_return_value)(completion);
        (request.rbd.rbd_aio_release)(completion);
        value
    };
    // Nobody may be waiting any more: then the buffer is freed here, where librbd is done with it.
    drop(request.sender.send((value, request.buffer)));
    request.in_flight.done();
}

impl Image {
    /// Issues a request that owns `buffer` until it completes; the future waits for it for at most `limit`. `issue`
    /// gets the image and the completion.
    fn request<B: Send + 'static, F: FnOnce(&'static Rbd, Handle, Handle) -> i32>(
        &self,
        function: &'static str,
        limit: Duration,
        buffer: B,
        issue: F,
    ) -> impl Future<Output = Result<(u64, B)>> + use<B, F> {
        let receiver = self.submit(function, buffer, issue);
        async move {
            match tokio::time::timeout(limit, receiver?).await {
                Ok(Ok((value, buffer))) => Ok((check(function, value as i64)?, buffer)),
                Ok(Err(_)) => Err(CephError::Nonsense { function, what: "no result".into() }),
                Err(_) => Err(CephError::TimedOut { function, after: limit }),
            }
        }
    }

    fn submit<B: Send + 'static>(
        &self,
        function: &'static str,
        buffer: B,
        issue: impl FnOnce(&'static Rbd, Handle, Handle) -> i32,
    ) -> Result<oneshot::Receiver<(isize, B)>> {
        let rbd = &library()?.rbd;
        let (sender, receiver) = oneshot::channel();
        let request = Box::into_raw(Box::new(Request { buffer, sender, in_flight: Arc::clone(&self.in_flight), rbd }));
        let mut completion: Handle = ptr::null_mut();
        // SAFETY: `completion` is a valid place; the argument lives until the callback takes it.
        let created =
            unsafe { (rbd.rbd_aio_create_completion)(request.cast::<c_void>(), completed::<B>, &mut completion) };
        if let Err(error) = check("rbd_aio_create_completion", created) {
            // SAFETY: without a completion there is no callback: the box is still ours.
            drop(unsafe { Box::from_raw(request) });
            return Err(error);
        }
        self.in_flight.add();
        let issued = issue(rbd, self.raw.0, completion);
        if let Err(error) = check(function, issued) {
            // SAFETY: a request that librbd refused has no callback: completion and box are still ours.
            unsafe {
                (rbd.rbd_aio_release)(completion);
                drop(Box::from_raw(request));
            }
            self.in_flight.done();
            return Err(error);
        }
        Ok(receiver)
    }

    /// Reads exactly `length` bytes at `offset`; the caller has checked that they lie within the image. `limit` counts from
    /// when the request is issued: see [`super::pace`].
    pub(crate) async fn read(&self, offset: u64, length: usize, limit: Duration) -> Result<Vec<u8>> {
        let turn = self.pace.turn("rbd_aio_read2", length, limit).await?;
        let request = {
            // Not zeroed: librbd fills all of it, or the read has failed.
            let mut buffer: Vec<u8> = Vec::with_capacity(length);
            let start = buffer.as_mut_ptr();
            self.request("rbd_aio_read2", limit, buffer, move |rbd, image, completion| {
                // SAFETY: image and completion are valid; the buffer has the room that is said and stays where it is,
                // owned by the request, until the callback.
                unsafe { (rbd.rbd_aio_read2)(image, offset, length, start.cast(), completion, ACCESSED_ONCE) }
            })
        };
        let answer = request.await;
        turn.answered(limit);
        let (read, mut buffer) = answer?;
        if read != length as u64 {
            let what = format!("{read} bytes instead of {length}");
            return Err(CephError::Nonsense { function: "rbd_aio_read2", what });
        }
        // SAFETY: it was made with that capacity, and librbd has written as many bytes: holes as zeroes.
        unsafe { buffer.set_len(length) };
        Ok(buffer)
    }

    /// Writes `data` at `offset`; the caller has checked that it lies within the image, because librbd clips in
    /// silence. `limit` counts from when the request is issued: see [`super::pace`].
    pub(crate) async fn write(&self, offset: u64, data: Bytes, limit: Duration) -> Result<()> {
        let turn = self.pace.turn("rbd_aio_write2", data.len(), limit).await?;
        let request = {
            let (start, length) = (data.as_ptr(), data.len());
            self.request("rbd_aio_write2", limit, data, move |rbd, image, completion| {
                // SAFETY: image and completion are valid; the data is as long as said and stays where it is, owned by
                // the request, until the callback.
                unsafe { (rbd.rbd_aio_write2)(image, offset, length, start.cast(), completion, ACCESSED_ONCE) }
            })
        };
        let answer = request.await;
        turn.answered(limit);
        answer.map(drop)
    }

    /// Makes a range read as zeroes, freeing whole objects.
    pub(crate) async fn write_zeroes(&self, offset: u64, length: usize, limit: Duration) -> Result<()> {
        let request = self.request("rbd_aio_write_zeroes", limit, (), |rbd, image, completion| {
            // SAFETY: image and completion are valid.
            unsafe { (rbd.rbd_aio_write_zeroes)(image, offset, length, completion, 0, 0) }
        });
        request.await.map(drop)
    }

    /// Makes every completed write durable.
    pub(crate) async fn flush(&self, limit: Duration) -> Result<()> {
        let request = self.request("rbd_aio_flush", limit, (), |rbd, image, completion| {
            // SAFETY: image and completion are valid.
            unsafe { (rbd.rbd_aio_flush)(image, completion) }
        });
        request.await.map(drop)
    }
}
