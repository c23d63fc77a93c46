//! Damaged checkpoints: each gives one error that names the file, the tensor where there is one, and what to do.

use std::fs::{self, OpenOptions};
use std::path::Path;

use crate::common::{INDEX, SHARD_0, copy_of, edit_header, edit_json, join, split};
use phalanx_model::Checkpoint;
use phalanx_model::checkpoint::inspect::Inspection;
use serde_json::{Value, json};

const SINKS: &str = "model.layers.0.self_attn.sinks";
const ROUTER_BIAS: &str = "model.layers.0.mlp.router.bias";

struct Case {
    what: &'static str,
    damage: fn(&Path),
    /// The whole error; `DIR` stands for the directory.
    error: &'static str,
}

fn config(dir: &Path, edit: impl FnOnce(&mut Value)) {
    edit_json(&dir.join("config.json"), edit);
}

fn header(dir: &Path, edit: impl FnOnce(&mut Value)) {
    edit_header(&dir.join(SHARD_0), edit);
}

fn index(dir: &Path, edit: impl FnOnce(&mut Value)) {
    edit_json(&dir.join(INDEX), edit);
}

fn shard_bytes(dir: &Path, edit: impl FnOnce(&mut Vec<u8>)) {
    let path = dir.join(SHARD_0);
    let mut bytes = fs::read(&path).unwrap();
    edit(&mut bytes);
    fs::write(path, bytes).unwrap();
}

