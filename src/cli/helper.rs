//! The mount helper: called as `mount.caifs` or `mount.fuse.caifs` by mount(8), or plainly as `caifs SPEC DIR -o OPTIONS` by
//! mount.fuse3. How helpers are called: mount(8), section "External helpers"; util-linux's context_mount.c; fuse3's mount.fuse.c.
//!
//! * [`Call::parse`] reads the arguments, by hand since their letters are mount(8)'s and not ours.
//! * [`run`] turns them into what `caifs mount` does, and says what mount(8) leaves to its helpers to say.
//!
//! Invariant: mount(8) passes our exit code on and says nothing itself, so whatever fails here is said in one line.

use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::CommandFactory;
use nix::sched::{CloneFlags, setns};

use super::args::{Args, MountArgs};
use super::mount::{self, Typed, USAGE};
use super::output::printable;
use super::{complain, init_log, service_environment};
use crate::config::SourceConfig;
use crate::mount::notify::Manager;
use crate::mount::options::Unknown;
use crate::mount::{FS_TYPE, MountError, attach, daemon::INTERNAL_BUG, fstab, shown_source};
use crate::store::location::{FileLocation, Location, split_group};

/// The names that mount(8) calls a helper by.
const NAMES: &[&str] = &["mount.caifs", "mount.fuse.caifs"];

/// What mount.fuse3 adds to the end of the options unless the contrary stands among them, whoever asked for it or not.
const ADDED_BY_MOUNT_FUSE: &[(&str, &str)] = &[("suid", "nosuid"), ("dev", "nodev")];

const USAGE_TEXT: &str = "mount.caifs SPEC DIR [-sfnv] [-o OPTIONS] [-t TYPE] [-N NAMESPACE]";

/// Exit code of mount(8) for a failed mount.
const MOUNT_FAILED: u8 = 32;

/// What a helper is asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Call {
    spec: OsString,
    mountpoint: PathBuf,
    /// Each list after a `-o`.
    options: Vec<String>,
    /// `-s`: unknown options are no error.
    sloppy: bool,
    /// `-f`: all but the mount.
    fake: bool,
    /// `-v`: say what is done.
    verbose: bool,
    /// `-N`: the mount namespace to mount in.
    namespace: Option<PathBuf>,
}

/// What stands in the arguments.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    Mount(Call),
    Help,
    Version,
}

/// Does the work of a mount helper and gives the exit code, if the program was called as one.
pub fn run(argv: &[OsString]) -> Option<ExitCode> {
    let (name, arguments) = argv.split_first()?;
    let is_helper = Path::new(name).file_name().is_some_and(|name| NAMES.iter().any(|helper| name == *helper));
    let asked = match is_helper {
        true => Call::parse(arguments),
        // Anything that is not quite such a call is a verb that was mistyped, about which clap knows more to say.
        false => Ok(Asked::Mount(plain_call(arguments)?)),
    };
    // Nobody but us is there to tell mount(8) of a bug.
    let exit_code = catch_unwind(AssertUnwindSafe(|| answer(asked))).unwrap_or(INTERNAL_BUG);
    Some(ExitCode::from(exit_code))
}

/// A call by mount.fuse3: two operands, of which the first is no verb, and options.
fn plain_call(arguments: &[OsString]) -> Option<Call> {
    let first = arguments.first()?;
    if first.as_bytes().starts_with(b"-") || !arguments.iter().any(|word| word.as_bytes().starts_with(b"-o")) {
        return None;
    }
    if Args::command().get_subcommands().any(|verb| first == verb.get_name()) {
        return None;
    }
    let Ok(Asked::Mount(mut call)) = Call::parse(arguments) else { return None };
    call.options = call.options.iter().map(|list| without_additions(list).to_owned()).collect();
    Some(call)
}

/// The options without what mount.fuse3 adds: set-id programs and devices are for those who ask for them, by `allow-suid` and
/// `allow-dev` if need be (what mount(8) passes on of `suid` and `dev` then stands there twice).
fn without_additions(list: &str) -> &str {
    let mut rest = list;
    for (added, contrary) in ADDED_BY_MOUNT_FUSE {
        if !list.split(',').any(|option| option == *contrary) {
            rest = rest.strip_suffix(added).and_then(|before| before.strip_suffix(',')).unwrap_or(rest);
        }
    }
    rest
}

