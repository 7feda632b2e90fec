//! What must be unique in a plan: names, sources, targets.

use std::collections::HashMap;

use super::fields::{Report, Value};
use crate::image::ImageSpec;

/// The longest name, in bytes: it becomes a part of file names, URLs and labels of metrics.
const NAME_MAX: usize = 128;

/// Whether a text may name a server or a volume.
pub(super) fn name(name: &str) -> Result<(), String> {
    if name.len() > NAME_MAX {
        return Err(format!("it has {} bytes, more than {NAME_MAX}", name.len()));
    }
    match name.chars().find(|&c| !(c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'))) {
        Some(other) => Err(format!("it contains {other:?}")),
        None if !name.starts_with(|c: char| c.is_ascii_alphanumeric()) => Err("it begins with a sign".into()),
        None => Ok(()),
    }
}

/// An image of the plan: by its name, and whether that is one of the target's cluster. Where both clusters are one, all
/// are the source's.
type Image = (bool, String);

struct Place {
    line: usize,
    span: std::ops::Range<usize>,
    key: String,
}

/// The names, sources and targets seen so far.
pub(super) struct Names {
    one_cluster: bool,
    names: HashMap<String, usize>,
    sources: HashMap<Image, Place>,
    targets: HashMap<Image, Place>,
}

impl Names {
    /// None yet. `one_cluster`: sources and targets are in the same cluster, so that equal names are the same image.
    pub(super) fn new(one_cluster: bool) -> Self {
        Self { one_cluster, names: HashMap::new(), sources: HashMap::new(), targets: HashMap::new() }
    }

    fn image(&self, spec: &ImageSpec, is_target: bool) -> Image {
        let elsewhere = is_target && !self.one_cluster && matches!(spec, ImageSpec::Rbd { .. });
        (elsewhere, spec.to_string())
    }

    /// Notes a server's or volume's name that is there already.
    pub(super) fn add_name(&mut self, name: &str, value: &Value<'_>, report: &mut Report<'_>) {
        if let Some(line) = self.names.get(name) {
            let problem = format!("line {line} has a server or volume of the name {name:?}");
            value.wrong(problem, "give each server and each volume a name of its own", report);
            return;
        }
        self.names.insert(name.to_owned(), report.line(value.span.start));
    }

    /// Notes a source or target that is there already, and a volume onto itself.
    pub(super) fn add_volume(
        &mut self,
        name: Option<&str>,
        source: (&ImageSpec, &Value<'_>),
        target: (&ImageSpec, &Value<'_>),
        report: &mut Report<'_>,
    ) {
        let place = |value: &Value<'_>, report: &Report<'_>| Place {
            line: report.line(value.span.start),
            span: value.span.clone(),
            key: value.key.clone(),
        };
        let (from, to) = (self.image(source.0, false), self.image(target.0, true));
        if from == to {
            let problem = format!("it is the source itself, {}", target.0);
            target.1.wrong(problem, "name another pool or image, or another cluster in [target]", report);
            return;
        }
        match self.sources.get(&from) {
            Some(first) => {
                let problem = format!("line {} replicates {} already", first.line, source.0);
                source.1.wrong(problem, "a source has one volume of the plan: remove one of them", report);
            }
            None => {
                let place = place(source.1, report);
                self.sources.insert(from, place);
            }
        }
        match self.targets.get(&to) {
            Some(first) => {
                let problem = format!("line {} writes {} already", first.line, target.0);
                let name = name.unwrap_or("each volume");
                target.1.wrong(problem, format!("give {name} a target of its own"), report);
            }
            None => {
                let place = place(target.1, report);
                self.targets.insert(to, place);
            }
        }
    }

    /// Notes targets that are read as a source elsewhere: what is written there would be replicated on, half done.
    pub(super) fn finish(self, report: &mut Report<'_>) {
        let mut targets: Vec<_> = self.targets.iter().collect();
        targets.sort_by_key(|(_, target)| target.line);
        for (image, target) in targets {
            if let Some(source) = self.sources.get(image) {
                let problem = format!("line {} reads {} as a source", source.line, image.1);
                report.add(&target.span, &target.key, problem, "an image is a source or a target, not both");
            }
        }
    }
}
