//! The forms chunks are stored in: plain bytes to zstd, and zstd, xz, gzip or plain back to plain bytes.
//!
//! * [`decode`] knows from the index how many bytes must come out; [`decode_unknown_size`] knows a limit only.
//! * [`encode`] writes zstd with the content size in the frame, which casync and desync both read.
//!
//! All three compressions have the same file name, so the first bytes tell which it is (formats.md 3.1). A stored chunk is
//! exactly one stream: trailing bytes, a second stream and empty input are errors. The one thing that may follow a zstd frame is
//! its seal ([`super::seal`]), so that a disk cache can be used as a store. zstd contexts are kept by thread.
//!
//! Invariant: whatever the input, what is allocated is bounded by the expected size or the limit, and by 128 MiB.

use std::cell::RefCell;
use std::io::Read;

use bytes::Bytes;
use zstd::zstd_safe;

use super::{MAX_CHUNK_BYTES, seal};

/// zstd's level when none is given: that of casync.
pub const DEFAULT_LEVEL: i32 = 3;

/// What an xz stream may ask for its dictionary, in bytes; the highest preset needs 65 MiB.
const MAX_XZ_MEMORY_BYTES: u64 = 128 << 20;

/// The first output buffer for a chunk of unknown size, in bytes: the largest chunk on default settings.
const FIRST_GUESS_BYTES: u64 = 256 << 10;

const ZSTD_MAGIC: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
const XZ_MAGIC: &[u8] = &[0xfd, 0x37, 0x7a, 0x58, 0x5a, 0x00];
const GZIP_MAGIC: &[u8] = &[0x1f, 0x8b];

/// How the bytes of a stored chunk relate to its plain bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Form {
    /// One zstd, xz or gzip stream, told apart by its first bytes (a `.cacnk` file).
    Compressed,
    /// The plain bytes themselves (a chunk file without extension).
    Plain,
}

/// Why stored bytes give no plain bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// There is nothing.
    #[error("the stored chunk is empty")]
    Empty,
    /// The stored form is beyond what a chunk can be.
    #[error("the stored chunk has {0} bytes, more than the {max} allowed", max = MAX_CHUNK_BYTES)]
    TooLong(u64),
    /// The first bytes are of no known compression.
    #[error("the stored chunk is neither zstd, xz nor gzip: its first bytes are {0}")]
    UnknownMagic(String),
    /// The stream is damaged.
    #[error("the {compression} stream is damaged: {reason}")]
    Damaged {
        /// Which compression.
        compression: &'static str,
        /// The decoder's words.
        reason: String,
    },
    /// There is more behind the stream.
    #[error("{n_bytes} bytes follow the {compression} stream")]
    Trailing {
        /// Which compression.
        compression: &'static str,
        /// How many bytes.
        n_bytes: u64,
    },
    /// What comes out is not as long as the index says.
    #[error("the chunk's content is {found} bytes long, expected {expected}")]
    WrongSize {
        /// Bytes that come out, as far as it is known.
        found: FoundBytes,
        /// Bytes expected.
        expected: u64,
    },
    /// What comes out is longer than allowed.
    #[error("the chunk's content is longer than the {limit} bytes allowed")]
    AboveLimit {
        /// Bytes allowed.
        limit: u64,
    },
}

/// How long content is, when decoding stops at a bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FoundBytes {
    /// So many bytes.
    Exactly(u64),
    /// More than so many bytes.
    MoreThan(u64),
}

impl std::fmt::Display for FoundBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exactly(n) => write!(f, "{n}"),
            Self::MoreThan(n) => write!(f, "more than {n}"),
        }
    }
}

thread_local! {
    static DECODER: RefCell<zstd_safe::DCtx<'static>> = RefCell::new(zstd_safe::DCtx::create());
    static ENCODER: RefCell<zstd_safe::CCtx<'static>> = RefCell::new(zstd_safe::CCtx::create());
    /// Keeps its settings from call to call, which `ENCODER` is given with every call.
    static CHECKED_ENCODER: RefCell<zstd_safe::CCtx<'static>> = RefCell::new(zstd_safe::CCtx::create());
}

