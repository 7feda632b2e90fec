//! What is true of a domain, asked of one process of virsh.
//!
//! What that has not answered is asked once more by itself, which tells why. So a domain that libvirt is at, or a question
//! that fails, costs time and nothing else.

use super::super::{Notes, Observed, Power, ProviderError};
use super::Libvirt;
use super::blocks::{self, Device};
use super::virsh::{Answers, QUESTION, Said, at_rest};
use super::xml::Domain;

// The questions, in the order in which they are asked: what else is told means something only if libvirt has let go of
// the domain before.
const STATE: usize = 0;
const JOB: usize = 1;
const STATE_AGAIN: usize = 2;
const DEVICES: usize = 3;
const DEFINITION: usize = 4;
const SAVED: usize = 5;

/// What is true of a domain, and what was told of it besides.
#[derive(Debug)]
pub(super) struct Look {
    pub(super) observed: Observed,
    /// The disks that it has open; of one in memory.
    pub(super) devices: Vec<Device>,
    /// The definition in its saved memory, if it can be restored; of one that is not in memory.
    pub(super) saved: Option<String>,
    answers: Answers,
    asked: usize,
}

impl Look {
    /// The definition that it starts from, if that was told.
    pub(super) fn definition(&self) -> Option<&str> {
        self.answers.get(DEFINITION)
    }

    /// The answer to what was asked besides, by its number.
    pub(super) fn more(&self, index: usize) -> Option<&str> {
        self.answers.get(self.asked + index)
    }
}

impl Libvirt {
    /// Looks at the domain, and asks `more` in the same breath.
    pub(super) async fn look(&self, operation: &str, notes: &Notes, more: Vec<Said>) -> Result<Look, ProviderError> {
        let virsh = &self.virsh;
        let mut questions = vec![
            virsh.say("domstate", &["--reason"]),
            virsh.say("domjobinfo", &[]),
            virsh.say("domstate", &["--reason"]),
            virsh.say_to_qemu("query-block", None),
            virsh.say("dumpxml", &["--inactive", "--security-info"]),
        ];
        questions.extend(self.save_file(operation, notes)?.map(|file| virsh.say_of_save(file)));
        let asked = questions.len();
        questions.extend(more);
        let answers = virsh.batch(operation, &questions, QUESTION).await?;
        let (power, answers) = match at_rest(answers.get(STATE), answers.get(JOB), answers.get(STATE_AGAIN)) {
            Some(power) => (power, answers),
            // What else was told is of what it was in the middle of.
            None => (virsh.power_at_rest(operation, self.limit()).await?, Answers::default()),
        };
        if matches!(power, Power::Off | Power::Saved) {
            return self.look_at_rest(operation, notes, answers, asked).await;
        }
        let devices = match blocks::devices(virsh, operation, answers.get(DEVICES)).await {
            Ok(devices) => devices,
            // It has ended meanwhile, and has to be looked at as one that is off.
            Err(_) if virsh.power(operation).await? == Power::Off => {
                return self.look_at_rest(operation, notes, Answers::default(), asked).await;
            }
            Err(error) => return Err(error),
        };
        let observed = Observed { power, side: blocks::side(&devices, &self.disks) };
        Ok(Look { observed, devices, saved: None, answers, asked })
    }

    async fn look_at_rest(
        &self,
        operation: &str,
        notes: &Notes,
        answers: Answers,
        asked: usize,
    ) -> Result<Look, ProviderError> {
        let saved = answers.get(SAVED).filter(|_| asked > SAVED);
        let saved = self.saved(operation, notes, saved).await?;
        let asked_again;
        let definition = match answers.get(DEFINITION) {
            Some(definition) => definition,
            None => {
                asked_again = self.virsh.definition(operation).await?;
                &asked_again
            }
        };
        let domain = Domain::read(definition, &self.disks).map_err(|error| self.xml_error(operation, &error))?;
        let power = if saved.is_some() { Power::Saved } else { Power::Off };
        let observed = Observed { power, side: domain.side(self.disks.len()) };
        Ok(Look { observed, devices: Vec::new(), saved, answers, asked })
    }
}
