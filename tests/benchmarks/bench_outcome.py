"""By outcome: share of right answers of base, backbone, nearest expert and routed model on sets of prompts.

    python tests/benchmarks/bench_outcome.py STUDY [--size 60] [--json FILE] [--set NAME ...]

STUDY is the folder of ``python -m mediator_peft.study`` with its default model of six experts built. The router is
fitted again on the study's calibration prompts, so that the figures belong to the present code. An answer is right
where the reference answer stands in 24 greedy tokens as whole words. Sets that are in FILE already are not measured
again. Needs the packages of the extra ``study``. Word problems are left out: their answers are longer.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from gate_prompts_report import WORDINGS

from mediator_peft import load_mediator
from mediator_peft.demo.data import make_tasks
from mediator_peft.demo.settings import FULL
from mediator_peft.evaluation.generation import Memo, answer_prompts, route_prompts
from mediator_peft.evaluation.prompts import render
from mediator_peft.evaluation.scoring import contains
from mediator_peft.study.experts import StudyFolder, load_tasks
from mediator_peft.study.settings import FULL_STUDY

SYSTEMS = ("base", "backbone", "nearest", "routed")
NEW_TOKENS = 24
ROMAN = (
    (1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"), (40, "XL"), (10, "X"),
    (9, "IX"), (5, "V"), (4, "IV"), (1, "I"),
)  # fmt: skip


def roman(number: int) -> str:
    """A number from 1 to 3999 in Roman numerals."""
    letters = ""
    for value, symbol in ROMAN:
        letters += symbol * (number // value)
        number %= value
    return letters


def sets_of(tasks, size: int) -> dict[str, list[tuple[str, str]]]:
    """Set → (prompt, answer); known tasks, other wordings, two tasks in one prompt, unknown and near kinds."""
    test = {name: [(item.prompt, item.answer) for item in task.test] for name, task in tasks.items()}
    rng = Random("outcome")
    place = {"spelling": -1, "numbers": 1}
    last = {name: [(prompt.split()[at], answer) for prompt, answer in test[name]] for name, at in place.items()}
    numbers = rng.sample(range(1, 2000), size)
    words = [right for _, right in test["spelling"][size:]]
    pairs = list(zip(test["cron"], test["spelling"], strict=False))
    sets = {
        "opposites (unknown)": test["opposites"],
        "capitals (unknown)": test["capitals"],
        "Roman numerals (near numbers)": [(f"Write {x} in Roman numerals.", roman(x)) for x in numbers],
        "letters in a word (near spelling)": [(f"How many letters are in the word {x}?", str(len(x))) for x in words],
        "words to digits (near numbers)": [(f"Write {y} in digits.", x) for x, y in last["numbers"]],
        "first letter (near spelling)": [
            (f"What is the first letter of {x}?", x[0]) for x in words if x[0] not in "ai"
        ],
        "cron": test["cron"],
        "spelling": test["spelling"],
        "numbers": test["numbers"],
        "inflection": test["inflection"],
        "wordnet": test["wordnet"],
        **{
            f"{name}, other wordings": [
                (WORDINGS[name][place % len(WORDINGS[name])].format(x=item), answer)
                for place, (item, answer) in enumerate(last[name])
            ]
            for name in ("numbers", "spelling")
        },
        "cron, and a word to spell after it": [(f"{a}\nAnd also: {b}", answer) for (a, answer), (b, _) in pairs],
        "a word to spell, and cron after it": [(f"{b}\nAnd also: {a}", answer) for (a, answer), (b, _) in pairs],
    }
    return {name: items[:size] for name, items in sets.items()}


def is_right(output: str, answer: str) -> bool:
    """The answer stands in the output as whole words; a number may have separators of thousands."""
    return contains(output, answer) or contains(output.replace(",", ""), answer)


def measured(model, tokenizer, items, batch_size: int) -> dict:
    """Right answers by system, with the mean weight of the base and the nearest experts."""
    prompts = [prompt for prompt, _ in items]
    names = list(model.expert_names)
    routes = route_prompts(model, tokenizer, prompts)
    nearest = torch.tensor([names.index(route.nearest) for route in routes])
    weights = {
        "base": F.one_hot(torch.full((len(prompts),), names.index("base")), len(names)).float(),
        "backbone": torch.zeros(len(prompts), len(names)),
        "nearest": F.one_hot(nearest, len(names)).float(),
        "routed": torch.tensor([[route.expert_weights[name] for name in names] for route in routes]),
    }
    memo, right = Memo.empty(), {}
    for system in SYSTEMS:
        answers = answer_prompts(
            model, tokenizer, prompts, expert_weights=weights[system], max_new_tokens=NEW_TOKENS,
            batch_size=batch_size, memo=memo,
        )  # fmt: skip
        right[system] = [int(is_right(output, answer)) for output, (_, answer) in zip(answers, items, strict=True)]
    return {
        "n": len(items), "right": right, "base weight": sum(r.expert_weights["base"] for r in routes) / len(routes),
        "flagged": sum(r.is_ood for r in routes) / len(routes),
        "nearest": {names[k]: int((nearest == k).sum()) for k in nearest.unique().tolist()},
    }  # fmt: skip


def table(found: dict) -> str:
    """Shares by set in Markdown."""
    lines = ["| set | n | " + " | ".join(SYSTEMS) + " | weight of the base |", "|---" * 7 + "|"]
    for name, one in found.items():
        shares = " | ".join(f"{sum(one['right'][system]) / one['n']:.3f}" for system in SYSTEMS)
        lines.append(f"| {name} | {one['n']} | {shares} | {one['base weight']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--model", type=Path, help="instead of the study's models/default-6")
    parser.add_argument("--size", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=30)
    parser.add_argument("--set", action="append")
    parser.add_argument("--cache", type=Path, help="folder for what the fit reads")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    folder = StudyFolder(args.study)
    tasks = {**make_tasks(FULL, folder.materials), **load_tasks(FULL_STUDY, folder)}
    sets = {name: items for name, items in sets_of(tasks, args.size).items() if name not in found}
    sets = {name: items for name, items in sets.items() if not args.set or name in args.set}
    if sets:
        model, tokenizer = load_mediator(args.model or folder.models / "default-6", dtype=torch.float32)
        texts = {
            name: [item.prompt for item in tasks[name].calibration[: FULL_STUDY.num_calibration]]
            for name in FULL_STUDY.main
        }
        rendered = {name: [render(tokenizer, text).text for text in some] for name, some in texts.items()}
        report = model.fit_router(rendered, tokenizer, cache_folder=args.cache, show_progress=False)
        print(f"{report.router_layer} blocks, {report.known_to_fallback:.3f} of the known to the base", flush=True)
    for name, items in sets.items():
        found[name] = measured(model, tokenizer, items, args.batch_size)
        if args.json:
            args.json.write_text(json.dumps(found))
        print(table({name: found[name]}).splitlines()[-1], found[name]["nearest"], flush=True)
    print(table(found))


if __name__ == "__main__":
    main()
