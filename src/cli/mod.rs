//! The command line: what was typed, turned into calls of the rooms below. The only room that names `clap`.
//!
//! * [`args`] defines every verb and flag once; help, man pages and completions come from it.
//! * One file a verb does the work of the verb, with [`store_flags`], [`places`] and [`output`] shared.
//! * [`helper`] is called by mount(8), and reads its arguments before clap would.
//! * [`settings`] lays flags over files and the environment.
//!
//! Invariant: an error is one line, `caifs: …`; a reader of our output that goes away early is no error.

mod abort;
pub mod args;
mod cat;
mod config;
mod demo;
mod figures;
mod given;
mod helper;
mod inspect;
mod ls;
mod make;
pub mod manual;
mod map;
mod mount;
mod option_flags;
mod output;
mod paths;
mod places;
mod profile;
mod pull;
mod reload;
mod remount;
mod runtime_dir;
mod s3_upgrade;
mod serve;
mod serve_flags;
mod service;
mod service_environment;
mod settings;
mod sign;
mod status;
mod store_flags;
mod tar;
mod top;
mod umount;
mod verify_signature;
mod warm;

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;
use tracing::Level;

use crate::mount::log;
use args::{Args, Verb};
use output::printable;

/// Exit code for wrong arguments and for failures of every verb but `mount` (as desync; mount(8) calls it "incorrect invocation").
const EXIT_FAILURE: u8 = 1;

/// Runs the program and gives its exit code.
pub fn run(argv: impl IntoIterator<Item = OsString>) -> ExitCode {
    let argv: Vec<OsString> = argv.into_iter().collect();
    if let Some(exit_code) = helper::run(&argv) {
        return exit_code;
    }
    let args = match Args::try_parse_from(argv) {
        Ok(args) => args,
        Err(error) => {
            return match error.kind() {
                // Help and version are answers, everything else is a mistake.
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
                    let _ = error.print();
                    ExitCode::SUCCESS
                }
                ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
                    let _ = error.print();
                    ExitCode::from(EXIT_FAILURE)
                }
                _ => {
                    // A service with a mistake in its command line goes on with nothing.
                    let (manager, descriptors) = service_environment::look();
                    descriptors.give_up(&manager);
                    complain(&mistake(&error.render().to_string()));
                    ExitCode::from(EXIT_FAILURE)
                }
            };
        }
    };
    let verbose = args.verbose;
    let rate_limit = args.rate_limit_bps.clone();
    init_log(verbose);
    let mut args = args;
    if let Some(config_file) = args.verb.config_file_mut() {
        *config_file = args.config;
    }
    let done = match args.verb {
        Verb::Mount(args) => return mount::run(args),
        Verb::Umount(args) => umount::run(&args),
        Verb::Status(args) => status::run(&args),
        Verb::Top(args) => top::run(&args),
        Verb::Map(args) => map::run(&args),
        Verb::Reload(args) => reload::run(&args),
        Verb::Abort(args) => abort::run(&args),
        Verb::Make(args) => make::run(&args),
        Verb::Tar(args) => tar::run(&args),
        Verb::Cat(args) => cat::run(&args),
        Verb::Ls(args) => ls::run(&args),
        Verb::Warm(args) => warm::run(&args),
        Verb::Profile(args) => profile::run(&args),
        Verb::Info(args) => inspect::info(&args),
        Verb::ListChunks(args) => inspect::list_chunks(&args),
        Verb::VerifyIndex(args) => inspect::verify_index(&args),
        Verb::Sign(args) => sign::run(&args),
        Verb::VerifySignature(args) => verify_signature::run(&args),
        Verb::S3Upgrade(args) => s3_upgrade::run(&args, verbose),
        Verb::ChunkServer(args) => serve::chunk_server(&args),
        Verb::IndexServer(args) => serve::index_server(&args),
        Verb::Config(args) => config::run(&args),
        Verb::Pull(args) => pull::pull(&args, rate_limit.as_deref()),
        Verb::Push(args) => pull::push(&args),
        Verb::Completions(args) => manual::completions(&args),
        Verb::Manual(args) => manual::write(&args),
        Verb::Demo(args) => demo::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&format!("{error:#}"));
            ExitCode::from(EXIT_FAILURE)
        }
    }
}

/// Says what went wrong, in one line whatever the names in it, and without the system's numbers beside its words.
fn complain(message: &str) {
    let _ = writeln!(
        io::stderr(),
        "caifs: {}",
        String::from_utf8_lossy(&printable(without_os_errors(message).as_bytes(), true))
    );
}

/// The text without ` (os error 2)` behind the words that say the same.
fn without_os_errors(message: &str) -> String {
    const BEFORE: &str = " (os error ";
    let mut pieces = message.split(BEFORE);
    let mut text = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        match piece.split_once(')') {
            Some((number, rest)) if number.bytes().all(|byte| byte.is_ascii_digit()) => text.push_str(rest),
            _ => {
                text.push_str(BEFORE);
                text.push_str(piece);
            }
        }
    }
    text
}

/// What clap says of wrong arguments, which it lays out over several lines, as one.
fn mistake(rendered: &str) -> String {
    let lines = rendered.lines().map(str::trim).filter(|line| !line.is_empty());
    let (usage, said): (Vec<&str>, Vec<&str>) =
        lines.filter(|line| !line.starts_with("For more information")).partition(|line| line.starts_with("Usage: "));
    let said = said.join(" ");
    let said = said.strip_prefix("error: ").unwrap_or(&said);
    match usage.first().and_then(|usage| usage.strip_prefix("Usage: ")) {
        Some(usage) => format!("{said} (usage: {usage}; more with --help)"),
        None => format!("{said} (more with --help)"),
    }
}

/// Whether the reader of our output has gone away.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io_errors = error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>());
    io_errors.into_iter().any(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// Log lines go to stderr, and where a mount sends them later: warnings by default, more with `-v`, or as the mount's `log-level` says. What
/// `CAIFS_LOG` says counts more.
fn init_log(verbose: u8) {
    let level = match verbose {
        0 => Level::WARN,
        1 => Level::INFO,
        _ => Level::DEBUG,
    };
    log::start(level, std::env::var("CAIFS_LOG").ok().as_deref());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_one_line_in_words() {
        for (message, wanted) in [
            ("x: No such file (os error 2)", "x: No such file"),
            ("x (os error 2): y (os error 28): z", "x: y: z"),
            ("a file (os error of mine)", "a file (os error of mine)"),
            ("x (os error 2", "x (os error 2"),
        ] {
            assert_eq!(without_os_errors(message), wanted);
        }
        let mistaken = |args: &[&str]| mistake(&Args::try_parse_from(args).expect_err("wrong").render().to_string());
        let missing = mistaken(&["caifs", "info"]);
        assert!(missing.starts_with("the following required arguments were not provided: <INDEX> (usage: caifs info"));
        assert!(mistaken(&["caifs", "mnt"]).starts_with("unrecognized subcommand 'mnt' (usage: caifs"));
        assert!(!mistaken(&["caifs", "info", "-f", "xml", "x"]).contains('\n'));
    }
}
