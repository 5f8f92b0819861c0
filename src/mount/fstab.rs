//! The table of what is mounted at boot, as fstab(5) writes it: enough of it to find the line of a mountpoint.

use std::io::{self, Read};
use std::path::Path;

use super::table::unescape;

/// The largest table that is read, in bytes.
const MAX_TABLE_BYTES: u64 = 4 << 20;

/// The options of the first line for `mountpoint` in the table at `path`, as they stand there; `None` when it has no line.
///
/// # Errors
/// What reading the table answers.
pub fn options_of(path: &Path, mountpoint: &Path) -> io::Result<Option<String>> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(MAX_TABLE_BYTES).read_to_end(&mut bytes)?;
    Ok(find(&bytes, mountpoint))
}

fn find(table: &[u8], mountpoint: &Path) -> Option<String> {
    let lines = table.split(|&byte| byte == b'\n').map(|line| line.trim_ascii());
    lines.filter(|line| !line.starts_with(b"#")).find_map(|line| {
        let mut fields = line.split(u8::is_ascii_whitespace).filter(|field| !field.is_empty());
        let (_source, target) = (fields.next()?, fields.next()?);
        // Paths compare by their parts, so a slash at the end makes no difference.
        let is_it = unescape(target) == mountpoint;
        let _fs_type = fields.next();
        is_it.then(|| String::from_utf8_lossy(fields.next().unwrap_or_default()).into_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_of_a_mountpoint_is_found() {
        let table = b"# /a /mnt/img caifs no\n\n/dev/sda1 / ext4\nhttps://h/x\t/mnt/img/ caifs  _netdev,nofail 0 0\n\
                      y /mnt/a\\040b\\134 caifs ro#1\nz /mnt/img caifs second\n";
        for (mountpoint, options) in
            [("/mnt/img", Some("_netdev,nofail")), (r"/mnt/a b\", Some("ro#1")), ("/", Some("")), ("/mnt/im", None)]
        {
            assert_eq!(find(table, Path::new(mountpoint)).as_deref(), options, "{mountpoint}");
        }
    }
}
