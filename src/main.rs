//! The caifs program: argv to the command line, and the exit code back. Nothing else.

use std::process::ExitCode;

fn main() -> ExitCode {
    caifs::cli::run(std::env::args_os())
}
