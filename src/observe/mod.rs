//! What people and monitoring see of a fleet: the HTTP API, metrics, tables.
