//! Index files (`.caibx`, `.caidx`): which chunks make up a blob or an archive, and where each ends.
//!
//! * [`Index`] reads one where it lies, in borrowed, owned or mapped bytes: opening looks at the two ends only, and
//!   [`Index::locate`] is a binary search, so both cost the same for a table of ten chunks and of ten million.
//! * [`IndexHeader`] and [`ChunkSizes`] are what the header says; [`encode`] and its parts write the file.
//! * [`kind_of`] tells index and archive apart by their first bytes.
//!
//! Layout (formats.md 2): INDEX object of 48 bytes, TABLE header of 16, then 40 bytes a chunk (end offset, id), then a
//! tail of 40. Invariant: no input makes anything here panic, allocate or loop beyond the input's own length; an item
//! is handed out only after it has been checked against its neighbour and the maximum chunk size.

use crate::digest::{CHUNK_ID_BYTES, ChunkId, Digest};

/// The largest chunk either casync or desync can make or read, in bytes (casync's CA_CHUNK_SIZE_LIMIT_MAX).
pub const MAX_CHUNK_BYTES: u64 = 128 << 20;

/// Bytes in front of the first item: the INDEX object and the TABLE header.
pub const TABLE_START_BYTES: usize = 64;
/// Bytes of one item of the table, and of the tail.
pub const ITEM_BYTES: usize = 40;
/// Bytes of the index of an empty blob, the shortest index there is.
pub const MIN_INDEX_BYTES: usize = TABLE_START_BYTES + ITEM_BYTES;

const INDEX_TYPE: u64 = 0x9682_4d9c_7b12_9ff9;
const TABLE_TYPE: u64 = 0xe75b_9e11_2f17_417d;
const TAIL_MARKER: u64 = 0x4b4f_050e_5549_ecd1;
const ENTRY_TYPE: u64 = 0x1396_fabc_ea5b_bb51;
const INDEX_OBJECT_BYTES: u64 = 48;
const ENTRY_OBJECT_BYTES: u64 = 64;

/// Feature flag: chunk ids are SHA-512/256 (else SHA-256).
pub const FLAG_SHA512_256: u64 = 0x2000_0000_0000_0000;
/// Feature flag: files marked nodump were left out.
pub const FLAG_EXCLUDE_NODUMP: u64 = 0x8000_0000_0000_0000;
/// Feature flag: `.caexclude` files were honoured.
pub const FLAG_EXCLUDE_FILE: u64 = 0x1000_0000_0000_0000;
/// Feature flag: submounts were left out.
pub const FLAG_EXCLUDE_SUBMOUNTS: u64 = 0x4000_0000_0000_0000;
/// The feature flags that say what an archive records of its files (`--with`); a blob's index has none of them.
pub const FLAGS_WITH_MASK: u64 = 0x1_ffff_ffff;

/// All feature flags that casync knows.
pub const KNOWN_FLAGS: u64 =
    FLAGS_WITH_MASK | FLAG_SHA512_256 | FLAG_EXCLUDE_NODUMP | FLAG_EXCLUDE_FILE | FLAG_EXCLUDE_SUBMOUNTS;

/// Bounds of the chunks of an index, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ChunkSizes {
    /// No chunk but the last is shorter.
    pub min: u64,
    /// What the cut rule aims at.
    pub avg: u64,
    /// No chunk is longer.
    pub max: u64,
}

impl Default for ChunkSizes {
    /// The default of casync and desync: 16 KiB, 64 KiB, 256 KiB.
    fn default() -> Self {
        Self { min: 16 << 10, avg: 64 << 10, max: 256 << 10 }
    }
}

impl ChunkSizes {
    /// Whether 1 <= min <= avg <= max <= 128 MiB, as casync demands of every index.
    pub fn are_valid(&self) -> bool {
        1 <= self.min && self.min <= self.avg && self.avg <= self.max && self.max <= MAX_CHUNK_BYTES
    }
}

