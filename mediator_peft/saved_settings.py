"""Settings in a saved adapter's file: what is written, and what is refused when it is read."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from .config import ALWAYS, FALLBACK_EXPERT, FORMAT_VERSION, with_todays_names
from .errors import AdapterError, ConfigError
from .setting_checks import are_names, expert_name_faults, is_count, is_finite
from .tables import unknown_name

_SIMILAR = 0.75
"""From this likeness on (``difflib``), an unknown name in a file is a misspelt one of ours."""

_MOST_BLOCKS = 100_000

OMITTED_UNSET = frozenset(
    {
        "pinned_experts",
        "merge_parameters",
        "merge_data",
        "depth_scaling",
        "column_map",
        "always",
        "always_rule",
        "families",
        "fitted_router",
    }
)
"""Fields that a file has only where they are set, so that adapters without them have the bytes that they always had."""


def saved_fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fields as they are written to a file."""
    return {name: value for name, value in settings.items() if name not in OMITTED_UNSET or value not in (None, {})}


def check_saved(fields_found: Mapping[str, Any], own: Collection[str], others: Collection[str] = ()) -> dict[str, Any]:
    """Refuse a saved configuration that this version cannot read.

    Args:
        fields_found: what the file says.
        own: names of this library's fields.
        others: names of PEFT's fields.

    Returns:
        The fields under the names of today: files of former versions have other ones. Fields that are not known, such
        as a newer PEFT may have added, are left out with a warning.

    Raises:
        AdapterError: a newer format, values of the wrong type, or a misspelt name of a field.
    """
    version = fields_found.get("format_version", FORMAT_VERSION)
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= FORMAT_VERSION:
        raise AdapterError(
            f"adapter_config.json: this adapter has format version {shortened(version)}, this mediator_peft reads up "
            f"to {FORMAT_VERSION}. Upgrade it: pip install -U mediator_peft"
        )
    try:
        renamed = with_todays_names(fields_found)
    except ConfigError as fault:
        raise AdapterError(f"adapter_config.json: {fault}") from fault
    known = {*own, *others}
    unknown = [name for name in renamed if name not in known]
    misspelt = [name for name in unknown if get_close_matches(name, own, n=1, cutoff=_SIMILAR)]
    if misspelt:
        raise AdapterError("\n".join(unknown_name(name, known, "field in adapter_config.json") for name in misspelt))
    if unknown:
        listed = ", ".join(repr(shortened(name)) for name in sorted(unknown))
        warnings.warn(
            f"adapter_config.json has fields that are not known here and are ignored: {listed}. A newer version of "
            "PEFT may have written them; upgrade to use them.",
            stacklevel=3,
        )
    faults = list(_saved_faults(renamed))
    if faults:
        raise AdapterError("adapter_config.json is damaged:\n" + "\n".join(faults))
    return {name: value for name, value in renamed.items() if name in known}


def shortened(value: object, length: int = 60) -> str:
    """A value of a file as a message shows it."""
    try:
        text = str(value)
    except (ValueError, RecursionError):  # an integer of very many digits, or deep nesting
        text = f"a {type(value).__name__}"
    return text if len(text) <= length else text[:length] + "..."


def _saved_faults(found: Mapping[str, Any]) -> Iterator[str]:
    """What the build writes and a person does not: types and ranges, one message for each fault."""
    experts = found.get("experts", {})
    if not isinstance(experts, dict) or not are_names([*experts, *experts.values()]):
        yield "experts must give a path for each name."
    for name in ("expert_names", "routed_modules"):
        value = found.get(name)
        if value is not None and not (isinstance(value, list) and are_names(value) and len(set(value)) == len(value)):
            yield f"{name} must be a list of different names, got {shortened(value)}."
        elif value is not None and name == "expert_names":
            yield from expert_name_faults(dict.fromkeys(value))
    if found.get("routed_modules") is not None and not found.get("expert_names"):
        yield "expert_names must name the experts of the deltas."
    yield from _map_faults(found)
    blocks, layer = found.get("num_blocks"), found.get("router_layer")
    if blocks is not None and (not is_count(blocks) or not 1 <= blocks <= _MOST_BLOCKS):
        yield f"num_blocks must be a whole number of blocks, got {shortened(blocks)}."
    elif blocks is not None and is_count(layer) and layer > blocks:
        yield f"router_layer {shortened(layer)} is beyond the model, which has {blocks} blocks."
    markers = found.get("turn_markers")
    if markers is not None and not (isinstance(markers, list) and all(_are_counts(marker) for marker in markers)):
        yield f"turn_markers must be lists of token ids, got {shortened(markers)}."
    sampled = found.get("backbone_fingerprint")
    if sampled is not None and not (isinstance(sampled, dict) and all(_is_sample(entry) for entry in sampled.values())):
        yield "backbone_fingerprint must give shape and values of tensors."
    for name, kind in (("provenance", dict), ("base_model_name_or_path", str), ("conflict_threshold", (int, float))):
        value = found.get(name)
        if value is not None and not isinstance(value, kind):
            yield f"{name} is {shortened(value)}, of the wrong type."
    if isinstance(found.get("conflict_threshold"), int) and abs(found["conflict_threshold"]) > 2**53:
        yield "conflict_threshold is too large."


def _map_faults(found: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a column map."""
    rows = found.get("column_map")
    if rows is None:
        return
    names = {*(found.get("expert_names") or ()), FALLBACK_EXPERT, ALWAYS}
    is_map = isinstance(rows, dict) and all(isinstance(row, dict) and row for row in rows.values())
    if not is_map or not all(isinstance(name, str) and name and not set(name) & set(".:/") for name in rows):
        yield f"column_map must give a row of factors for each stored delta, got {shortened(rows)}."
        return
    for stored, row in rows.items():
        strangers = [name for name in row if name not in names]
        if strangers:
            yield f"column_map of {shortened(stored)!r} names unknown experts {shortened(strangers)}."
        if not all(map(is_finite, row.values())):
            yield f"column_map of {shortened(stored)!r} must hold finite numbers."


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(is_count(number) and number < 2**63 for number in value)


def _is_sample(entry: object) -> bool:
    if not isinstance(entry, dict) or not _are_counts(entry.get("shape")) or not isinstance(entry.get("values"), list):
        return False
    return all(isinstance(value, (int, float)) and abs(value) < 2.0**1023 for value in entry["values"])
