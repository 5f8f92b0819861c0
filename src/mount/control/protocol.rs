//! What goes over a control socket: one JSON object a line, from the asker one [`Ask`], from the service one [`Answer`] each.
//!
//! ```text
//! {"version":1,"request":"status"}
//! {"version":1,"reply":{"status":{…}}}
//! {"version":1,"request":{"remount":{"options":[["cache-size","40G"]]}}}
//! {"version":1,"error":{"kind":"fixed","message":"nothing is changed: …"}}
//! ```
//!
//! Names of fields are those of the structs below: they stay, others may be added. Spans are seconds, sizes bytes, shares 0 to 1. Paths
//! that are not UTF-8 are shown with replacement characters. `caifs status --json` prints [`Status`] as it is.
//!
//! Invariants: a request is at most [`MAX_REQUEST_BYTES`] long, a reply at most [`MAX_REPLY_BYTES`]; neither holds a secret.

use serde::{Deserialize, Serialize};

/// The version of this protocol. Another one is refused by name.
pub const VERSION: u32 = 1;

/// The longest request, in bytes.
pub const MAX_REQUEST_BYTES: usize = 64 << 10;

/// The longest reply, in bytes.
pub const MAX_REPLY_BYTES: usize = 8 << 20;

/// The most cells of a map.
pub const MAX_CELLS: u32 = 4096;

/// The most requests, fetches, parts and stores that are listed; of more only the number is told.
pub const MAX_LISTED: usize = 100;

/// What is asked, with the version it is asked in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ask {
    /// [`VERSION`].
    pub version: u32,
    /// What is wanted.
    pub request: Request,
}

/// What can be asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Everything there is to see.
    Status,
    /// Which parts of an image or archive are present.
    Map {
        /// Of a mount of many indexes: the one at this path.
        #[serde(default)]
        part: Option<String>,
        /// Into how many cells it is divided, at most [`MAX_CELLS`].
        cells: u32,
    },
    /// Read the settings again.
    Reload,
    /// Put options over the settings in force.
    Remount {
        /// Names with their values.
        options: Vec<(String, Option<String>)>,
    },
}

/// What is answered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// [`VERSION`].
    pub version: u32,
    /// The reply, if all went well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply: Option<Reply>,
    /// Why not, otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Refusal>,
}

/// A reply, by what was asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// To [`Request::Status`].
    Status(Box<Status>),
    /// To [`Request::Map`].
    Map(Map),
    /// To [`Request::Reload`] and [`Request::Remount`].
    Changed(Changed),
}

/// Why something was not done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// What kind of reason it is.
    pub kind: RefusalKind,
    /// In one line.
    pub message: String,
}

/// Kinds of reasons.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalKind {
    /// The request is none, or of another version.
    BadRequest,
    /// It cannot be done now.
    Failed,
    /// An option cannot change while mounted.
    Fixed,
    /// Too many ask at the same time.
    Busy,
}

/// Everything there is to see of a mount.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Status {
    /// The program's version.
    pub program: String,
    /// What is mounted, without secrets.
    pub source: String,
    /// Where, by now; empty when it is out of sight.
    pub mountpoint: String,
    /// Device number of the mount, `major:minor`.
    pub device: String,
    /// `image`, `tree`, or `directory` for a directory of indexes.
    pub kind: String,
    /// The process that serves it.
    pub pid: u32,
    /// Its user.
    pub uid: u32,
    /// Since it was opened.
    pub uptime_seconds: f64,
    /// Resident memory of the process.
    pub rss_bytes: u64,
    /// Indexes and archives that are open, of those at most [`MAX_LISTED`].
    pub parts: Vec<PartStatus>,
    /// How many are open.
    pub n_parts: usize,
    /// The stores in the order they are asked.
    pub stores: Vec<StoreStatus>,
    /// What keeps chunks, fastest first: `memory`, `backing`, and `disk` or `keeper`.
    pub tiers: Vec<TierStatus>,
    /// What is fetched before anybody asks for it.
    #[serde(default)]
    pub early: EarlyStatus,
    /// Who has which share of the memory: `memory tier`, `in flight`, `replies`, `tree`.
    pub budget: Vec<BudgetStatus>,
    /// Requests of the kernel.
    pub requests: RequestsStatus,
    /// Chunks being fetched.
    pub fetches: FetchesStatus,
    /// How much of what is mounted is at hand; `None` while that is being counted for the first time.
    pub present: Option<PresentStatus>,
    /// What happened since it was opened.
    pub totals: Totals,
    /// The settings in force, by the options' names; secrets are not shown.
    pub settings: Vec<SettingStatus>,
}