/// What an index says about itself before its table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct IndexHeader {
    /// Feature flags; an archive's index has those of its entries.
    pub feature_flags: u64,
    /// Bounds of the chunks.
    pub sizes: ChunkSizes,
}

impl IndexHeader {
    /// The digest that makes the chunk ids (bit 61 of the feature flags).
    pub fn digest(&self) -> Digest {
        match self.feature_flags & FLAG_SHA512_256 {
            0 => Digest::Sha256,
            _ => Digest::Sha512_256,
        }
    }

    /// Whether the flags look like those of an archive. The container itself does not tell, so this comes after the
    /// file name's suffix and the first bytes of the content: an archive made `--without=all` has no such flag either.
    pub fn suggests_archive(&self) -> bool {
        self.feature_flags & FLAGS_WITH_MASK != 0
    }
}

/// One chunk of an index: the bytes `start..end` of the blob, with their id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Item {
    /// Offset of the first byte.
    pub start: u64,
    /// Offset behind the last byte.
    pub end: u64,
    /// Digest of the plain bytes.
    pub id: ChunkId,
}

impl Item {
    /// Length of the chunk in bytes, never 0 and never above the index's maximum.
    pub fn size_bytes(&self) -> u64 {
        self.end - self.start
    }
}

/// Why bytes are not a (sound) index.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IndexError {
    /// Shorter than the shortest index.
    #[error("the index is truncated: it has {has} bytes and needs at least {needs}")]
    Truncated {
        /// Bytes there are.
        has: u64,
        /// Bytes needed.
        needs: u64,
    },
    /// It is an archive.
    #[error("not an index: it begins like an archive (.catar)")]
    IsArchive,
    /// It is something else.
    #[error("not an index: its first bytes are {0}")]
    NotAnIndex(String),
    /// The header's flags have bits that neither casync nor we know.
    #[error("the index has unknown feature flags {unknown:#x} (of {flags:#x}): it was made by a newer program")]
    UnknownFlags {
        /// The bits nobody knows.
        unknown: u64,
        /// All flags.
        flags: u64,
    },
    /// The header's chunk sizes contradict each other or are beyond the limit.
    #[error(
        "the index is damaged: chunk sizes {min}:{avg}:{max} are not 1 <= min <= avg <= max <= {}",
        MAX_CHUNK_BYTES
    )]
    BadSizes {
        /// Minimum in the header.
        min: u64,
        /// Average in the header.
        avg: u64,
        /// Maximum in the header.
        max: u64,
    },
    /// The header of the table is wrong.
    #[error("the index is damaged: there is no chunk table at byte 48")]
    BadTable,
    /// The table does not end as it must.
    #[error("the index is truncated or damaged: its {has} bytes do not end with the tail of a chunk table")]
    BadTail {
        /// Bytes there are.
        has: u64,
    },
    /// The blob would be longer than that many chunks can be.
    #[error(
        "the index is damaged: it says that it has {size} bytes, and its {n_chunks} chunks have {max} each at the most"
    )]
    BadLength {
        /// Where the last item ends.
        size: u64,
        /// Items there are.
        n_chunks: u64,
        /// The header's maximum.
        max: u64,
    },
    /// An item does not follow its predecessor, or is too long.
    #[error(
        "the index is damaged at chunk {chunk}: it would span bytes {start} to {end} (at most {max} bytes allowed)"
    )]
    BadItem {
        /// Number of the item, from 0.
        chunk: u64,
        /// Where its predecessor ends.
        start: u64,
        /// Where it ends.
        end: u64,
        /// The header's maximum.
        max: u64,
    },
    /// There is no such item.
    #[error("the index has {n_chunks} chunks: there is no chunk {chunk}")]
    NoSuchItem {
        /// Number asked for, from 0.
        chunk: u64,
        /// Items there are.
        n_chunks: u64,
    },
}

/// What a file is, by its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// An index (of a blob or of an archive: the container does not tell, see [`IndexHeader::suggests_archive`]).
    Index,
    /// An archive (`.catar`).
    Archive,
    /// Neither.
    Other,
}

