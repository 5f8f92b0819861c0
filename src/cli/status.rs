//! `caifs status`: what there is to see of one mount, or of all, for people and for programs.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;

use anyhow::{Result, bail};

use super::figures::{bytes, count, failing, fitted, percent, safe, span};
use super::runtime_dir::runtime_dir;
use crate::mount::control::client::{ControlError, Place, all, ask_all, place_of, status_of};
use crate::mount::control::protocol::{BackingStatus, EarlyStatus, Status, StoreStatus, TierStatus};

/// Requests and fetches shown to people.
const MAX_SHOWN: usize = 10;

/// Arguments of `status`.
#[derive(Debug, clap::Args)]
pub struct StatusArgs {
    /// The mountpoint (or anything in it) [default: all mounts, for root those of users as well, one a line].
    #[arg(value_name = "DIR")]
    pub mountpoint: Option<PathBuf>,
    /// Print it as JSON.
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: &StatusArgs) -> Result<()> {
    let dir = runtime_dir();
    let mut out = std::io::stdout().lock();
    if let Some(mountpoint) = &args.mountpoint {
        let status = status_of(&dir, &place_of(&dir, mountpoint)?)?;
        match args.json {
            true => writeln!(out, "{}", serde_json::to_string_pretty(&status)?)?,
            false => out.write_all(text(&status).as_bytes())?,
        }
        return Ok(());
    }
    let seen = ask_all(&dir, all(&dir)?);
    match args.json {
        true => writeln!(out, "{}", serde_json::to_string_pretty(&json(&seen))?)?,
        false => out.write_all(table(&seen).as_bytes())?,
    }
    // That there is no socket is said in the table; it may be meant. What users' mounts do is theirs to see to.
    let is_silent = |(place, status): &&(Place, Result<Status, ControlError>)| {
        !matches!(status, Ok(_) | Err(ControlError::NoSocket { .. })) && place.is_own(&dir)
    };
    let n_silent = seen.iter().filter(is_silent).count();
    if n_silent > 0 {
        bail!("{n_silent} of {} mounts do not answer", seen.len());
    }
    Ok(())
}

/// Each mount's status, or why there is none.
fn json(seen: &[(Place, Result<Status, ControlError>)]) -> Vec<serde_json::Value> {
    let one = |(place, status): &(Place, Result<Status, ControlError>)| match status {
        Ok(status) => serde_json::to_value(status).unwrap_or_default(),
        Err(error) => serde_json::json!({
            "mountpoint": place.mountpoint.to_string_lossy(),
            "device": format!("{}:{}", place.device.0, place.device.1),
            "source": place.source,
            "error": error.to_string(),
        }),
    };
    seen.iter().map(one).collect()
}

/// A line for each mount.
fn table(seen: &[(Place, Result<Status, ControlError>)]) -> String {
    if seen.is_empty() {
        return "no mounts of caifs\n".to_owned();
    }
    let mut rows = vec![
        ["MOUNTPOINT", "SOURCE", "KIND", "PID", "UP", "PRESENT", "READ", "FETCHED", "WAIT", "EIO", "STORES"]
            .map(str::to_owned),
    ];
    let mut errors = Vec::new();
    for (place, status) in seen {
        match status {
            Ok(status) => rows.push(row(status)),
            Err(error) => errors.push(format!("{}: {error}", safe(&place.name().to_string_lossy()))),
        }
    }
    let mut text = String::new();
    if rows.len() > 1 {
        let widths: Vec<usize> = (0..rows[0].len())
            .map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0))
            .collect();
        for row in &rows {
            let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
            let _ = writeln!(text, "{}", cells.join("  ").trim_end());
        }
    }
    for error in errors {
        let _ = writeln!(text, "{error}");
    }
    text
}

fn row(status: &Status) -> [String; 11] {
    let n_healthy = status.stores.iter().filter(|store| store.is_healthy).count();
    [
        safe(&status.mountpoint),
        fitted(&safe(&status.source), 48),
        status.kind.clone(),
        status.pid.to_string(),
        span(status.uptime_seconds),
        status.present.as_ref().map_or_else(|| "-".to_owned(), |present| percent(present.any)),
        bytes(status.totals.read_bytes),
        bytes(status.totals.fetched_bytes),
        status.requests.n_in_flight.to_string(),
        status.totals.n_eio.to_string(),
        match status.stores.len() {
            0 => "-".to_owned(),
            n => format!("{n_healthy}/{n} ok"),
        },
    ]
}