/// An index or archive.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct PartStatus {
    /// Path within the mount; empty for the only one.
    pub path: String,
    /// Where the index or archive lies, without secrets.
    pub location: String,
    /// `blob index`, `archive index` or `archive`.
    pub kind: String,
    /// Length of its content.
    pub size_bytes: u64,
    /// Chunks (of a plain archive, blocks); 0 for a local archive.
    pub n_chunks: u64,
}

/// A store and how it is doing.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct StoreStatus {
    /// Its location without secrets.
    pub name: String,
    /// The group of mirrors it is in.
    pub mirror_of: Option<String>,
    /// Whether it answers and is asked in its turn; if not it is set aside, or has errors in a row.
    pub is_healthy: bool,
    /// Errors since its last answer, and requests that had none in their time.
    #[serde(default)]
    pub n_errors_in_row: u32,
    /// For how much longer it is set aside.
    pub set_aside_seconds: Option<f64>,
    /// Requests so far.
    pub n_requests: u64,
    /// Of those, with something found.
    pub n_found: u64,
    /// Of those, with nothing.
    pub n_missing: u64,
    /// Of those, failed.
    pub n_failed: u64,
    /// Of those, given up on by us.
    pub n_dropped: u64,
    /// How often another was asked beside it because it was late.
    pub n_hedges: u64,
    /// Bytes it gave, in stored form.
    pub found_bytes: u64,
    /// Requests under way.
    pub n_in_flight: u64,
    /// Half of the recent requests took no longer; `None` while few are known.
    pub p50_seconds: Option<f64>,
    /// 95 of 100 recent requests took no longer.
    pub p95_seconds: Option<f64>,
    /// The last error.
    pub last_error: Option<String>,
    /// How long ago that was.
    pub last_error_age_seconds: Option<f64>,
    /// What is set for it beside the defaults.
    pub settings: Vec<(String, String)>,
}

/// A place that keeps chunks.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct TierStatus {
    /// `memory`, `backing`, `disk` or `keeper`.
    pub name: String,
    /// Where it is, for those that are somewhere; of several backing files, the first.
    pub place: Option<String>,
    /// Chunks found there; of backing files, reads that they alone answered.
    pub n_hits: u64,
    /// Chunks looked for there in vain.
    pub n_misses: u64,
    /// Hits among both; `None` when there was neither.
    pub hit_rate: Option<f64>,
    /// Bytes kept there (on disk: by all mounts); `None` when that is not known.
    pub used_bytes: Option<u64>,
    /// The most there may be.
    pub limit_bytes: Option<u64>,
    /// Of backing files: how much of their images is in them.
    #[serde(default)]
    pub present: Option<BackingStatus>,
    /// Chunks put there.
    pub n_kept: u64,
    /// Chunks dropped to make room.
    pub n_evicted: u64,
    /// Chunks there that were damaged.
    pub n_bad: u64,
    /// Operations that failed.
    pub n_errors: u64,
}

/// How much of images is in their backing files.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct BackingStatus {
    /// Backing files in use.
    pub n_files: u64,
    /// Of those, complete, and known to be so on the disk.
    pub n_complete: u64,
    /// Chunks of their images.
    pub n_chunks: u64,
    /// Of those, in the files.
    pub n_present: u64,
}

