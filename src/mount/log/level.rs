//! What is said: as the process was started, as its mount says, or as somebody who looks into it says.

use std::sync::OnceLock;

use tracing::Level;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, fmt, reload};

use super::{Lines, LogWriter};

/// What the process was started with.
struct Started {
    filter: reload::Handle<EnvFilter, Registry>,
    level: Level,
    /// It is finer than a level, and stays.
    is_directives: bool,
}

/// A process has one subscriber.
static STARTED: OnceLock<Started> = OnceLock::new();

/// Begins to log, to standard error: what is at least of this level, or, instead and whatever a mount says, what `directives` name (those of
/// [`EnvFilter`]; wrong ones count for nothing).
pub fn start(level: Level, directives: Option<&str>) {
    let directives = directives.and_then(|directives| EnvFilter::try_new(directives).ok());
    let is_directives = directives.is_some();
    let (filter, handle) = reload::Layer::new(directives.unwrap_or_else(|| filter(level)));
    let lines = fmt::layer().event_format(Lines::default()).with_writer(LogWriter);
    // A program that uses this library may have a subscriber of its own.
    if tracing_subscriber::registry().with(filter).with(lines).try_init().is_ok() {
        drop(STARTED.set(Started { filter: handle, level, is_directives }));
        super::hear_panics();
    }
}

/// What is said from now on; `None` for what it was at the start.
pub fn set_level(level: Option<Level>) {
    let Some(started) = STARTED.get().filter(|started| !started.is_directives) else { return };
    if let Err(error) = started.filter.reload(filter(level.unwrap_or(started.level))) {
        tracing::warn!("log-level: {error}");
    }
}

/// The level as options name it.
pub fn level_name(level: Level) -> &'static str {
    match level {
        Level::ERROR => "error",
        Level::WARN => "warn",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    }
}

/// The most talkative levels are of what we say, not of what others do for us.
fn filter(level: Level) -> EnvFilter {
    EnvFilter::new(match level {
        Level::ERROR => "error",
        Level::WARN => "warn",
        Level::INFO => "info",
        Level::DEBUG => "caifs=debug,info",
        Level::TRACE => "caifs=trace,info",
    })
}
