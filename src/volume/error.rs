//! Errors of a volume: each knows its errno, and each EIO the numbered place it comes from.

use crate::report::Report;

/// Makes the numbered places from one list, so that none is without its name.
macro_rules! eio_sites {
    ($($(#[$doc:meta])* $site:ident = $number:literal $name:literal,)*) => {
        /// The places that can answer EIO. The number is printed with the message and counted in [`Report::eio`].
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(usize)]
        pub enum EioSite {
            $($(#[$doc])* $site = $number,)*
        }

        impl EioSite {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$site),*];

            /// What is wrong there, in words.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$site => $name,)*
                }
            }
        }
    };
}

eio_sites! {
    /// A chunk is in no store.
    ChunkMissing = 1 "chunk missing",
    /// A chunk's stored bytes cannot be decoded or are not what the id says.
    ChunkBad = 2 "chunk bad",
    /// A store failed.
    StoreFailed = 3 "store failed",
    /// The index is damaged where it was read.
    IndexDamaged = 4 "index damaged",
    /// The archive is damaged where it was read.
    ArchiveDamaged = 5 "archive damaged",
    /// A local file (plain archive) could not be read.
    FileFailed = 6 "file unreadable",
    /// The request was not answered within `io-timeout`.
    Deadline = 7 "too late",
    /// A panic was caught while answering.
    Panic = 8 "panic",
    /// An index or archive of a directory cannot be opened, or the directory cannot be listed.
    Unopened = 12 "not opened",
}

impl EioSite {
    /// What is wrong at the site with this number, in words.
    pub fn name_of(number: usize) -> &'static str {
        Self::ALL.iter().find(|site| site.number() == number).map_or("other", |site| site.name())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_site_has_a_name_and_room_for_its_count() {
        for site in EioSite::ALL {
            assert!(site.number() < Report::N_EIO_SITES, "{site:?}");
            assert_eq!(EioSite::name_of(site.number()), site.name());
        }
        assert_eq!(EioSite::name_of(EioSite::Unopened.number()), "not opened");
        assert_eq!(EioSite::name_of(11), "other");
    }
}
