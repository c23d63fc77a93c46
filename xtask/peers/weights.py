#!/usr/bin/env python3
"""weights.py FOLDER --size tiny|mid|full20b [--layers N] [--dense q8|bf16] [--seed N]

Makes the same random gpt-oss weights twice below FOLDER, as a Hugging Face checkpoint and as GGUF, and checks one
against the other. Files that are there already are kept if their hashes are those they were written with. Progress
goes to stderr; the last line on stdout is JSON: where they are, their hashes and the shape."""
import argparse
import hashlib
import json
import os
import shutil
import sys

import numpy as np

import random_weights
import write_gguf
import write_hf


def say(text):
    print(text, file=sys.stderr, flush=True)


def sha256(paths):
    digest = hashlib.sha256()
    for path in sorted(paths):
        with open(path, "rb", buffering=0) as file:
            while part := file.read(1 << 24):
                digest.update(part)
    return digest.hexdigest()


def recipe():
    """What the bytes depend on besides the options: these scripts."""
    return sha256(os.path.abspath(module.__file__) for module in (random_weights, write_gguf, write_hf))


def files(path):
    # Folders in it are what engines keep beside their weights.
    return [file.path for file in os.scandir(path) if file.is_file()] if os.path.isdir(path) else [path]


def remove(path):
    shutil.rmtree(path) if os.path.isdir(path) else os.path.exists(path) and os.remove(path)


def room(folder, weights, dense):
    """Ends with what to do when the disk is too full for what is not there yet."""
    values = {kind: sum(int(np.prod(shape)) for _, shape, found in weights.specs() if found == kind)
              for kind in ("bf16", "blocks", "scales")}
    experts = values["blocks"] + values["scales"]
    per_value = {"bf16": 2, "q8": 1.1}[dense]
    sizes = {"hf": experts + 2 * values["bf16"], f"{dense}.gguf": experts + per_value * values["bf16"]}
    lacking = sum(size for name, size in sizes.items() if not os.path.exists(os.path.join(folder, name + ".sha256")))
    free = shutil.disk_usage(folder).free
    if free < lacking * 1.02:
        sys.exit(f"{folder}: {free / 1e9:.1f} GB are free, {lacking / 1e9:.1f} are needed: make room, take fewer "
                 "--layers or name another place with --dir")


def ensure(path, write):
    """The hash of what is at `path`, after writing it if it is not there whole. Reading also fills the page cache."""
    stamp = path + ".sha256"
    if os.path.exists(path) and os.path.exists(stamp):
        with open(stamp) as file:
            made_by, want = file.read().split()
        say(f"checking {path}")
        if made_by == recipe() and sha256(files(path)) == want:
            return want, False
        say(f"{path} is not as it was written, or from other scripts: writing it again")
    say(f"writing {path}")
    remove(stamp)
    remove(path)
    write(path)
    found = sha256(files(path))
    with open(stamp, "w") as file:
        file.write(f"{recipe()} {found}\n")
    return found, True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--size", choices=random_weights.SIZES, required=True)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dense", choices=["q8", "bf16"], default="q8")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    weights = random_weights.Weights(args.size, args.layers, args.seed)
    os.makedirs(args.folder, exist_ok=True)
    room(args.folder, weights, args.dense)

    def checkpoint(path):
        os.makedirs(path)
        write_hf.write(weights, path)

    hf, gguf = os.path.join(args.folder, "hf"), os.path.join(args.folder, f"{args.dense}.gguf")
    hf_hash, hf_new = ensure(hf, checkpoint)
    gguf_hash, gguf_new = ensure(gguf, lambda path: write_gguf.write(weights, args.dense, path))
    if hf_new or gguf_new:
        wrong = write_gguf.differences(gguf, write_hf.Tensors(hf))
        if wrong:
            remove(gguf + ".sha256")
            sys.exit(f"{gguf} and {hf} do not hold the same weights: " + "; ".join(wrong[:5]))
    print(json.dumps({"hf": hf, "gguf": gguf, "hf_sha256": hf_hash, "gguf_sha256": gguf_hash, "shape": weights.shape}))


main()
