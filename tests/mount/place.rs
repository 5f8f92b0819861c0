//! Where a mount may be, and what the caller gets.

use std::fs;
use std::path::PathBuf;

use crate::support::blob::noise;
use crate::support::mounted::is_mountpoint;
use crate::support::run::{caifs, run};
use crate::support::scratch::Scratch;

use super::{can_mount, image, make, mount, mount_with, pack};

#[test]
fn a_tree_on_a_file_is_refused() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let (index, store) = pack(&scratch, &scratch.dir("source"));
    let error = mount_with(&index, Some(&store), &scratch.file("file", b""), &[]).unwrap_err();
    assert!(error.contains("a directory tree cannot be mounted on a file"), "{error}");
}

#[test]
fn a_mount_that_would_cover_its_store_and_a_remount_are_refused() {
    let scratch = Scratch::new();
    let (index, store) = make(&scratch, b"content");
    let covering = run(caifs().arg("mount").arg(&index).arg(&*scratch).arg("-s").arg(&store)).fails();
    assert!(covering.error_line().contains("would cover the store"), "{}", covering.stderr);
    let mountpoint = scratch.dir("m");
    let again = run(caifs().arg("mount").args(["-o", "remount"]).arg(&index).arg(&mountpoint).arg("-s").arg(&store));
    let again = again.fails();
    assert!(again.error_line().contains("cannot be remounted"), "{}", again.stderr);
    assert!(!is_mountpoint(&mountpoint));
}

#[test]
fn a_place_where_a_mount_of_ours_lives_is_refused() {
    let Some((_scratch, index, store, mountpoint)) = image(b"content") else { return };
    let _mounted = mount(&index, Some(&store), &mountpoint);
    let again = run(caifs().arg("mount").arg(&index).arg(&mountpoint).arg("-s").arg(&store)).fails();
    assert!(again.error_line().contains("already mounted on"), "{}", again.stderr);
    assert_eq!(fs::read(mountpoint.join("disk")).unwrap(), b"content");
}

#[test]
fn bad_input_is_one_clear_line() {
    let scratch = Scratch::new();
    let mountpoint = scratch.dir("m");
    let (index, store) = make(&scratch, &noise(100_000));
    let bytes = fs::read(&index).unwrap();
    let cases: Vec<(PathBuf, &str)> = vec![
        (scratch.join("absent.caibx"), "No such file"),
        (scratch.file("cut.caibx", &bytes[..bytes.len() - 1]), "cut.caibx"),
        (scratch.file("empty.caibx", b""), "empty.caibx"),
        (scratch.file("text.caibx", b"this is no index at all, but some text"), "not an index"),
        (scratch.file("text", b"this is no index at all, but some text"), "neither an index"),
        (scratch.file("text.catar", b"this is no archive at all, but some text"), "text.catar"),
        (scratch.file("blob.caidx", &bytes), "blob.caidx"),
    ];
    for (spec, wanted) in cases {
        let failed = run(caifs().arg("mount").arg(&spec).arg(&mountpoint).arg("-s").arg(&store)).fails();
        let line = failed.error_line();
        assert!(line.starts_with("caifs: ") && line.contains(wanted), "{line}");
        assert!(!is_mountpoint(&mountpoint));
    }
    let no_store = run(caifs().arg("mount").arg(&index).arg(&mountpoint)).fails();
    assert!(no_store.error_line().contains("default.castr"), "{}", no_store.stderr);
    let store_gone = run(caifs().arg("mount").arg(&index).arg(&mountpoint).args(["-s", "/no/such/store"])).fails();
    assert!(store_gone.error_line().contains("/no/such/store"), "{}", store_gone.stderr);
    let nowhere = run(caifs().arg("mount").arg(&index).arg(scratch.join("nowhere")).arg("-s").arg(&store)).fails();
    assert!(nowhere.error_line().contains("nowhere"), "{}", nowhere.stderr);
    let unknown = run(caifs().arg("mount").arg(&index).arg(&mountpoint).args(["-o", "memroy=1G"])).fails();
    assert!(unknown.error_line().contains("memroy") && unknown.error_line().contains("memory"), "{}", unknown.stderr);
    assert_eq!(unknown.status.code(), Some(1));
}

#[test]
fn a_mount_returns_when_it_is_usable_and_does_not_hold_the_callers_output() {
    let Some((_scratch, index, store, mountpoint)) = image(b"content") else { return };
    let script = format!(
        "out=$({} mount {} {} -s {}) && cat {}/disk && echo \"[$out]\"",
        env!("CARGO_BIN_EXE_caifs"),
        index.display(),
        mountpoint.display(),
        store.display(),
        mountpoint.display()
    );
    let mut command = std::process::Command::new("sh");
    command.arg("-c").arg(script);
    let finished = run(&mut command).ok();
    assert_eq!(finished.text(), "content[]\n");
    run(caifs().arg("umount").arg(&mountpoint)).ok();
    assert!(!is_mountpoint(&mountpoint));
}
