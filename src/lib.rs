//! caifs mounts casync and desync artefacts lazily and read-only over FUSE, and makes them.
//!
//! # What there is
//!
//! An index (`.caibx` of a blob, `.caidx` of a directory archive) lists chunks by the hash of their bytes; a store has the
//! chunks. A mount serves the blob or the archive's tree by fetching only the chunks that a read touches.
//!
//! ```text
//!  cli                    verbs and flags; the only room that names clap
//!   ├─ serve              chunks and indexes for others, over HTTP
//!   ├─ pack               making: cut, hash, compress, store; archive of a directory; looking at indexes
//!   └─ mount              the mount as a service: options, mount table, daemon, signals
//!       └─ fuse           requests of the kernel; the only room that names fuser
//!           └─ volume     the filesystem without FUSE, errors with their errno
//!               ├─ tree   a directory tree over an archive, by random access
//!               └─ blob   a byte range over an index: concurrent chunks, one copy at the most
//!                   └─ cache     chunk id → verified bytes: memory, in flight, disk, store; the only way up
//!                       └─ store     where chunks, indexes and archives lie: locations, HTTP, S3, GCS, SFTP, SSH, OCI, mirrors
//!                           └─ chunk     cut rule, stored forms, and bytes that proved to be what their id says
//!                               └─ format    index and archive: bytes ↔ types
//!                                   └─ digest    the only place that hashes chunk content
//!  config, report         resolved settings; counters
//!  sys                    system calls that no safe crate wraps: the only room with unsafe code
//! ```
//!
//! Imports go down this picture only; `tests/layering.rs` reads the sources and checks it.
//!
//! # How a read goes
//!
//! The kernel's READ reaches `fuse::adapter`, which makes the future of `volume.read` and polls it once on the spot. If all
//! chunks are in memory, that poll gives the bytes and the reply is sent from the same thread. Otherwise future and reply move into a
//! task: `tree` finds the file's range in the archive, `blob` the chunks of the range, `cache` fetches those that are
//! neither in memory nor in flight, in small batches side by side: from disk if they are kept there, else from the stores. They are
//! decoded and verified on blocking threads; a chunk that is wrong is fetched again, from another store if there is one, and a
//! failure that can pass is waited out until the read's deadline. What came from a store is kept on disk after the reader has its bytes.
//!
//! A reader who reads on is read ahead of: what comes next is fetched in a window that doubles whenever the reader had to wait
//! (`cache::ahead`, `blob::read_ahead`). That, warming and the replay of profiles (`volume::background`) have a share of requests, threads
//! and memory of their own, so that a reader never queues behind what nobody waits for (`cache::background`).
//!
//! # How a tree is browsed
//!
//! `tree` finds a file from the end of the archive by hashes, and lists a directory by a look at each child; so `find` over a remote archive
//! fetches most of its metadata. Once a metadata table is attached ([`tree::table`]) all but content is answered from it: `volume::table`
//! finds one in the disk cache or beside the index, or makes one in the background. Inode numbers are the same with and without.
//!
//! # Invariants
//!
//! 1. `format` never panics and never allocates more than its input warrants. Untrusted sizes are bounded by named constants.
//! 2. Bytes leave `cache` only as a [`chunk::Chunk`], which only hashing can make, or an undamaged seal that was made when they were
//!    hashed ([`chunk::seal`]). Wrong bytes are never served: a read gives the right bytes or an error.
//! 3. Every fetch has a deadline, and no request of the kernel stays unanswered past its own. `statfs` never touches a store.
//! 4. A thread that takes requests never waits for anything but the next request.
//! 5. One memory budget covers the chunks kept, those in flight, replies being put together and parsed directories. Resident
//!    memory does not grow with the size of what is mounted.
//! 6. The disk cache can be deleted, truncated, filled with rubbish, or on a full disk: reads go on, slower, and no wrong byte is read.
//! 7. Nothing above `store` knows how a store is reached. Nothing below `cli` knows clap, argv or the environment.
//! 8. Writing is atomic: a temporary file and a rename. A killed process leaves no torn chunk or index.
//! 9. An inode number is a place in the archive: the same on every mount, and enough to find the file again.
//! 10. What we mounted is unmounted by us, and nothing else is.
//! 11. Secrets stand in no message, no `Debug` text, no mount table and no argument of a child.

pub mod digest;

pub mod format;

pub mod chunk;

pub mod store;

pub mod cache;

pub mod blob;

pub mod tree;

pub mod volume;

pub mod fuse;

pub mod mount;

pub mod pack;

pub mod serve;

pub mod cli;

pub mod config;
pub mod report;

#[allow(unsafe_code, reason = "the one room for system calls that no safe crate wraps")]
pub mod sys;
