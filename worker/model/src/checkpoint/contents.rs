//! What a directory holds, with everything that is wrong with it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use phalanx_kernels::memory::{MappedFile, Source};
use phalanx_proto::ModelConfig;
use serde::Deserialize;
use serde_json::Value;

use super::error::CheckpointError;
use super::header::{self, Entry, UniqueMap};
use super::names::{self, Expected};
use super::{FileSize, Tensor, config};

const CONFIG: &str = "config.json";
const GENERATION: &str = "generation_config.json";
const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
/// Largest configuration; the published one has 1.8 kB.
const CONFIG_BYTES_MAX: u64 = 1 << 20;
/// Largest index; that of the 120b model has 57 kB.
const INDEX_BYTES_MAX: u64 = 16 << 20;
/// Most files of weights.
const SHARDS_MAX: usize = 1024;

/// A file of weights, mapped or in memory.
#[derive(Debug)]
enum Storage {
    Mapped(MappedFile),
    Memory(Vec<u8>),
}

/// A file of weights.
#[derive(Debug)]
pub(crate) struct Shard {
    name: String,
    path: PathBuf,
    storage: Storage,
}

impl Shard {
    fn whole(&self) -> Source<'_> {
        match &self.storage {
            Storage::Mapped(file) => file.slice(0..file.len()).expect("the whole file lies within the file"),
            Storage::Memory(bytes) => Source::memory(bytes),
        }
    }

    pub(super) fn source(&self, range: &Range<usize>) -> Source<'_> {
        self.whole().slice(range.clone()).expect("the header's ranges were checked against the file")
    }
}

/// A file of weights in memory.
pub(crate) struct Image {
    /// What it would be called in a directory.
    pub(crate) name: &'static str,
    /// All its bytes.
    pub(crate) bytes: Vec<u8>,
}

/// A tensor and the file that it lies in.
#[derive(Clone, Debug)]
pub(crate) struct Located {
    pub(super) shard: Arc<Shard>,
    pub(super) entry: Entry,
}

impl Located {
    pub(super) fn view(&self) -> Tensor<'_> {
        let Entry { dtype, shape, range } = &self.entry;
        Tensor { dtype: *dtype, shape, source: self.shard.source(range) }
    }
}

/// Everything found, checked or not.
#[derive(Debug, Default)]
pub(crate) struct Contents {
    pub(super) name: String,
    /// The index, or the only file of weights.
    pub(super) place: PathBuf,
    pub(super) config: Option<ModelConfig>,
    pub(super) shards: Vec<Arc<Shard>>,
    pub(super) tensors: BTreeMap<String, Located>,
    pub(super) defects: Vec<CheckpointError>,
    /// Layers that are not there have the first one's tensors.
    repeats: bool,
}

/// Headers by file name; `None` where the file is at fault, which has been reported.
type Shards = BTreeMap<String, Option<(Arc<Shard>, BTreeMap<String, Entry>)>>;

impl Contents {
    pub(super) fn of_directory(dir: &Path) -> Self {
        let mut contents = Self { name: directory_name(dir), place: dir.join(INDEX), ..Self::default() };
        match fs::metadata(dir) {
            Ok(metadata) if metadata.is_dir() => {}
            Ok(_) => return contents.with_defect(unreadable(dir, io::ErrorKind::NotADirectory.into())),
            Err(error) => return contents.with_defect(unreadable(dir, error)),
        }
        contents.read_config(dir);
        if !dir.join(INDEX).exists() {
            contents.place = dir.join(SINGLE);
            if !contents.place.exists() {
                return contents.with_defect(CheckpointError::NoWeights { path: dir.to_owned() });
            }
            let single = contents.open_shard(dir, SINGLE, None);
            let tensors = single.iter().flat_map(|(_, header)| header.keys());
            let index = tensors.map(|tensor| (tensor.clone(), SINGLE.to_owned())).collect();
            contents.locate(index, [(SINGLE.to_owned(), single)].into());
            return contents;
        }
        match read_index(&contents.place) {
            Ok(index) => {
                let shards = contents.open_shards(dir, &index);
                contents.locate(index, shards);
                contents
            }
            Err(error) => contents.with_defect(error),
        }
    }

    pub(super) fn of_images(name: &str, config: &str, generation: &str, images: Vec<Image>) -> Self {
        Self::default().with_images(name, config, generation, images)
    }

