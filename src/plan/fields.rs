//! A parsed TOML table, taken apart key by key. Whatever is wrong is noted, with its place, and the reading goes on: one
//! run tells everything.

use std::ops::{Range, RangeInclusive};
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::error::{PlanError, PlanProblem};
use super::values;

type Span = Range<usize>;

/// The problems found so far.
pub(super) struct Report<'t> {
    text: &'t str,
    /// Where each line begins.
    lines: Vec<usize>,
    problems: Vec<(usize, PlanProblem)>,
    more: usize,
}

impl<'t> Report<'t> {
    pub(super) fn new(text: &'t str) -> Self {
        let lines = std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect();
        Self { text, lines, problems: Vec::new(), more: 0 }
    }

    /// Notes a problem.
    pub(super) fn add(&mut self, at: &Span, key: &str, problem: impl Into<String>, cure: impl Into<String>) {
        if self.problems.len() >= PlanError::PROBLEMS_MAX {
            self.more += 1;
            return;
        }
        let (line, column) = self.place(at.start);
        let key = key.to_owned();
        let problem = PlanProblem { line, column, key, problem: problem.into(), cure: cure.into() };
        self.problems.push((at.start, problem));
    }

    /// Whether nothing is wrong so far.
    pub(super) fn is_empty(&self) -> bool {
        self.problems.is_empty()
    }

    /// The line and the character of a byte, both from 1.
    fn place(&self, offset: usize) -> (usize, usize) {
        let offset = offset.min(self.text.len());
        let line = self.line(offset);
        let start = self.lines[line - 1];
        let column = self.text[start..].char_indices().take_while(|(at, _)| start + at < offset).count();
        (line, column + 1)
    }

    /// The line of a byte, from 1. Asked for every volume: it must not walk along the line, which may be the whole file.
    pub(super) fn line(&self, offset: usize) -> usize {
        self.lines.partition_point(|&start| start <= offset)
    }

    /// All is well, or the error.
    pub(super) fn finish(mut self, path: &Path) -> Result<(), PlanError> {
        if self.problems.is_empty() {
            return Ok(());
        }
        self.problems.sort_by_key(|(offset, _)| *offset);
        let problems = self.problems.into_iter().map(|(_, problem)| problem).collect();
        Err(PlanError::Invalid { path: path.to_owned(), problems, more: self.more })
    }
}

/// Parses the text; notes why it is no TOML.
pub(super) fn parse<'t>(text: &'t str, report: &mut Report<'t>) -> Option<Spanned<DeTable<'t>>> {
    match DeTable::parse(text) {
        Ok(table) => Some(table),
        Err(error) => {
            let at = error.span().unwrap_or(text.len()..text.len());
            report.add(&at, "", error.message().replace('\n', ", "), "mend the TOML here: https://toml.io");
            None
        }
    }
}

/// A table.
pub(super) struct Section<'a> {
    /// Its key, with the tables that it is in; empty for the file itself.
    key: String,
    /// Where it stands.
    pub(super) span: Span,
    table: &'a DeTable<'a>,
    known: Vec<&'static str>,
}

impl<'a> Section<'a> {
    pub(super) fn root(table: &'a Spanned<DeTable<'a>>) -> Self {
        Self { key: String::new(), span: table.span(), table: table.get_ref(), known: Vec::new() }
    }

    /// The full name of a key in here.
    pub(super) fn name_of(&self, key: &str) -> String {
        if self.key.is_empty() { key.to_owned() } else { format!("{}.{key}", self.key) }
    }

    /// A key's value, if there is one.
    pub(super) fn value(&mut self, key: &'static str) -> Option<Value<'a>> {
        self.known.push(key);
        let value = self.table.get(key)?;
        Some(Value { key: self.name_of(key), span: value.span(), value: value.get_ref() })
    }

    /// A key's value; notes that it is missing.
    pub(super) fn needed(&mut self, key: &'static str, example: &str, report: &mut Report<'_>) -> Option<Value<'a>> {
        let value = self.value(key);
        if value.is_none() {
            report.add(&self.span, &self.name_of(key), "it is missing", format!("add {key} = {example}"));
        }
        value
    }

    /// A table in here; an empty one stands for none.
    pub(super) fn table(&mut self, key: &'static str, report: &mut Report<'_>) -> Option<Section<'a>> {
        self.value(key)?.section(report)
    }

    /// The tables of an array in here.
    pub(super) fn tables(&mut self, key: &'static str, report: &mut Report<'_>) -> Vec<Section<'a>> {
        let Some(value) = self.value(key) else { return Vec::new() };
        let DeValue::Array(array) = value.value else {
            report.add(&value.span, &value.key, value.is_a(), format!("write [[{}]]", value.key));
            return Vec::new();
        };
        let entries = array.iter().filter_map(|entry| {
            Value { key: value.key.clone(), span: entry.span(), value: entry.get_ref() }.section(report)
        });
        entries.collect()
    }

    /// How many entries an array in here has, whatever they are.
    pub(super) fn count(&self, key: &str) -> usize {
        self.table.get(key).and_then(|value| value.get_ref().as_array()).map_or(0, |array| array.iter().count())
    }

    /// Notes the keys that nobody has asked for.
    pub(super) fn finish(self, report: &mut Report<'_>) {
        for (key, _) in self.table.iter() {
            if !self.known.contains(&key.get_ref().as_ref()) {
                let known = self.known.join(", ");
                let name = self.name_of(key.get_ref());
                report.add(&key.span(), &plain(&name), "there is no such key", format!("here go: {known}"));
            }
        }
    }
}

