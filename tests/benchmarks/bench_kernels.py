"""How long products straight from packed deltas take beside the dense product of the same layer.

Dense and packed work alternate as they do in a decode step, over as many layers as no cache holds; what is reported are
ratios of medians. ``share`` is the speed that is left, dense / (dense + packed): 1.0 means that experts cost nothing.

    python tests/benchmarks/bench_kernels.py [--json out.json] [--threads N] [--batch B] [--experts E] [--density D]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from mediator_peft.kernels import dispatch as kernels
from mediator_peft.kernels import native_kernels
from mediator_peft.kernels.dispatch import GroupedProduct, PackedDelta, add_to, row_offsets

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
        return PackedDelta(mask, shape[1], signs=signs, scales=rng.integers(1, 0x3F80, shape[0], np.uint16))
    values = torch.from_numpy(rng.standard_normal(num_kept, np.float32)).to(getattr(torch, form))
    array = values.view(torch.uint16).numpy() if form == "bfloat16" else values.numpy()
    return PackedDelta(mask, shape[1], values=array)


class Times(NamedTuple):
    """Seconds of two lists of calls that were made in turns."""

    median: tuple[float, float]
    """Medians over passes through the lists."""

    best: tuple[float, float]
    """Each call's best time, summed: what is left of the noise of a busy machine is small."""


def alternate(first: list[Callable[[], Any]], second: list[Callable[[], Any]], seconds: float) -> Times:
    passes: list[list[tuple[float, float]]] = []
    end = perf_counter() + seconds
    while perf_counter() < end or len(passes) < 7:
        spent = []
        for first_call, second_call in zip(first, second, strict=True):
            start = perf_counter()
            first_call()
            middle = perf_counter()
            second_call()
            spent.append((middle - start, perf_counter() - middle))
        passes.append(spent)
    times = np.array(passes[2:])  # (passes, calls, 2); the first two warm up
    middle_of, best = np.median(times.sum(axis=1), axis=0), times.min(axis=0).sum(axis=0)
    return Times((float(middle_of[0]), float(middle_of[1])), (float(best[0]), float(best[1])))


def bench_product(shape: tuple[int, int], args: argparse.Namespace, rng: np.random.Generator) -> dict[str, Any]:
    num_layers = max(2, round(BYTES_BEYOND_CACHE / (4 * shape[0] * shape[1])))
    x = torch.randn(args.batch, shape[1])
    groups = np.array_split(np.arange(args.batch), args.experts)
    coefficients = [np.ones(len(group), np.float32) for group in groups]
    weights = [torch.randn(shape) for _ in range(num_layers)]
    # Banks are smaller than weights: some experts' deltas may repeat without fitting the cache.
    bank = [random_delta(shape, args.density, args.form, rng) for _ in range(min(num_layers, 64) * args.experts)]
    starts = [(layer * args.experts) % len(bank) for layer in range(num_layers)]
    products = [GroupedProduct(bank[start : start + args.experts], groups, coefficients) for start in starts]
    out = torch.zeros(args.batch, shape[0])
    dense = [lambda weight=weight: F.linear(x, weight) for weight in weights]
    packed = [lambda product=product: product(x.numpy(), out.numpy()) for product in products]
    times = alternate(dense, packed, args.seconds)
    return {
        "shape": shape,
        **{name: [1e6 * time / num_layers for time in pair] for name, pair in times._asdict().items()},
    }


def with_ratios(row: dict[str, Any]) -> dict[str, Any]:
    """A row of (dense, packed) microseconds, and what they say."""
    dense, packed = row["median"]
    return {
        **row,
        "ratio": packed / dense,
        "share": dense / (dense + packed),
        "best_ratio": row["best"][1] / row["best"][0],
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

        dense_time, packed_time = alternate([dense], [packed], args.seconds / 4).median
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
    parser.add_argument("--helpers", action="store_true", help="use the library's threads, not torch's")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.helpers:
        native_kernels.use_own_threads()
    rng = np.random.default_rng(0)
    results: dict[str, Any] = {"settings": {**vars(args), "compiled": kernels.has_native()}}
    print(f"{args.form}, density {args.density}, batch {args.batch}, {args.experts} experts, {args.threads} threads")
    for model in args.models:
        rows = [bench_product(shape, args, rng) for shape in MODELS[model]]
        block: dict[str, Any] = {"shape": "block"}
        for name in Times._fields:
            counted = [(n, row[name]) for n, row in zip(MODELS[model].values(), rows, strict=True)]
            block[name] = [sum(n * pair[side] for n, pair in counted) for side in (0, 1)]
        products = [with_ratios(row) for row in [*rows, block]]
        folds = [bench_fold(shape, args, rng) for shape in MODELS[model]]
        results[model] = {"products": products, "folds": folds}
        for row in products:
            dense, packed = row["median"]
            print(
                f"{model} product {row['shape']!s:>12}: ratio {row['ratio']:.2f} (of best times "
                f"{row['best_ratio']:.2f}), share {row['share']:.2f}; {packed:.0f} / {dense:.0f} us"
            )
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
