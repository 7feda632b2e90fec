//! virsh, one call at a time: with a limit, in English, and with what it said in the error.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use tokio::process::Command;

use super::super::run::{also, brief, run};
use super::super::{Power, ProviderError};

/// How long a question may take. libvirt itself waits up to 30 s for what it is doing with a domain already.
pub(super) const QUESTION: Duration = Duration::from_secs(60);

/// How often something is asked that is waited for.
pub(super) const POLL: Duration = Duration::from_millis(200);

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

    /// Calls virsh and gives back what it printed. The first of `words` is virsh's command.
    pub(super) async fn call(
        &self,
        operation: &str,
        words: &[&str],
        input: Option<&str>,
        limit: Duration,
    ) -> Result<String, ProviderError> {
        let mut command = Command::new(&self.program);
        // Its words are translated otherwise.
        command.env("LC_ALL", "C").env_remove("LANGUAGE").arg("--quiet");
        if let Some(uri) = &self.uri {
            command.args(["--connect", uri]);
        }
        command.args(words);
        let verb = words.first().copied().unwrap_or_default();
        let ended = run(command, input.unwrap_or_default().into(), limit).await.map_err(|error| {
            let hint =
                "install virsh (Debian: libvirt-clients), and see with `virsh list --all` whether libvirt answers";
            self.error(operation, format!("virsh {verb}: {error}"), Some(hint))
        })?;
        if !ended.status.success() {
            let said = if ended.error.trim().is_empty() { &ended.output } else { &ended.error };
            let problem = format!("virsh {verb} failed ({}){}", ended.status, also(said));
            return Err(self.error(operation, problem, None));
        }
        if ended.cut {
            let problem = format!("virsh {verb} printed more than {} MiB", ended.output.len() >> 20);
            return Err(self.error(operation, problem, None));
        }
        Ok(ended.output)
    }

    fn named(&self) -> String {
        // As one word: a domain may be called `-x`.
        format!("--domain={}", self.domain)
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
        let (word, reason) = state.trim().split_once(" (").unwrap_or((state.trim(), ""));
        match word {
            "running" | "idle" | "blocked" | "in shutdown" => Ok((Power::Running, false)),
            "paused" => Ok((Power::Suspended, matches!(reason, "starting up)" | "saving)"))),
            "pmsuspended" | "crashed" => Ok((Power::Suspended, false)),
            "shut off" => Ok((Power::Off, false)),
            _ => Err(self.error(operation, format!("virsh domstate printed {:?}", brief(&state)), None)),
        }
    }

    /// What the domain is doing.
    pub(super) async fn power(&self, operation: &str) -> Result<Power, ProviderError> {
        Ok(self.state(operation).await?.0)
    }

    /// Whether libvirt is at something long with a domain that stands still.
    async fn has_job(&self, operation: &str) -> Result<bool, ProviderError> {
        match self.with_domain(operation, "domjobinfo", &[], QUESTION).await {
            Ok(job) => Ok(!job.lines().any(|line| line.split_whitespace().eq(["Job", "type:", "None"]))),
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
        let file = format!("--file={file}");
        match self.call(operation, &["save-image-dumpxml", &file, "--security-info"], None, QUESTION).await {
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
        arguments: Option<serde_json::Value>,
    ) -> Result<serde_json::Value, ProviderError> {
        let mut command = serde_json::json!({ "execute": execute });
        if let Some(arguments) = arguments {
            command["arguments"] = arguments;
        }
        let command = command.to_string();
        let text = self.with_domain(operation, "qemu-monitor-command", &[&command], QUESTION).await?;
        let wrong = |what: &str| self.error(operation, format!("QEMU's {execute}: {what}"), None);
        let mut answer: serde_json::Value =
            serde_json::from_str(&text).map_err(|error| wrong(&format!("{error} in {:?}", brief(&text))))?;
        if let Some(error) = answer.get("error") {
            let said = error.get("desc").and_then(|desc| desc.as_str()).unwrap_or("an error without words");
            return Err(wrong(&brief(said)));
        }
        match answer.get_mut("return") {
            Some(answer) => Ok(answer.take()),
            None => Err(wrong(&format!("neither an answer nor an error: {:?}", brief(&text)))),
        }
    }
}
