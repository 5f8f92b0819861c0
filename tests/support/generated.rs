//! A large archive that no directory stands behind, for browsing: written element by element, never held as a whole.

use std::io::Write;

use caifs::format::catar::{Content, Encoder, Entry, FeatureFlags, Node};

/// How deep the nested directories go.
pub const DEPTH: usize = 30;

/// Files of an ordinary directory.
const FILES_PER_DIRECTORY: u64 = 100;

/// Directories of an ordinary directory's parent.
const DIRECTORIES_PER_PARENT: u64 = 200;

/// The encoder's bytes go on when there are so many.
const PIECE_BYTES: usize = 1 << 20;

/// What the archive has.
#[derive(Debug, Clone, Copy)]
pub struct Generated {
    /// Files, directories and symlinks, the root among them, more or less by a hundred.
    pub n_entries: u64,
    /// How many of them are in one directory, `huge`.
    pub n_huge: u64,
    /// Bytes of a file that is not in `huge`, at least.
    pub content_bytes: usize,
}

impl Default for Generated {
    fn default() -> Self {
        Self { n_entries: 1000, n_huge: 100, content_bytes: 0 }
    }
}

impl Generated {
    /// Writes the archive and gives how many entries it has.
    pub fn write(self, out: &mut dyn Write) -> u64 {
        let mut pack = Pack {
            encoder: Encoder::new(FeatureFlags::CASYNC_DEFAULT),
            out,
            n_entries: 0,
            content_bytes: self.content_bytes,
        };
        pack.directory(None);
        // `a` comes before `deep` and that before `huge`.
        let n_ordinary = self.n_entries.saturating_sub(self.n_huge + DEPTH as u64 + 4);
        let n_directories = n_ordinary.div_ceil(FILES_PER_DIRECTORY + 1);
        for parent in 0..n_directories.div_ceil(DIRECTORIES_PER_PARENT) {
            pack.directory(Some(&format!("a{parent:03}")));
            let left = n_directories - parent * DIRECTORIES_PER_PARENT;
            for directory in 0..left.min(DIRECTORIES_PER_PARENT) {
                pack.directory(Some(&format!("directory-{directory:03}")));
                for file in 0..FILES_PER_DIRECTORY - 1 {
                    pack.file(&format!("file-{file:02}.txt"));
                }
                pack.symlink("link", "file-00.txt");
                pack.end();
            }
            pack.end();
        }
        for level in 0..DEPTH {
            pack.directory(Some(&if level == 0 { "deep".to_owned() } else { format!("level-{level:02}") }));
        }
        pack.file("bottom");
        (0..DEPTH).for_each(|_| pack.end());
        pack.content_bytes = 0;
        pack.directory(Some("huge"));
        for file in 0..self.n_huge {
            pack.file(&format!("entry-{file:07}"));
        }
        pack.end();
        pack.end();
        pack.encoder.finish().expect("the archive is complete");
        pack.drain(0);
        pack.n_entries
    }
}

/// The path of the file at the bottom of the nested directories.
pub fn deep_path() -> String {
    let levels: Vec<String> = (1..DEPTH).map(|level| format!("level-{level:02}")).collect();
    format!("deep/{}/bottom", levels.join("/"))
}

struct Pack<'a> {
    encoder: Encoder,
    out: &'a mut dyn Write,
    n_entries: u64,
    content_bytes: usize,
}

impl Pack<'_> {
    fn node(&mut self, name: Option<&str>, mode: u32, content: Content) {
        let entry = Entry {
            feature_flags: self.encoder.feature_flags(),
            mode,
            flags: 0,
            uid: 1000 + self.n_entries % 3,
            gid: 100,
            mtime_ns: 1_600_000_000_000_000_000 + self.n_entries as i64 * 1_000_003,
        };
        self.encoder.start_node(name.map(str::as_bytes), &Node::new(entry, content)).expect("a node is encoded");
        self.n_entries += 1;
    }

    fn directory(&mut self, name: Option<&str>) {
        self.node(name, 0o040755, Content::Directory { first_child: 0 });
    }

    fn end(&mut self) {
        self.encoder.end_directory().expect("a directory is open");
        self.drain(PIECE_BYTES);
    }

    fn symlink(&mut self, name: &str, target: &str) {
        self.node(Some(name), 0o120777, Content::Symlink(target.as_bytes().to_vec()));
    }

    fn file(&mut self, name: &str) {
        let mut content = format!("{:016x} is what {name} says\n", self.n_entries.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        // Noise, half of which compression takes away.
        let mut state = self.n_entries + 1;
        while content.len() < self.content_bytes {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            content.push_str(&format!("{state:016x}"));
        }
        self.node(Some(name), 0o100644, Content::Payload { size: content.len() as u64, offset: 0 });
        self.encoder.payload(content.as_bytes()).expect("the file has room");
        self.drain(PIECE_BYTES);
    }

    fn drain(&mut self, least_bytes: usize) {
        if self.encoder.buffered().len() >= least_bytes {
            self.out.write_all(self.encoder.buffered()).expect("the archive can be written");
            self.encoder.clear();
        }
    }
}
