//! Host memory: files mapped for reading, and buffers whose pages exist from the start.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// A file mapped for reading.
#[derive(Debug)]
pub struct MappedFile {
    map: memmap2::Mmap,
}

impl MappedFile {
    /// Maps the whole of the file at `path`.
    ///
    /// # Errors
    /// The file cannot be opened, measured or mapped.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        // SAFETY: the map is private and read-only. A file changed by another process while mapped shows as
        // other bytes (weights are plain numbers, every pattern is valid) and, if cut short, as SIGBUS: the
        // checkpoint must not be edited while in use, which the user guide states.
        let map = unsafe { memmap2::MmapOptions::new().map(&file)? };
        Ok(Self { map })
    }

    /// Asks that what is read from now on comes in large pages; those that the system has cached stay as they are. For files
    /// that are read again and again: of large pages memory is read twice as fast. The system may decline.
    pub fn use_large_pages(&self) {
        use_large_pages(&self.map);
    }

    /// Size in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether the file is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// The bytes of `range`, or `None` outside the file.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Option<Source<'_>> {
        self.map.get(range).map(|bytes| Source { bytes, map: Some(&self.map) })
    }
}

/// Bytes of a tensor to be read once: from a mapped file, whose pages can be given back, or from memory.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    bytes: &'a [u8],
    /// The whole mapping, if the bytes are part of one.
    map: Option<&'a [u8]>,
}

impl<'a> Source<'a> {
    /// Bytes that are in memory anyway.
    #[must_use]
    pub const fn memory(bytes: &'a [u8]) -> Self {
        Self { bytes, map: None }
    }

    /// The bytes.
    #[must_use]
    pub const fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Whether the bytes are pages of a file.
    #[must_use]
    pub const fn is_mapped(&self) -> bool {
        self.map.is_some()
    }

    /// A part of the bytes, or `None` outside them.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Option<Self> {
        self.bytes.get(range).map(|bytes| Self { bytes, map: self.map })
    }

    /// Asks for the pages that are not in memory, and does not wait for them. The system may decline.
    pub(crate) fn will_need(&self) {
        if self.is_mapped() {
            ask_for_pages(self.bytes);
        }
    }

    /// Gives the pages back to the system after the bytes have been read, with those around them that were mapped
    /// along. They can be read again, from the file. Does nothing for bytes in memory.
    pub fn release(&self) {
        if let Some(map) = self.map {
            release_pages(map, self.bytes);
        }
    }
}

/// A page fault maps the pages around it too; they are released in pieces of this size and alignment.
#[cfg(unix)]
const RELEASED_BYTES: usize = 2 << 20;

#[cfg(unix)]
fn release_pages(map: &[u8], bytes: &[u8]) {
    let map = map.as_ptr_range();
    let bytes = bytes.as_ptr_range();
    // The mapping begins on a page, and so does every piece within it.
    let start = (bytes.start.addr() / RELEASED_BYTES * RELEASED_BYTES).max(map.start.addr());
    let end = bytes.end.addr().next_multiple_of(RELEASED_BYTES).min(map.end.addr());
    let first = map.start.cast_mut().wrapping_add(start - map.start.addr());
    // SAFETY: the range lies within a live private read-only file mapping (only `MappedFile::slice` sets `map`, to
    // the whole of it) and starts on a page; dropping such pages only means that the next read, by whichever
    // thread, fetches the same bytes from the file.
    let done = unsafe { rustix::mm::madvise(first.cast(), end - start, rustix::mm::Advice::LinuxDontNeed) };
    debug_assert!(done.is_ok(), "madvise refused a range of a live mapping: {done:?}");
}

#[cfg(not(unix))]
fn release_pages(_map: &[u8], _bytes: &[u8]) {}

/// What is worth reading ahead.
const AHEAD_BYTES: usize = 1 << 20;

/// Bytes that will be read soon: pages of a file are brought in meanwhile. The system may decline.
pub(crate) fn will_need(bytes: &[u8]) {
    if bytes.len() >= AHEAD_BYTES {
        ask_for_pages(bytes);
    }
}

fn ask_for_pages(bytes: &[u8]) {
    /// Of more at once than a device reads by one request, Linux brings in only the beginning.
    #[cfg(unix)]
    const PIECE: usize = 128 << 10;
    #[cfg(unix)]
    for piece in bytes.chunks(PIECE) {
        const PAGE: usize = 4096;
        let before = piece.as_ptr().addr() % PAGE;
        let first = piece.as_ptr().wrapping_sub(before).cast_mut();
        // SAFETY: pages of live bytes; reading them in changes none.
        let _declined =
            unsafe { rustix::mm::madvise(first.cast(), before + piece.len(), rustix::mm::Advice::WillNeed) };
    }
    #[cfg(not(unix))]
    let _ = bytes;
}

