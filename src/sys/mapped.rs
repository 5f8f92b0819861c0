//! A file in memory, read-only, that stays readable when somebody truncates it.
//!
//! A page of a mapping that lies behind the end of its file raises SIGBUS when touched, which would end a mount because
//! somebody shortened an index. A handler, installed with the first mapping, puts zeros there instead; parsers of the
//! mapped formats refuse zeros. A SIGBUS of any other address ends the process as it would have without us.
//!
//! * [`MappedFile`] is the mapping, or the file's bytes when it cannot be mapped.
//! * [`Registry`] tells the handler which addresses are ours, without locks.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// How many mappings the handler can know. A mount of a directory of indexes has 256 of them open, each perhaps with a table, and those
/// that are in use while they are closed; what does not fit is read.
const MAX_MAPPINGS: usize = 1024;

/// How many pages of a mapping are replaced one by one. Each may cost the kernel an area of the 65,530 a process can have,
/// so a mapping that keeps faulting gets zeros from the page to its end in one piece.
const MAX_SINGLE_PAGES: usize = 1024;

/// The content of a regular file as it was long when opened, read-only, without reading it. Bytes that the file has lost
/// since, or that the disk does not give, are zeros. Somebody who overwrites the file changes what is seen here, so the
/// reader has to check what it finds, as with any input.
#[derive(Debug)]
pub struct MappedFile(Bytes);

#[derive(Debug)]
enum Bytes {
    Mapped(Mapping),
    Read(Vec<u8>),
}

impl MappedFile {
    /// Maps the file at `path`.
    ///
    /// # Errors
    /// What open(2) and mmap(2) answer; `InvalidInput` when it is not a regular file.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::new(&File::open(path)?)
    }

    /// Maps an open file. The file may be closed afterwards.
    ///
    /// # Errors
    /// What mmap(2) answers, or read(2) where a file cannot be mapped; `InvalidInput` when it is not a regular file.
    pub fn new(file: &File) -> io::Result<Self> {
        Self::with_registry(file, &REGISTRY)
    }

    /// Bytes that it holds in memory: none when it is mapped, since the kernel can drop and read pages of a file.
    pub fn held_bytes(&self) -> usize {
        match &self.0 {
            Bytes::Mapped(_) => 0,
            Bytes::Read(bytes) => bytes.len(),
        }
    }

    fn with_registry(file: &File, registry: &'static Registry) -> io::Result<Self> {
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        let len = usize::try_from(metadata.len()).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
        let Some(len) = NonZeroUsize::new(len) else { return Ok(Self(Bytes::Read(Vec::new()))) };
        install_handler()?;
        match Mapping::new(file, len, registry)? {
            Some(mapping) => Ok(Self(Bytes::Mapped(mapping))),
            None => Ok(Self(Bytes::Read(read_whole(file, len.get())?))),
        }
    }
}

impl AsRef<[u8]> for MappedFile {
    fn as_ref(&self) -> &[u8] {
        match &self.0 {
            Bytes::Mapped(mapping) => mapping.bytes(),
            Bytes::Read(bytes) => bytes,
        }
    }
}

