"""What may be wrong with settings: choices, ranges and contradictions, one message each."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from .methods.conflict import CONFLICT_SCORES
from .methods.encoding import ENCODINGS
from .methods.encoding.scales import SIGN_SCALES
from .methods.merging import MERGE_METHODS
from .methods.rounding import ROUNDINGS
from .methods.sparsifying import SPARSIFIERS
from .routing.router_names import DELTA_ROUTER_NAMES, ROUTER_NAMES
from .tables import unknown_name

FALLBACKS = ("base", "backbone")
DENSITY_SCOPES = ("matrix", "model")
ROUTING_TURNS = ("last", "first", "all")
FALLBACK_EXPERT = "base"
"""Name of the expert-weight column that stands for the base model."""

ALWAYS_RULES = ("alpha", "alpha-omega")

_BUDGET = re.compile(r"\d+(\.\d+)?\s*(x|b|[kmgt]i?b)?")
_EXPERT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_\- ]{0,63}")


def setting_faults(settings: Any) -> Iterator[str]:
    """Every fault of the settings, one message each."""
    yield from expert_name_faults(settings.experts)
    for name, table, kind in (
        ("merge_method", MERGE_METHODS, "merge method"),
        ("conflict_score", CONFLICT_SCORES, "conflict score"),
        ("sparsifier", SPARSIFIERS, "sparsifier"),
        ("encoding", ENCODINGS, "encoding"),
        ("rescale", SIGN_SCALES, "rescale"),
        ("router", ROUTER_NAMES, "router"),
        ("fallback", FALLBACKS, "fallback"),
        ("routing_turn", ROUTING_TURNS, "routing_turn"),
        ("density_scope", DENSITY_SCOPES, "density_scope"),
    ):
        value = getattr(settings, name)
        if not isinstance(value, str):
            yield f"{name} must be a name, one of {', '.join(table)}, got {value!r}."
        elif value not in table:
            yield unknown_name(value, table, kind)
    fitted = settings.fitted_router
    if fitted is not None and not (isinstance(fitted, str) and fitted in DELTA_ROUTER_NAMES):
        yield unknown_name(str(fitted), DELTA_ROUTER_NAMES, "fitted_router")
    wanted = settings.for_quantization
    if wanted is not None and not (isinstance(wanted, str) and wanted in ROUNDINGS):
        yield unknown_name(str(wanted), ROUNDINGS, "for_quantization")
    for name, hint in (
        ("density", "1.0 keeps every weight"),
        ("correction_density", "1.0 corrects every weight"),
        ("conflict_density", "1.0 lets every entry vote"),
        ("routing_top_p", "1.0 keeps every expert"),
    ):
        if not is_share(getattr(settings, name)):
            yield f"{name} must be in (0, 1], got {getattr(settings, name)!r}. Use a share: {hint}."
    if not (is_share(settings.ood_alpha) and settings.ood_alpha < 1):
        yield (f"ood_alpha must be in (0, 1), got {settings.ood_alpha!r}. 0.01 lets 1 known prompt in 100 fall back.")
    if not is_finite(settings.conflict_threshold):
        yield f"conflict_threshold must be a finite number, got {settings.conflict_threshold!r}."
    if not (is_share(settings.ood_beta) and settings.ood_beta < 1):
        yield f"ood_beta must be in (0, 1), got {settings.ood_beta!r}. 0.05 lets 5 unknown prompts in 100 pass."
    if settings.router_layer not in (None, "auto") and not is_count(settings.router_layer):
        yield f"router_layer must be 'auto' or a whole number of blocks, 0 or more, got {settings.router_layer!r}."
    if not is_count(settings.seed) or settings.seed >= 2**63:
        yield f"seed must be a whole number, 0 or more and below 2**63, got {settings.seed!r}."
    targets = settings.target_modules
    if not (targets is None or isinstance(targets, str)) and not are_names(targets):
        yield f"target_modules must be a name or a list of names, got {targets!r}."
    limit = settings.max_resident_experts
    if limit is not None and (not is_count(limit) or limit < 1):
        yield f"max_resident_experts must be a whole number, 1 or more, or None for all, got {limit!r}."
    pinned = settings.pinned_experts
    if pinned is not None and (limit is None or isinstance(pinned, str) or not are_names(pinned)):
        yield f"pinned_experts must be names of experts, beside max_resident_experts, got {pinned!r}."
    elif pinned is not None and settings.expert_names is not None:
        strangers = [name for name in pinned if name not in settings.columns]
        if strangers:
            yield f"pinned_experts {strangers} are no experts of this model; it has {settings.columns}."
    rule = settings.always_rule
    if rule is not None and rule not in ALWAYS_RULES:
        yield unknown_name(str(rule), ALWAYS_RULES, "always_rule")
    elif rule is not None and not settings.always and not settings.is_built:
        yield f"always_rule={rule!r} weights always-on deltas: give always=, too, or leave it out."
    always = settings.always
    if always is not None and not (isinstance(always, dict) and are_names([*always, *always.values()])):
        yield f"always must give PATH:WEIGHT for each name, got {always!r}."
    elif always:
        yield from expert_name_faults(dict.fromkeys(always))
        if settings.sparsifier == "svd":
            yield "always needs positions: use another sparsifier than 'svd'."
    yield from _merge_faults(settings)
    yield from _form_faults(settings)
    yield from _routed_layers_faults(settings)


def _merge_faults(settings: Any) -> Iterator[str]:
    """Of what the merge method is given."""
    method = MERGE_METHODS.get(settings.merge_method) if isinstance(settings.merge_method, str) else None
    given, path = settings.merge_parameters, settings.merge_data
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        yield f"merge_parameters must give a value for each name, e.g. {{'density': 0.1}}, got {given!r}."
    elif method is not None:
        yield from method.faults(given, settings.merge_method)
    if path is not None and not (isinstance(path, str) and path):
        yield f"merge_data must be a path, got {path!r}."
    elif method is not None and path is not None and method.open_data is None:
        yield f"merge_method {settings.merge_method!r} reads no data: leave out merge_data."
    elif method is not None and path is None and method.needs_data and not settings.is_built:
        yield f"merge_method {settings.merge_method!r} needs merge_data: {method.data}."
    number = None if method is None else method.num_experts
    if number is not None and len(settings.experts) not in (0, number) and not settings.is_built:
        yield f"merge_method {settings.merge_method!r} merges {number} experts, got {len(settings.experts)}."
    scaling = settings.depth_scaling
    is_pair = isinstance(scaling, (list, tuple)) and len(scaling) == 2 and all(is_finite(each) for each in scaling)
    if not (scaling is None or scaling == "auto" or is_pair):
        yield f"depth_scaling must be 'auto' or [alpha, beta], two numbers, got {scaling!r}."


def _form_faults(settings: Any) -> Iterator[str]:
    if settings.budget is not None and not _is_budget(settings.budget):
        yield f"budget must be like '1.5x' (the backbone), '400MB' or a number of bytes, got {settings.budget!r}."
    if settings.rank is not None and (not is_count(settings.rank) or settings.rank < 1):
        yield f"rank must be a whole number, 1 or more, or None, got {settings.rank!r}."
    is_known = all(isinstance(name, str) for name in (settings.encoding, settings.sparsifier))
    is_known = is_known and settings.encoding in ENCODINGS and settings.sparsifier in SPARSIFIERS
    is_low_rank = is_known and SPARSIFIERS[settings.sparsifier].is_low_rank
    if is_known and is_low_rank != (settings.encoding == "factors"):
        yield (
            f"sparsifier {settings.sparsifier!r} does not go with encoding {settings.encoding!r}: 'svd' stores "
            "'factors', and nothing else does. Leave encoding out with 'svd'."
        )
    if is_known and settings.rank is not None and not is_low_rank:
        yield f"rank is for sparsifier='svd', not for {settings.sparsifier!r}. Use density."
    if settings.rank is not None and (settings.budget is not None or settings.density_scope != "matrix"):
        yield "rank fixes the size of every delta: leave out budget and density_scope, or leave out rank."
    families = settings.families
    is_cosine = isinstance(families, (int, float)) and is_finite(families) and -1 <= families <= 1
    if families not in (None, "auto") and not is_cosine:
        yield f"families must be 'auto' or the least cosine, in [-1, 1], got {families!r}."
    if families is not None and is_known and not ENCODINGS[settings.encoding].has_positions:
        yield f"families need positions, which encoding {settings.encoding!r} has not. Use another encoding."
    if families is not None and (settings.budget is not None or settings.density_scope != "matrix"):
        yield "families share deltas of one density a matrix: leave out budget and density_scope."
    if settings.for_quantization is not None and is_low_rank:
        yield "for_quantization needs positions: rounding errors have no low rank. Use another sparsifier."


def _routed_layers_faults(settings: Any) -> Iterator[str]:
    choice = settings.routed_layers
    if isinstance(choice, str):
        if choice not in ("auto", "all"):
            yield unknown_name(choice, ("auto", "all"), "routed_layers")
    elif isinstance(choice, (list, tuple)):
        if not choice or not all(is_count(number) for number in choice) or len(set(choice)) != len(choice):
            yield f"routed_layers must list different block numbers, 0 or more, got {list(choice)!r}."
    elif not is_share(choice):
        yield (
            "routed_layers must be 'auto', 'all', a share of blocks in (0, 1] or a list of block numbers, "
            f"got {choice!r}."
        )


def expert_name_faults(names: Mapping[str, object]) -> Iterator[str]:
    """What is wrong with the names of experts, one message each."""
    for name in names:
        if not isinstance(name, str) or not _EXPERT_NAME.fullmatch(name):
            yield (
                f"expert name {name!r} cannot be used: take letters, digits, '_', '-' and spaces, at most 64, starting "
                "with a letter or digit (no dots or slashes: names become parts of tensor names)."
            )
        elif name == FALLBACK_EXPERT:
            yield f"expert name {name!r} is taken by the fallback column. Choose another name."


def is_share(value: object) -> bool:
    """Whether it is a number in (0, 1]."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1


def is_finite(value: object) -> bool:
    """Whether it is a number that a float can hold: a whole number of hundreds of digits is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def are_names(value: object) -> bool:
    """Whether it is a collection of texts."""
    return isinstance(value, Collection) and all(isinstance(name, str) for name in value)


def is_count(value: object) -> bool:
    """Whether it is a whole number, 0 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_budget(value: object) -> bool:
    if isinstance(value, str):
        return _BUDGET.fullmatch(value.strip().lower()) is not None
    return is_count(value) and value != 0
