//! Warming a directory of indexes: also what nobody ever opens.

use std::fs;
use std::path::PathBuf;

use super::{Ground, until};
use crate::mount::can_mount;
use crate::support::blob::Xorshift;
use crate::support::mounted::Mounted;

/// A local directory of indexes whose chunks are elsewhere, and the chunks of each.
struct Directory {
    ground: Ground,
    place: PathBuf,
    log: PathBuf,
    one: Vec<String>,
    below: Vec<String>,
    tree: Vec<String>,
}

impl Directory {
    fn new() -> Option<Self> {
        let ground = Ground::new()?;
        let (place, log) = (ground.scratch.dir("indexes"), ground.scratch.join("log"));
        fs::create_dir_all(place.join("sub/deep")).unwrap();
        let image = |seed, name: &str| {
            let ids = ground.make("made.caibx", &Xorshift::seeded(seed).bytes(1 << 20));
            fs::rename(ground.nginx.root().join("made.caibx"), place.join(name)).unwrap();
            ids
        };
        let (one, below) = (image(1, "one.caibx"), image(2, "sub/deep/below.caibx"));
        let source = ground.scratch.dir("tree");
        fs::write(source.join("large"), Xorshift::seeded(3).bytes(1 << 20)).unwrap();
        ground.pack(&source);
        let tree = ground.chunks_of(&ground.nginx.root().join("t.caidx"));
        fs::rename(ground.nginx.root().join("t.caidx"), place.join("sub/t.caidx")).unwrap();
        Some(Self { ground, place, log, one, below, tree })
    }

    #[track_caller]
    fn mount(&self, warm: &str) -> Mounted {
        let ground = &self.ground;
        let options = format!("{warm},log={}", self.log.display());
        let mut mount = ground.logged_mount(&self.log, &options);
        mount.args(["-s", &ground.url("default.castr"), "-c"]).arg(&ground.cache).arg(&self.place).arg(&ground.mnt);
        Mounted::by_command(&mut mount, &ground.mnt).unwrap()
    }

    /// How many chunks of each are kept.
    fn n_kept(&self) -> [usize; 3] {
        [&self.one, &self.below, &self.tree].map(|ids| self.ground.n_cached(ids))
    }

    fn has_logged(&self, what: &str) -> bool {
        fs::read_to_string(&self.log).is_ok_and(|text| text.contains(what))
    }
}

#[test]
fn what_nobody_opens_is_warmed_and_what_matches_nothing_is_told() {
    if !can_mount() {
        return;
    }
    let Some(directory) = Directory::new() else { return };
    let all = [directory.one.len(), directory.below.len(), directory.tree.len()];
    let mounted = directory.mount("warm=sub/deep,warm=nothing/here,warm=sub:0-1M");
    until("what was named is there", || directory.n_kept()[1] == all[1]);
    until("the rest is told", || {
        directory.has_logged("warming: nothing/here: there is no such index or directory")
            && directory.has_logged("warming: sub: not a regular file, which a range of bytes could be of")
    });
    assert_eq!(directory.n_kept(), [0, all[1], 0], "and nothing else");
    assert!(mounted.end());

    let mounted = directory.mount("warm=all");
    until("all of it is there", || directory.n_kept() == all);
    assert!(mounted.end());
}

#[test]
fn an_index_that_cannot_be_opened_at_first_is_warmed_later() {
    if !can_mount() {
        return;
    }
    let Some(directory) = Directory::new() else { return };
    fs::write(directory.place.join("damaged.caibx"), "no index").unwrap();
    let tree = directory.place.join("sub/t.caidx");
    let right = fs::read(&tree).unwrap();
    fs::write(&tree, &right[..right.len() - 1]).unwrap();
    let mounted = directory.mount("warm=all");
    let wanted = [directory.one.len(), directory.below.len(), 0];
    until("what can be opened is there", || directory.n_kept() == wanted);
    fs::write(&tree, &right).unwrap();
    until("the other is there, too", || directory.n_kept()[2] == directory.tree.len());
    assert!(mounted.end());
}
