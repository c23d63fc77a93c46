//! Genuine checkpoints, in every form they come in.

use std::fs;
use std::sync::Arc;

use crate::common::{INDEX, copy_of, edit_json, fixture, split};
use phalanx_model::Checkpoint;
use phalanx_model::checkpoint::inspect::{Inspection, ModelSummary};
use phalanx_model::checkpoint::{Dtype, names, parse_config};
use phalanx_proto::{LayerIdx, LayerKind};
use serde_json::{Value, json};

fn config_of(name: &str) -> Value {
    serde_json::from_slice(&fs::read(fixture(name).join("config.json")).unwrap()).unwrap()
}

#[test]
fn a_sharded_checkpoint_opens_and_its_tensors_are_the_bytes_of_the_files() {
    for (name, layers) in [("tiny-a", 4), ("tiny-b", 6)] {
        let checkpoint = Checkpoint::open(&fixture(name)).unwrap();
        assert_eq!(checkpoint.name(), name);
        assert_eq!(checkpoint.config().layers.len(), layers);
        assert_eq!(checkpoint.files().len(), 3);
        assert!(checkpoint.embedding_mapped());
        let mut total = 0;
        for file in checkpoint.files() {
            let bytes = fs::read(fixture(name).join(&file.name)).unwrap();
            let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            for (tensor, view) in theirs.tensors() {
                let ours = checkpoint.view(&tensor).unwrap();
                assert_eq!(ours.shape, view.shape());
                assert_eq!(ours.dtype.to_string(), format!("{:?}", view.dtype()));
                assert!(ours.source.bytes() == view.data(), "{tensor}");
                total += view.data().len() as u64;
            }
        }
        assert_eq!(checkpoint.total_bytes(), total);
        assert!(checkpoint.embedding().table() == checkpoint.tensor(names::EMBEDDING).unwrap().bytes());
    }
}

