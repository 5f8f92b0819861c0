//! What a mount shows: attributes and content against the source, refusals to write, owners, the mount table.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use nix::sys::stat::{Mode, SFlag, mknod};

use crate::support::blob::noise;
use crate::support::corner::Corner;
use crate::support::listing::tree_listing;
use crate::support::run::{caifs, run};
use crate::support::scratch::Scratch;

use super::{can_mount, contents, image, make, mount, mount_with, n_fetches, pack};

#[test]
fn a_tree_shows_every_attribute_and_all_content_of_its_source() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let (source, mountpoint) = (scratch.dir("source"), scratch.dir("m"));
    Corner::ALL.build(&source);
    fs::write(source.join("large"), noise(3_000_000)).unwrap();
    let (index, store) = pack(&scratch, &source);
    let wanted = tree_listing(&source).map(|_, entry| {
        // One nanosecond before 1970 is "no time" in the format, and stored as the nanosecond before.
        if entry.mtime == (-1, 999_999_999) {
            entry.mtime = (-1, 999_999_998);
        }
    });
    let mounted = mount(&index, Some(&store), &mountpoint);
    tree_listing(&mountpoint).assert_same(&wanted);
    assert!(contents(&mountpoint) == contents(&source), "content differs");
    assert!(mounted.end());
    let archive = scratch.join("tree.catar");
    run(caifs().arg("tar").arg(&archive).arg(&source)).ok();
    let mounted = mount(&archive, None, &mountpoint);
    tree_listing(&mountpoint).assert_same(&wanted);
    assert!(contents(&mountpoint) == contents(&source), "content differs");
    assert!(mounted.end());
}

#[test]
fn chattr_flags_links_blocks_and_own_xattrs_are_shown() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let (source, mountpoint) = (scratch.dir("source"), scratch.dir("m"));
    fs::write(source.join("plain"), noise(300_000)).unwrap();
    fs::write(source.join("flagged"), b"x").unwrap();
    fs::create_dir_all(source.join("dir/a/b")).unwrap();
    symlink("some/target", source.join("link")).unwrap();
    let flagged = run(std::process::Command::new("chattr").arg("+dA").arg(source.join("flagged")));
    let (index, store) = pack(&scratch, &source);
    // casync's default leaves files with +d out; this archive is made with them.
    let _mounted = mount(&index, Some(&store), &mountpoint);
    let at = |name: &str| mountpoint.join(name).symlink_metadata().unwrap();
    assert_eq!((at("link").size(), at("link").blocks(), at("link").nlink()), (11, 1, 1));
    assert_eq!((at("plain").size(), at("plain").blocks(), at("plain").nlink()), (300_000, 586, 1));
    assert_ne!(at("plain").ino(), at("link").ino());
    let own = |name: &str, own: &str| {
        let value = xattr::get(mountpoint.join(name), format!("user.caifs.{own}")).unwrap();
        value.map(|value| String::from_utf8(value).unwrap())
    };
    assert_eq!(own("plain", "index").unwrap(), index.to_str().unwrap());
    assert!((1..=10).contains(&own("plain", "chunks").unwrap().parse::<u64>().unwrap()));
    assert_eq!(own("plain", "entry-offset").unwrap(), at("plain").ino().to_string());
    let payload: u64 = own("plain", "payload-offset").unwrap().parse().unwrap();
    assert!(payload > at("plain").ino());
    assert_eq!(own("plain", "nonsense"), None);
    assert_eq!(own("dir", "chunks"), None);
    assert_eq!(xattr::list(mountpoint.join("plain")).unwrap().count(), 0, "own attributes are not listed");
    let lsattr = run(std::process::Command::new("lsattr").arg("-d").arg(mountpoint.join("plain"))).ok().text();
    assert!(lsattr.starts_with("----------"), "{lsattr}");
    if flagged.status.success() {
        assert!(!mountpoint.join("flagged").exists(), "a file with +d is left out, as casync does");
    }
}

