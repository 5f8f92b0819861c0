//! Every verb and flag, defined once. Names and letters are desync's where desync has the verb.

use std::path::PathBuf;

use clap::{ArgAction, Parser, Subcommand};

use super::abort::AbortArgs;
use super::manual::{CompletionsArgs, ManualArgs};
use super::map::MapArgs;
use super::option_flags::OptionFlags;
use super::profile::ProfileArgs;
use super::reload::ReloadArgs;
use super::serve_flags::{ChunkServerArgs, IndexServerArgs};
use super::sign::SignArgs;
use super::status::StatusArgs;
use super::store_flags::{AccessFlags, StoreFlags, TrustFlags};
use super::top::TopArgs;
use super::verify_signature::VerifySignatureArgs;
use super::warm::WarmArgs;

/// Mount casync and desync archives and disk images lazily, and make them.
#[derive(Debug, Parser)]
#[command(name = "caifs", version, max_term_width = 100, disable_help_subcommand = true)]
pub struct Args {
    /// Say more on stderr (twice: even more).
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,
    /// Configuration file to read instead of the usual ones (ours or desync's).
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// How much casync wants its helpers to say; taken, and not followed.
    #[arg(long, global = true, hide = true, value_name = "LEVEL")]
    pub log_level: Option<String>,
    /// The most bytes that a pull sends in a second.
    #[arg(long, global = true, hide = true, value_name = "BYTES")]
    pub rate_limit_bps: Option<String>,
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// What caifs can do.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Mount an index or archive; returns when the mount is usable.
    Mount(MountArgs),
    /// Unmount.
    Umount(UmountArgs),
    /// Show how a mount is doing: stores, tiers, what waits and for how long; never touches the mount itself.
    Status(StatusArgs),
    /// Show what happens in mounts, live.
    Top(TopArgs),
    /// Show which parts of an image or archive are present.
    Map(MapArgs),
    /// Make a mount read its settings again: stores, limits, credentials; nobody who reads notices.
    Reload(ReloadArgs),
    /// End a mount that hangs: who waits for it gets an error.
    Abort(AbortArgs),
    /// Make an index, and a store of chunks, of a file or block device.
    Make(MakeArgs),
    /// Make an archive, or an index and a store of chunks, of a directory.
    Tar(TarArgs),
    /// Write the content of an index, or of one file in an archive, to stdout.
    Cat(CatArgs),
    /// List the files of an archive.
    Ls(LsArgs),
    /// Make a cache keep content before it is read: all of it, some files, or a range.
    Warm(WarmArgs),
    /// Show and merge profiles, which a mount records and replays.
    Profile(ProfileArgs),
    /// Tell what an index describes.
    Info(InfoArgs),
    /// List the ids of an index's chunks.
    ListChunks(ListChunksArgs),
    /// Check that a file is what an index describes.
    VerifyIndex(VerifyIndexArgs),
    /// Sign indexes, or make the keys to do so.
    Sign(SignArgs),
    /// Check the signature of an index.
    VerifySignature(VerifySignatureArgs),
    /// Move the chunks of an S3 store of early desync to where they are looked for today.
    S3Upgrade(S3UpgradeArgs),
    /// Serve chunks over HTTP.
    ChunkServer(ChunkServerArgs),
    /// Serve indexes and archives over HTTP.
    IndexServer(IndexServerArgs),
    /// Show the configuration and where each value comes from; or what holds for one store.
    Config(ConfigArgs),
    /// The far end of a pull over the casync protocol, on standard input and output.
    #[command(hide = true)]
    Pull(ProtocolArgs),
    /// The far end of a push over the casync protocol, on standard input and output.
    #[command(hide = true)]
    Push(ProtocolArgs),
    /// Print what a shell needs to complete command lines.
    Completions(CompletionsArgs),
    /// Write the man pages.
    #[command(hide = true)]
    Manual(ManualArgs),
    /// Show it working: pack a directory, mount it lazily, read from it, unmount.
    Demo(DemoArgs),
}

impl Verb {
    /// Where the verb keeps the configuration file that was named on the command line, if it reads one.
    pub fn config_file_mut(&mut self) -> Option<&mut Option<PathBuf>> {
        match self {
            Self::Mount(args) => Some(&mut args.stores.access.config_file),
            Self::Make(args) => Some(&mut args.access.config_file),
            Self::Tar(args) => Some(&mut args.access.config_file),
            Self::Cat(args) => Some(&mut args.stores.access.config_file),
            Self::Ls(args) => Some(&mut args.stores.access.config_file),
            Self::Warm(args) => Some(&mut args.stores.access.config_file),
            Self::Profile(args) => args.config_file_mut(),
            Self::Info(args) => Some(&mut args.stores.access.config_file),
            Self::Config(args) => Some(&mut args.stores.access.config_file),
            Self::ListChunks(args) => Some(&mut args.access.config_file),
            Self::VerifyIndex(args) => Some(&mut args.access.config_file),
            Self::Sign(args) => Some(&mut args.access.config_file),
            Self::VerifySignature(args) => Some(&mut args.access.config_file),
            Self::S3Upgrade(args) => Some(&mut args.access.config_file),
            Self::ChunkServer(args) => Some(&mut args.server.access.config_file),
            Self::IndexServer(args) => Some(&mut args.server.access.config_file),
            Self::Pull(args) | Self::Push(args) => Some(&mut args.access.config_file),
            Self::Umount(_)
            | Self::Status(_)
            | Self::Top(_)
            | Self::Map(_)
            | Self::Reload(_)
            | Self::Abort(_)
            | Self::Completions(_)
            | Self::Manual(_)
            | Self::Demo(_) => None,
        }
    }
}

