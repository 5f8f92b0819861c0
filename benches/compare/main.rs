//! Side by side with the peers: one command, one run, a table and a JSON file.
//!
//! `cargo bench --bench compare -- [--quick] [--only NAME]… [--runs N] [--tree DIR] [--image-mib N] [--out FILE]`
//!
//! * [`options`]: what was asked for.
//! * [`data`]: what is mounted: a tree and an image as casync index and store and as squashfs, made once and kept.
//! * [`subjects`]: who mounts it: caifs, casync, desync, squashfuse, and the kernel's own filesystem.
//! * [`measure`]: one measurement each: find, tar, sequential and random reads.
//! * [`http`]: the image over HTTP, with a delay, and with the disk tier before it.
//! * [`backing`]: the image as the kernel reads it itself, beside the plain file.
//! * [`limit`]: the same chunks opened, decoded and verified without any filesystem.
//! * [`results`]: samples, medians, the table, the JSON, the targets.
//!
//! All subjects are measured in turn within each round, so that a change of the machine's speed meets all of them, and
//! only figures of one run are compared. Nothing is asserted about times. Every server is unmounted and ended by its
//! process id, also when the run is interrupted.

mod backing;
mod data;
mod http;
mod limit;
mod measure;
mod options;
mod results;
mod rounds;
mod subjects;
#[path = "../../tests/support/mod.rs"]
mod support;

use std::process::ExitCode;

use crate::data::Data;
use crate::options::Options;
use crate::results::Results;
use crate::support::mounted;

fn main() -> ExitCode {
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(Some(options)) => options,
        Ok(None) => {
            println!("{}", options::USAGE);
            return ExitCode::SUCCESS;
        }
        Err(message) => {
            eprintln!("compare: {message}\n{}", options::USAGE);
            return ExitCode::from(2);
        }
    };
    undo_on_interruption();
    match compare(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("compare: {message}");
            ExitCode::FAILURE
        }
    }
}

fn compare(options: &Options) -> Result<(), String> {
    // What an earlier run that was killed left mounted would be in the way, and only that is touched.
    std::fs::create_dir_all(&options.work).map_err(|error| format!("{}: {error}", options.work.display()))?;
    for mountpoint in mounted::mountpoints_under(&options.work) {
        mounted::unmount(&mountpoint);
    }
    let mut results = Results::new(options);
    let data = Data::prepare(options, &mut results)?;
    rounds::run(options, &data, &mut results);
    print!("{}", results.table());
    let json = serde_json::to_string_pretty(&results.json()).map_err(|error| error.to_string())?;
    std::fs::write(&options.out, json + "\n").map_err(|error| format!("{}: {error}", options.out.display()))?;
    println!("\nwritten: {}", options.out.display());
    match results.failures() {
        [] => Ok(()),
        failures => Err(format!("{} failures, named above", failures.len())),
    }
}

/// SIGINT, SIGTERM and SIGHUP undo all mounts and end the program. A handler thread, not a signal mask, because children
/// would inherit a mask.
fn undo_on_interruption() {
    std::thread::spawn(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("a runtime for signals can be made");
        runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            let listen = |kind| signal(kind).expect("a signal can be listened to");
            let mut interrupt = listen(SignalKind::interrupt());
            let mut terminate = listen(SignalKind::terminate());
            let mut hangup = listen(SignalKind::hangup());
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hangup.recv() => {}
            }
        });
        mounted::undo_all();
        eprintln!("compare: interrupted; mounts undone");
        std::process::exit(130);
    });
}
