"""Where a scratch weight overtakes packed deltas beside the codes: forward passes of a quantised model by their length.

    python tests/benchmarks/bench_quantized.py OUT [--kind nf4] [--device cpu]    # OUT: what a build wrote

Two rows that want two experts; the two ways take turns, medians.
"""

from __future__ import annotations

import argparse
from statistics import median
from time import perf_counter

import torch
from transformers import BitsAndBytesConfig

from mediator_peft import load_mediator

TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--kind", default="nf4", choices=["nf4", "fp4", "int8", "plain"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    how = {}
    if asked.kind == "int8":
        how = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    elif asked.kind != "plain":
        four = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=asked.kind, bnb_4bit_compute_dtype=torch.float32
        )
        how = {"quantization_config": four}
    model, _ = load_mediator(asked.out, dtype=torch.float32, device_map=asked.device, **how)
    model = model.base_model
    for count in TOKENS:
        ids = torch.randint(5, 1000, (2, count), device=asked.device)
        taken = {"sparse": [], "dense": []}
        for number in range(asked.rounds + 1):
            for execution, seconds in taken.items():
                model.set_execution(execution)
                with torch.inference_mode(), model.use_experts(model.expert_names[:2]):
                    start = perf_counter()
                    model.model(input_ids=ids, logits_to_keep=1)
                    if ids.device.type == "cuda":
                        torch.cuda.synchronize()
                    if number:
                        seconds.append(perf_counter() - start)
        sparse, dense = (1e3 * median(seconds) for seconds in taken.values())
        print(f"2 x {count:4} tokens: sparse {sparse:8.1f} ms, dense {dense:8.1f} ms, {sparse / dense:.2f}")


if __name__ == "__main__":
    main()
