//! The manual: pages are fresh, without faults, and every command in them, in README.md and in TROUBLESHOOTING.md works.
//!
//! * [`examples`] finds the examples, [`world`] is where they run: a machine of their own with all the hosts and files they name.
//! * [`troubleshooting`] holds the troubleshooting guide against the messages in the sources.

mod examples;
mod troubleshooting;
mod world;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use caifs::cli::manual::pages;

use crate::support::peers::peer;
use crate::support::run::{caifs, command, run};
use crate::support::scratch::Scratch;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn the_pages_are_those_of_this_program() {
    let made: BTreeMap<String, String> = pages().into_iter().map(|page| (page.file_name, page.text)).collect();
    let mut checked_in = BTreeMap::new();
    for entry in fs::read_dir(root().join("man")).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_file() {
            let name = entry.file_name().into_string().unwrap();
            checked_in.insert(name, fs::read_to_string(entry.path()).unwrap());
        }
    }
    let stale: Vec<&String> = made.keys().filter(|name| checked_in.get(*name) != made.get(*name)).collect();
    let left: Vec<&String> = checked_in.keys().filter(|name| !made.contains_key(*name)).collect();
    assert!(
        stale.is_empty() && left.is_empty(),
        "man/ is not what the program makes: stale {stale:?}, left over {left:?} (run: cargo run -- manual --out man)"
    );
}

#[test]
fn the_verb_writes_the_pages() {
    let scratch = Scratch::new();
    run(caifs().args(["manual", "--out"]).arg(scratch.join("man"))).ok();
    for page in pages() {
        assert_eq!(fs::read_to_string(scratch.join("man").join(&page.file_name)).unwrap(), page.text);
    }
    let help = run(caifs().arg("--help")).ok().text();
    assert!(!help.contains("manual"), "a verb for whoever makes packages: {help}");
}

#[test]
fn the_pages_have_no_fault() {
    let Some(groff) = peer("groff") else { return };
    for page in pages() {
        let path = root().join("man").join(&page.file_name);
        let mut formatted = groff.command();
        let formatted = run(formatted.args(["-man", "-Tutf8", "-ww", "-b", "-rLL=100n", "-P-cbou"]).arg(&path)).ok();
        assert_eq!(formatted.stderr, "", "{}", page.file_name);
        let text = formatted.text();
        assert!(text.contains("NAME") && text.contains("SEE ALSO"), "{}", page.file_name);
    }
    let Some(man) = peer("man") else { return };
    let mut shown = man.command();
    shown.env("MANPAGER", "cat").env("LC_ALL", "C.UTF-8").args(["--warnings", "-l"]);
    let shown = run(shown.arg(root().join("man/caifs-mount.1"))).ok();
    assert_eq!(shown.stderr, "");
}

#[test]
fn shells_get_completions() {
    let scratch = Scratch::new();
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = run(caifs().args(["completions", shell])).ok().text();
        for word in ["mount", "verify-signature", "index-sha256"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
        let path = scratch.file(shell, &script);
        if shell == "bash" {
            run(command("bash", ["-n"]).arg(&path)).ok();
            // What bash would offer for `caifs verify-s`.
            let ask = format!(
                "source {}; COMP_WORDS=(caifs verify-s) COMP_CWORD=1; _caifs caifs verify-s caifs; echo \"${{COMPREPLY[@]}}\"",
                path.display()
            );
            assert_eq!(run(&mut command("bash", ["-c", &ask])).ok().text().trim(), "verify-signature");
        }
    }
    assert!(run(caifs().args(["completions", "csh"])).fails().error_line().contains("csh"));
}