fn read_whole(file: &File, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(len).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
    bytes.resize(len, 0);
    let mut done = 0;
    while done < len {
        match file.read_at(&mut bytes[done..], done as u64) {
            // Shortened meanwhile: the rest stays zeros, as in a mapping.
            Ok(0) => break,
            Ok(n) => done += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(bytes)
}

/// A registered mapping; `start` is the address of `len` mapped bytes.
#[derive(Debug)]
struct Mapping {
    start: NonNull<u8>,
    len: NonZeroUsize,
    slot: &'static Slot,
}

// SAFETY: the mapping is read-only memory of the process, valid in every thread until the one owner drops it.
unsafe impl Send for Mapping {}
// SAFETY: as above; shared use only reads.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// `None` when the registry is full or the file system cannot map files.
    fn new(file: &File, len: NonZeroUsize, registry: &'static Registry) -> io::Result<Option<Self>> {
        let Some(slot) = registry.claim() else { return Ok(None) };
        let nowhere = std::ptr::null_mut();
        // SAFETY: the kernel chooses the address, so no memory in use is replaced.
        let address = unsafe { libc::mmap(nowhere, len.get(), libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        let mapped = if address == libc::MAP_FAILED { None } else { NonNull::new(address.cast::<u8>()) };
        let Some(start) = mapped else {
            let error = io::Error::last_os_error();
            slot.release();
            return if error.raw_os_error() == Some(libc::ENODEV) { Ok(None) } else { Err(error) };
        };
        let address = start.as_ptr() as usize;
        slot.publish(address..address + len.get().next_multiple_of(page_size()));
        Ok(Some(Self { start, len, slot }))
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: `len` bytes from `start` are mapped readable until `self` is dropped, and a page that its file has lost
        // is replaced by the handler. Bytes are plain data: whatever another process writes to the file, they are valid
        // `u8`s, and all readers parse them as untrusted input.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len.get()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // The handler must not touch the addresses once they may belong to something else.
        self.slot.withdraw();
        // SAFETY: we own these pages, and no slice of them outlives `self`.
        let unmapped = unsafe { libc::munmap(self.start.as_ptr().cast(), self.len.get()) };
        debug_assert_eq!(unmapped, 0, "munmap of a whole mapping cannot fail");
        self.slot.release();
    }
}

/// The address ranges that the handler may repair. Readers take no lock.
#[derive(Debug)]
struct Registry([Slot; MAX_MAPPINGS]);

static REGISTRY: Registry = Registry::new();

/// One range. Written by its owner only, in the order of the methods; `start` is 0 while there is nothing to repair.
#[derive(Debug)]
struct Slot {
    claimed: AtomicBool,
    start: AtomicUsize,
    end: AtomicUsize,
    n_repaired: AtomicUsize,
}

impl Registry {
    const fn new() -> Self {
        Self([const { Slot::new() }; MAX_MAPPINGS])
    }

    fn claim(&self) -> Option<&Slot> {
        self.0.iter().find(|slot| !slot.claimed.load(Ordering::SeqCst) && !slot.claimed.swap(true, Ordering::SeqCst))
    }

    /// What to replace by zeros when `address` faulted: a range of whole pages; `None` when the address is not ours.
    fn repair(&self, address: usize, page_size: usize) -> Option<Range<usize>> {
        let (slot, range) =
            self.0.iter().find_map(|slot| Some((slot, slot.range()?)).filter(|(_, r)| r.contains(&address)))?;
        let page = address & !(page_size - 1);
        let single = slot.n_repaired.fetch_add(1, Ordering::Relaxed) < MAX_SINGLE_PAGES;
        Some(page..if single { page + page_size } else { range.end })
    }
}

impl Slot {
    const fn new() -> Self {
        Self {
            claimed: AtomicBool::new(false),
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            n_repaired: AtomicUsize::new(0),
        }
    }

    fn publish(&self, range: Range<usize>) {
        self.n_repaired.store(0, Ordering::SeqCst);
        self.end.store(range.end, Ordering::SeqCst);
        self.start.store(range.start, Ordering::SeqCst);
    }

    fn withdraw(&self) {
        self.start.store(0, Ordering::SeqCst);
    }

    fn release(&self) {
        self.claimed.store(false, Ordering::SeqCst);
    }

    fn range(&self) -> Option<Range<usize>> {
        let start = self.start.load(Ordering::SeqCst);
        let end = self.end.load(Ordering::SeqCst);
        // Both numbers are of the same mapping only if the start is still there after the end was read.
        let same = start != 0 && self.start.load(Ordering::SeqCst) == start;
        same.then_some(start..end)
    }
}

static PAGE_SIZE: AtomicUsize = AtomicUsize::new(0);

fn page_size() -> usize {
    PAGE_SIZE.load(Ordering::SeqCst)
}

fn install_handler() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), Errno>> = OnceLock::new();
    let installed = INSTALLED.get_or_init(|| {
        let page_size = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)?;
        let page_size = page_size.and_then(|size| usize::try_from(size).ok()).ok_or(Errno::EINVAL)?;
        PAGE_SIZE.store(page_size, Ordering::SeqCst);
        let flags = SaFlags::SA_SIGINFO | SaFlags::SA_ONSTACK;
        let action = SigAction::new(SigHandler::SigAction(on_sigbus), flags, SigSet::empty());
        // SAFETY: the handler uses atomics and the system calls mmap, sigaction and raise, and keeps errno.
        unsafe { sigaction(Signal::SIGBUS, &action) }.map(drop)
    });
    Ok((*installed)?)
}

