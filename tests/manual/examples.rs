//! Every example of README.md, TROUBLESHOOTING.md and the man pages, run.
//!
//! A block of code says by its kind what is done with it:
//!
//! * `sh`: run as a script, line by line as it stands, in a fresh directory with the files of [`world`](super::world). A server that stays in
//!   the foreground is started, must answer, and is ended; one with `&` serves the rest of the block. A mount in the place of another one replaces
//!   it: the lines of a block are often alternatives.
//! * `toml`: is a configuration that `caifs config` reads.
//! * `fstab`: is mounted by mount(8), twice; until the program is a mount helper, its options are read.
//! * `text`: no example.
//!
//! Invariant: a block without a kind, or of another one, is a failure; what is not run stands in [`ELSEWHERE`], with who runs it.

use std::ffi::OsStr;
use std::fmt::Write;
use std::fs;
use std::path::PathBuf;

use caifs::cli::args::Args;
use caifs::cli::manual::{pages, prose};
use caifs::mount::options::{MountOptions, Unknown};
use caifs::store::location::{FileLocation, Location};
use clap::Parser;

use super::root;
use super::world::{Script, World};
use crate::support::run::{command, run};
use crate::support::scratch::Scratch;

/// Commands that do not run here: how they begin, and who runs them. What they pass to caifs is parsed all the same.
const ELSEWHERE: &[(&str, &str)] = &[
    ("cargo run -- ", ".ci/run"),
    ("cargo test", ".ci/run, this test among others"),
    ("mount-helpers/install.sh", "tests/fstab/installed.rs"),
    ("qemu-img create ", "tests/vm.rs"),
    ("qemu-system-x86_64 ", "tests/vm.rs"),
    ("cargo build --release", "nobody: the same sources as the tests' build, for longer"),
];

/// What must have happened before a block that has this in it.
const BEFORE: &[(&str, &str)] = &[("/mnt/image/image)\" /mnt/root", "caifs mount image.caibx /mnt/image")];

/// A fenced block.
#[derive(Debug, Clone)]
struct Block {
    /// Its file and line.
    place: String,
    kind: String,
    text: String,
}

/// The documents: README.md, TROUBLESHOOTING.md, and the prose of every page that there is.
fn documents() -> Vec<PathBuf> {
    let mut documents = vec![root().join("README.md"), root().join("TROUBLESHOOTING.md")];
    let names: Vec<String> = pages().into_iter().map(|page| page.file_name).collect();
    for prose in prose::VERBS.iter().chain(prose::OTHERS).filter(|prose| names.iter().any(|name| name == prose.name)) {
        documents.push(root().join("man/src").join(format!("{}.md", prose.name)));
    }
    documents
}

fn blocks() -> Vec<Block> {
    let mut blocks = Vec::new();
    for path in documents() {
        let source = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let name = path.strip_prefix(root()).unwrap().display().to_string();
        let mut lines = source.lines().enumerate();
        while let Some((n, line)) = lines.next() {
            if let Some(kind) = line.trim_start().strip_prefix("```") {
                let text =
                    lines.by_ref().map(|(_, line)| line).take_while(|line| !line.trim_start().starts_with("```"));
                let text = text.collect::<Vec<_>>().join("\n");
                blocks.push(Block { place: format!("{name}:{}", n + 1), kind: kind.trim().to_owned(), text });
            }
        }
    }
    blocks
}

/// The commands of a block: lines, with those that they go on in.
fn commands(text: &str) -> Vec<String> {
    let mut commands: Vec<String> = Vec::new();
    let mut goes_on = false;
    for line in text.lines() {
        match commands.last_mut().filter(|_| goes_on) {
            Some(last) => last.push_str(&format!("\n{line}")),
            None => commands.push(line.to_owned()),
        }
        goes_on = line.ends_with('\\');
    }
    commands
}

