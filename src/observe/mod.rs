//! What people and monitoring see of a fleet: the HTTP API, metrics, tables.
//!
//! | module | what it is |
//! |---|---|
//! | [`http`] | serves a [`crate::fleet::control::FleetControl`]: every path is described there |
//! | [`client`] | asks such a server, as the command line does |
//! | [`token`] | the secret that actions need |
//! | [`metrics`] | a status as Prometheus reads it |
//! | [`table`] | a status as a person reads it |
//! | [`human`] | bytes and durations as a person reads them |

pub mod client;
pub mod http;
pub mod human;
pub mod metrics;
pub mod table;
pub mod token;

#[cfg(test)]
mod tests;
