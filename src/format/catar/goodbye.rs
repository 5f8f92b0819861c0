//! The end of a directory: a table of its children, sorted by a hash of their names into a search tree.
//!
//! The tree is complete and stored level by level, so item `i` has its children at `2i + 1` and `2i + 2`. A reader finds
//! a name without reading the directory: [`GoodbyeTable`] where the table fits into memory, [`Descent`] where it does
//! not. A hash only proposes: the name stands at the FILENAME and must be compared.
//!
//! Every offset that comes out of here is absolute and lies within the directory.

use std::hash::Hasher;

use siphasher::sip::SipHasher24;

use super::node::ENTRY_BYTES;
use super::{CatarError, ElementHeader, Kind, word};

/// Key of the hash of names (formats: 4.4).
const HASH_KEY: (u64, u64) = (0x8574442b0f1d84b3, 0x2736ed30d1c22ec1);
/// Last word of every directory.
const TAIL_MARKER: u64 = 0x57446fa533702943;
/// Least bytes of a FILENAME element: header, one byte, NUL.
const LEAST_CHILD_BYTES: u64 = ElementHeader::BYTES as u64 + 2;

/// The hash of a file name (SipHash-2-4).
pub fn name_hash(name: &[u8]) -> u64 {
    let mut hasher = SipHasher24::new_with_keys(HASH_KEY.0, HASH_KEY.1);
    hasher.write(name);
    hasher.finish()
}

/// The last 24 bytes of a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tail {
    /// From the directory's ENTRY to its GOODBYE.
    pub entry_distance: u64,
    /// Bytes of the GOODBYE element, this tail included.
    pub goodbye_size: u64,
}

impl Tail {
    /// Bytes of a tail.
    pub const BYTES: usize = 24;

    /// Reads a tail; bytes that are none are an error.
    pub fn parse(bytes: &[u8; Self::BYTES]) -> Result<Self, CatarError> {
        if word(bytes, 16)? != TAIL_MARKER {
            return Err(CatarError::Goodbye("it does not end with the marker"));
        }
        let goodbye_size = word(bytes, 8)?;
        if !Kind::Goodbye.accepts(goodbye_size) {
            return Err(CatarError::Size { kind: Kind::Goodbye, size: goodbye_size });
        }
        Ok(Self { entry_distance: word(bytes, 0)?, goodbye_size })
    }

    /// Absolute offsets of the directory's GOODBYE and ENTRY, given where the directory ends.
    pub fn locate(self, end: u64) -> Result<(u64, u64), CatarError> {
        const OUTSIDE: CatarError = CatarError::Goodbye("it points before the archive's start");
        let goodbye_offset = end.checked_sub(self.goodbye_size).ok_or(OUTSIDE)?;
        let entry_offset = goodbye_offset.checked_sub(self.entry_distance).ok_or(OUTSIDE)?;
        if self.entry_distance < ENTRY_BYTES {
            return Err(CatarError::Goodbye("it leaves no room for the directory's ENTRY"));
        }
        Ok((goodbye_offset, entry_offset))
    }

    /// How many children the table has.
    pub fn n_items(self) -> u64 {
        self.goodbye_size.saturating_sub((ElementHeader::BYTES + Self::BYTES) as u64) / Item::BYTES as u64
    }
}

/// One child in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Item {
    /// Hash of the child's name.
    pub hash: u64,
    /// Absolute offset of the child's FILENAME.
    pub filename_offset: u64,
    /// Absolute offset behind the child's whole node.
    pub end: u64,
}

impl Item {
    /// Bytes of an item.
    pub const BYTES: usize = 24;

    /// Absolute offset of item `i`, given where the GOODBYE starts; saturates where no archive can reach.
    pub fn position(goodbye_offset: u64, i: u64) -> u64 {
        let distance = i.saturating_mul(Self::BYTES as u64).saturating_add(ElementHeader::BYTES as u64);
        goodbye_offset.saturating_add(distance)
    }