/// Everything about one mount.
pub fn text(status: &Status) -> String {
    let mut sheet = Sheet::default();
    let _ = writeln!(
        sheet.text,
        "{}: {} of {} (device {})",
        safe(&status.mountpoint),
        status.kind,
        safe(&status.source),
        status.device
    );
    sheet.line(
        "process",
        format!(
            "{}, user {}, up {}, {} resident, caifs {}",
            status.pid,
            status.uid,
            span(status.uptime_seconds),
            bytes(status.rss_bytes),
            status.program
        ),
    );
    content(&mut sheet, status);
    let totals = &status.totals;
    sheet.line(
        "totals",
        format!(
            "{} read, {} fetched in {} chunks",
            bytes(totals.read_bytes),
            bytes(totals.fetched_bytes),
            count(totals.n_fetches)
        ),
    );
    if totals.n_passthrough_opens > 0 {
        sheet.line(
            "totals",
            format!("{} opens that the kernel reads itself, uncounted", count(totals.n_passthrough_opens)),
        );
    }
    let mut wrong = Vec::new();
    for (n, what) in [
        (totals.n_missing, "missing"),
        (totals.n_bad_chunks, "bad"),
        (totals.n_store_errors, "failed"),
        (totals.n_panics, "panics"),
        (totals.n_trace_dropped, "trace lines lost"),
    ] {
        if n > 0 {
            wrong.push(format!("{} {what}", count(n)));
        }
    }
    wrong.extend(totals.eio.iter().map(|(site, n)| format!("EIO {site}: {}", count(*n))));
    sheet.line("errors", if wrong.is_empty() { "none".to_owned() } else { wrong.join(", ") });
    for store in &status.stores {
        sheet.line("stores", store_line(store));
        for detail in store_details(store) {
            sheet.line("stores", format!("  {detail}"));
        }
    }
    for tier in &status.tiers {
        sheet.line("tiers", tier_line(tier));
    }
    for line in early_lines(&status.early) {
        sheet.line("early", line);
    }
    for share in &status.budget {
        let waiting = if share.n_waiting > 0 { format!(", {} wait", share.n_waiting) } else { String::new() };
        let line = format!("{:<11} {} of {}{waiting}", share.name, bytes(share.used_bytes), bytes(share.limit_bytes));
        sheet.line("memory", line);
    }
    waiting(&mut sheet, status);
    let settings: Vec<String> =
        status.settings.iter().map(|setting| format!("{}={}", setting.name, safe(&setting.value))).collect();
    sheet.line("settings", settings.join(" "));
    sheet.text
}

/// Lines with a word before the first of each group.
#[derive(Debug, Default)]
struct Sheet {
    text: String,
    last: &'static str,
}

impl Sheet {
    fn line(&mut self, name: &'static str, content: impl AsRef<str>) {
        let shown = if name == self.last { "" } else { name };
        self.last = name;
        let _ = writeln!(self.text, "  {shown:<10} {}", content.as_ref());
    }
}

fn content(sheet: &mut Sheet, status: &Status) {
    let size: u64 = status.parts.iter().map(|part| part.size_bytes).sum();
    let n_chunks: u64 = status.parts.iter().map(|part| part.n_chunks).sum();
    let what = match status.n_parts {
        1 => String::new(),
        n => format!(" in {n} open indexes"),
    };
    let pieces = if n_chunks > 0 { format!(", {} chunks", count(n_chunks)) } else { String::new() };
    sheet.line("content", format!("{}{pieces}{what}", bytes(size)));
    let line = match &status.present {
        Some(present) => {
            let read = present.read.map_or_else(String::new, |read| format!("; read so far: {}", percent(read)));
            let about = if present.is_estimate { "about " } else { "" };
            format!(
                "{about}{} (memory {}, disk {}){read}",
                percent(present.any),
                percent(present.memory),
                percent(present.disk)
            )
        }
        None if n_chunks > 0 => "being counted (ask again)".to_owned(),
        None if status.n_parts == 0 => "nothing is open yet".to_owned(),
        None => "all of it, in a local file".to_owned(),
    };
    sheet.line("present", line);
}

