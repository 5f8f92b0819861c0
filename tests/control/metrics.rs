//! Metrics: what is served is read by a parser of the format (exposition format 0.0.4), which checks what Prometheus demands of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::FileExt;

use super::ground::{Aligned, BLOCK_BYTES, Ground, direct};
use crate::mount::can_mount;
use crate::support::run::run;
use crate::support::server::free_port;

/// The samples of a page: name and labels as one text, with the value.
type Samples = BTreeMap<String, f64>;

/// Reads a page, and panics at whatever Prometheus would not take.
fn parse(text: &str) -> Samples {
    let mut kinds: BTreeMap<&str, &str> = BTreeMap::new();
    let mut helped = BTreeSet::new();
    let mut samples = Samples::new();
    let mut families_done: Vec<&str> = Vec::new();
    assert!(text.ends_with('\n'), "the last line has an end");
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, words) = help.split_once(' ').expect("a help has a text");
            assert!(helped.insert(name) && !words.is_empty(), "{line}");
            continue;
        }
        if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').expect("a type has a name");
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            assert!(kinds.insert(name, kind).is_none(), "{line}: typed twice");
            families_done.push(name);
            continue;
        }
        let (key, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("no sample: {line}"));
        let name = key.split('{').next().expect("a part");
        assert!(name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') && name.starts_with("caifs_"), "{line}");
        let base = ["_bucket", "_sum", "_count"]
            .iter()
            .find_map(|end| name.strip_suffix(end))
            .filter(|base| kinds.get(base) == Some(&"histogram"));
        let family = base.unwrap_or(name);
        assert!(kinds.contains_key(family) && helped.contains(family), "{line}: neither typed nor helped");
        assert_eq!(families_done.last(), Some(&family), "{line}: samples of a family stand together");
        assert_eq!(kinds[family] == "counter", name.ends_with("_total"), "{line}: counters end with _total");
        if let Some(labels) = key.strip_prefix(name).filter(|labels| !labels.is_empty()) {
            check_labels(labels, line);
        }
        let value: f64 = value.parse().unwrap_or_else(|_| panic!("no number: {line}"));
        assert!(value >= 0.0, "{line}");
        assert!(samples.insert(key.to_owned(), value).is_none(), "{line}: twice");
    }
    check_histograms(&kinds, &samples);
    samples
}

