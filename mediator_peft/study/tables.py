"""From scores to result files: one JSON file a table, with commit, versions, seeds and sizes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..demo.finetune import fast_bfloat16
from ..evaluation.comparison import kept_as_dict
from ..evaluation.report import write_json
from ..evaluation.scoring import wilson_interval
from ..evaluation.statistics import bootstrap_kept, bootstrap_mean, permutation_test, sign_test
from .conflict import conflict_table, pairwise_cosines
from .experts import trained_experts
from .lab import State, read_state, task_vector_norm
from .scores import Scores
from .systems import NAMED, ROUTED_SYSTEM, Bench, Table, bytes_of_built, routing_shares

_PACKAGES = ("torch", "transformers", "peft", "numpy", "num2words", "lemminflect", "codespell", "cron-descriptor")


def about(bench: Bench) -> dict[str, Any]:
    """What a result depends on beside its data."""
    return {
        "commit": _commit(),
        "base": bench.folder.model.name,
        "versions": {name: _version(name) for name in _PACKAGES},
        "threads": torch.get_num_threads(),
        "processor": {
            "instructions": torch.backends.cpu.get_cpu_capability(),
            # Fine-tuning on it: experts of another processor are others, with the same data and seeds.
            "trains_in": "bfloat16" if fast_bfloat16() else "float32",
        },
        "seed": bench.settings.seed,
        "experts": {
            task: {
                "folder": expert.path.name,
                "last_loss": round(sum(expert.losses[-10:]) / len(expert.losses[-10:]), 4),
                **asdict(bench.settings.experts[task].recipe),
            }
            for task, expert in bench.experts.items()
        },
        "num_items": {task: asdict(sizes) for task, sizes in bench.sample.sizes.items()},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    here = Path(__file__).parent
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def write_result(folder: Path, name: str, content: Mapping[str, Any]) -> Path:
    """Write ``name.json``; floats are rounded to six decimals, so that a second run gives the same file."""
    path = folder / f"{name}.json"
    write_json(_rounded(content), path)
    return path


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value


def with_new_routes(path: Path, routing: Mapping[str, Mapping[str, float]], bench: Bench) -> Path:
    """Put routing shares into the file of the table of systems, with what they depend on as ``about_routing``."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return write_result(path.parent, path.stem, {**found, "routing": routing, "about_routing": about(bench)})


def systems_result(bench: Bench, table: Table, model: Path) -> dict[str, Any]:
    """Accuracy, loss, shares kept and bytes of every system, and where prompts were routed.

    Shares kept are over the tasks whose answers are generated.
    """
    known = bench.sample.known
    own = {task: table[f"expert {task}"][task] for task in known}
    one = sum(path.stat().st_size for path in bench.folder.base.glob("*.safetensors"))
    sizes = {NAMED: bytes_of_built(model)}
    sizes[ROUTED_SYSTEM] = sizes[NAMED]
    experts: dict[str, Scores] = dict(own)
    rows = {"experts": system_row(known, experts, own, one * len(known))}
    for name, scores in table.items():
        if not name.startswith("expert "):
            rows[name] = system_row(known, scores, own, sizes.get(name, one))
    return {
        "tasks": list(known),
        "unknown_tasks": [task for task in bench.sample.tasks if task not in known],
        "systems": rows,
        "against_routed": {name: paired_tests(table[ROUTED_SYSTEM], scores) for name, scores in table.items()},
        "routing": routing_shares(bench, model),
        "bytes_of_one_model": one,
    }


def system_row(known: Any, scores: Mapping[str, Scores], own: Mapping[str, Scores], num_bytes: int) -> dict[str, Any]:
    """Accuracy, loss and shares kept of one system, as plain data.

    Args:
        known: tasks with an expert.
        scores: task → the system's.
        own: task → its expert's, on the same items.
        num_bytes: of the system's weights.
    """
    tasks: dict[str, Any] = {}
    for task, found in scores.items():
        tasks[task] = {"loss": found.loss, "num_losses": len(found.losses)}
        if found.right:
            low, high = wilson_interval(sum(found.right), len(found.right))
            tasks[task] |= {"accuracy": found.accuracy, "low": low, "high": high, "num_answers": len(found.right)}
    losses = {task: [a - b for a, b in zip(scores[task].losses, own[task].losses, strict=False)] for task in known}
    row: dict[str, Any] = {
        "tasks": tasks,
        "mean_loss": sum(scores[task].loss for task in known) / len(known),
        "loss_above_experts": {task: bootstrap_mean(values)._asdict() for task, values in losses.items()},
        "bytes": num_bytes,
    }
    answered = [task for task in known if scores[task].right and own[task].right]
    if answered:
        kept = bootstrap_kept(
            {task: scores[task].right for task in answered}, {task: own[task].right for task in answered}
        )
        row["answered_tasks"] = answered
        row["mean_accuracy"] = sum(scores[task].accuracy for task in answered) / len(answered)
        row["kept"] = None if kept is None else kept_as_dict(kept)
    return row


def forgets(found: Scores, base: Scores) -> dict[str, float]:
    """How much less likely a system makes the base's own answers to general questions: nats a token, with interval."""
    differences = [ours - theirs for ours, theirs in zip(found.losses, base.losses, strict=False)]
    return bootstrap_mean(differences)._asdict()


def paired_tests(routed: Mapping[str, Scores], other: Mapping[str, Scores]) -> dict[str, dict[str, float]]:
    """p-values of answers and losses of the tasks that both answered, on the same items."""
    found: dict[str, dict[str, float]] = {}
    for task in sorted(set(routed) & set(other)):
        ours, theirs = routed[task], other[task]
        found[task] = {"permutation_p_of_losses": permutation_test(ours.losses, theirs.losses)}
        if ours.right and theirs.right:
            found[task]["sign_test_p_of_answers"] = sign_test(ours.right, theirs.right)
    return found


def conflict_result(bench: Bench) -> dict[str, Any]:
    """Conflict per block and matrix kind of the main experts, and with each second seed in place of the first."""
    base = read_state(bench.folder.base)
    main = {task: read_state(expert.path) for task, expert in bench.experts.items()}
    sets: dict[str, dict[str, State]] = {"seed 0": main}
    extra = {
        name: read_state(expert.path)
        for name, expert in trained_experts(bench.settings, bench.folder).items()
        if name not in main and (expert.path / "model.safetensors").exists()
    }
    replaced = {bench.settings.experts[name].task: name for name in extra if bench.settings.experts[name].seed}
    if replaced:
        label = "seed 1 of " + ", ".join(sorted(replaced))
        sets[label] = {task: extra[replaced[task]] if task in replaced else state for task, state in main.items()}
    return {
        "sets": {label: conflict_table(base, experts) for label, experts in sets.items()},
        "cosines": pairwise_cosines(base, main | extra),
        "norms": {name: task_vector_norm(base, state) for name, state in (main | extra).items()},
    }
