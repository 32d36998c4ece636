"""Kills processes while they save, and looks at what lies on the disk afterwards: all old, or all new.

Run it as ``python tests/stress/kill_saves.py --kills 100``. Two ways of saving, each killed so many times:
``save_pretrained`` over a former save, adapter and backbone, and the fitting of a router as ``mediator-peft
fit-router`` does it, adapter and report. A kill while a router is being fitted, before it is saved, changes no file.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from tiny import tiny_model, write_tiny_checkpoints
from tokenizer import tiny_tokenizer, topic_texts
from transformers.utils import logging

from mediator_peft import MediatorConfig, build_mediator, get_mediator_model, load_mediator
from mediator_peft.evaluation.fit_and_save import save_router
from mediator_peft.evaluation.routing_report import write_routing_report

VERSIONS = ("old", "new")
OTHER = {"old": "new", "new": "old"}


def topics(num_texts: int) -> dict[str, list[str]]:
    """Texts of two experts."""
    return {"math": topic_texts(5, 45, num_texts, seed=1), "code": topic_texts(50, 90, num_texts, seed=2)}


def content(model: object, *more: bytes) -> tuple[object, ...]:
    """All that tells two versions of a model apart."""
    config = model.peft_config["default"]  # type: ignore[attr-defined]
    state = model.state_dict()  # type: ignore[attr-defined]
    return config.ood_alpha, {name: tensor.flatten().tolist() for name, tensor in state.items()}, *more


def killed_at(save: Callable[[], None], seconds: float) -> bool:
    """Save in a child, which is killed so long after it has begun to; whether it was still at work."""
    announced, announce = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(announce, b"x")
            save()
        finally:
            os._exit(0)
    os.close(announce)
    os.read(announced, 1)
    os.close(announced)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def kill_many(
    kills: int, seed: int, save: Callable[[str], None], read: Callable[[], tuple[object, ...]], folder: Path
) -> Counter[str]:
    """Save one of two versions over the other again and again, killed at a random moment."""
    draw, counts = random.Random(seed), Counter[str]()
    expected = {}
    for version in VERSIONS:
        began = time.perf_counter()
        save(version)
        duration = time.perf_counter() - began
        expected[version] = read()
    assert expected["old"] != expected["new"]
    here = "new"
    while counts["killed"] < kills:
        other = OTHER[here]
        if killed_at(lambda: save(other), draw.uniform(0, 1.1 * duration)):  # noqa: B023
            counts["killed"] += 1
        else:
            counts["done before"] += 1
        try:
            found = read()
        except Exception as fault:
            counts["not loadable"] += 1
            print(f"not loadable: {type(fault).__name__}: {fault}")
            save(here)
            continue
        if found == expected[other]:
            here = other
            counts["new"] += 1
        elif found == expected[here]:
            counts["old"] += 1
        else:
            counts["mixed"] += 1
            save(here)
    save(here)
    left = [path.name for path in folder.rglob(".*")]
    counts["left behind"] = len(left)
    return counts


def kill_save_pretrained(folder: Path, kills: int, seed: int) -> Counter[str]:
    """Adapter and backbone, saved over those of another version."""
    paths = write_tiny_checkpoints(folder / "in")
    config = MediatorConfig(experts={name: str(paths[name]) for name in ("math", "code")}, density=0.3)
    model = get_mediator_model(tiny_model(), config)
    model.fit_router(topics(40), tiny_tokenizer())
    target = folder / "saved"
    norm = model.get_base_model().model.norm.weight

    def save(version: str) -> None:
        value = {"old": 0.01, "new": 0.02}[version]
        model.peft_config["default"].ood_alpha = value
        model.router.temperature.fill_(1 + value)
        norm.data[3] = value
        # A changed backbone is saved beside the adapter again.
        warnings.simplefilter("ignore")
        model.save_pretrained(target)

    def read() -> tuple[object, ...]:
        return content(load_mediator(target)[0])

    return kill_many(kills, seed, save, read, folder)


def kill_fit_router(folder: Path, kills: int, seed: int) -> Counter[str]:
    """Adapter and report, as ``fit-router`` saves them."""
    paths = write_tiny_checkpoints(folder / "in")
    build_mediator(paths["base"], {name: paths[name] for name in ("math", "code")}, folder / "out", MediatorConfig())
    adapter = folder / "out" / "mediator"
    fitted = {}
    for version in VERSIONS:
        model, _ = load_mediator(folder / "out")
        report = model.fit_router(topics({"old": 40, "new": 44}[version]), tiny_tokenizer())
        fitted[version] = (model, report)

    def save(version: str) -> None:
        model, report = fitted[version]
        save_router(model, adapter, lambda to: write_routing_report(to, report, model.router.evidence))

    def read() -> tuple[object, ...]:
        model = load_mediator(folder / "out")[0]
        names = ("routing.json", "confusion.csv", "reliability.csv", "uncertainty.csv")
        return content(model, *((adapter / "report" / name).read_bytes() for name in names))

    return kill_many(kills, seed, save, read, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    faults = 0
    for name, kill in (("save_pretrained", kill_save_pretrained), ("fit-router", kill_fit_router)):
        with tempfile.TemporaryDirectory() as folder:
            counts = kill(Path(folder), given.kills, given.seed)
        print(name, dict(counts), flush=True)
        faults += counts["not loadable"] + counts["mixed"] + counts["left behind"]
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