/// The plain bytes of a stored chunk that must be `expected_bytes` long. Plain bytes are handed on, not copied.
pub fn decode(form: Form, stored: &Bytes, expected_bytes: u64) -> Result<Bytes, CodecError> {
    check_stored(stored)?;
    let wrong_size = |found| Err(CodecError::WrongSize { found, expected: expected_bytes });
    if expected_bytes > MAX_CHUNK_BYTES {
        return Err(CodecError::AboveLimit { limit: MAX_CHUNK_BYTES });
    }
    if form == Form::Plain {
        return match stored.len() as u64 == expected_bytes {
            true => Ok(stored.clone()),
            false => wrong_size(FoundBytes::Exactly(stored.len() as u64)),
        };
    }
    let plain = match Compression::of(stored)? {
        Compression::Zstd => {
            let (frame, said) = zstd_frame(stored)?;
            if said.is_some_and(|said| said != expected_bytes) {
                return wrong_size(FoundBytes::Exactly(said.unwrap_or_default()));
            }
            zstd_into(frame, expected_bytes)?
        }
        Compression::Xz => xz(stored, expected_bytes, expected_bytes)?,
        Compression::Gzip => gzip(stored, expected_bytes, expected_bytes)?,
    };
    match plain {
        None => wrong_size(FoundBytes::MoreThan(expected_bytes)),
        Some(plain) if plain.len() as u64 != expected_bytes => wrong_size(FoundBytes::Exactly(plain.len() as u64)),
        Some(plain) => Ok(plain.into()),
    }
}

/// The plain bytes of a stored chunk of unknown size, which must be 1 to `limit` bytes (and 128 MiB at the most).
pub fn decode_unknown_size(form: Form, stored: &Bytes, limit: u64) -> Result<Bytes, CodecError> {
    check_stored(stored)?;
    let limit = limit.min(MAX_CHUNK_BYTES);
    if form == Form::Plain {
        return match stored.len() as u64 <= limit {
            true => Ok(stored.clone()),
            false => Err(CodecError::AboveLimit { limit }),
        };
    }
    let plain = match Compression::of(stored)? {
        Compression::Zstd => zstd_up_to(stored, limit)?,
        Compression::Xz => xz(stored, limit, FIRST_GUESS_BYTES)?,
        Compression::Gzip => gzip(stored, limit, FIRST_GUESS_BYTES)?,
    };
    match plain {
        None => Err(CodecError::AboveLimit { limit }),
        Some(plain) if plain.is_empty() => Err(CodecError::Empty),
        Some(plain) => Ok(plain.into()),
    }
}

/// One zstd frame of the plain bytes, with its content size in the header. Levels out of zstd's range are brought into it.
pub fn encode(plain: &[u8], level: i32) -> Vec<u8> {
    let mut stored = Vec::with_capacity(zstd_safe::compress_bound(plain.len()));
    let done = ENCODER.with_borrow_mut(|encoder| encoder.compress(&mut stored, plain, in_range(level)));
    // The buffer has the size that zstd asks for, so only a lack of memory could be left, and that ends the program anyway.
    done.expect("zstd compresses into a buffer of the size it asked for");
    stored
}

/// [`encode`] with a checksum of the content at the frame's end (the low half of its XXH64).
pub(crate) fn encode_checked(plain: &[u8], level: i32) -> Vec<u8> {
    use zstd_safe::CParameter::{ChecksumFlag, CompressionLevel};
    let mut stored = Vec::with_capacity(zstd_safe::compress_bound(plain.len()));
    let done = CHECKED_ENCODER.with_borrow_mut(|encoder| {
        encoder.set_parameter(CompressionLevel(in_range(level)))?;
        encoder.set_parameter(ChecksumFlag(true))?;
        encoder.compress2(&mut stored, plain)
    });
    done.expect("zstd compresses into a buffer of the size it asked for, on settings in range");
    stored
}

/// Whether a stored form is exactly one zstd frame, with nothing behind it.
pub(crate) fn is_zstd_frame(stored: &[u8]) -> bool {
    stored.starts_with(ZSTD_MAGIC) && zstd_safe::find_frame_compressed_size(stored) == Ok(stored.len())
}