const CASES: &[Case] = &[
    // The directory.
    Case {
        what: "no such directory",
        damage: |dir| fs::remove_dir_all(dir).unwrap(),
        error: "cannot read DIR: No such file or directory (os error 2); check that the file exists and may be read",
    },
    Case {
        what: "no configuration",
        damage: |dir| fs::remove_file(dir.join("config.json")).unwrap(),
        error: "cannot read DIR/config.json: No such file or directory (os error 2); check that the file exists and \
            may be read",
    },
    Case {
        what: "no weights",
        damage: |dir| fs::remove_file(dir.join(INDEX)).unwrap(),
        error: "DIR holds neither model.safetensors.index.json nor model.safetensors; give the directory of a \
            complete checkpoint",
    },
    // config.json.
    Case {
        what: "configuration cut short",
        damage: |dir| fs::write(dir.join("config.json"), "{\"model_type\": ").unwrap(),
        error: "DIR/config.json cannot be understood: EOF while parsing a value at line 1 column 15; download the \
            file again",
    },
    Case {
        what: "configuration of an absurd size",
        damage: |dir| fs::File::create(dir.join("config.json")).unwrap().set_len(1 << 40).unwrap(),
        error: "DIR/config.json has 1099511627776 bytes, but at most 1048576 are possible; download the file again",
    },
    Case {
        what: "another model",
        damage: |dir| config(dir, |c| c["model_type"] = json!("llama")),
        error: "DIR/config.json: field `model_type` is \"llama\", but must be \"gpt_oss\"; use the config.json that \
            belongs to a gpt-oss checkpoint",
    },
    Case {
        what: "zero heads",
        damage: |dir| config(dir, |c| c["num_attention_heads"] = json!(0)),
        error: "DIR/config.json: field `num_attention_heads` is 0, but must be from 1 to 1048576; use the \
            config.json that belongs to a gpt-oss checkpoint",
    },
    Case {
        what: "zero experts",
        damage: |dir| config(dir, |c| c["num_local_experts"] = json!(0)),
        error: "DIR/config.json: field `num_local_experts` is 0, but must be from 1 to 1048576; use the config.json \
            that belongs to a gpt-oss checkpoint",
    },
    Case {
        what: "zero head width",
        damage: |dir| config(dir, |c| c["head_dim"] = json!(0)),
        error: "DIR/config.json: field `head_dim` is 0, but must be from 1 to 1048576; use the config.json that \
            belongs to a gpt-oss checkpoint",
    },
    Case {
        what: "2^31 layers",
        damage: |dir| {
            config(dir, |c| {
                c["num_hidden_layers"] = json!(1_u64 << 31);
                c["layer_types"] = Value::Null;
            });
        },
        error: "DIR/config.json: field `num_hidden_layers` is 2147483648, but must be from 1 to 1024; use the \
            config.json that belongs to a gpt-oss checkpoint",
    },
    Case {
        what: "widths that multiply beyond 64 bits",
        damage: |dir| config(dir, |c| c["num_attention_heads"] = json!(u32::MAX)),
        error: "DIR/config.json: field `num_attention_heads` is 4294967295, but must be from 1 to 1048576; use the \
            config.json that belongs to a gpt-oss checkpoint",
    },
    Case {
        what: "a negative number",
        damage: |dir| config(dir, |c| c["vocab_size"] = json!(-1)),
        error: "DIR/config.json: field `vocab_size` is -1, but must be a whole number below 2^32; use the \
            config.json that belongs to a gpt-oss checkpoint",
    },
    Case {
        what: "a missing field",
        damage: |dir| config(dir, |c| drop(c.as_object_mut().unwrap().remove("hidden_size"))),
        error: "DIR/config.json: field `hidden_size` is missing; use the config.json that belongs to a gpt-oss \
            checkpoint",
    },
    Case {
        what: "attention without biases",
        damage: |dir| config(dir, |c| c["attention_bias"] = json!(false)),
        error: "DIR/config.json: field `attention_bias` is false, but gpt-oss has biases on q, k, v and o; use the \
            config.json that belongs to a gpt-oss checkpoint",
    },
    Case {
        what: "another kind of rotation",
        damage: |dir| config(dir, |c| c["rope_scaling"]["rope_type"] = json!("llama3")),
        error: "DIR/config.json: field `rope_scaling.rope_type` must be \"yarn\" or \"default\"; use the \
            config.json that belongs to a gpt-oss checkpoint",
    },
    Case {
        what: "fewer layer types than layers",
        damage: |dir| config(dir, |c| drop(c["layer_types"].as_array_mut().unwrap().pop())),
        error: "DIR/config.json: field `layer_types` has 3 entries for 4 layers; use the config.json that belongs \
            to a gpt-oss checkpoint",
    },
    Case {
        what: "an end token outside the vocabulary",
        damage: |dir| edit_json(&dir.join("generation_config.json"), |g| g["eos_token_id"] = json!([484, 512])),
        error: "DIR/config.json: field `eos_token_id` is 512, outside the vocabulary of 512; use the config.json \
            that belongs to a gpt-oss checkpoint",
    },
    // The index.
    Case {
        what: "an index that leads upwards",
        damage: |dir| index(dir, |i| i["weight_map"][SINKS] = json!("../../etc/passwd")),
        error: "DIR/model.safetensors.index.json: tensor `model.layers.0.self_attn.sinks` is said to be in \
            `../../etc/passwd`, but a shard must be a plain file name beside the index; download the index again, \
            from a source that you trust",
    },
    Case {
        what: "an index that leads to the root",
        damage: |dir| index(dir, |i| i["weight_map"][SINKS] = json!("/dev/zero")),
        error: "DIR/model.safetensors.index.json: tensor `model.layers.0.self_attn.sinks` is said to be in \
            `/dev/zero`, but a shard must be a plain file name beside the index; download the index again, from a \
            source that you trust",
    },
    Case {
        what: "an index that leads to its own directory",
        damage: |dir| index(dir, |i| i["weight_map"][SINKS] = json!("..")),
        error: "DIR/model.safetensors.index.json: tensor `model.layers.0.self_attn.sinks` is said to be in `..`, \
            but a shard must be a plain file name beside the index; download the index again, from a source that \
            you trust",
    },
    Case {
        what: "an index that names a tensor twice",
        damage: |dir| {
            fs::write(dir.join(INDEX), r#"{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}"#).unwrap();
        },
        error: "DIR/model.safetensors.index.json cannot be understood: tensor `a` appears twice at line 1 column \
            41; download the file again",
    },
    Case {
        what: "an index without a tensor",
        damage: |dir| index(dir, |i| drop(i["weight_map"].as_object_mut().unwrap().remove(SINKS))),
        error: "DIR/model.safetensors.index.json has no tensor `model.layers.0.self_attn.sinks`; use the \
            config.json and the weights of the same checkpoint",
    },
    Case {
        what: "an index that contradicts the shard",
        damage: |dir| index(dir, |i| i["weight_map"][SINKS] = json!("model-00001-of-00002.safetensors")),
        error: "DIR/model-00001-of-00002.safetensors does not hold tensor `model.layers.0.self_attn.sinks`, which \
            the index says it does; download the shard and the index again, both of the same checkpoint",
    },
    Case {
        what: "experts that were widened",
        damage: |dir| {
            let rename = |map: &mut Value| {
                let map = map.as_object_mut().unwrap();
                let value = map.remove("model.layers.0.mlp.experts.down_proj_blocks").unwrap();
                map.insert("model.layers.0.mlp.experts.down_proj".to_owned(), value);
            };
            index(dir, |i| rename(&mut i["weight_map"]));
            header(dir, rename);
        },
        error: "DIR/model.safetensors.index.json holds tensor `model.layers.0.mlp.experts.down_proj` where \
            `model.layers.0.mlp.experts.down_proj_blocks` is needed: the experts are not in MXFP4; use the \
            published checkpoint, not a converted one",
    },
    // Shards.
    Case {
        what: "a missing shard",
        damage: |dir| fs::remove_file(dir.join("model-00002-of-00002.safetensors")).unwrap(),
        error: "DIR/model-00002-of-00002.safetensors is missing, which holds tensor `lm_head.weight` and 1 others; \
            download it",
    },
    Case {
        what: "a directory for a shard",
        damage: |dir| {
            fs::remove_file(dir.join(SHARD_0)).unwrap();
            fs::create_dir(dir.join(SHARD_0)).unwrap();
        },
        error: "cannot read DIR/model-00000-of-00002.safetensors: not a file; check that the file exists and may be \
            read",
    },
    Case {
        what: "an empty shard",
        damage: |dir| fs::write(dir.join(SHARD_0), "").unwrap(),
        error: "DIR/model-00000-of-00002.safetensors: the file has 0 bytes, too few for a safetensors header; \
            download the file again",
    },
    Case {
        what: "a shard cut short in its numbers",
        damage: |dir| shard_bytes(dir, |bytes| bytes.truncate(100_000)),
        error: "DIR/model-00000-of-00002.safetensors: the file is cut short: tensor \
            `model.layers.0.mlp.experts.gate_up_proj_scales` ends at byte 102120, but the file has 100000; download \
            the file again",
    },
    Case {
        what: "a shard cut short in its header",
        damage: |dir| shard_bytes(dir, |bytes| bytes.truncate(100)),
        error: "DIR/model-00000-of-00002.safetensors: the header is said to have 4160 bytes, but at most 92 are \
            possible; download the file again",
    },
    Case {
        what: "a shard with more than its tensors",
        damage: |dir| shard_bytes(dir, |bytes| bytes.push(0)),
        error: "DIR/model-00000-of-00002.safetensors: the tensors end at byte 254856, but the file has 254857; \
            download the file again",
    },
    Case {
        what: "a header of 2^63 bytes",
        damage: |dir| shard_bytes(dir, |bytes| bytes[..8].copy_from_slice(&(1_u64 << 63).to_le_bytes())),
        error: "DIR/model-00000-of-00002.safetensors: the header is said to have 9223372036854775808 bytes, but at \
            most 254848 are possible; download the file again",
    },
    Case {
        what: "a header of 200 MB",
        damage: |dir| {
            shard_bytes(dir, |bytes| bytes[..8].copy_from_slice(&200_000_000_u64.to_le_bytes()));
            OpenOptions::new().write(true).open(dir.join(SHARD_0)).unwrap().set_len(1 << 32).unwrap();
        },
        error: "DIR/model-00000-of-00002.safetensors: the header is said to have 200000000 bytes, but at most \
            100000000 are possible; download the file again",
    },
    Case {
        what: "a header that is not UTF-8",
        damage: |dir| shard_bytes(dir, |bytes| bytes[8 + 3] = 0xFF),
        error: "DIR/model-00000-of-00002.safetensors: the header is not UTF-8 at its byte 3; download the file again",
    },
    Case {
        what: "a tensor that appears twice",
        damage: |dir| {
            let (header, data) = split(&dir.join(SHARD_0));
            let twice = format!(r#"{{"{SINKS}":{{"dtype":"BF16","shape":[8],"data_offsets":[0,16]}},{}"#, &header[1..]);
            join(&dir.join(SHARD_0), twice.as_bytes(), &data);
        },
        error: "DIR/model-00000-of-00002.safetensors: the header is not a table of tensors: tensor \
            `model.layers.0.self_attn.sinks` appears twice at line 1 column 1042; download the file again",
    },
    Case {
        what: "a type that does not exist",
        damage: |dir| header(dir, |h| h[SINKS]["dtype"] = json!("BF17")),
        error: "DIR/model-00000-of-00002.safetensors: the header is not a table of tensors: tensor \
            `model.layers.0.self_attn.sinks`: unknown variant `BF17`, expected one of `BOOL`, `F4`, `F6_E2M3`, \
            `F6_E3M2`, `U8`, `I8`, `F8_E5M2`, `F8_E4M3`, `F8_E8M0`, `F8_E4M3FNUZ`, `F8_E5M2FNUZ`, `I16`, `U16`, \
            `F16`, `BF16`, `I32`, `U32`, `F32`, `C64`, `F64`, `I64`, `U64` at line 1 column 974; download the file \
            again",
    },
    Case {
        what: "tensors that overlap",
        damage: |dir| header(dir, |h| h[ROUTER_BIAS]["data_offsets"] = json!([41_608, 41_624])),
        error: "DIR/model-00000-of-00002.safetensors: tensor `model.layers.0.mlp.router.bias` begins at 41608, \
            inside tensor `model.layers.0.self_attn.sinks`, which ends at 41616; download the file again",
    },
    Case {
        what: "bytes that belong to no tensor",
        damage: |dir| header(dir, |h| drop(h.as_object_mut().unwrap().remove(SINKS))),
        error: "DIR/model-00000-of-00002.safetensors: tensor `model.layers.0.mlp.router.bias` begins at 41616, but \
            the bytes before it end at 41600; download the file again",
    },
    Case {
        what: "offsets that run backwards",
        damage: |dir| header(dir, |h| h[SINKS]["data_offsets"] = json!([41_616, 41_600])),
        error: "DIR/model-00000-of-00002.safetensors: tensor `model.layers.0.self_attn.sinks` has data_offsets \
            41616..41600, which run backwards; download the file again",
    },
    Case {
        what: "offsets beyond 64 bits",
        damage: |dir| {
            let path = dir.join(SHARD_0);
            let (header, data) = split(&path);
            let header = header.replace("[41600, 41616]", "[41600, 99999999999999999999]");
            let header = header.replace("[41600,41616]", "[41600,99999999999999999999]");
            join(&path, header.as_bytes(), &data);
        },
        error: "DIR/model-00000-of-00002.safetensors: the header is not a table of tensors: tensor \
            `model.layers.0.self_attn.sinks`: invalid type: floating point `1e+20`, expected usize at line 1 column \
            1029; download the file again",
    },
    Case {
        what: "offsets at the end of 64 bits",
        damage: |dir| header(dir, |h| h[SINKS]["data_offsets"] = json!([u64::MAX - 16, u64::MAX])),
        error: "DIR/model-00000-of-00002.safetensors: tensor `model.layers.0.mlp.router.bias` begins at 41616, but \
            the bytes before it end at 41600; download the file again",
    },
    Case {
        what: "a shape whose size overflows",
        damage: |dir| header(dir, |h| h[SINKS]["shape"] = json!([1_u64 << 40, 1_u64 << 40])),
        error: "DIR/model-00000-of-00002.safetensors: tensor `model.layers.0.self_attn.sinks` has shape \
            [1099511627776, 1099511627776], whose size overflows; download the file again",
    },
    Case {
        what: "a shape that does not fit its bytes",
        damage: |dir| header(dir, |h| h[SINKS]["shape"] = json!([9])),
        error: "DIR/model-00000-of-00002.safetensors: tensor `model.layers.0.self_attn.sinks` (BF16 [9]) needs 18 \
            bytes, but data_offsets 41600..41616 hold 16; download the file again",
    },
    Case {
        what: "a shape of nine dimensions",
        damage: |dir| header(dir, |h| h[SINKS]["shape"] = json!([8, 1, 1, 1, 1, 1, 1, 1, 1])),
        error: "DIR/model-00000-of-00002.safetensors: the header is not a table of tensors: tensor \
            `model.layers.0.self_attn.sinks`: invalid length 9, expected a list of at most 8 dimensions at line 1 \
            column 1002; download the file again",
    },
    Case {
        what: "another type of the same size",
        damage: |dir| header(dir, |h| h[SINKS]["dtype"] = json!("F16")),
        error: "DIR/model-00000-of-00002.safetensors: tensor `model.layers.0.self_attn.sinks` is F16 [8], but \
            config.json calls for BF16 [8]; use the config.json and the weights of the same checkpoint",
    },
    Case {
        what: "another shape of the same size",
        damage: |dir| header(dir, |h| h["model.layers.0.self_attn.q_proj.weight"]["shape"] = json!([64, 128])),
        error: "DIR/model-00000-of-00002.safetensors: tensor `model.layers.0.self_attn.q_proj.weight` is BF16 [64, \
            128], but config.json calls for BF16 [128, 64]; use the config.json and the weights of the same \
            checkpoint",
    },
    Case {
        what: "a configuration of a model with more layers",
        damage: |dir| {
            config(dir, |c| {
                c["num_hidden_layers"] = json!(5);
                c["layer_types"] = Value::Null;
            });
        },
        error: "DIR/model.safetensors.index.json has no tensor `model.layers.4.input_layernorm.weight`; use the \
            config.json and the weights of the same checkpoint",
    },
];

#[test]
fn each_defect_is_named_with_file_tensor_and_remedy() {
    let mut wrong = Vec::new();
    for case in CASES {
        let copy = copy_of("tiny-a");
        let dir = copy.path();
        (case.damage)(dir);
        let error = Checkpoint::open(dir).map(drop).unwrap_err().to_string();
        let error = error.replace(dir.to_str().unwrap(), "DIR");
        if error != case.error {
            wrong.push(format!("{}:\n  got  {error}\n  want {}", case.what, case.error));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn all_defects_are_listed_at_once() {
    let copy = copy_of("tiny-a");
    let dir = copy.path();
    fs::remove_file(dir.join("model-00002-of-00002.safetensors")).unwrap();
    header(dir, |h| {
        h[SINKS]["dtype"] = json!("F16");
        h[ROUTER_BIAS]["dtype"] = json!("F16");
    });
    let defects: Vec<_> = Checkpoint::defects(dir).iter().map(ToString::to_string).collect();
    assert_eq!(defects.len(), 3, "{defects:#?}");
    for (defect, part) in defects.iter().zip(["model-00002-of", "self_attn.sinks", "router.bias"]) {
        assert!(defect.contains(part), "{defects:#?}");
    }
    let (inspection, config) = Inspection::of_directory(dir);
    assert_eq!(inspection.defects, defects);
    assert_eq!(config.unwrap().hidden, 64);
    assert_eq!(inspection.files.len(), 2);
    assert_eq!(inspection.tensors.len(), 4 * 19 + 1);
}

#[test]
#[cfg(target_os = "linux")]
fn a_pipe_in_place_of_a_shard_does_not_hang() {
    let copy = copy_of("tiny-a");
    let path = copy.path().join(SHARD_0);
    fs::remove_file(&path).unwrap();
    let made = std::process::Command::new("mkfifo").arg(&path).status().unwrap();
    assert!(made.success());
    let error = Checkpoint::open(copy.path()).map(drop).unwrap_err().to_string();
    assert!(error.contains("not a file"), "{error}");
}