fn check_labels(labels: &str, line: &str) {
    let inside = labels.strip_prefix('{').and_then(|rest| rest.strip_suffix('}')).unwrap_or_else(|| panic!("{line}"));
    let mut rest = inside;
    while !rest.is_empty() {
        let (name, value) = rest.split_once("=\"").unwrap_or_else(|| panic!("{line}: {rest}"));
        assert!(name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'), "{line}");
        let mut escaped = false;
        let end = value.char_indices().find(|(_, c)| {
            let is_end = *c == '"' && !escaped;
            escaped = *c == '\\' && !escaped;
            is_end
        });
        let (end, _) = end.unwrap_or_else(|| panic!("{line}: a value without end"));
        rest = &value[end + 1..];
        rest = rest.strip_prefix(',').unwrap_or(rest);
    }
}

/// Buckets grow, the last is for everything, and it is the count.
fn check_histograms(kinds: &BTreeMap<&str, &str>, samples: &Samples) {
    for (name, _) in kinds.iter().filter(|(_, kind)| **kind == "histogram") {
        let bucket = format!("{name}_bucket{{");
        let mut series: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
        for (key, value) in samples.iter().filter(|(key, _)| key.starts_with(&bucket)) {
            let labels = key[bucket.len()..].trim_end_matches('}');
            let (others, end) = labels.rsplit_once("le=\"").expect("a bucket has an end");
            let end = end.trim_end_matches('"');
            let end = if end == "+Inf" { f64::INFINITY } else { end.parse().expect("a number") };
            series.entry(others.trim_end_matches(',').to_owned()).or_default().push((end, *value));
        }
        for (labels, mut buckets) in series {
            buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
            assert!(buckets.windows(2).all(|pair| pair[0].1 <= pair[1].1), "{name}{{{labels}}}: {buckets:?}");
            let braces = if labels.is_empty() { String::new() } else { format!("{{{labels}}}") };
            let last = buckets.last().expect("there is one");
            assert_eq!((last.0, last.1), (f64::INFINITY, samples[&format!("{name}_count{braces}")]), "{name}");
            assert!(samples.contains_key(&format!("{name}_sum{braces}")));
        }
    }
}

/// The answer to a request, head and body.
pub fn get(port: u16, path: &str) -> (String, String) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

#[test]
fn metrics_are_what_prometheus_reads_and_what_happened() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new(3_000_000);
    let port = free_port();
    let cache = ground.scratch.dir("ca\"che");
    let address = format!("127.0.0.1:{port}");
    let mounted = ground.mount(&["--metrics", &address, "-c", cache.to_str().unwrap()]);
    parse(&get(port, "/metrics").1);
    assert!(fs::read(ground.image()).unwrap() == ground.blob);
    // What was fetched counts as in flight until it is on disk.
    ground.until_status("all is kept", super::ground::is_idle);
    let (head, page) = get(port, "/metrics");
    assert!(head.starts_with("HTTP/1.1 200 OK") && head.contains("content-type: text/plain; version=0.0.4"), "{head}");
    let samples = parse(&page);
    let status = ground.status();
    let n_chunks = status["parts"][0]["n_chunks"].as_f64().unwrap();
    let store = ground.store.display();
    for (name, value) in [
        ("caifs_read_bytes_total".to_owned(), 3_000_000.0),
        ("caifs_fetches_total".to_owned(), n_chunks),
        ("caifs_panics_total".to_owned(), 0.0),
        ("caifs_eio_total{site=\"03 store failed\"}".to_owned(), 0.0),
        ("caifs_requests_in_flight".to_owned(), 0.0),
        ("caifs_budget_used_bytes{share=\"in flight\"}".to_owned(), 0.0),
        (format!("caifs_store_requests_total{{store=\"{store}\",outcome=\"found\"}}"), n_chunks),
        (format!("caifs_store_healthy{{store=\"{store}\"}}"), 1.0),
        (format!("caifs_store_request_duration_seconds_count{{store=\"{store}\"}}"), n_chunks),
    ] {
        assert_eq!(samples.get(&name), Some(&value), "{name}\n{page}");
    }
    let n_reads = samples["caifs_requests_total{op=\"read\"}"];
    assert!(n_reads >= 3.0 && samples["caifs_read_duration_seconds_count"] == n_reads, "{page}");
    assert!(get(port, "/healthz").1 == "ok\n" && get(port, "/x").0.starts_with("HTTP/1.1 404"));
    let taken = ground.scratch.dir("second");
    let refused = run(&mut ground.mount_command(&taken, &["--metrics", &address])).fails();
    assert_eq!(refused.status.code(), Some(32));
    assert!(
        refused.error_line().contains(&format!("metrics: listen on {address}: Address already in use")),
        "{}",
        refused.stderr
    );
    assert!(mounted.end(), "the service ends with its mount");
}

