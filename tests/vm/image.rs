//! A virtual machine: a bootable Debian disk image made of packages, and a boot of it in software emulation.
//!
//! The image has a BIOS boot record, a FAT partition with syslinux, kernel and initrd, and an ext4 root, so that every byte of a boot
//! comes from the image. It is made once and kept below the target directory.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::support::peers::{find, missing, peer};
use crate::support::run::{self, command, kill_group, run, run_within};
use crate::support::scratch::Scratch;

/// Length of the image in bytes; most of it is a hole.
const IMAGE_BYTES: u64 = 2 << 30;

/// First sector of the boot partition, and how many it has.
const BOOT: (u32, u32) = (2048, 192 << 10);

/// First sector of the root partition; it goes to the end.
const ROOT_START: u32 = BOOT.0 + BOOT.1;

const SECTOR_BYTES: u64 = 512;

/// To be counted up whenever the image is made in another way.
const VERSION: u32 = 1;

/// What a boot ends with on the serial line.
const MARKER: &str = "caifs-vm login:";

/// How long the packages may take to come and be unpacked.
const BUILD_LIMIT: Duration = Duration::from_secs(600);

/// How long a boot may take: some 20 s on an idle machine, without hardware virtualisation.
const BOOT_LIMIT: Duration = Duration::from_secs(300);

/// What is installed beside the essential packages.
const PACKAGES: &str = "systemd-sysv,udev,linux-image-cloud-amd64,initramfs-tools";

const SYSLINUX_CONFIG: &str = "\
SERIAL 0 115200
DEFAULT linux
PROMPT 0
LABEL linux
  KERNEL /vmlinuz
  INITRD /initrd.img
  APPEND root=LABEL=caifs ro console=ttyS0 quiet systemd.show_status=0 net.ifnames=0
";

/// The image, made at the first call. `None` when this machine cannot make it.
///
/// # Panics
/// When a step fails, and when a tool is missing although peers are required.
pub fn debian_image() -> Option<PathBuf> {
    let debootstrap = peer("mmdebstrap")?;
    let syslinux = peer("syslinux")?;
    for tool in ["mcopy", "mkfs.vfat", "mke2fs", "qemu-img", "qemu-system-x86_64"] {
        if find(tool).is_none() {
            missing(&format!("{tool} (apt-get install mtools dosfstools e2fsprogs qemu-utils qemu-system-x86)"));
            return None;
        }
    }
    let boot_record = Path::new("/usr/lib/syslinux/mbr/mbr.bin");
    if !boot_record.exists() {
        missing("mbr.bin (apt-get install syslinux-common)");
        return None;
    }
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let Some(suite) = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME=")) else {
        missing("the name of this Debian release in /etc/os-release");
        return None;
    };
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("debian-{suite}-{VERSION}.raw"));
    if kept.exists() {
        return Some(kept);
    }
    let scratch = Scratch::new();
    let (archive, root) = (scratch.join("root.tar"), scratch.dir("root"));
    let include = format!("--include={PACKAGES}");
    let mut bootstrap = debootstrap.command();
    bootstrap.args(["--variant=minbase", "--aptopt=Acquire::Check-Valid-Until \"false\"", &include, suite]);
    run_within(bootstrap.arg(&archive), BUILD_LIMIT).ok();
    run(command("tar", ["-xf"]).arg(&archive).arg("-C").arg(&root)).ok();
    fs::write(root.join("etc/fstab"), "LABEL=caifs / ext4 ro 0 1\n").unwrap();
    fs::write(root.join("etc/hostname"), "caifs-vm\n").unwrap();

    let boot = boot_partition(&scratch, &root, &syslinux.path);
    let disk = scratch.join("disk.raw");
    let image = OpenOptions::new().create_new(true).write(true).open(&disk).unwrap();
    image.set_len(IMAGE_BYTES).unwrap();
    image.write_all_at(&fs::read(boot_record).unwrap(), 0).unwrap();
    image.write_all_at(&partition_table(), 446).unwrap();
    copy_at(&boot, &image, u64::from(BOOT.0) * SECTOR_BYTES);
    let offset = u64::from(ROOT_START) * SECTOR_BYTES;
    let mut make_root = command(find("mke2fs").unwrap(), ["-q", "-F", "-t", "ext4", "-L", "caifs", "-d"]);
    make_root.arg(&root).arg("-E").arg(format!("offset={offset}")).arg(&disk);
    run(make_root.arg(format!("{}k", (IMAGE_BYTES - offset) / 1024))).ok();
    // Whole or not at all: an interrupted test must not leave half an image for the next.
    let beside = kept.with_extension("new");
    run(command("cp", ["--sparse=always"]).arg(&disk).arg(&beside)).ok();
    fs::rename(&beside, &kept).unwrap();
    Some(kept)
}

