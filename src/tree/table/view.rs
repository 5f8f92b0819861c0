//! Questions to a table: a file by its offset, by its name in a directory, and the children of a directory from a place on.
//!
//! Invariant: whatever the bytes are, an answer is within the archive or the table is called damaged; a search ends, since a file lies
//! strictly within its directory.

use std::cmp::Ordering;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use super::super::list::Child;
use super::super::{Content, MAX_DEPTH, Node};
use super::blocks::{Fault, Reader};
use crate::format::catar::node::{
    MODE_BLOCK_DEVICE, MODE_CHARACTER_DEVICE, MODE_DIRECTORY, MODE_FIFO, MODE_REGULAR, MODE_SOCKET, MODE_SYMLINK,
    MODE_TYPE,
};
use crate::format::catar::{MAX_NAME_BYTES, MAX_SYMLINK_BYTES, check_filename, name_hash};
use crate::format::table::{Children, Extra, NameRef, Record, Tail};

/// The most bytes of extended attributes in what is listed at once: records may share one set of them, and each listed file has its own.
const MAX_LISTED_EXTRA_BYTES: usize = 128 << 20;

/// Extended attributes, name and value.
type Xattrs = Box<[(Bytes, Bytes)]>;

/// A record and the directory it was found in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) record: Record,
    /// Where the ENTRY of the directory above lies.
    pub(super) parent_offset: u64,
    /// Where the space of the node ends: the directory above.
    pub(super) limit: u64,
}

/// A table while one question is answered.
#[derive(Debug)]
pub(super) struct View<'a> {
    pub(super) reader: Reader<'a>,
    pub(super) tail: &'a Tail,
}

