"""Asks one model from threads and coroutines while it is saved, copied, edited and fitted, and counts wrong answers.

    python tests/stress/concurrent_steps.py --steps 20000

A step is one answer, one saved or copied state, one edit or one fit. Right is the answer of the expert that was named,
the backbone's own weights in what was saved or copied, and an error of the library where an expert was removed.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from tiny import random_prompts, write_tiny_checkpoints
from tokenizer import tiny_tokenizer, topic_texts

from mediator_peft import MediatorConfig, build_mediator, load_mediator
from mediator_peft.errors import MediatorError

SETTINGS = dict(max_new_tokens=2, do_sample=False, pad_token_id=0, eos_token_id=None)
TOPICS = {"math": topic_texts(5, 45, 20, seed=1), "code": topic_texts(50, 90, 20, seed=2)}


def weights_of(model):
    """The backbone's tensors by name, copied."""
    return {name: value.clone() for name, value in model.base_model.model.state_dict().items() if "bank" not in name}


def run(num_steps: int, folder: Path) -> Counter[str]:
    """Outcome → how often it came, over ``num_steps`` steps or a few more."""
    torch.set_num_threads(1)
    paths = write_tiny_checkpoints(folder / "checkpoints", ("base", "math", "code", "extra"))
    experts = {name: paths[name] for name in ("math", "code")}
    build_mediator(paths["base"], experts, folder / "out", MediatorConfig(density=0.3))
    model, _ = load_mediator(folder / "out", dtype=torch.float32)
    tokenizer, prompts = tiny_tokenizer(), random_prompts(1)
    model.fit_router(TOPICS, tokenizer, augmented=False, hard_negatives=False)
    names = ("math", "code", None)
    right = {name: model.generate(prompts, expert_weights=[name], **SETTINGS) for name in names}
    plain, counts, lock = weights_of(model), Counter(), threading.Lock()

    def count(outcome: str) -> None:
        with lock:
            counts[outcome] += 1

    def attempt(step) -> None:
        try:
            count("right" if step() else f"wrong: {step.__name__}")
        except MediatorError as fault:
            count(f"refused: {type(fault).__name__}")
        except Exception as fault:
            count(f"other exception: {step.__name__}: {fault!r}"[:200])

    def answers(name):
        def answer():
            with model.use_experts([name]):
                return torch.equal(model.generate(prompts, **SETTINGS), right[name])

        return answer

    def routes():
        weights = model.route(prompts).expert_weights
        return bool(torch.isfinite(weights).all())

    def reads():
        return all(torch.equal(value, plain[name]) for name, value in weights_of(model).items())

    def copies():
        found = weights_of(copy.deepcopy(model))
        return all(torch.equal(value, plain[name]) for name, value in found.items())

    def edits():
        model.add_expert("extra", str(paths["extra"]), reset_router=True)
        model.remove_expert("extra")
        return True

    def fits():
        model.fit_router(TOPICS, tokenizer, augmented=False, hard_negatives=False, background=[])
        return True

    def is_done() -> bool:
        return sum(counts.values()) >= num_steps

    def ask() -> None:
        while not is_done():
            for step in (*map(answers, names), routes):
                attempt(step)

    def change() -> None:
        while not is_done():
            for step in (reads, copies, edits, fits):
                attempt(step)

    async def ask_in_turn(name) -> None:
        while not is_done():
            with model.use_experts([name]):
                await asyncio.sleep(0)
                attempt(lambda: torch.equal(model.generate(prompts, **SETTINGS), right[name]))

    async def ask_together() -> None:
        await asyncio.gather(*map(ask_in_turn, names))

    threads = [threading.Thread(target=ask) for _ in range(3)] + [threading.Thread(target=change)]
    for thread in threads:
        thread.start()
    asyncio.run(ask_together())
    for thread in threads:
        thread.join()
    return counts


def main() -> int:
    """Print the outcomes; 1 if one of them is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = run(arguments.steps, Path(folder))
    for outcome, number in counts.most_common():
        print(f"{number:7d}  {outcome}")
    return int(any(outcome.startswith(("wrong", "other")) for outcome in counts))


if __name__ == "__main__":
    sys.exit(main())