/// Asks for large pages where whole ones fit: without them, memory is read at half its speed. The system may decline.
fn use_large_pages<T>(data: &[T]) {
    #[cfg(target_os = "linux")]
    {
        const PAGE: usize = 4096;
        const LARGE: usize = 2 << 20;
        let range = data.as_ptr_range();
        let start = range.start.addr().next_multiple_of(PAGE);
        let end = range.end.addr() / PAGE * PAGE;
        if end.saturating_sub(start) >= LARGE {
            let first = range.start.cast_mut().cast::<u8>().wrapping_add(start - range.start.addr());
            // SAFETY: whole pages of a live slice; the advice changes no byte.
            let _declined =
                unsafe { rustix::mm::madvise(first.cast(), end - start, rustix::mm::Advice::LinuxHugepage) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = data;
}

/// `len` zeroed elements whose pages exist from now on, so that memory planned is memory held.
#[must_use]
pub fn resident<T: Copy + Default>(len: usize) -> Vec<T> {
    let mut data = vec![T::default(); len];
    use_large_pages(&data);
    touch(&mut data);
    data
}

/// Writes to every page: a zeroed allocation may hand out pages that do not exist yet.
fn touch<T: Default>(data: &mut [T]) {
    const PAGE: usize = 4096;
    for element in data.iter_mut().step_by((PAGE / size_of::<T>().max(1)).max(1)) {
        *std::hint::black_box(element) = T::default();
    }
    if let Some(last) = data.last_mut() {
        *std::hint::black_box(last) = T::default();
    }
}

/// Bytes of a cache line.
pub(crate) const LINE: usize = 64;

/// Weights as a backend lays them out: bytes that begin on a cache line, in memory or in a mapped file. Clones and
/// slices share them.
#[derive(Clone, Debug)]
pub struct Packed {
    memory: PackedMemory,
    range: Range<usize>,
}

#[derive(Clone, Debug)]
enum PackedMemory {
    Own(Arc<Aligned<u8>>),
    File(Arc<MappedFile>),
}

impl Packed {
    /// `len` bytes of memory, filled by `fill`.
    ///
    /// # Errors
    /// Those of `fill`.
    pub fn filled<E>(len: usize, fill: impl FnOnce(&mut [u8]) -> Result<(), E>) -> Result<Self, E> {
        let mut bytes = Aligned::zeroed(len);
        use_large_pages(&bytes);
        fill(&mut bytes)?;
        Ok(Self { memory: PackedMemory::Own(Arc::new(bytes)), range: 0..len })
    }

    /// Bytes of a mapped file, or `None` where they lie outside it or do not begin on a cache line.
    #[must_use]
    pub fn mapped(file: &Arc<MappedFile>, range: Range<usize>) -> Option<Self> {
        let fits = range.start.is_multiple_of(LINE) && file.slice(range.clone()).is_some();
        fits.then(|| Self { memory: PackedMemory::File(Arc::clone(file)), range })
    }

    /// The same, after pages of a file have been brought in: what is planned as held is held from now on.
    #[must_use]
    pub fn populated(self) -> Self {
        #[cfg(target_os = "linux")]
        if let PackedMemory::File(file) = &self.memory {
            const PAGE: usize = 4096;
            let map = file.map.as_ptr();
            let start = self.range.start / PAGE * PAGE;
            let first = map.wrapping_add(start).cast_mut();
            // SAFETY: pages of a live read-only mapping, from a page's beginning on; reading them in changes no byte.
            let _read_when_used = unsafe {
                rustix::mm::madvise(first.cast(), self.range.end - start, rustix::mm::Advice::LinuxPopulateRead)
            };
        }
        self
    }

    /// Gives pages of a file back to the system after they have been read; see [`Source::release`].
    pub(crate) fn release(&self) {
        if let PackedMemory::File(file) = &self.memory {
            Source { bytes: self, map: Some(&file.map) }.release();
        }
    }

    /// A part of the bytes.
    ///
    /// # Panics
    /// If it lies outside them.
    #[must_use]
    pub fn slice(&self, part: Range<usize>) -> Self {
        let range = self.range.start + part.start..self.range.start + part.end;
        assert!(range.start <= range.end && range.end <= self.range.end, "a part lies within its bytes");
        Self { memory: self.memory.clone(), range }
    }
}

impl std::ops::Deref for Packed {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        match &self.memory {
            PackedMemory::Own(bytes) => &bytes[self.range.clone()],
            PackedMemory::File(file) => &file.map[self.range.clone()],
        }
    }
}

/// A number, or an array of numbers, of which every pattern of bits is a value.
///
/// # Safety
/// No padding, no pattern that is not a value, alignment of at most a cache line.
pub(crate) unsafe trait Plain: Copy {}
// SAFETY: numbers.
unsafe impl Plain for u8 {}
// SAFETY: numbers.
unsafe impl Plain for u16 {}
// SAFETY: numbers.
unsafe impl Plain for u32 {}
// SAFETY: numbers.
unsafe impl Plain for f32 {}
// SAFETY: arrays of such have neither padding nor other patterns.
unsafe impl<T: Plain, const N: usize> Plain for [T; N] {}

/// Bytes as numbers in the machine's order. The bytes that do not fill an element are left out.
///
/// # Panics
/// If the bytes do not begin at a multiple of the type's alignment.
#[inline(always)]
pub(crate) fn view<T: Plain>(bytes: &[u8]) -> &[T] {
    assert!(bytes.as_ptr().addr().is_multiple_of(align_of::<T>()), "numbers are aligned");
    // Of elements without bytes there are as many as one likes.
    let len = bytes.len().checked_div(size_of::<T>()).unwrap_or(usize::MAX);
    // SAFETY: aligned, as asserted; `len` elements lie within the bytes; every pattern is a value of a plain type.
    unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), len) }
}

