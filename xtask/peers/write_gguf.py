"""Writes random weights as a GGUF file, laid out as llama.cpp's own converter does. Needs gguf and numpy."""
import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from random_weights import bf16_to_f32, dequantised

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm", "mlp.router": "ffn_gate_inp",
}
TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
       "lm_head.weight": "output.weight"}
FILE_TYPE = {"bf16": 32, "q8": 38}
ROWS = 4096  # rows converted at once


def gguf_name(name):
    if name in TOP:
        return TOP[name]
    _, _, layer, rest = name.split(".", 3)
    if rest == "self_attn.sinks":
        return f"blk.{layer}.attn_sinks.weight"
    base, leaf = rest.rsplit(".", 1)
    return f"blk.{layer}.{NAMES[base]}.{leaf}"


def mxfp4(blocks, scales):
    """Hugging Face's blocks and scales as ggml's: the scale, then byte j with element j (low) and j + 16 (high)."""
    words = np.ascontiguousarray(blocks).view(np.uint64)  # [.., 2]: bytes 0 to 7, and 8 to 15
    first, second = words[..., 0], words[..., 1]
    low, high, four = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(0xF0F0F0F0F0F0F0F0), np.uint64(4)
    out = np.empty(blocks.shape[:-1] + (17,), np.uint8)
    out[..., 0] = scales
    out[..., 1::2] = ((first & low) | ((second & low) << four))[..., None].view(np.uint8)
    out[..., 2::2] = (((first >> four) & low) | (second & high))[..., None].view(np.uint8)
    return out.reshape(out.shape[:-2] + (-1,))


def q8_0(values):
    """f32 [rows, K] to bytes [rows, K/32*34]: an f16 scale and 32 int8 rounded half away from zero, as ggml does."""
    blocks = values.reshape(values.shape[0], -1, 32)
    scale = np.abs(blocks).max(-1) / np.float32(127)
    inverse = np.where(scale > 0, 1 / np.where(scale > 0, scale, 1), 0).astype(np.float32)
    scaled = blocks * inverse[..., None]
    out = np.empty(blocks.shape[:-1] + (34,), np.uint8)
    out[..., :2] = scale.astype(np.float16)[..., None].view(np.uint8)
    out[..., 2:] = np.trunc(scaled + np.copysign(np.float32(.5), scaled)).astype(np.int8).view(np.uint8)
    return out.reshape(values.shape[0], -1)


def dense(bits, to):
    if to == "bf16":
        return bits.view(np.uint8).reshape(bits.shape[0], -1)
    return np.concatenate([q8_0(bf16_to_f32(bits[row:row + ROWS])) for row in range(0, bits.shape[0], ROWS)])


