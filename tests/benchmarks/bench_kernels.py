"""How long products straight from packed deltas take beside the dense product of the same layer.

Dense and packed work alternate as they do in a decode step, over as many layers as no cache holds, and only ratios of medians
are reported. ``share`` is the speed that is left, dense / (dense + packed): 1.0 means that the experts cost nothing.

    python tests/benchmarks/bench_kernels.py [--json out.json] [--threads N] [--batch B] [--experts E] [--density D]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from mediator_peft.bank import kernels
from mediator_peft.bank.kernels import GroupedProduct, PackedDelta, add_to, row_offsets

MODELS = {
    "135M": {(576, 576): 2, (192, 576): 2, (1536, 576): 2, (576, 1536): 1},
    "1B": {(2048, 2048): 2, (512, 2048): 2, (8192, 2048): 2, (2048, 8192): 1},
}
"""Shapes (O, I) of a block's linear layers, and how many there are of each."""

BYTES_BEYOND_CACHE = 160e6


def random_delta(shape: tuple[int, int], density: float, form: str, rng: np.random.Generator) -> PackedDelta:
    kept = rng.random(shape, np.float32) < density
    mask = np.packbits(kept, axis=1, bitorder="little")
    num_kept = int(kept.sum())
    if form == "sign":
        signs = np.packbits(rng.random(num_kept) < 0.5, bitorder="little")
        return PackedDelta(mask, shape[1], signs=signs, scales=rng.random(shape[0], np.float32))
    values = torch.from_numpy(rng.standard_normal(num_kept, np.float32)).to(getattr(torch, form))
    array = values.view(torch.uint16).numpy() if form == "bfloat16" else values.numpy()
    return PackedDelta(mask, shape[1], values=array)


def alternate(first: list[Callable[[], Any]], second: list[Callable[[], Any]], seconds: float) -> tuple[float, float]:
    """Medians over passes of the seconds that each list of calls takes, called in turns."""
    times: list[tuple[float, float]] = []
    end = perf_counter() + seconds
    while perf_counter() < end or len(times) < 7:
        spent = [0.0, 0.0]
        for calls in zip(first, second, strict=True):
            for index, call in enumerate(calls):
                start = perf_counter()
                call()
                spent[index] += perf_counter() - start
        times.append((spent[0], spent[1]))
    kept = times[2:]  # the first passes warm up
    return median(time[0] for time in kept), median(time[1] for time in kept)


def bench_product(shape: tuple[int, int], args: argparse.Namespace, rng: np.random.Generator) -> dict[str, Any]:
    num_layers = max(2, round(BYTES_BEYOND_CACHE / (4 * shape[0] * shape[1])))
    x = torch.randn(args.batch, shape[1])
    groups = np.array_split(np.arange(args.batch), args.experts)
    coefficients = [np.ones(len(group), np.float32) for group in groups]
    weights = [torch.randn(shape) for _ in range(num_layers)]
    # Banks are smaller than weights: some experts' deltas may repeat without fitting the cache.
    bank = [random_delta(shape, args.density, args.form, rng) for _ in range(min(num_layers, 64) * args.experts)]
    products = [
        GroupedProduct([bank[(layer * args.experts + e) % len(bank)] for e in range(args.experts)], groups, coefficients)
        for layer in range(num_layers)
    ]
    out = torch.zeros(args.batch, shape[0])
    dense = [lambda weight=weight: F.linear(x, weight) for weight in weights]
    packed = [lambda product=product: product(x.numpy(), out.numpy()) for product in products]
    dense_time, packed_time = alternate(dense, packed, args.seconds)
    return {
        "shape": shape,
        "ratio": packed_time / dense_time,
        "share": dense_time / (dense_time + packed_time),
        "dense_us": 1e6 * dense_time / num_layers,
        "packed_us": 1e6 * packed_time / num_layers,
    }


def bench_fold(shape: tuple[int, int], args: argparse.Namespace, rng: np.random.Generator) -> dict[str, Any]:
    """Adding a delta to a weight beside adding a dense matrix to it."""
    delta = random_delta(shape, args.density, args.form, rng)
    result: dict[str, Any] = {"shape": shape}
    for dtype in (torch.float32, torch.bfloat16):
        weight, dense_delta = torch.zeros(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
        array = weight.view(torch.uint16).numpy() if dtype == torch.bfloat16 else weight.numpy()

        def dense(weight: torch.Tensor = weight, dense_delta: torch.Tensor = dense_delta) -> None:
            weight.add_(dense_delta, alpha=0.5)

        def packed(array: np.ndarray = array) -> None:
            add_to(array, delta, 0.5)

        dense_time, packed_time = alternate([dense], [packed], args.seconds / 4)
        result[str(dtype).removeprefix("torch.")] = packed_time / dense_time
    start = perf_counter()
    row_offsets(delta.mask)
    result["row_offsets_us"] = 1e6 * (perf_counter() - start)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--form", default="sign", choices=["sign", "float32", "float16", "bfloat16"])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each shape")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rng = np.random.default_rng(0)
    results: dict[str, Any] = {"settings": {**vars(args), "compiled": kernels.has_compiled()}}
    print(f"{args.form}, density {args.density}, batch {args.batch}, {args.experts} experts, {args.threads} threads")
    for model in args.models:
        rows = [bench_product(shape, args, rng) for shape in MODELS[model]]
        counts = MODELS[model].values()
        dense_time = sum(n * row["dense_us"] for n, row in zip(counts, rows, strict=True))
        packed_time = sum(n * row["packed_us"] for n, row in zip(counts, rows, strict=True))
        rows.append({"shape": "block", "ratio": packed_time / dense_time, "share": dense_time / (dense_time + packed_time)})
        folds = [bench_fold(shape, args, rng) for shape in MODELS[model]]
        results[model] = {"products": rows, "folds": folds}
        for row in rows:
            times = f"   ({row['packed_us']:.0f} / {row['dense_us']:.0f} us)" if "dense_us" in row else ""
            print(f"{model} product {row['shape']!s:>12}: ratio {row['ratio']:.2f}, share {row['share']:.2f}{times}")
        for row in folds:
            print(
                f"{model} fold    {row['shape']!s:>12}: ratio to dense add_ float32 {row['float32']:.2f}, bfloat16 "
                f"{row['bfloat16']:.2f}; row_offsets {row['row_offsets_us']:.0f} us"
            )
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