impl Call {
    /// Reads the arguments behind the program's name: two operands, and letters in any order, alone or together.
    fn parse(arguments: &[OsString]) -> Result<Asked, String> {
        let mut call = Self::default();
        let mut operands = Vec::new();
        let mut words = arguments.iter();
        while let Some(word) = words.next() {
            let bytes = word.as_bytes();
            match bytes {
                b"--" => operands.extend(words.by_ref()),
                b"--help" => return Ok(Asked::Help),
                b"--version" => return Ok(Asked::Version),
                [b'-', letters @ ..] if !letters.is_empty() => {
                    if let Some(other) = call.letters(letters, &mut words)? {
                        return Ok(other);
                    }
                }
                _ => operands.push(word),
            }
        }
        let [spec, mountpoint] = operands[..] else {
            let n_given = operands.len();
            return Err(format!(
                "a mount helper needs SPEC and DIR, and was given {n_given} such (usage: {USAGE_TEXT})"
            ));
        };
        call.spec = spec.clone();
        call.mountpoint = mountpoint.into();
        Ok(Asked::Mount(call))
    }

    /// Reads the letters of one word; one that takes a value takes the rest of the word, or the next one.
    fn letters<'a>(
        &mut self,
        letters: &[u8],
        next: &mut impl Iterator<Item = &'a OsString>,
    ) -> Result<Option<Asked>, String> {
        for (at, &letter) in letters.iter().enumerate() {
            let mut value = || match &letters[at + 1..] {
                [] => next.next().cloned().ok_or(format!("-{} needs a value (usage: {USAGE_TEXT})", letter as char)),
                rest => Ok(OsStr::from_bytes(rest).to_owned()),
            };
            match letter {
                b's' => self.sloppy = true,
                b'f' => self.fake = true,
                b'v' => self.verbose = true,
                // There is no /etc/mtab to leave alone any more.
                b'n' => {}
                b'h' => return Ok(Some(Asked::Help)),
                b'V' => return Ok(Some(Asked::Version)),
                b'o' => {
                    let list = value()?;
                    let text = list.to_str().ok_or_else(|| format!("mount options {list:?} are not UTF-8"))?;
                    self.options.push(text.to_owned());
                    return Ok(None);
                }
                b't' => {
                    // It is why we were called.
                    value()?;
                    return Ok(None);
                }
                b'N' => {
                    self.namespace = Some(value()?.into());
                    return Ok(None);
                }
                _ => {
                    let letter = char::from(letter).escape_default();
                    return Err(format!("unknown option -{letter} (usage: {USAGE_TEXT})"));
                }
            }
        }
        Ok(None)
    }
}

fn answer(asked: Result<Asked, String>) -> u8 {
    match asked {
        Err(mistake) => {
            complain(&mistake);
            USAGE
        }
        Ok(Asked::Help) => {
            say(&format!(
                "{USAGE_TEXT}\nMounts casync and desync archives and disk images; `caifs mount --help` lists the options."
            ));
            0
        }
        Ok(Asked::Version) => {
            say(&format!("mount.caifs {}", env!("CARGO_PKG_VERSION")));
            0
        }
        Ok(Asked::Mount(call)) => match perform(call) {
            Ok(()) => 0,
            Err((message, exit_code)) => {
                complain(&message);
                exit_code
            }
        },
    }
}

