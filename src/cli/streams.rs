//! Files and standard streams that diffs and batch streams are read from and written to.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use tempfile::TempPath;
use tokio::io::{AsyncWriteExt as _, BufReader, BufWriter};

use super::config::{Stream, UsageError};
use crate::image::{ErrorKind, ImageError};

/// What one request to the kernel reads or writes, in bytes: pipes hold 64 KiB, but files like more.
const BUFFER: usize = 1 << 20;

/// A stream to read.
pub(super) type Input = BufReader<tokio::fs::File>;

/// Opens a stream for reading.
pub(super) fn input(stream: &Stream) -> anyhow::Result<Input> {
    let file = match stream {
        Stream::Standard => {
            refuse_terminal(&io::stdin(), "standard input is a terminal: pipe a stream into it, or name a file")?;
            duplicate(io::stdin())?
        }
        Stream::File(path) => {
            let file = File::open(path).map_err(|error| failed(path, "open the stream", error))?;
            let is_folder = file.metadata().map_err(|error| failed(path, "look at the stream", error))?.is_dir();
            if is_folder {
                let error = ImageError::new(ErrorKind::Unsupported, path.display().to_string(), "read the stream");
                return Err(error.detail("it is a folder").into());
            }
            file
        }
    };
    Ok(BufReader::with_capacity(BUFFER, to_async(file)))
}

/// A stream to write, which comes into being under its name only when [`Output::finish`] has made it durable: nobody
/// takes half a diff for a whole one.
#[derive(Debug)]
pub(super) struct Output {
    writer: BufWriter<tokio::fs::File>,
    unfinished: Option<Unfinished>,
}

#[derive(Debug)]
struct Unfinished {
    temporary: TempPath,
    path: PathBuf,
}

impl Output {
    /// Opens a stream for writing: standard output, a device or FIFO that exists, or a file that doesn't.
    pub(super) fn new(stream: &Stream) -> anyhow::Result<Self> {
        let (file, unfinished) = match stream {
            Stream::Standard => {
                refuse_terminal(&io::stdout(), "standard output is a terminal: redirect it to a file or a pipe")?;
                (duplicate(io::stdout())?, None)
            }
            Stream::File(path) => open_file(path)?,
        };
        Ok(Self { writer: BufWriter::with_capacity(BUFFER, to_async(file)), unfinished })
    }

    /// Where the stream's bytes go.
    pub(super) fn writer(&mut self) -> &mut BufWriter<tokio::fs::File> {
        &mut self.writer
    }

    /// Writes out what is buffered, and gives the file its name. Without this call a new file is removed again.
    pub(super) async fn finish(mut self) -> anyhow::Result<()> {
        let name = self.unfinished.as_ref().map_or_else(|| PathBuf::from("-"), |unfinished| unfinished.path.clone());
        self.writer.flush().await.map_err(|error| failed(&name, "write the stream", error))?;
        let Some(Unfinished { temporary, path }) = self.unfinished.take() else { return Ok(()) };
        let file = self.writer.into_inner();
        file.sync_all().await.map_err(|error| failed(&path, "make the stream durable", error))?;
        let named = tokio::task::spawn_blocking(move || {
            temporary.persist_noclobber(&path).map_err(|error| failed(&path, "create the file", error.error))?;
            // The name itself is durable once its folder is.
            let folder = folder_of(&path);
            let synced = File::open(folder).and_then(|folder| folder.sync_all());
            synced.map_err(|error| failed(&path, "make the file's name durable", error))
        });
        Ok(named.await??)
    }
}

fn open_file(path: &Path) -> anyhow::Result<(File, Option<Unfinished>)> {
    match std::fs::metadata(path) {
        Ok(metadata) if !metadata.is_file() => {
            let file = OpenOptions::new().write(true).open(path);
            Ok((file.map_err(|error| failed(path, "open it for writing", error))?, None))
        }
        Ok(_) => Err(failed(path, "create the file", rustix::io::Errno::EXIST.into())
            .hint("remove it first, or choose another name")
            .into()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let temporary = tempfile::Builder::new()
                .prefix(".poolshift-")
                .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o600))
                .tempfile_in(folder_of(path))
                .map_err(|error| failed(path, "create a file beside it", error))?;
            let (file, temporary) = temporary.into_parts();
            Ok((file, Some(Unfinished { temporary, path: path.to_owned() })))
        }
        Err(error) => Err(failed(path, "look at it", error).into()),
    }
}

/// The folder that a path's last part is in.
pub(super) fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn refuse_terminal(stream: &impl io::IsTerminal, text: &str) -> Result<(), UsageError> {
    if stream.is_terminal() { Err(UsageError(text.into())) } else { Ok(()) }
}

/// An own handle of a standard stream: Rust's is locked and, for output, buffered by lines.
fn duplicate(stream: impl AsFd) -> io::Result<File> {
    Ok(File::from(stream.as_fd().try_clone_to_owned()?))
}

fn to_async(file: File) -> tokio::fs::File {
    let mut file = tokio::fs::File::from_std(file);
    file.set_max_buf_size(BUFFER);
    file
}

fn failed(path: &Path, operation: &str, error: io::Error) -> ImageError {
    ImageError::from_io(error, path.display().to_string(), operation)
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt as _;

    use super::*;
    use crate::cli::exit::Exit;

    fn names(folder: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(folder).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[tokio::test]
    async fn a_file_has_its_name_only_when_it_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let stream = Stream::File(folder.path().join("diff"));
        let mut output = Output::new(&stream).unwrap();
        output.writer().write_all(b"half").await.unwrap();
        assert!(!folder.path().join("diff").exists());
        drop(output);
        assert!(names(folder.path()).is_empty());

        let mut output = Output::new(&stream).unwrap();
        output.writer().write_all(b"whole").await.unwrap();
        output.finish().await.unwrap();
        assert_eq!(names(folder.path()), ["diff"]);
        let mut read = String::new();
        input(&stream).unwrap().read_to_string(&mut read).await.unwrap();
        assert_eq!(read, "whole");
    }

    #[tokio::test]
    async fn what_exists_is_never_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("diff");
        let late = Output::new(&Stream::File(path.clone())).unwrap();
        std::fs::write(&path, "precious").unwrap();
        let error = Output::new(&Stream::File(path.clone())).unwrap_err();
        assert_eq!(Exit::of(&error), Exit::Failed);
        assert!(format!("{error:#}").contains("cannot create the file"), "{error:#}");
        // It came into being while the stream was written.
        late.finish().await.unwrap_err();
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        assert_eq!(names(folder.path()), ["diff"]);
    }

    #[tokio::test]
    async fn a_device_is_written_as_it_is_and_a_folder_is_refused() {
        let mut output = Output::new(&Stream::File("/dev/null".into())).unwrap();
        output.writer().write_all(b"x").await.unwrap();
        output.finish().await.unwrap();
        assert!(Path::new("/dev/null").exists());
        let folder = tempfile::tempdir().unwrap();
        assert!(Output::new(&Stream::File(folder.path().into())).is_err());
        assert!(input(&Stream::File(folder.path().into())).is_err());
        let missing = input(&Stream::File(folder.path().join("missing"))).unwrap_err();
        assert_eq!(Exit::of(&missing), Exit::NotFound);
    }
}
