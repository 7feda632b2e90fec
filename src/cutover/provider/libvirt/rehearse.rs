//! A stand-in for a domain: defined beside it, started, judged by its console, its agent or a command, and removed.

use std::ffi::OsStr;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Instant;

use async_trait::async_trait;

use super::super::rehearse::{Boots, Judgement, Rehearse, Staged, StandIn, check, last_words};
use super::super::{Power, Precondition, ProviderError, Verdict};
use super::preconditions::{field, save_folder, size};
use super::stand_in::{Definition, Wanted, definition, id_in, is_on};
use super::virsh::{POLL, QUESTION, Virsh};
use super::xml::Domain;
use super::{Libvirt, xml};
use crate::failpoint::failpoint;

/// What is kept of a console's end, in bytes: a text that is waited for is found across two looks, and what went wrong
/// is told.
const TAIL: usize = 16 << 10;

/// How much of a console is read at a look, in bytes.
const LOOK: usize = 1 << 20;

/// What a stand-in needs beside its memory, in bytes: QEMU itself, and the caches of its images.
const MEMORY_SPARE: u64 = 512 << 20;

/// What virtlogd calls the older parts of a file, unless it was told to keep more.
const ROTATED: [&str; 4] = ["", ".0", ".1", ".2"];

/// How long an agent may take to answer, in seconds.
const AGENT_SECONDS: &str = "5";

/// A console's file, read as it grows.
struct Console {
    path: PathBuf,
    read: u64,
    tail: Vec<u8>,
}

impl Console {
    fn new(path: PathBuf) -> Self {
        Self { path, read: 0, tail: Vec::new() }
    }

