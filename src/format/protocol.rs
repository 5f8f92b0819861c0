//! Frames of the casync protocol, which both sides of a `pull` or `push` exchange over a pair of streams.
//!
//! * [`Frame`] is one message, [`Features`] what a HELLO offers and wishes; [`check_session`] tells whether two sides fit.
//! * [`Frame::encode`] appends a frame's bytes; [`Decoder`] takes bytes as they come and gives frames.
//!
//! Layout (formats.md 5): size u64, type u64, body; the size counts the whole frame. Invariant: no input makes the decoder
//! panic, or keep more than the bytes it was given; a frame too long for its type is refused by its first 16 bytes.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::digest::{CHUNK_ID_BYTES, ChunkId};

/// The longest frame casync takes, in bytes.
pub const MAX_FRAME_BYTES: u64 = 16 << 20;
/// Bytes of size and type.
pub const HEADER_BYTES: usize = 16;
/// The longest stored form of a chunk that fits into a frame, in bytes.
pub const MAX_CHUNK_DATA_BYTES: usize = MAX_FRAME_BYTES as usize - CHUNK_HEAD_BYTES;
/// What casync puts into one INDEX, ARCHIVE or REQUEST frame at the most, in bytes.
pub const USUAL_DATA_BYTES: usize = 64 << 10;

/// Size, type, flags and id in front of a chunk's data.
const CHUNK_HEAD_BYTES: usize = HEADER_BYTES + 8 + CHUNK_ID_BYTES;
/// The most bytes of a reason that are sent; a reason is one line.
const MAX_REASON_BYTES: usize = 4096;
/// A buffer larger than this is given back when it is empty, in bytes.
const KEPT_BUFFER_BYTES: usize = 1 << 20;

const HELLO: u64 = 0x3c71_d094_8ca5_fbee;
const INDEX: u64 = 0xb32a_91dd_2b3e_27f8;
const INDEX_EOF: u64 = 0x4f09_32f1_0437_18f5;
const ARCHIVE: u64 = 0x95d6_428a_69ed_dcc5;
const ARCHIVE_EOF: u64 = 0x450b_ef66_3f24_cbad;
const REQUEST: u64 = 0x8ab4_27e0_f89d_9210;
const CHUNK: u64 = 0x5213_dd18_0a84_bc8c;
const MISSING: u64 = 0xd010_f9fa_c82b_7b6c;
const GOODBYE: u64 = 0xad20_5dbf_1a36_86c3;
const ABORT: u64 = 0xe7d9_136b_7efe_a352;

/// Flag of a REQUEST whose ids are wanted before all others, and of a CHUNK whose data are compressed.
const FLAG: u64 = 1;
/// casync takes an errno below this.
const MAX_ERRNO: u64 = (1 << 31) - 1;

/// What one side of a session offers and wishes: the flags of a HELLO, at least one and only known ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Features(u64);

impl Features {
    /// Offer: chunks can be read.
    pub const READABLE_STORE: Self = Self(0x1);
    /// Offer: chunks can be written.
    pub const WRITABLE_STORE: Self = Self(0x2);
    /// Offer: an index can be read.
    pub const READABLE_INDEX: Self = Self(0x4);
    /// Offer: an index can be written.
    pub const WRITABLE_INDEX: Self = Self(0x8);
    /// Offer: an archive can be read.
    pub const READABLE_ARCHIVE: Self = Self(0x10);
    /// Offer: an archive can be written.
    pub const WRITABLE_ARCHIVE: Self = Self(0x20);
    /// Wish: to ask for chunks.
    pub const PULL_CHUNKS: Self = Self(0x40);
    /// Wish: to be sent the index.
    pub const PULL_INDEX: Self = Self(0x80);
    /// Wish: to be sent the archive.
    pub const PULL_ARCHIVE: Self = Self(0x100);
    /// Wish: to send chunks.
    pub const PUSH_CHUNKS: Self = Self(0x200);
    /// Wish: to send an index.
    pub const PUSH_INDEX: Self = Self(0x400);
    /// Wish: to be asked for the chunks of the index sent.
    pub const PUSH_INDEX_CHUNKS: Self = Self(0x800);
    /// Wish: to send an archive.
    pub const PUSH_ARCHIVE: Self = Self(0x1000);

    const KNOWN: u64 = 0x1fff;