fn store_line(store: &StoreStatus) -> String {
    let health = match (store.is_healthy, store.set_aside_seconds) {
        (true, _) => "ok".to_owned(),
        (false, Some(seconds)) if seconds > 0.0 => format!("set aside for {}", span(seconds)),
        (false, Some(_)) => "set aside, being probed".to_owned(),
        (false, None) => failing(store.n_errors_in_row),
    };
    let latency = match (store.p50_seconds, store.p95_seconds) {
        (Some(p50), Some(p95)) => format!(", half in {}, 95 % in {}", span(p50), span(p95)),
        _ => String::new(),
    };
    format!("{}: {health}{latency}", safe(&store.name))
}

fn store_details(store: &StoreStatus) -> Vec<String> {
    let mut figures = vec![format!("{} requests, {}", count(store.n_requests), bytes(store.found_bytes))];
    for (n, what) in [
        (store.n_in_flight, "under way"),
        (store.n_missing, "missing"),
        (store.n_failed, "failed"),
        (store.n_dropped, "given up"),
        (store.n_hedges, "doubled elsewhere"),
    ] {
        if n > 0 {
            figures.push(format!("{} {what}", count(n)));
        }
    }
    let mut lines = vec![figures.join(", ")];
    if let (Some(error), Some(age)) = (&store.last_error, store.last_error_age_seconds) {
        lines.push(format!("last error, {} ago: {}", span(age), safe(error)));
    }
    if !store.settings.is_empty() {
        let settings: Vec<String> =
            store.settings.iter().map(|(name, value)| format!("{name}={}", safe(value))).collect();
        lines.push(settings.join(" "));
    }
    lines
}

fn tier_line(tier: &TierStatus) -> String {
    let mut parts = Vec::new();
    match (tier.hit_rate, &tier.present) {
        (_, Some(present)) => parts.push(backing_line(tier, present)),
        (Some(rate), None) => parts.push(format!("{} of {} found", percent(rate), count(tier.n_hits + tier.n_misses))),
        (None, None) => parts.push("not asked yet".to_owned()),
    }
    match (tier.used_bytes, tier.limit_bytes) {
        (Some(used), Some(limit)) => parts.push(format!("{} of {}", bytes(used), bytes(limit))),
        (Some(used), None) => parts.push(bytes(used)),
        (None, Some(limit)) => parts.push(format!("at most {}", bytes(limit))),
        (None, None) => {}
    }
    for (n, what) in
        [(tier.n_kept, "kept"), (tier.n_evicted, "evicted"), (tier.n_bad, "bad"), (tier.n_errors, "errors")]
    {
        if n > 0 {
            parts.push(format!("{} {what}", count(n)));
        }
    }
    let place = tier.place.as_deref().map_or_else(String::new, |place| format!(" in {}", safe(place)));
    format!("{}{place}: {}", tier.name, parts.join(", "))
}

fn backing_line(tier: &TierStatus, present: &BackingStatus) -> String {
    let files = match present.n_files {
        1 => String::new(),
        n => format!(" in {n} files"),
    };
    let there = match present.n_complete == present.n_files {
        true => "complete".to_owned(),
        false => format!("{} of {} chunks", count(present.n_present), count(present.n_chunks)),
    };
    format!("{there}{files}, {} reads from it alone", count(tier.n_hits))
}

/// What was fetched before anybody asked, if anything was.
fn early_lines(early: &EarlyStatus) -> Vec<String> {
    let mut lines = Vec::new();
    if early.n_ahead > 0 || early.n_ahead_readers > 0 {
        lines.push(format!(
            "read ahead: {} in {} chunks, {} used; now {} ahead of {} readers",
            bytes(early.ahead_bytes),
            count(early.n_ahead),
            bytes(early.ahead_used_bytes),
            bytes(early.ahead_now_bytes),
            early.n_ahead_readers
        ));
    }
    if early.n_warmed > 0 {
        lines.push(format!("warmed or replayed: {} in {} chunks", bytes(early.warmed_bytes), count(early.n_warmed)));
    }
    if early.n_in_flight > 0 {
        lines.push(format!("{} chunks under way", count(early.n_in_flight)));
    }
    lines
}