    /// Reads an item of the directory with these absolute offsets. A child outside of it is an error.
    pub fn parse(bytes: &[u8; Self::BYTES], goodbye_offset: u64, entry_offset: u64) -> Result<Self, CatarError> {
        let (distance, size, hash) = (word(bytes, 0)?, word(bytes, 8)?, word(bytes, 16)?);
        let least = entry_offset.saturating_add(ENTRY_BYTES);
        match goodbye_offset.checked_sub(distance) {
            Some(filename_offset) if filename_offset >= least && (LEAST_CHILD_BYTES..=distance).contains(&size) => {
                // size <= distance, so this stays at or below the table's offset.
                Ok(Self { hash, filename_offset, end: filename_offset + size })
            }
            _ => Err(CatarError::Goodbye("a child lies outside of its directory")),
        }
    }
}

/// A directory's table, read as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GoodbyeTable {
    items: Vec<Item>,
}

impl GoodbyeTable {
    /// Reads a whole GOODBYE element. Both offsets are absolute.
    pub fn parse(bytes: &[u8], goodbye_offset: u64, entry_offset: u64) -> Result<Self, CatarError> {
        let header = bytes.first_chunk::<{ ElementHeader::BYTES }>().ok_or(CatarError::Truncated("a table"))?;
        let header = ElementHeader::parse(header)?;
        if header.kind != Kind::Goodbye {
            return Err(CatarError::Unexpected { found: header.kind, place: "where a directory's table is expected" });
        }
        if header.size != bytes.len() as u64 {
            return Err(CatarError::Truncated("a table"));
        }
        let (body, tail) = bytes.split_last_chunk::<{ Tail::BYTES }>().ok_or(CatarError::Truncated("a table"))?;
        let tail = Tail::parse(tail)?;
        if tail.goodbye_size != header.size {
            return Err(CatarError::Goodbye("its two sizes differ"));
        }
        if goodbye_offset.checked_sub(entry_offset) != Some(tail.entry_distance) {
            return Err(CatarError::Goodbye("it belongs to another directory"));
        }
        let body = body.get(ElementHeader::BYTES..).unwrap_or(&[]);
        let (items, _) = body.as_chunks::<{ Item::BYTES }>();
        let items = items.iter().map(|item| Item::parse(item, goodbye_offset, entry_offset));
        Ok(Self { items: items.collect::<Result<_, _>>()? })
    }

    /// All children in the order stored.
    pub fn items(&self) -> &[Item] {
        &self.items
    }

    /// The children, as archive order has them: by the offset of their names.
    pub fn into_items_by_offset(mut self) -> Vec<Item> {
        self.items.sort_by_key(|item| item.filename_offset);
        self.items
    }

    /// The children whose names have this hash, by descending the tree (nearly always none or one).
    ///
    /// In a table that is not a search tree some are not found; [`Self::scan`] finds all.
    pub fn candidates(&self, hash: u64) -> impl Iterator<Item = &Item> {
        let mut descent = Descent::new(self.items.len() as u64, hash);
        std::iter::from_fn(move || {
            while let Some(i) = descent.next_index() {
                let item = self.items.get(usize::try_from(i).ok()?)?;
                if descent.visit(i, item.hash) {
                    return Some(item);
                }
            }
            None
        })
    }

    /// The children whose names have this hash, by looking at all.
    pub fn scan(&self, hash: u64) -> impl Iterator<Item = &Item> {
        self.items.iter().filter(move |item| item.hash == hash)
    }

    /// Whether the items are in the order of a search tree, so that [`Self::candidates`] finds every child.
    pub fn is_search_tree(&self) -> bool {
        let mut sorted = vec![0; self.items.len()];
        for (item, rank) in self.items.iter().zip(search_tree_order(self.items.len())) {
            sorted[rank] = item.hash;
        }
        sorted.is_sorted()
    }
}

