#!/usr/bin/env python3
"""How fast other kernels do a layer of gpt-oss experts: MXFP4 weights, bf16 rows, the router left out.

A layer takes rows and their chosen experts: rows are gathered by expert, multiplied by gate and up (interleaved), put
through the clamped SwiGLU, multiplied by down, and the results of a row's experts are added by their weights. Experts
are those that `phalanx bench kernels` chooses, so that the same weights are touched.

Whatever is not installed, or computes something else than a float32 reference, is NOT RUN; that is no failure. Times
are medians of replays of a CUDA graph that goes through all experts, divided by the layers in it. Sorting rows by
expert is not in them: where it can be measured, together with the choice that is fused with it, it is told beside.
"""

import argparse
import json
import statistics
import sys
import traceback

import torch

HIDDEN = INTERMEDIATE = 2880
TOP_K = 4
SHAPES = {"20b": 32, "120b": 128}
ALPHA, LIMIT = 1.702, 7.0
# Codes and one scale for every 32 of them, of gate, up and down.
EXPERT_BYTES = 3 * HIDDEN * INTERMEDIATE * 17 // 32
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
# Norm of the difference, of the norm of the reference: peers round to bf16 between the two matrices.
TOLERANCE = 0.02
REPLAYS = 15


class NotRun(Exception):
    """Why a peer is not compared."""


