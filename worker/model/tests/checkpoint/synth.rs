//! Random checkpoints.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::common::fixture;
use phalanx_model::checkpoint::names;
use phalanx_model::synth::{self, Shape};
use phalanx_model::{Checkpoint, checkpoint};
use phalanx_proto::LayerKind;

fn made(layers: Option<u32>, seed: u64) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write(layers, seed, dir.path());
    dir
}

fn write(layers: Option<u32>, seed: u64, dir: &Path) {
    let shape = Shape::Config(fixture("tiny-b").join("config.json"));
    let mut last = (0, 0);
    synth::write(&shape, layers, seed, dir, &mut |written, total| {
        assert!(last.0 < written && written <= total);
        last = (written, total);
    })
    .unwrap();
    assert_eq!(last.0, last.1);
}

fn content(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let file = |entry: std::io::Result<fs::DirEntry>| {
        let path = entry.unwrap().path();
        (path.strip_prefix(dir).unwrap().to_owned(), fs::read(path).unwrap())
    };
    fs::read_dir(dir).unwrap().map(file).collect()
}

#[test]
fn a_random_checkpoint_opens_and_has_the_shape_asked_for() {
    let dir = made(None, 1);
    let (ours, model) = (Checkpoint::open(dir.path()).unwrap(), Checkpoint::open(&fixture("tiny-b")).unwrap());
    assert_eq!(ours.total_bytes(), model.total_bytes());
    assert_eq!(
        phalanx_proto::ModelConfig { eos: vec![], ..ours.config().clone() },
        phalanx_proto::ModelConfig { eos: vec![], ..model.config().clone() }
    );
    for file in ours.files() {
        let bytes = fs::read(dir.path().join(file.name)).unwrap();
        assert!(safetensors::SafeTensors::deserialize(&bytes).is_ok());
    }
}

#[test]
fn the_layers_can_be_fewer_or_more() {
    for layers in [1, 9] {
        let dir = made(Some(layers), 1);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let kinds: Vec<_> = [LayerKind::Sliding, LayerKind::Full].into_iter().cycle().take(layers as usize).collect();
        assert_eq!(checkpoint.config().layers, kinds);
    }
    let shape = Shape::Small;
    for layers in [0, u32::MAX] {
        let dir = tempfile::tempdir().unwrap();
        let error = synth::write(&shape, Some(layers), 1, dir.path(), &mut |_, _| ()).unwrap_err().to_string();
        assert!(error.contains(&format!("`num_hidden_layers` is {layers}")), "{error}");
    }
}

#[test]
fn the_same_seed_gives_the_same_files_and_another_does_not() {
    let (first, again, other) = (made(Some(2), 1), made(Some(2), 1), made(Some(2), 2));
    assert!(content(first.path()) == content(again.path()));
    let weights = Path::new("model-00000-of-00000.safetensors");
    assert!(content(first.path())[weights] != content(other.path())[weights]);
}

#[test]
fn scales_are_near_the_size_that_keeps_activations_steady() {
    let dir = made(Some(1), 1);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    // 1 / (2.93 sqrt(128)) is about 2^-5.05.
    let scales = checkpoint.tensor("model.layers.0.mlp.experts.gate_up_proj_scales").unwrap();
    let seen: std::collections::BTreeSet<u8> = scales.bytes().iter().copied().collect();
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), [121, 122, 123]);
}

#[test]
fn a_directory_of_ones_own_is_written_again_and_any_other_is_refused() {
    let dir = made(Some(3), 1);
    write(Some(1), 2, dir.path());
    assert!(content(dir.path()) == content(made(Some(1), 2).path()), "nothing of the first is left");

    let other = crate::common::copy_of("tiny-a");
    let before = content(other.path());
    let error = synth::write(&Shape::Small, Some(1), 1, other.path(), &mut |_, _| ()).unwrap_err().to_string();
    let place = other.path().display();
    assert_eq!(error, format!("{place} is not empty; give a new directory"));
    assert!(content(other.path()) == before);
}

#[test]
fn a_model_made_in_memory_has_the_written_one_s_first_layer_in_every_layer() {
    let dir = tempfile::tempdir().unwrap();
    let config = fixture("tiny-a").join("config.json");
    synth::write(&Shape::Config(config.clone()), Some(3), 1, dir.path(), &mut |_, _| ()).unwrap();
    let written = Checkpoint::open(dir.path()).unwrap();
    let made = checkpoint::open(&format!("synth:{}:3", config.display())).unwrap();
    assert_eq!(made.config(), written.config());
    assert_eq!(made.total_bytes(), written.total_bytes());
    assert_eq!(made.config().layers.len(), 3);
    for expected in names::expected(made.config()) {
        let first = match expected.name.strip_prefix("model.layers.").and_then(|name| name.split_once('.')) {
            Some((_, part)) => format!("model.layers.0.{part}"),
            None => expected.name.clone(),
        };
        let (tensor, same) = (made.view(&expected.name).unwrap(), written.view(&first).unwrap());
        assert!(tensor.source.bytes() == same.source.bytes(), "{}", expected.name);
    }
}

#[test]
fn a_model_that_cannot_be_made_in_memory_is_refused() {
    for (model, words) in [
        ("synth:", "give 20b, 120b"),
        ("synth:200b", "200b"),
        ("synth:20b:0", "layers"),
        ("synth:20b:4294967295", "layers"),
        ("synth:20b:x", "20b:x"),
    ] {
        let error = checkpoint::open(model).unwrap_err().to_string();
        assert!(error.contains(words), "{model}: {error}");
    }
}
