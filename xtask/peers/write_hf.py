"""Writes random weights as a Hugging Face checkpoint, config.json and sharded safetensors, with numpy only."""
import json
import os
import struct

import numpy as np

TYPES = {"bf16": ("BF16", 2), "blocks": ("U8", 1), "scales": ("U8", 1)}
SHARD_BYTES = 4_000_000_000


def config(c):
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "torch_dtype": "bfloat16",
        "hidden_size": c["hidden"], "intermediate_size": c["inter"], "num_hidden_layers": c["layers"],
        "num_attention_heads": c["heads"], "num_key_value_heads": c["kv"], "head_dim": c["hd"],
        "num_local_experts": c["experts"], "num_experts_per_tok": c["topk"], "experts_per_token": c["topk"],
        "vocab_size": c["vocab"], "tie_word_embeddings": False, "attention_bias": True, "attention_dropout": 0.0,
        "hidden_act": "silu", "swiglu_limit": c["swiglu_limit"], "rms_norm_eps": c["eps"], "initializer_range": 0.02,
        "layer_types": [["sliding_attention", "full_attention"][i % 2] for i in range(c["layers"])],
        "sliding_window": c["window"], "max_position_embeddings": c["ctx"], "initial_context_length": c["orig_ctx"],
        "rope_theta": c["theta"], "rope_scaling": {
            "rope_type": "yarn", "factor": c["factor"], "beta_fast": c["beta_fast"], "beta_slow": c["beta_slow"],
            "original_max_position_embeddings": c["orig_ctx"], "truncate": False},
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": kept},
        "router_aux_loss_coef": 0.9, "output_router_logits": False, "use_cache": True,
        "bos_token_id": c["vocab"] - 2, "eos_token_id": c["vocab"] - 1, "pad_token_id": c["vocab"] - 1}


def dump(folder, name, value):
    with open(os.path.join(folder, name), "w") as file:
        json.dump(value, file, indent=1)


def write(weights, folder):
    c = weights.shape
    dump(folder, "config.json", config(c))
    dump(folder, "generation_config.json", {
        "bos_token_id": c["vocab"] - 2, "eos_token_id": [c["vocab"] - 1], "pad_token_id": c["vocab"] - 1,
        "do_sample": False})
    shards, size = [[]], 0
    for name, shape, kind in weights.specs():
        count = int(np.prod(shape)) * TYPES[kind][1]
        if shards[-1] and size + count > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, shape, kind, count))
        size += count
    files = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name, shape, kind, count in shard:
            header[name] = {"dtype": TYPES[kind][0], "shape": list(shape), "data_offsets": [offset, offset + count]}
            offset += count
            files[name] = file_name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(os.path.join(folder, file_name), "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name, shape, kind, _ in shard:
                np.ascontiguousarray(weights.get(name, shape, kind)).tofile(file)
    total = sum(count for shard in shards for *_, count in shard)
    dump(folder, "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": files})


class Tensors:
    """Reads the tensors of a checkpoint directory where they lie."""

    def __init__(self, folder):
        self.tensors = {}
        for name in sorted(name for name in os.listdir(folder) if name.endswith(".safetensors")):
            path = os.path.join(folder, name)
            with open(path, "rb") as file:
                length = struct.unpack("<Q", file.read(8))[0]
                header = json.loads(file.read(length))
            data = np.memmap(path, np.uint8, "r", offset=8 + length)
            for tensor, about in header.items():
                if tensor != "__metadata__":
                    begin, end = about["data_offsets"]
                    values = data[begin:end]
                    values = values.view(np.uint16) if about["dtype"] == "BF16" else values
                    self.tensors[tensor] = values.reshape(about["shape"])

    def __getitem__(self, name):
        return self.tensors[name]