/// What a file or blob is by its first 16 bytes (fewer is [`Kind::Other`]).
pub fn kind_of(first_bytes: &[u8]) -> Kind {
    match (u64_at(first_bytes, 0), u64_at(first_bytes, 8)) {
        (Some(INDEX_OBJECT_BYTES), Some(INDEX_TYPE)) => Kind::Index,
        (Some(ENTRY_OBJECT_BYTES), Some(ENTRY_TYPE)) => Kind::Archive,
        _ => Kind::Other,
    }
}

/// The feature flags in the ENTRY that an archive begins with; `None` when these are not the first 24 bytes of one.
pub fn archive_flags(first_bytes: &[u8]) -> Option<u64> {
    match kind_of(first_bytes) {
        Kind::Archive => u64_at(first_bytes, 16),
        Kind::Index | Kind::Other => None,
    }
}

/// An index read where it lies.
#[derive(Clone)]
pub struct Index<B> {
    bytes: B,
    header: IndexHeader,
    n_chunks: usize,
}

impl<B: AsRef<[u8]>> Index<B> {
    /// Takes bytes as an index after looking at both ends: the work does not depend on the length. Items are checked
    /// when they are used, all of them by [`Index::check`].
    ///
    /// The checks are those of casync, but for flags that are known and not normalised.
    pub fn open(bytes: B) -> Result<Self, IndexError> {
        let all = bytes.as_ref();
        match kind_of(all) {
            Kind::Index => {}
            Kind::Archive => return Err(IndexError::IsArchive),
            Kind::Other if all.len() < 16 => return Err(truncated(all)),
            Kind::Other => return Err(IndexError::NotAnIndex(hex(&all[..16]))),
        }
        if all.len() < MIN_INDEX_BYTES {
            return Err(truncated(all));
        }
        let field = |offset: usize| u64_at(all, offset).unwrap_or(0);

        let header = IndexHeader {
            feature_flags: field(16),
            sizes: ChunkSizes { min: field(24), avg: field(32), max: field(40) },
        };
        let unknown = header.feature_flags & !KNOWN_FLAGS;
        if unknown != 0 {
            return Err(IndexError::UnknownFlags { unknown, flags: header.feature_flags });
        }
        let ChunkSizes { min, avg, max } = header.sizes;
        if !header.sizes.are_valid() {
            return Err(IndexError::BadSizes { min, avg, max });
        }
        if field(48) != u64::MAX || field(56) != TABLE_TYPE {
            return Err(IndexError::BadTable);
        }

        let table_bytes = all.len() - MIN_INDEX_BYTES;
        let tail = all.len() - ITEM_BYTES;
        let has_tail = all[tail..] == tail_for(all.len());
        if !table_bytes.is_multiple_of(ITEM_BYTES) || !has_tail {
            return Err(IndexError::BadTail { has: all.len() as u64 });
        }
        let index = Self { bytes, header, n_chunks: table_bytes / ITEM_BYTES };
        check_length(index.blob_size(), index.n_chunks as u64, max)?;
        Ok(index)
    }

    /// What the index says before its table.
    pub fn header(&self) -> &IndexHeader {
        &self.header
    }

    /// The digest that makes the chunk ids.
    pub fn digest(&self) -> Digest {
        self.header.digest()
    }

    /// Number of chunks.
    pub fn n_chunks(&self) -> usize {
        self.n_chunks
    }

    /// Length of the blob in bytes.
    pub fn blob_size(&self) -> u64 {
        self.end(self.n_chunks)
    }