    fn with_images(self, name: &str, config: &str, generation: &str, images: Vec<Image>) -> Self {
        let place = PathBuf::from(name);
        let mut contents = Self { name: name.to_owned(), place: place.join(INDEX), ..self };
        contents.take_config(
            &place,
            parse_json(&place.join(CONFIG), config.as_bytes()),
            parse_json(&place.join(GENERATION), generation.as_bytes()).map(Some),
        );
        let mut index = BTreeMap::new();
        let mut shards = Shards::new();
        for Image { name, bytes } in images {
            let shard = Shard { name: name.to_owned(), path: place.join(name), storage: Storage::Memory(bytes) };
            let parsed = contents.parse_shard(shard);
            let tensors = parsed.iter().flat_map(|(_, header)| header.keys());
            index.extend(tensors.map(|tensor| (tensor.clone(), name.to_owned())));
            shards.insert(name.to_owned(), parsed);
        }
        contents.locate(index, shards);
        contents
    }

    /// As [`Contents::of_images`], but every layer has the tensors of the first, which alone is there.
    pub(super) fn of_repeated_layer(name: &str, config: &str, generation: &str, images: Vec<Image>) -> Self {
        let contents = Self { repeats: true, ..Self::default() };
        contents.with_images(name, config, generation, images)
    }

    pub(super) fn files(&self) -> Vec<FileSize> {
        let size =
            |shard: &Arc<Shard>| FileSize { name: shard.name.clone(), bytes: shard.whole().bytes().len() as u64 };
        self.shards.iter().map(size).collect()
    }

    /// When each file was last changed, where it is a file.
    pub(super) fn times(&self) -> Vec<(&str, Option<SystemTime>)> {
        let time = |shard: &Shard| fs::metadata(&shard.path).and_then(|metadata| metadata.modified()).ok();
        self.shards.iter().map(|shard| (shard.name.as_str(), time(shard))).collect()
    }

    fn with_defect(mut self, defect: CheckpointError) -> Self {
        self.defects.push(defect);
        self
    }

    fn read_config(&mut self, dir: &Path) {
        let config = read_json(&dir.join(CONFIG), CONFIG_BYTES_MAX);
        let generation = dir.join(GENERATION);
        let generation =
            if generation.exists() { read_json(&generation, CONFIG_BYTES_MAX).map(Some) } else { Ok(None) };
        self.take_config(dir, config, generation);
    }

    fn take_config(
        &mut self,
        dir: &Path,
        config: Result<Value, CheckpointError>,
        generation: Result<Option<Value>, CheckpointError>,
    ) {
        let generation = generation.unwrap_or_else(|defect| {
            self.defects.push(defect);
            None
        });
        let parsed = config.and_then(|config| {
            config::parse(&config, generation.as_ref())
                .map_err(|error| CheckpointError::Config { path: dir.join(CONFIG), error })
        });
        match parsed {
            Ok(config) => self.config = Some(config),
            Err(defect) => self.defects.push(defect),
        }
    }

    fn open_shards(&mut self, dir: &Path, index: &BTreeMap<String, String>) -> Shards {
        let mut uses: BTreeMap<&String, (&String, usize)> = BTreeMap::new();
        for (tensor, shard) in index {
            uses.entry(shard).and_modify(|(_, others)| *others += 1).or_insert((tensor, 0));
        }
        let mut open = |(shard, used): (&String, _)| (shard.clone(), self.open_shard(dir, shard, Some(used)));
        uses.into_iter().map(&mut open).collect()
    }

    /// Maps a file and reads its header. `used` is a tensor that should be in it and the number of others.
    fn open_shard(
        &mut self,
        dir: &Path,
        name: &str,
        used: Option<(&String, usize)>,
    ) -> Option<(Arc<Shard>, BTreeMap<String, Entry>)> {
        let path = dir.join(name);
        let file = regular_file(&path).and_then(|_| MappedFile::open(&path));
        match (file, used) {
            (Ok(file), _) => self.parse_shard(Shard { name: name.to_owned(), path, storage: Storage::Mapped(file) }),
            (Err(error), Some((tensor, others))) if error.kind() == io::ErrorKind::NotFound => {
                self.defects.push(CheckpointError::MissingShard { path, tensor: tensor.clone(), others });
                None
            }
            (Err(error), _) => {
                self.defects.push(CheckpointError::Read { path, error });
                None
            }
        }
    }

    fn parse_shard(&mut self, shard: Shard) -> Option<(Arc<Shard>, BTreeMap<String, Entry>)> {
        match header::parse(shard.whole().bytes()) {
            Ok(header) => Some((Arc::new(shard), header)),
            Err(error) => {
                self.defects.push(CheckpointError::Header { path: shard.path, error });
                None
            }
        }
    }

