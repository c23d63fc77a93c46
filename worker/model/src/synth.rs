//! Checkpoints of random weights in the published format: for tests, measurements and plans without a download.
//!
//! Every number is a function of the seed, the tensor's name and its place in the tensor, so the same seed gives
//! the same files. Magnitudes are such that activations neither vanish nor explode: matrices have a deviation
//! near one over the square root of their inputs, norms are near one.

use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};

use phalanx_proto::ModelConfig;
use serde_json::{Map, Value, json};

use crate::checkpoint::names::{self, Expected};
use crate::checkpoint::{Checkpoint, CheckpointError, Image, header, parse_config, read_json};

/// Bytes of a published file of weights, at most.
const SHARD_BYTES_MAX: u64 = 4_800_000_000;
/// Bytes made and written at a time; a multiple of 8.
const CHUNK_BYTES: usize = 4 << 20;
/// Tells a directory of random weights from one that must not be overwritten.
const MARKER: &str = "synth.json";
/// Ends the name of a file that is not complete yet.
const PARTIAL: &str = ".partial";
const CONFIG: &str = "config.json";
const GENERATION: &str = "generation_config.json";
const INDEX: &str = "model.safetensors.index.json";
/// The vocabulary of the published models, whose end tokens these are.
const PUBLISHED_VOCAB: u32 = 201_088;
const PUBLISHED_EOS: [u32; 3] = [200_002, 199_999, 200_012];

/// Begins the name of a model that is made in memory, before its shape.
pub const PREFIX: &str = "synth:";

/// The shape of a model to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shape {
    /// gpt-oss-120b.
    Large,
    /// gpt-oss-20b.
    Small,
    /// That of this `config.json`.
    Config(PathBuf),
}

impl FromStr for Shape {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "120b" => Self::Large,
            "20b" => Self::Small,
            path => Self::Config(path.into()),
        })
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Large => f.write_str("120b"),
            Self::Small => f.write_str("20b"),
            Self::Config(path) => path.display().fmt(f),
        }
    }
}

/// Writes a checkpoint with `layers` layers, or as many as its shape has. `on_progress` hears the bytes of weights
/// written so far, and of all. The directory must be new, empty, or hold an earlier checkpoint made here.
///
/// # Errors
/// The shape is impossible, the directory is in use, or the system refuses to write.
pub fn write(
    shape: &Shape,
    layers: Option<u32>,
    seed: u64,
    dir: &Path,
    on_progress: &mut dyn FnMut(u64, u64),
) -> Result<(), CheckpointError> {
    let (config_json, config) = configuration(shape, layers)?;
    let files = files(&config);
    claim(dir)?;
    let marker = json!({"made_by": "phalanx model synth", "shape": shape.to_string(), "layers": layers, "seed": seed});
    write_json(dir, MARKER, &marker)?;

    let total = files.iter().flat_map(|file| &file.tensors).map(Expected::bytes).sum();
    let mut written = 0;
    for file in &files {
        replace(dir, &file.name, |out| {
            out.write_all(&file.header())?;
            for tensor in &file.tensors {
                fill(tensor, seed, |bytes| {
                    out.write_all(bytes)?;
                    written += bytes.len() as u64;
                    on_progress(written, total);
                    Ok(())
                })?;
            }
            Ok(())
        })?;
    }
    write_json(dir, INDEX, &index(&config, &files, total))?;
    write_json(dir, GENERATION, &generation(&config))?;
    // Last, because without it the directory is no checkpoint yet.
    write_json(dir, CONFIG, &config_json)
}

/// A checkpoint in memory, to measure without a download and without a disk: `20b`, `120b` or a `config.json`, and after
/// another colon a number of layers. Every layer has the same weights: what is computed costs what it costs in a true
/// model, and the checkpoint holds one layer and the two tables.
///
/// # Errors
/// The shape is impossible.
pub(crate) fn checkpoint(spec: &str) -> Result<Checkpoint, CheckpointError> {
    let (shape, layers) = match spec.rsplit_once(':').map(|(shape, layers)| (shape, layers.parse())) {
        Some((shape, Ok(layers))) => (shape, Some(layers)),
        _ => (spec, None),
    };
    let shape = shape.parse().unwrap_or_else(|error: std::convert::Infallible| match error {});
    let (config_json, config) = configuration(&shape, layers)?;
    // The embedding is used in place and keeps its file alive.
    let kept = names::expected(&config).into_iter();
    let kept = kept.filter(|tensor| names::in_first_layer(&tensor.name).is_none_or(|first| first == tensor.name));
    let (table, rest): (Vec<_>, Vec<_>) = kept.partition(|tensor| tensor.name == names::EMBEDDING);
    let images = [("embedding.safetensors", table), ("model.safetensors", rest)].map(|(name, tensors)| {
        let plan = ShardPlan { name: name.to_owned(), tensors };
        let header = plan.header();
        let weights: u64 = plan.tensors.iter().map(Expected::bytes).sum();
        let mut bytes = vec![0; header.len() + weights as usize];
        let (head, tail) = bytes.split_at_mut(header.len());
        head.copy_from_slice(&header);
        fill_all(&plan.tensors, 1, tail);
        Image { name, bytes }
    });
    let texts = [config_json, generation(&config)].map(|json| json.to_string());
    Checkpoint::of_repeated_layer(&format!("{PREFIX}{spec}"), &texts[0], &texts[1], images.into())
}

