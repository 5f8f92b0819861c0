//! Signals of a server: SIGINT and SIGTERM end it in good order, a second one at once; SIGHUP makes it read its settings again.

use std::future::Future;
use std::io;
use std::process;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

/// Added to the number of the signal for the exit code, as shells do.
const SIGNAL_EXIT_BASE: i32 = 128;

/// Catches the signals, for the rest of the process: what ends at the first SIGINT or SIGTERM, and what gives a value for each SIGHUP.
/// After the end a second signal ends the process.
///
/// # Errors
/// The system does not let them be caught.
pub fn catch() -> io::Result<(impl Future<Output = ()> + use<>, mpsc::Receiver<()>)> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let hangup = signal(SignalKind::hangup())?;
    // One that waits is enough: what is read is what is there then.
    let (reload, reloads) = mpsc::channel(1);
    tokio::spawn(forward(hangup, reload));
    let end = async move {
        either(&mut interrupt, &mut terminate).await;
        tokio::spawn(async move {
            let kind = either(&mut interrupt, &mut terminate).await;
            process::exit(SIGNAL_EXIT_BASE + kind.as_raw_value());
        });
    };
    Ok((end, reloads))
}

async fn either(interrupt: &mut Signal, terminate: &mut Signal) -> SignalKind {
    tokio::select! {
        _ = interrupt.recv() => SignalKind::interrupt(),
        _ = terminate.recv() => SignalKind::terminate(),
    }
}

async fn forward(mut hangup: Signal, reload: mpsc::Sender<()>) {
    while hangup.recv().await.is_some() {
        // Full means that one waits already, closed that nobody reloads any more.
        let _ = reload.try_send(());
    }
}