/// A key as it is shown: nothing in it may look like more than a key.
fn plain(key: &str) -> String {
    let short: String = key.chars().take(80).collect();
    short.replace(char::is_control, "\u{fffd}")
}

/// A key's value.
pub(super) struct Value<'a> {
    pub(super) key: String,
    pub(super) span: Span,
    value: &'a DeValue<'a>,
}

impl<'a> Value<'a> {
    pub(super) fn wrong(&self, problem: impl Into<String>, cure: impl Into<String>, report: &mut Report<'_>) {
        report.add(&self.span, &self.key, problem, cure);
    }

    fn is_a(&self) -> String {
        format!("it is a value of type {}", self.value.type_str())
    }

    pub(super) fn section(self, report: &mut Report<'_>) -> Option<Section<'a>> {
        match self.value {
            DeValue::Table(table) => Some(Section { key: self.key, span: self.span, table, known: Vec::new() }),
            _ => {
                let cure = format!("write a table: [{0}], [[{0}]] or {{ key = value }}", self.key);
                self.wrong(self.is_a(), cure, report);
                None
            }
        }
    }

    /// The text of a string, whatever it is.
    pub(super) fn as_text(&self) -> Option<&'a str> {
        match self.value {
            DeValue::String(text) => Some(text.as_ref()),
            _ => None,
        }
    }

    /// A text that is not empty and has no control characters, of at most 4096 bytes.
    pub(super) fn text(&self, example: &str, report: &mut Report<'_>) -> Option<&'a str> {
        let cure = format!("write a text, such as {example:?}");
        let problem = match self.as_text() {
            None => self.is_a(),
            Some("") => "it is empty".into(),
            Some(text) if text.len() > 4096 => format!("it has {} bytes, more than 4096", text.len()),
            Some(text) if text.chars().any(char::is_control) => "it has a control character in it".into(),
            Some(text) => return Some(text),
        };
        self.wrong(problem, cure, report);
        None
    }

    pub(super) fn path(&self, example: &str, report: &mut Report<'_>) -> Option<PathBuf> {
        let path = PathBuf::from(self.text(example, report)?);
        if !path.is_absolute() {
            let problem = format!("{path:?} depends on the folder that poolshift is started in");
            self.wrong(problem, format!("write the whole path, such as {example:?}"), report);
            return None;
        }
        Some(path)
    }

    pub(super) fn flag(&self, report: &mut Report<'_>) -> Option<bool> {
        let flag = self.value.as_bool();
        if flag.is_none() {
            self.wrong(self.is_a(), "write true or false", report);
        }
        flag
    }

    /// A whole number within bounds.
    pub(super) fn number(&self, bounds: RangeInclusive<u64>, report: &mut Report<'_>) -> Option<u64> {
        let cure = format!("write a number from {} to {}", bounds.start(), bounds.end());
        let DeValue::Integer(written) = self.value else {
            self.wrong(self.is_a(), cure, report);
            return None;
        };
        match u64::from_str_radix(written.as_str(), written.radix()) {
            Ok(number) if bounds.contains(&number) => Some(number),
            _ => {
                self.wrong(format!("{} is out of range", shown(&written.to_string())), cure, report);
                None
            }
        }
    }

    /// A number of bytes within bounds: a number, or a text as [`values::parse_size`] takes it.
    pub(super) fn size(&self, bounds: RangeInclusive<u64>, report: &mut Report<'_>) -> Option<u64> {
        let [least, most] = [bounds.start(), bounds.end()].map(|&bound| values::size_text(bound));
        let cure = format!("write bytes, from \"{least}\" to \"{most}\"");
        let (parsed, written) = match self.value {
            DeValue::String(text) => (values::parse_size(text), format!("{:?}", shown(text))),
            DeValue::Integer(number) => {
                let parsed = u64::from_str_radix(number.as_str(), number.radix());
                (parsed.map_err(|_| format!("{number} is no number of bytes")), number.to_string())
            }
            _ => (Err(self.is_a()), "this".into()),
        };
        let problem = match parsed {
            Ok(size) if bounds.contains(&size) => return Some(size),
            Ok(_) => format!("{written} is out of range"),
            Err(_) if self.as_text().is_some() => format!("{written} is no size"),
            Err(problem) => shown(&problem),
        };
        self.wrong(problem, cure, report);
        None
    }

    /// A duration within bounds.
    pub(super) fn duration(&self, bounds: RangeInclusive<Duration>, report: &mut Report<'_>) -> Option<Duration> {
        let [least, most] = [bounds.start(), bounds.end()].map(|&bound| values::duration_text(bound));
        let cure = format!("write a duration with its unit, from \"{least}\" to \"{most}\"");
        let problem = match self.as_text() {
            None => self.is_a(),
            Some(text) => match values::parse_duration(text) {
                Ok(duration) if bounds.contains(&duration) => return Some(duration),
                Ok(_) => format!("{:?} is out of range", shown(text)),
                Err(_) => format!("{:?} is no duration", shown(text)),
            },
        };
        self.wrong(problem, cure, report);
        None
    }
}

/// A text of the file as a message shows it: not all of it where it is long.
pub(super) fn shown(text: &str) -> String {
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}
