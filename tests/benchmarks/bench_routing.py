"""Tables of docs/routing.md: gate variants, depth, few texts, routers, baselines, outcome, and many experts.

    python tests/benchmarks/bench_routing.py OUT FEATURES [--seeds 1 2] [--all-layers] [--many-seen 400]
    python tests/benchmarks/bench_routing.py --outcome OUT --device cuda --per-set 100 --json FILE
    python tests/benchmarks/bench_routing.py --experts        # 2 to 100 experts on a tiny model, no download

OUT is a model that `mediator-peft demo` built; its materials lie beside it. FEATURES is a file; it is made by the first
run (about ten minutes on one core) and read by later ones.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from routing_features import ALL_LAYERS, FEW_LAYERS, make_features
from routing_outcome import outcome

from mediator_peft.demo.hard_prompts import TASKS
from mediator_peft.routing.calibration import calibrate
from mediator_peft.routing.gate import GateSettings, gate
from mediator_peft.routing.metrics import auroc, false_positive_rate
from mediator_peft.routing.ood import gate_coefficients
from mediator_peft.routing.routers import ROUTERS, gaussian
from mediator_peft.routing.routers.gaussian import GaussianRouter

KINDS = ("seen", "unseen", "shifted", "near", "far")
KNOWN = KINDS[:3]
SETTINGS = GateSettings(ood_alpha=0.01, routing_top_p=0.5, fallback_column=True)


def fitted(
    data,
    layer=3,
    name="gaussian",
    per_expert=100,
    with_background=True,
    with_variations=True,
    with_neighbours=True,
    rows=None,
):
    place = data["layers"].index(layer)
    if rows is None:
        rows = torch.cat([(data["labels"] == label).nonzero().flatten()[:per_expert] for label in range(3)])
    x, labels = data["x"][rows, place], data["labels"][rows]
    background = data["background"][:, place] if with_background else None
    router = ROUTERS[name](3, x.shape[1])
    texts = [data["texts"][row] for row in rows.tolist()]
    augmented = data["augmented"][:, rows, place] if with_variations else None
    hard_negatives = data["hard_negatives"][:, rows, place] if with_neighbours and with_background else None
    make = lambda: ROUTERS[name](3, x.shape[1])  # noqa: E731
    report = calibrate(
        make, router, x, labels, texts, TASKS, 0, SETTINGS.ood_alpha, background, augmented, hard_negatives
    )
    return router, report


@torch.no_grad()
def judged(data, router, layer=3, settings=SETTINGS):
    """Set → labels, route, OOD score, and whether the best-scored expert is the right one."""
    found = {}
    for name, one in data["sets"].items():
        x = one["x"][:, data["layers"].index(layer)]
        scores, ood_score = router.calibrated(x), router.background_log_odds(x)
        route = gate(scores, ood_score, router.distance(x), router.known, settings)
        right = (scores.argmax(dim=1) == one["labels"]).float()
        sent = (route.expert_weights.argmax(dim=1) == one["labels"]).float()
        found[name] = {
            "kind": one["kind"],
            "labels": one["labels"],
            "right": right,
            "sent": sent,
            "route": route,
            "ood_score": ood_score,
        }
    return found


def pooled(found, kind, value):
    return torch.cat([value(one) for one in found.values() if one["kind"] == kind])


def summary(data, router, layer=3):
    """Right expert, sent there, and weight of the base by kind; AUROC and FPR of the OOD score."""
    found = judged(data, router, layer)
    row = [pooled(found, kind, lambda one: one["right"]).mean() for kind in KNOWN]
    row += [pooled(found, kind, lambda one: one["sent"]).mean() for kind in KNOWN]
    row += [pooled(found, kind, lambda one: one["route"].expert_weights[:, -1]).mean() for kind in KINDS[3:]]
    ood_score = {kind: pooled(found, kind, lambda one: one["ood_score"]) for kind in KINDS}
    row += [auroc(ood_score[kind], ood_score["far"]) for kind in KNOWN]
    row += [false_positive_rate(torch.cat([ood_score["seen"], ood_score["unseen"]]), ood_score["far"])]
    row += [pooled(found, "seen", lambda one: one["route"].is_ood.float()).mean()]
    return [f"{100 * float(value):.1f}" for value in row]


HEADER = [
    "right: seen", "unseen", "shifted", "sent: seen", "unseen", "shifted", "base: near", "far",
    "AUROC seen", "unseen", "shifted", "FPR95", "flagged: seen",
]  # fmt: skip


def print_table(first, header, rows):
    print(f"\n| {first} | " + " | ".join(header) + " |\n|" + "---|" * (len(header) + 1))
    for name, row in rows:
        print(f"| {name} | " + " | ".join(row) + " |", flush=True)


def gate_variants(data, layer=3):
    """Effect of folds, ``routing_top_p`` and shrinkage on expert weights and flags."""
    header = ["right expert: seen", "unseen", "shifted", "base: near", "far"]
    header += [f"flagged at {100 * alpha:g} %" for alpha in (0.01, 0.02, 0.05)]
    rows = []
    kept = GaussianRouter.num_folds, gaussian._LEAST_SHRINKAGE
    variants = (
        (5, 0.9, 0, False, False),
        (5, 0.5, 0, False, False),
        (20, 0.5, 0, False, False),
        (20, 0.5, 0.5, False, False),
        (20, 0.5, 0.5, True, False),
        (20, 0.5, 0.5, True, True),
    )
    for num_folds, routing_top_p, shrinkage, varied, near in variants:
        GaussianRouter.num_folds, gaussian._LEAST_SHRINKAGE = num_folds, shrinkage
        router, _ = fitted(data, layer, with_variations=varied, with_neighbours=near)
        GaussianRouter.num_folds, gaussian._LEAST_SHRINKAGE = kept
        found = judged(data, router, layer, SETTINGS._replace(routing_top_p=routing_top_p))
        row = []
        for kind in KINDS:
            right = [torch.where(one["labels"] < 0, 3, one["labels"]) for one in found.values() if one["kind"] == kind]
            weights = pooled(found, kind, lambda one: one["route"].expert_weights) if right else torch.zeros(0, 4)
            row.append(float(weights.gather(1, torch.cat(right).unsqueeze(1)).mean()) if right else float("nan"))
        for alpha in (0.01, 0.02, 0.05):
            flags = judged(data, router, layer, SETTINGS._replace(ood_alpha=alpha))
            seen = [one["route"].is_ood.float() for one in flags.values() if one["kind"] == "many seen"]
            row.append(float(torch.cat(seen).mean()) if seen else float("nan"))
        label = f"{num_folds} folds, routing_top_p {routing_top_p}, shrinkage >= {shrinkage}"
        label += f"{', copies' if varied else ''}{', hard_negatives' if near else ''}"
        rows.append((label, [f"{100 * value:.1f}" for value in row]))
    print_table("gate", header, rows)


def tables(data):
    routers = [(name, {"name": name}) for name in ROUTERS]
    variants = [(f"{name}, no hard negatives", {"name": name, "with_neighbours": False}) for name in ROUTERS]
    variants += [(f"{name}, no copies", {"name": name, "with_variations": False}) for name in ROUTERS]
    variants += [(f"{name}, no background", {"name": name, "with_background": False}) for name in ROUTERS]
    rows = [(label, summary(data, fitted(data, **options)[0])) for label, options in routers + variants]
    print_table("router", HEADER, rows)
    rows = [(f"{layer}", summary(data, fitted(data, layer)[0], layer)) for layer in data["layers"]]
    print_table("blocks", HEADER, rows)
    rows = [(f"{count}", summary(data, fitted(data, per_expert=count)[0])) for count in (5, 10, 20, 45, 100, 200)]
    print_table("texts per expert", HEADER, rows)
    router, report = fitted(data)
    print({key: value for key, value in report._asdict().items() if key in ("ece", "brier", "temperature")})
    rows = []
    for name, one in judged(data, router).items():
        known = one["kind"] in KNOWN
        values = [float(one["right"].mean()) if known else None, float(one["sent"].mean()) if known else None]
        values += [float(one["route"].expert_weights[:, -1].mean()), float(one["route"].is_ood.float().mean())]
        rows.append((f"{name} ({one['kind']})", ["" if value is None else f"{100 * value:.0f}" for value in values]))
    print_table("set", ["right", "sent", "base", "flagged"], rows)
    print_table("baseline", ["right: seen", "unseen", "shifted", "base: near", "far"], baselines(data))


@torch.no_grad()
def rates(data, layer=3, draws=8):
    """Share of known prompts that is flagged, beside the stated one, over random choices of calibration texts.

    One choice of 100 texts leaves the share uncertain by half of it at 1 %, whatever the method: only the mean can tell
    whether it is kept.
    """
    place = data["layers"].index(layer)
    many = [one for one in data["sets"].values() if one["kind"] == "many seen"]
    alphas, rows = (0.01, 0.02, 0.05, 0.1), []
    for per_expert in (45, 100, 150):
        for varied in (False, True):
            shares = []
            for seed in range(draws):
                order = torch.randperm(len(data["labels"]), generator=torch.Generator().manual_seed(seed))
                chosen = torch.cat([order[data["labels"][order] == label][:per_expert] for label in range(3)])
                rest = torch.ones(len(order), dtype=torch.bool).index_fill(0, chosen, False)
                router, _ = fitted(data, layer, with_variations=varied, with_neighbours=varied, rows=chosen)
                x = torch.cat([data["x"][rest, place], *(one["x"][:, place] for one in many)])
                labels = torch.cat([data["labels"][rest], *(one["labels"] for one in many)])
                ood_score, distance, nearest = (
                    router.background_log_odds(x),
                    router.distance(x),
                    router.scores(x).argmax(dim=1),
                )
                flags = [
                    gate_coefficients(ood_score, distance, nearest, router.known, alpha).is_ood.float()
                    for alpha in alphas
                ]
                shares.append(
                    [torch.stack([flag[labels == label].mean() for label in range(3)]).mean() for flag in flags]
                )
            found = 100 * torch.tensor(shares)
            cells = [f"{mean:.1f} ± {sd:.1f}" for mean, sd in zip(found.mean(dim=0), found.std(dim=0), strict=True)]
            rows.append((f"{per_expert}{', copies, hard_negatives' if varied else ''}", cells))
    print_table("texts an expert", [f"{100 * alpha:g} % stated" for alpha in alphas], rows)


@torch.no_grad()
def baselines(data, layer=3):
    """Weight that each way gives to the right expert on known tasks, and to the base on unknown ones."""
    router, prototype = fitted(data, layer)[0], fitted(data, layer, "prototype")[0]
    ways = {
        "Mediator gate": lambda x, labels: (
            gate(
                router.calibrated(x), router.background_log_odds(x), router.distance(x), router.known, SETTINGS
            ).expert_weights
        ),
        "softmax top-1": lambda x, labels: one_hot(router.scores(x).argmax(dim=1)),
        "soft mixture (as Twin-Merging)": lambda x, labels: F.pad(router.calibrated(x).softmax(dim=1), (0, 1)),
        "nearest prototype": lambda x, labels: one_hot(prototype.scores(x).argmax(dim=1)),
        "uniform": lambda x, labels: F.pad(torch.full((len(x), 3), 1 / 3), (0, 1)),
        "oracle": lambda x, labels: one_hot(torch.where(labels < 0, 3, labels)),
    }
    for name, way in ways.items():
        row = []
        for kind in KINDS:
            shares = []
            for one in data["sets"].values():
                if one["kind"] == kind:
                    weights = way(one["x"][:, data["layers"].index(layer)], one["labels"])
                    shares.append(weights.gather(1, torch.where(one["labels"] < 0, 3, one["labels"]).unsqueeze(1)))
            row.append(f"{100 * float(torch.cat(shares).mean()):.1f}")
        yield name, row


def one_hot(column):
    return F.one_hot(column, 4).float()


def many_experts():
    """2 to 100 experts on a tiny random model: each a topic of twelve words, forty texts to fit, twenty to test."""
    from random import Random

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tiny import tiny_model

    from mediator_peft.structure import find_blocks

    model = tiny_model()
    rng, rows = Random(0), []

    @torch.no_grad()
    def features(words, count):
        ids = torch.tensor([[rng.choice(words) for _ in range(24)] for _ in range(count)])
        return model.model(input_ids=ids, output_hidden_states=True).hidden_states[1].mean(dim=1)

    assert len(find_blocks(model)) == 3
    for count in (2, 5, 10, 20, 50, 100):
        topics = [rng.sample(range(5, 96), 12) for _ in range(count)]
        x, test = (torch.cat([features(words, size) for words in topics]) for size in (40, 20))
        labels = torch.arange(count).repeat_interleave(40)
        keys = [str(number) for number in range(len(labels))]
        row = []
        for name in ROUTERS:
            started = time.perf_counter()
            router = ROUTERS[name](count, 32)
            names = [str(number) for number in range(count)]
            calibrate(lambda: ROUTERS[name](count, 32), router, x, labels, keys, names, 0, 0.01)  # noqa: B023
            seconds = time.perf_counter() - started
            with torch.no_grad():
                right = (router.scores(test).argmax(dim=1) == torch.arange(count).repeat_interleave(20)).float().mean()
            size = sum(value.numel() * 4 for value in router.state_dict().values())
            row += [f"{100 * right:.1f}", f"{seconds:.2f}", f"{size / 1024:.0f}"]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rows.append((str(count), [*row, f"{peak:.0f}"]))
    header = [f"{name}: {what}" for name in ROUTERS for what in ("right %", "fit s", "KiB")]
    print_table("experts", [*header, "peak MiB of the process"], rows)


def parsed():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("features", nargs="?", type=Path)
    parser.add_argument("--seeds", nargs=2, type=int, default=(1, 2), help="of calibration prompts and test sets")
    parser.add_argument("--all-layers", action="store_true", help="for the table of depths")
    parser.add_argument("--many-seen", type=int, default=0, help="prompts more an expert, for the rate of flags")
    parser.add_argument("--experts", action="store_true")
    parser.add_argument("--outcome", type=Path, metavar="OUT")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the model that answers")
    parser.add_argument("--per-set", type=int, default=100)
    parser.add_argument("--skip", nargs="*", default=[], choices=TASKS, help="tasks whose own sets are left out")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--json", type=Path, default=Path("outcome.json"))
    return parser.parse_args()


def main():
    asked = parsed()
    if asked.outcome is None:
        torch.set_num_threads(1)
    if asked.experts:
        many_experts()
    elif asked.outcome is not None:
        seeds = (11, 12) if asked.seeds == (1, 2) else tuple(asked.seeds)
        outcome(
            asked.outcome, asked.device, asked.per_set, asked.json, seeds, asked.batch_size, asked.skip, asked.dtype
        )
    else:
        if not asked.features.is_file():
            layers = ALL_LAYERS if asked.all_layers else FEW_LAYERS
            make_features(asked.out, asked.features, tuple(asked.seeds), layers, asked.many_seen)
        data = torch.load(asked.features)
        for is_fresh, title in ((False, "wordings and kinds of hard_prompts"), (True, "fresh wordings and kinds")):
            print(f"\n## {title}")
            sets = {n: one for n, one in data["sets"].items() if one["is_fresh"] == is_fresh or one["kind"] == "seen"}
            gate_variants({**data, "sets": sets | {n: o for n, o in data["sets"].items() if o["kind"] == "many seen"}})
            tables({**data, "sets": sets})
        if any(one["kind"] == "many seen" for one in data["sets"].values()):
            rates(data)


if __name__ == "__main__":
    main()