// Flags of stores come last in every verb: what follows them would stand under their heading.

/// Arguments of `mount`.
#[derive(Debug, clap::Args)]
pub struct MountArgs {
    /// A .caibx, .caidx or .catar file (told by its suffix, else by its content), or a directory of them.
    #[arg(value_name = "SPEC")]
    pub spec: PathBuf,
    /// Where to mount: a directory, or a regular file for the index of a disk image.
    #[arg(value_name = "DIR")]
    pub mountpoint: PathBuf,
    /// Mount options as in fstab; every flag below is one of them.
    #[arg(short, long = "options", value_name = "OPTIONS")]
    pub options: Vec<String>,
    /// Stay in the foreground.
    #[arg(short, long)]
    pub foreground: bool,
    /// What is an option after -o as well.
    #[command(flatten)]
    pub mount_options: OptionFlags,
    /// Where to find the chunks.
    #[command(flatten)]
    pub stores: StoreFlags,
}

/// Arguments of `umount`.
#[derive(Debug, clap::Args)]
pub struct UmountArgs {
    /// The mountpoint.
    #[arg(value_name = "DIR")]
    pub mountpoint: PathBuf,
    /// Detach now, and end when the last open file is closed.
    #[arg(short = 'z', long)]
    pub lazy: bool,
}

/// How content is cut into chunks.
#[derive(Debug, clap::Args)]
pub struct CutFlags {
    /// Chunk sizes in KiB.
    #[arg(short = 'm', long, value_name = "MIN:AVG:MAX", default_value = "16:64:256")]
    pub chunk_size: String,
    /// Whose cuts to make: they differ only for a chunk of exactly the smallest size.
    #[arg(long, value_name = "casync|desync", default_value = "casync")]
    pub cut_rule: String,
    /// Digest of the chunk ids.
    #[arg(long, value_name = "sha512-256|sha256", default_value = "sha512-256")]
    pub digest: String,
    /// Level of the zstd compression.
    #[arg(long, value_name = "LEVEL", default_value_t = 3, allow_negative_numbers = true)]
    pub level: i32,
    /// Threads to use [default: the cores].
    #[arg(short = 'n', long, value_name = "N")]
    pub concurrency: Option<usize>,
}

/// Arguments of `make`.
#[derive(Debug, clap::Args)]
pub struct MakeArgs {
    /// The index to write (.caibx).
    #[arg(value_name = "INDEX")]
    pub index: PathBuf,
    /// The file or block device to read.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Store to put the chunks in (made if it is not there); without it only the index is written.
    #[arg(short, long, value_name = "STORE")]
    pub store: Option<String>,
    /// How content is cut into chunks.
    #[command(flatten)]
    pub cut: CutFlags,
    /// Print a summary as JSON to stderr.
    #[arg(long)]
    pub print_stats: bool,
    /// How the store is reached.
    #[command(flatten)]
    pub access: AccessFlags,
}

/// Arguments of `tar`.
#[derive(Debug, clap::Args)]
pub struct TarArgs {
    /// The archive (.catar) or, with -i, index (.caidx) to write; - is stdout.
    #[arg(value_name = "OUT")]
    pub out: PathBuf,
    /// The directory to pack.
    #[arg(value_name = "DIR")]
    pub source: PathBuf,
    /// Write an index, and the chunks into the store.
    #[arg(short, long, requires = "store")]
    pub index: bool,
    /// Store to put the chunks in (made if it is not there).
    #[arg(short, long, value_name = "STORE", requires = "index")]
    pub store: Option<String>,
    /// How content is cut into chunks.
    #[command(flatten)]
    pub cut: CutFlags,
    /// What to store of each file (names as casync's --with; repeatable) [default: all].
    #[arg(long, value_name = "FEATURES", value_delimiter = ',')]
    pub with: Vec<String>,
    /// What not to store of each file.
    #[arg(long, value_name = "FEATURES", value_delimiter = ',')]
    pub without: Vec<String>,
    /// Leave directories on other file systems out.
    #[arg(short = 'x', long)]
    pub one_file_system: bool,
    /// Store no modification times.
    #[arg(long)]
    pub no_time: bool,
    /// Write a table of all metadata beside it (OUT.table), for mounts to browse without reading chunks.
    #[arg(long)]
    pub metadata_table: bool,
    /// Print a summary as JSON to stderr.
    #[arg(long)]
    pub print_stats: bool,
    /// How the store is reached.
    #[command(flatten)]
    pub access: AccessFlags,
}

