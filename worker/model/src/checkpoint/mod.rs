//! A checkpoint in the published format, read as hostile and used in place.
//!
//! - [`Checkpoint`]: the whole, checked against `config.json` when it is opened; memory-mapped, so that only what
//!   is read is loaded.
//! - [`names`]: every tensor's name, type and shape.
//! - [`inspect`]: what a directory holds and all that is wrong with it.
//! - `find`: from a name on the command line to a checkpoint.
//!
//! Only the index says which file holds a tensor, and it names files beside itself: plain names, without a
//! separator. A directory entry may be a link to anywhere, as in a Hugging Face cache: whoever owns the directory
//! made it.

mod config;
mod contents;
mod error;
mod find;
pub(crate) mod header;
pub mod inspect;
pub mod names;

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use phalanx_kernels::memory::Source;
use phalanx_kernels::{EmbeddingBytes, EmbeddingSource};
use phalanx_proto::ModelConfig;
use sha2::{Digest, Sha256};

use contents::{Contents, Located, Shard};

pub use config::parse as parse_config;
pub(crate) use contents::{Image, read_json};
pub use error::CheckpointError;
pub use find::{hub_cache, open};
pub use header::{Dtype, HeaderError};

/// A checkpoint whose every tensor has the type and shape that its `config.json` calls for.
#[derive(Debug)]
pub struct Checkpoint {
    contents: Contents,
    config: ModelConfig,
    embedding: Located,
    total_bytes: u64,
}

/// A tensor in place.
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a> {
    /// Type of its numbers.
    pub dtype: Dtype,
    /// Its dimensions, slowest first.
    pub shape: &'a [usize],
    /// Its bytes, little endian.
    pub source: Source<'a>,
}

/// A file of weights.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct FileSize {
    /// Its name.
    pub name: String,
    /// Its size.
    pub bytes: u64,
}

impl Checkpoint {
    /// Opens the checkpoint in `dir`. Reads configuration, index and headers; no weights.
    ///
    /// # Errors
    /// The first defect.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        Self::of(Contents::of_directory(dir))
    }

    /// All defects of the checkpoint in `dir`; none if it opens.
    #[must_use]
    pub fn defects(dir: &Path) -> Vec<CheckpointError> {
        Contents::of_directory(dir).defects
    }

    /// A checkpoint whose files are in memory.
    pub(crate) fn of_images(
        name: &str,
        config: &str,
        generation: &str,
        images: Vec<Image>,
    ) -> Result<Self, CheckpointError> {
        Self::of(Contents::of_images(name, config, generation, images))
    }

    /// The same, but every layer has the tensors of the first, which alone is there.
    pub(crate) fn of_repeated_layer(
        name: &str,
        config: &str,
        generation: &str,
        images: Vec<Image>,
    ) -> Result<Self, CheckpointError> {
        Self::of(Contents::of_repeated_layer(name, config, generation, images))
    }

    fn of(mut contents: Contents) -> Result<Self, CheckpointError> {
        if !contents.defects.is_empty() {
            return Err(contents.defects.swap_remove(0));
        }
        let config = contents.config.clone().expect("without a defect there is a configuration");
        let embedding = contents.tensors.get(names::EMBEDDING).cloned();
        let embedding = embedding.expect("without a defect every expected tensor is there");
        let total_bytes = names::expected(&config).iter().map(names::Expected::bytes).sum();
        Ok(Self { contents, config, embedding, total_bytes })
    }

    /// The same under another name.
    fn named(mut self, name: &str) -> Self {
        name.clone_into(&mut self.contents.name);
        self
    }

    /// The name that the model is served under unless another is given.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.contents.name
    }

    /// The shape of the model.
    #[must_use]
    pub const fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The bytes of a tensor.
    ///
    /// # Errors
    /// There is no such tensor.
    pub fn tensor(&self, name: &str) -> Result<Source<'_>, CheckpointError> {
        Ok(self.view(name)?.source)
    }

    /// A tensor with its type and shape.
    ///
    /// # Errors
    /// There is no such tensor.
    pub fn view(&self, name: &str) -> Result<Tensor<'_>, CheckpointError> {
        match self.contents.tensors.get(name) {
            Some(located) => Ok(located.view()),
            None => Err(CheckpointError::Missing { path: self.contents.place.clone(), tensor: name.to_owned() }),
        }
    }

    /// The embedding, in place. It keeps its file open, also after the checkpoint is dropped.
    #[must_use]
    pub fn embedding(&self) -> EmbeddingSource {
        Arc::new(MappedTable { shard: Arc::clone(&self.embedding.shard), range: self.embedding.entry.range.clone() })
    }

    /// Whether the embedding stays in a mapped file.
    #[must_use]
    pub fn embedding_mapped(&self) -> bool {
        self.embedding.view().source.is_mapped()
    }

    /// Bytes of all tensors of the model.
    #[must_use]
    pub const fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// What tells this checkpoint from any other, as far as a glance can: names, types, shapes, sizes and times of its
    /// files, and a few bytes of every tensor.
    #[must_use]
    pub fn identity(&self) -> [u8; 32] {
        const GLANCE: usize = 64;
        let mut hash = Sha256::new();
        for (name, modified) in self.contents.times() {
            hash.update(format!("{name} {modified:?}\n"));
        }
        for (name, located) in &self.contents.tensors {
            let Tensor { dtype, shape, source } = located.view();
            hash.update(format!("{name} {dtype:?} {shape:?}\n"));
            let bytes = source.bytes();
            for start in [0, bytes.len() / 2, bytes.len().saturating_sub(GLANCE)] {
                hash.update(&bytes[start..bytes.len().min(start + GLANCE)]);
            }
            source.release();
        }
        hash.finalize().into()
    }

    /// The directory of the checkpoint, if it is one on disk.
    #[must_use]
    pub fn directory(&self) -> Option<&Path> {
        self.embedding_mapped().then(|| self.contents.place.parent()).flatten()
    }

    /// The files of weights, by name.
    #[must_use]
    pub fn files(&self) -> Vec<FileSize> {
        self.contents.files()
    }
}

/// The embedding within the file that holds it.
struct MappedTable {
    shard: Arc<Shard>,
    range: Range<usize>,
}

impl EmbeddingBytes for MappedTable {
    fn table(&self) -> &[u8] {
        self.shard.source(&self.range).bytes()
    }
}
