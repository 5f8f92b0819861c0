//! An automounter that waits at the mountpoint, as systemd's automount units do (kernel: Documentation/filesystems/autofs.rst).

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use nix::mount::{MsFlags, mount};
use nix::unistd::{Pid, getpgrp, setpgid};

use super::world::World;

/// `AUTOFS_IOC_READY` of linux/auto_fs.h: who waited may go on.
const READY: libc::c_ulong = 0x9360;

/// A packet of the kernel's: version, kind, then the number of the wait queue.
const PACKET_BYTES: usize = 304;

#[test]
fn somebody_who_looks_gets_the_mount_that_the_automounter_makes() {
    let Some(world) = World::enter("fstab::automount::somebody_who_looks_gets_the_mount_that_the_automounter_makes")
    else {
        return;
    };
    if !fs::read_to_string("/proc/filesystems").unwrap().contains("autofs") {
        return crate::support::peers::missing("autofs in the kernel");
    }
    world.link_helpers();
    let content = world.content("srv", "x");
    let mountpoint = world.mountpoint("auto");
    world.write_fstab(&format!("{} /mnt/auto caifs noauto,x-systemd.automount 0 0\n", content.index.display()));

    // The automounter is this process with all of its group, for which the kernel does not wait.
    setpgid(Pid::from_raw(0), Pid::from_raw(0)).unwrap();
    let (mut requests, theirs) = std::io::pipe().unwrap();
    let options = format!("fd={},pgrp={},minproto=5,maxproto=5,direct", theirs.as_raw_fd(), getpgrp());
    mount(Some("automounter"), &mountpoint, Some("autofs"), MsFlags::empty(), Some(options.as_str())).unwrap();
    drop(theirs);
    let root = File::options().read(true).custom_flags(libc::O_DIRECTORY).open(&mountpoint).unwrap();

    for _ in 0..2 {
        let mut looks = Command::new("cat");
        let looks = looks.arg("/mnt/auto/x").process_group(0).stdout(Stdio::piped()).spawn().unwrap();
        let mut packet = [0u8; PACKET_BYTES];
        requests.read_exact(&mut packet).unwrap();
        let token = u32::from_ne_bytes(packet[8..12].try_into().unwrap());
        // In our group, as systemd starts it.
        let mounted = Command::new("mount").arg("/mnt/auto").stdin(Stdio::null()).output().unwrap();
        assert!(mounted.status.success(), "{mounted:?}");
        #[allow(unsafe_code, reason = "no crate has this call")]
        // SAFETY: the argument of this request is a number.
        let told = unsafe { libc::ioctl(root.as_raw_fd(), READY, libc::c_ulong::from(token)) };
        assert_eq!(told, 0, "{}", std::io::Error::last_os_error());
        assert!(looks.wait_with_output().unwrap().stdout == content.bytes);

        let again = Command::new("mount").arg("/mnt/auto").stdin(Stdio::null()).output().unwrap();
        assert!(String::from_utf8_lossy(&again.stderr).contains("already mounted"), "{again:?}");
        world.mounted(&mountpoint);
        // As when its idle time is over; the automounter goes on waiting.
        nix::mount::umount2(&mountpoint, nix::mount::MntFlags::empty()).unwrap();
        assert_eq!(world.mounts().len(), 0);
    }
}
