//! What a service manager says to a program that it starts, in variables and open files (sd_notify(3), sd_listen_fds(3),
//! sd_watchdog_enabled(3)): read here, and only here.

use std::ffi::{OsStr, OsString};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use crate::mount::notify::Manager;
use crate::mount::service::Descriptors;
use crate::sys::descriptors::Inherited;

/// Number of the first open file that a manager passes (`SD_LISTEN_FDS_START`).
const FIRST_FD: RawFd = 3;

/// The most files a manager passes us, who keep two; beyond this somebody else is meant.
const MAX_FDS: usize = 64;

/// The service manager, and the files it kept for us or somebody left open. To be asked before the program opens anything.
pub fn look() -> (Manager, Descriptors) {
    let inherited = Inherited::at_start().unwrap_or_default();
    let lookup = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    read(lookup, std::process::id(), inherited)
}

/// The manager for a mount in the background: the same if it started this very process, and none if it is the manager of a service whose
/// script mounts on its way. A manager that does not tell (systemd before version 248) is taken for ours.
pub fn of_background(manager: Manager) -> Manager {
    let lookup = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    if is_started_by_manager(lookup, std::process::id()) { manager } else { Manager::default() }
}

fn is_started_by_manager(lookup: impl Fn(&str) -> Option<OsString>, pid: u32) -> bool {
    number(&lookup, "SYSTEMD_EXEC_PID").is_none_or(|started: u32| started == pid)
}

fn read(lookup: impl Fn(&str) -> Option<OsString>, pid: u32, mut inherited: Inherited) -> (Manager, Descriptors) {
    let manager = match lookup("NOTIFY_SOCKET") {
        None => Manager::default(),
        Some(socket) => Manager::connect(&socket, watchdog(&lookup, pid)).unwrap_or_else(|error| {
            tracing::warn!("NOTIFY_SOCKET {}: {error}", socket.display());
            Manager::default()
        }),
    };
    let kept: Vec<(String, OwnedFd)> = listed(&lookup, pid)
        .into_iter()
        .filter_map(|(number, name)| inherited.take(number).map(|fd| (name, fd)))
        .collect();
    (manager, Descriptors { kept, inherited })
}

fn number<T: std::str::FromStr>(lookup: &impl Fn(&str) -> Option<OsString>, name: &str) -> Option<T> {
    lookup(name)?.to_str()?.parse().ok()
}

/// How often the manager wants to hear of this process.
fn watchdog(lookup: &impl Fn(&str) -> Option<OsString>, pid: u32) -> Option<Duration> {
    let of_whom: Option<u32> = number(lookup, "WATCHDOG_PID");
    let micros: u64 = number(lookup, "WATCHDOG_USEC")?;
    (of_whom.is_none_or(|whom| whom == pid) && micros > 0).then(|| Duration::from_micros(micros))
}

/// Numbers and names of the files that were passed to this very process.
fn listed(lookup: &impl Fn(&str) -> Option<OsString>, pid: u32) -> Vec<(RawFd, String)> {
    if number(lookup, "LISTEN_PID") != Some(pid) {
        return Vec::new();
    }
    let n_fds = number(lookup, "LISTEN_FDS").filter(|&n_fds: &usize| n_fds <= MAX_FDS).unwrap_or(0);
    let names = lookup("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.as_bytes().split(|&byte| byte == b':').map(|name| OsStr::from_bytes(name).to_string_lossy());
    (FIRST_FD..).take(n_fds).map(|number| (number, names.next().unwrap_or_default().into_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lookup<'a>(variables: &'a [(&'a str, &'a str)]) -> impl Fn(&str) -> Option<OsString> + 'a {
        |name| variables.iter().find(|(one, _)| *one == name).map(|(_, value)| value.into())
    }

    #[test]
    fn files_are_ours_when_they_were_passed_to_this_process() {
        let variables = [("LISTEN_PID", "7"), ("LISTEN_FDS", "3"), ("LISTEN_FDNAMES", "caifs-fuse:caifs-state")];
        let names = |pid| listed(&lookup(&variables), pid);
        let expected = [(3, "caifs-fuse".to_owned()), (4, "caifs-state".to_owned()), (5, String::new())];
        assert_eq!(names(7), expected);
        assert_eq!(names(8), []);
        for wrong in ["-1", "x", "65", ""] {
            assert_eq!(listed(&lookup(&[("LISTEN_PID", "7"), ("LISTEN_FDS", wrong)]), 7), [], "{wrong}");
        }
    }

    #[test]
    fn the_watchdog_is_ours_unless_another_process_is_named() {
        let span = |variables: &[(&str, &str)]| watchdog(&lookup(variables), 7);
        assert_eq!(span(&[("WATCHDOG_USEC", "2000000")]), Some(Duration::from_secs(2)));
        assert_eq!(span(&[("WATCHDOG_USEC", "5"), ("WATCHDOG_PID", "7")]), Some(Duration::from_micros(5)));
        assert_eq!(span(&[("WATCHDOG_USEC", "5"), ("WATCHDOG_PID", "8")]), None);
        assert_eq!(span(&[("WATCHDOG_USEC", "0")]), None);
        assert_eq!(span(&[]), None);
    }

    #[test]
    fn a_manager_says_which_process_it_started() {
        assert!(is_started_by_manager(lookup(&[("SYSTEMD_EXEC_PID", "7")]), 7));
        assert!(!is_started_by_manager(lookup(&[("SYSTEMD_EXEC_PID", "6")]), 7));
        assert!(is_started_by_manager(lookup(&[]), 7));
    }

    #[test]
    fn a_socket_where_nobody_listens_is_no_manager() {
        let (manager, _) = read(lookup(&[("NOTIFY_SOCKET", "/no/such/socket")]), 7, Inherited::default());
        assert!(!manager.is_there());
    }
}
