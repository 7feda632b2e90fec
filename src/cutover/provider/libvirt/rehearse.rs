//! A stand-in for a domain: defined beside it, started, judged by its console, its agent or a command, and removed.

use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Instant;

use async_trait::async_trait;
use tokio::process::Command;

use super::super::command;
use super::super::rehearse::{Boots, Rehearse, StandIn};
use super::super::run::{also, brief, run};
use super::super::{Power, Precondition, ProviderError, Verdict};
use super::preconditions::{save_folder, size};
use super::stand_in::{Definition, Wanted, definition};
use super::virsh::{POLL, QUESTION, Virsh};
use super::{Libvirt, xml};

/// What is kept of a console's end, in bytes: a text that is waited for is found across two looks, and what went wrong
/// is told.
const TAIL: usize = 16 << 10;

/// How much of it an error tells, in bytes.
const LAST_WORDS: usize = 300;

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
        file.seek(SeekFrom::Start(self.read))?;
        let mut buffer = [0; 64 << 10];
        loop {
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
    }

    /// Its last words, for an error.
    fn last_words(&self) -> String {
        let last = &self.tail[self.tail.len().saturating_sub(LAST_WORDS)..];
        let words = brief(&String::from_utf8_lossy(last));
        if words.is_empty() { "; its console shows nothing".into() } else { format!("; its console ends: {words}") }
    }
}

impl Libvirt {
    fn virsh_of(&self, stand_in: &StandIn) -> Virsh {
        Virsh { program: self.virsh.program.clone(), domain: stand_in.name.clone(), uri: self.virsh.uri.clone() }
    }

    fn console_of(&self, stand_in: &StandIn) -> PathBuf {
        let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' };
        let name: String = stand_in.name.chars().map(plain).collect();
        self.config.save_folder.join(format!("{name}.console"))
    }

    async fn definition_of(&self, operation: &str, stand_in: &StandIn) -> Result<Definition, ProviderError> {
        let own = self.virsh.definition(operation).await?;
        let wanted = Wanted {
            name: &stand_in.name,
            disks: &self.disks,
            clones: &stand_in.disks,
            network: self.config.rehearsal.network.as_deref(),
            console: &self.console_of(stand_in),
        };
        definition(&own, &wanted).map_err(|error| self.xml_error(operation, &error))
    }

    async fn look_at_stage(&self, found: &mut Vec<Precondition>) -> Result<(), ProviderError> {
        let operation = "check";
        let what = format!("domain {}", self.virsh.domain);
        let info = self.virsh.with_domain(operation, "dominfo", &[], QUESTION).await?;
        // Read as for the real one: whatever can't be is found before anything is made.
        let nobody = StandIn { name: "check".into(), server: String::new(), disks: self.disks.clone() };
        let made = self.definition_of(operation, &nobody).await?;
        let judge = &self.config.rehearsal;
        if judge.console.is_none() && judge.check.is_none() && !made.has_agent {
            let text = "nothing would say whether its stand-in has booted: give it rehearsal = { console = \"login:\" } \
                        in the plan, or a check, or a guest agent";
            found.push(Precondition::new(&what, Verdict::Error, text));
        }
        let needed = size(&info, "Max memory");
        let free = free_memory(&self.virsh.call(operation, &["nodememstats"], None, QUESTION).await?);
        if let (Some(needed), Some(free)) = (needed, free) {
            let text = format!("it has {} MiB free, and a stand-in needs {} MiB", free >> 20, needed >> 20);
            let verdict = if free < needed { Verdict::Error } else { Verdict::Ok };
            found.push(Precondition::new("memory of the host", verdict, text));
        }
        if let Some(network) = &judge.network {
            let named = format!("--network={network}");
            let xml = self.virsh.call(operation, &["net-dumpxml", &named], None, QUESTION).await?;
            let isolated = xml::network_is_isolated(&xml).map_err(|error| self.xml_error(operation, &error))?;
            let (verdict, text) = match isolated {
                true => (Verdict::Ok, "it is isolated"),
                false => {
                    (Verdict::Error, "it forwards: a stand-in has the addresses of its server; take an isolated one")
                }
            };
            found.push(Precondition::new(format!("network {network}"), verdict, text));
        }
        let uri = self.virsh.call(operation, &["uri"], None, QUESTION).await?;
        if let Some(problem) = save_folder(uri.trim(), &self.config.save_folder) {
            let place = format!("save_folder {}", self.config.save_folder.display());
            found.push(Precondition::new(place, Verdict::Error, format!("{problem}; the console is written there")));
        }
        Ok(())
    }

    /// Asks an agent whether it is there.
    async fn agent_answers(&self, virsh: &Virsh) -> bool {
        let words = ["{\"execute\": \"guest-ping\"}", "--timeout", AGENT_SECONDS];
        virsh.with_domain("rehearsal", "qemu-agent-command", &words, QUESTION).await.is_ok()
    }

