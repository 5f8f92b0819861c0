//! Errors of a volume: each knows its errno, and each EIO the numbered place it comes from.

use crate::report::Report;

/// The places that can answer EIO. The number is printed with the message and counted in [`Report::eio`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(usize)]
pub enum EioSite {
    /// A chunk is in no store.
    ChunkMissing = 1,
    /// A chunk's stored bytes cannot be decoded or are not what the id says.
    ChunkBad = 2,
    /// A store failed.
    StoreFailed = 3,
    /// The index is damaged where it was read.
    IndexDamaged = 4,
    /// The archive is damaged where it was read.
    ArchiveDamaged = 5,
    /// A local file (plain archive) could not be read.
    FileFailed = 6,
    /// The request was not answered within `io-timeout`.
    Deadline = 7,
    /// A panic was caught while answering.
    Panic = 8,
    /// An index or archive of a directory cannot be opened, or the directory cannot be listed.
    Unopened = 12,
}

impl EioSite {
    /// What is wrong at the site with this number, in words.
    pub fn name_of(number: usize) -> &'static str {
        match number {
            1 => "chunk missing",
            2 => "chunk bad",
            3 => "store failed",
            4 => "index damaged",
            5 => "archive damaged",
            6 => "file unreadable",
            7 => "too late",
            8 => "panic",
            _ => "other",
        }
    }

    /// The site's number.
    pub fn number(self) -> usize {
        self as usize
    }
}

/// Why a volume cannot answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum VolumeError {
    /// No such inode or name.
    #[error("no such file")]
    NotFound,
    /// The operation needs a directory.
    #[error("not a directory")]
    NotADirectory,
    /// The operation needs something else than a directory.
    #[error("is a directory")]
    IsADirectory,
    /// The operation does not fit this kind of file.
    #[error("the operation does not fit this kind of file")]
    Invalid,
    /// The file was replaced or removed, and what it was cannot be had any more.
    #[error("{message}")]
    Stale {
        /// Which file, and what became of it.
        message: String,
    },
    /// The content is not kept here, and no store may be asked.
    #[error("{message}")]
    Offline {
        /// What is not kept.
        message: String,
    },
    /// The content cannot be had.
    #[error("EIO ({:02}): {message}", site.number())]
    Io {
        /// The numbered place.
        site: EioSite,
        /// What failed, on what, and why.
        message: String,
    },
}

impl VolumeError {
    /// An EIO of a numbered site.
    pub fn io(site: EioSite, message: impl Into<String>) -> Self {
        Self::Io { site, message: message.into() }
    }

    /// The errno of the answer.
    pub fn errno(&self) -> i32 {
        match self {
            Self::NotFound => libc::ENOENT,
            Self::NotADirectory => libc::ENOTDIR,
            Self::IsADirectory => libc::EISDIR,
            Self::Invalid => libc::EINVAL,
            Self::Stale { .. } => libc::ESTALE,
            Self::Offline { .. } => libc::ENETUNREACH,
            Self::Io { .. } => libc::EIO,
        }
    }

    /// The level to log the answer at: what programs ask for in vain every day is no news.
    pub fn level(&self) -> tracing::Level {
        match self {
            Self::NotFound
            | Self::NotADirectory
            | Self::IsADirectory
            | Self::Invalid
            | Self::Stale { .. }
            | Self::Offline { .. } => tracing::Level::DEBUG,
            Self::Io { .. } => tracing::Level::WARN,
        }
    }

    /// Adds the error to the counters.
    pub fn count(&self, report: &Report) {
        match self {
            Self::Io { site, .. } => report.eio[site.number()].add(1),
            Self::NotFound
            | Self::NotADirectory
            | Self::IsADirectory
            | Self::Invalid
            | Self::Stale { .. }
            | Self::Offline { .. } => {}
        }
    }
}
