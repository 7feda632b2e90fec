//! `poolshift demo`: the whole story on files. Whatever it shows is done by the code of `sync` and `verify`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context as _;

use super::config::{Create, Demo, StartOver, Sync, UsageError, Verify};
use super::exit::Exit;
use super::values::human_bytes;
use super::{Context, output, sync, verify};
use crate::batch::CompressionChoice;
use crate::image::ImageSpec;
use crate::replicate::SyncReport;

mod content;

/// How many cycles run beside the server before it is stopped for the last one.
const CYCLES: usize = 4;

/// The disk is the same at each demonstration.
const SEED: u64 = 20_261_123;

/// Bytes in flight.
const MEMORY: u64 = 64 << 20;

/// Runs the command.
pub(super) async fn run(context: &Context<'_>, demo: &Demo) -> anyhow::Result<Exit> {
    let temporary = match &demo.dir {
        Some(_) => None,
        None => Some(tempfile::Builder::new().prefix("poolshift-demo-").tempdir()?),
    };
    let folder = demo.dir.clone().unwrap_or_else(|| temporary.as_ref().map_or_else(PathBuf::new, |t| t.path().into()));
    std::fs::create_dir_all(&folder).with_context(|| format!("{} can't be made", folder.display()))?;
    let story = Story {
        context,
        sata: ImageSpec::File { path: folder.join("sata.img"), snapshot: None },
        sas: ImageSpec::File { path: folder.join("sas.img"), snapshot: None },
    };
    let exit = story.tell(&folder.join("sata.img"), demo.size).await?;
    if temporary.is_none() {
        say(&format!("\nBoth disks are left in {}.", folder.display()))?;
    }
    Ok(exit)
}

struct Story<'a> {
    context: &'a Context<'a>,
    sata: ImageSpec,
    sas: ImageSpec,
}

impl Story<'_> {
    async fn tell(&self, disk: &Path, size: u64) -> anyhow::Result<Exit> {
        if disk.exists() {
            let text = format!("{} is there already: name a new or empty folder", disk.display());
            return Err(UsageError(text).into());
        }
        let path = disk.to_owned();
        tokio::task::spawn_blocking(move || content::create(&path, size, SEED))
            .await?
            .with_context(|| format!("{} can't be made", disk.display()))?;
        say(&format!("A \"SATA\" disk of {}, and a server that keeps writing to it:\n", human_bytes(size)))?;
        let server = content::Server::start(disk, SEED)?;

        let mut moved = 0;
        for number in 1..=CYCLES {
            let report = self.cycle().await?;
            say(&line(number, &report, &format!("; the server has written {}", human_bytes(server.written()))))?;
            moved += report.moved.bytes_written;
        }
        say("\nThe server is stopped for the last cycle:\n")?;
        let stopped = Instant::now();
        let served = tokio::task::spawn_blocking(move || server.stop()).await??;
        let last = self.cycle().await?;
        let waited = stopped.elapsed();
        say(&line(CYCLES + 1, &last, ""))?;
        moved += last.moved.bytes_written;
        anyhow::ensure!(
            last.unchanged_while_read == Some(true),
            "the disk changed during the last cycle, though the server was stopped"
        );

        say("\nBoth disks are read whole and compared:\n")?;
        let exit = self.verify().await?;
        say(&format!(
            "\nWhile {} cycles moved {}, the server wrote {} and waited for {:.2} s.",
            CYCLES + 1,
            human_bytes(moved),
            human_bytes(served),
            waited.as_secs_f64(),
        ))?;
        Ok(exit)
    }

    /// One cycle, as `poolshift sync file:…/sata.img file:…/sas.img` does it.
    async fn cycle(&self) -> anyhow::Result<SyncReport> {
        let settings = Sync {
            source: self.sata.clone(),
            target: self.sas.clone(),
            snapshot: None,
            start_over: StartOver::No,
            keep: 1,
            compress: CompressionChoice::Auto,
            dry_run: false,
            json: false,
            explain: false,
            memory: MEMORY,
            create: Create::default(),
            state_dir: None,
        };
        sync::cycle(self.context, &settings).await
    }

    /// As `poolshift verify file:…/sata.img file:…/sas.img` does it.
    async fn verify(&self) -> anyhow::Result<Exit> {
        let settings = Verify {
            source: self.sata.clone(),
            target: self.sas.clone(),
            repair: false,
            json: false,
            memory: MEMORY,
            state_dir: None,
        };
        verify::run(self.context, &settings).await
    }
}

fn line(number: usize, report: &SyncReport, note: &str) -> String {
    let moved = &report.moved;
    format!(
        "  cycle {number}: {:>9} read, {:>9} written, {:>9} zeroed, {:.2} s{note}",
        human_bytes(moved.bytes_read),
        human_bytes(moved.bytes_written),
        human_bytes(moved.bytes_zeroed),
        report.stages.until_commit_seconds,
    )
}

fn say(text: &str) -> anyhow::Result<()> {
    Ok(output::bytes(format!("{text}\n").as_bytes())?)
}