impl View<'_> {
    /// The root.
    pub(super) fn root(&mut self) -> Result<Found, Fault> {
        let record = self.record(self.tail.root_at)?;
        match record.entry_offset {
            0 => Ok(Found { record, parent_offset: 0, limit: self.tail.binding.archive_bytes }),
            _ => Fault::damaged("its root is none"),
        }
    }

    pub(super) fn record(&mut self, at: u64) -> Result<Record, Fault> {
        Ok(Record::parse(&self.reader.array(at)?))
    }

    /// What a directory has; `None` for a file that is none.
    pub(super) fn children(&mut self, found: &Found) -> Result<Option<Children>, Fault> {
        if !found.record.is_directory() {
            return Ok(None);
        }
        let children = Children::parse(&self.reader.array(found.record.n2)?)?;
        match children.end > found.record.entry_offset && children.end <= found.limit {
            true => Ok(Some(children)),
            false => Fault::damaged("a directory lies outside of the one above"),
        }
    }

    /// A child of a directory.
    pub(super) fn child(&mut self, above: &Found, children: &Children, n: u32) -> Result<Found, Fault> {
        let record = self.record(children.record_at(n))?;
        let within = above.record.entry_offset + 1..children.end;
        match within.contains(&record.entry_offset) {
            true => Ok(Found { record, parent_offset: above.record.entry_offset, limit: children.end }),
            false => Fault::damaged("a file lies outside of its directory"),
        }
    }

    /// The file whose ENTRY lies at an offset.
    pub(super) fn find(&mut self, entry_offset: u64) -> Result<Option<Found>, Fault> {
        let mut found = self.root()?;
        for _ in 0..MAX_DEPTH {
            if found.record.entry_offset == entry_offset {
                return Ok(Some(found));
            }
            let Some(children) = self.children(&found)? else { return Ok(None) };
            let after = self.first(0..children.n_children, |view, n| {
                let entry = u64::from_le_bytes(view.reader.array(children.record_at(n))?);
                Ok(entry > entry_offset)
            })?;
            let Some(n) = after.checked_sub(1).filter(|_| entry_offset < children.end) else { return Ok(None) };
            found = self.child(&found, &children, n)?;
        }
        Fault::damaged("directories are nested too deep")
    }

    /// The child of a directory with a name.
    pub(super) fn by_name(&mut self, above: &Found, name: &[u8]) -> Result<Option<Found>, Fault> {
        let Some(children) = self.children(above)? else { return Ok(None) };
        if children.names_at == 0 {
            let n =
                self.first(0..children.n_children, |view, n| Ok(view.compare(&children, n, name)? != Ordering::Less))?;
            return match n < children.n_children && self.compare(&children, n, name)? == Ordering::Equal {
                true => self.child(above, &children, n).map(Some),
                false => Ok(None),
            };
        }
        let hash = NameRef::half(name_hash(name));
        let mut place = self.first(0..children.n_children, |view, n| {
            Ok(NameRef::parse(&view.reader.array(children.name_ref_at(n))?).hash >= hash)
        })?;
        while place < children.n_children {
            let name_ref = NameRef::parse(&self.reader.array(children.name_ref_at(place))?);
            if name_ref.hash != hash || name_ref.child >= children.n_children {
                break;
            }
            if self.compare(&children, name_ref.child, name)? == Ordering::Equal {
                return self.child(above, &children, name_ref.child).map(Some);
            }
            place += 1;
        }
        Ok(None)
    }

    /// Children of a directory whose places in it are in a range, and the place of the first one behind them.
    pub(super) fn list(&mut self, above: &Found, places: Range<u64>) -> Result<(Vec<Child>, Option<u64>), Fault> {
        let Some(children) = self.children(above)? else { return Fault::damaged("a directory is none") };
        let place_of = |view: &mut Self, n| view.record(children.record_at(n)).map(|record| u64::from(record.idx));
        // Places are those of the records unless there are names without a file.
        let guess = u32::try_from(places.start).unwrap_or(u32::MAX);
        let mut n = match guess < children.n_children && place_of(self, guess)? == places.start {
            true => guess,
            false => self.first(0..children.n_children, |view, n| Ok(place_of(view, n)? >= places.start))?,
        };
        let mut listed = Vec::new();
        let mut extra_bytes = 0;
        while n < children.n_children {
            let found = self.child(above, &children, n)?;
            let place = u64::from(found.record.idx);
            if place >= places.end {
                return Ok((listed, Some(place)));
            }
            let name = self.name(&found.record)?;
            let node = self.node(&found)?;
            extra_bytes += node.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>();
            if extra_bytes > MAX_LISTED_EXTRA_BYTES {
                return Fault::damaged("files of a directory have too many extended attributes");
            }
            listed.push(Child { name, node: Arc::new(node), next_idx: place + 1 });
            n += 1;
        }
        Ok((listed, None))
    }

    /// All that is known of a file.
    pub(super) fn node(&mut self, found: &Found) -> Result<Node, Fault> {
        let Found { record, parent_offset, limit } = *found;
        let mut n_subdirectories = None;
        let content = match u32::from(record.mode) & MODE_TYPE {
            MODE_REGULAR => {
                let offset = record.entry_offset.saturating_add(u64::from(record.n1));
                if offset.checked_add(record.n2).is_none_or(|end| end > limit) {
                    return Fault::damaged("the content of a file lies outside of its directory");
                }
                Content::File { offset, size: record.n2 }
            }
            MODE_SYMLINK => match record.n1 as usize {
                n_bytes if (1..MAX_SYMLINK_BYTES).contains(&n_bytes) => {
                    Content::Symlink(self.reader.bytes(record.n2, n_bytes)?)
                }
                _ => return Fault::damaged("a symlink's target is too long"),
            },
            MODE_BLOCK_DEVICE | MODE_CHARACTER_DEVICE => Content::Device { major: record.n1, minor: record.n2 as u32 },
            MODE_DIRECTORY => {
                let children = self.children(found)?.unwrap_or_default();
                n_subdirectories = Some(children.n_subdirectories);
                Content::Directory { end: children.end }
            }
            MODE_FIFO | MODE_SOCKET => Content::Nothing,
            _ => return Fault::damaged("a file is of no known type"),
        };
        let (inode_flags, xattrs) = match record.extra_at {
            0 => (0, Box::default()),
            at => self.extra(at)?,
        };
        let Record { entry_offset, mode, uid, gid, mtime_ns, .. } = record;
        let mode = u32::from(mode);
        Ok(Node {
            entry_offset,
            parent_offset,
            mode,
            uid,
            gid,
            mtime_ns,
            inode_flags,
            xattrs,
            content,
            n_subdirectories,
        })
    }

    /// A file's name, which is one.
    pub(super) fn name(&mut self, record: &Record) -> Result<Bytes, Fault> {
        let n_bytes = usize::from(record.name_bytes);
        if n_bytes > MAX_NAME_BYTES {
            return Fault::damaged("a name is too long");
        }
        let name = self.reader.bytes(record.name_at, n_bytes)?;
        match check_filename(&name) {
            Ok(()) => Ok(name),
            Err(_) => Fault::damaged("a name is none"),
        }
    }

    fn extra(&mut self, at: u64) -> Result<(u32, Xattrs), Fault> {
        let head = self.reader.array(at)?;
        let (inode_flags, n_bytes) = Extra::parse_head(&head)?;
        let body = self.reader.bytes(at.saturating_add(head.len() as u64), n_bytes)?;
        let xattrs = Extra::parse_body(&body)?;
        Ok((
            inode_flags,
            xattrs.into_iter().map(|(name, value)| (body.slice_ref(name), body.slice_ref(value))).collect(),
        ))
    }

    /// How a child's name stands to another name.
    fn compare(&mut self, children: &Children, n: u32, name: &[u8]) -> Result<Ordering, Fault> {
        let record = self.record(children.record_at(n))?;
        let mut buffer = [0; MAX_NAME_BYTES];
        match buffer.get_mut(..usize::from(record.name_bytes)) {
            Some(stored) => {
                self.reader.read(record.name_at, stored)?;
                Ok((*stored).cmp(name))
            }
            None => Fault::damaged("a name is too long"),
        }
    }

    /// The first number of a range that something holds for, if it holds for all after it; the range's end when it holds for none.
    fn first(
        &mut self,
        range: Range<u32>,
        mut holds: impl FnMut(&mut Self, u32) -> Result<bool, Fault>,
    ) -> Result<u32, Fault> {
        let (mut low, mut high) = (range.start, range.end);
        while low < high {
            let middle = low + (high - low) / 2;
            match holds(self, middle)? {
                true => high = middle,
                false => low = middle + 1,
            }
        }
        Ok(low)
    }
}