/// A block as a script for the world.
fn script(block: &Block) -> String {
    let mut script = String::new();
    for (fragment, setup) in BEFORE {
        if block.text.contains(fragment) {
            writeln!(script, "{setup}").unwrap();
        }
    }
    for command in commands(&block.text) {
        if let Some((prefix, _)) = ELSEWHERE.iter().find(|(prefix, _)| command.starts_with(prefix)) {
            check_parsed(&block.place, command.strip_prefix(prefix).filter(|_| prefix.ends_with("-- ")));
            continue;
        }
        let is_server = command.starts_with("caifs chunk-server ") || command.starts_with("caifs index-server ");
        match (is_server, command.trim_end().strip_suffix('&')) {
            (true, None) => writeln!(script, "__serve {} {command}", port(&command)).unwrap(),
            (true, Some(_)) => writeln!(script, "{command}\n__await {}", port(&command)).unwrap(),
            (false, _) => writeln!(script, "{command}").unwrap(),
        }
    }
    script
}

fn port(command: &str) -> String {
    let mut words = command.split_whitespace().skip_while(|word| *word != "-l");
    let address = words.nth(1).unwrap_or_else(|| panic!("{command}: where does it listen?"));
    address.rsplit(':').next().unwrap().to_owned()
}

/// Checks that arguments of caifs are understood.
fn check_parsed(place: &str, arguments: Option<&str>) {
    if let Some(arguments) = arguments {
        let words = ["caifs"].into_iter().chain(arguments.split_whitespace());
        Args::try_parse_from(words).unwrap_or_else(|error| panic!("{place}: {error}"));
    }
}

/// The mount(8) way: all lines at once, twice, those that nobody mounts at boot by name; and away again.
fn fstab_script(block: &Block) -> String {
    let lines: Vec<Vec<&str>> = fstab_lines(block);
    let mut script = format!("cat > /etc/fstab <<'END'\n{}\nEND\nmount -a\nmount -a\n", block.text);
    for line in &lines {
        if line[3].split(',').any(|option| option == "noauto") {
            writeln!(script, "mount {}", line[1]).unwrap();
        }
        // A directory stands in the mount table without the slash behind it.
        let source = if line[0].starts_with('/') { line[0].trim_end_matches('/') } else { line[0] };
        writeln!(script, "[ \"$(findmnt -rn -t fuse.caifs -o SOURCE --mountpoint {})\" = '{source}' ]", line[1])
            .unwrap();
        writeln!(script, "ls {} > /dev/null", line[1]).unwrap();
    }
    for line in &lines {
        writeln!(script, "umount {}", line[1]).unwrap();
    }
    script
}

fn fstab_lines(block: &Block) -> Vec<Vec<&str>> {
    let lines = block.text.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#'));
    let lines: Vec<Vec<&str>> = lines.map(|line| line.split_whitespace().collect()).collect();
    assert!(lines.iter().all(|line| line.len() >= 4), "{}: not lines of fstab", block.place);
    lines
}

/// That each line names what it may, and that its options are understood.
fn check_fstab(block: &Block) {
    for line in fstab_lines(block) {
        let wrong = |error: String| -> ! { panic!("{}: {}: {error}", block.place, line[1]) };
        if !line[0].ends_with('/') {
            FileLocation::parse(OsStr::new(line[0])).unwrap_or_else(|error| wrong(error.to_string()));
        }
        assert!(["caifs", "fuse.caifs"].contains(&line[2]), "{}: type {}", block.place, line[2]);
        let mut options = MountOptions::default();
        options.parse(line[3], Unknown::Refuse).unwrap_or_else(|error| wrong(error.to_string()));
        for store in &options.config.sources.stores {
            Location::parse(store).unwrap_or_else(|error| wrong(error.to_string()));
        }
    }
}

/// Whether the program does what mount(8) asks of a helper when it is called by a helper's name.
fn is_mount_helper() -> bool {
    let scratch = Scratch::new();
    let link = scratch.join("mount.caifs");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_caifs"), &link).unwrap();
    let is_helper = run(command(&link, ["--help"]).env_clear()).text().contains("mount.caifs SPEC DIR");
    let is_there = root().join("src/cli/helper.rs").exists();
    assert_eq!(is_helper, is_there, "the mount helper says how it is called");
    is_helper
}