/// The content of exactly one undamaged zstd frame, if that is at most `max_bytes` long.
pub(super) fn decode_checked(frame: &[u8], max_bytes: u64) -> Option<Vec<u8>> {
    let max_bytes = max_bytes.min(MAX_CHUNK_BYTES);
    let said = zstd_safe::get_frame_content_size(frame).ok()?;
    if !is_zstd_frame(frame) || said.is_some_and(|said| said > max_bytes) {
        return None;
    }
    let plain = zstd_into(frame, said.unwrap_or(max_bytes)).ok()??;
    said.is_none_or(|said| plain.len() as u64 == said).then_some(plain)
}

fn in_range(level: i32) -> i32 {
    let levels = zstd::compression_level_range();
    level.clamp(*levels.start(), *levels.end())
}

#[derive(Debug, Clone, Copy)]
enum Compression {
    Zstd,
    Xz,
    Gzip,
}

impl Compression {
    fn of(stored: &[u8]) -> Result<Self, CodecError> {
        match stored {
            _ if stored.starts_with(ZSTD_MAGIC) => Ok(Self::Zstd),
            _ if stored.starts_with(XZ_MAGIC) => Ok(Self::Xz),
            _ if stored.starts_with(GZIP_MAGIC) => Ok(Self::Gzip),
            _ => {
                let first = stored.iter().take(XZ_MAGIC.len()).map(|byte| format!("{byte:02x}")).collect();
                Err(CodecError::UnknownMagic(first))
            }
        }
    }
}

fn check_stored(stored: &[u8]) -> Result<(), CodecError> {
    match stored.len() as u64 {
        0 => Err(CodecError::Empty),
        n if n > MAX_CHUNK_BYTES => Err(CodecError::TooLong(n)),
        _ => Ok(()),
    }
}

fn damaged_zstd(code: zstd_safe::ErrorCode) -> CodecError {
    CodecError::Damaged { compression: "zstd", reason: zstd_safe::get_error_name(code).to_owned() }
}

/// The one frame there must be, alone or with its seal, and the content size it says, if it says one.
fn zstd_frame(stored: &[u8]) -> Result<(&[u8], Option<u64>), CodecError> {
    let frame_bytes = zstd_safe::find_frame_compressed_size(stored).map_err(damaged_zstd)?;
    let (frame, rest) = stored.split_at(frame_bytes);
    if !rest.is_empty() && !seal::is_seal_of(frame, rest) {
        return Err(CodecError::Trailing { compression: "zstd", n_bytes: rest.len() as u64 });
    }
    let said = zstd_safe::get_frame_content_size(frame)
        .map_err(|_| CodecError::Damaged { compression: "zstd", reason: "unreadable frame header".to_owned() })?;
    Ok((frame, said))
}

/// Decodes one frame into a buffer of exactly `buffer_bytes`; `None` when that is too small.
fn zstd_into(stored: &[u8], buffer_bytes: u64) -> Result<Option<Vec<u8>>, CodecError> {
    let mut plain = Vec::with_capacity(buffer_bytes as usize);
    match DECODER.with_borrow_mut(|decoder| decoder.decompress(&mut plain, stored)) {
        Ok(_) => Ok(Some(plain)),
        Err(code) if is_too_small(code) => Ok(None),
        Err(code) => Err(damaged_zstd(code)),
    }
}

fn is_too_small(code: zstd_safe::ErrorCode) -> bool {
    zstd_safe::is_error_kind(code, zstd_safe::zstd_sys::ZSTD_ErrorCode::ZSTD_error_dstSize_tooSmall)
}

/// Decodes one frame of at most `limit` bytes. casync's frames do not say their size: the buffer grows until it fits.
fn zstd_up_to(stored: &[u8], limit: u64) -> Result<Option<Vec<u8>>, CodecError> {
    let (frame, said) = zstd_frame(stored)?;
    if let Some(said) = said {
        return match said <= limit {
            true => zstd_into(frame, said),
            false => Ok(None),
        };
    }
    let mut buffer_bytes = FIRST_GUESS_BYTES.min(limit);
    loop {
        let plain = zstd_into(frame, buffer_bytes)?;
        if plain.is_some() || buffer_bytes == limit {
            return Ok(plain);
        }
        buffer_bytes = buffer_bytes.saturating_mul(4).min(limit);
    }
}

