"""Accuracy against bytes: how near an expert comes back from many forms of its delta, on the experts of the demo.

    python tests/benchmarks/bench_accuracy.py mediator-demo --json forms.json --plot forms.png

Reads base, experts and data of a finished ``mediator-peft demo``; draws new items from another seed, which neither
training nor test holds. Every form is written into a plain model's weights by hand. For each: the share of items whose
whole answer is right token by token (teacher forcing, which is greedy generation as long as all is right), the answers'
loss, and the divergence from the expert's own next-token distribution, in nats a token, which tells forms apart that
the few items cannot.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from math import log2
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mediator_peft.demo.data import make_tasks
from mediator_peft.demo.settings import FULL
from mediator_peft.evaluation.prompts import render, token_ids
from mediator_peft.methods.rounding import ROUNDINGS

NUM_ITEMS = {"maths": 16, "cron": 40, "spelling": 60}
Rebuilt = Callable[[str, str], Tensor]
"""(matrix, expert) → the weight (O, I) that stands for the expert's."""


def entropy(share: float) -> float:
    """Bits to say of one entry whether it is kept."""
    return 0.0 if share in (0, 1) else -share * log2(share) - (1 - share) * log2(1 - share)


class Models:
    """Weights of base, experts and their average, and the matrices that get deltas."""

    def __init__(self, folder: Path) -> None:
        names = list(FULL.recipes)
        self.base = load_file(folder / "base" / "model.safetensors")
        found = {name: sorted((folder / "experts").glob(f"{name}-*"))[-1] for name in names}
        self.experts = {name: load_file(path / "model.safetensors") for name, path in found.items()}
        self.mean = {
            key: (sum(state[key].float() for state in self.experts.values()) / len(names)).bfloat16().float()
            for key in self.base
        }
        self.targets = [key for key in self.base if "layers." in key and key.endswith("proj.weight")]

    def delta(self, key: str, expert: str) -> Tensor:
        return self.experts[expert][key].float() - self.mean[key]