fn waiting(sheet: &mut Sheet, status: &Status) {
    let requests = &status.requests;
    let n: u64 = requests.answered.iter().map(|(_, n)| n).sum();
    let mut line = format!("{} answered, {} wait", count(n), requests.n_in_flight);
    for (n, what) in
        [(requests.n_waiting_for_chunks, "for chunks"), (requests.n_waiting_for_turn, "for their turn at a store")]
    {
        if n > 0 {
            let _ = write!(line, ", {n} {what}");
        }
    }
    sheet.line("requests", line);
    for request in requests.oldest.iter().take(MAX_SHOWN) {
        let range = match request.n_bytes {
            0 => String::new(),
            n => format!(", {n} bytes from {}", request.offset),
        };
        sheet.line(
            "requests",
            format!("  {} for {}: inode {}{range}", request.op, span(request.age_seconds), request.ino),
        );
    }
    sheet.line("fetches", format!("{} under way", status.fetches.n_in_flight));
    for fetch in status.fetches.oldest.iter().take(MAX_SHOWN) {
        sheet.line("fetches", format!("  {} for {}", fetch.chunk, span(fetch.age_seconds)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mount::control::protocol::{FetchStatus, PartStatus, PresentStatus, RequestStatus, SettingStatus};

    #[test]
    fn a_directory_of_which_nothing_is_open_has_nothing_present() {
        let empty = Status { kind: "directory".into(), ..Status::default() };
        assert!(text(&empty).contains("  present    nothing is open yet\n"), "{}", text(&empty));
        let plain = Status { n_parts: 1, parts: vec![PartStatus::default()], ..Status::default() };
        assert!(text(&plain).contains("  present    all of it, in a local file\n"), "{}", text(&plain));
    }

    fn status() -> Status {
        let mut status = Status {
            program: "1.0".into(),
            source: "https://h/x.caibx\x1b[2J".into(),
            mountpoint: "/mnt/a".into(),
            device: "0:57".into(),
            kind: "image".into(),
            pid: 12,
            uptime_seconds: 61.0,
            n_parts: 1,
            parts: vec![PartStatus { size_bytes: 3 << 20, n_chunks: 48, ..PartStatus::default() }],
            present: Some(PresentStatus {
                memory: 0.1,
                disk: 0.3,
                any: 0.34,
                read: Some(0.2),
                is_estimate: true,
                age_seconds: 0.0,
            }),
            settings: vec![SettingStatus { name: "memory".into(), value: "64M".into(), can_change: true }],
            ..Status::default()
        };
        status.requests.n_in_flight = 1;
        status.requests.oldest.push(RequestStatus {
            op: "read".into(),
            ino: 2,
            offset: 4096,
            n_bytes: 512,
            age_seconds: 12.34,
        });
        status.fetches.n_in_flight = 1;
        status.fetches.oldest.push(FetchStatus { chunk: "6a1d".into(), age_seconds: 12.3 });
        status.stores.push(StoreStatus {
            name: "https://h/c".into(),
            is_healthy: false,
            set_aside_seconds: Some(3.0),
            n_requests: 1234,
            n_failed: 4,
            last_error: Some("timed out".into()),
            last_error_age_seconds: Some(2.0),
            settings: vec![("concurrency".into(), "4".into())],
            ..StoreStatus::default()
        });
        status.tiers.push(TierStatus {
            name: "memory".into(),
            n_hits: 3,
            n_misses: 1,
            hit_rate: Some(0.75),
            used_bytes: Some(1 << 20),
            limit_bytes: Some(2 << 20),
            ..TierStatus::default()
        });
        status.tiers.push(TierStatus {
            name: "backing".into(),
            place: Some("/b.img".into()),
            n_hits: 7,
            n_kept: 2,
            present: Some(BackingStatus { n_files: 1, n_complete: 0, n_chunks: 48, n_present: 16 }),
            ..TierStatus::default()
        });
        status.early = EarlyStatus {
            n_ahead: 3,
            ahead_bytes: 3 << 20,
            ahead_used_bytes: 2 << 20,
            n_ahead_readers: 1,
            ahead_now_bytes: 1 << 20,
            n_warmed: 5,
            warmed_bytes: 5 << 20,
            n_in_flight: 2,
        };
        status.totals.n_passthrough_opens = 4;
        status.totals.eio.push(("03 store failed".into(), 2));
        status
    }

    #[test]
    fn a_person_reads_what_is_going_on() {
        let shown = text(&status());
        for wanted in [
            "/mnt/a: image of https://h/x.caibx\\u{1b}[2J (device 0:57)",
            "  process    12, user 0, up 1m 1s, 0 B resident, caifs 1.0",
            "  content    3.0 MiB, 48 chunks",
            "  present    about 34 % (memory 10 %, disk 30 %); read so far: 20 %",
            "  errors     EIO 03 store failed: 2",
            "  stores     https://h/c: set aside for 3.0 s",
            "               1,234 requests, 0 B, 4 failed",
            "               last error, 2.0 s ago: timed out",
            "               concurrency=4",
            "  tiers      memory: 75 % of 4 found, 1.0 MiB of 2.0 MiB",
            "             backing in /b.img: 16 of 48 chunks, 7 reads from it alone, 2 kept",
            "             4 opens that the kernel reads itself, uncounted",
            "  early      read ahead: 3.0 MiB in 3 chunks, 2.0 MiB used; now 1.0 MiB ahead of 1 readers",
            "             warmed or replayed: 5.0 MiB in 5 chunks",
            "             2 chunks under way",
            "  requests   0 answered, 1 wait",
            "               read for 12.3 s: inode 2, 512 bytes from 4096",
            "               6a1d for 12.3 s",
            "  settings   memory=64M",
        ] {
            assert!(shown.lines().any(|line| line == wanted), "{wanted:?} is not in\n{shown}");
        }
    }

    #[test]
    fn a_store_is_said_to_be_set_aside_or_failing_or_ok() {
        for (is_healthy, set_aside_seconds, n_errors_in_row, wanted) in [
            (true, None, 2, "h: ok"),
            (false, None, 1, "h: failing, 1 error in a row"),
            (false, None, 1234, "h: failing, 1,234 errors in a row"),
            (false, Some(3.0), 5, "h: set aside for 3.0 s"),
            (false, Some(0.0), 5, "h: set aside, being probed"),
        ] {
            let name = "h".to_owned();
            let store = StoreStatus { name, is_healthy, set_aside_seconds, n_errors_in_row, ..StoreStatus::default() };
            assert_eq!(store_line(&store), wanted);
        }
    }

    #[test]
    fn a_backing_file_that_is_complete_is_said_to_be() {
        let present = Some(BackingStatus { n_files: 1, n_complete: 1, n_chunks: 48, n_present: 48 });
        let tier = TierStatus { name: "backing".into(), place: Some("/b".into()), present, ..TierStatus::default() };
        assert_eq!(tier_line(&tier), "backing in /b: complete, 0 reads from it alone");
    }

    #[test]
    fn all_mounts_are_a_table_and_silence_is_said() {
        let place = |minor| Place { device: (0, minor), mountpoint: "/mnt/b".into(), source: "s".into(), uid: None };
        let seen = vec![(place(57), Ok(status())), (place(58), Err(ControlError::Dead("/mnt/b".into())))];
        let shown = table(&seen);
        let lines: Vec<&str> = shown.lines().collect();
        assert_eq!(lines.len(), 3, "{shown}");
        assert!(lines[0].starts_with("MOUNTPOINT  SOURCE"), "{shown}");
        assert!(lines[1].starts_with("/mnt/a") && lines[1].ends_with("0/1 ok"), "{shown}");
        assert!(lines[2].starts_with("/mnt/b: the process that served /mnt/b is dead"), "{shown}");
        let shown = json(&seen);
        assert_eq!((&shown[0]["pid"], &shown[1]["device"]), (&serde_json::json!(12), &serde_json::json!("0:58")));
        assert_eq!(table(&[]), "no mounts of caifs\n");
    }
}
