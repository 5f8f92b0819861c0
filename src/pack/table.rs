//! The metadata table of an archive, published beside it or its index, and made while the archive is made.
//!
//! The table of `NAME` is `NAME.table`. It is put into its place after what it belongs to: until then, an old one there belongs to
//! something else, which its readers know.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::PackError;
use super::output::AtomicFile;
use crate::format::table::Binding;
use crate::sys::MappedFile;
use crate::tree::table::pack::TablePacker;
use crate::tree::table::writer::Writer;
use crate::volume::table::TABLE_SUFFIX;

/// Where a file without a name lies when the table goes to a store.
const SPOOL_DIR: &str = "/var/tmp";

/// The mode of a table, less the umask.
const TABLE_MODE: u32 = 0o666;

/// Begins the table of what goes to a local file, or to a store when there is none.
///
/// # Errors
/// No file can be made for it.
pub fn begin(out: Option<&Path>) -> Result<TablePacker, PackError> {
    let dir = out.map_or(Path::new(SPOOL_DIR), |out| match out.parent() {
        Some(dir) if dir != Path::new("") => dir,
        _ => Path::new("."),
    });
    // Not every file system has files without a name.
    let plain = unnamed(dir).or_else(|_| unnamed(Path::new(SPOOL_DIR)));
    let plain = plain.map_err(|error| PackError::file(dir, &error))?;
    Ok(TablePacker::new(Writer::new(plain, Box::new(|_| Ok(())))))
}

/// The place of the table of a local file.
pub fn beside(out: &Path) -> PathBuf {
    let mut path = out.as_os_str().to_owned();
    path.push(TABLE_SUFFIX);
    path.into()
}

/// Puts a table beside a local file.
///
/// # Errors
/// It cannot be written.
pub fn publish(packer: TablePacker, binding: Binding, out: &Path) -> Result<(), PackError> {
    let target = beside(out);
    let failed = |error: io::Error| PackError::file(&target, &error);
    let mut file = BufWriter::new(AtomicFile::create(&target, TABLE_MODE)?);
    packer.finish(binding, &mut file).map_err(failed)?;
    file.into_inner().map_err(|error| failed(error.into_error()))?.commit()
}

/// The bytes of a table, for a store. They do not lie in memory.
///
/// # Errors
/// It cannot be written.
pub fn bytes(packer: TablePacker, binding: Binding) -> Result<Bytes, PackError> {
    let made = || -> io::Result<MappedFile> {
        let file: File = unnamed(Path::new(SPOOL_DIR))?;
        let mut out = BufWriter::new(&file);
        packer.finish(binding, &mut out)?;
        out.flush()?;
        MappedFile::new(&file)
    };
    Ok(Bytes::from_owner(made().map_err(|error| PackError::file(Path::new(SPOOL_DIR), &error))?))
}

fn unnamed(dir: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).write(true).custom_flags(libc::O_TMPFILE | libc::O_EXCL).mode(0o600);
    options.open(dir)
}
