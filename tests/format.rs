//! Archives as bytes: golden archives of the peers, round trips, and every way in which bytes can be wrong.
//!
//! `data/casync.catar` holds one node of every kind with every kind of metadata; `data/desync.catar` the same tree
//! without FIFO and socket as desync writes it; `data/desync-orphans.catar` with them.

use std::collections::BTreeMap;

use caifs::format::catar::flags::from_fs_flags;
use caifs::format::catar::node::{MODE_DIRECTORY, MODE_REGULAR};
use caifs::format::catar::{
    AclEntry, CatarError, Content, Decoder, DecoderOptions, DefaultAcl, ElementHeader, Encoder, Entry, Event,
    FeatureFlags, FilenameParse, GoodbyeTable, Kind, Node, NodeParse, Tail, name_hash, parse_filename, parse_node,
};
use proptest::prelude::*;

use crate::support::{blob::Xorshift, peers, run, scratch::Scratch};

const CASYNC: &[u8] = include_bytes!("data/casync.catar");
const DESYNC: &[u8] = include_bytes!("data/desync.catar");
const ORPHANS: &[u8] = include_bytes!("data/desync-orphans.catar");

/// What a decoder said, with payload in one piece.
#[derive(Debug, Clone, PartialEq)]
enum Seen {
    Node { name: Option<Vec<u8>>, entry_offset: u64, node: Box<Node> },
    Payload(Vec<u8>),
    End(u64),
    Orphan(Vec<u8>),
}

fn decode<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Result<Vec<Seen>, CatarError> {
    let mut decoder = Decoder::new(DecoderOptions::default());
    let mut seen = Vec::new();
    for mut input in pieces {
        while let Some(event) = decoder.next(&mut input)? {
            match (event, seen.last_mut()) {
                (Event::Payload(bytes), Some(Seen::Payload(before))) => before.extend_from_slice(bytes),
                (Event::Payload(bytes), _) => seen.push(Seen::Payload(bytes.to_vec())),
                (Event::NodeEnd { end }, _) => seen.push(Seen::End(end)),
                (Event::Orphan { name }, _) => seen.push(Seen::Orphan(name)),
                (Event::Node { name, entry_offset, node, .. }, _) => {
                    seen.push(Seen::Node { name, entry_offset, node });
                }
            }
        }
        assert!(input.is_empty(), "a decoder that asks for more has taken all");
    }
    decoder.finish().map(|()| seen)
}

/// Writes what was seen again.
fn encode(flags: FeatureFlags, seen: &[Seen]) -> Vec<u8> {
    let mut encoder = Encoder::new(flags);
    let mut open = Vec::new();
    for event in seen {
        match event {
            Seen::Node { name, node, .. } => {
                encoder.start_node(name.as_deref(), node).unwrap();
                open.push(node.is_directory());
            }
            Seen::Payload(bytes) => encoder.payload(bytes).unwrap(),
            Seen::Orphan(_) => panic!("nothing that we write has orphans"),
            Seen::End(_) => match open.pop() {
                Some(true) => encoder.end_directory().unwrap(),
                _ => assert_eq!(encoder.payload_left(), 0),
            },
        }
    }
    encoder.finish().unwrap();
    encoder.take()
}

/// Reads a tree from its end, with the smallest buffers, and collects what is found by path and ENTRY offset.
fn walk(archive: &[u8]) -> Result<BTreeMap<Vec<u8>, (u64, Node)>, CatarError> {
    let mut found = BTreeMap::new();
    walk_into(archive, b"", 0, archive.len() as u64, &mut found)?;
    Ok(found)
}

