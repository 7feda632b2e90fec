//! virsh: with a limit, in English, and with what it said in the error.
//!
//! A process of it takes some 40 ms to start and to connect, and each command a few more; so what belongs together is
//! said to one process ([`Virsh::batch`]). virsh goes on after a command that failed, and tells of the last one only:
//! what every command printed is told from the rest by a word that virsh echoes behind it, and who has printed nothing
//! has failed. So only what prints something may be in a batch: questions, and what is said to QEMU.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::process::Command;

use super::super::run::{Ended, brief, run};
use super::super::{Power, ProviderError};

/// How long a question may take. libvirt itself waits up to 30 s for what it is doing with a domain already.
pub(super) const QUESTION: Duration = Duration::from_secs(60);

/// How often something is asked that is waited for.
pub(super) const POLL: Duration = Duration::from_millis(200);

/// The longest text that one process is given, in bytes: Linux takes 128 KiB as one argument.
const TEXT_MAX: usize = 100_000;

/// Calls virsh for one domain.
#[derive(Debug)]
pub(super) struct Virsh {
    /// `virsh`, as it is found in `PATH`.
    pub(super) program: PathBuf,
    pub(super) domain: String,
    pub(super) uri: Option<String>,
}

impl Virsh {
    pub(super) fn error(&self, operation: &str, problem: impl Into<String>, hint: Option<&str>) -> ProviderError {
        let server = format!("domain {}", self.domain);
        ProviderError { operation: operation.into(), server, problem: problem.into(), hint: hint.map(str::to_owned) }
    }

    /// Runs virsh to its end, however that is.
    async fn run(
        &self,
        operation: &str,
        words: &[&str],
        input: Option<&str>,
        limit: Duration,
    ) -> Result<Ended, ProviderError> {
        let mut command = Command::new(&self.program);
        // Its words are translated otherwise.
        command.env("LC_ALL", "C").env_remove("LANGUAGE").arg("--quiet");
        if let Some(uri) = &self.uri {
            command.args(["--connect", uri]);
        }
        command.args(words);
        let verb = verb_of(words);
        let ended = run(command, input.unwrap_or_default().into(), limit).await.map_err(|error| {
            let hint =
                "install virsh (Debian: libvirt-clients), and see with `virsh list --all` whether libvirt answers";
            self.error(operation, format!("virsh {verb}: {error}"), Some(hint))
        })?;
        if ended.cut {
            let problem = format!("virsh {verb} printed more than {} MiB", ended.output.len() >> 20);
            return Err(self.error(operation, problem, None));
        }
        Ok(ended)
    }

    /// Calls virsh and gives back what it printed. The first of `words` is virsh's command.
    pub(super) async fn call(
        &self,
        operation: &str,
        words: &[&str],
        input: Option<&str>,
        limit: Duration,
    ) -> Result<String, ProviderError> {
        let ended = self.run(operation, words, input, limit).await?;
        if !ended.status.success() {
            let problem = format!("virsh {} {}", verb_of(words), ended.failure());
            return Err(self.error(operation, problem, None));
        }
        Ok(ended.output)
    }

    /// Says all `commands` to one process of virsh, in their order, also after one that fails.
    pub(super) async fn batch(
        &self,
        operation: &str,
        commands: &[Said],
        limit: Duration,
    ) -> Result<Answers, ProviderError> {
        let (mut printed, mut error) = (Vec::new(), String::new());
        // Nothing that anybody prints has it by chance.
        let end = format!("@{:032x}", fastrand::u128(..));
        let mut rest = commands;
        while !rest.is_empty() {
            let (mut text, mut count) = (String::new(), 0);
            for Said { verb, options } in rest {
                let options: String = options.iter().map(|word| format!(" {}", quoted(word))).collect();
                if count > 0 && text.len() + options.len() > TEXT_MAX {
                    break;
                }
                text.push_str(&format!("{verb}{options}\necho {end}\n"));
                count += 1;
            }
            let ended = self.run(operation, &[&text], None, limit).await?;
            let mut pieces: Vec<&str> = ended.output.split(&end).collect();
            // Behind the last end there is nothing, or what a command printed at which virsh itself has ended.
            pieces.pop();
            let answered = |index: usize| pieces.get(index).filter(|piece| !piece.trim().is_empty());
            printed.extend((0..count).map(|index| answered(index).map(|&piece| piece.to_owned())));
            error.push_str(&ended.error);
            rest = &rest[count..];
        }
        Ok(Answers { printed, error })
    }

    fn named(&self) -> String {
        // As one word: a domain may be called `-x`.
        format!("--domain={}", self.domain)
    }