class Judge:
    """A plain model and the items it is asked."""

    def __init__(self, folder: Path, models: Models) -> None:
        self.models = models
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "base")
        self.model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()
        seen = {
            item.prompt
            for task in make_tasks(FULL, folder / "materials").values()
            for part in task[:3]
            for item in part
        }
        drawn = make_tasks(replace(FULL, seed=7), folder / "materials")
        self.items = {}
        for name, count in NUM_ITEMS.items():
            fresh = [item for item in (*drawn[name].test, *drawn[name].train) if item.prompt not in seen][:count]
            self.items[name] = [self._encode(item.prompt, item.answer) for item in fresh]
        self.references: dict[str, list[Tensor]] = {}
        for name in NUM_ITEMS:
            self.set_weights({key: state.float() for key, state in models.experts[name].items()})
            self.references[name] = self.answer(name)

    def _encode(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        answer_ids = self.tokenizer(answer, add_special_tokens=False).input_ids
        return list(token_ids(self.tokenizer, render(self.tokenizer, prompt, True))), [
            *answer_ids,
            self.tokenizer.eos_token_id,
        ]

    def set_weights(self, state: dict[str, Tensor]) -> None:
        for key, parameter in self.model.named_parameters():
            parameter.copy_(state[key])

    def answer(self, name: str, batch_size: int = 20) -> list[Tensor]:
        """Log probabilities before each answer token, item by item."""
        results = []
        for start in range(0, len(self.items[name]), batch_size):
            batch = self.items[name][start : start + batch_size]
            length = max(len(prompt) + len(answer) for prompt, answer in batch)
            ids, mask = (
                torch.zeros(len(batch), length, dtype=torch.long),
                torch.zeros(len(batch), length, dtype=torch.long),
            )
            for row, (prompt, answer) in enumerate(batch):
                ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
                mask[row, : len(prompt) + len(answer)] = 1
            hidden = self.model.model(input_ids=ids, attention_mask=mask).last_hidden_state
            for row, (prompt, answer) in enumerate(batch):
                places = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
                results.append(self.model.lm_head(hidden[row, places]).log_softmax(-1))
        return results

    def judge(self, rebuilt: Rebuilt, rest: dict[str, Tensor] | None = None) -> dict[str, float]:
        totals = dict.fromkeys(("exact", "loss", "divergence"), 0.0)
        for name in NUM_ITEMS:
            state = dict(self.models.mean if rest is None else rest)
            state.update({key: rebuilt(key, name) for key in self.models.targets})
            self.set_weights(state)
            exact = loss = divergence = tokens = 0.0
            for (_, answer), found, expert in zip(
                self.items[name], self.answer(name), self.references[name], strict=True
            ):
                target = torch.tensor(answer)
                exact += bool((found.argmax(-1) == target).all())
                loss -= float(found[range(len(answer)), target].mean())
                divergence += float((expert.exp() * (expert - found)).sum())
                tokens += len(answer)
            count = len(self.items[name])
            for key, value in (("exact", exact / count), ("loss", loss / count), ("divergence", divergence / tokens)):
                totals[key] += value / len(NUM_ITEMS)
        return totals


def largest(score: Tensor, density: float) -> Tensor:
    count = round(density * score.numel())
    if count >= score.numel():
        return torch.ones_like(score, dtype=torch.bool)
    return score > score.flatten().kthvalue(score.numel() - count).values


def signs(delta: Tensor, kept: Tensor, scale: str) -> Tensor:
    kept = kept & (delta != 0)
    count = kept.sum(dim=1, keepdim=True).clamp(min=1)
    if scale == "matrix mean":
        size = delta.abs()[kept].mean()
    elif scale == "mean":
        size = (delta.abs() * kept).sum(dim=1, keepdim=True) / count
    else:
        size = delta.norm(dim=1, keepdim=True) / count.sqrt()
    packed = torch.where(kept, delta.sign() * size, 0.0)
    return packed * (delta.square().sum() / (packed * delta).sum()) if scale == "projection" else packed


def blockwise(values: Tensor, bits: int) -> Tensor:
    """Values to nf4 or int8 by blocks of 64, and back."""
    from bitsandbytes import functional

    if bits == 4:
        return functional.dequantize_4bit(*functional.quantize_4bit(values[None], quant_type="nf4"))[0]
    return functional.dequantize_blockwise(*functional.quantize_blockwise(values, blocksize=64))


LEVELS = torch.tensor([-2.1520, -1.3439, -0.7560, -0.2451, 0.2451, 0.7560, 1.3439, 2.1520])
"""Lloyd and Max's 8 levels for a standard Gaussian."""


def rank_of(bits: float, shape: torch.Size, number_bits: float) -> int:
    """Rank of factors that take so many bits an entry; 48 bits a component for its size and the vectors' scales."""
    return max(1, int(bits * shape.numel() / (number_bits * sum(shape) + 48)))


def singular_vectors(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    left, sizes, right = torch.svd_lowrank(delta, q=min(rank + 6, min(delta.shape)), niter=3)
    return left[:, :rank], sizes[:rank], right[:, :rank]


def rounded_to_levels(vectors: Tensor) -> Tensor:
    """Each column to 3 bits, scaled to unit variance."""
    scaled = vectors / vectors.square().mean(dim=0).sqrt()
    return LEVELS[(scaled[..., None] - LEVELS).abs().argmin(dim=-1)]


def few_bit_factors(delta: Tensor, rank: int) -> Tensor:
    """Low rank with singular vectors of 3 bits, the size of each component fitted to the delta."""
    left, _, right = singular_vectors(delta, rank)
    left, right = rounded_to_levels(left), rounded_to_levels(right)
    sizes = ((left.T @ delta) * right.T).sum(dim=1) / left.square().sum(dim=0) / right.square().sum(dim=0)
    return (left * sizes) @ right.T


def matrix_signs(delta: Tensor, density: float) -> Tensor:
    """Signs with one scale a matrix, by projection."""
    kept = torch.where(largest(delta.abs(), density), delta.sign(), 0.0)
    return kept * (delta.square().sum() / (kept * delta).sum())


class Forms:
    """The forms of a delta, each as bits a routed parameter on disk (entropy-coded) and a way to rebuild the weight."""

    def __init__(self, models: Models) -> None:
        self.models = models
        every = torch.cat(
            [models.delta(key, name).abs().flatten()[::97] for key in models.targets for name in NUM_ITEMS]
        )
        self._every = every.sort().values

    def sign(self, density: float, scale: str = "projection", scope: str = "matrix") -> tuple[float, Rebuilt]:
        edge = self._every[int((1 - density) * len(self._every))]

        def rebuilt(key: str, name: str) -> Tensor:
            delta = self.models.delta(key, name)
            kept = delta.abs() > edge if scope == "model" else largest(delta.abs(), density)
            return self.models.mean[key] + signs(delta, kept, scale)

        return entropy(density) + density, rebuilt

    def float(
        self, density: float, bits: int = 16, rescaled: bool = False, random: bool = False
    ) -> tuple[float, Rebuilt]:
        def rebuilt(key: str, name: str) -> Tensor:
            delta = self.models.delta(key, name)
            score = torch.rand(delta.shape, generator=torch.Generator().manual_seed(0)) if random else delta.abs()
            kept = largest(score, density)
            packed = torch.zeros_like(delta)
            packed[kept] = delta[kept] if bits == 16 else blockwise(delta[kept], bits)
            if rescaled:
                packed *= delta.square().sum() / (packed * delta).sum()
            return self.models.mean[key] + packed

        return entropy(density) + density * (bits if bits == 16 else bits + 32 / 64), rebuilt

    def low_rank(self, bits: float) -> tuple[float, Rebuilt]:
        def rebuilt(key: str, name: str) -> Tensor:
            delta = self.models.delta(key, name)
            rank = max(1, round(bits * delta.numel() / 16 / sum(delta.shape)))
            left, sizes, right = torch.svd_lowrank(delta, q=rank, niter=3)
            return self.models.mean[key] + (left * sizes) @ right.T

        return bits, rebuilt

    def factors_and_signs(self, first: float, second: float) -> tuple[float, Rebuilt]:
        """Factors of 3 bits with the bytes of signs of density ``first``, then signs of the rest at ``second``."""

        def rebuilt(key: str, name: str) -> Tensor:
            delta = self.models.delta(key, name)
            product = few_bit_factors(delta, rank_of(entropy(first) + first, delta.shape, 3))
            return self.models.mean[key] + product + (matrix_signs(delta - product, second) if second else 0.0)

        return entropy(first) + first + entropy(second) + second, rebuilt

    def signs_and_factors(self, first: float, second: float, bits: int) -> tuple[float, Rebuilt]:
        """Signs of density ``first``, then factors of the rest with the bytes of signs of density ``second``."""

        def rebuilt(key: str, name: str) -> Tensor:
            delta = self.models.delta(key, name)
            kept = matrix_signs(delta, first)
            rest = delta - kept
            rank = rank_of(entropy(second) + second, delta.shape, bits)
            if bits == 3:
                return self.models.mean[key] + kept + few_bit_factors(rest, rank)
            left, sizes, right = singular_vectors(rest, rank)
            return self.models.mean[key] + kept + (left * sizes) @ right.T

        return entropy(first) + first + entropy(second) + second, rebuilt

    def two_bits(self) -> tuple[float, Rebuilt]:
        """Four levels for every weight, two magnitudes a row."""

        def rebuilt(key: str, name: str) -> Tensor:
            delta = self.models.delta(key, name)
            large = largest(delta.abs(), 0.3)
            packed = signs(delta, large, "mean") + signs(delta, ~large, "mean")
            return self.models.mean[key] + packed * (delta.square().sum() / (packed * delta).sum())

        return 2.0, rebuilt

    def shared_task_vector(self, ratio: float = 0.4) -> tuple[float, Rebuilt]:
        """A mask an expert over one shared sum of task vectors (TALL-masks, https://arxiv.org/abs/2405.07813)."""

        def rebuilt(key: str, name: str) -> Tensor:
            base = self.models.base[key].float()
            total = sum(state[key].float() - base for state in self.models.experts.values())
            own = self.models.experts[name][key].float() - base
            return base + torch.where(own.abs() >= ratio * (total - own).abs(), total, 0.0)

        return 1.0 + 16 / len(self.models.experts), rebuilt

    def rounded(self, kind: str, correction: float, density: float | None = 0.2) -> tuple[float, Rebuilt]:
        """On a quantised backbone: a shared correction (0 for none), and the expert's signs."""

        def rebuilt(key: str, name: str) -> Tensor:
            if density is None:
                return ROUNDINGS[kind](self.models.experts[name][key])
            weight = ROUNDINGS[kind](self.models.mean[key].bfloat16())
            if correction:
                lost = self.models.mean[key] - weight
                weight = weight + signs(lost, largest(lost.abs(), correction), "mean")
            delta = self.models.delta(key, name)
            return weight + signs(delta, largest(delta.abs(), density), "projection")

        own = 0.0 if density is None else entropy(density) + density
        return own + (entropy(correction) + correction) / len(self.models.experts), rebuilt

    def against_codes(self, kind: str, density: float) -> tuple[float, Rebuilt]:
        """On a quantised backbone: the expert's signs against the codes' own numbers."""

        def rebuilt(key: str, name: str) -> Tensor:
            weight = ROUNDINGS[kind](self.models.mean[key].bfloat16())
            delta = self.models.experts[name][key].float() - weight
            return weight + signs(delta, largest(delta.abs(), density), "norm")

        return entropy(density) + density, rebuilt


def all_forms(forms: Forms) -> dict[str, tuple[float, Rebuilt]]:
    models = forms.models
    return {
        "whole delta": (16.0, lambda key, name: models.experts[name][key].float()),
        **{f"sign {density}": forms.sign(density) for density in (0.02, 0.05, 0.1, 0.15, 0.2, 0.3)},
        **{f"sign {density}, norm": forms.sign(density, "norm") for density in (0.1, 0.2)},
        "sign 0.2, mean": forms.sign(0.2, "mean"),
        **{f"sign {density}, one threshold": forms.sign(density, scope="model") for density in (0.05, 0.1, 0.2)},
        "1 bit, projection": forms.sign(1.0),
        "1 bit, mean of the matrix (BitDelta's form)": forms.sign(1.0, "matrix mean"),
        "2 bits": forms.two_bits(),
        **{f"float {density}": forms.float(density) for density in (0.05, 0.1, 0.2)},
        "float 0.1, rescaled": forms.float(0.1, rescaled=True),
        "int8 0.1": forms.float(0.1, bits=8),
        "nf4 0.1": forms.float(0.1, bits=4),
        "random 0.2, rescaled (DARE)": forms.float(0.2, rescaled=True, random=True),
        **{f"low rank, {bits} bits": forms.low_rank(bits) for bits in (0.9, 2.4)},
        **{
            f"factors {first} and signs {second}, 3 bits": forms.factors_and_signs(first, second)
            for first, second in ((0.01, 0.01), (0.02, 0.02), (0.05, 0.02), (0.05, 0.05), (0.1, 0.05))
        },
        "factors 0.05, 3 bits": forms.factors_and_signs(0.05, 0.0),
        "signs 0.05 and factors 0.02, 3 bits": forms.signs_and_factors(0.05, 0.02, 3),
        "signs 0.05 and factors 0.02, 16 bits": forms.signs_and_factors(0.05, 0.02, 16),
        **{f"sign {density}, as few bytes": forms.sign(density) for density in (0.023, 0.047, 0.073)},
        "mask over one task vector (TALL)": forms.shared_task_vector(),
        "expert in nf4": forms.rounded("nf4", 0, None),
        "nf4 backbone": forms.rounded("nf4", 0),
        "nf4 backbone, signs against its codes": forms.against_codes("nf4", 0.2),
        **{f"nf4 backbone, correction {share}": forms.rounded("nf4", share) for share in (0.2, 0.5, 1.0)},
        "int8 backbone": forms.rounded("int8", 0),
        "int8 backbone, correction 0.5": forms.rounded("int8", 0.5),
    }


def draw(results: dict[str, dict[str, float]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for name, row in results.items():
        if not any(part in name for part in ("backbone", "expert in", "threshold")):
            axes.plot(row["bytes"], row["divergence"], "o", color="tab:red" if name.startswith("sign") else "tab:gray")
            axes.annotate(
                name, (row["bytes"], row["divergence"]), fontsize=7, xytext=(4, 2), textcoords="offset points"
            )
    axes.set(xscale="log", yscale="log", xlabel="bytes a routed parameter and expert, on disk")
    axes.set_ylabel("divergence from the expert, nats a token")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--only", nargs="*", help="forms whose name holds one of these")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    models = Models(arguments.demo)
    judge, results = Judge(arguments.demo, models), {}
    for name, (bits, rebuilt) in all_forms(Forms(models)).items():
        if arguments.only and not any(part in name for part in arguments.only):
            continue
        results[name] = {"bytes": bits / 8, **judge.judge(rebuilt)}
        print(f"{name:48} " + " ".join(f"{key} {value:.4f}" for key, value in results[name].items()), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=2), encoding="utf-8")
    if arguments.plot:
        draw(results, arguments.plot)


if __name__ == "__main__":
    main()
