//! Frames as casync sends them, every frame cut at every byte, and frames that are none.

use super::*;
use proptest::prelude::*;

fn id(byte: u8) -> ChunkId {
    ChunkId([byte; CHUNK_ID_BYTES])
}

fn encoded(frame: &Frame) -> Vec<u8> {
    let mut out = BytesMut::new();
    frame.encode(&mut out).unwrap();
    assert_eq!(out.len() as u64, frame.size_bytes(), "{frame:?}");
    out.to_vec()
}

fn decoded(bytes: &[u8]) -> Result<Vec<Frame>, FrameError> {
    let mut decoder = Decoder::default();
    decoder.feed(bytes);
    let mut frames = Vec::new();
    while let Some(frame) = decoder.next_frame()? {
        frames.push(frame);
    }
    decoder.finish()?;
    Ok(frames)
}

/// A frame from its words.
fn words(words: &[u64], more: &[u8]) -> Vec<u8> {
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.extend_from_slice(more);
    bytes
}

fn samples() -> Vec<Frame> {
    let data = Bytes::from_static(b"data");
    vec![
        Frame::Hello(Features::PULL_CHUNKS),
        Frame::Hello(Features::new(0x1fff).unwrap()),
        Frame::Index(data.clone()),
        Frame::IndexEof,
        Frame::Archive(data.clone()),
        Frame::ArchiveEof,
        Frame::Request { is_urgent: true, ids: vec![id(1)] },
        Frame::Request { is_urgent: false, ids: (0..100).map(id).collect() },
        Frame::Chunk { is_compressed: true, id: id(2), data: data.clone() },
        Frame::Chunk { is_compressed: false, id: id(3), data: Bytes::from_static(b"x") },
        Frame::Missing(id(4)),
        Frame::Goodbye,
        Frame::Abort { errno: 5, reason: "Input/output error: größer".to_owned() },
        Frame::Abort { errno: 0, reason: String::new() },
    ]
}

#[test]
fn frames_are_those_of_casync() {
    let hello = Frame::Hello(Features::PULL_CHUNKS.with(Features::PULL_INDEX));
    assert_eq!(encoded(&hello), words(&[24, HELLO, 0xc0], b""));
    let request = Frame::Request { is_urgent: true, ids: vec![id(7), id(8)] };
    assert_eq!(encoded(&request), words(&[24 + 64, REQUEST, 1], &[[7; 32], [8; 32]].concat()));
    let chunk = Frame::Chunk { is_compressed: true, id: id(9), data: Bytes::from_static(b"zstd") };
    assert_eq!(encoded(&chunk), words(&[60, CHUNK, 1], &[&[9; 32][..], b"zstd"].concat()));
    assert_eq!(encoded(&Frame::Missing(id(1))), words(&[48, MISSING], &[1; 32]));
    assert_eq!(encoded(&Frame::Goodbye), words(&[16, GOODBYE], b""));
    let abort = Frame::Abort { errno: 2, reason: "no\nsuch".to_owned() };
    assert_eq!(encoded(&abort), words(&[24 + 8, ABORT, 2], b"no such\0"));
}

#[test]
fn every_frame_comes_back_whole_and_not_before_its_last_byte() {
    let frames = samples();
    let all: Vec<u8> = frames.iter().flat_map(encoded).collect();
    assert_eq!(decoded(&all), Ok(frames.clone()));
    for frame in &frames {
        let bytes = encoded(frame);
        for len in 0..bytes.len() {
            let mut decoder = Decoder::default();
            decoder.feed(&bytes[..len]);
            assert_eq!(decoder.next_frame(), Ok(None), "{} bytes of {frame:?}", len);
            match len {
                0 => assert_eq!(decoder.finish(), Ok(())),
                n => assert_eq!(decoder.finish(), Err(FrameError::Truncated(n as u64))),
            }
            decoder.feed(&bytes[len..]);
            assert_eq!(decoder.next_frame().as_ref(), Ok(&Some(frame.clone())));
            assert_eq!(decoder.finish(), Ok(()));
        }
    }
}

#[test]
fn the_longest_frames_pass_and_longer_ones_are_refused_by_their_header() {
    let longest = Frame::Chunk { is_compressed: false, id: id(1), data: vec![1; MAX_CHUNK_DATA_BYTES].into() };
    assert_eq!(longest.size_bytes(), MAX_FRAME_BYTES);
    let mut decoder = Decoder::default();
    decoder.feed(&encoded(&longest));
    assert_eq!(decoder.next_frame(), Ok(Some(longest)));
    assert!(decoder.buffer.capacity() <= KEPT_BUFFER_BYTES, "the long buffer is given back");

    let mut out = BytesMut::new();
    let longer = Frame::Chunk { is_compressed: false, id: id(1), data: vec![1; MAX_CHUNK_DATA_BYTES + 1].into() };
    let refused = Err(FrameError::Size { name: "CHUNK", size: MAX_FRAME_BYTES + 1 });
    assert_eq!(longer.encode(&mut out), refused);
    assert!(out.is_empty());
    assert_eq!(decoded(&words(&[MAX_FRAME_BYTES + 1, CHUNK], b"")), refused.map(|()| Vec::new()));
}