    /// Reads what is new, and says whether `wanted` is in it, or began before it.
    fn shows(&mut self, wanted: &str) -> io::Result<bool> {
        let mut file = match std::fs::File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        // virtlogd begins a file anew when it is long.
        if file.metadata()?.len() < self.read {
            self.read = 0;
        }
        file.seek(SeekFrom::Start(self.read))?;
        let mut buffer = [0; 64 << 10];
        for _ in 0..LOOK / buffer.len() {
            let length = file.read(&mut buffer)?;
            if length == 0 {
                return Ok(false);
            }
            self.read += length as u64;
            self.tail.extend_from_slice(&buffer[..length]);
            let shows = |window: &[u8]| window == wanted.as_bytes();
            let found = !wanted.is_empty() && self.tail.windows(wanted.len()).any(shows);
            self.tail.drain(..self.tail.len().saturating_sub(TAIL.max(wanted.len())));
            if found {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Its last words, for an error.
    fn last_words(&self) -> String {
        last_words(&self.tail)
    }
}

impl Libvirt {
    fn virsh_of(&self, stand_in: &StandIn) -> Virsh {
        Virsh { program: self.virsh.program.clone(), domain: stand_in.name.clone(), uri: self.virsh.uri.clone() }
    }

    fn console_of(&self, stand_in: &StandIn) -> PathBuf {
        let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' };
        let name: String = stand_in.name.chars().map(plain).collect();
        self.config.save_folder.join(format!("{name}.{}.console", stand_in.id))
    }

    /// The stand-in of the domain, whose own definition is `own`.
    fn definition_of(&self, operation: &str, own: &str, stand_in: &StandIn) -> Result<Definition, ProviderError> {
        let wanted = Wanted {
            name: &stand_in.name,
            id: &stand_in.id,
            uuid: &new_uuid(),
            disks: &self.disks,
            clones: &stand_in.disks,
            network: self.config.rehearsal.network.as_deref(),
            console: &self.console_of(stand_in),
        };
        definition(own, &wanted).map_err(|error| self.xml_error(operation, &error))
    }

    async fn look_at_stage(&self, stand_in: &StandIn, found: &mut Vec<Precondition>) -> Result<(), ProviderError> {
        let operation = "check";
        let what = format!("domain {}", self.virsh.domain);
        let mut wrong = |what: &str, text: String| found.push(Precondition::new(what, Verdict::Error, text));
        if let Some(staged) = self.staged(stand_in).await? {
            let whose = match staged.id {
                Some(id) => format!("of rehearsal {id}, whose clones are gone"),
                None => "which poolshift has not made".to_owned(),
            };
            let name = &stand_in.name;
            wrong(&format!("domain {name}"), format!("it is there, {whose}: `virsh destroy` and `virsh undefine` it"));
        }
        let info = self.virsh.with_domain(operation, "dominfo", &[], QUESTION).await?;
        let definition = self.virsh.definition(operation).await?;
        let made = self.definition_of(operation, &definition, stand_in)?;
        let domain = Domain::read(&definition, &self.disks).map_err(|error| self.xml_error(operation, &error))?;
        for disk in domain.disks.iter().filter(|disk| disk.volume.is_some()) {
            if let Some(more) = disk.more {
                wrong(&format!("disk {}", disk.device), format!("{} {more}: it can't be rehearsed", disk.image));
            }
        }
        let judge = &self.config.rehearsal;
        if judge.console.is_none() && judge.check.is_none() && !made.has_agent {
            let text = "nothing would say whether its stand-in has booted: give it rehearsal = { console = \"login:\" } \
                        in the plan, or a check, or a guest agent";
            wrong(&what, text.to_owned());
        }
        let uri = self.virsh.call(operation, &["uri"], None, QUESTION).await?;
        if let Some(problem) = save_folder(uri.trim(), &self.config.save_folder) {
            let place = format!("save_folder {}", self.config.save_folder.display());
            wrong(&place, format!("{problem}; the console is written there"));
        } else if let (Some(memory), Some(free)) = (size(&info, "Max memory"), free_memory()) {
            let needed = memory.saturating_add(MEMORY_SPARE);
            if free < needed {
                let text = format!("{} MiB are available, and a stand-in needs {} MiB", free >> 20, needed >> 20);
                wrong("memory of the host", text);
            }
        }
        if let Some(network) = &judge.network {
            self.look_at_network(operation, network, &definition, &mut wrong).await?;
        }
        Ok(())
    }

    async fn look_at_network(
        &self,
        operation: &str,
        network: &str,
        definition: &str,
        wrong: &mut impl FnMut(&str, String),
    ) -> Result<(), ProviderError> {
        let (what, named) = (format!("network {network}"), format!("--network={network}"));
        let xml = self.virsh.call(operation, &["net-dumpxml", &named], None, QUESTION).await?;
        let unreadable = |error| self.xml_error(operation, &error);
        let (isolated, bridge) = xml::network(&xml).map_err(unreadable)?;
        if !isolated {
            wrong(&what, "it forwards, and a stand-in has the addresses of its server: take an isolated one".into());
        }
        if is_on(definition, network, bridge.as_deref()).map_err(unreadable)? {
            wrong(&what, format!("domain {} is on it, with the same addresses: take another", self.virsh.domain));
        }
        let info = self.virsh.call(operation, &["net-info", &named], None, QUESTION).await?;
        if field(&info, "Active") != Some("yes") {
            wrong(&what, format!("it is not active: virsh net-start {network}"));
        }
        Ok(())
    }

    /// Asks an agent whether it is there.
    async fn agent_answers(&self, virsh: &Virsh) -> bool {
        let words = ["{\"execute\": \"guest-ping\"}", "--timeout", AGENT_SECONDS];
        virsh.with_domain("rehearsal", "qemu-agent-command", &words, QUESTION).await.is_ok()
    }

    async fn run_check(&self, script: &str, stand_in: &StandIn, console: &Path) -> Judgement {
        let uri = self.virsh.uri.iter().map(|uri| ("LIBVIRT_DEFAULT_URI", OsStr::new(uri)));
        let more: Vec<_> = uri.chain([("POOLSHIFT_DOMAIN", OsStr::new(&stand_in.name))]).collect();
        check(script, stand_in, (console, &more), self.limit()).await
    }

    /// Waits until it has booted, as far as the plan has somebody to ask: by what it is known, `Err` with why not.
    async fn booted(
        &self,
        virsh: &Virsh,
        console: &mut Console,
    ) -> Result<Result<Option<String>, String>, ProviderError> {
        let (judge, operation, begun) = (&self.config.rehearsal, "rehearsal", Instant::now());
        if judge.console.is_none() && judge.check.is_some() {
            return Ok(Ok(None));
        }
        loop {
            // Before the look at the console: what it wrote before it ended is seen.
            let power = virsh.power(operation).await?;
            let shows = console.shows(judge.console.as_deref().unwrap_or_default()).map_err(|error| {
                virsh.error(operation, format!("its console {}: {error}", console.path.display()), None)
            })?;
            let after = format!("after {:.1} s", begun.elapsed().as_secs_f64());
            match &judge.console {
                Some(text) if shows => return Ok(Ok(Some(format!("its console showed {text:?} {after}")))),
                None if power == Power::Running && self.agent_answers(virsh).await => {
                    return Ok(Ok(Some(format!("its agent answered {after}"))));
                }
                _ if power != Power::Running => {
                    return Ok(Err(format!("it is {power} {after}, and did not come up{}", console.last_words())));
                }
                _ if begun.elapsed() >= self.config.limit => {
                    let limit = self.config.limit;
                    let cure = "raise the limit in the plan if it is slow";
                    return Ok(Err(format!("it did not come up within {limit:?} ({cure}){}", console.last_words())));
                }
                _ => tokio::time::sleep(POLL).await,
            }
        }
    }
}

#[async_trait]
impl Rehearse for Libvirt {
    fn boots(&self) -> Boots {
        Boots::Provider
    }

    fn runs_as(&self) -> Option<&str> {
        Some(&self.virsh.domain)
    }

    fn rehearsal_limit(&self) -> std::time::Duration {
        // To be started, to boot, and to be checked.
        self.config.limit + self.limit() * 2
    }

    async fn rehearsal_preconditions(&self, stand_in: &StandIn) -> Vec<Precondition> {
        let mut found = Vec::new();
        if let Err(error) = self.look_at_stage(stand_in, &mut found).await {
            found.push(Precondition::failed(error.server.clone(), error));
        }
        found
    }

    async fn staged(&self, stand_in: &StandIn) -> Result<Option<Staged>, ProviderError> {
        let (virsh, operation) = (self.virsh_of(stand_in), "look for a stand-in");
        let names = virsh.call(operation, &["list", "--all", "--name"], None, QUESTION).await?;
        if !names.lines().any(|name| name == stand_in.name) {
            return Ok(None);
        }
        let xml = virsh.with_domain(operation, "dumpxml", &["--inactive"], QUESTION).await?;
        Ok(Some(Staged { id: id_in(&xml).map_err(|error| virsh.error(operation, error.to_string(), None))? }))
    }

    async fn stage(&self, stand_in: &StandIn) -> Result<Vec<String>, ProviderError> {
        let operation = "start its stand-in";
        let own = self.virsh.definition(operation).await?;
        let made = self.definition_of(operation, &own, stand_in)?;
        let virsh = self.virsh_of(stand_in);
        virsh.define(operation, &made.xml).await?;
        failpoint!("rehearsal.defined");
        virsh.with_domain(operation, "start", &[], self.limit()).await?;
        Ok(made.lacks)
    }

    async fn judge(&self, stand_in: &StandIn) -> Result<Judgement, ProviderError> {
        let (virsh, operation) = (self.virsh_of(stand_in), "rehearsal");
        let mut console = Console::new(self.console_of(stand_in));
        let mut found = match self.booted(&virsh, &mut console).await? {
            Ok(found) => found,
            Err(problem) => return Ok(Judgement::NotWell(problem)),
        };
        if let Some(script) = &self.config.rehearsal.check {
            match self.run_check(script, stand_in, &console.path).await {
                Judgement::Well(said) => found = Some(found.map_or(said.clone(), |found| format!("{found}; {said}"))),
                other => return Ok(other),
            }
        }
        match virsh.power(operation).await? {
            Power::Running => Ok(Judgement::Well(found.unwrap_or_default())),
            power => Ok(Judgement::NotWell(format!("it is {power} in the end{}", console.last_words()))),
        }
    }

    async fn strike(&self, stand_in: &StandIn) -> Result<(), ProviderError> {
        let (virsh, operation) = (self.virsh_of(stand_in), "remove its stand-in");
        let is_ours = |staged: Option<Staged>| staged.is_some_and(|staged| staged.id.as_ref() == Some(&stand_in.id));
        if is_ours(self.staged(stand_in).await?) {
            if virsh.power(operation).await? != Power::Off {
                virsh.destroy(operation, self.limit()).await?;
            }
            let all = ["--nvram", "--managed-save", "--snapshots-metadata"];
            match virsh.with_domain(operation, "undefine", &all, QUESTION).await {
                Err(_) if !is_ours(self.staged(stand_in).await?) => {}
                other => other.map(drop)?,
            }
        }
        let console = self.console_of(stand_in);
        for rotated in ROTATED {
            let file = format!("{}{rotated}", console.display());
            match std::fs::remove_file(&file) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(virsh.error(operation, format!("{file} can't be removed: {error}"), None));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// A UUID that nobody else has (RFC 9562, version 4).
fn new_uuid() -> String {
    let random = fastrand::u128(..) & !(0xf << 76) & !(0x3 << 62) | (0x4 << 76) | (0x2 << 62);
    let hex = format!("{random:032x}");
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// What memory of this host is free or can be made so, in bytes (`MemAvailable` in proc_meminfo(5)).
fn free_memory() -> Option<u64> {
    available(&std::fs::read_to_string("/proc/meminfo").ok()?)
}

fn available(meminfo: &str) -> Option<u64> {
    let value = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    value.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1 << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_found_on_a_console_across_two_looks() {
        let folder = tempfile::tempdir().unwrap();
        let mut console = Console::new(folder.path().join("c"));
        assert!(!console.shows("login:").unwrap());
        let write = |text: &[u8]| {
            let mut file = std::fs::OpenOptions::new().create(true).append(true).open(folder.path().join("c")).unwrap();
            io::Write::write_all(&mut file, text).unwrap();
        };
        write(&[b'x'; 200_000]);
        write(b"\xff\x1b[2Jlog");
        assert!(!console.shows("login:").unwrap());
        assert!(console.last_words().ends_with("[2Jlog"), "{}", console.last_words());
        assert!(console.tail.len() <= TAIL);
        write(b"in: ");
        assert!(console.shows("login:").unwrap());
        // Begun anew, as virtlogd does it.
        std::fs::write(folder.path().join("c"), "up\n").unwrap();
        assert!(console.shows("up").unwrap());
    }

    #[test]
    fn the_hosts_memory_is_read() {
        assert_eq!(available("MemTotal:  9 kB\nMemAvailable:   1015 kB\n"), Some(1015 << 10));
        assert_eq!(available("nonsense"), None);
        assert!(free_memory().is_some());
    }

    #[test]
    fn a_uuid_is_of_version_4() {
        let (one, other) = (new_uuid(), new_uuid());
        assert!(one != other && one.len() == 36 && one.as_bytes()[14] == b'4', "{one}");
        assert!(b"89ab".contains(&one.as_bytes()[19]), "{one}");
    }
}