#[test]
fn a_checkpoint_is_shared_by_threads() {
    let checkpoint = Arc::new(Checkpoint::open(&fixture("tiny-a")).unwrap());
    let sums: Vec<u64> = std::thread::scope(|scope| {
        let sum = || checkpoint.embedding().table().iter().map(|&b| u64::from(b)).sum();
        let threads: Vec<_> = (0..2).map(|_| scope.spawn(sum)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(sums[0], sums[1]);
}

#[test]
fn the_fields_mean_what_they_say() {
    let config = Checkpoint::open(&fixture("tiny-a")).unwrap().config().clone();
    assert_eq!((config.hidden, config.intermediate, config.head_dim), (64, 96, 16));
    assert_eq!((config.heads, config.kv_heads, config.experts, config.top_k), (8, 2, 8, 4));
    assert_eq!((config.window, config.vocab, config.context), (8, 512, 131_072));
    assert_eq!(config.layers, [LayerKind::Sliding, LayerKind::Full].repeat(2));
    assert_eq!((config.eps, config.swiglu_limit), (1e-5, 7.0));
    assert_eq!(config.eos, [484, 481, 494], "the list of generation_config.json wins");
    let rope = config.rope;
    assert_eq!((rope.theta, rope.factor, rope.beta_fast, rope.beta_slow), (150_000.0, 32.0, 32.0, 1.0));
    assert_eq!((rope.original_context, rope.truncate), (4096, false));
    assert!((rope.attention_factor - 1.346_573_590_279_972_7).abs() < 1e-15);
}

#[test]
fn both_forms_of_rotation_mean_the_same() {
    let old = config_of("tiny-a");
    let mut new = old.clone();
    let fields = new.as_object_mut().unwrap();
    let (mut scaling, theta) = (fields.remove("rope_scaling").unwrap(), fields.remove("rope_theta").unwrap());
    scaling["rope_theta"] = theta;
    fields.insert("rope_parameters".to_owned(), scaling);
    assert_eq!(parse_config(&new, None), parse_config(&old, None));
}

#[test]
fn rotation_has_the_defaults_of_the_library() {
    let rope = |edit: fn(&mut Value)| {
        let mut config = config_of("tiny-a");
        edit(&mut config);
        parse_config(&config, None).unwrap().rope
    };
    assert!(rope(|c| drop(c["rope_scaling"].as_object_mut().unwrap().remove("truncate"))).truncate);
    assert_eq!(rope(|c| c["rope_scaling"]["attention_factor"] = json!(1.5)).attention_factor, 1.5);
    for plain in [
        rope(|c| c["rope_scaling"] = Value::Null),
        rope(|c| c["rope_scaling"] = json!({"rope_type": "default"})),
        rope(|c| c["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 150_000})),
    ] {
        assert_eq!((plain.theta, plain.factor, plain.attention_factor), (150_000.0, 1.0, 1.0));
    }
}

#[test]
fn fields_have_second_names_and_defaults() {
    let parsed = |edit: fn(&mut serde_json::Map<String, Value>)| {
        let mut config = config_of("tiny-a");
        edit(config.as_object_mut().unwrap());
        parse_config(&config, None).unwrap()
    };
    let published = parsed(|_| ());
    assert_eq!(published.eos, [484]);
    assert_eq!(parsed(|c| drop(c.remove("num_experts_per_tok"))), published);
    assert_eq!(parsed(|c| drop(c.remove("experts_per_token"))), published);
    assert_eq!(parsed(|c| drop(c.remove("layer_types"))), published);
    assert_eq!(parsed(|c| drop(c.remove("attention_bias"))), published);
    assert_eq!(parsed(|c| c["quantization_config"]["quant_method"] = json!("gptq")), published);
    assert_eq!(parsed(|c| c["eos_token_id"] = json!([1, 2])).eos, [1, 2]);
    assert_eq!(parsed(|c| drop(c.remove("eos_token_id"))).eos, [0_u32; 0]);
    let full_first = parsed(|c| {
        c["layer_types"] = json!(["full_attention", "full_attention", "sliding_attention", "full_attention"]);
    });
    assert_eq!(full_first.layers, [LayerKind::Full, LayerKind::Full, LayerKind::Sliding, LayerKind::Full]);
}

#[test]
fn one_file_without_an_index_is_a_checkpoint() {
    let copy = copy_of("tiny-a");
    let dir = copy.path();
    let mut tensors = Vec::new();
    for number in 0..3 {
        let path = dir.join(format!("model-{number:05}-of-00002.safetensors"));
        let bytes = fs::read(&path).unwrap();
        let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let owned = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
            (name, view.dtype(), view.shape().to_vec(), view.data().to_vec())
        };
        tensors.extend(theirs.tensors().into_iter().map(owned));
        fs::remove_file(path).unwrap();
    }
    let views = tensors.iter().map(|(name, dtype, shape, data)| {
        (name, safetensors::tensor::TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
    fs::remove_file(dir.join(INDEX)).unwrap();
    fs::remove_file(dir.join("generation_config.json")).unwrap();

    let (one, many) = (Checkpoint::open(dir).unwrap(), Checkpoint::open(&fixture("tiny-a")).unwrap());
    assert_eq!(one.files().len(), 1);
    assert_eq!(one.config().eos, [484]);
    for expected in names::expected(many.config()) {
        let name = &expected.name;
        assert!(one.tensor(name).unwrap().bytes() == many.tensor(name).unwrap().bytes(), "{name}");
    }
}

#[test]
fn the_index_decides_and_tensors_of_no_use_are_left_alone() {
    let copy = copy_of("tiny-a");
    let dir = copy.path();
    let shard = dir.join("model-00002-of-00002.safetensors");
    let (header, mut data) = split(&shard);
    let mut header: Value = serde_json::from_str(&header).unwrap();
    let (begin, end) = (data.len(), data.len() + 4);
    header["rotary.inv_freq"] = json!({"dtype": "F32", "shape": [1], "data_offsets": [begin, end]});
    data.extend([0; 4]);
    crate::common::join(&shard, header.to_string().as_bytes(), &data);
    fs::rename(&shard, dir.join("tables.safetensors")).unwrap();
    edit_json(&dir.join(INDEX), |index| {
        for name in [names::EMBEDDING, names::UNEMBEDDING, "rotary.inv_freq"] {
            index["weight_map"][name] = json!("tables.safetensors");
        }
    });
    let checkpoint = Checkpoint::open(dir).unwrap();
    assert_eq!(checkpoint.view("rotary.inv_freq").unwrap().dtype, Dtype::F32);
    assert_eq!(Inspection::of(&checkpoint).unused, ["rotary.inv_freq"]);
    let whole = Checkpoint::open(&fixture("tiny-a")).unwrap();
    assert_eq!(checkpoint.total_bytes(), whole.total_bytes());
}

#[test]
#[cfg(unix)]
fn a_cache_whose_files_are_links_to_elsewhere_opens() {
    let cache = tempfile::tempdir().unwrap();
    let snapshot = cache.path().join("snapshots/abc");
    let blobs = cache.path().join("blobs");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(&blobs).unwrap();
    for entry in fs::read_dir(fixture("tiny-a")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), blobs.join(entry.file_name())).unwrap();
        let target = std::path::Path::new("../../blobs").join(entry.file_name());
        std::os::unix::fs::symlink(target, snapshot.join(entry.file_name())).unwrap();
    }
    assert!(Checkpoint::open(&snapshot).is_ok());
}

#[test]
fn names_follow_the_published_index() {
    let index: Value = serde_json::from_slice(&fs::read(fixture("tiny-b").join(INDEX)).unwrap()).unwrap();
    let published: Vec<&String> = index["weight_map"].as_object().unwrap().keys().collect();
    let config = parse_config(&config_of("tiny-b"), None).unwrap();
    let ours = names::expected(&config);
    assert_eq!(ours.iter().map(|tensor| &tensor.name).collect::<Vec<_>>(), published);
    assert_eq!(names::layer(LayerIdx(3), "self_attn.sinks"), "model.layers.3.self_attn.sinks");
    for part in names::EXPERT_PARTS {
        assert!(published.contains(&&names::layer(LayerIdx(0), part)), "{part}");
    }
}

#[test]
fn the_sizes_of_the_published_models_follow_from_their_shapes() {
    let mut config = config_of("tiny-a");
    for (field, value) in [
        ("num_hidden_layers", 36),
        ("hidden_size", 2880),
        ("intermediate_size", 2880),
        ("num_attention_heads", 64),
        ("num_key_value_heads", 8),
        ("head_dim", 64),
        ("num_local_experts", 128),
        ("vocab_size", 201_088),
    ] {
        config[field] = value.into();
    }
    config["layer_types"] = Value::Null;
    let large = ModelSummary::new(&parse_config(&config, None).unwrap());
    assert_eq!(large.bytes.total, 65_248_815_744);
    assert_eq!(large.bytes.experts, 60_993_699_840);
    assert_eq!(large.bytes.attention, 1_911_610_368);
    assert_eq!((large.parameters, large.active_parameters), (116_829_156_672, 5_132_849_472));
    config["num_hidden_layers"] = json!(24);
    config["num_local_experts"] = json!(32);
    let small = ModelSummary::new(&parse_config(&config, None).unwrap());
    assert_eq!(small.bytes.total, 13_761_264_768);
    assert_eq!((small.parameters, small.active_parameters), (20_914_757_184, 3_608_307_264));
}
