//! Saved, and restored with other disks.

use std::io;
use std::path::Path;

use super::super::{Notes, Power, ProviderError, Side};
use super::virsh::QUESTION;
use super::{Libvirt, xml};
use crate::failpoint::failpoint;
use crate::plan::Method;

/// The note with the file of the saved memory.
const SAVE: &str = "save";

/// What such a file's name ends with: nothing else is ever removed.
const ENDING: &str = ".poolshift-save";

/// What is added to it when the memory was used.
const SPENT: &str = ".spent";

impl Libvirt {
    /// Where this cutover saves the memory.
    pub(super) fn save_file<'n>(&self, operation: &str, notes: &'n Notes) -> Result<Option<&'n str>, ProviderError> {
        let Some(file) = notes.get(SAVE) else { return Ok(None) };
        if !file.starts_with('/') || !file.ends_with(ENDING) || file.contains('\0') {
            let problem =
                format!("the journal says that its memory is saved in {file:?}, which is no name of poolshift's");
            return Err(self.virsh.error(operation, problem, None));
        }
        Ok(Some(file))
    }

    /// Chooses a file that no other cutover has used or will use.
    pub(super) fn choose_save(&self, operation: &str, notes: &mut Notes) -> Result<(), ProviderError> {
        if self.method != Method::Warm || self.save_file(operation, notes)?.is_some() {
            return Ok(());
        }
        let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' };
        let domain: String = self.virsh.domain.chars().map(plain).take(64).collect();
        let file = self.config.save_folder.join(format!("{domain}.{:016x}{ENDING}", fastrand::u64(..)));
        let Some(file) = file.to_str().filter(|file| file.starts_with('/')) else {
            let problem = format!("{} is no absolute path of plain text", self.config.save_folder.display());
            return Err(self.virsh.error(operation, problem, Some("name another save_folder in the plan")));
        };
        notes.insert(SAVE.into(), file.to_owned());
        Ok(())
    }

    /// The definition in the saved memory, if there is one that is whole and was not used; `told`: as virsh has told it
    /// already, after the domain had come to rest.
    pub(super) async fn saved(
        &self,
        operation: &str,
        notes: &Notes,
        told: Option<&str>,
    ) -> Result<Option<String>, ProviderError> {
        let Some(file) = self.save_file(operation, notes)? else { return Ok(None) };
        match std::fs::symlink_metadata(file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.virsh.error(operation, format!("{file}: {error}"), None)),
            Ok(_) => {}
        }
        match told {
            Some(definition) => Ok(Some(definition.to_owned())),
            None => self.virsh.saved_definition(operation, file).await,
        }
    }

    /// Saves the memory. A save that was interrupted is waited for, or done again.
    pub(super) async fn save(&self, notes: &Notes) -> Result<(), ProviderError> {
        let operation = "save";
        if self.virsh.power_at_rest(operation, self.config.limit).await? == Power::Off {
            return Ok(());
        }
        let Some(file) = self.save_file(operation, notes)? else {
            return Err(self.virsh.error(
                operation,
                "nobody has said where its memory goes: it was not prepared",
                None,
            ));
        };
        let option = format!("--file={file}");
        // Whoever restores it by hand has to say that it may go on, after a look at its disks.
        let saved = self.virsh.with_domain(operation, "save", &[&option, "--paused"], self.config.limit).await;
        failpoint!("libvirt.saved");
        let Err(error) = saved else { return Ok(()) };
        // libvirt goes on without virsh, and has the domain go on if it is told to stop. Nothing to stop is no error.
        let _ = self.virsh.with_domain(operation, "domjobabort", &[], QUESTION).await;
        match self.virsh.power_at_rest(operation, QUESTION).await {
            Ok(Power::Off) if matches!(self.saved(operation, notes, None).await, Ok(Some(_))) => Ok(()),
            _ => Err(error),
        }
    }

    /// Restores the saved memory, in which this definition is, with the disks on `on`. The domain stands still after it.
    pub(super) async fn restore(
        &self,
        operation: &str,
        on: Side,
        notes: &Notes,
        definition: &str,
    ) -> Result<(), ProviderError> {
        let Some(file) = self.save_file(operation, notes)? else {
            return Err(self.virsh.error(operation, "nobody has said where its memory is", None));
        };
        let definition =
            xml::on_side(definition, &self.disks, on).map_err(|error| self.xml_error(operation, &error))?;
        let file = format!("--file={file}");
        let words = ["restore", &file, "--xml=/dev/stdin", "--paused"];
        self.virsh.call(operation, &words, Some(&definition), self.limit()).await?;
        failpoint!("libvirt.restored");
        Ok(())
    }

    /// Has a domain that stands still go on. From then on what was saved of it is of no use.
    pub(super) async fn go_on(&self, operation: &str, notes: &Notes) -> Result<(), ProviderError> {
        self.spend_save(operation, notes)?;
        failpoint!("libvirt.save-spent");
        match self.virsh.with_domain(operation, "resume", &[], self.limit()).await {
            Err(_) if self.virsh.power(operation).await? == Power::Running => Ok(()),
            other => other.map(drop),
        }
    }

    /// Gives a saved memory a name by which it is not found again, durably.
    pub(super) fn spend_save(&self, operation: &str, notes: &Notes) -> Result<(), ProviderError> {
        let Some(file) = self.save_file(operation, notes)? else { return Ok(()) };
        let renamed = match std::fs::rename(file, format!("{file}{SPENT}")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => Err(error),
            // After a power cut it must not be there again.
            Ok(()) => sync_folder(Path::new(file)),
        };
        renamed.map_err(|error| {
            let problem = format!("{file} can't be put out of the way: {error}");
            self.virsh.error(
                operation,
                problem,
                Some("poolshift needs the right to write to the save_folder of the plan"),
            )
        })
    }

    /// Removes the saved memory, and the note of it.
    pub(super) fn remove_save(&self, operation: &str, notes: &mut Notes) -> Result<(), ProviderError> {
        let Some(file) = self.save_file(operation, notes)? else { return Ok(()) };
        for file in [file.to_owned(), format!("{file}{SPENT}")] {
            match std::fs::remove_file(&file) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    let problem = format!("{file} can't be removed: {error}");
                    return Err(self.virsh.error(
                        operation,
                        problem,
                        Some("remove it by hand: it is of no use any more"),
                    ));
                }
                _ => {}
            }
        }
        notes.remove(SAVE);
        Ok(())
    }
}

fn sync_folder(file: &Path) -> io::Result<()> {
    std::fs::File::open(file.parent().unwrap_or(Path::new("/")))?.sync_all()
}
