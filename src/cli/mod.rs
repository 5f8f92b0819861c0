//! The command line: what was typed, turned into calls of the rooms below. The only room that names `clap`.
//!
//! * [`args`] defines every verb and flag once; help, man pages and completions come from it.
//! * One file a verb does the work of the verb, with [`store_flags`] and [`output`] shared.
//!
//! Invariant: an error is one line, `caifs: …`; a reader of our output that goes away early is no error.

pub mod args;
mod cat;
mod demo;
mod inspect;
mod ls;
mod make;
mod mount;
mod output;
mod store_flags;
mod tar;
mod umount;

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use args::{Args, Verb};

/// Exit code for wrong arguments and for failures of every verb but `mount` (as desync; mount(8) calls it "incorrect invocation").
const EXIT_FAILURE: u8 = 1;

/// Runs the program and gives its exit code.
pub fn run(argv: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args = match Args::try_parse_from(argv) {
        Ok(args) => args,
        Err(error) => {
            // Help and version are answers, everything else is a mistake.
            let asked_for = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
            let _ = error.print();
            return if asked_for { ExitCode::SUCCESS } else { ExitCode::from(EXIT_FAILURE) };
        }
    };
    init_log(args.verbose);
    let done = match args.verb {
        Verb::Mount(args) => return mount::run(args),
        Verb::Umount(args) => umount::run(&args),
        Verb::Make(args) => make::run(&args),
        Verb::Tar(args) => tar::run(&args),
        Verb::Cat(args) => cat::run(&args),
        Verb::Ls(args) => ls::run(&args),
        Verb::Info(args) => inspect::info(&args),
        Verb::ListChunks(args) => inspect::list_chunks(&args),
        Verb::VerifyIndex(args) => inspect::verify_index(&args),
        Verb::Demo(args) => demo::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "caifs: {error:#}");
            ExitCode::from(EXIT_FAILURE)
        }
    }
}

/// Whether the reader of our output has gone away.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io_errors = error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>());
    io_errors.into_iter().any(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// Log lines go to stderr: warnings by default, more with `-v`, or as `CAIFS_LOG` says.
fn init_log(verbose: u8) {
    use tracing_subscriber::EnvFilter;
    let level = match verbose {
        0 => "warn",
        1 => "info",
        _ => "caifs=debug,info",
    };
    let filter = EnvFilter::try_from_env("CAIFS_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_target(false).try_init();
}