    /// Chunk number `i`, checked: it begins where its predecessor ends, is not empty and not longer than the maximum.
    pub fn item(&self, i: usize) -> Result<Item, IndexError> {
        if i >= self.n_chunks {
            return Err(IndexError::NoSuchItem { chunk: i as u64, n_chunks: self.n_chunks as u64 });
        }
        let (start, end) = (self.end(i), self.end(i + 1));
        let max = self.header.sizes.max;
        if end <= start || end - start > max {
            return Err(IndexError::BadItem { chunk: i as u64, start, end, max });
        }
        let id_start = TABLE_START_BYTES + i * ITEM_BYTES + 8;
        let mut id = [0; CHUNK_ID_BYTES];
        id.copy_from_slice(&self.bytes.as_ref()[id_start..id_start + CHUNK_ID_BYTES]);
        Ok(Item { start, end, id: ChunkId(id) })
    }

    /// Number of the chunk that holds the byte at `offset`; `None` at and behind the end of the blob.
    ///
    /// In a table that is damaged on the way the search may end at a chunk that does not hold the byte: an error.
    pub fn locate(&self, offset: u64) -> Result<Option<usize>, IndexError> {
        if offset >= self.blob_size() {
            return Ok(None);
        }
        let (mut low, mut high) = (0, self.n_chunks - 1);
        while low < high {
            let middle = low + (high - low) / 2;
            match self.end(middle + 1) > offset {
                true => high = middle,
                false => low = middle + 1,
            }
        }
        let found = self.item(low)?;
        if offset < found.start || found.end <= offset {
            let max = self.header.sizes.max;
            return Err(IndexError::BadItem { chunk: low as u64, start: found.start, end: found.end, max });
        }
        Ok(Some(low))
    }

    /// All items in order, each checked.
    pub fn items(&self) -> impl ExactSizeIterator<Item = Result<Item, IndexError>> + '_ {
        (0..self.n_chunks).map(|i| self.item(i))
    }

    /// Checks every item: the work grows with the number of chunks.
    pub fn check(&self) -> Result<(), IndexError> {
        self.items().try_for_each(|item| item.map(drop))
    }

    /// What holds the bytes.
    pub fn source(&self) -> &B {
        &self.bytes
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.as_ref()
    }

    /// Where the first `n` chunks end together.
    fn end(&self, n: usize) -> u64 {
        match n {
            0 => 0,
            n => u64_at(self.bytes.as_ref(), TABLE_START_BYTES + (n - 1) * ITEM_BYTES).unwrap_or(0),
        }
    }
}

impl<B> std::fmt::Debug for Index<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Index").field("header", &self.header).field("n_chunks", &self.n_chunks).finish_non_exhaustive()
    }
}

/// Refuses a length that so many chunks cannot have: nobody else should have to reckon with lengths beyond all reason.
pub(super) fn check_length(size: u64, n_chunks: u64, max: u64) -> Result<(), IndexError> {
    // More than a u64 can hold is more than any length.
    match n_chunks.checked_mul(max).is_some_and(|most| size > most) {
        true => Err(IndexError::BadLength { size, n_chunks, max }),
        false => Ok(()),
    }
}

/// The bytes in front of the first item.
pub fn encode_header(header: &IndexHeader) -> [u8; TABLE_START_BYTES] {
    let ChunkSizes { min, avg, max } = header.sizes;
    let fields = [INDEX_OBJECT_BYTES, INDEX_TYPE, header.feature_flags, min, avg, max, u64::MAX, TABLE_TYPE];
    let mut bytes = [0; TABLE_START_BYTES];
    put_u64s(&mut bytes, &fields);
    bytes
}

/// The bytes of one item: where the chunk ends, and its id.
pub fn encode_item(end: u64, id: &ChunkId) -> [u8; ITEM_BYTES] {
    let mut bytes = [0; ITEM_BYTES];
    put_u64s(&mut bytes, &[end]);
    bytes[8..].copy_from_slice(&id.0);
    bytes
}

/// The bytes behind the last of `n_chunks` items.
pub fn encode_tail(n_chunks: usize) -> [u8; ITEM_BYTES] {
    tail_for(MIN_INDEX_BYTES + n_chunks * ITEM_BYTES)
}

