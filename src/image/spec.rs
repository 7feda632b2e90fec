//! How an image is named on the command line: `rbd:pool/[namespace/]image[@snapshot]` or `file:PATH[@snapshot]`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Where an image is. Pure syntax: nothing is opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageSpec {
    /// `rbd:pool/[namespace/]image[@snapshot]`
    Rbd {
        /// The pool's name.
        pool: String,
        /// The namespace's name, or none for the default one.
        namespace: Option<String>,
        /// The image's name.
        image: String,
        /// The snapshot's name.
        snapshot: Option<String>,
    },
    /// `file:PATH[@snapshot]`; the last `@` after the last `/` begins the snapshot's name.
    File {
        /// The raw file or block device.
        path: PathBuf,
        /// The snapshot's name.
        snapshot: Option<String>,
    },
}

/// A name that is no image.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} names no image: {problem}; write rbd:pool/[namespace/]image[@snapshot] or file:PATH[@snapshot]")]
pub struct SpecError {
    /// What was given.
    pub text: String,
    /// What is wrong with it.
    pub problem: &'static str,
}

impl ImageSpec {
    /// The snapshot's name, if one was given.
    pub fn snapshot(&self) -> Option<&str> {
        match self {
            Self::Rbd { snapshot, .. } | Self::File { snapshot, .. } => snapshot.as_deref(),
        }
    }

    /// The pool's name, for an image that is in one.
    pub fn pool(&self) -> Option<&str> {
        match self {
            Self::Rbd { pool, .. } => Some(pool),
            Self::File { .. } => None,
        }
    }

    /// The image without the snapshot.
    #[must_use]
    pub fn without_snapshot(&self) -> Self {
        let mut image = self.clone();
        match &mut image {
            Self::Rbd { snapshot, .. } | Self::File { snapshot, .. } => *snapshot = None,
        }
        image
    }
}

impl FromStr for ImageSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let wrong = |problem| SpecError { text: text.to_owned(), problem };
        let (scheme, rest) = text.split_once(':').ok_or_else(|| wrong("it has no scheme"))?;
        let name_start = rest.rfind('/').map_or(0, |slash| slash + 1);
        let (path, snapshot) = match rest[name_start..].rfind('@') {
            Some(at) => (&rest[..name_start + at], Some(&rest[name_start + at + 1..])),
            None => (rest, None),
        };
        if snapshot == Some("") {
            return Err(wrong("nothing follows the @"));
        }
        let snapshot = snapshot.map(str::to_owned);
        match scheme {
            "file" if path.is_empty() || path.ends_with('/') => Err(wrong("the path is empty or a folder")),
            "file" => Ok(Self::File { path: PathBuf::from(path), snapshot }),
            "rbd" => {
                let parts: Vec<&str> = path.split('/').collect();
                if parts.iter().any(|part| part.is_empty()) {
                    return Err(wrong("a pool, namespace or image name is empty"));
                }
                let (pool, namespace, image) = match parts[..] {
                    [pool, image] => (pool, None, image),
                    [pool, namespace, image] => (pool, Some(namespace.to_owned()), image),
                    _ => return Err(wrong("it needs a pool and an image")),
                };
                Ok(Self::Rbd { pool: pool.to_owned(), namespace, image: image.to_owned(), snapshot })
            }
            _ => Err(wrong("the scheme is not rbd or file")),
        }
    }
}

impl fmt::Display for ImageSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rbd { pool, namespace: Some(namespace), image, .. } => write!(f, "rbd:{pool}/{namespace}/{image}")?,
            Self::Rbd { pool, image, .. } => write!(f, "rbd:{pool}/{image}")?,
            Self::File { path, .. } => write!(f, "file:{}", path.display())?,
        }
        self.snapshot().map_or(Ok(()), |snapshot| write!(f, "@{snapshot}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_images_survive_a_round_trip() {
        for text in
            ["rbd:sata/vm", "rbd:sata/tenant/vm@a", "rbd:p/i@x.y-z", "file:/a/b.img", "file:disk@s", "file:/a@b/c"]
        {
            assert_eq!(text.parse::<ImageSpec>().unwrap().to_string(), text);
        }
        let spec: ImageSpec = "file:/a@b/c@d@e".parse().unwrap();
        assert_eq!((spec.snapshot(), spec.without_snapshot().to_string()), (Some("e"), "file:/a@b/c@d".into()));
    }

    #[test]
    fn what_names_no_image_says_why() {
        for text in
            ["", "sata/vm", "nbd:x/y", "rbd:vm", "rbd:/vm", "rbd:a/b/c/d", "rbd:a/", "rbd:a/b@", "file:", "file:/a/"]
        {
            let error = text.parse::<ImageSpec>().unwrap_err();
            assert!(error.to_string().contains("write rbd:pool/"), "{error}");
        }
    }
}
