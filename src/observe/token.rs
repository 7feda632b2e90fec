//! The bearer token that actions need, and reads from afar.

use std::fmt;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// The fewest characters of a token: 16 of the 62 letters and digits are 95 bits, which nobody guesses over a network.
pub const TOKEN_LENGTH_MIN: usize = 16;

/// The largest token file, in bytes.
pub const TOKEN_FILE_BYTES_MAX: u64 = 4096;

/// A secret. `Debug` never shows it.
#[derive(Clone)]
pub struct Token {
    text: String,
    digest: blake3::Hash,
}

/// Why a token can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenFault {
    /// It can be guessed.
    #[error(
        "the token has {0} characters; it needs at least {TOKEN_LENGTH_MIN}: openssl rand -hex 32 makes a good one"
    )]
    TooShort(usize),
    /// It can't stand in a header.
    #[error("the token has a blank, a control character or one beyond ASCII: openssl rand -hex 32 makes a good one")]
    NotPrintable,
    /// The file is no token.
    #[error("the file has more than {TOKEN_FILE_BYTES_MAX} bytes, and so is no token")]
    TooLarge,
    /// It is a folder, a pipe, a device.
    #[error("it is no regular file")]
    NotAFile,
    /// Others may read it.
    #[error("others than its owner can read it (mode {mode:03o}): chmod 600 {}", .path.display())]
    Readable {
        /// Its permission bits.
        mode: u32,
        /// The file.
        path: PathBuf,
    },
    /// It can't be read.
    #[error("it can't be read")]
    Io(#[source] io::Error),
}

/// A token file that can't be used.
#[derive(Debug, thiserror::Error)]
#[error("the token file {}", .path.display())]
pub struct TokenFileError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    #[source]
    pub fault: TokenFault,
}

impl Token {
    /// Takes a token; blanks and newlines around it are not part of it.
    ///
    /// # Errors
    ///
    /// [`TokenFault::TooShort`] and [`TokenFault::NotPrintable`].
    pub fn new(text: &str) -> Result<Self, TokenFault> {
        let text = text.trim();
        if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(TokenFault::NotPrintable);
        }
        if text.len() < TOKEN_LENGTH_MIN {
            return Err(TokenFault::TooShort(text.len()));
        }
        Ok(Self { text: text.to_owned(), digest: blake3::hash(text.as_bytes()) })
    }

    /// Reads a token from a file that only its owner can read. Blocks.
    ///
    /// # Errors
    ///
    /// Names the file, and what is wrong with it.
    pub fn read(path: &Path) -> Result<Self, TokenFileError> {
        Self::read_checked(path).map_err(|fault| TokenFileError { path: path.to_owned(), fault })
    }

    fn read_checked(path: &Path) -> Result<Self, TokenFault> {
        // Opening a pipe that nobody writes to would block for good, hence the look before.
        if !std::fs::metadata(path).map_err(TokenFault::Io)?.is_file() {
            return Err(TokenFault::NotAFile);
        }
        let file = std::fs::File::open(path).map_err(TokenFault::Io)?;
        // The mode of what was opened: the path may have been replaced since.
        let mode = file.metadata().map_err(TokenFault::Io)?.mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(TokenFault::Readable { mode, path: path.to_owned() });
        }
        let mut bytes = Vec::new();
        file.take(TOKEN_FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(TokenFault::Io)?;
        if bytes.len() as u64 > TOKEN_FILE_BYTES_MAX {
            return Err(TokenFault::TooLarge);
        }
        Self::new(std::str::from_utf8(&bytes).map_err(|_| TokenFault::NotPrintable)?)
    }

    /// Whether this is the token, in a time that says nothing about how much of it is right: digests are compared, and
    /// `blake3::Hash` compares in constant time.
    pub fn matches(&self, given: &[u8]) -> bool {
        blake3::hash(given) == self.digest
    }

    /// The value of the `Authorization` header.
    pub(super) fn authorization(&self) -> String {
        format!("Bearer {}", self.text)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(not shown)")
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const GOOD: &str = "0123456789abcdef";

    fn file(content: &[u8], mode: u32) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        (dir, path)
    }

    #[test]
    fn a_token_is_trimmed_compared_and_never_shown() {
        let token = Token::new(&format!(" {GOOD}\n")).unwrap();
        assert!(token.matches(GOOD.as_bytes()));
        for other in ["", "0123456789abcde", "0123456789abcdeF", "0123456789abcdef "] {
            assert!(!token.matches(other.as_bytes()), "{other}");
        }
        assert!(!format!("{token:?}").contains(&GOOD[..4]));
    }

    #[test]
    fn what_can_be_guessed_or_stands_in_no_header_is_refused() {
        assert!(matches!(Token::new("0123456789abcde"), Err(TokenFault::TooShort(15))));
        for text in ["0123456789abcdef 0123", "0123456789abcdef\u{7}x", "0123456789abcdefé"] {
            assert!(matches!(Token::new(text), Err(TokenFault::NotPrintable)), "{text}");
        }
    }

    #[test]
    fn a_token_file_is_the_owners_alone() {
        let (_dir, path) = file(format!("{GOOD}\n").as_bytes(), 0o600);
        assert!(Token::read(&path).unwrap().matches(GOOD.as_bytes()));
        for mode in [0o640, 0o604, 0o620, 0o601] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            let error = Token::read(&path).unwrap_err();
            assert!(error.fault.to_string().contains("chmod 600"), "{error:?}");
        }
    }

    #[test]
    fn what_is_no_token_file_is_refused() {
        let (dir, path) = file(&[b'a'; 4097], 0o600);
        assert!(matches!(Token::read(&path).unwrap_err().fault, TokenFault::TooLarge));
        assert!(matches!(Token::read(dir.path()).unwrap_err().fault, TokenFault::NotAFile));
        assert!(matches!(Token::read(&dir.path().join("none")).unwrap_err().fault, TokenFault::Io(_)));
        let (_dir, path) = file(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", 0o600);
        assert!(matches!(Token::read(&path).unwrap_err().fault, TokenFault::NotPrintable));
    }
}