#[test]
fn malformed_frames_are_errors() {
    let size = |name, size| FrameError::Size { name, size };
    let cases = [
        (words(&[16, 0], b""), FrameError::UnknownType(0)),
        (
            b"HTTP/1.1 400 Bad Request".to_vec(),
            FrameError::UnknownType(u64::from_le_bytes(*b" 400 Bad".as_ref().first_chunk().unwrap())),
        ),
        (words(&[0, GOODBYE], b""), size("GOODBYE", 0)),
        (words(&[15, GOODBYE], b""), size("GOODBYE", 15)),
        (words(&[17, GOODBYE], b"x"), size("GOODBYE", 17)),
        (words(&[u64::MAX, INDEX], b""), size("INDEX", u64::MAX)),
        (words(&[16, INDEX], b""), size("INDEX", 16)),
        (words(&[16, ARCHIVE], b""), size("ARCHIVE", 16)),
        (words(&[16, HELLO], b""), size("HELLO", 16)),
        (words(&[32, HELLO, 1, 1], b""), size("HELLO", 32)),
        (words(&[24, HELLO, 0], b""), FrameError::Features(0)),
        (words(&[24, HELLO, 0x2000], b""), FrameError::Features(0x2000)),
        (words(&[24, HELLO, u64::MAX], b""), FrameError::Features(u64::MAX)),
        (words(&[24, HELLO, 0xa00], b""), FrameError::Features(0xa00)),
        (words(&[24, REQUEST, 1], b""), size("REQUEST", 24)),
        (words(&[57, REQUEST, 1], &[0; 33]), size("REQUEST", 57)),
        (words(&[56, REQUEST, 2], &[0; 32]), FrameError::Flags { name: "REQUEST", flags: 2 }),
        (words(&[56, CHUNK, 1], &[0; 32]), size("CHUNK", 56)),
        (words(&[57, CHUNK, 3], &[0; 33]), FrameError::Flags { name: "CHUNK", flags: 3 }),
        (words(&[47, MISSING], &[0; 31]), size("MISSING", 47)),
        (words(&[24, ABORT, 1], b""), size("ABORT", 24)),
        (words(&[25, ABORT, MAX_ERRNO], b"\0"), FrameError::Errno(MAX_ERRNO)),
        (words(&[25, ABORT, 1], b"x"), FrameError::Reason),
        (words(&[27, ABORT, 1], b"a\n\0"), FrameError::Reason),
        (words(&[27, ABORT, 1], b"a\0\0"), FrameError::Reason),
    ];
    for (bytes, wanted) in cases {
        assert_eq!(decoded(&bytes), Err(wanted), "{bytes:x?}");
    }
    for frame in [
        Frame::Index(Bytes::new()),
        Frame::Request { is_urgent: false, ids: Vec::new() },
        Frame::Chunk { is_compressed: true, id: id(0), data: Bytes::new() },
        Frame::Abort { errno: u32::MAX, reason: String::new() },
    ] {
        assert!(frame.encode(&mut BytesMut::new()).is_err(), "{frame:?}");
    }
    let long = Frame::Abort { errno: 1, reason: "ü".repeat(5000) };
    assert_eq!(encoded(&long).len(), 24 + MAX_REASON_BYTES + 1);
}

#[test]
fn both_sides_must_fit() {
    let features = |bits| Features::new(bits).unwrap();
    // What casync's and desync's clients and servers say to each other.
    for (client, server) in [(0x40, 0x1), (0xc0, 0x5), (0x100, 0x10), (0xe00, 0xa), (0x1000, 0x20)] {
        assert_eq!(check_session(features(client), features(server)), Ok(()));
        assert_eq!(check_session(features(server), features(client)), Ok(()));
    }
    assert_eq!(check_session(features(0x5), features(0x1)), Err(FrameError::NoWish));
    let refused = check_session(features(0xc0), features(0x1));
    assert_eq!(refused, Err(FrameError::NotOffered { wish: 0x80, offers: 0x1 }));
    assert!(features(0xe00).has(Features::PUSH_INDEX_CHUNKS) && !features(0x600).has(Features::PUSH_INDEX_CHUNKS));
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = decoded(&bytes);
    }

    #[test]
    fn no_change_of_a_frame_makes_it_panic(which in 0usize..14, at in any::<usize>(), byte in any::<u8>()) {
        let mut bytes = encoded(&samples()[which]);
        let at = at % bytes.len();
        bytes[at] = byte;
        for frame in decoded(&bytes).into_iter().flatten() {
            prop_assert_eq!(encoded(&frame).len() as u64, frame.size_bytes());
        }
    }

    #[test]
    fn a_stream_gives_the_same_frames_however_it_is_cut(cuts in proptest::collection::vec(1usize..300, 1..50)) {
        let frames = samples();
        let all: Vec<u8> = frames.iter().flat_map(encoded).collect();
        let (mut decoder, mut found, mut rest) = (Decoder::default(), Vec::new(), &all[..]);
        for cut in cuts.iter().cycle() {
            let (now, later) = rest.split_at((*cut).min(rest.len()));
            decoder.feed(now);
            while let Some(frame) = decoder.next_frame().unwrap() {
                found.push(frame);
            }
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
        prop_assert_eq!(found, frames);
    }
}