    /// A command of virsh that takes the domain, for a batch.
    pub(super) fn say(&self, verb: &'static str, options: &[&str]) -> Said {
        let named = self.named();
        let options = [named.as_str()].into_iter().chain(options.iter().copied());
        Said { verb, options: options.map(str::to_owned).collect() }
    }

    /// The question for the definition in a saved memory, for a batch.
    pub(super) fn say_of_save(&self, file: &str) -> Said {
        Said { verb: "save-image-dumpxml", options: vec![format!("--file={file}"), "--security-info".to_owned()] }
    }

    /// Something for QEMU, for a batch.
    pub(super) fn say_to_qemu(&self, execute: &str, arguments: Option<Value>) -> Said {
        self.say("qemu-monitor-command", &[&to_qemu(execute, arguments)])
    }

    /// Calls a command of virsh that takes the domain.
    pub(super) async fn with_domain(
        &self,
        operation: &str,
        verb: &str,
        options: &[&str],
        limit: Duration,
    ) -> Result<String, ProviderError> {
        let named = self.named();
        let words: Vec<&str> = [verb, &named].into_iter().chain(options.iter().copied()).collect();
        self.call(operation, &words, None, limit).await
    }

    /// What the domain is doing, and whether libvirt is in the middle of saving or starting it.
    async fn state(&self, operation: &str) -> Result<(Power, bool), ProviderError> {
        let state = self.with_domain(operation, "domstate", &["--reason"], QUESTION).await?;
        state_in(&state)
            .ok_or_else(|| self.error(operation, format!("virsh domstate printed {:?}", brief(&state)), None))
    }

    /// What the domain is doing.
    pub(super) async fn power(&self, operation: &str) -> Result<Power, ProviderError> {
        Ok(self.state(operation).await?.0)
    }