def items(weights, to):
    """(name, shape, numpy type, GGUF type, how to make the values) of every tensor."""
    specs = {spec[0]: spec for spec in weights.specs()}
    u8, f32 = np.dtype(np.uint8), np.dtype(np.float32)
    for name, shape, kind in specs.values():
        if kind == "blocks":
            layer = name.split(".")[2]
            scales, bias = (specs[name.replace("_blocks", ending)] for ending in ("_scales", "_bias"))
            gate_up = [("ffn_gate_exps", 0, 2), ("ffn_up_exps", 1, 2)]
            for part, first, step in gate_up if "gate_up" in name else [("ffn_down_exps", 0, 1)]:
                rows = slice(first, None, step)
                yield (f"blk.{layer}.{part}.weight", (shape[0], shape[1] // step, shape[2] * 17), u8, Type.MXFP4,
                       lambda spec=specs[name], scales=scales, rows=rows:
                       mxfp4(weights.get(*spec)[:, rows], weights.get(*scales)[:, rows]))
                yield (f"blk.{layer}.{part}.bias", (shape[0], shape[1] // step), f32, None,
                       lambda bias=bias, rows=rows: bf16_to_f32(weights.get(*bias))[:, rows])
        elif kind == "bf16" and "mlp.experts" not in name:
            if len(shape) == 1 or "router" in name:
                yield gguf_name(name), shape, f32, None, lambda spec=specs[name]: bf16_to_f32(weights.get(*spec))
            else:
                columns, raw = (shape[1] * 2, Type.BF16) if to == "bf16" else (shape[1] // 32 * 34, Type.Q8_0)
                yield (gguf_name(name), (shape[0], columns), u8, raw,
                       lambda spec=specs[name]: dense(weights.get(*spec), to))


def vocabulary(size):
    """256 bytes as GPT-2 spells them, then made-up words and two control tokens; and the type of each."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    words = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    words += [f"<t{i}>" for i in range(256, size - 2)] + ["<|startoftext|>", "<|endoftext|>"]
    return words, [1] * 256 + [4] * (size - 258) + [3, 3]


def write(weights, to, path):
    c = weights.shape
    out = gguf.GGUFWriter(path, "gpt-oss")
    out.add_name(f"random gpt-oss, {to} dense weights")
    out.add_block_count(c["layers"])
    out.add_context_length(c["ctx"])
    out.add_embedding_length(c["hidden"])
    out.add_feed_forward_length(c["inter"])
    out.add_head_count(c["heads"])
    out.add_head_count_kv(c["kv"])
    out.add_key_length(c["hd"])
    out.add_value_length(c["hd"])
    out.add_rope_freq_base(c["theta"])
    out.add_layer_norm_rms_eps(c["eps"])
    out.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    out.add_rope_scaling_factor(c["factor"])
    out.add_rope_scaling_orig_ctx_len(c["orig_ctx"])
    out.add_rope_scaling_yarn_beta_fast(c["beta_fast"])
    out.add_rope_scaling_yarn_beta_slow(c["beta_slow"])
    out.add_expert_count(c["experts"])
    out.add_expert_used_count(c["topk"])
    out.add_expert_feed_forward_length(c["inter"])
    out.add_sliding_window(c["window"])
    out.add_vocab_size(c["vocab"])
    out.add_file_type(FILE_TYPE[to])
    words, types = vocabulary(c["vocab"])
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-4o")
    out.add_token_list(words)
    out.add_token_types(types)
    out.add_token_merges(["h e"])
    out.add_bos_token_id(c["vocab"] - 2)
    out.add_eos_token_id(c["vocab"] - 1)
    out.add_add_bos_token(False)
    tensors = list(items(weights, to))
    for name, shape, kind, raw, _ in tensors:
        out.add_tensor_info(name, shape, kind, int(np.prod(shape)) * kind.itemsize, raw_dtype=raw)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_ti_data_to_file()
    for name, shape, kind, _, make in tensors:
        values = np.ascontiguousarray(make())
        assert values.shape == tuple(shape) and values.dtype == kind, (name, values.shape, shape)
        out.write_tensor_data(values)
    out.close()


def differences(path, hf):
    """Where a GGUF file and a checkpoint disagree: of every tensor (of 2 experts each) the first and last 64 rows,
    dequantised by the gguf package. q8 may be off by half a step, 1/254 of the largest value, and by its scale's f16,
    1/2048."""
    names = {there: here for here, there in TOP.items()}
    reverse = {there: here for here, there in NAMES.items()}
    found = []
    for tensor in gguf.GGUFReader(path).tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        data = tensor.data.reshape(shape[:-1] + (-1,))
        if tensor.name.startswith("blk."):
            _, layer, base, leaf = tensor.name.split(".")
            p = f"model.layers.{layer}."
            name = p + "self_attn.sinks" if base == "attn_sinks" else p + f"{reverse.get(base)}.{leaf}"
        else:
            name = names[tensor.name]
        if "_exps." in tensor.name:
            base = p + "mlp.experts." + ("down_proj" if "down" in tensor.name else "gate_up_proj")
            rows = slice(None) if "down" in tensor.name else slice(int("up" in tensor.name), None, 2)
            some = [0, shape[0] - 1]
            if leaf == "bias":
                want, got = bf16_to_f32(hf[base + "_bias"][some][:, rows]), np.asarray(data[some])
            else:
                take = lambda values: np.concatenate((values[some][:, rows][:, :64], values[some][:, rows][:, -64:]), 1)
                want = dequantised(take(hf[base + "_blocks"]), take(hf[base + "_scales"]))
                got = np.concatenate((data[some][:, :64], data[some][:, -64:]), 1)
                got = gguf.quants.dequantize(got, tensor.tensor_type)
        else:
            ends = lambda values: np.concatenate((values[:64], values[-64:]))
            want = bf16_to_f32(ends(hf[name]))
            got = gguf.quants.dequantize(ends(data), tensor.tensor_type)
        allowed = np.abs(want).max() / 220 if tensor.tensor_type == Type.Q8_0 else 0.0
        worst = np.abs(want.reshape(-1) - got.reshape(-1)).max() if want.size == got.size else np.inf
        if not worst <= allowed:
            found.append(f"{tensor.name}: off by {worst}")
    return found
