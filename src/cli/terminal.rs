//! Standard error: progress, if it is a terminal; notes; and log lines that don't tear the progress bar.

use std::io::{IsTerminal as _, Write};
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use super::args::LogFormat;
use super::config::Verbosity;

/// How often a bar is drawn, at most.
const DRAWS_PER_SECOND: u8 = 8;

/// Standard error, shared by everything that writes there.
#[derive(Clone, Debug)]
pub(super) struct Terminal {
    bars: MultiProgress,
    shows_progress: bool,
    is_quiet: bool,
    format: LogFormat,
}

impl Terminal {
    pub(super) fn new(verbosity: Verbosity, format: LogFormat) -> Self {
        let is_quiet = verbosity == Verbosity::Quiet;
        let shows_progress = !is_quiet && std::io::stderr().is_terminal();
        let target = if shows_progress {
            ProgressDrawTarget::stderr_with_hz(DRAWS_PER_SECOND)
        } else {
            ProgressDrawTarget::hidden()
        };
        Self { bars: MultiProgress::with_draw_target(target), shows_progress, is_quiet, format }
    }

    /// Sends log lines here from now on. `POOLSHIFT_LOG` overrides the verbosity with a filter such as
    /// `poolshift::image=trace`.
    pub(super) fn start_log(&self, verbosity: Verbosity, format: LogFormat) {
        let level = match verbosity {
            Verbosity::Quiet => "error",
            Verbosity::Normal => "warn",
            Verbosity::Info => "warn,poolshift=info",
            Verbosity::Debug => "warn,poolshift=debug",
            Verbosity::Trace => "debug,poolshift=trace",
        };
        let filter = EnvFilter::try_from_env("POOLSHIFT_LOG").unwrap_or_else(|_| EnvFilter::new(level));
        let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
        let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(self.clone());
        // Somebody who runs commands as a library may have a subscriber already: it stays.
        let _ = match format {
            LogFormat::Json => log.json().flatten_event(true).try_init(),
            LogFormat::Text if verbosity < Verbosity::Debug => {
                log.with_ansi(colours).with_target(false).without_time().try_init()
            }
            LogFormat::Text => log.with_ansi(colours).try_init(),
        };
    }

    /// A line for a person who watches; nothing if nobody does.
    pub(super) fn note(&self, text: &str) {
        if self.shows_progress {
            self.write(format!("{text}\n").as_bytes());
        }
    }

    /// Lines that are written whether somebody watches or not: what goes on, where that is half of the result.
    pub(super) fn say(&self, text: &str) {
        match self.format {
            _ if self.is_quiet => {}
            LogFormat::Text => self.write(format!("{text}\n").as_bytes()),
            LogFormat::Json => {
                self.write(format!("{}\n", serde_json::json!({"level": "INFO", "message": text})).as_bytes())
            }
        }
    }

    /// A question, whose answer is typed behind it.
    pub(super) fn ask(&self, text: &str) {
        self.write(text.as_bytes());
    }

    /// A bar of bytes, with rate and time left, which vanishes when it is dropped. Before its first
    /// [`Bar::set`] it only says that something is being done.
    pub(super) fn progress(&self, what: &str) -> Bar {
        let bar = self.bars.add(ProgressBar::no_length());
        bar.set_style(style("{spinner} {msg}"));
        bar.set_message(what.to_owned());
        if self.shows_progress {
            bar.enable_steady_tick(Duration::from_millis(250));
        }
        Bar { bar }
    }

    /// Removes the bars from the screen.
    pub(super) fn clear(&self) {
        // Nothing can be done about a terminal that can't be written.
        let _ = self.bars.clear();
    }

    fn write(&self, bytes: &[u8]) {
        // Nobody is left to be told if standard error is closed.
        self.bars.suspend(|| {
            let _ = std::io::stderr().lock().write_all(bytes);
        });
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// Awaits `work`, and calls `draw` now and then until it is done.
pub(super) async fn drawing<T>(work: impl Future<Output = T>, draw: impl Fn()) -> T {
    tokio::pin!(work);
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / u32::from(DRAWS_PER_SECOND));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            outcome = &mut work => return outcome,
            _ = ticks.tick() => draw(),
        }
    }
}

/// A progress bar.
#[derive(Debug)]
pub(super) struct Bar {
    bar: ProgressBar,
}

impl Bar {
    /// Says something else.
    pub(super) fn say(&self, text: String) {
        self.bar.set_message(text);
    }

    /// So many bytes are done, of so many.
    pub(super) fn set(&self, done_bytes: u64, total_bytes: u64) {
        if self.bar.length().is_none() {
            let known = "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta} left";
            self.bar.set_style(style(known));
        }
        self.bar.set_length(total_bytes);
        self.bar.set_position(done_bytes);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

impl<'a> MakeWriter<'a> for Terminal {
    type Writer = LogLine<'a>;

    fn make_writer(&'a self) -> LogLine<'a> {
        LogLine { terminal: self, line: Vec::new() }
    }
}

/// One log line, written as a whole.
pub(super) struct LogLine<'a> {
    terminal: &'a Terminal,
    line: Vec<u8>,
}

impl Write for LogLine<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.line.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Drop for LogLine<'_> {
    fn drop(&mut self) {
        if !self.line.is_empty() {
            self.terminal.write(&self.line);
        }
    }
}
