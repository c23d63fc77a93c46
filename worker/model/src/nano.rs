//! gpt-oss-nano, the demo model that is part of the program.
//!
//! A pack is a checkpoint whose embedding and unembedding are short: of the 201,088 tokens 4,097 have a row of
//! their own, all others share one. Expanded it is a checkpoint as any other, and goes through the same checks.

use std::fs;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::checkpoint::names::{self, Expected};
use crate::checkpoint::{Checkpoint, CheckpointError, Dtype, Image, header};
use crate::synth::replace;

/// What to ask for.
pub const SPEC: &str = "nano";
/// What it is called.
const NAME: &str = "gpt-oss-nano";
const PACK: &[u8] = include_bytes!("../../../models/gpt-oss-nano/nano.safetensors");
const CONFIG: &str = include_str!("../../../models/gpt-oss-nano/config.json");
const GENERATION: &str = include_str!("../../../models/gpt-oss-nano/generation_config.json");

/// A tensor of the full checkpoint.
struct Full {
    tensor: Expected,
    content: Content,
}

/// Where the bytes of a tensor come from.
enum Content {
    /// They stand in the pack.
    Copy(&'static [u8]),
    /// A table in which most rows are the same.
    Rows {
        /// The row of every other token.
        shared: &'static [u8],
        /// Tokens with a row of their own, ascending.
        used: Vec<u32>,
        /// The rows of these.
        rows: &'static [u8],
    },
}

impl Content {
    fn write(&self, tokens: usize, to: &mut impl Write) -> io::Result<()> {
        match self {
            Self::Copy(bytes) => to.write_all(bytes),
            Self::Rows { shared, used, rows } => {
                let mut own = used.iter().zip(rows.chunks_exact(shared.len())).peekable();
                (0..).take(tokens).try_for_each(|token: u32| {
                    let row = own.next_if(|(used, _)| **used == token);
                    to.write_all(row.map_or(shared, |(_, row)| row))
                })
            }
        }
    }
}

/// The checkpoint, expanded in memory.
///
/// # Errors
/// None, unless the program itself is damaged.
pub fn checkpoint() -> Result<Checkpoint, CheckpointError> {
    // The embedding is used in place and keeps its file alive; all else is read once and then dropped.
    let (embedding, rest): (Vec<_>, Vec<_>) =
        expand().into_iter().partition(|full| full.tensor.name == names::EMBEDDING);
    let images = [("embedding.safetensors", embedding), ("model.safetensors", rest)].map(|(name, tensors)| {
        let mut bytes = Vec::with_capacity(header(&tensors).len() + size(&tensors));
        write(&tensors, &mut bytes).expect("writing to memory succeeds");
        Image { name, bytes }
    });
    Checkpoint::of_images(NAME, CONFIG, GENERATION, images.into())
}

/// Writes the full checkpoint as a directory that any program for gpt-oss reads; into a new or an empty one.
///
/// # Errors
/// The directory holds something, or it or a file in it cannot be written.
pub fn export(dir: &Path) -> Result<(), CheckpointError> {
    let failed = |error| CheckpointError::Write { path: dir.to_owned(), error };
    fs::create_dir_all(dir).map_err(failed)?;
    if fs::read_dir(dir).map_err(failed)?.next().is_some() {
        return Err(CheckpointError::Occupied { path: dir.to_owned() });
    }
    let tensors = expand();
    replace(dir, "model.safetensors", |file| {
        let mut file = BufWriter::new(file);
        write(&tensors, &mut file)?;
        file.flush()
    })?;

    let total = size(&tensors);
    let map: Map<String, Value> =
        tensors.into_iter().map(|full| (full.tensor.name, "model.safetensors".into())).collect();
    let index = json!({"metadata": {"total_size": total}, "weight_map": map});
    let mut text = Vec::new();
    let mut to_text =
        serde_json::Serializer::with_formatter(&mut text, serde_json::ser::PrettyFormatter::with_indent(b" "));
    serde::Serialize::serialize(&index, &mut to_text).expect("an object of strings and numbers has a text");
    text.push(b'\n');
    // The configuration last, because without it the directory is no checkpoint yet.
    let texts: [(&str, &[u8]); 3] = [
        ("model.safetensors.index.json", &text),
        ("generation_config.json", GENERATION.as_bytes()),
        ("config.json", CONFIG.as_bytes()),
    ];
    texts.into_iter().try_for_each(|(name, text)| replace(dir, name, |file| file.write_all(text)))
}

/// The tensors of the full checkpoint, the two tables last.
fn expand() -> Vec<Full> {
    const WHOLE: &str = "the embedded pack is whole";
    let vocab = serde_json::from_str::<Value>(CONFIG).expect(WHOLE)["vocab_size"].as_u64().expect(WHOLE) as usize;
    let pack = header::parse(PACK).expect(WHOLE);
    let bytes = |name: &str| &PACK[pack[name].range.clone()];
    let used: Vec<u32> = bytes("used_token_ids").as_chunks::<4>().0.iter().map(|&id| u32::from_le_bytes(id)).collect();
    let table = |name: &str| {
        let stem = name.trim_end_matches(".weight");
        let (shared, rows) = (bytes(&format!("{stem}.shared_row")), bytes(&format!("{stem}.used_rows")));
        let shape = vec![vocab, shared.len() / 2];
        let tensor = Expected { name: name.to_owned(), dtype: Dtype::BF16, shape };
        Full { tensor, content: Content::Rows { shared, used: used.clone(), rows } }
    };
    let is_packed = |name: &str| name == "used_token_ids" || name.ends_with("_row") || name.ends_with("_rows");
    let mut in_order: Vec<_> = pack.iter().filter(|(name, _)| !is_packed(name)).collect();
    in_order.sort_by_key(|(_, entry)| entry.range.start);
    let copies = in_order.into_iter().map(|(name, entry)| Full {
        tensor: Expected { name: name.clone(), dtype: entry.dtype, shape: entry.shape.clone() },
        content: Content::Copy(bytes(name)),
    });
    copies.chain([names::EMBEDDING, names::UNEMBEDDING].map(table)).collect()
}

/// Bytes of the tensors.
fn size(tensors: &[Full]) -> usize {
    tensors.iter().map(|full| full.tensor.bytes() as usize).sum()
}

fn header(tensors: &[Full]) -> Vec<u8> {
    header::text(Some("pt"), tensors.iter().map(|full| full.tensor.stated()))
}

fn write(tensors: &[Full], to: &mut impl Write) -> io::Result<()> {
    to.write_all(&header(tensors))?;
    tensors.iter().try_for_each(|full| full.content.write(full.tensor.shape[0], to))
}