fn xz(stored: &[u8], limit: u64, guess_bytes: u64) -> Result<Option<Vec<u8>>, CodecError> {
    let damaged = |reason: String| CodecError::Damaged { compression: "xz", reason };
    let stream = liblzma::stream::Stream::new_stream_decoder(MAX_XZ_MEMORY_BYTES, 0)
        .map_err(|error| damaged(error.to_string()))?;
    let mut decoder = liblzma::bufread::XzDecoder::new_stream(stored, stream);
    let plain = read_up_to(&mut decoder, limit, guess_bytes).map_err(|error| damaged(error.to_string()))?;
    no_trailing("xz", plain, decoder.into_inner())
}

fn gzip(stored: &[u8], limit: u64, guess_bytes: u64) -> Result<Option<Vec<u8>>, CodecError> {
    let damaged = |error: std::io::Error| CodecError::Damaged { compression: "gzip", reason: error.to_string() };
    let mut decoder = flate2::bufread::GzDecoder::new(stored);
    let plain = read_up_to(&mut decoder, limit, guess_bytes).map_err(damaged)?;
    no_trailing("gzip", plain, decoder.into_inner())
}

fn no_trailing(compression: &'static str, plain: Option<Vec<u8>>, rest: &[u8]) -> Result<Option<Vec<u8>>, CodecError> {
    match plain {
        Some(_) if !rest.is_empty() => Err(CodecError::Trailing { compression, n_bytes: rest.len() as u64 }),
        plain => Ok(plain),
    }
}