fn boot_partition(scratch: &Scratch, root: &Path, syslinux: &Path) -> PathBuf {
    let boot = scratch.join("boot.fat");
    File::create(&boot).unwrap().set_len(u64::from(BOOT.1) * SECTOR_BYTES).unwrap();
    run(command(find("mkfs.vfat").unwrap(), ["-n", "BOOT"]).arg(&boot)).ok();
    let config = scratch.join("syslinux.cfg");
    fs::write(&config, SYSLINUX_CONFIG).unwrap();
    let in_boot = |prefix: &str| {
        let entries = fs::read_dir(root.join("boot")).unwrap().map(|entry| entry.unwrap().path());
        entries.into_iter().find(|path| path.file_name().unwrap().to_str().unwrap().starts_with(prefix)).unwrap()
    };
    for (from, to) in [(in_boot("vmlinuz"), "vmlinuz"), (in_boot("initrd.img"), "initrd.img"), (config, "syslinux.cfg")]
    {
        run(command(find("mcopy").unwrap(), ["-i"]).arg(&boot).arg(from).arg(format!("::/{to}"))).ok();
    }
    run(command(syslinux, ["--install"]).arg(&boot)).ok();
    boot
}

/// Entries of a boot record's table: a bootable FAT32 partition, a Linux one, two empty ones, and the signature.
fn partition_table() -> Vec<u8> {
    let n_root = u32::try_from(IMAGE_BYTES / SECTOR_BYTES).unwrap() - ROOT_START;
    let mut table = Vec::new();
    for (flag, kind, start, n_sectors) in [(0x80, 0x0c, BOOT.0, BOOT.1), (0, 0x83, ROOT_START, n_root)] {
        // Cylinders and heads that mean "see the sector numbers".
        table.extend([flag, 0xfe, 0xff, 0xff, kind, 0xfe, 0xff, 0xff]);
        table.extend(u32::to_le_bytes(start));
        table.extend(u32::to_le_bytes(n_sectors));
    }
    table.extend([0; 32]);
    table.extend([0x55, 0xaa]);
    table
}

/// Copies a file into another one at a place, leaving zeros as they are there.
fn copy_at(from: &Path, to: &File, offset: u64) {
    let mut from = File::open(from).unwrap();
    let mut block = vec![0; 1 << 20];
    let mut at = offset;
    loop {
        let n = from.read(&mut block).unwrap();
        if n == 0 {
            return;
        }
        if block[..n].iter().any(|byte| *byte != 0) {
            to.write_all_at(&block[..n], at).unwrap();
        }
        at += n as u64;
    }
}

/// Boots an image, through a copy-on-write overlay in `dir`, until somebody could log in on its serial line. How long that took.
///
/// # Panics
/// When it does not come up; the message has what it said.
pub fn boot(image: &Path, dir: &Path) -> Duration {
    let overlay = dir.join(format!("overlay-{}.qcow2", fs::read_dir(dir).unwrap().count()));
    let mut make = command(find("qemu-img").unwrap(), ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]);
    run(make.arg(image).arg(&overlay)).ok();
    let mut qemu = Command::new(find("qemu-system-x86_64").unwrap());
    qemu.args(["-accel", "tcg", "-m", "512", "-display", "none", "-no-reboot", "-net", "none", "-monitor", "none"]);
    qemu.arg("-drive").arg(format!("file={},if=virtio,format=qcow2", overlay.display()));
    qemu.args(["-serial", "stdio"]).stdin(Stdio::null()).stdout(Stdio::piped()).process_group(0);
    let start = Instant::now();
    let mut machine = Machine(qemu.spawn().unwrap_or_else(|error| panic!("{}: {error}", run::shown(&qemu))));
    let said = listen(machine.0.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains(MARKER) {
        let left = BOOT_LIMIT.saturating_sub(start.elapsed());
        match said.recv_timeout(left) {
            Ok(piece) => line.push_str(&piece),
            Err(error) => panic!("the machine did not come up ({error}); it said:\n{line}"),
        }
    }
    start.elapsed()
}

/// A running machine; switched off when dropped.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        kill_group(&mut self.0);
    }
}

fn listen(mut serial: impl Read + Send + 'static) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut piece = [0; 4096];
        while let Ok(n @ 1..) = serial.read(&mut piece) {
            if sender.send(String::from_utf8_lossy(&piece[..n]).into_owned()).is_err() {
                return;
            }
        }
    });
    receiver
}