    /// Whether libvirt is at something long with a domain that stands still.
    async fn has_job(&self, operation: &str) -> Result<bool, ProviderError> {
        match self.with_domain(operation, "domjobinfo", &[], QUESTION).await {
            Ok(job) => Ok(!is_no_job(&job)),
            // It has gone meanwhile.
            Err(_) if self.power(operation).await? == Power::Off => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// What the domain is doing when libvirt is not at it: one that is being saved or restored stands still, and what
    /// it is then is not known before that is over. libvirt goes on when the virsh that asked for it was killed.
    pub(super) async fn power_at_rest(&self, operation: &str, limit: Duration) -> Result<Power, ProviderError> {
        let deadline = Instant::now() + limit;
        // A restore has no job, and a save has one longer than its state says.
        let mut idle = false;
        loop {
            let (power, busy) = self.state(operation).await?;
            if power != Power::Suspended || (idle && !busy) {
                return Ok(power);
            }
            idle = !busy && !self.has_job(operation).await?;
            if idle {
                // Its state is asked once more, as the job may have ended between the two questions.
                continue;
            }
            if Instant::now() >= deadline {
                let problem = format!("libvirt is still busy with it after {limit:?}");
                return Err(self.error(operation, problem, Some("see with what: virsh domjobinfo")));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// The definition that it starts from, with its passwords.
    pub(super) async fn definition(&self, operation: &str) -> Result<String, ProviderError> {
        self.with_domain(operation, "dumpxml", &["--inactive", "--security-info"], QUESTION).await
    }

    /// Ends a domain in memory whose memory is not needed any more.
    pub(super) async fn destroy(&self, operation: &str, limit: Duration) -> Result<(), ProviderError> {
        match self.with_domain(operation, "destroy", &[], limit).await {
            Err(_) if self.power(operation).await? == Power::Off => Ok(()),
            other => other.map(drop),
        }
    }

    /// Gives it another definition.
    pub(super) async fn define(&self, operation: &str, xml: &str) -> Result<(), ProviderError> {
        // Through a pipe: nothing of its passwords is left in a file.
        self.call(operation, &["define", "--file=/dev/stdin"], Some(xml), QUESTION).await.map(drop)
    }

    /// The definition in a saved memory; `None` if it was not saved to its end.
    pub(super) async fn saved_definition(&self, operation: &str, file: &str) -> Result<Option<String>, ProviderError> {
        let Said { verb, options } = self.say_of_save(file);
        let words: Vec<&str> = [verb].into_iter().chain(options.iter().map(String::as_str)).collect();
        match self.call(operation, &words, None, QUESTION).await {
            Ok(xml) => Ok(Some(xml)),
            Err(error) if error.problem.contains("save image is incomplete") => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Has QEMU do something, and gives back its answer.
    pub(super) async fn qemu(
        &self,
        operation: &str,
        execute: &str,
        arguments: Option<Value>,
    ) -> Result<Value, ProviderError> {
        let command = to_qemu(execute, arguments);
        let text = self.with_domain(operation, "qemu-monitor-command", &[&command], QUESTION).await?;
        self.qemu_said(operation, execute, &text)
    }

    /// What QEMU's answer says.
    pub(super) fn qemu_said(&self, operation: &str, execute: &str, text: &str) -> Result<Value, ProviderError> {
        let wrong = |what: &str| self.error(operation, format!("QEMU's {execute}: {what}"), None);
        let mut answer: Value =
            serde_json::from_str(text).map_err(|error| wrong(&format!("{error} in {:?}", brief(text))))?;
        if let Some(error) = answer.get("error") {
            let said = error.get("desc").and_then(Value::as_str).unwrap_or("an error without words");
            return Err(wrong(&brief(said)));
        }
        match answer.get_mut("return") {
            Some(answer) => Ok(answer.take()),
            None => Err(wrong(&format!("neither an answer nor an error: {:?}", brief(text)))),
        }
    }
}

/// A command of a batch.
#[derive(Debug)]
pub(super) struct Said {
    pub(super) verb: &'static str,
    pub(super) options: Vec<String>,
}

/// What was answered to a batch.
#[derive(Debug, Default)]
pub(super) struct Answers {
    /// What each command printed; `None` where that is nothing: it failed, or virsh ended before it.
    printed: Vec<Option<String>>,
    /// What all of them wrote to standard error.
    pub(super) error: String,
}

impl Answers {
    /// What the command of that number printed.
    pub(super) fn get(&self, index: usize) -> Option<&str> {
        self.printed.get(index)?.as_deref()
    }
}

fn verb_of<'w>(words: &[&'w str]) -> &'w str {
    words.first().and_then(|word| word.split_whitespace().next()).unwrap_or_default()
}

/// A word as virsh reads it, whatever is in it.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

fn to_qemu(execute: &str, arguments: Option<Value>) -> String {
    let mut command = serde_json::json!({ "execute": execute });
    if let Some(arguments) = arguments {
        command["arguments"] = arguments;
    }
    command.to_string()
}

/// What `virsh domstate --reason` says: what the domain is doing, and whether libvirt is in the middle of saving or
/// starting it.
fn state_in(text: &str) -> Option<(Power, bool)> {
    let (word, reason) = text.trim().split_once(" (").unwrap_or((text.trim(), ""));
    match word {
        "running" | "idle" | "blocked" | "in shutdown" => Some((Power::Running, false)),
        "paused" => Some((Power::Suspended, matches!(reason, "starting up)" | "saving)"))),
        "pmsuspended" | "crashed" => Some((Power::Suspended, false)),
        "shut off" => Some((Power::Off, false)),
        _ => None,
    }
}

/// Whether `virsh domjobinfo` says that libvirt is at nothing.
fn is_no_job(text: &str) -> bool {
    text.lines().any(|line| line.split_whitespace().eq(["Job", "type:", "None"]))
}

/// What [`Virsh::power_at_rest`] finds, by three questions that were asked in this order: the state, the job, and the
/// state once more. `None` where libvirt is at something, or one was not answered.
pub(super) fn at_rest(before: Option<&str>, job: Option<&str>, after: Option<&str>) -> Option<Power> {
    match state_in(after?)? {
        (Power::Suspended, false) => {
            let stood_still = state_in(before?)? == (Power::Suspended, false);
            (stood_still && is_no_job(job?)).then_some(Power::Suspended)
        }
        (Power::Suspended, true) => None,
        (power, _) => Some(power),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_domain_is_at_rest_when_nothing_says_that_libvirt_is_at_it() {
        let (paused, saving) = (Some("paused (user)\n"), Some("paused (saving)\n"));
        let (none, job) = (Some("Job type:         None        \n\n"), Some("Job type:         Unbounded   \n"));
        assert_eq!(at_rest(paused, none, paused), Some(Power::Suspended));
        for busy in [
            (saving, none, paused),
            (paused, job, paused),
            (paused, none, saving),
            (Some("running (booted)\n"), none, paused),
            (None, none, paused),
            (paused, None, paused),
            (paused, none, None),
            (paused, none, Some("bewitched\n")),
        ] {
            assert_eq!(at_rest(busy.0, busy.1, busy.2), None, "{busy:?}");
        }
        assert_eq!(at_rest(None, None, Some("shut off (saved)\n")), Some(Power::Off));
        assert_eq!(at_rest(saving, job, Some("running (save canceled)\n")), Some(Power::Running));
    }
}