fn perform(call: Call) -> Result<(), (String, u8)> {
    // Before anything is looked up by its path.
    if let Some(namespace) = &call.namespace {
        enter(namespace).map_err(|error| (format!("mount namespace {}: {error}", namespace.display()), USAGE))?;
    }
    init_log(0);
    let unknown = if call.sloppy { Unknown::Collect } else { Unknown::Refuse };
    let has_netdev = call.options.iter().any(|list| list.split(',').any(|option| option == "_netdev"));
    let args = MountArgs {
        spec: call.spec.into(),
        mountpoint: call.mountpoint,
        options: call.options,
        foreground: false,
        mount_options: Default::default(),
        stores: Default::default(),
    };
    // Of whoever called mount(8): it is not our service that this manager watches.
    let (_, descriptors) = service_environment::look();
    let manager = Manager::default();
    let typed = mount::options(&args, unknown).map_err(|error| (format!("{error:#}"), USAGE))?;
    for name in &typed.options.unknown {
        complain(&format!("warning: unknown mount option {name:?} is ignored"));
    }
    if !has_netdev && is_remote(&typed.location, &typed.options.config.sources) && starts_at_boot(&args.mountpoint) {
        complain(&format!(
            "warning: fstab has {} without _netdev: at boot it is mounted before there is a network, and its failure stops the \
             boot (add _netdev,nofail)",
            args.mountpoint.display()
        ));
    }
    let source = shown_source(&typed.source);
    let (what, mountpoint) = (source.to_string_lossy().into_owned(), args.mountpoint.display().to_string());
    let how = format!("{mountpoint}, type {FS_TYPE} ({})", typed.options.effective());
    let wants_rw = typed.options.wants_rw;
    let tell = |done: &str| {
        if call.verbose {
            say(&format!("caifs: {what} {done} {how}"));
            if wants_rw {
                say(
                    "caifs: rw was taken as ro: what caifs mounts cannot be written to (mount(8) says rw unless told ro)",
                );
            }
        }
    };
    if call.fake {
        let refusal = |error| (format!("cannot mount {what} on {mountpoint}: {error}"), MOUNT_FAILED);
        check(&typed, &args.mountpoint).map_err(refusal)?;
        tell("would be mounted on");
        return Ok(());
    }
    // mount(8) cannot know it from the mount table, which has the source without its secrets.
    let refusal = |error: MountError| (format!("cannot mount {what} on {mountpoint}: {error}"), error.exit_code());
    let is_new = !typed.options.remount;
    if is_new && source != typed.source && attach::is_mounted(&args.mountpoint, &source).map_err(refusal)? {
        tell("is already mounted on");
        return Ok(());
    }
    mount::mount(args, typed, manager, descriptors).map_err(|error| (error.to_string(), error.exit_code()))?;
    tell("mounted on");
    Ok(())
}

/// Goes into another mount namespace, for good.
fn enter(namespace: &Path) -> io::Result<()> {
    let file = std::fs::File::open(namespace)?;
    setns(file, CloneFlags::CLONE_NEWNS)?;
    Ok(())
}

/// What would keep a mount from being made, as far as can be seen without asking a store.
fn check(typed: &Typed, mountpoint: &Path) -> Result<(), MountError> {
    attach::check(mountpoint)?;
    match &typed.location {
        FileLocation::Local(path) => match path.metadata() {
            Ok(_) => Ok(()),
            Err(error) => Err(MountError::Open(format!("{}: {error}", path.display()).into())),
        },
        FileLocation::Remote { .. } | FileLocation::Stdio => Ok(()),
    }
}

/// Whether the mount needs a network.
fn is_remote(location: &FileLocation, sources: &SourceConfig) -> bool {
    let mut members = sources.stores.iter().chain(&sources.cache).flat_map(|place| split_group(place));
    matches!(location, FileLocation::Remote { .. })
        || members.any(|member| !matches!(Location::parse(member), Ok(Location::Local(_))))
}

/// Whether fstab has the mountpoint, mounted or waited for by an automounter at boot.
fn starts_at_boot(mountpoint: &Path) -> bool {
    // As libmount lets it be named.
    let path = std::env::var_os("LIBMNT_FSTAB").map_or("/etc/fstab".into(), PathBuf::from);
    let Ok(Some(options)) = fstab::options_of(&path, mountpoint) else { return false };
    let has = |name: &str| options.split(',').any(|option| option == name);
    !has("_netdev") && (!has("noauto") || has("x-systemd.automount"))
}