fn walk_into(
    archive: &[u8],
    path: &[u8],
    entry: u64,
    end: u64,
    found: &mut BTreeMap<Vec<u8>, (u64, Node)>,
) -> Result<(), CatarError> {
    let node = node_at(archive, entry, end)?;
    let is_directory = node.is_directory();
    found.insert(path.to_vec(), (entry, node));
    if !is_directory {
        return Ok(());
    }
    let tail = archive.get(..end as usize).and_then(|bytes| bytes.last_chunk()).ok_or(CatarError::Truncated("t"))?;
    let (goodbye_offset, entry_offset) = Tail::parse(tail)?.locate(end)?;
    if entry_offset != entry {
        return Err(CatarError::Goodbye("entry"));
    }
    let table = GoodbyeTable::parse(&archive[goodbye_offset as usize..end as usize], goodbye_offset, entry_offset)?;
    assert!(table.items().len() < 100_000);
    for item in table.into_items_by_offset() {
        let mut n = 16;
        let filename = loop {
            let from = item.filename_offset as usize;
            match parse_filename(&archive[from..archive.len().min(from + n)])? {
                FilenameParse::Filename(filename) => break filename,
                FilenameParse::Need(more) => {
                    if more as usize <= n || from + more as usize > archive.len() {
                        return Err(CatarError::Truncated("a name"));
                    }
                    n = more as usize;
                }
            }
        };
        let child = item.filename_offset + filename.element_bytes;
        let child_path = [path, b"/", &filename.name].concat();
        if child < item.end && found.len() < 100_000 && child > entry {
            walk_into(archive, &child_path, child, item.end, found)?;
        }
    }
    Ok(())
}

fn node_at(archive: &[u8], entry: u64, end: u64) -> Result<Node, CatarError> {
    let mut n = 0u64;
    loop {
        let from = entry as usize;
        let bytes = archive.get(from..archive.len().min(from + n as usize)).ok_or(CatarError::Truncated("node"))?;
        match parse_node(bytes, end - entry)? {
            NodeParse::Node(node) => return Ok(*node),
            NodeParse::Need(more) => {
                assert!(more > n && more <= end - entry, "asks for more, and for no more than there is");
                n = more;
            }
        }
    }
}

fn by_path(seen: &[Seen]) -> BTreeMap<Vec<u8>, (u64, Node)> {
    let mut path: Vec<Vec<u8>> = Vec::new();
    let mut found = BTreeMap::new();
    for event in seen {
        match event {
            Seen::Node { name, entry_offset, node } => {
                path.push(name.as_ref().map_or(Vec::new(), |name| [b"/", name.as_slice()].concat()));
                found.insert(path.concat(), (*entry_offset, (**node).clone()));
            }
            Seen::End(_) => _ = path.pop(),
            Seen::Payload(_) | Seen::Orphan(_) => {}
        }
    }
    found
}

/// The same without the offsets in contents, which only random access fills in.
fn without_offsets(mut nodes: BTreeMap<Vec<u8>, (u64, Node)>) -> BTreeMap<Vec<u8>, (u64, Node)> {
    for (_, node) in nodes.values_mut() {
        match &mut node.content {
            Content::Payload { offset, .. } => *offset = 0,
            Content::Directory { first_child } => *first_child = 0,
            _ => {}
        }
    }
    nodes
}

fn xattr(node: &Node, name: &str) -> Option<Vec<u8>> {
    let shown = node.shown_xattrs();
    assert!(shown.iter().filter(|(shown, _)| shown == name.as_bytes()).count() <= 1, "{name} is shown once");
    shown.into_iter().find(|(shown, _)| shown == name.as_bytes()).map(|(_, value)| value)
}