#[test]
fn every_example_works() {
    let Some(world) = World::new() else { return };
    let is_helper = is_mount_helper();
    let mut scripts = Vec::new();
    let mut unused: Vec<&str> = ELSEWHERE.iter().map(|(prefix, _)| *prefix).collect();
    for block in blocks() {
        unused.retain(|prefix| !commands(&block.text).iter().any(|command| command.starts_with(prefix)));
        let text = match block.kind.as_str() {
            "sh" | "console" => script(&block),
            "toml" => format!("cat > example.toml <<'END'\n{}\nEND\ncaifs --config example.toml config\n", block.text),
            "fstab" => {
                check_fstab(&block);
                if !is_helper {
                    continue;
                }
                fstab_script(&block)
            }
            "text" => continue,
            kind => panic!("{}: is a block of {kind:?} an example? (sh, toml, fstab, or text for none)", block.place),
        };
        scripts.push(Script { name: block.place, text });
    }
    assert!(unused.is_empty(), "no document has these any more: {unused:?}");
    assert!(scripts.len() > 30, "the examples are found");
    let failures = world.run(&scripts);
    assert!(failures.is_empty(), "{} of {} examples fail:\n{}", failures.len(), scripts.len(), failures.join("\n"));
}

#[test]
fn the_world_tells_what_failed_and_begins_anew() {
    let Some(world) = World::new() else { return };
    let script = |name: &str, text: &str| Script { name: name.to_owned(), text: text.to_owned() };
    let failures = world.run(&[
        script("leaves", "caifs mount image.caibx /mnt/image\nls /mnt/image\nrm image.raw\nsleep 1000 &\n"),
        script("fresh", "[ -f image.raw ] && [ -z \"$(ls /mnt/image)\" ]"),
        script("silent", "false\ntrue\n"),
        script("loud", "caifs ls backup.caidx nowhere"),
        script("pipe", "caifs cat nothing.caibx | cat"),
        script("server", "__serve 8080 caifs chunk-server -s /nowhere -l :8080"),
    ]);
    let names: Vec<&str> = failures.iter().map(|failure| failure.split(':').next().unwrap()).collect();
    assert_eq!(names, ["silent", "loud", "pipe", "server"], "{}", failures.join("\n"));
    assert!(failures[1].contains("caifs: backup.caidx: nowhere"), "{}", failures[1]);
}

#[test]
fn every_page_that_does_something_has_an_example_and_every_text_a_page() {
    let pages: Vec<String> = pages().into_iter().map(|page| page.file_name).collect();
    for page in &pages {
        let prose = prose::find(page).or_else(|| prose::OTHERS.iter().find(|prose| prose.name == *page));
        let prose = prose.unwrap_or_else(|| panic!("{page}: no text in man/src"));
        assert!(prose.section("EXAMPLES").is_some_and(|text| text.contains("```")), "{page}: no example");
    }
    for entry in fs::read_dir(root().join("man/src")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let name = name.strip_suffix(".md").unwrap();
        let is_known = prose::VERBS.iter().chain(prose::OTHERS).any(|prose| prose.name == name);
        assert!(is_known || name == "locations", "man/src/{name}.md is of no page");
    }
}

#[test]
fn blocks_become_scripts() {
    let block = |text: &str| Block { place: "x".to_owned(), kind: "sh".to_owned(), text: text.to_owned() };
    assert_eq!(script(&block("a \\\n  b\nc")), "a \\\n  b\nc\n");
    assert_eq!(
        script(&block("caifs chunk-server -s x -l :80  # why\ncaifs index-server -s x -l [::1]:81 &\nls")),
        "__serve 80 caifs chunk-server -s x -l :80  # why\ncaifs index-server -s x -l [::1]:81 &\n__await 81\nls\n"
    );
    assert_eq!(script(&block("cargo test\nls")), "ls\n");
}