    /// Each wish beside the offer that answers it.
    const ANSWERS: [(Self, Self); 6] = [
        (Self::PULL_CHUNKS, Self::READABLE_STORE),
        (Self::PULL_INDEX, Self::READABLE_INDEX),
        (Self::PULL_ARCHIVE, Self::READABLE_ARCHIVE),
        (Self::PUSH_CHUNKS, Self::WRITABLE_STORE),
        (Self::PUSH_INDEX, Self::WRITABLE_INDEX),
        (Self::PUSH_ARCHIVE, Self::WRITABLE_ARCHIVE),
    ];

    /// The flags of a HELLO.
    ///
    /// # Errors
    /// There are none, unknown ones, or PUSH_INDEX_CHUNKS without the two wishes it belongs to.
    pub fn new(bits: u64) -> Result<Self, FrameError> {
        let features = Self(bits);
        let lacks_its_wishes = features.has(Self::PUSH_INDEX_CHUNKS)
            && !(features.has(Self::PUSH_INDEX) && features.has(Self::PUSH_CHUNKS));
        match bits == 0 || bits & !Self::KNOWN != 0 || lacks_its_wishes {
            true => Err(FrameError::Features(bits)),
            false => Ok(features),
        }
    }

    /// The flags as they are sent.
    pub fn bits(self) -> u64 {
        self.0
    }

    /// Whether all of `other` are among these.
    pub fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// These and those.
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Checks what both sides said in their HELLO: each wish is answered by an offer of the other side, and there is one.
///
/// # Errors
/// Two such sides have nothing to say to each other.
pub fn check_session(ours: Features, theirs: Features) -> Result<(), FrameError> {
    let mut n_wishes = 0;
    for (wishing, offering) in [(ours, theirs), (theirs, ours)] {
        for (wish, offer) in Features::ANSWERS {
            if wishing.has(wish) {
                n_wishes += 1;
                if !offering.has(offer) {
                    return Err(FrameError::NotOffered { wish: wish.0, offers: offering.0 });
                }
            }
        }
    }
    match n_wishes {
        0 => Err(FrameError::NoWish),
        _ => Ok(()),
    }
}

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// The first of each side, sent without waiting for the other's.
    Hello(Features),
    /// The next bytes of an index, at least one.
    Index(Bytes),
    /// The index was sent.
    IndexEof,
    /// The next bytes of an archive, at least one.
    Archive(Bytes),
    /// The archive was sent.
    ArchiveEof,
    /// Chunks are wanted.
    Request {
        /// Before all that are not.
        is_urgent: bool,
        /// Which, at least one.
        ids: Vec<ChunkId>,
    },
    /// A chunk.
    Chunk {
        /// Whether `data` are one zstd, xz or gzip stream, or the plain bytes.
        is_compressed: bool,
        /// Which chunk it is said to be.
        id: ChunkId,
        /// Its stored form, at least one byte.
        data: Bytes,
    },
    /// The sender does not have this chunk.
    Missing(ChunkId),
    /// The sender is done.
    Goodbye,
    /// The sender gives up.
    Abort {
        /// An errno of Linux, or 0.
        errno: u32,
        /// Why, in words.
        reason: String,
    },
}

/// Why bytes are no frame, or a frame not one to send.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// No message is of this type: the other side does not speak the casync protocol, or something else wrote between.
    #[error("not the casync protocol (a frame of type {0:#018x})")]
    UnknownType(u64),
    /// No message of this type is of this size.
    #[error("a {name} frame cannot have {size} bytes")]
    Size {
        /// The message.
        name: &'static str,
        /// The size said, in bytes.
        size: u64,
    },
    /// The flags of a HELLO.
    #[error("a HELLO cannot have the flags {0:#x}")]
    Features(u64),
    /// The flags of a REQUEST or CHUNK.
    #[error("a {name} frame cannot have the flags {flags:#x}")]
    Flags {
        /// The message.
        name: &'static str,
        /// The flags.
        flags: u64,
    },
    /// The errno of an ABORT.
    #[error("an ABORT frame cannot have the errno {0}")]
    Errno(u64),
    /// The reason of an ABORT has control characters, or does not end with NUL.
    #[error("the reason of an ABORT frame is no text")]
    Reason,
    /// The stream ends inside a frame.
    #[error("the stream ends inside a frame ({0} bytes of it came)")]
    Truncated(u64),
    /// One side wishes what the other does not offer.
    #[error("one side wishes {wish:#x} of the casync protocol, the other offers only {offers:#x}")]
    NotOffered {
        /// The flag of the wish.
        wish: u64,
        /// All flags of the other side.
        offers: u64,
    },
    /// No side wishes anything.
    #[error("neither side of the casync protocol wishes anything")]
    NoWish,
}