    /// Finds every tensor of the index in its file, then checks what the configuration calls for.
    fn locate(&mut self, index: BTreeMap<String, String>, mut shards: Shards) {
        self.shards = shards.values().flatten().map(|(shard, _)| Arc::clone(shard)).collect();
        // Tensors that cannot be checked, because what is wrong with them has been said.
        let mut reported = BTreeSet::new();
        for (tensor, shard) in index {
            match shards.get_mut(&shard).and_then(Option::as_mut) {
                Some((shard, header)) => match header.remove(&tensor) {
                    Some(entry) => {
                        self.tensors.insert(tensor, Located { shard: Arc::clone(shard), entry });
                    }
                    None => {
                        let path = shard.path.clone();
                        self.defects.push(CheckpointError::NotInShard { path, tensor: tensor.clone() });
                        reported.insert(tensor);
                    }
                },
                None => {
                    reported.insert(tensor);
                }
            }
        }
        let Some(config) = &self.config else { return };
        if self.repeats {
            for Expected { name, .. } in names::expected(config) {
                if let Some(first) = names::in_first_layer(&name).and_then(|first| self.tensors.get(&first)) {
                    let first = first.clone();
                    self.tensors.entry(name).or_insert(first);
                }
            }
        }
        for expected in names::expected(config) {
            if !reported.contains(&expected.name) {
                self.defects.extend(self.check(expected));
            }
        }
    }

    fn check(&self, expected: Expected) -> Option<CheckpointError> {
        let Expected { name: tensor, dtype, shape } = expected;
        let Some(located) = self.tensors.get(&tensor) else {
            let path = self.place.clone();
            let widened = tensor.strip_suffix("_blocks").or_else(|| tensor.strip_suffix("_scales"));
            return Some(match widened.filter(|&name| self.tensors.contains_key(name)) {
                Some(found) => CheckpointError::NotMxfp4 { path, found: found.to_owned(), tensor },
                None => CheckpointError::Missing { path, tensor },
            });
        };
        let Entry { dtype: found_dtype, shape: found_shape, .. } = located.entry.clone();
        (found_dtype != dtype || found_shape != shape).then(|| {
            let path = located.shard.path.clone();
            CheckpointError::Mismatch { path, tensor, found_dtype, found_shape, dtype, shape }
        })
    }
}

/// The last part of the directory's full name.
fn directory_name(dir: &Path) -> String {
    let full = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    full.file_name().map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
}

fn unreadable(path: &Path, error: io::Error) -> CheckpointError {
    CheckpointError::Read { path: path.to_owned(), error }
}

/// Size of a file; an error for whatever else has a name (a pipe would never end).
fn regular_file(path: &Path) -> io::Result<u64> {
    let metadata = fs::metadata(path)?;
    if metadata.is_file() { Ok(metadata.len()) } else { Err(io::Error::other("not a file")) }
}

/// All of a file of at most `most` bytes.
pub(super) fn read_bounded(path: &Path, most: u64) -> Result<Vec<u8>, CheckpointError> {
    let read = || {
        let bytes = regular_file(path)?;
        let mut content = Vec::new();
        if bytes <= most {
            fs::File::open(path)?.take(most).read_to_end(&mut content)?;
        }
        Ok((bytes, content))
    };
    let (bytes, content) = read().map_err(|error| unreadable(path, error))?;
    if bytes > most {
        return Err(CheckpointError::TooLong { path: path.to_owned(), bytes, most });
    }
    Ok(content)
}

pub(crate) fn read_json<T: serde::de::DeserializeOwned>(path: &Path, most: u64) -> Result<T, CheckpointError> {
    parse_json(path, &read_bounded(path, most)?)
}

fn parse_json<T: serde::de::DeserializeOwned>(path: &Path, text: &[u8]) -> Result<T, CheckpointError> {
    serde_json::from_slice(text)
        .map_err(|error| CheckpointError::Json { path: path.to_owned(), problem: error.to_string() })
}

#[derive(Deserialize)]
struct Index {
    weight_map: UniqueMap<String>,
}

/// Which file holds a tensor.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>, CheckpointError> {
    let Index { weight_map: UniqueMap(index) } = read_json(path, INDEX_BYTES_MAX)?;
    if let Some((tensor, shard)) = index.iter().find(|(_, shard)| !is_plain(shard)) {
        let (tensor, shard) = (tensor.clone(), shard.chars().take(200).collect());
        return Err(CheckpointError::Escapes { path: path.to_owned(), tensor, shard });
    }
    let shards: BTreeSet<&String> = index.values().collect();
    if shards.len() > SHARDS_MAX {
        let problem = format!("it names {} files, at most {SHARDS_MAX} are possible", shards.len());
        return Err(CheckpointError::Json { path: path.to_owned(), problem });
    }
    Ok(index)
}

/// Whether a name stays within its directory, on any system.
pub(super) fn is_plain(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', ':', '\0'])
}