#[test]
fn every_change_is_refused_with_erofs() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let (source, mountpoint) = (scratch.dir("source"), scratch.dir("m"));
    fs::write(source.join("file"), b"x").unwrap();
    fs::create_dir(source.join("dir")).unwrap();
    let (index, store) = pack(&scratch, &source);
    let _mounted = mount(&index, Some(&store), &mountpoint);
    let (file, dir, new) = (mountpoint.join("file"), mountpoint.join("dir"), mountpoint.join("new"));
    let nix = |done: nix::Result<()>| done.map_err(io::Error::from);
    let outcomes: Vec<(&str, io::Result<()>)> = vec![
        ("open for writing", File::options().write(true).open(&file).map(drop)),
        ("create", File::create_new(&new).map(drop)),
        ("truncate", nix(nix::unistd::truncate(&file, 0))),
        ("chmod", fs::set_permissions(&file, fs::Permissions::from_mode(0o600))),
        ("chown", std::os::unix::fs::chown(&file, Some(1), Some(1))),
        ("mkdir", fs::create_dir(&new)),
        ("rmdir", fs::remove_dir(&dir)),
        ("unlink", fs::remove_file(&file)),
        ("symlink", symlink("x", &new)),
        ("link", fs::hard_link(&file, &new)),
        ("rename", fs::rename(&file, &new)),
        ("mknod", nix(mknod(&new, SFlag::S_IFIFO, Mode::S_IRWXU, 0))),
        ("setxattr", xattr::set(&file, "user.x", b"1")),
        ("removexattr", xattr::remove(&file, "user.x")),
        (
            "utimes",
            nix(nix::sys::stat::utimes(
                &file,
                &nix::sys::time::TimeVal::new(1, 0),
                &nix::sys::time::TimeVal::new(1, 0),
            )),
        ),
    ];
    for (what, outcome) in outcomes {
        assert_eq!(outcome.unwrap_err().raw_os_error(), Some(libc::EROFS), "{what}");
    }
    // Remounted read-write, the kernel asks us, and we refuse too.
    let remounted =
        nix::mount::mount(None::<&str>, &mountpoint, None::<&str>, nix::mount::MsFlags::MS_REMOUNT, None::<&str>);
    if remounted.is_ok() {
        assert_eq!(fs::create_dir(&new).unwrap_err().raw_os_error(), Some(libc::EROFS));
        assert_eq!(fs::remove_file(&file).unwrap_err().raw_os_error(), Some(libc::EROFS));
    }
}

#[test]
fn an_image_is_a_file_in_a_directory_or_the_mountpoint_itself() {
    let mut content = noise(5_000_000);
    content[1_000_000..4_000_000].fill(0);
    let Some((scratch, index, store, mountpoint)) = image(&content) else { return };
    let mounted = mount(&index, Some(&store), &mountpoint);
    assert_eq!(n_fetches(&mountpoint), 0, "mounting a blob fetches no chunk");
    let names: Vec<_> = fs::read_dir(&mountpoint).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["disk"]);
    let metadata = mountpoint.join("disk").metadata().unwrap();
    assert_eq!((metadata.len(), metadata.mode() & 0o7777, metadata.blocks()), (5_000_000, 0o444, 9766));
    assert!(fs::read(mountpoint.join("disk")).unwrap() == content);
    assert_eq!(mountpoint.join("other").symlink_metadata().unwrap_err().raw_os_error(), Some(libc::ENOENT));
    assert!(mounted.end());

    let on_file = scratch.file("image", b"covered");
    let mounted = mount(&index, Some(&store), &on_file);
    assert!(fs::read(&on_file).unwrap() == content);
    let mut some = [0; 100];
    File::open(&on_file).unwrap().read_exact_at(&mut some, 4_999_900).unwrap();
    assert!(some == content[4_999_900..]);
    assert!(mounted.end());
    assert_eq!(fs::read(&on_file).unwrap(), b"covered");
}

#[test]
fn empty_things_can_be_mounted() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let mountpoint = scratch.dir("m");
    let (index, store) = make(&scratch, b"");
    let mounted = mount(&index, Some(&store), &mountpoint);
    assert_eq!(fs::read(mountpoint.join("disk")).unwrap(), b"");
    assert!(mounted.end());
    let (index, store) = pack(&scratch, &scratch.dir("empty"));
    let mounted = mount(&index, Some(&store), &mountpoint);
    assert_eq!(fs::read_dir(&mountpoint).unwrap().count(), 0);
    assert!(mounted.end());
}

#[test]
fn owners_and_access_are_as_asked() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let (source, mountpoint) = (scratch.dir("source"), scratch.dir("m"));
    fs::write(source.join("file"), b"x").unwrap();
    let (index, store) = pack(&scratch, &source);
    let mounted = mount_with(&index, Some(&store), &mountpoint, &["-o", "uid=1234,gid=5678"]).unwrap();
    let metadata = mountpoint.join("file").metadata().unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (1234, 5678));
    assert!(mounted.end());
}

#[test]
fn mount_table_shows_spec_and_type() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let (index, store) = make(&scratch, b"x");
    let odd = scratch.join("odd, name\\ with space.caibx");
    fs::rename(index, &odd).unwrap();
    let mountpoint = scratch.dir("m");
    let _mounted = mount(&odd, Some(&store), &mountpoint);
    let table = procfs_line(&mountpoint);
    let mut fields = table.rsplit(" - ").next().unwrap().split(' ');
    assert_eq!(fields.next(), Some("fuse.caifs"));
    let source = fields.next().unwrap().replace("\\040", " ").replace("\\134", "\\");
    assert_eq!(source, odd.to_str().unwrap());
    assert!(table.contains(" ro,nosuid,nodev"), "{table}");
}

fn procfs_line(mountpoint: &Path) -> String {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = table.lines().find(|line| line.split(' ').nth(4) == mountpoint.to_str());
    line.unwrap().to_owned()
}

#[test]
fn changing_chattr_flags_is_refused() {
    let Some((_scratch, index, store, mountpoint)) = image(b"content") else { return };
    let _mounted = mount(&index, Some(&store), &mountpoint);
    let set = run(std::process::Command::new("chattr").arg("+A").arg(mountpoint.join("disk"))).fails();
    assert!(set.stderr.contains("Read-only file system"), "{}", set.stderr);
}
