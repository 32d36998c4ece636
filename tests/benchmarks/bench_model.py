"""Whole models: prefill, decode, switching and memory beside the plain backbone, and beside PEFT's LoRA and SHiRA.

Contestants take turns in one process; what is reported are medians of ratios within a round. The comparisons with
PEFT are made on the backbone's own architecture and size, with random adapters: what they hold does not matter.

    python tests/benchmarks/bench_model.py OUT [--json out.json] [--threads 2] [--parts mediator kept lora shira memory]
    python tests/benchmarks/bench_model.py 1B --layers 2          # a random Llama of that shape, with a random bank
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, ShiraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from mediator_peft import MediatorConfig, load_mediator
from mediator_peft.bank.sparse_delta import SparseDelta
from mediator_peft.evaluation.speed import (
    DENSE,
    MIXED,
    DecodeTurn,
    SpeedSettings,
    measure_speed,
    mixed_rows,
    plain_twin,
    take_turns,
)
from mediator_peft.methods.encoding.bitmaps import pack_bits

SHAPE_1B = dict(
    hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8,
    tie_word_embeddings=True,
)  # fmt: skip
NAMES = ["one", "two", "three", "four"]


def random_model(num_layers: int, encoding: str, density: float) -> Any:
    """A Llama of the 1B shape with fewer layers, from bfloat16 numbers as a checkpoint has, and four random experts.

    The vocabulary is cut like the layers (32000 go with 16), so that the output layer keeps its share.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(num_hidden_layers=num_layers, vocab_size=2000 * num_layers, **SHAPE_1B)
    ).eval()
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data.bfloat16())
    layers = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "layers" in name
    ]
    config = MediatorConfig(
        experts=dict.fromkeys(NAMES, ""), expert_names=NAMES, routed_modules=layers, num_blocks=num_layers,
        encoding=encoding, density=density, fallback="backbone",
    )  # fmt: skip
    wrapped = get_peft_model(model, config)
    for layer in wrapped.base_model.routed_layers().values():
        for name in NAMES:
            layer.bank("default").put(name, random_delta(layer.shape, encoding, density))
    wrapped.base_model.active.awaited.clear()
    return wrapped.eval()


def random_delta(shape: tuple[int, int], encoding: str, density: float) -> SparseDelta:
    kept = torch.rand(shape) < density
    num_kept = int(kept.sum())
    if encoding == "sign":
        parts = {"signs": pack_bits(torch.rand(num_kept) < 0.5), "scales": (torch.rand(shape[0]) * 1e-3).bfloat16()}
    else:
        parts = {"values": (torch.randn(num_kept) * 1e-3).bfloat16()}
    return SparseDelta(shape, encoding, pack_bits(kept), parts)


def with_adapters(plain: torch.nn.Module, config: Any) -> Any:
    """A PEFT model with four adapters around a copy of the plain model's architecture."""
    model = AutoModelForCausalLM.from_config(plain.config)
    model.load_state_dict(plain.state_dict())
    wrapped = get_peft_model(model.to(plain.device, plain.dtype), config, adapter_name=NAMES[0])
    for name in NAMES[1:]:
        wrapped.add_adapter(name, config)
    return wrapped.eval()


class NamedRows:
    """A PEFT model under ``adapter_names``, called as a plain one."""

    def __init__(self, model: Any, names: list[str]) -> None:
        self.model, self.names, self.config = model, names, model.config

    def parameters(self) -> Any:
        return self.model.parameters()

    def __call__(self, **kwargs: Any) -> Any:
        return self.model(adapter_names=self.names, **kwargs)


class OneAdapterAtATime:
    """SHiRA takes no ``adapter_names``: each adapter's rows go through by themselves."""

    def __init__(self, model: Any, settings: SpeedSettings) -> None:
        self.model = model
        rows = settings.batch_size // len(NAMES)
        self.turns = [(name, DecodeTurn(model.base_model.model, nullcontext, rows, settings)) for name in NAMES]

    def __call__(self) -> list[float]:
        seconds = []
        for name, turn in self.turns:
            self.model.set_adapter(name)
            seconds.append(turn())
        return [sum(steps) for steps in zip(*seconds, strict=True)]


@torch.inference_mode()
def beside_peft(model: Any, settings: SpeedSettings, part: str, density: float) -> dict[str, Any]:
    """Decoding a batch over four experts, and the same with four adapters of PEFT."""
    tuner = model.base_model
    plain = plain_twin(tuner)
    experts = tuner.expert_names[: len(NAMES)]
    rows = mixed_rows(experts, settings.batch_size)
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with torch.inference_mode(False):
        if part == "lora":
            config: Any = LoraConfig(r=64, target_modules=linear)
            other: Any = NamedRows(with_adapters(plain, config), mixed_rows(NAMES, settings.batch_size))
            turn: Any = DecodeTurn(other, nullcontext, settings.batch_size, settings)
        else:
            # SHiRA counts by rank: r (O + I) entries a matrix. The rank that keeps as many as the bank in a square one.
            width = plain.config.hidden_size
            config = ShiraConfig(r=round(density * width / 2), target_modules=linear, random_seed=0)
            other = with_adapters(plain, config)
            turn = OneAdapterAtATime(other, settings)
    kept = sum(p.numel() for n, p in other.model.named_parameters() if "lora_" in n or "shira_" in n) // len(NAMES)
    turns = {
        DENSE: DecodeTurn(plain, nullcontext, settings.batch_size, settings),
        MIXED: DecodeTurn(tuner.model, lambda: tuner.use_experts(rows), settings.batch_size, settings),
        part: turn,
    }
    taken = take_turns(turns, settings.rounds)
    faster = median(theirs / ours for theirs, ours in zip(taken[part], taken[MIXED], strict=True))
    seconds = {name: median(each) for name, each in taken.items()}
    return {"seconds": seconds, "times faster": faster, "numbers an adapter": kept}