/// `config.json` as it will stand in the directory, and what it means.
fn configuration(shape: &Shape, layers: Option<u32>) -> Result<(Value, ModelConfig), CheckpointError> {
    let mut json: Value = match shape {
        Shape::Large => published(36, 128),
        Shape::Small => published(24, 32),
        Shape::Config(path) if !path.exists() => return Err(CheckpointError::NoShape { shape: path.clone() }),
        Shape::Config(path) => read_json(path, 1 << 20)?,
    };
    if let (Some(layers), Some(fields)) = (layers, json.as_object_mut()) {
        fields.insert("num_hidden_layers".to_owned(), layers.into());
        if let Some(Value::Array(types)) = fields.get_mut("layer_types") {
            // More than a model can have are refused below, and need not be listed before.
            let listed = (layers as usize).min(1 << 12);
            *types = types.iter().cycle().take(listed).cloned().collect();
        }
    }
    match parse_config(&json, None) {
        Ok(config) => Ok((json, config)),
        Err(error) => Err(CheckpointError::Config { path: shape.to_string().into(), error }),
    }
}

/// The published `config.json`.
fn published(layers: u32, experts: u32) -> Value {
    let kinds = ["sliding_attention", "full_attention"];
    let layer_types: Vec<&str> = kinds.into_iter().cycle().take(layers as usize).collect();
    json!({
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": true,
        "attention_dropout": 0.0,
        "eos_token_id": 200_002,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 2880,
        "layer_types": layer_types,
        "max_position_embeddings": 131_072,
        "model_type": "gpt_oss",
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "num_local_experts": experts,
        "output_router_logits": false,
        "pad_token_id": 199_999,
        "quantization_config": {
            "modules_to_not_convert":
                ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": false,
        },
        "rope_theta": 150_000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": false,
        "transformers_version": "4.55.0.dev0",
        "use_cache": true,
        "vocab_size": PUBLISHED_VOCAB,
    })
}

/// The published `generation_config.json`; for another vocabulary, its own end tokens.
fn generation(config: &ModelConfig) -> Value {
    if config.vocab == PUBLISHED_VOCAB {
        json!({
            "bos_token_id": 199_998,
            "do_sample": true,
            "eos_token_id": PUBLISHED_EOS,
            "pad_token_id": 199_999,
            "transformers_version": "4.55.0.dev0",
        })
    } else {
        json!({"do_sample": true, "eos_token_id": config.eos})
    }
}

/// A file of weights to write.
struct ShardPlan {
    name: String,
    /// Wide numbers before narrow ones, then by name, as the safetensors library writes them.
    tensors: Vec<Expected>,
}

impl ShardPlan {
    fn header(&self) -> Vec<u8> {
        header::text(None, self.tensors.iter().map(Expected::stated))
    }
}

/// Tensors in the order of the index, cut into files where the next one would exceed the limit.
fn files(config: &ModelConfig) -> Vec<ShardPlan> {
    let mut parts: Vec<Vec<Expected>> = vec![Vec::new()];
    let mut bytes = 0;
    for tensor in names::expected(config) {
        if bytes > 0 && bytes + tensor.bytes() > SHARD_BYTES_MAX {
            parts.push(Vec::new());
            bytes = 0;
        }
        bytes += tensor.bytes();
        parts.last_mut().expect("there is a first part").push(tensor);
    }
    let last = parts.len() - 1;
    let plan = |(number, mut tensors): (usize, Vec<Expected>)| {
        tensors.sort_by(|a, b| (b.dtype, &a.name).cmp(&(a.dtype, &b.name)));
        ShardPlan { name: format!("model-{number:05}-of-{last:05}.safetensors"), tensors }
    };
    parts.into_iter().enumerate().map(plan).collect()
}

fn index(config: &ModelConfig, files: &[ShardPlan], total: u64) -> Value {
    let mut file_of = std::collections::BTreeMap::new();
    for file in files {
        file_of.extend(file.tensors.iter().map(|tensor| (tensor.name.as_str(), file.name.as_str())));
    }
    let map: Map<String, Value> = names::expected(config)
        .into_iter()
        .map(|tensor| {
            let file = file_of[tensor.name.as_str()].into();
            (tensor.name, file)
        })
        .collect();
    json!({"metadata": {"total_size": total}, "weight_map": map})
}