impl Frame {
    /// What the message is called in the protocol.
    pub fn name(&self) -> &'static str {
        Shape::of(self.frame_type()).map_or("", |shape| shape.name)
    }

    /// Bytes of the whole frame.
    pub fn size_bytes(&self) -> u64 {
        let body = match self {
            Self::Hello(_) => 8,
            Self::Index(data) | Self::Archive(data) => data.len(),
            Self::IndexEof | Self::ArchiveEof | Self::Goodbye => 0,
            Self::Request { ids, .. } => 8 + ids.len() * CHUNK_ID_BYTES,
            Self::Chunk { data, .. } => 8 + CHUNK_ID_BYTES + data.len(),
            Self::Missing(_) => CHUNK_ID_BYTES,
            Self::Abort { reason, .. } => 8 + sendable(reason).len() + 1,
        };
        (HEADER_BYTES + body) as u64
    }

    /// Appends the frame's bytes. Of the reason of an ABORT control characters are sent as spaces, and what is too long is left out.
    ///
    /// # Errors
    /// The frame cannot be sent: it is too long, or has no ids or data. Nothing is appended then.
    pub fn encode(&self, out: &mut BytesMut) -> Result<(), FrameError> {
        let size = self.size_bytes();
        Shape::of(self.frame_type())?.check(size)?;
        if let Self::Abort { errno, .. } = self
            && u64::from(*errno) >= MAX_ERRNO
        {
            return Err(FrameError::Errno(u64::from(*errno)));
        }
        out.reserve(size as usize);
        out.put_u64_le(size);
        out.put_u64_le(self.frame_type());
        match self {
            Self::Hello(features) => out.put_u64_le(features.0),
            Self::Index(data) | Self::Archive(data) => out.put_slice(data),
            Self::IndexEof | Self::ArchiveEof | Self::Goodbye => {}
            Self::Request { is_urgent, ids } => {
                out.put_u64_le(if *is_urgent { FLAG } else { 0 });
                ids.iter().for_each(|id| out.put_slice(&id.0));
            }
            Self::Chunk { is_compressed, id, data } => {
                out.put_u64_le(if *is_compressed { FLAG } else { 0 });
                out.put_slice(&id.0);
                out.put_slice(data);
            }
            Self::Missing(id) => out.put_slice(&id.0),
            Self::Abort { errno, reason } => {
                out.put_u64_le(u64::from(*errno));
                out.put_slice(sendable(reason).as_bytes());
                out.put_u8(0);
            }
        }
        Ok(())
    }

    fn frame_type(&self) -> u64 {
        match self {
            Self::Hello(_) => HELLO,
            Self::Index(_) => INDEX,
            Self::IndexEof => INDEX_EOF,
            Self::Archive(_) => ARCHIVE,
            Self::ArchiveEof => ARCHIVE_EOF,
            Self::Request { .. } => REQUEST,
            Self::Chunk { .. } => CHUNK,
            Self::Missing(_) => MISSING,
            Self::Goodbye => GOODBYE,
            Self::Abort { .. } => ABORT,
        }
    }

    /// The frame of a type that has this body, whose length has been checked.
    fn parse(frame_type: u64, mut body: &[u8]) -> Result<Self, FrameError> {
        Ok(match frame_type {
            HELLO => Self::Hello(Features::new(take_u64(&mut body))?),
            INDEX => Self::Index(Bytes::copy_from_slice(body)),
            INDEX_EOF => Self::IndexEof,
            ARCHIVE => Self::Archive(Bytes::copy_from_slice(body)),
            ARCHIVE_EOF => Self::ArchiveEof,
            REQUEST => {
                let is_urgent = flag("REQUEST", take_u64(&mut body))?;
                Self::Request { is_urgent, ids: body.chunks_exact(CHUNK_ID_BYTES).map(chunk_id).collect() }
            }
            CHUNK => {
                let is_compressed = flag("CHUNK", take_u64(&mut body))?;
                let (id, data) = body.split_at(CHUNK_ID_BYTES.min(body.len()));
                Self::Chunk { is_compressed, id: chunk_id(id), data: Bytes::copy_from_slice(data) }
            }
            MISSING => Self::Missing(chunk_id(body)),
            GOODBYE => Self::Goodbye,
            _ => {
                let errno = take_u64(&mut body);
                if errno >= MAX_ERRNO {
                    return Err(FrameError::Errno(errno));
                }
                let Some((0, text)) = body.split_last() else { return Err(FrameError::Reason) };
                if text.iter().any(|&byte| byte < b' ') {
                    return Err(FrameError::Reason);
                }
                Self::Abort { errno: errno as u32, reason: String::from_utf8_lossy(text).into_owned() }
            }
        })
    }
}

