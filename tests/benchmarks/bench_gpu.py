"""One layer on a GPU: packed deltas by Triton and by PyTorch's own operations, beside the dense product.

Times are medians of CUDA events over many launches; inputs and weights rotate, so that caches do not flatter.

    python tests/benchmarks/bench_gpu.py [--json out.json]
"""

from __future__ import annotations

import argparse
import json
from functools import partial

import torch
import torch.nn.functional as F
import triton
from bench_model import random_delta

from mediator_peft.kernels.triton_kernels import DeviceDelta, DeviceDeltas

SHAPES = [(576, 576), (1536, 576), (2048, 2048), (8192, 2048), (4096, 4096), (14336, 4096)]
ROWS = [1, 8, 16, 64]


def milliseconds(run):
    return triton.testing.do_bench(run, warmup=5, rep=40, return_mode="median")


def measure(shape, encoding, density, dtype):
    num_outputs, num_inputs = shape
    copies = max(1, min(16, (200 << 20) // (num_outputs * num_inputs * 2)))
    weights = [torch.randn(shape, device="cuda", dtype=dtype) * 0.02 for _ in range(copies)]
    sparse = [random_delta(shape, encoding, density).to(torch.device("cuda")) for _ in range(4)]
    deltas = [DeviceDelta(each) for each in sparse]
    four, one = DeviceDeltas(deltas), DeviceDeltas(deltas[:1])
    turn = iter(range(1 << 60))
    lines = []
    for rows in ROWS:
        x = torch.randn(rows, num_inputs, device="cuda", dtype=dtype)
        out = torch.zeros(rows, num_outputs, device="cuda", dtype=dtype)
        coefficients = torch.zeros(4, rows, device="cuda")
        coefficients[torch.arange(rows) * 4 // rows, torch.arange(rows)] = 1.0
        runs = {
            "dense": lambda x=x: F.linear(x, weights[next(turn) % copies]),
            "four deltas": partial(four.add_product, x, coefficients, out),
            "one delta": partial(one.add_product, x, coefficients[:1].contiguous(), out),
        }
        times = {name: milliseconds(run) for name, run in runs.items()}
        lines.append({"shape": shape, "encoding": encoding, "density": density, "rows": rows, **times})
    c = torch.ones(1, device="cuda")
    plain = {
        "added by triton": milliseconds(lambda: one.added(weights[next(turn) % copies], c)),
        "added by torch": milliseconds(lambda: (weights[0].float() + sparse[0].dense()).to(dtype)),
        "copy": milliseconds(lambda: weights[next(turn) % copies].clone()),
    }
    return lines, {"shape": shape, "encoding": encoding, "density": density, **plain}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json")
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__, triton.__version__)
    results = []
    for encoding, density in (("sign", 0.2), ("float", 0.1)):
        for shape in SHAPES:
            lines, plain = measure(shape, encoding, density, torch.bfloat16)
            results += [*lines, plain]
            for line in lines:
                share = line["dense"] / (line["dense"] + line["four deltas"])
                print(
                    f"{shape} {encoding} rows {line['rows']:3}: dense {1e3 * line['dense']:7.1f} us, one delta "
                    f"{1e3 * line['one delta']:7.1f}, four {1e3 * line['four deltas']:7.1f}, speed {share:.2f}",
                    flush=True,
                )
            print({k: round(1e3 * v, 1) for k, v in plain.items() if isinstance(v, float) and k != "density"})
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