/// A whole index file, from where each chunk ends and its id.
pub fn encode<'a>(header: &IndexHeader, items: impl IntoIterator<Item = (u64, &'a ChunkId)>) -> Vec<u8> {
    let items = items.into_iter();
    let mut bytes = Vec::with_capacity(MIN_INDEX_BYTES + items.size_hint().0 * ITEM_BYTES);
    bytes.extend_from_slice(&encode_header(header));
    for (end, id) in items {
        bytes.extend_from_slice(&encode_item(end, id));
    }
    let tail = tail_for(bytes.len() + ITEM_BYTES);
    bytes.extend_from_slice(&tail);
    bytes
}

/// The tail of an index file of so many bytes.
pub(super) fn tail_for(file_bytes: usize) -> [u8; ITEM_BYTES] {
    let table_bytes = file_bytes as u64 - INDEX_OBJECT_BYTES;
    let mut bytes = [0; ITEM_BYTES];
    put_u64s(&mut bytes, &[0, 0, INDEX_OBJECT_BYTES, table_bytes, TAIL_MARKER]);
    bytes
}

fn put_u64s(bytes: &mut [u8], fields: &[u64]) {
    for (place, field) in bytes.chunks_exact_mut(8).zip(fields) {
        place.copy_from_slice(&field.to_le_bytes());
    }
}

pub(super) fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    let field = bytes.get(offset..)?.first_chunk::<8>()?;
    Some(u64::from_le_bytes(*field))
}