class Matrix:
    """MXFP4 weights of every expert, [E, rows, cols]: two codes a byte, lower first, and a scale for 32 columns."""

    def __init__(self, experts, rows, cols, random):
        make = dict(dtype=torch.uint8, device="cuda", generator=random)
        self.rows, self.cols = rows, cols
        self.codes = torch.randint(0, 256, (experts, rows, cols // 2), **make)
        # Such that numbers of size one give numbers of size one.
        self.scales = torch.randint(119, 122, (experts, rows, cols // 32), **make)

    def dense(self, expert):
        table = torch.tensor(FP4 + [-x for x in FP4], device="cuda")
        codes = self.codes[expert].int()
        values = table[torch.stack((codes & 15, codes >> 4), -1).view(self.rows, self.cols)]
        scales = torch.exp2(self.scales[expert].float() - 127)
        return values * scales.repeat_interleave(32, 1)


class Layer:
    def __init__(self, experts):
        random = torch.Generator("cuda").manual_seed(7)
        self.experts = experts
        self.gate_up = Matrix(experts, 2 * INTERMEDIATE, HIDDEN, random)
        self.down = Matrix(experts, HIDDEN, INTERMEDIATE, random)

    def reference(self, x, ids, weights):
        out = torch.zeros(x.shape, device="cuda")
        for row, expert in ((row, expert) for row in range(len(x)) for expert in range(TOP_K)):
            e = int(ids[row, expert])
            gate, up = (self.gate_up.dense(e) @ x[row].float()).view(-1, 2).unbind(-1)
            gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
            hidden = gate * torch.sigmoid(ALPHA * gate) * (up + 1)
            out[row] += weights[row, expert] * (self.down.dense(e) @ hidden)
        return out


class Choices:
    """The experts of `phalanx bench kernels`, step after step."""

    MASK = (1 << 64) - 1

    def __init__(self):
        self.state = 11

    def step(self, rows, experts):
        ids = []
        for _ in range(rows):
            chosen = []
            while len(chosen) < TOP_K:
                self.state = (self.state * 6364136223846793005 + 1442695040888963407) & self.MASK
                expert = (self.state >> 33) % experts
                if expert not in chosen:
                    chosen.append(expert)
            # One of the peers orders a row's experts; the others do not mind.
            ids.append(sorted(chosen))
        return torch.tensor(ids, device="cuda")


class Step:
    """Rows and their experts with weights, which are the softmax of `logits` among the chosen."""

    def __init__(self, rows, ids, experts):
        self.x = torch.randn(rows, HIDDEN, device="cuda", dtype=torch.bfloat16)
        self.ids = ids
        scores = torch.rand(rows, TOP_K, device="cuda")
        self.weights = torch.softmax(scores, -1)
        self.logits = torch.full((rows, experts), -1e4, device="cuda").scatter_(1, ids, scores)


def triton_kernels(layer, warps, split):
    """OpenAI's: two launches of matmul_ogs, of which the first gathers rows and the second adds them up."""
    try:
        from triton_kernels import matmul_ogs as ogs
        from triton_kernels.matmul_ogs_details import opt_flags
        from triton_kernels.numerics import InFlexData
        from triton_kernels.routing import routing
        from triton_kernels.swiglu import swiglu_fn
        from triton_kernels.tensor import FP4 as fp4, convert_layout, wrap_torch_tensor
        from triton_kernels.tensor_details import layout
    except ImportError as why:
        raise NotRun(f"{why}") from why
    opt_flags.reset_opt_flags_constraints()
    if not split:
        opt_flags.update_opt_flags_constraints({"split_k": 1})

    def hold(matrix):
        value_layout, value_options = layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
        scale_layout, scale_options = layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1, num_warps=warps)
        # Blocks of 128 columns read four scales each, also the last.
        scales = torch.nn.functional.pad(matrix.scales, (0, -matrix.scales.shape[-1] % 4))
        value = convert_layout(wrap_torch_tensor(matrix.codes.mT, dtype=fp4), value_layout, **value_options)
        scale = convert_layout(wrap_torch_tensor(scales.mT), scale_layout, **scale_options)
        return value, ogs.PrecisionConfig(weight_scale=scale, flex_ctx=ogs.FlexCtx(rhs_data=InFlexData()))

    gate_up, gate_up_precision = hold(layer.gate_up)
    down, down_precision = hold(layer.down)
    swiglu = ogs.FusedActivation(ogs.FnSpecs("swiglu", swiglu_fn, ("alpha", "limit")), (ALPHA, LIMIT), 2)

    def prepare(step):
        return routing(step.logits, TOP_K)

    def run(step, routed):
        data, gather, scatter = routed
        hidden = ogs.matmul_ogs(step.x, gate_up, None, data, gather_indx=gather, precision_config=gate_up_precision,
                                fused_activation=swiglu)
        return ogs.matmul_ogs(hidden, down, None, data, scatter_indx=scatter, precision_config=down_precision,
                              gammas=data.gate_scal)

    return prepare, run, True


def humming(layer):
    """Two indexed GEMMs with the activation between them; the sum is ours, for its own is part of vLLM."""
    try:
        from humming.forward import humming_forward, may_process_input
        from humming.schema.gpt_oss_mxfp4 import GptOssMxfp4WeightSchema
        from humming.transform import prepare_and_transform_humming_tensors
        from humming.tune import get_heuristics_config
    except ImportError as why:
        raise NotRun(f"{why}") from why
    compute = json.dumps({"gemm_type": "indexed"})
    locks = torch.zeros(2048, dtype=torch.int32, device="cuda")
    activation = (f"fminf(a, {LIMIT}f) / (1.f + expf(-{ALPHA}f * fminf(a, {LIMIT}f)))"
                  f" * (fminf(fmaxf(b, -{LIMIT}f), {LIMIT}f) + 1.f)")

    def hold(matrix):
        tensors = {"weight": matrix.codes.clone(), "weight_scale": matrix.scales.clone()}
        schema, tensors = GptOssMxfp4WeightSchema().convert_humming(
            tensors, [matrix.rows], [matrix.cols], torch.bfloat16, layer.experts)
        return prepare_and_transform_humming_tensors(
            tensors, matrix.rows, matrix.cols, schema, num_experts=layer.experts, pad_n_to_multiple=256,
            pad_k_to_multiple=128, torch_dtype=torch.bfloat16, device=torch.device("cuda:0"))

    matrices = hold(layer.gate_up), hold(layer.down)

    def prepare(step):
        prepared = []
        for config, _ in matrices:
            tuning = get_heuristics_config(config, shape_m=step.ids.numel(), gemm_type="indexed")
            prepared.append((json.dumps(tuning), align(step.ids, layer.experts, tuning["block_shape"][0])))
        return prepared

    def multiply(which, x, rows, top_k, prepared):
        (config, tensors), (tuning, (order, experts, padded)) = matrices[which], prepared[which]
        out = torch.empty(rows, config.shape_n - config.pad_shape_n, dtype=torch.bfloat16, device="cuda")
        return humming_forward(
            config, x, **tensors, outputs=out, locks=locks, top_k=top_k, valid_shape_m=rows, compute_config=compute,
            tuning_config=tuning, sorted_ids=order, expert_ids=experts, num_tokens_padded=padded)

    def run(step, prepared):
        rows = step.ids.numel()
        both = multiply(0, step.x, rows, TOP_K, prepared)
        hidden = torch.empty(rows, INTERMEDIATE, dtype=torch.bfloat16, device="cuda")
        may_process_input(matrices[1][0], both, outputs=hidden, activation_type="binary_interleaved",
                          activation_impl=activation)
        return combine(multiply(1, hidden, rows, 1, prepared), step.weights)

    return prepare, run, False


def align(ids, experts, block):
    """Choices sorted by expert, each expert's filled up to whole blocks; the blocks' experts; how many choices."""
    flat = ids.flatten()
    order, blocks = [], []
    for expert in range(experts):
        mine = (flat == expert).nonzero().flatten()
        count = -(-len(mine) // block)
        order.append(torch.nn.functional.pad(mine, (0, count * block - len(mine)), value=len(flat)))
        blocks += [expert] * count
    order = torch.cat(order).int()
    return order, torch.tensor(blocks, dtype=torch.int32, device="cuda"), torch.tensor(
        len(order), dtype=torch.int32, device="cuda")


def combine(parts, weights):
    """Adds up a row's results, [T, K, H] by [T, K], as one matrix product a row."""
    parts = parts.view(*weights.shape, HIDDEN)
    return torch.bmm(weights[:, None].to(parts.dtype), parts)[:, 0]


def marlin(_):
    raise NotRun("it comes only inside vLLM, which needs another PyTorch than this")


PEERS = {
    "triton_kernels": lambda layer: triton_kernels(layer, 8, False),
    "triton_kernels/4": lambda layer: triton_kernels(layer, 4, False),
    "triton_kernels/split": lambda layer: triton_kernels(layer, 8, True),
    "humming": humming,
    "marlin": marlin,
}


def error(layer, step, out):
    """Of a few rows."""
    some = torch.linspace(0, len(step.x) - 1, min(4, len(step.x)), device="cuda").long()
    reference = layer.reference(step.x[some], step.ids[some], step.weights[some])
    return float((out[some].float() - reference).norm() / reference.norm())


def replay(work, layers):
    """Microseconds of one of `layers` layers of work."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        work()
    times = []
    for _ in range(REPLAYS + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / layers)
    return statistics.median(times[2:])


def measure(layer, peer, rows, warm):
    prepare, run, sorts = peer
    choices = Choices()
    # As many steps as go through all weights.
    count = -(-4 * layer.experts // min(rows * TOP_K, layer.experts))
    torch.manual_seed(rows)
    steps = [Step(rows, choices.step(rows, layer.experts), layer.experts) for _ in range(count)]
    visited = statistics.mean(len(step.ids.unique()) for step in steps)
    prepared = [prepare(step) for step in steps]
    off = error(layer, steps[0], run(steps[0], prepared[0]))
    if not off < TOLERANCE:
        raise NotRun(f"with {rows} rows it is off by {off:.3f} of the reference's norm, {TOLERANCE} is allowed")
    if warm:
        return None

    def all_steps():
        for step, ready in zip(steps, prepared):
            run(step, ready)

    def sort_all():
        for step in steps:
            prepare(step)

    us = replay(all_steps, count)
    return {
        "rows": rows,
        "us": us,
        "sort_us": replay(sort_all, count) if sorts else None,
        "experts": visited,
        "gb_per_s": visited * EXPERT_BYTES / us / 1e3,
        "tflop_per_s": 6 * rows * TOP_K * HIDDEN * INTERMEDIATE / us / 1e6,
        "off": off,
    }


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--shape", default="20b,120b", help="of 20b, 120b")
    options.add_argument("--rows", default="1,8,64,256,1024,8192")
    options.add_argument("--peers", default=",".join(PEERS))
    options.add_argument("--json", help="where to write the numbers to")
    options.add_argument("--warm", action="store_true", help="compile and check, measure nothing")
    options = options.parse_args()
    if not torch.cuda.is_available():
        print("NOT RUN peers: no GPU")
        return
    rows_of = [int(rows) for rows in options.rows.split(",")]
    results = []
    line = "{:22} {:5} {:>5} {:>9} {:>9} {:>8} {:>7} {:>8} {:>7}".format
    print(line("peer", "shape", "rows", "us", "sort us", "experts", "GB/s", "TFLOP/s", "off"))
    for shape in options.shape.split(","):
        layer = Layer(SHAPES[shape])
        for name in options.peers.split(","):
            for rows in [None, *rows_of]:
                try:
                    if rows is None:
                        peer = PEERS[name](layer)
                        continue
                    result = measure(layer, peer, rows, options.warm)
                except Exception as why:  # whatever a peer stumbles over is told, and the next one begins
                    if not isinstance(why, NotRun):
                        traceback.print_exc()
                    at = shape if rows is None else f"{shape}, {rows} rows"
                    print(f"NOT RUN {name}: {at}: {(str(why).strip() or repr(why)).splitlines()[0]}", flush=True)
                    if rows is None:
                        break
                    continue
                if result:
                    results.append({"peer": name, "shape": shape, **result})
                    sort = f"{result['sort_us']:.1f}" if result["sort_us"] else "-"
                    print(line(name, shape, rows, f"{result['us']:.1f}", sort, f"{result['experts']:.1f}",
                               f"{result['gb_per_s']:.0f}", f"{result['tflop_per_s']:.1f}", f"{result['off']:.4f}"),
                          flush=True)
            peer = None
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), "results": results}, file, indent=1)


if __name__ == "__main__":
    sys.exit(main())
