//! Goodbye tables: at the end of a directory, where each child lies, by the hash of its name (formats.md 4.4).
//!
//! The items stand in the order of a complete binary search tree, level by level, so that a name is found without reading the
//! whole table: from item `i` the search goes on at `2i + 1` or `2i + 2`.

use std::hash::Hasher;

use siphasher::sip::SipHasher24;

use super::element::{CatarError, ElementHeader, ElementKind, HEADER_BYTES, u64_at};

/// Bytes of a table's item.
pub const ITEM_BYTES: usize = 24;

/// Bytes of a table's tail, the last of a directory.
pub const TAIL_BYTES: usize = 24;

/// The number that ends a goodbye table.
const TAIL_MARKER: u64 = 0x57446fa533702943;

/// The keys of the name hash (formats.md 4.4).
const HASH_KEYS: (u64, u64) = (0x8574442b0f1d84b3, 0x2736ed30d1c22ec1);

/// Where the smallest sound child can begin: after the directory's own ENTRY.
const MIN_CHILD_DISTANCE: u64 = super::ENTRY_BYTES as u64;

/// SipHash-2-4 of a file's name.
pub fn name_hash(name: &[u8]) -> u64 {
    let mut hasher = SipHasher24::new_with_keys(HASH_KEYS.0, HASH_KEYS.1);
    hasher.write(name);
    hasher.finish()
}

/// A child of a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Item {
    /// Hash of its name.
    pub hash: u64,
    /// Where its FILENAME element begins in the archive.
    pub filename_offset: u64,
    /// Where its node ends in the archive.
    pub end: u64,
}

impl Item {
    /// Reads an item of the table at `goodbye_offset` of the directory at `entry_offset`.
    ///
    /// # Errors
    /// The child does not lie between the directory's ENTRY and its table.
    pub fn parse(bytes: &[u8], goodbye_offset: u64, entry_offset: u64) -> Result<Self, CatarError> {
        let (distance, size, hash) = (u64_at(bytes, 0)?, u64_at(bytes, 8)?, u64_at(bytes, 16)?);
        let outside = CatarError::BadGoodbye("a child lies outside of its directory");
        let filename_offset = goodbye_offset.checked_sub(distance).ok_or(outside.clone())?;
        if filename_offset < entry_offset.saturating_add(MIN_CHILD_DISTANCE) || size > distance {
            return Err(outside);
        }
        if size <= HEADER_BYTES as u64 {
            return Err(CatarError::BadGoodbye("a child is too small to have a name"));
        }
        Ok(Self { hash, filename_offset, end: filename_offset + size })
    }
}

/// The end of a goodbye table, and so of a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tail {
    /// From the directory's ENTRY to its GOODBYE element.
    pub entry_distance: u64,
    /// Bytes of the GOODBYE element.
    pub goodbye_size: u64,
}

impl Tail {
    /// Reads the last 24 bytes of a directory.
    ///
    /// # Errors
    /// They are not a tail.
    pub fn parse(bytes: &[u8]) -> Result<Self, CatarError> {
        let tail = Self { entry_distance: u64_at(bytes, 0)?, goodbye_size: u64_at(bytes, 8)? };
        if u64_at(bytes, 16)? != TAIL_MARKER {
            return Err(CatarError::BadGoodbye("its last bytes are not a tail"));
        }
        let header = ElementHeader { size: tail.goodbye_size, kind: ElementKind::Goodbye };
        ElementHeader::parse(&header.encode())?;
        if tail.entry_distance < MIN_CHILD_DISTANCE {
            return Err(CatarError::BadGoodbye("it begins within the directory's ENTRY"));
        }
        Ok(tail)
    }
}

/// A whole goodbye table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GoodbyeTable {
    items: Vec<Item>,
}

impl GoodbyeTable {
    /// Reads a GOODBYE element that lies at `goodbye_offset` and belongs to the directory at `entry_offset`.
    ///
    /// # Errors
    /// It is not one, or one of its children does not lie in the directory.
    pub fn parse(bytes: &[u8], goodbye_offset: u64, entry_offset: u64) -> Result<Self, CatarError> {
        let header = ElementHeader::parse(bytes)?;
        if header.kind != ElementKind::Goodbye {
            return Err(CatarError::Unexpected { found: header.kind, wanted: "a goodbye table" });
        }
        if header.size != bytes.len() as u64 {
            return Err(CatarError::BadGoodbye("its size differs at its two ends"));
        }
        let (items, tail) = bytes[HEADER_BYTES..].split_at(bytes.len() - HEADER_BYTES - TAIL_BYTES);
        let tail = Tail::parse(tail)?;
        if tail.goodbye_size != header.size || goodbye_offset.checked_sub(tail.entry_distance) != Some(entry_offset) {
            return Err(CatarError::BadGoodbye("it is not the directory's"));
        }
        let items = items.chunks_exact(ITEM_BYTES).map(|item| Item::parse(item, goodbye_offset, entry_offset));
        Ok(Self { items: items.collect::<Result<_, _>>()? })
    }