/// What is fetched before anybody asks for it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct EarlyStatus {
    /// Chunks (or blocks) read ahead of a reader.
    pub n_ahead: u64,
    /// Their plain bytes.
    pub ahead_bytes: u64,
    /// Of what was read ahead (or found in memory on the way), the bytes that their reader came to.
    pub ahead_used_bytes: u64,
    /// Readers that are read ahead of now.
    pub n_ahead_readers: u64,
    /// Bytes ahead of all readers now.
    pub ahead_now_bytes: u64,
    /// Chunks (or blocks) fetched for later: warmed, or replayed from a profile.
    pub n_warmed: u64,
    /// Their plain bytes.
    pub warmed_bytes: u64,
    /// Chunks (or blocks) being fetched now without anyone waiting.
    pub n_in_flight: u64,
}

/// A share of the memory budget.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct BudgetStatus {
    /// Who has it.
    pub name: String,
    /// Bytes in use.
    pub used_bytes: u64,
    /// The most there may be.
    pub limit_bytes: u64,
    /// How many wait for their share.
    pub n_waiting: u64,
}

/// Requests of the kernel.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct RequestsStatus {
    /// Requests that wait for something else than memory.
    pub n_in_flight: u64,
    /// Reads that wait for chunks.
    pub n_waiting_for_chunks: u64,
    /// Requests to stores that wait for their turn.
    pub n_waiting_for_turn: u64,
    /// Those that wait longest, at most [`MAX_LISTED`].
    pub oldest: Vec<RequestStatus>,
    /// Answered so far, by name.
    pub answered: Vec<(String, u64)>,
}

/// A request that waits.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct RequestStatus {
    /// Its name, as `read`.
    pub op: String,
    /// The inode it is about.
    pub ino: u64,
    /// First byte of a read.
    pub offset: u64,
    /// Bytes of a read.
    pub n_bytes: u32,
    /// How long it has been waiting.
    pub age_seconds: f64,
}

/// Chunks being fetched.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct FetchesStatus {
    /// How many.
    pub n_in_flight: u64,
    /// Those that take longest, at most [`MAX_LISTED`].
    pub oldest: Vec<FetchStatus>,
}

/// A chunk being fetched.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct FetchStatus {
    /// Its id; of a plain archive, `block` and its number.
    pub chunk: String,
    /// How long it has been wanted.
    pub age_seconds: f64,
}

/// How much of what is mounted is at hand, as shares of its bytes.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct PresentStatus {
    /// In memory.
    pub memory: f64,
    /// On disk.
    pub disk: f64,
    /// In any of them.
    pub any: f64,
    /// Read since it was opened; `None` where nobody remembers.
    pub read: Option<f64>,
    /// Whether this is concluded from a sample: what is large is not looked at chunk by chunk.
    pub is_estimate: bool,
    /// How old it is.
    pub age_seconds: f64,
}

/// What happened since a mount was opened.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Totals {
    /// Bytes given to readers.
    pub read_bytes: u64,
    /// Bytes that came from stores, in stored form.
    pub fetched_bytes: u64,
    /// Chunks that came from stores.
    pub n_fetches: u64,
    /// Chunks that no store had.
    pub n_missing: u64,
    /// Fetched chunks with wrong bytes.
    pub n_bad_chunks: u64,
    /// Fetches that ended in an error.
    pub n_store_errors: u64,
    /// Opens of files that the kernel reads itself from then on: what is read of those is not counted.
    #[serde(default)]
    pub n_passthrough_opens: u64,
    /// Requests answered with EIO.
    pub n_eio: u64,
    /// Of those, by what was wrong.
    pub eio: Vec<(String, u64)>,
    /// Panics caught.
    pub n_panics: u64,
    /// Lines of the access trace that were lost.
    pub n_trace_dropped: u64,
}

/// A setting in force.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SettingStatus {
    /// The option's name.
    pub name: String,
    /// Its value.
    pub value: String,
    /// Whether reload and remount can change it.
    pub can_change: bool,
}

/// Which parts of an image or archive are present.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Map {
    /// What it is a map of.
    pub part: PartStatus,
    /// Each for the same number of bytes, first to last.
    pub cells: Vec<Cell>,
    /// Whether each cell was concluded from a sample of its chunks.
    pub is_estimate: bool,
    /// Whether anybody remembers what was read.
    pub knows_reads: bool,
}

