//! HEAD as a point: whether what was read of it is of one moment.

use crate::image::{Result, SourceImage};

/// What is known of an image's writers while its HEAD is read. A snapshot has none.
///
/// A writer that comes after [`Self::begin`] and has gone before [`Self::end`] is noticed only where the backend's tokens
/// tell of it: on a file, and on RBD in an image that nobody has written since its newest snapshot.
#[derive(Clone, Debug)]
pub struct HeadWatch {
    location: String,
    before: Option<Tokens>,
    writers: Vec<String>,
    changed: bool,
}

type Tokens = (Option<String>, Option<String>);

impl HeadWatch {
    /// Looks at the image before it is opened at `snapshot`, or at HEAD.
    pub async fn begin<I: SourceImage + ?Sized>(image: &I, snapshot: Option<&str>) -> Result<Self> {
        let mut watch =
            Self { location: image.location().to_owned(), before: None, writers: Vec::new(), changed: false };
        if snapshot.is_none() {
            watch.before = Some(tokens(image).await?);
            watch.writers = image.writers().await?;
        }
        Ok(watch)
    }

    /// Looks again, after everything was read. Gives back whether that was the first to notice a writer.
    pub async fn end<I: SourceImage + ?Sized>(&mut self, image: &I) -> Result<bool> {
        let Some(before) = &self.before else { return Ok(false) };
        let was_consistent = self.is_consistent();
        for writer in image.writers().await? {
            if !self.writers.contains(&writer) {
                self.writers.push(writer);
            }
        }
        self.changed = tokens(image).await? != *before;
        Ok(was_consistent && !self.is_consistent())
    }

    /// Whether nothing tells of a writer: what was read is of one moment.
    pub fn is_consistent(&self) -> bool {
        self.writers.is_empty() && !self.changed
    }

    /// What the user has to know, a sentence; `None` where nothing tells of a writer.
    pub fn warning(&self) -> Option<String> {
        let location = &self.location;
        let why = match self.writers.as_slice() {
            [] if !self.changed => return None,
            [] => format!("{location} was written while it was read"),
            writers => format!("{location} may be written while it is read: {}", writers.join(", ")),
        };
        Some(format!("{why}; the data may be of several moments: stop the writer first, or read a snapshot"))
    }
}

async fn tokens<I: SourceImage + ?Sized>(image: &I) -> Result<Tokens> {
    Ok((image.change_token().await?, image.quiet_token().await?))
}