/// As [`view`], for writing.
#[inline(always)]
pub(crate) fn view_mut<T: Plain>(bytes: &mut [u8]) -> &mut [T] {
    assert!(bytes.as_ptr().addr().is_multiple_of(align_of::<T>()), "numbers are aligned");
    let len = bytes.len().checked_div(size_of::<T>()).unwrap_or(usize::MAX);
    // SAFETY: as in `view`, and whatever is written is a value of bytes.
    unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast(), len) }
}

/// A slice of numbers that begins on a cache line, so that no vector of 64 bytes is read from two lines.
#[derive(Debug)]
pub struct Aligned<T> {
    data: Vec<T>,
    start: usize,
    len: usize,
}

impl<T: Copy + Default> Aligned<T> {
    /// `len` zeros, whose pages come into being when they are first written.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        let data = vec![T::default(); len + LINE / size_of::<T>()];
        let start = data.as_ptr().align_offset(LINE).min(LINE / size_of::<T>());
        Self { data, start, len }
    }

    /// `len` zeros whose pages exist from now on, large ones where the system has them.
    pub(crate) fn resident(len: usize) -> Self {
        let mut this = Self::zeroed(len);
        use_large_pages(&this.data);
        touch(&mut this.data);
        this
    }

    /// Bytes of the numbers.
    pub(crate) const fn bytes(&self) -> u64 {
        (self.len * size_of::<T>()) as u64
    }
}

impl<T> std::ops::Deref for Aligned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.data[self.start..self.start + self.len]
    }
}

impl<T> std::ops::DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.data[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_begin_on_a_cache_line() {
        for len in [0, 1, 1000] {
            let (small, large) = (Aligned::<u8>::zeroed(len), Aligned::<f32>::resident(len));
            assert_eq!((small.len(), large.len()), (len, len));
            assert_eq!((small.as_ptr().addr() % LINE, large.as_ptr().addr() % LINE), (0, 0));
            assert_eq!(large.bytes(), 4 * len as u64);
        }
    }

    #[test]
    fn released_bytes_can_be_read_again() {
        let path = std::env::temp_dir().join(format!("phalanx-mapped-{}", std::process::id()));
        let content: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &content).unwrap();
        let file = MappedFile::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(file.len(), content.len());
        for range in [0..100_000, 5..7, 99_999..100_000, 4096..8192, 50..50, 100_000..100_000] {
            let source = file.slice(range.clone()).unwrap();
            assert!(source.is_mapped());
            assert_eq!(source.bytes(), &content[range.clone()]);
            source.release();
            source.will_need();
            assert_eq!(source.bytes(), &content[range]);
        }
        assert!(file.slice(0..100_001).is_none());
        assert!(file.slice(10..20).unwrap().slice(5..11).is_none());
    }

    #[test]
    fn an_empty_file_has_no_bytes() {
        let path = std::env::temp_dir().join(format!("phalanx-empty-{}", std::process::id()));
        std::fs::write(&path, []).unwrap();
        let file = MappedFile::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(file.is_empty());
        let source = file.slice(0..0).unwrap();
        source.release();
        assert_eq!(source.bytes(), []);
    }
}