fn truncated(bytes: &[u8]) -> IndexError {
    IndexError::Truncated { has: bytes.len() as u64, needs: MIN_INDEX_BYTES as u64 }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const HEADER: IndexHeader = IndexHeader {
        feature_flags: FLAG_SHA512_256 | FLAG_EXCLUDE_NODUMP,
        sizes: ChunkSizes { min: 10, avg: 20, max: 100 },
    };

    fn sample(ends: &[u64]) -> Vec<u8> {
        let ids: Vec<ChunkId> = (0..ends.len()).map(|i| ChunkId([i as u8; 32])).collect();
        encode(&HEADER, ends.iter().copied().zip(&ids))
    }

    #[test]
    fn what_is_written_is_read() {
        let ends = [50, 51, 151, 200];
        let bytes = sample(&ends);
        assert_eq!(bytes.len(), 104 + 4 * 40);
        let index = Index::open(&bytes).unwrap();
        assert_eq!((index.header(), index.n_chunks(), index.blob_size()), (&HEADER, 4, 200));
        assert_eq!(index.digest(), Digest::Sha512_256);
        assert_eq!(index.items().map(|item| item.unwrap().end).collect::<Vec<_>>(), ends);
        assert_eq!(index.item(2).unwrap(), Item { start: 51, end: 151, id: ChunkId([2; 32]) });
        index.check().unwrap();
        for offset in 0..200 {
            let i = index.locate(offset).unwrap().unwrap();
            let item = index.item(i).unwrap();
            assert!(item.start <= offset && offset < item.end, "offset {offset} in chunk {i}");
        }
        assert_eq!(index.locate(200), Ok(None));
        assert_eq!(index.locate(u64::MAX), Ok(None));
        assert!(index.item(4).is_err() && index.item(usize::MAX).is_err());

        let mut streamed = encode_header(&HEADER).to_vec();
        for (i, end) in ends.iter().enumerate() {
            streamed.extend_from_slice(&encode_item(*end, &ChunkId([i as u8; 32])));
        }
        streamed.extend_from_slice(&encode_tail(ends.len()));
        assert_eq!(streamed, bytes);
    }

    #[test]
    fn an_empty_blob_has_an_index_without_chunks() {
        let bytes = sample(&[]);
        assert_eq!(bytes.len(), 104);
        let index = Index::open(&bytes).unwrap();
        assert_eq!((index.n_chunks(), index.blob_size()), (0, 0));
        assert_eq!(index.locate(0), Ok(None));
        assert_eq!(index.items().len(), 0);
    }

    #[test]
    fn every_truncation_and_every_extra_byte_is_an_error() {
        let bytes = sample(&[50, 51, 151]);
        for len in 0..bytes.len() {
            assert!(Index::open(&bytes[..len]).is_err(), "{len} bytes");
        }
        for extra in 1..=80 {
            let mut longer = bytes.clone();
            longer.resize(bytes.len() + extra, 0);
            assert!(Index::open(&longer).is_err(), "{extra} bytes more");
        }
    }

    #[test]
    fn damage_is_named() {
        let with = |offset: usize, value: u64| {
            let mut bytes = sample(&[50, 51, 151]);
            bytes[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
            bytes
        };
        let open = |bytes: &[u8]| Index::open(bytes).map(drop).unwrap_err().to_string();
        assert!(open(&with(0, 49)).starts_with("not an index: its first bytes are 3100000000000000"));
        assert!(open(b"").contains("it has 0 bytes and needs at least 104"));
        assert!(open(&sample(&[])[..103]).contains("it has 103 bytes"));
        assert!(open(&with(16, 1 << 40)).contains("unknown feature flags 0x10000000000"));
        for (offset, value) in [(24, 0), (24, 21), (32, 101), (32, 9), (40, MAX_CHUNK_BYTES + 1), (40, 19)] {
            assert!(open(&with(offset, value)).contains("chunk sizes"), "{offset} {value}");
        }
        for (offset, value) in [(48, 5), (56, 5)] {
            assert!(open(&with(offset, value)).contains("no chunk table"));
        }
        // The last end: as long as its chunks can be, and longer.
        let last_end = 64 + 2 * 40;
        assert!(Index::open(with(last_end, 300)).is_ok());
        for size in [301, 1 << 40, (1 << 60) - 2, u64::MAX] {
            let wanted = format!("it says that it has {size} bytes, and its 3 chunks have 100 each at the most");
            assert!(open(&with(last_end, size)).contains(&wanted), "{size}");
        }
        let tail = sample(&[50, 51, 151]).len() - 40;
        for field in 0..5 {
            assert!(open(&with(tail + field * 8, 7)).contains("tail"), "{field}");
        }
        let mut archive = [0; 64];
        archive[..8].copy_from_slice(&64u64.to_le_bytes());
        archive[8..16].copy_from_slice(&ENTRY_TYPE.to_le_bytes());
        archive[16] = 0x22;
        assert_eq!(Index::open(archive).map(drop), Err(IndexError::IsArchive));
        assert_eq!((kind_of(&archive), archive_flags(&archive)), (Kind::Archive, Some(0x22)));
        assert_eq!(kind_of(&archive[..15]), Kind::Other);
        assert_eq!(archive_flags(&archive[..23]), None);
        assert_eq!((kind_of(&sample(&[])), archive_flags(&sample(&[]))), (Kind::Index, None));
    }

    #[test]
    fn damaged_items_are_errors_where_they_are_used() {
        // Not increasing, equal, and longer than the maximum.
        for ends in [[50, 40, 90], [50, 50, 90], [50, 160, 170]] {
            let bytes = sample(&ends);
            let index = Index::open(&bytes).unwrap();
            assert!(index.item(0).is_ok());
            assert!(matches!(index.item(1), Err(IndexError::BadItem { chunk: 1, .. })), "{ends:?}");
            assert!(index.check().is_err());
            // No search answers with a chunk that does not hold the byte.
            for offset in 0..index.blob_size() {
                if let Ok(Some(i)) = index.locate(offset) {
                    let item = index.item(i).unwrap();
                    assert!(item.start <= offset && offset < item.end);
                }
            }
        }
    }

    #[test]
    fn flags_suggest_what_is_described() {
        let blob = IndexHeader { feature_flags: 0xb000_0000_0000_0000, ..HEADER };
        let archive = IndexHeader { feature_flags: 0xb000_0001_ffef_fe26, ..HEADER };
        assert!(!blob.suggests_archive() && archive.suggests_archive());
        assert_eq!(IndexHeader { feature_flags: 0x8000_0000_0000_0000, ..HEADER }.digest(), Digest::Sha256);
    }
}