/// The reason of an ABORT as the protocol can have it: one line, not long, cut between two characters.
fn sendable(reason: &str) -> String {
    let mut text = String::new();
    for char in reason.chars() {
        if text.len() + char.len_utf8() > MAX_REASON_BYTES {
            break;
        }
        text.push(if char < ' ' { ' ' } else { char });
    }
    text
}

/// The next 8 bytes; missing ones, which the check of the size rules out, would count as 0.
fn take_u64(body: &mut &[u8]) -> u64 {
    body.try_get_u64_le().unwrap_or_default()
}

/// An id from exactly its bytes.
fn chunk_id(bytes: &[u8]) -> ChunkId {
    let mut id = [0; CHUNK_ID_BYTES];
    if bytes.len() == CHUNK_ID_BYTES {
        id.copy_from_slice(bytes);
    }
    ChunkId(id)
}

fn flag(name: &'static str, flags: u64) -> Result<bool, FrameError> {
    match flags & !FLAG {
        0 => Ok(flags == FLAG),
        _ => Err(FrameError::Flags { name, flags }),
    }
}

/// What sizes the frames of a type have: `min` to `max` bytes, in steps from `min`.
struct Shape {
    name: &'static str,
    min: u64,
    max: u64,
    step: u64,
}

impl Shape {
    fn of(frame_type: u64) -> Result<Self, FrameError> {
        let (name, min, max, step) = match frame_type {
            HELLO => ("HELLO", 24, 24, 1),
            INDEX => ("INDEX", 17, MAX_FRAME_BYTES, 1),
            INDEX_EOF => ("INDEX_EOF", 16, 16, 1),
            ARCHIVE => ("ARCHIVE", 17, MAX_FRAME_BYTES, 1),
            ARCHIVE_EOF => ("ARCHIVE_EOF", 16, 16, 1),
            REQUEST => ("REQUEST", 24 + CHUNK_ID_BYTES as u64, MAX_FRAME_BYTES, CHUNK_ID_BYTES as u64),
            CHUNK => ("CHUNK", CHUNK_HEAD_BYTES as u64 + 1, MAX_FRAME_BYTES, 1),
            MISSING => ("MISSING", 48, 48, 1),
            GOODBYE => ("GOODBYE", 16, 16, 1),
            ABORT => ("ABORT", 25, MAX_FRAME_BYTES, 1),
            other => return Err(FrameError::UnknownType(other)),
        };
        Ok(Self { name, min, max, step })
    }

    fn check(&self, size: u64) -> Result<(), FrameError> {
        match (self.min..=self.max).contains(&size) && (size - self.min).is_multiple_of(self.step) {
            true => Ok(()),
            false => Err(FrameError::Size { name: self.name, size }),
        }
    }
}

/// Bytes of a stream, as they come, to frames.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: BytesMut,
}

impl Decoder {
    /// Takes in the next bytes of the stream.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Where the next bytes of the stream can be appended, instead of [`Decoder::feed`].
    pub fn buffer(&mut self) -> &mut BytesMut {
        &mut self.buffer
    }

    /// The next frame; `None` when more bytes are needed for it. After an error the stream is of no more use.
    ///
    /// # Errors
    /// What comes next is no frame.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let mut header: &[u8] = &self.buffer;
        if header.len() < HEADER_BYTES {
            return Ok(None);
        }
        let (size, frame_type) = (take_u64(&mut header), take_u64(&mut header));
        Shape::of(frame_type)?.check(size)?;
        // No frame is longer than 16 MiB, so its size fits.
        let size = size as usize;
        let Some(body) = self.buffer.get(HEADER_BYTES..size) else { return Ok(None) };
        let frame = Frame::parse(frame_type, body)?;
        self.buffer.advance(size);
        if self.buffer.is_empty() && self.buffer.capacity() > KEPT_BUFFER_BYTES {
            self.buffer = BytesMut::new();
        }
        Ok(Some(frame))
    }

    /// Says that the stream has ended.
    ///
    /// # Errors
    /// It ended inside a frame.
    pub fn finish(&self) -> Result<(), FrameError> {
        match self.buffer.len() {
            0 => Ok(()),
            n => Err(FrameError::Truncated(n as u64)),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
