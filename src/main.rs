//! The binary: parses, runs, prints the cause chain, picks the exit code. What it does is in [`poolshift::cli`].

use std::process::ExitCode;

use poolshift::cli;

fn main() -> ExitCode {
    let config = match cli::parse(std::env::args_os()) {
        Ok(config) => config,
        Err(refusal) => return refusal.show(),
    };
    match cli::run(&config) {
        Ok(exit) => exit.into(),
        Err(error) => cli::show_error(&error, config.log_format).into(),
    }
}