/// Reads to the end; `None` when that is beyond `limit`. Asking for one byte more makes the decoder check the stream's end.
fn read_up_to(decoder: &mut impl Read, limit: u64, guess_bytes: u64) -> std::io::Result<Option<Vec<u8>>> {
    let mut plain = Vec::with_capacity(guess_bytes.min(limit) as usize);
    decoder.take(limit + 1).read_to_end(&mut plain)?;
    Ok((plain.len() as u64 <= limit).then_some(plain))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    fn sample() -> Vec<u8> {
        (0..60_000u32).flat_map(|i| (i / 7).wrapping_mul(2_654_435_761).to_le_bytes()).collect()
    }

    fn streamed_zstd(plain: &[u8]) -> Vec<u8> {
        let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 3).unwrap();
        encoder.write_all(plain).unwrap();
        encoder.finish().unwrap()
    }

    fn all_forms(plain: &[u8]) -> Vec<(&'static str, Bytes)> {
        let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 6);
        xz.write_all(plain).unwrap();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        gzip.write_all(plain).unwrap();
        vec![
            ("zstd", encode(plain, DEFAULT_LEVEL).into()),
            ("zstd without content size", streamed_zstd(plain).into()),
            ("xz", xz.finish().unwrap().into()),
            ("gzip", gzip.finish().unwrap().into()),
        ]
    }

    #[test]
    fn every_compression_decodes_to_the_plain_bytes() {
        let plain = sample();
        let size = plain.len() as u64;
        assert_eq!(zstd_safe::get_frame_content_size(&encode(&plain, 3)).unwrap(), Some(size));
        for (name, stored) in all_forms(&plain) {
            assert_eq!(decode(Form::Compressed, &stored, size).unwrap(), plain, "{name}");
            assert_eq!(decode_unknown_size(Form::Compressed, &stored, size).unwrap(), plain, "{name}");
            assert_eq!(decode_unknown_size(Form::Compressed, &stored, u64::MAX).unwrap(), plain, "{name}");
            assert!(decode_unknown_size(Form::Compressed, &stored, size - 1).is_err(), "{name}");
            for wrong in [0, 1, size - 1, size + 1, MAX_CHUNK_BYTES] {
                let error = decode(Form::Compressed, &stored, wrong);
                assert!(matches!(error, Err(CodecError::WrongSize { .. })), "{name} {wrong}: {error:?}");
            }
            assert!(decode(Form::Compressed, &stored, MAX_CHUNK_BYTES + 1).is_err());
        }
        let stored = Bytes::from(plain.clone());
        assert_eq!(decode(Form::Plain, &stored, size).unwrap().as_ptr(), stored.as_ptr());
        assert!(decode(Form::Plain, &stored, size - 1).is_err() && decode(Form::Plain, &stored, size + 1).is_err());
        assert_eq!(decode_unknown_size(Form::Plain, &stored, size), Ok(stored.clone()));
        assert!(decode_unknown_size(Form::Plain, &stored, size - 1).is_err());
    }

    #[test]
    fn a_size_above_the_first_guess_is_found() {
        let plain = vec![7; 5 << 20];
        for (name, stored) in all_forms(&plain) {
            assert_eq!(decode_unknown_size(Form::Compressed, &stored, 8 << 20).unwrap(), plain, "{name}");
        }
    }

    #[test]
    fn truncated_and_continued_streams_are_errors() {
        let plain = b"a chunk that is short enough to be cut at every byte, chunk, chunk, chunk".repeat(2);
        let size = plain.len() as u64;
        for (name, stored) in all_forms(&plain) {
            for len in 0..stored.len() {
                let cut = stored.slice(..len);
                assert!(decode(Form::Compressed, &cut, size).is_err(), "{name} cut to {len} bytes");
                assert!(decode_unknown_size(Form::Compressed, &cut, size).is_err(), "{name} cut to {len} bytes");
            }
            for more in [&b"\0"[..], b"rubbish", &stored] {
                let longer = Bytes::from([&stored, more].concat());
                assert!(decode(Form::Compressed, &longer, size).is_err(), "{name} continued");
                assert!(decode(Form::Compressed, &longer, 2 * size).is_err(), "{name} continued");
                assert!(decode_unknown_size(Form::Compressed, &longer, 4 * size).is_err(), "{name} continued");
            }
        }
        for form in [Form::Compressed, Form::Plain] {
            assert_eq!(decode(form, &Bytes::new(), 0), Err(CodecError::Empty));
            assert_eq!(decode_unknown_size(form, &Bytes::new(), 10), Err(CodecError::Empty));
        }
        let text = Bytes::from_static(b"<html>");
        assert_eq!(decode(Form::Compressed, &text, 6), Err(CodecError::UnknownMagic("3c68746d6c3e".to_owned())));
        // An empty content is no chunk.
        assert_eq!(decode_unknown_size(Form::Compressed, &encode(b"", 3).into(), 10), Err(CodecError::Empty));
        // A skippable frame is no chunk either.
        assert!(decode(Form::Compressed, &Bytes::from_static(b"\x50\x2a\x4d\x18\0\0\0\0"), 0).is_err());
    }

    #[test]
    fn levels_out_of_range_are_brought_into_it() {
        let plain = sample();
        for level in [i32::MIN, -5, 0, 1, 19] {
            let stored = Bytes::from(encode(&plain, level));
            assert_eq!(decode(Form::Compressed, &stored, plain.len() as u64).unwrap(), plain, "{level}");
        }
    }

    proptest! {
        #[test]
        fn no_damage_panics_or_exceeds_the_bounds(which in 0usize..4, at in any::<usize>(), bit in 0u8..8, len in 1usize..3000) {
            let plain: Vec<u8> = sample()[..len].to_vec();
            let (_, stored) = all_forms(&plain).swap_remove(which);
            let mut stored = stored.to_vec();
            let at = at % stored.len();
            stored[at] ^= 1 << bit;
            let stored = Bytes::from(stored);
            if let Ok(decoded) = decode(Form::Compressed, &stored, len as u64) {
                prop_assert_eq!(decoded.len(), len);
            }
            if let Ok(decoded) = decode_unknown_size(Form::Compressed, &stored, 2 * len as u64) {
                prop_assert!(decoded.len() <= 2 * len);
            }
        }
    }
}