/// Arguments of `cat`.
#[derive(Debug, clap::Args)]
pub struct CatArgs {
    /// A .caibx, .caidx or .catar file.
    #[arg(value_name = "INDEX")]
    pub index: PathBuf,
    /// File to write [default: stdout].
    #[arg(value_name = "OUTPUT")]
    pub output: Option<PathBuf>,
    /// First byte to write.
    #[arg(short, long, value_name = "BYTES", default_value_t = 0)]
    pub offset: u64,
    /// How many bytes to write, 0 for all to the end.
    #[arg(short, long, value_name = "BYTES", default_value_t = 0)]
    pub length: u64,
    /// Write this file of the archive instead of the archive.
    #[arg(short, long, value_name = "PATH")]
    pub path: Option<PathBuf>,
    /// Where to find the chunks.
    #[command(flatten)]
    pub stores: StoreFlags,
}

/// Arguments of `ls`.
#[derive(Debug, clap::Args)]
pub struct LsArgs {
    /// A .caidx or .catar file.
    #[arg(value_name = "SPEC")]
    pub spec: PathBuf,
    /// The file or directory in it to list [default: the root].
    #[arg(value_name = "PATH", default_value = "/")]
    pub path: PathBuf,
    /// Show type, permissions, owner, size and time.
    #[arg(short, long)]
    pub long: bool,
    /// Go into directories; a line is then the path below PATH.
    #[arg(short = 'R', long)]
    pub recursive: bool,
    /// Print one JSON object a line.
    #[arg(long, conflicts_with = "long")]
    pub json: bool,
    /// Where to find the chunks.
    #[command(flatten)]
    pub stores: StoreFlags,
}

/// Arguments of `info`.
#[derive(Debug, clap::Args)]
pub struct InfoArgs {
    /// The index.
    #[arg(value_name = "INDEX")]
    pub index: PathBuf,
    /// How to print it.
    #[arg(short, long, value_name = "json|plain", default_value = "json", value_parser = ["json", "plain"])]
    pub format: String,
    /// Stores (and a cache) to count which chunks they have.
    #[command(flatten)]
    pub stores: StoreFlags,
}

/// Arguments of `list-chunks`.
#[derive(Debug, clap::Args)]
pub struct ListChunksArgs {
    /// The index.
    #[arg(value_name = "INDEX")]
    pub index: PathBuf,
    /// What the index must be.
    #[command(flatten)]
    pub trust: TrustFlags,
    /// How it is reached.
    #[command(flatten)]
    pub access: AccessFlags,
}

/// Arguments of `verify-index`.
#[derive(Debug, clap::Args)]
pub struct VerifyIndexArgs {
    /// The index.
    #[arg(value_name = "INDEX")]
    pub index: PathBuf,
    /// The file that it should describe.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Threads to use [default: the cores].
    #[arg(short = 'n', long, value_name = "N")]
    pub concurrency: Option<usize>,
    /// What the index must be.
    #[command(flatten)]
    pub trust: TrustFlags,
    /// How the index is reached.
    #[command(flatten)]
    pub access: AccessFlags,
}

/// Arguments of `s3-upgrade`.
#[derive(Debug, clap::Args)]
pub struct S3UpgradeArgs {
    /// The store (s3+https://host/bucket/prefix).
    #[arg(short, long, value_name = "STORE")]
    pub store: String,
    /// Chunks to move at once.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 10)]
    pub concurrency: usize,
    /// How it is reached.
    #[command(flatten)]
    pub access: AccessFlags,
}

/// Arguments of `config`.
#[derive(Debug, clap::Args)]
pub struct ConfigArgs {
    /// The store (or group of mirrors) to show what holds for.
    #[arg(value_name = "LOCATION")]
    pub location: Option<String>,
    /// Print it as JSON.
    #[arg(long)]
    pub json: bool,
    /// Flags to look at together with the configuration.
    #[command(flatten)]
    pub stores: StoreFlags,
}

/// Arguments of `pull` and `push`, as casync and desync write them.
#[derive(Debug, clap::Args)]
pub struct ProtocolArgs {
    /// BASE ARCHIVE INDEX STORE, and further stores; - for none.
    #[arg(value_name = "BASE ARCHIVE INDEX STORE", num_args = 3..)]
    pub words: Vec<String>,
    /// How stores are reached.
    #[command(flatten)]
    pub access: AccessFlags,
}

/// Arguments of `demo`.
#[derive(Debug, clap::Args)]
pub struct DemoArgs {
    /// The directory to pack [default: the first of /usr/share/doc, /usr/share, /etc that has files].
    #[arg(value_name = "DIR")]
    pub dir: Option<PathBuf>,
}