/// What the numbers of a tensor look like.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Look {
    /// Any byte: two E2M1 codes.
    Codes,
    /// One of three scales around this one.
    Scales(u8),
    /// bf16 near a bell curve.
    Bell { mean: f32, deviation: f32 },
}

impl Look {
    fn of(tensor: &Expected) -> Self {
        let name = tensor.name.as_str();
        let inputs = *tensor.shape.last().expect("no tensor of the model is a scalar") as f32;
        if name.ends_with("_blocks") {
            return Self::Codes;
        }
        if name.ends_with("_scales") {
            // E2M1 codes drawn evenly have a root mean square of 2.93; a scale covers 32 inputs.
            let exponent = (2.93 * (32.0 * inputs).sqrt()).log2().round();
            return Self::Scales((127.0 - exponent) as u8);
        }
        let (mean, deviation) = match name {
            names::EMBEDDING => (0.0, 1.0),
            names::UNEMBEDDING => (0.0, 2.0 / inputs.sqrt()),
            _ if name.ends_with("norm.weight") => (1.0, 0.1),
            _ if name.ends_with("sinks") => (0.0, 1.0),
            _ if name.ends_with("bias") => (0.0, 0.05),
            _ => (0.0, 1.0 / inputs.sqrt()),
        };
        Self::Bell { mean, deviation }
    }

    /// Fills `out` with the part of the tensor that begins at byte `begin`, a multiple of 8.
    fn fill(self, key: u64, begin: u64, out: &mut [u8]) {
        match self {
            Self::Codes => {
                for (word, out) in (begin / 8..).zip(out.chunks_mut(8)) {
                    out.copy_from_slice(&random(key, word).to_le_bytes()[..out.len()]);
                }
            }
            Self::Scales(middle) => {
                for (element, out) in (begin..).zip(out) {
                    *out = middle - 1 + (random(key, element) % 3) as u8;
                }
            }
            Self::Bell { mean, deviation } => {
                for (element, out) in (begin / 2..).zip(out.as_chunks_mut::<2>().0) {
                    *out = bf16(mean + deviation * bell(random(key, element))).to_le_bytes();
                }
            }
        }
    }
}

/// Makes a tensor, piece by piece.
fn fill(tensor: &Expected, seed: u64, mut take: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
    let (look, key, bytes) = (Look::of(tensor), key(seed, &tensor.name), tensor.bytes());
    let mut piece = vec![0; CHUNK_BYTES];
    for begin in (0..bytes).step_by(CHUNK_BYTES) {
        let length = (bytes - begin).min(CHUNK_BYTES as u64) as usize;
        look.fill(key, begin, &mut piece[..length]);
        take(&piece[..length])?;
    }
    Ok(())
}

/// Makes tensors, one behind the other, in all of `out`; all cores help.
fn fill_all(tensors: &[Expected], seed: u64, mut out: &mut [u8]) {
    let mut pieces = Vec::new();
    for tensor in tensors {
        let (look, key) = (Look::of(tensor), key(seed, &tensor.name));
        let (own, rest) = out.split_at_mut(tensor.bytes() as usize);
        pieces.extend((0..).step_by(CHUNK_BYTES).zip(own.chunks_mut(CHUNK_BYTES)).map(|at| (look, key, at)));
        out = rest;
    }
    let pieces = Mutex::new(pieces.into_iter());
    let next = || pieces.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || {
        while let Some((look, key, (begin, piece))) = next() {
            look.fill(key, begin, piece);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..std::thread::available_parallelism().map_or(1, usize::from) {
            // What a thread does not make that does not start, the others do.
            let _ = std::thread::Builder::new().spawn_scoped(scope, work);
        }
        work();
    });
}

/// A generator for one tensor of one seed.
fn key(seed: u64, name: &str) -> u64 {
    name.bytes().fold(mix(seed), |key, byte| mix(key ^ u64::from(byte)))
}

/// The `index`th 64 random bits.
fn random(key: u64, index: u64) -> u64 {
    mix(key.wrapping_add(index.wrapping_mul(0x9E37_79B9_7F4A_7C15)))
}

/// The output function of SplitMix64.
fn mix(state: u64) -> u64 {
    let z = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Mean 0, deviation 1: the sum of four uniform numbers, which is near a normal one.
fn bell(bits: u64) -> f32 {
    let sum = (bits & 0xFFFF) + (bits >> 16 & 0xFFFF) + (bits >> 32 & 0xFFFF) + (bits >> 48);
    // The deviation of a sum of four is 65536 / sqrt(3).
    const SCALE: f32 = 1.732_050_8 / 65536.0;
    (sum as f32 - 2.0 * 65535.0) * SCALE
}

/// Rounds to the nearest bf16, to the even one of two.
fn bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) as u16
}

