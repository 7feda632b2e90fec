//! What is wrong with a plan file.

use std::fmt;
use std::io;
use std::path::PathBuf;

/// A plan that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The file can't be read.
    #[error("{}: cannot read the plan", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is too large to be a plan, and was not looked at.
    #[error("{}: a plan has at most {} bytes, this file has more", path.display(), super::FILE_MAX)]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// It is no TOML, or says something that makes no sense.
    #[error("{}", listed(path, problems, *more))]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong, at least one, in the order of the file; at most [`PROBLEMS_MAX`](Self::PROBLEMS_MAX).
        problems: Vec<PlanProblem>,
        /// How many more were found.
        more: usize,
    },
}

impl PlanError {
    /// How many problems are kept: nobody reads more at once.
    pub const PROBLEMS_MAX: usize = 50;

    /// What is wrong within the file; nothing where the file can't be read at all.
    pub fn problems(&self) -> &[PlanProblem] {
        match self {
            Self::Invalid { problems, .. } => problems,
            Self::Read { .. } | Self::TooLarge { .. } => &[],
        }
    }
}

/// One thing that is wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanProblem {
    /// The line, from 1.
    pub line: usize,
    /// The character in the line, from 1.
    pub column: usize,
    /// The key, with the tables that it is in: `server.volume.source`. Empty where it is not about a key.
    pub key: String,
    /// What is wrong.
    pub problem: String,
    /// What to do.
    pub cure: String,
}

impl fmt::Display for PlanProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: ", self.line, self.column)?;
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        write!(f, "{}; {}", self.problem, self.cure)
    }
}

fn listed(path: &std::path::Path, problems: &[PlanProblem], more: usize) -> String {
    let path = path.display();
    if let ([problem], 0) = (problems, more) {
        return format!("{path}:{problem}");
    }
    let mut text = format!("{path}: {} problems", problems.len() + more);
    for problem in problems {
        text.push_str(&format!("\n{path}:{problem}"));
    }
    if more > 0 {
        text.push_str(&format!("\nand {more} more"));
    }
    text
}
