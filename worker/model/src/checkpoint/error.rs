//! Why a checkpoint cannot be used: each error names the file, the tensor where there is one, and what to do.

use std::io;
use std::path::PathBuf;

use phalanx_proto::ConfigError;

use super::header::{Dtype, HeaderError};

/// Why a checkpoint cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A name that leads nowhere.
    #[error(
        "no model `{model}`: looked at {}; give `nano`, a checkpoint directory, `synth:20b` for random weights, \
        or the id of a model in the local Hugging Face cache (download one with `hf download openai/gpt-oss-20b`)",
        list(looked)
    )]
    Unknown {
        /// What was asked for.
        model: String,
        /// Where it was looked for.
        looked: Vec<PathBuf>,
    },
    /// Random weights of no shape that there is.
    #[error("no shape `{}`: give 20b, 120b, or the path of a config.json", shape.display())]
    NoShape {
        /// What was asked for.
        shape: PathBuf,
    },
    /// A file that the system does not let us read.
    #[error("cannot read {}: {error}; check that the file exists and may be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        error: io::Error,
    },
    /// A file that the system does not let us write.
    #[error("cannot write {}: {error}; give a directory that can be written and has room", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        error: io::Error,
    },
    /// A directory that is in use for something else.
    #[error("{} is not empty; give a new directory", path.display())]
    Occupied {
        /// The directory.
        path: PathBuf,
    },
    /// A file that cannot be what its name says.
    #[error("{} has {bytes} bytes, but at most {most} are possible; download the file again", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The largest size.
        most: u64,
    },
    /// Not the JSON it should be.
    #[error("{} cannot be understood: {problem}; download the file again", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The parser's words.
        problem: String,
    },
    /// Not a gpt-oss model.
    #[error("{}: {error}; use the config.json that belongs to a gpt-oss checkpoint", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The field and what is wrong with it.
        error: ConfigError,
    },
    /// No weights.
    #[error("{} holds neither model.safetensors.index.json nor model.safetensors; give the directory of a \
        complete checkpoint", path.display())]
    NoWeights {
        /// The directory.
        path: PathBuf,
    },
    /// The index leads out of the directory.
    #[error("{}: tensor `{tensor}` is said to be in `{shard}`, but a shard must be a plain file name beside the \
        index; download the index again, from a source that you trust", path.display())]
    Escapes {
        /// The index.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What the index says.
        shard: String,
    },
    /// A shard that the index names is not there.
    #[error("{} is missing, which holds tensor `{tensor}` and {others} others; download it", path.display())]
    MissingShard {
        /// The shard.
        path: PathBuf,
        /// A tensor in it.
        tensor: String,
        /// Tensors in it beside this one.
        others: usize,
    },
    /// A shard that is not a safetensors file.
    #[error("{}: {error}; download the file again", path.display())]
    Header {
        /// The shard.
        path: PathBuf,
        /// What is wrong.
        error: HeaderError,
    },
    /// The index and a shard contradict each other.
    #[error("{} does not hold tensor `{tensor}`, which the index says it does; download the shard and the index \
        again, both of the same checkpoint", path.display())]
    NotInShard {
        /// The shard.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A tensor that config.json calls for is nowhere.
    #[error("{} has no tensor `{tensor}`; use the config.json and the weights of the same checkpoint", path.display())]
    Missing {
        /// The index, or the only file of weights.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// Experts in another format.
    #[error("{} holds tensor `{found}` where `{tensor}` is needed: the experts are not in MXFP4; use the published \
        checkpoint, not a converted one", path.display())]
    NotMxfp4 {
        /// The index, or the only file of weights.
        path: PathBuf,
        /// The tensor that is needed.
        tensor: String,
        /// The tensor that is there.
        found: String,
    },
    /// A tensor of another type or shape than config.json calls for.
    #[error("{}: tensor `{tensor}` is {found_dtype} {found_shape:?}, but config.json calls for {dtype} {shape:?}; \
        use the config.json and the weights of the same checkpoint", path.display())]
    Mismatch {
        /// The shard.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Type it has.
        found_dtype: Dtype,
        /// Shape it has.
        found_shape: Vec<usize>,
        /// Type it needs.
        dtype: Dtype,
        /// Shape it needs.
        shape: Vec<usize>,
    },
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}
