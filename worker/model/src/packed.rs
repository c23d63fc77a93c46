//! Weights packed once: a file beside the checkpoint (or in a cache) that holds every matrix as the kernels read it, and
//! is mapped by every later start.
//!
//! The file is a header and then one section for each dense matrix and each (layer, expert), in an order that follows
//! from the model's shape alone. So it does not depend on rank or layout: any worker of the machine finds any expert in
//! it, and all of them share its pages. It is written under another name and renamed when it is whole; a file whose
//! header is not the expected one, to the byte, is not used.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use phalanx_kernels::memory::{Aligned, MappedFile, Packed, Source};
use phalanx_kernels::{Backend, ReadAhead};
use phalanx_proto::{ExpertId, LayerIdx, ModelConfig};

use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::error::LoadError;
use crate::weights::{Matrix, OnProgress, expert_shape, expert_source};

/// Bytes before the first section; sections begin at multiples of it, as pages do.
const PAGE: usize = 4096;
/// Bytes of a write. Pages written together, at a multiple of their size, can be kept and mapped as one large page.
const LARGE_PAGE: usize = 2 << 20;
/// How long to sleep while another process packs the same weights.
const LOCK_POLL: Duration = Duration::from_millis(200);

/// How long another process may write nothing before it is no longer waited for; the last sync is one such time.
const STALLED: Duration = Duration::from_secs(600);

/// What a section holds.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Section {
    /// A dense matrix, by its first tensor's stem.
    Dense(String),
    /// An expert of a layer.
    Expert(LayerIdx, ExpertId),
}

/// Why weights could not be packed into a file.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// The file cannot be written.
    #[error("cannot write {path}: {error}")]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        error: io::Error,
    },
    /// The checkpoint is at fault.
    #[error(transparent)]
    Load(#[from] LoadError),
}

/// Where weights come from.
#[derive(Clone, Copy, Debug)]
pub struct Stored<'a> {
    /// The checkpoint.
    pub checkpoint: &'a Checkpoint,
    /// Its matrices, packed.
    pub packed: Option<&'a PackedFile>,
}

/// A mapped file of packed weights.
#[derive(Debug)]
pub struct PackedFile {
    file: Arc<MappedFile>,
    plan: Plan,
}

/// What the file of a checkpoint's packed weights looks like.
#[derive(Debug)]
struct Plan {
    header: Vec<u8>,
    sections: BTreeMap<Section, Range<usize>>,
    len: usize,
}

impl Plan {
    fn new<B: Backend>(backend: &mut B, checkpoint: &Checkpoint) -> Result<Self, LoadError> {
        let config = checkpoint.config();
        let mut this = Self { header: Vec::new(), sections: BTreeMap::new(), len: PAGE };
        let experts = backend.experts(0, expert_shape(config));
        let bytes = backend.expert_bytes(&experts);
        for (layer, expert) in all_experts(config) {
            this.add(Section::Expert(layer, expert), bytes);
        }
        for matrix in Matrix::all(config) {
            let bytes = backend.dense_bytes(matrix.used, matrix.rows(checkpoint)?, matrix.cols as usize);
            this.add(Section::Dense(matrix.name().to_owned()), bytes);
        }
        let identity: String = checkpoint.identity().iter().map(|byte| format!("{byte:02x}")).collect();
        this.header = format!("phalanx packed weights\n{}\n{identity}\n{}\n", backend.packing(), this.len).into_bytes();
        this.header.resize(PAGE, 0);
        Ok(this)
    }

    fn add(&mut self, section: Section, bytes: usize) {
        self.sections.insert(section, self.len..self.len + bytes);
        self.len = (self.len + bytes).next_multiple_of(PAGE);
    }

    /// Maps the file if it is what this plan says, to the byte of the header.
    fn open(self, path: &Path) -> Result<PackedFile, Self> {
        let Ok(file) = MappedFile::open(path) else { return Err(self) };
        file.use_large_pages();
        let same =
            file.len() == self.len && file.slice(0..PAGE).is_some_and(|header| header.bytes() == &self.header[..]);
        if same { Ok(PackedFile { file: Arc::new(file), plan: self }) } else { Err(self) }
    }

