//! TROUBLESHOOTING.md is organised by messages: each one that it quotes is one that the program prints.

use std::fs;
use std::path::Path;

use caifs::volume::EioSite;

use super::root;

/// Begins a message's section.
const HEADING: &str = "### `";

/// What stands in a message for what differs from time to time.
const ANYTHING: char = '…';

/// The messages quoted, in their order.
fn messages() -> Vec<String> {
    let text = fs::read_to_string(root().join("TROUBLESHOOTING.md")).unwrap();
    let headings = text.lines().filter_map(|line| line.strip_prefix(HEADING)?.strip_suffix('`').map(str::to_owned));
    headings.collect()
}

/// The texts of a source file: what stands in its literals, with lines that go on joined.
fn sources() -> Vec<(String, String)> {
    let mut sources = Vec::new();
    collect(&root().join("src"), &mut sources);
    sources
}

fn collect(dir: &Path, sources: &mut Vec<(String, String)>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, sources);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            // Comments and tests print nothing.
            let text = text.split("\n#[cfg(test)]").next().unwrap();
            let lines = text.lines().filter(|line| !line.trim_start().starts_with("//"));
            let mut joined = String::new();
            for line in lines {
                match joined.strip_suffix('\\') {
                    Some(before) => joined = format!("{before}{}", line.trim_start()),
                    None => joined.extend(["\n", line]),
                }
            }
            sources.push((path.display().to_string(), joined.replace("\\\"", "\"")));
        }
    }
}

/// Whether the fixed parts of a message stand in a text, one behind the other and not far.
fn stands_in(message: &str, text: &str) -> bool {
    const FAR: usize = 200;
    let parts: Vec<&str> = message.split(ANYTHING).map(str::trim).filter(|part| !part.is_empty()).collect();
    let Some((first, rest)) = parts.split_first() else { return false };
    text.match_indices(first).any(|(at, _)| {
        let mut text = &text[at + first.len()..];
        rest.iter().all(|part| match text.find(part).filter(|distance| *distance < FAR) {
            Some(at) => {
                text = &text[at + part.len()..];
                true
            }
            None => false,
        })
    })
}

#[test]
fn every_message_is_one_that_the_program_prints() {
    let sources = sources();
    let messages = messages();
    assert!(messages.len() > 40, "the messages are found");
    let unknown: Vec<&String> =
        messages.iter().filter(|message| !sources.iter().any(|(_, text)| stands_in(message, text))).collect();
    assert!(unknown.is_empty(), "no source has these: {unknown:#?}");
    let mut seen = messages.clone();
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), messages.len(), "a message has one section");
}

#[test]
fn every_numbered_error_has_its_section() {
    let text = fs::read_to_string(root().join("TROUBLESHOOTING.md")).unwrap();
    for site in EioSite::ALL {
        let number = format!("| {:02} |", site.number());
        assert!(text.lines().any(|line| line.starts_with(&number)), "{site:?} is not in the table");
    }
}

#[test]
fn every_reason_that_there_is_no_mount_is_explained() {
    let text = fs::read_to_string(root().join("TROUBLESHOOTING.md")).unwrap();
    let source = fs::read_to_string(root().join("src/mount/error.rs")).unwrap();
    let (source, headings) = (source.split("\n#[cfg(test)]").next().unwrap(), self::messages());
    let printed =
        source.split("#[error(").skip(1).filter_map(|rest| rest.trim_start().strip_prefix('"')?.split('"').next());
    // Between what differs from time to time; what is shorter is the name of a place and no message.
    let fixed: Vec<&str> = printed.flat_map(|message| message.split(['{', '}']).step_by(2)).collect();
    let messages: Vec<&str> =
        fixed.into_iter().map(|part| part.trim_matches([' ', ':'])).filter(|part| part.len() > 8).collect();
    assert!(messages.len() > 8, "the messages are found: {messages:?}");
    let is_explained =
        |message: &str| text.contains(message) || headings.iter().any(|heading| stands_in(heading, message));
    let unknown: Vec<&&str> = messages.iter().filter(|message| !is_explained(message)).collect();
    assert!(unknown.is_empty(), "TROUBLESHOOTING.md says nothing of these: {unknown:#?}");
}

#[test]
fn what_is_printed_is_told_from_what_is_not() {
    assert!(stands_in("mount option … needs a value", "\"mount option {name:?} needs a value: {expected}\""));
    assert!(!stands_in("mount option … wants a value", "\"mount option {name:?} needs a value: {expected}\""));
    assert!(!stands_in("…", "anything"));
}
