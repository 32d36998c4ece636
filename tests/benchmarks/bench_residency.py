"""A hundred experts of which few are in memory: what memory holds, and how long the first token of a cold one takes.

Cold is really cold: before each turn the expert's file is dropped from the system's page cache too.

    python tests/benchmarks/bench_residency.py FOLDER [--experts 100] [--resident 4] [--threads 2] [--json out.json]
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from bench_model import random_delta
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from mediator_peft import MediatorConfig, load_mediator

SHAPE = dict(
    vocab_size=4096, hidden_size=256, intermediate_size=768, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=4,
)  # fmt: skip


def write_model(folder: Path, num_experts: int) -> None:
    """A small random Llama with random experts."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).eval()
    names = [f"expert {number}" for number in range(num_experts)]
    layers = [name for name, module in model.named_modules() if name.endswith("_proj")]
    config = MediatorConfig(
        experts=dict.fromkeys(names, ""), expert_names=names, routed_modules=layers, num_blocks=8, fallback="backbone"
    )
    wrapped = get_peft_model(model, config)
    for layer in wrapped.base_model.routed_layers().values():
        for name in names:
            layer.bank("default").put(name, random_delta(layer.shape, "sign", 0.2))
    wrapped.save_pretrained(folder)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def forget_on_disk(folder: Path) -> None:
    """Drop the experts' files from the page cache."""
    for path in folder.rglob("*.bin"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@torch.inference_mode()
def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    experts = folder / "mapped"
    model, _ = load_mediator(folder, max_resident_experts=args.resident, expert_folder=experts)
    tuner = model.base_model
    ids = torch.arange(5, 5 + args.tokens)[None]
    names, store = tuner.expert_names, tuner.expert_store
    memory, seconds = [], {"cold": [], "new": [], "warm": []}

    def prefill(name: str) -> float:
        start = perf_counter()
        with tuner.use_experts(name):
            tuner.model(input_ids=ids, logits_to_keep=1)
        return perf_counter() - start

    for name in names:  # the first use also finds the offsets of an expert's rows
        forget_on_disk(experts)
        seconds["new"].append(prefill(name))
        memory.append(resident_bytes())
    for name in names[:40]:
        forget_on_disk(experts)
        assert name not in store.resident
        seconds["cold"].append(prefill(name))
        seconds["warm"].append(prefill(name))
    one = sum(path.stat().st_size for path in experts.rglob("*.bin")) / len(names)
    growth = (median(memory[-10:]) - median(memory[10:20])) / (len(names) - 20)
    return {
        "bytes of an expert": one,
        "bytes memory grows by for each further expert used": growth,
        "milliseconds": {name: 1e3 * median(taken) for name, taken in seconds.items()},
        "cold over warm": median(seconds["cold"]) / median(seconds["warm"]),
        "first use over warm": median(seconds["new"]) / median(seconds["warm"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--experts", type=int, default=100)
    parser.add_argument("--resident", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="of the prompt")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="write the results to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not (args.folder / "adapter_config.json").exists():
        write_model(args.folder, args.experts)
    results = {"settings": {key: str(value) for key, value in vars(args).items()}, **measure(args.folder, args)}
    print(json.dumps(results, indent=1))
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
