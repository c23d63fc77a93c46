"""Random gpt-oss weights, the same for every file format they are written in.

Each tensor comes from a stream of its own, (seed, name), so writers may ask in any order. Dense tensors are bf16, as
bit patterns in uint16. Experts are MXFP4 as Hugging Face lays them out: blocks uint8 [E, rows, K/32, 16], where byte b
holds element 2b in its low nibble and 2b+1 in its high one; scales uint8 [E, rows, K/32] (E8M0, bias 127); rows of
gate_up are a gate (even) and an up (odd) by turns.
"""
import zlib

import numpy as np

SIZES = {
    "tiny": dict(hidden=256, inter=256, layers=4, experts=8, topk=4, heads=4, kv=2, hd=64, vocab=1024),
    "mid": dict(hidden=2880, inter=2880, layers=4, experts=32, topk=4, heads=64, kv=8, hd=64, vocab=8192),
    "full20b": dict(hidden=2880, inter=2880, layers=24, experts=32, topk=4, heads=64, kv=8, hd=64, vocab=201088),
}
COMMON = dict(ctx=131072, orig_ctx=4096, window=128, theta=150000.0, eps=1e-5, factor=32.0, beta_fast=32.0,
              beta_slow=1.0, swiglu_limit=7.0)
CHUNK = 1 << 24  # values drawn at once
E2M1 = np.array([0, .5, 1, 1.5, 2, 3, 4, 6, -0., -.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def f32_to_bf16(x):
    """To the nearest, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bf16_to_f32(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def dequantised(blocks, scales):
    """The values of MXFP4 in Hugging Face's layout, f32 [.., K]."""
    values = np.stack((E2M1[blocks & 15], E2M1[blocks >> 4]), -1).reshape(blocks.shape[:-1] + (32,))
    values = np.ldexp(values, (scales.astype(np.int32) - 127)[..., None])
    return values.reshape(values.shape[:-2] + (-1,)).astype(np.float32)


class Weights:
    def __init__(self, size, layers=None, seed=1):
        self.shape = dict(COMMON, **SIZES[size])
        self.shape["layers"] = layers or self.shape["layers"]
        self.seed = seed

    def _stream(self, name):
        return np.random.Generator(np.random.SFC64([self.seed, zlib.crc32(name.encode()), len(name)]))

    def _normal(self, name, shape, std, mean=0.0):
        count = int(np.prod(shape))
        out = np.empty(count, np.uint16)
        stream = self._stream(name)
        for begin in range(0, count, CHUNK):
            here = min(CHUNK, count - begin)
            # An embedding of the full vocabulary repeats its first chunk: speed does not depend on it, writing does.
            if begin and count > 1 << 27:
                out[begin:begin + here] = out[:here]
                continue
            drawn = stream.standard_normal(here, dtype=np.float32)
            out[begin:begin + here] = f32_to_bf16(drawn * np.float32(std) + np.float32(mean))
        return out.reshape(shape)

    def _bytes(self, name, shape):
        count = int(np.prod(shape))
        words = self._stream(name).integers(0, 1 << 64, size=(count + 7) // 8, dtype=np.uint64)
        return words.view(np.uint8)[:count].reshape(shape)

    def specs(self):
        """(name, shape, kind) of every tensor, in order; kind is bf16, blocks or scales."""
        c = self.shape
        H, I, E, D = c["hidden"], c["inter"], c["experts"], c["hd"]
        q, kv = c["heads"] * D, c["kv"] * D
        yield "model.embed_tokens.weight", (c["vocab"], H), "bf16"
        for layer in range(c["layers"]):
            p = f"model.layers.{layer}."
            yield p + "input_layernorm.weight", (H,), "bf16"
            for name, rows, columns in (("q", q, H), ("k", kv, H), ("v", kv, H), ("o", H, q)):
                yield p + f"self_attn.{name}_proj.weight", (rows, columns), "bf16"
                yield p + f"self_attn.{name}_proj.bias", (rows,), "bf16"
            yield p + "self_attn.sinks", (c["heads"],), "bf16"
            yield p + "post_attention_layernorm.weight", (H,), "bf16"
            yield p + "mlp.router.weight", (E, H), "bf16"
            yield p + "mlp.router.bias", (E,), "bf16"
            yield p + "mlp.experts.gate_up_proj_blocks", (E, 2 * I, H // 32, 16), "blocks"
            yield p + "mlp.experts.gate_up_proj_scales", (E, 2 * I, H // 32), "scales"
            yield p + "mlp.experts.gate_up_proj_bias", (E, 2 * I), "bf16"
            yield p + "mlp.experts.down_proj_blocks", (E, H, I // 32, 16), "blocks"
            yield p + "mlp.experts.down_proj_scales", (E, H, I // 32), "scales"
            yield p + "mlp.experts.down_proj_bias", (E, H), "bf16"
        yield "model.norm.weight", (H,), "bf16"
        yield "lm_head.weight", (c["vocab"], H), "bf16"

    def get(self, name, shape, kind):
        if kind == "blocks":
            return self._bytes(name, shape)
        if kind == "scales":
            # Codes drawn evenly have a root mean square of 2.93: with 2^e a weight is about 1/sqrt(K).
            e = int(round(127 + np.log2(1 / (2.93 * np.sqrt(shape[-1] * 32)))))
            return (self._bytes(name, shape) % 3 + (e - 1)).astype(np.uint8)
        if name.endswith("norm.weight"):
            return self._normal(name, shape, 0.1, 1.0)
        if name.endswith("sinks") or "embed_tokens" in name:
            return self._normal(name, shape, 1.0)
        if len(shape) == 1 or name.endswith("_bias"):
            return self._normal(name, shape, 0.05)
        return self._normal(name, shape, (2.0 if "lm_head" in name else 1.0) / np.sqrt(shape[-1]))