/// Looks for a hash in a table that stays where it lies: which item to read next.
///
/// Loop: [`Self::next_index`], read that item ([`Item::position`]), [`Self::visit`]. As hashes may be equal, both sides
/// of an equal item are looked at, the left one first.
#[derive(Debug, Clone)]
pub struct Descent {
    n_items: u64,
    hash: u64,
    to_visit: Vec<u64>,
}

impl Descent {
    /// Starts at the top of a table with so many items.
    pub fn new(n_items: u64, hash: u64) -> Self {
        Self { n_items, hash, to_visit: vec![0] }
    }

    /// The item to look at next; `None` when the search is over.
    pub fn next_index(&mut self) -> Option<u64> {
        while let Some(i) = self.to_visit.pop() {
            if i < self.n_items {
                return Some(i);
            }
        }
        None
    }

    /// Tells the hash of the item just read; true if it is the one looked for.
    pub fn visit(&mut self, i: u64, item_hash: u64) -> bool {
        let left = i.saturating_mul(2).saturating_add(1);
        if self.hash >= item_hash {
            self.to_visit.push(left.saturating_add(1));
        }
        if self.hash <= item_hash {
            self.to_visit.push(left);
        }
        self.hash == item_hash
    }
}

/// A child as the writer of a directory remembers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Child {
    /// Hash of the name.
    pub hash: u64,
    /// Absolute offset of the FILENAME.
    pub filename_offset: u64,
    /// Absolute offset behind the child's whole node.
    pub end: u64,
}

/// For each place in the table, which child of those sorted by hash stands there.
pub fn search_tree_order(n: usize) -> Vec<usize> {
    let mut order = vec![0; n];
    // Subtrees still to be placed: their sorted children [from, to) and the place of their top.
    let mut subtrees = vec![(0, n, 0)];
    while let Some((from, to, place)) = subtrees.pop() {
        if from == to {
            continue;
        }
        let top = from + n_left(to - from);
        order[place] = top;
        subtrees.push((from, top, 2 * place + 1));
        subtrees.push((top + 1, to, 2 * place + 2));
    }
    order
}

/// How many of `n` items (at least one) are left of the top of a complete tree: all levels but the last are full, and
/// the last is filled from the left.
fn n_left(n: usize) -> usize {
    let last_level = 1 << n.ilog2();
    let inner = last_level - 1;
    let in_last = n - inner;
    inner / 2 + in_last.min(last_level / 2)
}

