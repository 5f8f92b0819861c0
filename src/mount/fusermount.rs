//! fusermount3, which mounts and unmounts for those who may not (fuse3's doc/fusermount3.1 and lib/mount.c).

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use super::MountError;
use super::attach::AttachRequest;
use crate::sys;

/// Where it is looked for: in PATH first, then in the usual places, since a service may have no PATH.
const PROGRAMS: &[&str] = &["fusermount3", "/usr/bin/fusermount3", "/bin/fusermount3", "/sbin/fusermount3"];

/// Mounts, and gives the file to serve requests from.
pub(super) fn mount(mountpoint: &Path, request: &AttachRequest<'_>) -> Result<OwnedFd, MountError> {
    if request.kernel.has_contexts() {
        return Err(MountError::Fusermount("only root may mount with context= and the like".into()));
    }
    let (ours, theirs) = UnixStream::pair().map_err(MountError::system("socketpair"))?;
    let options = options(request);
    let output = run(|command| {
        // Its standard input is the socket: a descriptor inherited by nobody else who is started meanwhile.
        let stdin = theirs.try_clone()?;
        command.env("_FUSE_COMMFD", "0").stdin(OwnedFd::from(stdin)).arg("-o").arg(&options).arg("--").arg(mountpoint);
        Ok(())
    })?;
    drop(theirs);
    if !output.status.success() {
        return Err(MountError::Fusermount(with_hint(&complaint(&output))));
    }
    match sys::receive_fd(&ours) {
        Ok(Some(fd)) => Ok(fd),
        Ok(None) => Err(MountError::Fusermount("fusermount3 ended without handing over the mount".into())),
        Err(error) => Err(MountError::Fusermount(format!("fusermount3: no mount received: {error}"))),
    }
}

/// Unmounts a mount of this user; what fusermount3 complains about otherwise.
pub(super) fn unmount(mountpoint: &Path, lazily: bool) -> Result<(), String> {
    let output = run(|command| {
        command.stdin(Stdio::null()).arg("-u").args(lazily.then_some("-z")).arg("--").arg(mountpoint);
        Ok(())
    });
    match output {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(complaint(&output)),
        Err(error) => Err(error.to_string()),
    }
}

fn run(prepare: impl Fn(&mut Command) -> io::Result<()>) -> Result<Output, MountError> {
    for program in PROGRAMS {
        let mut command = Command::new(program);
        prepare(&mut command).map_err(MountError::system("fusermount3"))?;
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        match command.spawn().and_then(std::process::Child::wait_with_output) {
            Ok(output) => return Ok(output),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(MountError::Fusermount(format!("cannot start {program}: {error}"))),
        }
    }
    Err(MountError::Fusermount(
        "not allowed to mount, and fusermount3 is not installed (package fuse3), or mount as root".into(),
    ))
}

fn options(request: &AttachRequest<'_>) -> OsString {
    let mut options = request.flags.fusermount().into_bytes();
    options.extend_from_slice(b",default_permissions,subtype=caifs");
    options.extend_from_slice(request.kernel.fusermount().as_bytes());
    if request.allow_other {
        options.extend_from_slice(b",allow_other");
    }
    options.extend_from_slice(b",fsname=");
    for &byte in request.source.as_bytes() {
        if matches!(byte, b',' | b'\\') {
            options.push(b'\\');
        }
        options.push(byte);
    }
    OsString::from_vec(options)
}

fn complaint(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    let line = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ");
    match (line.is_empty(), line.starts_with("fusermount")) {
        (true, _) => format!("fusermount3 failed: {}", output.status),
        (false, true) => line,
        (false, false) => format!("fusermount3: {line}"),
    }
}

fn with_hint(complaint: &str) -> String {
    let hint = if complaint.contains("open /dev/fuse: Permission denied") {
        " (root can let users mount with `chmod 666 /dev/fuse`)"
    } else if complaint.contains("user_allow_other") {
        " (root can add that line; or mount without allow-other)"
    } else if complaint.contains("no write access") || complaint.contains("not owned") {
        " (the mountpoint must belong to the user who mounts)"
    } else {
        ""
    };
    format!("{complaint}{hint}")
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;
    use crate::mount::options::{KernelOptions, VfsFlags};
    use crate::volume::FileKind;

    #[test]
    fn the_source_cannot_become_options() {
        let request = AttachRequest {
            mountpoint: Path::new("/m"),
            source: OsStr::new(r"a,suid\,b"),
            root_kind: FileKind::Directory,
            flags: VfsFlags::default(),
            kernel: &KernelOptions::default(),
            allow_other: false,
        };
        let options = options(&request);
        assert_eq!(options, r"ro,nosuid,nodev,default_permissions,subtype=caifs,fsname=a\,suid\\\,b");
    }

    #[test]
    fn a_refusal_says_what_helps() {
        let line = "fusermount3: option allow_other only allowed if 'user_allow_other' is set in /etc/fuse.conf";
        assert!(with_hint(line).ends_with("(root can add that line; or mount without allow-other)"));
        let line = "fusermount3: failed to open /dev/fuse: Permission denied";
        assert!(with_hint(line).ends_with("(root can let users mount with `chmod 666 /dev/fuse`)"));
        assert_eq!(with_hint("fusermount3: mount failed"), "fusermount3: mount failed");
    }
}