extern "C" fn on_sigbus(_signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    let saved = Errno::last_raw();
    // SAFETY: the kernel passes a valid siginfo_t to an SA_SIGINFO handler.
    let (address, code) = unsafe { ((*info).si_addr() as usize, (*info).si_code) };
    // A positive code comes from the kernel, with an address; others are signals that somebody sent.
    if code <= 0 || !put_zeros(address) {
        let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
        // SAFETY: restoring the default runs no code of ours; back from here the access faults again and ends the process.
        let _ = unsafe { sigaction(Signal::SIGBUS, &default) };
        if code <= 0 {
            let _ = nix::sys::signal::raise(Signal::SIGBUS);
        }
    }
    Errno::set_raw(saved);
}

fn put_zeros(address: usize) -> bool {
    let Some(range) = REGISTRY.repair(address, page_size()) else { return false };
    let (Some(start), Some(len)) = (NonZeroUsize::new(range.start), NonZeroUsize::new(range.len())) else {
        return false;
    };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    // SAFETY: the pages belong to a registered mapping, whose owner is reading them right now and so cannot have dropped
    // it; zeros replace pages that cannot be read anyway.
    let mapped = unsafe { libc::mmap(start.get() as *mut libc::c_void, len.get(), libc::PROT_READ, flags, -1, 0) };
    mapped != libc::MAP_FAILED
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::io::Write;

    fn file_of(n_pages: usize) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7u8; n_pages * 4096]).unwrap();
        file
    }

    #[test]
    fn a_mapping_shows_the_file_and_zeros_once_it_is_truncated() {
        let file = file_of(8);
        let mapped = MappedFile::new(&file).unwrap();
        assert!(matches!(mapped.0, Bytes::Mapped(_)));
        assert!(mapped.as_ref().iter().all(|&byte| byte == 7));
        file.set_len(4096 + 10).unwrap();
        let bytes = mapped.as_ref();
        assert_eq!(bytes.len(), 8 * 4096);
        assert!(bytes[..4106].iter().all(|&byte| byte == 7), "what is left of the file stays readable");
        assert!(bytes[4106..].iter().all(|&byte| byte == 0), "what is gone reads as zeros");
    }

    #[test]
    fn many_lost_pages_touched_backwards_by_two_threads_are_zeros() {
        let n_pages = 3 * MAX_SINGLE_PAGES;
        let file = file_of(n_pages);
        let mapped = MappedFile::new(&file).unwrap();
        file.set_len(0).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    // Every second page, so that the kernel cannot join the replaced ones.
                    for page in (0..n_pages).rev().step_by(2) {
                        assert_eq!(mapped.as_ref()[page * 4096], 0);
                    }
                });
            }
        });
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        assert!(maps.lines().count() < 2 * MAX_SINGLE_PAGES + 1000, "areas of the process: {}", maps.lines().count());
    }

    #[test]
    fn when_the_registry_is_full_the_file_is_read() {
        static FULL: Registry = Registry::new();
        let file = file_of(1);
        let held: Vec<_> = (0..MAX_MAPPINGS).map(|_| MappedFile::with_registry(&file, &FULL).unwrap()).collect();
        assert!(held.iter().all(|mapped| matches!(mapped.0, Bytes::Mapped(_))));
        let extra = MappedFile::with_registry(&file, &FULL).unwrap();
        assert!(matches!(extra.0, Bytes::Read(_)));
        assert_eq!(extra.as_ref(), held[0].as_ref());
        assert_eq!((extra.held_bytes(), held[0].held_bytes()), (4096, 0), "what is read counts as memory");
        drop(held);
        assert!(matches!(MappedFile::with_registry(&file, &FULL).unwrap().0, Bytes::Mapped(_)), "slots come back");
    }

    #[test]
    fn empty_files_are_empty_and_directories_refused() {
        assert!(MappedFile::new(&tempfile::tempfile().unwrap()).unwrap().as_ref().is_empty());
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(MappedFile::open(directory.path()).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(MappedFile::open(&directory.path().join("x")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn only_registered_addresses_are_repaired() {
        let registry = Registry::new();
        assert_eq!(registry.repair(0x5000, 4096), None);
        registry.0[3].publish(0x4000..0x9000);
        assert_eq!(registry.repair(0x5123, 4096), Some(0x5000..0x6000));
        assert_eq!(registry.repair(0x9000, 4096), None);
        registry.0[3].n_repaired.store(MAX_SINGLE_PAGES, Ordering::Relaxed);
        assert_eq!(registry.repair(0x5123, 4096), Some(0x5000..0x9000));
        registry.0[3].withdraw();
        assert_eq!(registry.repair(0x5123, 4096), None);
    }
}