    async fn run_check(&self, script: &str, stand_in: &StandIn, console: &Path) -> Result<String, ProviderError> {
        let virsh = self.virsh_of(stand_in);
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]).env("POOLSHIFT_STEP", "check").env("POOLSHIFT_SERVER", &stand_in.server);
        command.env("POOLSHIFT_DOMAIN", &stand_in.name).env("POOLSHIFT_CONSOLE", console);
        command.env("POOLSHIFT_DISKS", command::list(&stand_in.disks));
        if let Some(uri) = &self.virsh.uri {
            command.env("LIBVIRT_DEFAULT_URI", uri);
        }
        let failed = |problem: String| virsh.error("check", format!("{script:?} {problem}"), None);
        let ended = run(command, Vec::new(), self.limit()).await.map_err(|error| failed(error.to_string()))?;
        if ended.status.success() {
            return Ok(brief(&ended.output));
        }
        let said = if ended.error.trim().is_empty() { &ended.output } else { &ended.error };
        Err(failed(format!("failed ({}){}", ended.status, also(said))))
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
        // To boot, and for the command after it.
        self.config.limit + self.limit()
    }

    async fn rehearsal_preconditions(&self) -> Vec<Precondition> {
        let mut found = Vec::new();
        if let Err(error) = self.look_at_stage(&mut found).await {
            let hint = error.hint.map(|hint| format!("; {hint}")).unwrap_or_default();
            found.push(Precondition::new(error.server, Verdict::Error, format!("{}{hint}", error.problem)));
        }
        found
    }

    async fn stand_in_exists(&self, stand_in: &StandIn) -> Result<bool, ProviderError> {
        let names = self.virsh.call("look for a stand-in", &["list", "--all", "--name"], None, QUESTION).await?;
        Ok(names.lines().any(|name| name == stand_in.name))
    }

    async fn stage(&self, stand_in: &StandIn) -> Result<Vec<String>, ProviderError> {
        let operation = "start its stand-in";
        let made = self.definition_of(operation, stand_in).await?;
        let virsh = self.virsh_of(stand_in);
        virsh.define(operation, &made.xml).await?;
        virsh.with_domain(operation, "start", &[], self.limit()).await?;
        Ok(made.lacks)
    }

    async fn judge(&self, stand_in: &StandIn) -> Result<Option<String>, ProviderError> {
        let (virsh, judge, operation) = (self.virsh_of(stand_in), &self.config.rehearsal, "rehearsal");
        let (deadline, begun) = (Instant::now() + self.config.limit, Instant::now());
        let mut console = Console::new(self.console_of(stand_in));
        let ask_agent = judge.console.is_none() && judge.check.is_none();
        let mut found = Vec::new();
        loop {
            // Before the look at the console: what it wrote before it ended is seen.
            let power = virsh.power(operation).await?;
            let shows = console.shows(judge.console.as_deref().unwrap_or_default()).map_err(|error| {
                virsh.error(operation, format!("its console {}: {error}", console.path.display()), None)
            })?;
            let after = || format!("after {:.1} s", begun.elapsed().as_secs_f64());
            match &judge.console {
                Some(text) if shows => found.push(format!("its console showed {text:?} {}", after())),
                None if ask_agent && power == Power::Running && self.agent_answers(&virsh).await => {
                    found.push(format!("its agent answered {}", after()));
                }
                None if !ask_agent => {}
                _ if power != Power::Running => {
                    let problem = format!("it is {power} {}, and did not come up{}", after(), console.last_words());
                    return Err(virsh.error(operation, problem, None));
                }
                _ if Instant::now() >= deadline => {
                    let waited = self.config.limit;
                    let problem = format!("it did not come up within {waited:?}{}", console.last_words());
                    return Err(virsh.error(operation, problem, Some("raise the limit in the plan if it is slow")));
                }
                _ => {
                    tokio::time::sleep(POLL).await;
                    continue;
                }
            }
            break;
        }
        if let Some(script) = &judge.check {
            let said = self.run_check(script, stand_in, &console.path).await?;
            found.push(if said.is_empty() { "its check said so".to_owned() } else { said });
        }
        match virsh.power(operation).await? {
            Power::Running => Ok(Some(found.join("; "))),
            power => Err(virsh.error(operation, format!("it is {power} in the end{}", console.last_words()), None)),
        }
    }

    async fn strike(&self, stand_in: &StandIn) -> Result<(), ProviderError> {
        let operation = "remove its stand-in";
        let virsh = self.virsh_of(stand_in);
        if self.stand_in_exists(stand_in).await? {
            if virsh.power(operation).await? != Power::Off {
                match virsh.with_domain(operation, "destroy", &[], self.limit()).await {
                    Err(_) if virsh.power(operation).await? == Power::Off => {}
                    other => other.map(drop)?,
                }
            }
            let all = ["--nvram", "--managed-save", "--snapshots-metadata"];
            match virsh.with_domain(operation, "undefine", &all, QUESTION).await {
                Err(_) if !self.stand_in_exists(stand_in).await? => {}
                other => other.map(drop)?,
            }
        }
        let console = self.console_of(stand_in);
        match std::fs::remove_file(&console) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(virsh.error(operation, format!("{}: {error}", console.display()), None))
            }
            _ => Ok(()),
        }
    }
}

/// What is free or can be made so, in bytes, in what `virsh nodememstats` prints.
fn free_memory(stats: &str) -> Option<u64> {
    let value = |title: &str| {
        let value = stats.lines().find_map(|line| line.split_once(':').filter(|(key, _)| key.trim() == title))?.1;
        value.trim().strip_suffix("KiB")?.trim().parse::<u64>().ok()
    };
    let kept = value("cached").unwrap_or(0).saturating_add(value("buffers").unwrap_or(0));
    Some(value("free")?.saturating_add(kept).saturating_mul(1 << 10))
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
    }

    #[test]
    fn the_hosts_memory_is_read() {
        let stats =
            "total  :             24576000 KiB\nfree   :             1000 KiB\nbuffers:  10 KiB\ncached :  5 KiB\n";
        assert_eq!(free_memory(stats), Some(1015 << 10));
        assert_eq!(free_memory("nonsense"), None);
    }
}
