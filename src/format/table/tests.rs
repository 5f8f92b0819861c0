//! What is written is read, and any bytes are read without a panic.

#![allow(clippy::unwrap_used)]

use super::*;
use proptest::prelude::*;

fn sum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(7, |sum, byte| (sum * 31 + u64::from(*byte)) & 0xffff_ffff_ffff)
}

fn tail() -> Tail {
    let kind = BindingKind::Plain { mtime_s: -5, mtime_nsec: 999 };
    let binding = Binding { archive_bytes: 1 << 41, kind, digest: [7; 32] };
    let content_bytes = 3 * BLOCK_BYTES as u64 + 1;
    Tail { binding, content_bytes, n_nodes: 5, n_directories: 2, n_late: 1, root_at: 8, refs_at: 4000 }
}

#[test]
fn a_tail_comes_back_and_a_changed_or_cut_one_does_not() {
    let file_bytes = 4000 + 4 * BlockRef::BYTES as u64 + TAIL_BYTES as u64;
    for kind in [tail().binding.kind, BindingKind::Index] {
        let tail = Tail { binding: Binding { kind, ..tail().binding }, ..tail() };
        let bytes = tail.to_bytes(sum);
        assert_eq!(Tail::parse(&bytes, file_bytes, sum), Ok(tail));
        assert!(Tail::parse(&bytes, file_bytes + 1, sum).is_err());
        for at in 0..TAIL_BYTES {
            let mut wrong = bytes;
            wrong[at] ^= 1;
            assert!(Tail::parse(&wrong, file_bytes, sum).is_err(), "byte {at}");
        }
    }
    for wrong in
        [Tail { root_at: u64::MAX, ..tail() }, Tail { n_directories: 6, ..tail() }, Tail { n_late: 6, ..tail() }]
    {
        assert!(Tail::parse(&wrong.to_bytes(sum), file_bytes, sum).is_err());
    }
    assert_eq!((tail().n_blocks(), tail().block_bytes(3), tail().block_bytes(u64::MAX)), (4, 1, 0));
}

#[test]
fn a_binding_covers_the_same_archive_only() {
    let (made, seconds) = (tail().binding, BindingKind::Plain { mtime_s: -5, mtime_nsec: 0 });
    assert!(made.covers(&made) && made.covers(&Binding { kind: seconds, ..made }));
    let others = [
        Binding { archive_bytes: 1, ..made },
        Binding { digest: [8; 32], ..made },
        Binding { kind: BindingKind::Index, ..made },
        Binding { kind: BindingKind::Plain { mtime_s: -5, mtime_nsec: 998 }, ..made },
        Binding { kind: BindingKind::Plain { mtime_s: -4, mtime_nsec: 999 }, ..made },
    ];
    assert!(others.iter().all(|other| !made.covers(other)));
}

proptest! {
    #[test]
    fn whatever_is_written_is_read(words in any::<[u64; 4]>(), smalls in any::<[u16; 3]>(), n in any::<[u32; 6]>()) {
        let place = |word: u64| word & ((1 << PLACE_BITS) - 1);
        let record = Record {
            entry_offset: words[0], mtime_ns: words[1] as i64, name_at: place(words[2]), name_bytes: smalls[0],
            extra_at: place(words[3]), mode: smalls[1], uid: n[0], gid: n[1], idx: n[2], n1: n[3], n2: words[0] ^ words[1],
        };
        prop_assert_eq!(Record::parse(&record.to_bytes()), record);
        let block = BlockRef { at: place(words[0]), n_bytes: smalls[2], checksum: words[1] };
        prop_assert_eq!(BlockRef::parse(&block.to_bytes()), block);
        let n_children = n[4] % (MAX_CHILDREN + 1);
        let children = Children {
            end: words[0], records_at: words[1], names_at: words[2], n_children, n_subdirectories: n[5] % (n_children + 1),
        };
        prop_assert_eq!(Children::parse(&children.to_bytes()), Ok(children));
        let name = NameRef { hash: n[0], child: n[1] };
        prop_assert_eq!(NameRef::parse(&name.to_bytes()), name);
    }

    #[test]
    fn extras_come_back_and_cut_ones_do_not(
        flags in any::<u32>(),
        xattrs in proptest::collection::vec((any::<Vec<u8>>(), any::<Vec<u8>>()), 0..5),
    ) {
        let extra = Extra { inode_flags: flags, xattrs };
        let bytes = extra.to_bytes();
        let (head, body) = bytes.split_first_chunk().unwrap();
        prop_assert_eq!(Extra::parse_head(head), Ok((flags, body.len())));
        let parsed = Extra::parse_body(body).unwrap();
        let parsed: Vec<_> = parsed.into_iter().map(|(name, value)| (name.to_vec(), value.to_vec())).collect();
        prop_assert_eq!(parsed, extra.xattrs.clone());
        if let Some((last, _)) = body.split_last_chunk::<1>() {
            prop_assert!(Extra::parse_body(last).map_or(0, |parsed| parsed.len()) < extra.xattrs.len());
        }
    }

    #[test]
    fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), TAIL_BYTES), n in any::<u64>()) {
        let tail: [u8; TAIL_BYTES] = bytes.clone().try_into().unwrap();
        let _ = Tail::parse(&tail, n, |_| n);
        let mut right = tail;
        right[..8].copy_from_slice(MAGIC);
        right[12..16].copy_from_slice(&(BLOCK_BYTES as u32).to_le_bytes());
        right[TAIL_BYTES - 8..].copy_from_slice(&n.to_le_bytes());
        if let Ok(tail) = Tail::parse(&right, n, |_| n) {
            prop_assert!(tail.content_bytes <= MAX_CONTENT_BYTES);
        }
        let record = Record::parse(bytes.first_chunk().unwrap());
        let written = record.to_bytes();
        prop_assert_eq!(written.as_slice(), &bytes[..Record::BYTES]);
        if let Ok(children) = Children::parse(bytes.first_chunk().unwrap()) {
            prop_assert!(children.n_children <= MAX_CHILDREN);
            let _ = (children.record_at(u32::MAX), children.name_ref_at(u32::MAX));
        }
        let _ = Extra::parse_body(&bytes);
    }
}