    /// Packs everything into `out`, section by section.
    fn write<B: Backend>(
        &self,
        backend: &mut B,
        checkpoint: &Checkpoint,
        out: &mut impl Write,
        on_progress: OnProgress<'_>,
        broken: &impl Fn(io::Error) -> PackError,
    ) -> Result<(), PackError> {
        let config = checkpoint.config();
        let total = self.len as u64;
        out.write_all(&self.header).map_err(broken)?;
        let largest = self.sections.values().map(|range| range.len().next_multiple_of(PAGE)).max().unwrap_or(0);
        let mut buffer = Aligned::zeroed(largest);
        let experts = backend.experts(0, expert_shape(config));
        let read = read_by_packing(checkpoint).map_err(LoadError::from)?;
        ReadAhead::during(&read, |ahead| {
            for (layer, expert) in all_experts(config) {
                let range = &self.sections[&Section::Expert(layer, expert)];
                let source = expert_source(checkpoint, layer, expert).map_err(LoadError::from)?;
                ahead.using(&source.parts());
                let packed = backend.pack_expert(&experts, &source, &mut buffer[..range.len()]);
                packed.map_err(|error| LoadError::Expert { layer, expert, error })?;
                put(out, &mut buffer, range.len()).map_err(broken)?;
                on_progress(range.end as u64, total);
            }
            for matrix in Matrix::all(config) {
                let range = &self.sections[&Section::Dense(matrix.name().to_owned())];
                let stack = matrix.stack(checkpoint).map_err(LoadError::from)?;
                ahead.using(&matrix.sources(checkpoint).map_err(LoadError::from)?);
                let packed = backend.pack_dense(matrix.used, matrix.cols as usize, &stack, &mut buffer[..range.len()]);
                packed.map_err(LoadError::from)?;
                put(out, &mut buffer, range.len()).map_err(broken)?;
                on_progress(range.end as u64, total);
            }
            Ok(())
        })
    }
}

/// What is read of a checkpoint to pack all of it, in that order.
fn read_by_packing(checkpoint: &Checkpoint) -> Result<Vec<Source<'_>>, CheckpointError> {
    let config = checkpoint.config();
    let mut read = Vec::new();
    for (layer, expert) in all_experts(config) {
        read.extend(expert_source(checkpoint, layer, expert)?.parts());
    }
    for matrix in Matrix::all(config) {
        read.extend(matrix.sources(checkpoint)?);
    }
    Ok(read)
}

/// The name under which the file at `path` is written.
fn unfinished(path: &Path) -> PathBuf {
    path.with_extension("part")
}

/// Opens and locks the unfinished file at `path`. The lock ends with the process, however that ends. `waiting` hears the
/// bytes that its holder has written; one that stops writing is not waited for.
fn lock(path: &Path, mut waiting: impl FnMut(u64)) -> io::Result<File> {
    let file = File::options().write(true).create(true).truncate(false).open(path)?;
    let (mut seen, mut since) = (0, Instant::now());
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(fs::TryLockError::WouldBlock) => std::thread::sleep(LOCK_POLL),
            Err(fs::TryLockError::Error(error)) => return Err(error),
        }
        let written = file.metadata()?.len();
        if written != seen {
            (seen, since) = (written, Instant::now());
        } else if since.elapsed() > STALLED {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "another process has the file and does not get on"));
        }
        waiting(written);
    }
}

/// Whether the file at `path` is this one.
#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let id = |metadata: &fs::Metadata| (metadata.dev(), metadata.ino());
    matches!((file.metadata(), fs::metadata(path)), (Ok(a), Ok(b)) if id(&a) == id(&b))
}

#[cfg(not(unix))]
fn is_at(_file: &File, _path: &Path) -> bool {
    true
}

/// Writes whole large pages.
struct LargePages<'a> {
    file: &'a mut File,
    page: Vec<u8>,
}

impl<'a> LargePages<'a> {
    fn new(file: &'a mut File) -> Self {
        Self { file, page: Vec::with_capacity(LARGE_PAGE) }
    }
}

impl Write for LargePages<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(LARGE_PAGE - self.page.len());
        self.page.extend_from_slice(&bytes[..taken]);
        if self.page.len() == LARGE_PAGE {
            self.flush()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.write_all(&self.page)?;
        self.page.clear();
        Ok(())
    }
}

/// Writes a section and zeros up to the next.
fn put(out: &mut impl Write, buffer: &mut [u8], len: usize) -> io::Result<()> {
    let end = len.next_multiple_of(PAGE);
    buffer[len..end].fill(0);
    out.write_all(&buffer[..end])
}

