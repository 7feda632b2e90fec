//! Commands that work, fail, hang and talk nonsense.
