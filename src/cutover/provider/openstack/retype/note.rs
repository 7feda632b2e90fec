//! What is noted with a volume while it is retyped, for the next run on any host: in Cinder's metadata of the volume, as
//! the image itself goes.

use serde::{Deserialize, Serialize};

use super::Side;

/// The key in the volume's metadata.
pub(super) const KEY: &str = "poolshift.retype";
/// The only version that there is.
const VERSION: u32 = 1;

/// A retype that was begun. At most 255 characters, as Cinder's metadata has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Note {
    v: u32,
    /// To which side.
    to: String,
    /// When, in RFC 3339.
    begun: String,
    /// What the volume held then, if it is to be verified.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) digest: Option<String>,
}

impl Note {
    pub(super) fn new(to: Side, begun: jiff::Timestamp, digest: Option<String>) -> Self {
        Self { v: VERSION, to: super::name(to).to_owned(), begun: begun.to_string(), digest }
    }

    /// The note of a retype to that side; `None` where there is none that can be read. What is lost then is a digest,
    /// and nothing else: Cinder knows the rest.
    pub(super) fn of(text: Option<&String>, to: Side) -> Option<Self> {
        let note: Self = serde_json::from_str(text?).ok()?;
        (note.v == VERSION && note.to == super::name(to)).then_some(note)
    }

    pub(super) fn text(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_short_and_read_back_by_who_goes_the_same_way() {
        let digest = Some("f".repeat(64));
        let begun = "2026-11-26T22:00:00.123456789Z".parse().unwrap();
        let note = Note::new(Side::Target, begun, digest);
        assert!(note.text().len() <= 255, "{}", note.text());
        assert_eq!(Note::of(Some(&note.text()), Side::Target), Some(note.clone()));
        assert_eq!(Note::of(Some(&note.text()), Side::Source), None);
        assert_eq!(Note::of(Some(&note.text().replace("\"v\":1", "\"v\":2")), Side::Target), None);
        assert_eq!(Note::of(Some(&"{".to_owned()), Side::Target), None);
        let plain = Note::new(Side::Source, begun, None);
        assert!(!plain.text().contains("digest"));
        assert_eq!(Note::of(Some(&plain.text()), Side::Source), Some(plain));
    }
}