    /// The children in the order of the table.
    pub fn items(&self) -> &[Item] {
        &self.items
    }

    /// The children in the order of the table.
    pub fn into_items(self) -> Vec<Item> {
        self.items
    }
}

/// For each place in a table of `n` items: which of the items sorted by hash stands there.
pub fn search_tree_order(n: usize) -> Vec<usize> {
    let mut order = vec![0; n];
    // Ranges of sorted items and the place their subtree's root has; a stack, since it is no deeper than the tree.
    let mut subtrees = vec![(0, n, 0)];
    while let Some((start, n, place)) = subtrees.pop() {
        if n == 0 {
            continue;
        }
        // A complete tree of n nodes: the last level holds `n_last` of the `width` it has room for, from the left.
        let height = n.ilog2();
        let width = 1usize << height;
        let n_last = n - (width - 1);
        let n_left = (width / 2).saturating_sub(1) + n_last.min(width / 2);
        order[place] = start + n_left;
        subtrees.push((start, n_left, 2 * place + 1));
        subtrees.push((start + n_left + 1, n - n_left - 1, 2 * place + 2));
    }
    order
}

/// The bytes of a GOODBYE element that lies at `goodbye_offset` and belongs to the directory at `entry_offset`. The children
/// may come in any order.
pub fn encode_goodbye(children: &[Item], goodbye_offset: u64, entry_offset: u64) -> Vec<u8> {
    let mut sorted = children.to_vec();
    sorted.sort_unstable_by_key(|item| (item.hash, item.filename_offset));
    let size = (HEADER_BYTES + ITEM_BYTES * sorted.len() + TAIL_BYTES) as u64;
    let mut bytes = Vec::with_capacity(size as usize);
    bytes.extend(ElementHeader { size, kind: ElementKind::Goodbye }.encode());
    for sorted_idx in search_tree_order(sorted.len()) {
        let Item { hash, filename_offset, end } = sorted[sorted_idx];
        for field in [goodbye_offset - filename_offset, end - filename_offset, hash] {
            bytes.extend(field.to_le_bytes());
        }
    }
    for field in [goodbye_offset - entry_offset, size, TAIL_MARKER] {
        bytes.extend(field.to_le_bytes());
    }
    bytes
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn known_hashes() {
        for (name, hash) in [
            ("", 0xb64acab6ca921906),
            ("a", 0x51ba5a19e058c7ad),
            ("a.txt", 0x30dbb40a12778187),
            ("fifo", 0x4688b8a264b21bf3),
            ("sub", 0xebfe935698c3deec),
            ("0123456789abcdef", 0x0f0f2ed29228293c),
        ] {
            assert_eq!(name_hash(name.as_bytes()), hash, "{name}");
        }
    }

    #[test]
    fn known_orders() {
        let cases: [&[usize]; 9] = [
            &[],
            &[0],
            &[1, 0],
            &[1, 0, 2],
            &[2, 1, 3, 0],
            &[3, 1, 4, 0, 2],
            &[3, 1, 5, 0, 2, 4],
            &[3, 1, 5, 0, 2, 4, 6],
            &[4, 2, 6, 1, 3, 5, 7, 0],
        ];
        for (n, order) in cases.iter().enumerate() {
            assert_eq!(search_tree_order(n), *order, "{n}");
        }
        assert_eq!(search_tree_order(10), [6, 3, 8, 1, 5, 7, 9, 0, 2, 4]);
    }

    #[test]
    fn every_order_is_a_search_tree() {
        for n in 0..300 {
            let order = search_tree_order(n);
            for (place, sorted_idx) in order.iter().enumerate() {
                assert!(order.get(2 * place + 1).is_none_or(|left| left < sorted_idx));
                assert!(order.get(2 * place + 2).is_none_or(|right| right > sorted_idx));
            }
        }
    }

    #[test]
    fn tables_round_trip_and_no_cut_or_flip_panics() {
        let children: Vec<Item> = (0..5u64)
            .map(|i| Item { hash: i * 77 % 5, filename_offset: 164 + 40 * i, end: 204 + 40 * i })
            .collect();
        let bytes = encode_goodbye(&children, 1000, 100);
        let mut items = GoodbyeTable::parse(&bytes, 1000, 100).unwrap().into_items();
        items.sort_by_key(|item| item.filename_offset);
        assert_eq!(items, children);
        assert_eq!(
            Tail::parse(&bytes[bytes.len() - TAIL_BYTES..]).unwrap(),
            Tail { entry_distance: 900, goodbye_size: bytes.len() as u64 }
        );
        for len in 0..bytes.len() {
            assert!(GoodbyeTable::parse(&bytes[..len], 1000, 100).is_err());
        }
        for bit in 0..8 * bytes.len() {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let _ = GoodbyeTable::parse(&flipped, 1000, 100);
        }
        assert!(GoodbyeTable::parse(&bytes, 1000, 101).is_err());
        assert!(GoodbyeTable::parse(&bytes, 170, u64::MAX).is_err());
    }
}
