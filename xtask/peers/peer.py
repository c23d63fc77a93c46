#!/usr/bin/env python3
"""peer.py llama|ik MODEL.gguf --threads N

llama.cpp or ik_llama.cpp through its PyPI bindings, as its users get it: default options, no GPU, N threads; for
ik_llama.cpp weights repacked at load, its fast way. The first line on stdout says what it is and how long it took from
nothing loaded to the first token after 16. Then each line on stdin is answered by one line of JSON:

  bench PROMPT GENERATE BATCH    prefill and decode of random tokens; each decode step fetches every sequence's logits
  logits FILE ID,ID,...          writes the logits of every position, raw f32
"""
import argparse
import ctypes
import json
import os
import resource
import sys
import time

parser = argparse.ArgumentParser()
parser.add_argument("engine", choices=["llama", "ik"])
parser.add_argument("model")
parser.add_argument("--threads", type=int, required=True)
args = parser.parse_args()
os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
BATCH_MAX = 2048

if args.engine == "llama":
    from importlib.metadata import version
    from llama_cpp import llama_cpp as lib
    VERSION = "llama-cpp-python " + version("llama-cpp-python")
else:
    from importlib.metadata import version
    from importlib.util import find_spec
    # One library needs the other and does not say where it is.
    ctypes.CDLL(os.path.join(find_spec("ik_llama_cpp").submodule_search_locations[0], "lib", "libggml.so"))
    from ik_llama_cpp import _ctypes_api as lib
    VERSION = "ik-llama-cpp-python " + version("ik-llama-cpp-python")

raw = lib._lib
floats = ctypes.POINTER(ctypes.c_float)
for name, result, arguments in (
    ("llama_get_logits_ith", floats, [ctypes.c_void_p, ctypes.c_int32]),
    ("llama_batch_init", lib.llama_batch, [ctypes.c_int32] * 3),
    ("llama_decode", ctypes.c_int32, [ctypes.c_void_p, lib.llama_batch]),
    ("llama_model_get_vocab", ctypes.c_void_p, [ctypes.c_void_p]),
    ("llama_vocab_n_tokens", ctypes.c_int32, [ctypes.c_void_p]),
    ("llama_print_system_info", ctypes.c_char_p, []),
):
    getattr(raw, name).restype, getattr(raw, name).argtypes = result, arguments


def say(value):
    print(json.dumps(value), flush=True)


def load():
    lib.llama_backend_init()
    options = lib.llama_model_default_params()
    options.n_gpu_layers = 0
    if args.engine == "ik":
        options.repack_tensors, options.use_mmap = True, False
    model = lib.llama_model_load_from_file(args.model.encode(), options)
    if not model:
        sys.exit(f"{VERSION} does not load {args.model}")
    return model


class Context:
    """A context with room for `batch` sequences of `length` tokens."""

    def __init__(self, model, length, batch):
        options = lib.llama_context_default_params()
        options.n_ctx = -(-max(length, 256) // 256) * 256 * batch
        options.n_batch, options.n_ubatch, options.n_seq_max = BATCH_MAX, 512, batch
        options.n_threads = options.n_threads_batch = args.threads
        self.context = lib.llama_init_from_model(model, options)
        if not self.context:
            sys.exit(f"{VERSION} makes no context for {batch} sequences of {length} tokens")
        self.tokens = raw.llama_batch_init(BATCH_MAX, 0, 1)

    def decode(self, rows):
        """rows: (token, position, sequence, whether its logits are wanted)"""
        batch = self.tokens
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        status = raw.llama_decode(self.context, batch)
        if status:
            sys.exit(f"llama_decode ended with {status}")

    def logits(self, row):
        return raw.llama_get_logits_ith(self.context, row)

    def clear(self):
        if args.engine == "llama":
            lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        else:
            name = "llama_kv_cache_clear" if hasattr(raw, "llama_kv_cache_clear") else "llama_kv_self_clear"
            forget = getattr(raw, name)
            forget.argtypes = [ctypes.c_void_p]
            forget(self.context)

    def free(self):
        lib.llama_free(self.context)


class Random:
    """Token ids from a fixed sequence."""

    def __init__(self, vocab):
        self.state, self.vocab = 12345, vocab

    def next(self):
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (self.state >> 33) % self.vocab


def bench(model, vocab, prompt, generate, batch):
    random = Random(vocab)
    context = Context(model, prompt + generate, batch)

    def prefill(length):
        for sequence in range(batch):
            for begin in range(0, length, BATCH_MAX):
                here = range(begin, min(begin + BATCH_MAX, length))
                context.decode([(random.next(), p, sequence, p == length - 1) for p in here])
            context.logits(-1)[0]

    def steps(begin, count):
        for position in range(begin, begin + count):
            context.decode([(random.next(), position, sequence, 1) for sequence in range(batch)])
            for sequence in range(batch):
                context.logits(sequence)[0]

    prefill(min(prompt, 32))  # warms up
    steps(min(prompt, 32), 2)
    context.clear()
    before = resource.getrusage(resource.RUSAGE_SELF)
    begun = time.perf_counter()
    prefill(prompt)
    prefilled = time.perf_counter()
    steps(prompt, generate)
    ended = time.perf_counter()
    after = resource.getrusage(resource.RUSAGE_SELF)
    context.free()
    say({
        "pp_tok_s": prompt * batch / (prefilled - begun), "tg_tok_s": generate * batch / (ended - prefilled),
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "involuntary": after.ru_nivcsw - before.ru_nivcsw, "peak_gb": after.ru_maxrss * 1024 / 1e9})


def logits(model, vocab, path, ids):
    context = Context(model, len(ids), 1)
    context.decode([(token, position, 0, 1) for position, token in enumerate(ids)])
    with open(path, "wb") as file:
        for row in range(len(ids)):
            file.write(ctypes.string_at(context.logits(row), vocab * 4))
    context.free()
    say({"positions": len(ids), "vocab": vocab})


def main():
    begun = time.perf_counter()
    model = load()
    loaded = time.perf_counter()
    context = Context(model, 64, 1)
    context.decode([(token, token, 0, token == 15) for token in range(16)])
    vocab = raw.llama_vocab_n_tokens(raw.llama_model_get_vocab(model))
    context.logits(-1)[0]
    first = time.perf_counter()
    context.free()
    say({"engine": VERSION, "built_for": raw.llama_print_system_info().decode(), "vocab": vocab,
         "load_s": loaded - begun, "first_token_s": first - begun})
    for line in sys.stdin:
        words = line.split()
        if words[:1] == ["bench"]:
            bench(model, vocab, *map(int, words[1:]))
        elif words[:1] == ["logits"]:
            logits(model, vocab, words[1], [int(token) for token in words[2].split(",")])
        else:
            sys.exit(f"not understood: {line!r}")
    sys.stdout.flush()
    os._exit(0)  # the bindings take long to tear down, and sometimes crash


main()