/// Every expert of every layer, in order.
fn all_experts(config: &ModelConfig) -> impl Iterator<Item = (LayerIdx, ExpertId)> + use<> {
    let (layers, experts) = (config.layers.len() as u32, config.experts);
    (0..layers).flat_map(move |layer| (0..experts).map(move |expert| (LayerIdx(layer), ExpertId(expert))))
}

impl PackedFile {
    /// Bytes that the file of a checkpoint's packed weights has.
    ///
    /// # Errors
    /// The checkpoint is at fault.
    pub fn bytes_of<B: Backend>(backend: &mut B, checkpoint: &Checkpoint) -> Result<u64, LoadError> {
        Ok(Plan::new(backend, checkpoint)?.len as u64)
    }

    /// Bytes of the disk that an unfinished file for `path` takes: they are there for the finished one.
    #[must_use]
    pub fn unfinished_bytes(path: &Path) -> u64 {
        #[cfg(unix)]
        return fs::metadata(unfinished(path)).map_or(0, |file| std::os::unix::fs::MetadataExt::blocks(&file) * 512);
        #[cfg(not(unix))]
        return fs::metadata(unfinished(path)).map_or(0, |file| file.len());
    }

    /// Maps the file at `path` if it holds this checkpoint as this backend packs it.
    ///
    /// # Errors
    /// The checkpoint is at fault.
    pub fn open<B: Backend>(backend: &mut B, checkpoint: &Checkpoint, path: &Path) -> Result<Option<Self>, LoadError> {
        Ok(Plan::new(backend, checkpoint)?.open(path).ok())
    }

    /// Packs a checkpoint into the file at `path` and maps it. Of several processes that do so one packs, the others
    /// wait for it, as long as it gets on. `on_progress` hears the bytes written so far, and in all. Also returns whether
    /// it was this process that packed.
    ///
    /// # Errors
    /// The file cannot be written, or the checkpoint is at fault.
    pub fn build<B: Backend>(
        backend: &mut B,
        checkpoint: &Checkpoint,
        path: &Path,
        on_progress: OnProgress<'_>,
    ) -> Result<(Self, bool), PackError> {
        let part = unfinished(path);
        let broken = |error| PackError::Write { path: part.clone(), error };
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(broken)?;
        }
        let (mut plan, mut file);
        loop {
            // Another process may have been faster, before the lock was had or while it was waited for.
            plan = match Plan::new(backend, checkpoint)?.open(path) {
                Ok(done) => return Ok((done, false)),
                Err(plan) => plan,
            };
            file = lock(&part, |written| on_progress(written, plan.len as u64)).map_err(broken)?;
            // What was waited for may have been finished and renamed, or removed: then it is no longer the one to write.
            if is_at(&file, &part) {
                break;
            }
        }
        let plan = match plan.open(path) {
            Ok(done) => {
                drop(fs::remove_file(&part));
                return Ok((done, false));
            }
            Err(plan) => plan,
        };
        let written = file.set_len(0).map_err(broken).and_then(|()| {
            let mut pages = LargePages::new(&mut file);
            plan.write(backend, checkpoint, &mut pages, on_progress, &broken)?;
            pages.flush().map_err(broken)?;
            file.sync_all().map_err(broken)?;
            fs::rename(&part, path).map_err(broken)
        });
        if let Err(error) = written {
            // An unfinished file is of no use, and may be what fills the disk.
            drop(fs::remove_file(&part));
            return Err(error);
        }
        let changed = || io::Error::other("the file changed while it was written");
        let packed = plan.open(path).map(|packed| (packed, true));
        packed.map_err(|_| PackError::Write { path: path.to_owned(), error: changed() })
    }

    /// A dense matrix, by the stem of its first tensor.
    pub(crate) fn dense(&self, name: &str) -> Packed {
        self.section(&Section::Dense(name.to_owned()))
    }

    /// An expert of a layer.
    pub(crate) fn expert(&self, layer: LayerIdx, expert: ExpertId) -> Packed {
        self.section(&Section::Expert(layer, expert))
    }

    fn section(&self, section: &Section) -> Packed {
        let packed = Packed::mapped(&self.file, self.plan.sections[section].clone());
        packed.expect("sections lie within the file, on pages")
    }
}