#[test]
fn an_archive_of_casync_is_read_in_every_detail() {
    let nodes = by_path(&decode([CASYNC]).unwrap());
    let names: Vec<_> = nodes.keys().map(|path| String::from_utf8_lossy(path).into_owned()).collect();
    let expected = ["", "/a.txt", "/empty", "/fifo", "/link", "/null", "/sock", "/sub", "/sub/empty", "/sub/forty"];
    assert_eq!(names, expected);
    let node = |path: &str| &nodes[path.as_bytes()].1;
    assert!(nodes.values().all(|(_, node)| node.entry.feature_flags == FeatureFlags::CASYNC_DEFAULT));
    let a = node("/a.txt");
    assert_eq!((a.entry.mode, a.entry.mtime_ns), (0o100664, 981_173_106_789_000_000));
    assert_eq!(a.entry.flags, from_fs_flags(0x80), "noatime");
    assert_eq!(a.content, Content::Payload { size: 5, offset: 0 });
    assert_eq!(a.acl.users, [AclEntry { id: 4242, name: None, permissions: 6 }]);
    assert_eq!(a.acl.groups, [AclEntry { id: 4, name: Some(b"adm".to_vec()), permissions: 4 }]);
    assert_eq!(a.acl.group_obj, Some(4));
    assert_eq!(xattr(a, "user.note").as_deref(), Some(&b"a value"[..]));
    assert_eq!(xattr(a, "user.empty").as_deref(), Some(&b""[..]));
    assert_eq!(xattr(a, "system.posix_acl_access").unwrap().len(), 4 + 6 * 8);
    assert_eq!(node("/empty").entry.mtime_ns, -315_619_199_876_543_211);
    assert_eq!(xattr(node("/empty"), "security.selinux").unwrap(), b"system_u:object_r:tmp_t:s0\0");
    assert_eq!(node("/link").content, Content::Symlink(b"a.txt".to_vec()));
    assert_eq!(node("/null").content, Content::Device { major: 1, minor: 3 });
    assert_eq!((&node("/fifo").content, &node("/sock").content), (&Content::None, &Content::None));
    let sub = node("/sub");
    assert_eq!(sub.acl.default, Some(DefaultAcl { user_obj: 7, group_obj: 5, other: 5, mask: Some(5) }));
    assert_eq!(xattr(sub, "system.posix_acl_default").unwrap().len(), 4 + 5 * 8);
    assert_eq!(xattr(sub, "user.z").unwrap(), [0, 255, 0]);
    let forty = node("/sub/forty");
    assert_eq!((forty.entry.uid, forty.user.as_deref()), (1, Some(&b"daemon"[..])));
    assert_eq!((forty.entry.gid, forty.group.as_deref()), (4, Some(&b"adm"[..])));
    assert_eq!(xattr(forty, "security.capability").unwrap().len(), 20);
}

#[test]
fn an_archive_of_desync_shows_the_same_attributes_without_its_terminators() {
    let ours = by_path(&decode([CASYNC]).unwrap());
    let theirs = by_path(&decode([DESYNC]).unwrap());
    assert_eq!(theirs.len(), ours.len() - 2, "all but FIFO and socket");
    for (path, (_, node)) in &theirs {
        let (mut expected, mut shown) = (ours[path].1.shown_xattrs(), node.shown_xattrs());
        expected.sort();
        shown.sort();
        // The label was set without NUL on this test's file system, and desync stores it as it was.
        expected.iter_mut().filter(|(name, _)| name == b"security.selinux").for_each(|(_, value)| _ = value.pop());
        assert_eq!(shown, expected, "{}", String::from_utf8_lossy(path));
        assert_eq!(node.entry.mtime_ns, ours[path].1.entry.mtime_ns);
    }
}

#[test]
fn names_without_a_node_are_skipped() {
    let seen = decode([ORPHANS]).unwrap();
    let orphans: Vec<_> = seen.iter().filter(|event| matches!(event, Seen::Orphan(_))).collect();
    assert_eq!(orphans, [&Seen::Orphan(b"fifo".to_vec()), &Seen::Orphan(b"sock".to_vec())]);
    let paths = |archive: &[u8]| walk(archive).unwrap().into_keys().collect::<Vec<_>>();
    assert_eq!(paths(ORPHANS), paths(DESYNC));
    assert_eq!(by_path(&seen).into_keys().collect::<Vec<_>>(), paths(DESYNC));
}

#[test]
fn a_stream_and_random_access_see_the_same_nodes() {
    for archive in [CASYNC, DESYNC, ORPHANS] {
        let walked = walk(archive).unwrap();
        for (offset, node) in walked.values() {
            if let Content::Payload { size: 5, offset: payload } = node.content {
                assert_eq!(&archive[*offset as usize + payload..][..5], b"hello");
            }
        }
        assert_eq!(without_offsets(walked), by_path(&decode([archive]).unwrap()));
    }
}

#[test]
fn what_casync_wrote_comes_out_again_byte_for_byte() {
    let seen = decode([CASYNC]).unwrap();
    assert_eq!(encode(FeatureFlags::CASYNC_DEFAULT, &seen), CASYNC);
}

#[test]
fn what_desync_wrote_comes_out_again_byte_for_byte() {
    assert_eq!(encode(FeatureFlags::DESYNC, &decode([DESYNC]).unwrap()), DESYNC);
}

