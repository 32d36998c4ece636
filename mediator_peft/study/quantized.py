"""The Mediator model, and whole experts, with weights in 4 or 8 bits."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints.adapter_files import find_adapter
from ..checkpoints.adapter_sizes import read_adapter_info
from ..demo.tasks import Item
from ..evaluation.fit_and_save import fit_and_save
from ..evaluation.generation import ROUTED, Memo
from ..evaluation.report import write_json
from ..tuner.config import MediatorConfig
from .compared_system import Comparison, System
from .systems import MARKER, Part, Parts, built_model, calibration_prompts, is_built, model_key

_FLOAT_BYTES = 2
"""Of a parameter that is not quantised, in bfloat16."""


@dataclass(frozen=True)
class Quantized:
    """How the weights are held."""

    kind: str
    """``nf4`` or ``int8``, by bitsandbytes."""

    is_corrected: bool = False
    """Whether one more delta corrects the quantization error."""

    is_expert: bool = False
    """A whole expert, named, instead of the routed Mediator model."""

    @property
    def is_fitted_on_codes(self) -> bool:
        """Whether the router is: without a correction, 4-bit codes move what it sees, and users are told to."""
        return self.kind != "int8" and not self.is_corrected


QUANTIZED = {
    "Mediator, routed, nf4 corrected": Quantized("nf4", is_corrected=True),
    "Mediator, routed, int8": Quantized("int8"),
    "Mediator, routed, nf4": Quantized("nf4"),
    "experts, int8": Quantized("int8", is_expert=True),
    "experts, nf4": Quantized("nf4", is_expert=True),
}
"""Name of a system → how its weights are held."""


def quantized_system(run: Comparison, name: str) -> System:
    """One of :data:`QUANTIZED`."""
    how = QUANTIZED[name]
    return _whole_experts(run, how.kind) if how.is_expert else _mediator(run, how)


def _mediator(run: Comparison, how: Quantized) -> System:
    def loaded() -> tuple[Any, Any]:
        return load_quantized(run, how)

    key = f"quantized {how}"

    def parts(task: str) -> Parts:
        def of_items(items: Sequence[Item]) -> Iterator[Part]:
            model, tokenizer = run.once(key, loaded)
            memo = run.once(f"{key} memo", Memo.empty)
            arguments = {"model": model, "tokenizer": tokenizer, "expert_weights": ROUTED, "memo": memo}
            yield list(range(len(items))), arguments

        return of_items

    def num_bytes() -> int:
        return backbone_bytes(run.once(key, loaded)[0]) + read_adapter_info(_folder(run, how)).adapter_bytes

    depends = [model_key(run.bench, _config(how)), how.kind]
    if how.is_fitted_on_codes:
        depends.append("router fitted on codes")
    return System(depends, parts, num_bytes)


def load_quantized(run: Comparison, how: Quantized) -> tuple[Any, Any]:
    """The Mediator model and its tokenizer."""
    return _loaded(_folder(run, how), how.kind)


def _loaded(folder: Path, kind: str) -> tuple[Any, Any]:
    from ..tuner.loading import bitsandbytes_settings, load_mediator

    settings = bitsandbytes_settings(kind, torch.float32)
    return load_mediator(folder, dtype=torch.float32, quantization_config=settings, device_map="cpu")


def _config(how: Quantized) -> MediatorConfig:
    return MediatorConfig(for_quantization=how.kind if how.is_corrected else None)


def _folder(run: Comparison, how: Quantized) -> Path:
    bench = run.bench
    if how.is_corrected:
        return built_model(bench, f"{how.kind}-{len(bench.experts)}{bench.suffix}", _config(how))
    return _fitted_on_codes(run, how.kind) if how.is_fitted_on_codes else run.default


def _fitted_on_codes(run: Comparison, kind: str) -> Path:
    """The default model with a router that was fitted on the backbone's codes."""
    folder = run.bench.folder.models / f"{run.default.name}-fitted-{kind}"
    key = model_key(run.bench, MediatorConfig())
    if not is_built(folder, key):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(run.default, folder)
        (folder / MARKER).unlink()
        model, tokenizer = _loaded(folder, kind)
        fit_and_save(model, tokenizer, calibration_prompts(run.bench), find_adapter(folder))
        write_json({"key": key}, folder / MARKER)
    return folder


def _whole_experts(run: Comparison, kind: str) -> System:
    """Each expert as it was trained, on its own task."""
    experts = run.bench.experts

    def loaded(task: str) -> Any:
        from transformers import AutoModelForCausalLM

        from ..tuner.loading import bitsandbytes_settings

        settings = bitsandbytes_settings(kind, torch.float32)
        path = experts[task].path
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, quantization_config=settings, device_map="cpu"
        ).eval()

    def parts(task: str) -> Parts:
        def of_items(items: Sequence[Item]) -> Iterator[Part]:
            yield list(range(len(items))), {"model": loaded(task), "tokenizer": run.lab.tokenizer}

        return of_items

    def num_bytes() -> int:
        return len(experts) * backbone_bytes(loaded(next(iter(experts))))

    return System([run.bench.hashes, kind], parts, num_bytes, answers_unknown=False)


def backbone_bytes(model: nn.Module) -> int:
    """Of a model's weights, each once: codes with their scales, and what is not quantised in bfloat16.

    Deltas and routers are not counted; a tied head is counted once.
    """
    total, seen = 0, set[int]()
    for name, weight in model.named_parameters():
        if "mediator" in name or id(weight) in seen:
            continue
        seen.add(id(weight))
        total += _bytes_of(weight)
    return total


def _bytes_of(weight: nn.Parameter) -> int:
    """Of one weight; a row of int8 codes has one float32 scale."""
    if weight.dtype == torch.int8:
        return weight.numel() + 4 * weight.shape[0]
    state = getattr(weight, "quant_state", None)
    if state is not None:
        return weight.numel() + state.absmax.numel() * state.absmax.element_size()
    return weight.numel() * _FLOAT_BYTES