/// The GOODBYE element of a directory with these children, in any order. All offsets are absolute; children must lie
/// between ENTRY and GOODBYE.
///
/// Names with equal hashes stand in the order of their offsets, as casync sorts them.
pub fn encode_goodbye(children: &[Child], goodbye_offset: u64, entry_offset: u64) -> Result<Vec<u8>, CatarError> {
    const OUTSIDE: CatarError = CatarError::Goodbye("a child lies outside of its directory");
    let mut sorted = children.to_vec();
    sorted.sort_unstable_by_key(|child| (child.hash, child.filename_offset));
    let size = ElementHeader::BYTES + Tail::BYTES + Item::BYTES * sorted.len();
    let mut bytes = Vec::with_capacity(size);
    bytes.extend_from_slice(&ElementHeader { size: size as u64, kind: Kind::Goodbye }.to_bytes());
    for rank in search_tree_order(sorted.len()) {
        let child = sorted[rank];
        let distance = goodbye_offset.checked_sub(child.filename_offset).ok_or(OUTSIDE)?;
        let child_size = child.end.checked_sub(child.filename_offset).ok_or(OUTSIDE)?;
        if child_size > distance || child.filename_offset < entry_offset {
            return Err(OUTSIDE);
        }
        for number in [distance, child_size, child.hash] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
    }
    let entry_distance = goodbye_offset.checked_sub(entry_offset).ok_or(OUTSIDE)?;
    for number in [entry_distance, size as u64, TAIL_MARKER] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    Ok(bytes)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_those_of_casync() {
        let cases: [(&[u8], u64); 6] = [
            (b"", 0xb64acab6ca921906),
            (b"a", 0x51ba5a19e058c7ad),
            (b"a.txt", 0x30dbb40a12778187),
            (b"fifo", 0x4688b8a264b21bf3),
            (b"sub", 0xebfe935698c3deec),
            (b"0123456789abcdef", 0x0f0f2ed29228293c),
        ];
        for (name, hash) in cases {
            assert_eq!(name_hash(name), hash);
        }
    }

    #[test]
    fn orders_are_those_of_casync() {
        let cases: [&[usize]; 10] = [
            &[],
            &[0],
            &[1, 0],
            &[1, 0, 2],
            &[2, 1, 3, 0],
            &[3, 1, 4, 0, 2],
            &[3, 1, 5, 0, 2, 4],
            &[3, 1, 5, 0, 2, 4, 6],
            &[4, 2, 6, 1, 3, 5, 7, 0],
            &[6, 3, 8, 1, 5, 7, 9, 0, 2, 4],
        ];
        for order in cases {
            assert_eq!(search_tree_order(order.len()), order);
        }
    }

    #[test]
    fn every_child_is_found_and_nothing_else_with_equal_hashes_too() {
        for n in [0u64, 1, 2, 3, 10, 100, 1000] {
            for n_hashes in [1, 2, 7, 1000] {
                let child = |i| Child { hash: i % n_hashes * 10, filename_offset: 164 + 20 * i, end: 184 + 20 * i };
                let children: Vec<Child> = (0..n).map(child).collect();
                let (goodbye, entry) = (164 + 20 * n, 100);
                let bytes = encode_goodbye(&children, goodbye, entry).unwrap();
                let table = GoodbyeTable::parse(&bytes, goodbye, entry).unwrap();
                assert!(table.is_search_tree());
                for hash in [0, 5, 10, 60, 9990, u64::MAX] {
                    let mut found: Vec<u64> = table.candidates(hash).map(|item| item.filename_offset).collect();
                    found.sort_unstable();
                    let expected = children.iter().filter(|child| child.hash == hash);
                    assert_eq!(found, expected.map(|child| child.filename_offset).collect::<Vec<_>>());
                    assert_eq!(table.scan(hash).count(), found.len());
                }
                let tail = Tail::parse(bytes.last_chunk().unwrap()).unwrap();
                assert_eq!(tail.locate(goodbye + bytes.len() as u64), Ok((goodbye, entry)));
                assert_eq!(tail.n_items(), n);
            }
        }
    }

    #[test]
    fn a_table_that_is_no_tree_is_seen_and_can_be_scanned() {
        let items: Vec<Item> = [3, 1, 2].map(|hash| Item { hash, filename_offset: 1, end: 2 }).to_vec();
        let table = GoodbyeTable { items };
        assert!(!table.is_search_tree());
        assert_eq!((table.candidates(2).count(), table.scan(2).count()), (0, 1));
    }

    #[test]
    fn children_outside_of_their_directory_are_errors() {
        let item = |distance: u64, size: u64| {
            let words = [distance, size, 0].map(u64::to_le_bytes);
            Item::parse(words.as_flattened().first_chunk().unwrap(), 1000, 500)
        };
        assert_eq!(item(436, 436), Ok(Item { hash: 0, filename_offset: 564, end: 1000 }));
        for (distance, size) in [(437, 20), (436, 437), (1001, 20), (u64::MAX, 20), (436, 17), (436, u64::MAX), (0, 0)]
        {
            assert!(item(distance, size).is_err(), "{distance} {size}");
        }
        let outside = Child { hash: 0, filename_offset: 90, end: 100 };
        for (goodbye, entry) in [(80, 0), (95, 0), (200, 95), (0, 200)] {
            assert!(encode_goodbye(&[outside], goodbye, entry).is_err());
        }
    }
}