#[test]
fn every_split_gives_the_same_events() {
    for archive in [CASYNC, DESYNC, ORPHANS] {
        let whole = decode([archive]);
        for at in 0..=archive.len() {
            let (front, back) = archive.split_at(at);
            assert_eq!(decode([front, back]), whole);
        }
        for size in [1, 2, 3, 7, 16, 17, 64] {
            assert_eq!(decode(archive.chunks(size)), whole);
        }
    }
}

#[test]
fn a_torn_archive_is_an_error_wherever_it_ends() {
    for archive in [CASYNC, DESYNC, ORPHANS] {
        for end in 0..archive.len() {
            assert!(decode([&archive[..end]]).is_err(), "{end}");
            assert!(walk(&archive[..end]).is_err(), "{end}");
        }
        assert!(decode([archive, b"\0"]).is_err(), "bytes behind the end");
    }
}

#[test]
fn flipped_bits_never_panic() {
    for archive in [CASYNC, ORPHANS] {
        let mut bytes = archive.to_vec();
        let mut n_refused = 0;
        for bit in 0..8 * bytes.len() {
            bytes[bit / 8] ^= 1 << (bit % 8);
            n_refused += usize::from(decode([bytes.as_slice()]).is_err());
            let _ = walk(&bytes);
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        assert!(n_refused > 4 * bytes.len(), "most of the bytes are structure: {n_refused}");
    }
}

#[test]
fn a_table_that_does_not_fit_its_directory_is_refused() {
    // The hash of one item of the root's table, then its size, then the distance to the ENTRY.
    let end = CASYNC.len();
    for position in [end - 24 - 8, end - 24 - 16, end - 24] {
        let mut bytes = CASYNC.to_vec();
        bytes[position] ^= 1;
        assert!(matches!(decode([bytes.as_slice()]), Err(CatarError::Goodbye(_))), "{position}");
    }
}

#[test]
fn flags_that_change_within_an_archive_are_refused() {
    let mut bytes = CASYNC.to_vec();
    let second = 64 + 16 + "a.txt".len() + 1 + 16;
    bytes[second] ^= 2;
    assert!(matches!(decode([bytes.as_slice()]), Err(CatarError::FlagsDiffer { .. })));
}

#[test]
fn nesting_is_bounded() {
    let entry = Entry { feature_flags: FeatureFlags(0), mode: MODE_DIRECTORY, flags: 0, uid: 0, gid: 0, mtime_ns: 0 };
    let node = Node::new(entry, Content::Directory { first_child: 0 });
    let mut encoder = Encoder::new(FeatureFlags::UNIX);
    encoder.start_node(None, &node).unwrap();
    (1..9).for_each(|_| encoder.start_node(Some(b"d"), &node).unwrap());
    (0..9).for_each(|_| encoder.end_directory().unwrap());
    let archive = encoder.take();
    let decode = |max_depth| {
        let mut decoder = Decoder::new(DecoderOptions { max_depth, ..DecoderOptions::default() });
        let mut input = archive.as_slice();
        while decoder.next(&mut input)?.is_some() {}
        decoder.finish()
    };
    assert_eq!((decode(9), decode(8)), (Ok(()), Err(CatarError::TooDeep(8))));
}

#[test]
fn a_single_file_of_desync_is_an_archive_too() {
    let entry = Entry {
        feature_flags: FeatureFlags::DESYNC,
        mode: MODE_REGULAR | 0o644,
        flags: 0,
        uid: 0,
        gid: 0,
        mtime_ns: 0,
    };
    let mut encoder = Encoder::new(FeatureFlags::DESYNC);
    encoder.start_node(None, &Node::new(entry, Content::Payload { size: 5, offset: 0 })).unwrap();
    let mut archive = encoder.take();
    archive.extend_from_slice(b"12345");
    encoder.advance(5).unwrap();
    encoder.finish().unwrap();
    assert_eq!(encoder.offset(), 85);
    let seen = decode([archive.as_slice()]).unwrap();
    assert_eq!(seen[1..], [Seen::Payload(b"12345".to_vec()), Seen::End(85)]);
    let node = node_at(&archive, 0, 85).unwrap();
    assert_eq!(node.content, Content::Payload { size: 5, offset: 80 });
    assert!(Tail::parse(archive.last_chunk().unwrap()).is_err(), "there is no table to find");
}

#[test]
fn the_encoder_refuses_what_readers_would() {
    let entry =
        Entry { feature_flags: FeatureFlags(0), mode: MODE_DIRECTORY | 0o755, flags: 0, uid: 0, gid: 0, mtime_ns: 0 };
    let directory = Node::new(entry, Content::Directory { first_child: 0 });
    let with = |change: &dyn Fn(&mut Node)| {
        let mut node = directory.clone();
        change(&mut node);
        let mut encoder = Encoder::new(FeatureFlags::CASYNC_DEFAULT);
        let result = encoder.start_node(None, &node);
        assert_eq!(encoder.offset() == 0, result.is_err(), "an error leaves nothing behind");
        result
    };
    assert!(with(&|_| {}).is_ok());
    assert!(with(&|node| node.entry.uid = 65535).is_err());
    assert!(with(&|node| node.entry.gid = u64::from(u32::MAX)).is_err());
    assert!(with(&|node| node.content = Content::None).is_err());
    assert!(with(&|node| node.xattrs = vec![(b"user.a".to_vec(), vec![0; 65537])]).is_err());
    assert!(with(&|node| node.xattrs = vec![(b"user.a".to_vec(), vec![]); 2]).is_err());
    assert!(with(&|node| node.selinux = Some(b"a\0b".to_vec())).is_err());

    let mut encoder = Encoder::new(FeatureFlags::CASYNC_DEFAULT);
    assert!(encoder.start_node(Some(b"root"), &directory).is_err(), "the root has no name");
    encoder.start_node(None, &directory).unwrap();
    assert!(encoder.start_node(None, &directory).is_err(), "only the root has none");
    encoder.start_node(Some(b"b"), &directory).unwrap();
    encoder.end_directory().unwrap();
    for name in [&b"b"[..], b"a", b"", b".", b"..", b"c/d", b"c\0d", &[b'x'; 256]] {
        assert!(encoder.start_node(Some(name), &directory).is_err(), "{name:?}");
    }
    let mut file = directory.clone();
    (file.entry.mode, file.content) = (MODE_REGULAR, Content::Payload { size: 3, offset: 0 });
    encoder.start_node(Some(b"c"), &file).unwrap();
    assert!(encoder.payload(b"1234").is_err(), "more than announced");
    encoder.payload(b"12").unwrap();
    assert!(encoder.end_directory().is_err(), "less than announced");
    assert!(encoder.advance(1).is_err(), "the buffer comes first");
    encoder.payload(b"3").unwrap();
    encoder.end_directory().unwrap();
    assert!(encoder.end_directory().is_err() && encoder.finish().is_ok());
}

#[test]
fn a_directory_of_a_thousand_has_the_table_that_casync_makes() {
    let Some(casync) = peers::peer("casync") else { return };
    let scratch = Scratch::new();
    let tree = scratch.dir("tree");
    let mut noise = Xorshift::default();
    for i in 0..1000 {
        std::fs::write(tree.join(format!("entry {i}")), noise.bytes(i % 7)).unwrap();
    }
    let path = scratch.join("x.catar");
    run::run(casync.command().arg("make").arg(&path).arg(&tree)).ok();
    let archive = std::fs::read(&path).unwrap();
    let seen = decode([archive.as_slice()]).unwrap();
    assert_eq!(seen.iter().filter(|event| matches!(event, Seen::Node { .. })).count(), 1001);
    assert!(encode(FeatureFlags::CASYNC_DEFAULT, &seen) == archive, "byte for byte");
    let (goodbye, entry) = Tail::parse(archive.last_chunk().unwrap()).unwrap().locate(archive.len() as u64).unwrap();
    let table = GoodbyeTable::parse(&archive[goodbye as usize..], goodbye, entry).unwrap();
    for i in 0..1000 {
        let name = format!("entry {i}");
        let item = table.candidates(name_hash(name.as_bytes())).next().unwrap();
        match parse_filename(&archive[item.filename_offset as usize..]).unwrap() {
            FilenameParse::Filename(filename) => assert_eq!(filename.name, name.as_bytes()),
            FilenameParse::Need(_) => panic!("the whole archive is there"),
        }
    }
    assert_eq!(table.candidates(name_hash(b"entry 1000")).count(), 0);
}

fn text(alphabet: &'static str) -> impl Strategy<Value = Vec<u8>> {
    proptest::string::bytes_regex(alphabet).unwrap()
}

fn acl_entries() -> impl Strategy<Value = Vec<AclEntry>> {
    let entry = (1u64..60_000, 0u64..8, proptest::option::of(text("[a-z_][a-z0-9_-]{0,20}")));
    let entry = entry.prop_map(|(id, permissions, name)| AclEntry { id, name, permissions });
    proptest::collection::btree_map(any::<u16>(), entry, 0..4).prop_map(|entries| {
        let mut entries: Vec<AclEntry> = entries.into_values().collect();
        // One entry for an id, as an ACL has it and as it therefore comes back.
        entries.sort();
        entries.dedup_by_key(|entry| entry.id);
        entries
    })
}

prop_compose! {
    /// Metadata in the form that the encoder writes, so that it comes back unchanged.
    fn metadata()(
        mode in 0u32..0o10000,
        flags in any::<u64>(),
        (uid, gid) in (0u64..65535, 0u64..65535),
        mtime_ns in any::<i64>().prop_filter("reserved", |ns| *ns != -1),
        names in (proptest::option::of(text("[A-Za-z_][A-Za-z0-9_-]{0,30}")), proptest::option::of(text("[a-z]{1,9}"))),
        xattrs in proptest::collection::btree_map(
            text("(user|trusted)\\.[a-z.]{0,20}[a-z]"), proptest::collection::vec(any::<u8>(), 0..40), 0..4),
        acl in (acl_entries(), acl_entries(), proptest::option::of(0u64..8)),
        default in proptest::option::of((0u64..8, 0u64..8, 0u64..8, proptest::option::of(0u64..8))),
        default_lists in (acl_entries(), acl_entries()),
        selinux in proptest::option::of(text("[a-z:]{1,30}")),
        fcaps in proptest::option::of(proptest::collection::vec(any::<u8>(), 1..24)),
        quota_projid in proptest::option::of(1u64..u64::from(u32::MAX)),
    ) -> Node {
        let feature_flags = FeatureFlags::CASYNC_DEFAULT;
        let flags = flags & (FeatureFlags::CHATTR.0 | FeatureFlags::FAT_ATTRS.0) & feature_flags.0;
        let mut node = Node::new(
            Entry { feature_flags, mode, flags, uid, gid, mtime_ns },
            Content::None,
        );
        node.user = names.0.filter(|_| uid != 0);
        node.group = names.1.filter(|_| gid != 0);
        node.xattrs = xattrs.into_iter().collect();
        (node.acl.users, node.acl.groups) = (acl.0, acl.1);
        let named = !node.acl.users.is_empty() || !node.acl.groups.is_empty();
        node.acl.group_obj = acl.2.or(named.then_some(5));
        node.acl.default = default.map(|(user_obj, group_obj, other, mask)| DefaultAcl { user_obj, group_obj, other, mask });
        if node.acl.default.is_some_and(|default| default.mask.is_some()) {
            (node.acl.default_users, node.acl.default_groups) = default_lists;
        }
        (node.selinux, node.fcaps, node.quota_projid) = (selinux, fcaps, quota_projid);
        node
    }
}

/// A node with the metadata that its type of file can have.
fn shaped(mut node: Node, file_type: u32, content: Content) -> Node {
    node.entry.mode |= file_type;
    let plain = matches!(content, Content::Payload { .. } | Content::Directory { .. });
    if !plain {
        (node.entry.flags, node.quota_projid, node.xattrs) = (0, None, Vec::new());
    }
    if !matches!(content, Content::Payload { .. }) {
        node.fcaps = None;
    }
    if !matches!(content, Content::Directory { .. }) {
        node.acl.default = None;
        (node.acl.default_users, node.acl.default_groups) = (Vec::new(), Vec::new());
    }
    if matches!(content, Content::Symlink(_)) {
        node.entry.mode = file_type | 0o777;
        node.acl = Default::default();
    }
    node.content = content;
    node
}

#[derive(Debug, Clone)]
enum Tree {
    Leaf(Node, Vec<u8>),
    Directory(Node, BTreeMap<Vec<u8>, Tree>),
}

fn tree() -> impl Strategy<Value = Tree> {
    let leaf = prop_oneof![
        (metadata(), proptest::collection::vec(any::<u8>(), 0..200)).prop_map(|(node, payload)| {
            let content = Content::Payload { size: payload.len() as u64, offset: 0 };
            Tree::Leaf(shaped(node, 0o100000, content), payload)
        }),
        (metadata(), text("[^\0]{1,30}"))
            .prop_map(|(node, target)| Tree::Leaf(shaped(node, 0o120000, Content::Symlink(target)), Vec::new())),
        (metadata(), 0u64..4096, 0u64..1 << 20, any::<bool>()).prop_map(|(node, major, minor, block)| {
            let file_type = if block { 0o060000 } else { 0o020000 };
            Tree::Leaf(shaped(node, file_type, Content::Device { major, minor }), Vec::new())
        }),
        (metadata(), any::<bool>()).prop_map(|(node, socket)| {
            let file_type = if socket { 0o140000 } else { 0o010000 };
            Tree::Leaf(shaped(node, file_type, Content::None), Vec::new())
        }),
    ];
    let directory = |children: proptest::strategy::BoxedStrategy<Tree>| {
        let name = text("[^\0/.][^\0/]{0,20}");
        (metadata(), proptest::collection::btree_map(name, children, 0..6)).prop_map(|(node, children)| {
            Tree::Directory(shaped(node, 0o040000, Content::Directory { first_child: 0 }), children)
        })
    };
    let inner = leaf.prop_recursive(3, 24, 6, move |inner| directory(inner.boxed()));
    directory(inner.boxed())
}

fn write_tree(encoder: &mut Encoder, name: Option<&[u8]>, tree: &Tree, nodes: &mut Vec<Node>) {
    let (Tree::Leaf(node, _) | Tree::Directory(node, _)) = tree;
    encoder.start_node(name, node).unwrap();
    nodes.push(node.clone());
    match tree {
        Tree::Leaf(_, payload) => payload.chunks(64).for_each(|piece| encoder.payload(piece).unwrap()),
        Tree::Directory(_, children) => {
            children.iter().for_each(|(name, child)| write_tree(encoder, Some(name), child, nodes));
            encoder.end_directory().unwrap();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn what_is_written_is_read_again(tree in tree(), split in 1usize..300) {
        let mut encoder = Encoder::new(FeatureFlags::CASYNC_DEFAULT);
        let mut nodes = Vec::new();
        write_tree(&mut encoder, None, &tree, &mut nodes);
        encoder.finish().unwrap();
        let archive = encoder.take();
        let seen = decode(archive.chunks(split)).unwrap();
        let read: Vec<Node> = seen
            .iter()
            .filter_map(|event| match event {
                Seen::Node { node, .. } => Some((**node).clone()),
                _ => None,
            })
            .collect();
        prop_assert_eq!(&read, &nodes);
        prop_assert_eq!(without_offsets(walk(&archive).unwrap()), by_path(&seen));
        prop_assert!(encode(FeatureFlags::CASYNC_DEFAULT, &seen) == archive);
    }

    #[test]
    fn bytes_at_random_never_panic(changes in proptest::collection::vec((0..CASYNC.len(), any::<u8>()), 1..20)) {
        let mut bytes = CASYNC.to_vec();
        changes.iter().for_each(|(position, byte)| bytes[*position] = *byte);
        let _ = decode([bytes.as_slice()]);
        let _ = walk(&bytes);
    }
}

#[test]
fn headers_that_announce_too_much_take_no_memory() {
    let header = |size: u64, kind: Kind| ElementHeader { size, kind }.to_bytes().to_vec();
    let root = &CASYNC[..64];
    // A table larger than the children seen warrant, and a payload larger than what follows.
    let goodbye = [root, &header(40 + 24 * (1 << 40), Kind::Goodbye)].concat();
    assert!(matches!(decode([goodbye.as_slice()]), Err(CatarError::Goodbye(_))));
    let mut file = root.to_vec();
    file[24..32].copy_from_slice(&u64::from(MODE_REGULAR | 0o644).to_le_bytes());
    file.extend(header(u64::MAX - 1, Kind::Payload));
    assert_eq!(decode([file.as_slice()]), Err(CatarError::Truncated("a node")));
    assert!(parse_node(&file, file.len() as u64).is_err());
}