/// A piece of a map.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Cell {
    /// Share of it in memory.
    pub memory: f32,
    /// Share of it on disk.
    pub disk: f32,
    /// Share of it in either.
    pub any: f32,
    /// Whether something of it is being fetched.
    pub is_fetching: bool,
    /// Whether something of it was read.
    pub was_read: bool,
}

/// What came of reading settings again.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Changed {
    /// In force now.
    pub changed: Vec<Change>,
    /// Stores with options that are others now: the store, and the options' names.
    pub stores: Vec<(String, Vec<String>)>,
    /// Said, and not in force before the mount is made anew.
    pub fixed: Vec<Change>,
}

/// A setting that is another.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Change {
    /// The option's name.
    pub name: String,
    /// Its value before, `None` for what holds when nothing is said.
    pub from: Option<String>,
    /// Its value after.
    pub to: Option<String>,
}

impl Answer {
    /// A reply.
    pub fn reply(reply: Reply) -> Self {
        Self { version: VERSION, reply: Some(reply), error: None }
    }

    /// A refusal.
    pub fn refusal(kind: RefusalKind, message: impl Into<String>) -> Self {
        Self { version: VERSION, reply: None, error: Some(Refusal { kind, message: message.into() }) }
    }
}

/// Reads a request.
///
/// # Errors
/// The refusal to answer with.
pub fn parse_ask(line: &[u8]) -> Result<Request, Box<Answer>> {
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    let refuse = |message: String| Box::new(Answer::refusal(RefusalKind::BadRequest, message));
    // The version first: a later one may have requests that this one cannot read.
    match serde_json::from_slice::<Versioned>(line) {
        Ok(Versioned { version: VERSION }) => {}
        Ok(Versioned { version }) => {
            return Err(refuse(format!("version {version} of the control protocol is not spoken here, but {VERSION}")));
        }
        Err(error) => return Err(refuse(format!("the request cannot be read: {error}"))),
    }
    let ask: Ask =
        serde_json::from_slice(line).map_err(|error| refuse(format!("the request cannot be read: {error}")))?;
    Ok(ask.request)
}

/// A message as it is sent, with the end of its line.
pub fn to_line(message: &impl Serialize) -> Vec<u8> {
    // These types have nothing that JSON cannot say.
    let mut line = serde_json::to_vec(message).unwrap_or_default();
    line.push(b'\n');
    line
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn requests_are_read_as_they_are_documented() {
        for (line, wanted) in [
            (r#"{"version":1,"request":"status"}"#, Request::Status),
            (r#"{"version":1,"request":"reload"}"#, Request::Reload),
            (r#"{"version":1,"request":{"map":{"cells":10}}}"#, Request::Map { part: None, cells: 10 }),
            (
                r#"{"version":1,"request":{"remount":{"options":[["cache-size","40G"],["offline",null]]}}}"#,
                Request::Remount { options: vec![("cache-size".into(), Some("40G".into())), ("offline".into(), None)] },
            ),
        ] {
            assert_eq!(parse_ask(line.as_bytes()).unwrap(), wanted, "{line}");
            let again = to_line(&Ask { version: VERSION, request: wanted.clone() });
            assert_eq!(parse_ask(&again).unwrap(), wanted);
            assert_eq!(again.iter().filter(|byte| **byte == b'\n').count(), 1);
        }
    }

    #[test]
    fn what_is_no_request_is_refused_with_the_reason() {
        for (line, reason) in [
            ("", "the request cannot be read"),
            ("status", "the request cannot be read"),
            (r#"{"request":"status"}"#, "missing field `version`"),
            (r#"{"version":2,"request":{"new":1}}"#, "version 2 of the control protocol is not spoken here, but 1"),
            (r#"{"version":1,"request":"statuses"}"#, "unknown variant `statuses`"),
            (r#"{"version":1,"request":{"map":{"cells":-1}}}"#, "the request cannot be read"),
        ] {
            let refusal = parse_ask(line.as_bytes()).unwrap_err().error.unwrap();
            assert_eq!(refusal.kind, RefusalKind::BadRequest);
            assert!(refusal.message.contains(reason), "{line}: {}", refusal.message);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_request_or_refused(line in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_ask(&line);
        }
    }
}