/// Makes the directory ready, or refuses it.
fn claim(dir: &Path) -> Result<(), CheckpointError> {
    let failed = |error| CheckpointError::Write { path: dir.to_owned(), error };
    fs::create_dir_all(dir).map_err(failed)?;
    let entries: Vec<PathBuf> =
        fs::read_dir(dir).and_then(|dir| dir.map(|e| e.map(|e| e.path())).collect()).map_err(failed)?;
    if entries.is_empty() {
        return Ok(());
    }
    if !dir.join(MARKER).is_file() {
        return Err(CheckpointError::Occupied { path: dir.to_owned() });
    }
    let is_ours = |path: &&PathBuf| {
        let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
        [CONFIG, GENERATION, INDEX].contains(&name)
            || name.ends_with(PARTIAL)
            || (name.starts_with("model-") && name.ends_with(".safetensors"))
    };
    for path in entries.iter().filter(is_ours) {
        fs::remove_file(path).map_err(|error| CheckpointError::Write { path: path.clone(), error })?;
    }
    Ok(())
}

/// Writes a file under another name and renames it when it is complete.
pub(crate) fn replace(
    dir: &Path,
    name: &str,
    fill: impl FnOnce(&mut File) -> io::Result<()>,
) -> Result<(), CheckpointError> {
    let path = dir.join(name);
    let partial = dir.join(format!("{name}{PARTIAL}"));
    File::create(&partial)
        .and_then(|mut file| fill(&mut file))
        .and_then(|()| fs::rename(&partial, &path))
        .map_err(|error| CheckpointError::Write { path, error })
}

fn write_json(dir: &Path, name: &str, value: &Value) -> Result<(), CheckpointError> {
    replace(dir, name, |file| file.write_all(format!("{value:#}\n").as_bytes()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn planned(shape: Shape) -> Vec<(String, u64)> {
        let (_, config) = configuration(&shape, None).unwrap();
        let bytes =
            |file: &ShardPlan| file.header().len() as u64 + file.tensors.iter().map(Expected::bytes).sum::<u64>();
        files(&config).iter().map(|file| (file.name.clone(), bytes(file))).collect()
    }

    #[test]
    fn the_small_model_has_the_published_files_to_the_byte() {
        let published = [
            ("model-00000-of-00002.safetensors", 4_792_272_488),
            ("model-00001-of-00002.safetensors", 4_798_702_184),
            ("model-00002-of-00002.safetensors", 4_170_342_232),
        ];
        assert_eq!(planned(Shape::Small), published.map(|(name, bytes)| (name.to_owned(), bytes)));
    }

    #[test]
    fn the_large_model_has_fifteen_files() {
        let files = planned(Shape::Large);
        assert_eq!(files.len(), 15);
        assert_eq!(files[14].0, "model-00014-of-00014.safetensors");
    }

    #[test]
    fn a_tensor_does_not_depend_on_how_it_is_cut() {
        for look in [Look::Codes, Look::Scales(120), Look::Bell { mean: 1.0, deviation: 0.5 }] {
            let mut whole = [0; 100];
            look.fill(7, 0, &mut whole);
            let mut pieces = [0; 100];
            let (first, second) = pieces.split_at_mut(48);
            look.fill(7, 0, first);
            look.fill(7, 48, second);
            assert_eq!(whole, pieces, "{look:?}");
        }
    }

    #[test]
    fn tensors_made_side_by_side_are_those_made_one_by_one() {
        let (_, config) = configuration(&Shape::Small, Some(1)).unwrap();
        let mut tensors = names::expected(&config);
        tensors.retain(|tensor| tensor.bytes() < 40 << 20);
        assert!(tensors.iter().any(|tensor| tensor.bytes() > 2 * CHUNK_BYTES as u64));
        let mut expected = Vec::new();
        for tensor in &tensors {
            let made = fill(tensor, 3, |piece| expected.write_all(piece));
            made.unwrap();
        }
        let mut made = vec![0; expected.len()];
        fill_all(&tensors, 3, &mut made);
        assert!(made == expected);
    }

    #[test]
    fn a_bell_has_the_mean_and_deviation_asked_for() {
        let look = Look::Bell { mean: 1.0, deviation: 0.5 };
        let mut bytes = vec![0; 1 << 17];
        look.fill(key(1, "a"), 0, &mut bytes);
        let numbers: Vec<f64> = bytes
            .as_chunks::<2>()
            .0
            .iter()
            .map(|&b| f64::from(f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)))
            .collect();
        let mean = numbers.iter().sum::<f64>() / numbers.len() as f64;
        let variance = numbers.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / numbers.len() as f64;
        assert!((mean - 1.0).abs() < 0.01, "{mean}");
        assert!((variance.sqrt() - 0.5).abs() < 0.01, "{}", variance.sqrt());
    }
}
