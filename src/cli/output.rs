//! Standard output: the result, and nothing else.

use std::io::{ErrorKind, Write};

use serde::Serialize;

/// Writes bytes to standard output. A reader that has gone away has seen enough: that is no error for a result.
pub(super) fn bytes(bytes: &[u8]) -> std::io::Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

/// Writes one JSON value, indented, with a newline behind it.
pub(super) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    let mut text = serde_json::to_vec_pretty(value)?;
    text.push(b'\n');
    Ok(bytes(&text)?)
}

/// A result for people: lines of `key: value`, the values aligned.
#[derive(Debug, Default)]
pub(super) struct Facts {
    lines: Vec<(String, String)>,
}

impl Facts {
    /// Adds a line.
    pub(super) fn add(&mut self, key: &str, value: impl std::fmt::Display) -> &mut Self {
        self.lines.push((key.to_owned(), value.to_string()));
        self
    }

    /// Writes the lines.
    pub(super) fn print(&self) -> anyhow::Result<()> {
        Ok(bytes(self.to_string().as_bytes())?)
    }
}

impl std::fmt::Display for Facts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let width = self.lines.iter().map(|(key, _)| key.chars().count()).max().unwrap_or(0) + 1;
        for (key, value) in &self.lines {
            writeln!(f, "{:<width$} {value}", format!("{key}:"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_are_aligned() {
        let mut facts = Facts::default();
        facts.add("base", "a").add("data moved", "4.0 MiB");
        assert_eq!(facts.to_string(), "base:       a\ndata moved: 4.0 MiB\n");
    }
}