class KeptTurn:
    """A turn with the experts' whole weights kept, which are made before it and dropped after it, both untimed."""

    def __init__(self, tuner: Any, experts: list[str], turn: Any) -> None:
        self.tuner, self.experts, self.turn = tuner, experts, turn

    def __call__(self) -> list[float]:
        self.tuner.cache_merged_experts(self.experts)
        seconds = self.turn()
        self.tuner.cache_merged_experts(())
        return seconds


@torch.inference_mode()
def with_kept_weights(model: Any, settings: SpeedSettings) -> dict[str, Any]:
    """Decoding a batch over four experts from the packed bank, and with their weights kept folded."""
    tuner = model.base_model
    plain, experts = plain_twin(tuner), tuner.expert_names[: len(NAMES)]
    rows = mixed_rows(experts, settings.batch_size)
    turns = {
        DENSE: DecodeTurn(plain, nullcontext, settings.batch_size, settings),
        MIXED: DecodeTurn(tuner.model, lambda: tuner.use_experts(rows), settings.batch_size, settings),
    }
    turns["kept"] = KeptTurn(
        tuner, experts, DecodeTurn(tuner.model, lambda: tuner.use_experts(rows), settings.batch_size, settings)
    )
    taken = take_turns(turns, settings.rounds)
    tuner.cache_merged_experts(experts)
    num_bytes = sum(layer.cached_bytes for layer in tuner.routed_layers().values())
    tuner.cache_merged_experts(())
    ratios = {
        name: median(dense / ours for dense, ours in zip(taken[DENSE], each, strict=True))
        for name, each in taken.items()
    }
    return {"ratios": ratios, "seconds": {name: median(each) for name, each in taken.items()}, "bytes": num_bytes}


def resident_bytes(out: str, what: str) -> int:
    """Memory of a process of its own that holds the model and has used it; heap and file pages alike."""
    code = (
        "import ctypes, gc, os, sys, torch\n"
        "from mediator_peft import load_mediator\n"
        "from transformers import AutoModelForCausalLM\n"
        "torch.set_num_threads(1)\n"
        "ids = torch.arange(10, 30)[None].repeat(4, 1)\n"
        "out, what = sys.argv[1:]\n"
        "with torch.inference_mode():\n"
        "    if what == 'dense':\n"
        "        import mediator_peft.kernels.dispatch as kernels; kernels.has_native()\n"
        "        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)\n"
        "        for size in (4, 1): model(input_ids=ids[:size])\n"
        "    else:\n"
        "        model, _ = load_mediator(out, dtype=torch.float32)\n"
        "        names = model.base_model.expert_names\n"
        "        if what == 'mixed':\n"
        "            for length in (20, 1): model(input_ids=ids[:, :length], expert_weights=names[:4])\n"
        "        with model.use_experts(names[0]):\n"
        "            model(input_ids=ids[:1])\n"
        "            gc.collect(); ctypes.CDLL(None).malloc_trim(0)\n"
        "            print(open('/proc/self/statm').read().split()[1], flush=True); os._exit(0)\n"
        "gc.collect(); ctypes.CDLL(None).malloc_trim(0)\n"
        "print(open('/proc/self/statm').read().split()[1], flush=True); os._exit(0)\n"
    )
    command = [sys.executable, "-c", code, out, what]
    # ``os._exit`` drops what is not flushed.
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    return int(done.stdout.split()[-1]) * os.sysconf("SC_PAGE_SIZE")


def measure_memory(out: str) -> dict[str, int]:
    dense = resident_bytes(out, "dense")
    return {what: resident_bytes(out, what) - dense for what in ("folded", "mixed")} | {"dense": dense}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what `mediator-peft build` wrote, or 1B")
    parser.add_argument(
        "--parts", nargs="+", default=["mediator"], choices=["mediator", "kept", "lora", "shira", "memory"]
    )
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=2, help="of the 1B shape, which has 16")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--encoding", default="sign", choices=["sign", "float"])
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = SpeedSettings(rounds=args.rounds, prompt_tokens=args.prompt_tokens)
    results: dict[str, Any] = {"arguments": vars(args), "cores": os.cpu_count(), "torch": torch.__version__}
    if set(args.parts) != {"memory"}:
        if args.model == "1B":
            model = random_model(args.layers, args.encoding, args.density)
        else:
            model = load_mediator(args.model, dtype=torch.float32)[0]
        model.to(args.device, getattr(torch, args.dtype))
        if args.model != "1B":
            args.density = model.peft_config["default"].density
    for part in args.parts:
        if part == "mediator":
            report = measure_speed(model, settings)
            results[part] = report.to_dict()
            for pace in report.paces:
                line = f"{pace.work:8} {pace.batch_size} {pace.name:20} {1e3 * pace.seconds:9.1f} ms  x{pace.ratio:.3f}"
                print(line, flush=True)
            print(f"switch {1e3 * report.switch_seconds:.1f} ms = {report.switch_steps:.2f} steps", report.memory)
            print("routing", report.routing_seconds, report.routing_share)
        elif part == "kept":
            results[part] = with_kept_weights(model, settings)
            print(part, results[part])
        elif part == "memory":
            results[part] = measure_memory(args.model)
            print(results[part])
        else:
            results[part] = beside_peft(model, settings, part, args.density)
            print(part, results[part])
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
