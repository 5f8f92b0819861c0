//! What lies in a directory of the server.

use std::path::Path;

use super::pool::Done;
use super::session::{Fault, Session};
use super::{SftpStore, info};
use crate::store::StoreError;
use crate::store::files::Listed;
use crate::store::listing::{MAX_LISTED, is_name};

impl SftpStore {
    /// The names in a directory; `None` when there is no such directory. A symlink to a file is that file, one to a directory is not
    /// there, since it may lead to one above.
    pub(super) async fn list_directory(&self, directory: &str) -> Result<Option<Vec<Listed>>, StoreError> {
        let path = match directory {
            "" if self.directory.is_empty() => "/".to_owned(),
            "" => self.directory.clone(),
            below => self.path(below),
        };
        self.ask(directory, move |session| read_directory(session, &path).map(Done::with)).await
    }
}

fn read_directory(session: &Session, path: &str) -> Result<Option<Vec<Listed>>, Fault> {
    let mut handle = match session.sftp().opendir(Path::new(path)).map_err(Fault::from) {
        Ok(handle) => handle,
        Err(fault) if fault.is_missing() => return Ok(None),
        Err(fault) => return Err(fault),
    };
    let mut listed = Vec::new();
    loop {
        let (name, mut stat) = match handle.readdir() {
            Ok(entry) => entry,
            Err(error) if error.code() == END_OF_DIRECTORY => return Ok(Some(listed)),
            Err(error) => return Err(Fault::from(error)),
        };
        // What has no name in UTF-8 cannot be asked for, either.
        let Some(name) = name.to_str().filter(|name| is_name(name)) else { continue };
        if stat.file_type() == ssh2::FileType::Symlink {
            match session.stat(&format!("{}/{name}", path.trim_end_matches('/'))) {
                Ok(Some(target)) if target.is_file() => stat = target,
                Ok(_) => continue,
                Err(fault) if fault.keeps_session() => continue,
                Err(fault) => return Err(fault),
            }
        }
        if listed.len() == MAX_LISTED {
            return Err(Fault::Unfit(format!("it has more than {MAX_LISTED} names")));
        }
        let name = name.to_owned();
        if stat.is_dir() {
            listed.push(Listed { name, is_directory: true, size: None, mtime: None, version: None });
        } else if let Ok(info) = info(&stat) {
            listed.push(Listed {
                name,
                is_directory: false,
                size: Some(info.size),
                mtime: info.mtime,
                version: info.version,
            });
        }
    }
}

/// What libssh2's binding says behind the last name (LIBSSH2_ERROR_FILE).
const END_OF_DIRECTORY: ssh2::ErrorCode = ssh2::ErrorCode::Session(-16);
