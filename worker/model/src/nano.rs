//! gpt-oss-nano, the demo model that is part of the program.
//!
//! A pack is a checkpoint whose embedding and unembedding are short: of the 201,088 tokens 4,097 have a row of
//! their own, all others share one. Expanded it is a checkpoint as any other, and goes through the same checks.

use std::borrow::Cow;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::checkpoint::{Checkpoint, CheckpointError, Dtype, Image, header, names};

/// What to ask for.
pub const SPEC: &str = "nano";
/// What it is called.
const NAME: &str = "gpt-oss-nano";
const PACK: &[u8] = include_bytes!("../../../models/gpt-oss-nano/nano.safetensors");
const CONFIG: &str = include_str!("../../../models/gpt-oss-nano/config.json");
const GENERATION: &str = include_str!("../../../models/gpt-oss-nano/generation_config.json");

/// A tensor of the full checkpoint.
struct Full {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Cow<'static, [u8]>,
}

/// The checkpoint, expanded in memory.
///
/// # Errors
/// None, unless the program itself is damaged.
pub fn checkpoint() -> Result<Checkpoint, CheckpointError> {
    // The embedding is used in place and keeps its file alive; all else is read once and then dropped.
    let (embedding, rest): (Vec<_>, Vec<_>) = expand().into_iter().partition(|full| full.name == names::EMBEDDING);
    let images = [("embedding.safetensors", embedding), ("model.safetensors", rest)].map(|(name, tensors)| {
        let mut bytes = Vec::new();
        write(&tensors, &mut bytes).expect("writing to memory succeeds");
        Image { name, bytes }
    });
    Checkpoint::of_images(NAME, CONFIG, GENERATION, images.into())
}

/// Writes the full checkpoint as a directory that any program for gpt-oss reads.
///
/// # Errors
/// The directory or a file in it cannot be written.
pub fn export(dir: &Path) -> Result<(), CheckpointError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |error| CheckpointError::Write { path, error }
    };
    fs::create_dir_all(dir).map_err(failed(dir))?;
    let tensors = expand();
    let path = dir.join("model.safetensors");
    let file = File::create(&path).map_err(failed(&path))?;
    let mut file = BufWriter::new(file);
    write(&tensors, &mut file).and_then(|()| file.flush()).map_err(failed(&path))?;

    let total: usize = tensors.iter().map(|full| full.bytes.len()).sum();
    let map: Map<String, Value> = tensors.into_iter().map(|full| (full.name, "model.safetensors".into())).collect();
    let index = json!({"metadata": {"total_size": total}, "weight_map": map});
    let mut text = Vec::new();
    let mut to_text =
        serde_json::Serializer::with_formatter(&mut text, serde_json::ser::PrettyFormatter::with_indent(b" "));
    serde::Serialize::serialize(&index, &mut to_text).expect("an object of strings and numbers has a text");
    text.push(b'\n');
    let texts: [(&str, &[u8]); 3] = [
        ("model.safetensors.index.json", &text),
        ("config.json", CONFIG.as_bytes()),
        ("generation_config.json", GENERATION.as_bytes()),
    ];
    for (name, text) in texts {
        let path = dir.join(name);
        fs::write(&path, text).map_err(failed(&path))?;
    }
    Ok(())
}

/// The tensors of the full checkpoint, the two tables last.
fn expand() -> Vec<Full> {
    const WHOLE: &str = "the embedded pack is whole";
    let vocab = serde_json::from_str::<Value>(CONFIG).expect(WHOLE)["vocab_size"].as_u64().expect(WHOLE) as usize;
    let pack = header::parse(PACK).expect(WHOLE);
    let bytes = |name: &str| &PACK[pack[name].range.clone()];
    let used: Vec<usize> =
        bytes("used_token_ids").as_chunks::<4>().0.iter().map(|&id| u32::from_le_bytes(id) as usize).collect();
    let table = |name: &str| {
        let stem = name.trim_end_matches(".weight");
        let shared = bytes(&format!("{stem}.shared_row"));
        let mut table = shared.repeat(vocab);
        let rows = bytes(&format!("{stem}.used_rows")).chunks_exact(shared.len());
        for (&token, row) in used.iter().zip(rows) {
            table[token * row.len()..][..row.len()].copy_from_slice(row);
        }
        let shape = vec![vocab, shared.len() / 2];
        Full { name: name.to_owned(), dtype: Dtype::BF16, shape, bytes: table.into() }
    };
    let is_packed = |name: &str| name == "used_token_ids" || name.ends_with("_row") || name.ends_with("_rows");
    let mut in_order: Vec<_> = pack.iter().filter(|(name, _)| !is_packed(name)).collect();
    in_order.sort_by_key(|(_, entry)| entry.range.start);
    let copies = in_order.into_iter().map(|(name, entry)| Full {
        name: name.clone(),
        dtype: entry.dtype,
        shape: entry.shape.clone(),
        bytes: PACK[entry.range.clone()].into(),
    });
    copies.chain([names::EMBEDDING, names::UNEMBEDDING].map(table)).collect()
}

fn write(tensors: &[Full], to: &mut impl Write) -> std::io::Result<()> {
    let stated = tensors.iter().map(|full| (full.name.as_str(), full.dtype, full.shape.as_slice()));
    to.write_all(&header::text(Some("pt"), stated))?;
    tensors.iter().try_for_each(|full| to.write_all(&full.bytes))
}