/// Says something on standard output, each line as it may be shown on a terminal. Nobody may be listening, which changes nothing.
fn say(text: &str) {
    for line in text.lines() {
        let _ = writeln!(io::stdout(), "{}", String::from_utf8_lossy(&printable(line.as_bytes(), true)));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn words(line: &[&str]) -> Vec<OsString> {
        line.iter().map(OsString::from).collect()
    }

    fn parsed(line: &[&str]) -> Result<Asked, String> {
        Call::parse(&words(line))
    }

    fn call(spec: &str, mountpoint: &str, options: &[&str]) -> Call {
        let options = options.iter().map(|list| (*list).to_owned()).collect();
        Call { spec: spec.into(), mountpoint: mountpoint.into(), options, ..Call::default() }
    }

    #[test]
    fn arguments_come_in_any_order_alone_or_together() {
        let all = Call {
            sloppy: true,
            fake: true,
            verbose: true,
            namespace: Some("/proc/1/fd/4".into()),
            ..call("src", "/m", &["rw,a=1"])
        };
        for line in [
            ["src", "/m", "-s", "-f", "-n", "-v", "-o", "rw,a=1", "-t", "caifs.sub", "-N", "/proc/1/fd/4"].as_slice(),
            &["-N", "/proc/1/fd/4", "-o", "rw,a=1", "src", "-t", "caifs.sub", "-s", "-f", "/m", "-n", "-v"],
            &["-sfnvorw,a=1", "-tcaifs", "-N/proc/1/fd/4", "src", "/m"],
            &["-svno", "rw,a=1", "-fN", "/proc/1/fd/4", "--", "src", "/m"],
        ] {
            assert_eq!(parsed(line), Ok(Asked::Mount(all.clone())), "{line:?}");
        }
        assert_eq!(
            parsed(&["-", "/m", "-o", "ro", "-o", "store=a,b"]),
            Ok(Asked::Mount(call("-", "/m", &["ro", "store=a,b"])))
        );
        assert_eq!(parsed(&["--", "-o", "-v"]), Ok(Asked::Mount(call("-o", "-v", &[]))));
        assert_eq!((parsed(&["a", "-h"]), parsed(&["--version"])), (Ok(Asked::Help), Ok(Asked::Version)));
    }

    #[test]
    fn mistakes_are_named_with_the_usage() {
        for (line, said) in [
            (["src"].as_slice(), "needs SPEC and DIR, and was given 1"),
            (&["a", "b", "c"], "was given 3"),
            (&["a", "b", "-o"], "-o needs a value"),
            (&["a", "b", "-x"], "unknown option -x"),
            (&["a", "b", "--sloppy"], "unknown option --"),
        ] {
            let mistake = parsed(line).unwrap_err();
            assert!(mistake.contains(said) && mistake.contains("usage: mount.caifs SPEC DIR"), "{line:?}: {mistake}");
        }
        let not_text = [words(&["a", "b", "-o"]), vec![OsStr::from_bytes(b"x=\xff").to_owned()]].concat();
        assert!(Call::parse(&not_text).unwrap_err().contains("not UTF-8"));
    }

    #[test]
    fn plain_calls_are_those_of_mount_fuse() {
        let plain = |line: &[&str]| plain_call(&words(line));
        assert_eq!(plain(&["/x.caibx", "/m", "-o", "ro,dev,suid"]), Some(call("/x.caibx", "/m", &["ro"])));
        for line in [
            ["mount", "/x.caibx", "/m", "-o", "ro"].as_slice(),
            &["ls", "/x.caidx", "-o", "ro"],
            &["pull", "/x.caidx", "-o", "ro"],
            &["muont", "/x.caibx", "/m", "-o", "ro"],
            &["/x.caibx", "/m"],
            &["-o", "ro", "/x.caibx", "/m"],
            &["--help"],
            &[],
        ] {
            assert_eq!(plain(line), None, "{line:?}");
        }
    }

    #[test]
    fn set_id_programs_and_devices_are_on_only_for_those_who_ask() {
        for (list, wanted) in [
            ("rw,dev,suid", "rw"),
            ("rw,suid,dev,suid", "rw,suid"),
            ("rw,dev,suid,dev,suid", "rw,dev,suid"),
            ("rw,nosuid,dev", "rw,nosuid"),
            ("rw,nodev,suid", "rw,nodev"),
            ("rw,nodev,nosuid", "rw,nodev,nosuid"),
            ("rw,store=/dev", "rw,store=/dev"),
            ("rw", "rw"),
        ] {
            assert_eq!(without_additions(list), wanted, "{list}");
        }
    }

    #[test]
    fn what_needs_a_network_is_told_by_its_locations() {
        let remote = |spec: &str, options: &str| {
            let mut mountoptions = crate::mount::options::MountOptions::default();
            mountoptions.parse(options, Unknown::Refuse).unwrap();
            let location = FileLocation::parse(OsStr::new(spec)).unwrap();
            is_remote(&location, &mountoptions.config.sources)
        };
        assert!(remote("https://h/x.caibx", "") && remote("bk@h:/d/x.caidx", ""));
        assert!(remote("/x.caibx", "store=/a|https://h/s") && remote("/x.caibx", "cache=s3+https://h/b"));
        assert!(!remote("/x.caibx", "store=/a,cache=/c") && !remote("file:///x.caibx", ""));
    }
}
