#!/usr/bin/env python3
"""ops.py --threads N

llama.cpp's own multiplication by MXFP4 experts, called in the libraries that llama-cpp-python brings: 32 experts of
2880 x 2880, 4 for a token, in memory as llama.cpp lays them out for this processor (repacked where it can). One line of
JSON for 1 and for N threads: GB/s of weights read for one token (each call visits other experts than the last, so none
is in a cache), and GOP/s for 512 tokens, which are 64 for each expert."""
import argparse
import ctypes
import json
import statistics
import time
from ctypes import POINTER, Structure, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import llama_cpp
import numpy as np

F32, I32, MXFP4 = 0, 26, 39
CPU_DEVICE = 0
EXPERTS, USED, WIDTH, TOKENS = 32, 4, 2880, 512


class InitParams(Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


def library(name, **functions):
    """A library beside the bindings, with the result and arguments of the functions that are used."""
    found = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    for function, (result, *arguments) in functions.items():
        getattr(found, function).restype, getattr(found, function).argtypes = result, arguments
    return found


P, I64 = c_void_p, c_int64
base = library(
    "libggml-base.so",
    ggml_init=(P, InitParams), ggml_nbytes=(c_size_t, P), ggml_new_graph=(P, P),
    ggml_new_tensor_2d=(P, P, c_int, I64, I64), ggml_new_tensor_3d=(P, P, c_int, I64, I64, I64),
    ggml_mul_mat_id=(P, P, P, P, P), ggml_build_forward_expand=(None, P, P),
    ggml_backend_alloc_ctx_tensors=(P, P, P), ggml_backend_alloc_ctx_tensors_from_buft=(P, P, P),
    ggml_backend_tensor_set=(None, P, P, c_size_t, c_size_t), ggml_backend_graph_compute=(c_int, P, P),
    ggml_backend_reg_get_proc_address=(P, P, c_char_p), ggml_backend_dev_backend_reg=(P, P),
    ggml_backend_dev_supports_op=(c_bool, P, P), ggml_backend_buffer_free=(None, P))
cpu = library("libggml-cpu.so", ggml_backend_cpu_init=(P,), ggml_backend_cpu_set_n_threads=(None, P, c_int))
ggml = library("libggml.so", ggml_backend_dev_by_type=(P, c_int))


def context():
    return base.ggml_init(InitParams(1 << 20, None, True))


def put(tensor, values):
    values = np.ascontiguousarray(values)
    assert base.ggml_nbytes(tensor) == values.nbytes
    base.ggml_backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)


def layouts(device):
    """The layouts that llama.cpp would try for a weight on the CPU, in its order; None is the plain one."""
    address = base.ggml_backend_reg_get_proc_address(
        base.ggml_backend_dev_backend_reg(device), b"ggml_backend_dev_get_extra_bufts")
    if address:
        extra = ctypes.CFUNCTYPE(POINTER(P), P)(address)(device)
        for i in range(16):
            if not extra or not extra[i]:
                break
            yield extra[i]
    yield None


class Product:
    """experts x tokens, ready to run."""

    def __init__(self, backend, weights, tokens):
        ctx = context()
        self.backend = backend
        self.tokens = base.ggml_new_tensor_3d(ctx, F32, WIDTH, 1, tokens)
        self.chosen = base.ggml_new_tensor_2d(ctx, I32, USED, tokens)
        self.out = base.ggml_mul_mat_id(ctx, weights, self.tokens, self.chosen)
        self.graph = base.ggml_new_graph(ctx)
        base.ggml_build_forward_expand(self.graph, self.out)
        self.count, self.ctx = tokens, ctx

    def fill(self):
        base.ggml_backend_alloc_ctx_tensors(self.ctx, self.backend)
        put(self.tokens, np.random.default_rng(1).standard_normal((self.count, 1, WIDTH), np.float32))

    def seconds(self, first):
        """Of one run in which token i visits the experts from first + 4 i on."""
        visits = (first + USED * np.arange(self.count)[:, None] + np.arange(USED)) % EXPERTS
        put(self.chosen, visits.astype(np.int32))
        begun = time.perf_counter()
        assert base.ggml_backend_graph_compute(self.backend, self.graph) == 0
        return time.perf_counter() - begun


def experts(device, backend):
    """The weights in the first layout that the product supports, and whether that is not the plain one."""
    for layout in layouts(device):
        ctx = context()
        weights = base.ggml_new_tensor_3d(ctx, MXFP4, WIDTH, WIDTH, EXPERTS)
        if layout:
            buffer = base.ggml_backend_alloc_ctx_tensors_from_buft(ctx, layout)
        else:
            buffer = base.ggml_backend_alloc_ctx_tensors(ctx, backend)
        if buffer and base.ggml_backend_dev_supports_op(device, Product(backend, weights, 1).out):
            blocks = np.random.default_rng(2).integers(0, 256, (EXPERTS * WIDTH * WIDTH // 32, 17), np.uint8)
            blocks[:, 0] = 120 + blocks[:, 0] % 3  # scales
            put(weights, blocks)
            return weights, bool(layout)
        if buffer:
            base.ggml_backend_buffer_free(buffer)
    raise SystemExit("llama.cpp multiplies by no MXFP4 experts on this processor")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    llama_cpp.llama_backend_init()
    device, backend = ggml.ggml_backend_dev_by_type(CPU_DEVICE), cpu.ggml_backend_cpu_init()
    weights, repacked = experts(device, backend)
    one, many = Product(backend, weights, 1), Product(backend, weights, TOKENS)
    one.fill()
    many.fill()
    report = {"repacked": repacked}
    for threads in sorted({1, args.threads}):
        cpu.ggml_backend_cpu_set_n_threads(backend, threads)
        vector = statistics.median(one.seconds(USED * call) for call in range(64))
        matrix = statistics.median(many.seconds(0) for _ in range(5))
        report[f"{threads}_threads"] = {
            "gemv_gb_s": USED * WIDTH * WIDTH * 17 / 32 / 1e9 / vector,
            "gemm_gop_s": 2 * TOKENS * USED * WIDTH * WIDTH / 1e9 / matrix}
    print(json.dumps(report))


main()