#[test]
fn what_backing_files_and_warming_do_is_shown() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new(3_000_000);
    let file = ground.scratch.join("backing");
    let (port, second_port) = (free_port(), free_port());
    let backing = format!("backing={},passthrough=no,metrics=127.0.0.1:{port}", file.display());
    let mounted = ground.mount(&["-o", &backing]);
    let tier = |status: &serde_json::Value| {
        status["tiers"].as_array().unwrap().iter().find(|tier| tier["name"] == "backing").cloned().unwrap()
    };
    assert_eq!(tier(&ground.status())["present"]["n_present"], 0);
    assert!(fs::read(ground.image()).unwrap() == ground.blob);
    ground.until_status("the file is complete", |status| tier(status)["present"]["n_complete"] == 1);
    let image = direct(&ground.image());
    image.read_exact_at(Aligned::new(BLOCK_BYTES).bytes(), 0).unwrap();
    drop(image);
    let status = ground.status();
    let (tier, n_chunks) = (tier(&status), &status["parts"][0]["n_chunks"]);
    assert_eq!((&tier["place"], &tier["n_kept"]), (&file.to_str().unwrap().into(), n_chunks));
    assert_eq!((&tier["present"]["n_chunks"], &tier["present"]["n_present"]), (n_chunks, n_chunks));
    assert!(tier["n_hits"].as_u64() >= Some(1), "{tier}");
    let text = run(ground.caifs(&["status"]).arg(&ground.mnt)).ok().text();
    assert!(text.contains(&format!("backing in {}: complete, ", file.display())), "{text}");
    let top = run(ground.caifs(&["top", "-n", "1"]).arg(&ground.mnt)).ok().text();
    assert!(top.contains("  backing complete"), "{top}");
    let samples = parse(&get(port, "/metrics").1);
    let n_chunks = n_chunks.as_f64().unwrap();
    for (name, value) in [
        ("caifs_backing_kept_total", n_chunks),
        ("caifs_backing_errors_total", 0.0),
        ("caifs_backing_files_complete", 1.0),
        ("caifs_backing_chunks_present", n_chunks),
        ("caifs_passthrough_opens_total", 0.0),
    ] {
        assert_eq!(samples.get(name), Some(&value), "{name}");
    }
    assert!(samples["caifs_backing_hits_total"] >= 1.0);
    assert!(mounted.end());

    let cache = ground.scratch.dir("cache");
    let warm = format!("cache={},warm=all,metrics=127.0.0.1:{second_port}", cache.display());
    let mounted = ground.mount(&["-o", &warm]);
    ground.until_status("all is warmed", |status| status["early"]["n_warmed"] == n_chunks);
    let text = run(ground.caifs(&["status"]).arg(&ground.mnt)).ok().text();
    assert!(text.contains(&format!("warmed or replayed: 2.9 MiB in {n_chunks} chunks")), "{text}");
    let samples = parse(&get(second_port, "/metrics").1);
    assert_eq!((samples["caifs_warmed_chunks_total"], samples["caifs_warmed_bytes_total"]), (n_chunks, 3_000_000.0));
    assert!(mounted.end());
}

#[test]
fn the_parser_of_these_tests_finds_mistakes() {
    let good = "# HELP caifs_a_total x\n# TYPE caifs_a_total counter\ncaifs_a_total{b=\"c\\\"\",d=\"\"} 1\n";
    assert_eq!(parse(good).len(), 1);
    for wrong in [
        "caifs_a 1\n",
        "# TYPE caifs_a gauge\ncaifs_a 1\n",
        "# HELP caifs_a x\n# TYPE caifs_a counter\ncaifs_a 1\n",
        "# HELP caifs_a x\n# TYPE caifs_a gauge\ncaifs_a one\n",
        "# HELP caifs_a x\n# TYPE caifs_a gauge\ncaifs_a{b=\"c} 1\n",
        "# HELP caifs_a x\n# TYPE caifs_a gauge\ncaifs_a 1",
        "# HELP caifs_a x\n# TYPE caifs_a histogram\ncaifs_a_bucket{le=\"1\"} 2\ncaifs_a_bucket{le=\"+Inf\"} 1\ncaifs_a_sum 1\ncaifs_a_count 1\n",
        "# HELP caifs_a x\n# TYPE caifs_a histogram\ncaifs_a_bucket{le=\"+Inf\"} 1\ncaifs_a_sum 1\ncaifs_a_count 2\n",
    ] {
        let caught = std::panic::catch_unwind(|| parse(wrong));
        assert!(caught.is_err(), "{wrong}");
    }
}
