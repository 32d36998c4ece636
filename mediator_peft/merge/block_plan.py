"""From conflict scores to the blocks that are routed, and plan files that a user can edit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

from ..config import SETTABLE, MediatorSettings, with_todays_names
from ..data_files import DataFileError, MalformedJsonError, parse_json, read_text
from ..errors import ConfigError
from ..tables import unknown_name

PLAN_VERSION = 1
_BLOCK_KEYS = ("block", "routed", "density", "score", "bytes")
_PLAN_KEYS = ("plan_version", "settings", "blocks", "about")
# What the blocks of a plan say themselves.
_SAID_BY_BLOCKS = frozenset({"routed_layers", "density_scope", "budget"})


class BlockPlan(NamedTuple):
    """What is to be done with one block."""

    block: int
    routed: bool
    density: float


def choose_blocks(scores: Sequence[float], routed_layers: str | float | Sequence[int], threshold: float) -> list[int]:
    """Numbers of the blocks that get sparse experts, ascending.

    Args:
        scores: conflict score of each block, in order of depth.
        routed_layers: as in ``MediatorConfig``.
        threshold: for ``"auto"``: the score from which on a block is routed.

    Raises:
        ConfigError: a block number is out of range.
    """
    num_blocks = len(scores)
    if routed_layers == "all":
        return list(range(num_blocks))
    if routed_layers == "auto":
        return [block for block, score in enumerate(scores) if score >= threshold]
    if isinstance(routed_layers, (int, float)):
        num_routed = ceil(routed_layers * num_blocks)
        # Of equal scores the earlier block goes first.
        ranked = sorted(range(num_blocks), key=lambda block: (-scores[block], block))
        return sorted(ranked[:num_routed])
    check_block_numbers(list(routed_layers), num_blocks)  # type: ignore[arg-type]
    return sorted(routed_layers)  # type: ignore[arg-type]


def check_block_numbers(numbers: Sequence[int], num_blocks: int) -> None:
    """Refuse block numbers that the model does not have.

    Raises:
        ConfigError: a number is out of range.
    """
    beyond = [number for number in numbers if number >= num_blocks]
    if beyond:
        raise ConfigError(f"routed_layers {beyond} are beyond this model, whose blocks are 0 to {num_blocks - 1}.")


def read_plan(path: Path, num_blocks: int) -> list[BlockPlan]:
    """Read a plan file.

    Args:
        path: JSON, as ``plan_mediator`` writes it.
        num_blocks: of the model.

    Raises:
        ConfigError: it cannot be read or does not fit the model; all faults are listed.
    """
    plan = _load(path)
    faults = _plan_faults(plan, num_blocks)
    if faults:
        raise ConfigError(f"plan {str(path)!r}:\n- " + "\n- ".join(faults))
    blocks = sorted(plan["blocks"], key=lambda entry: entry["block"])
    return [BlockPlan(entry["block"], entry["routed"], float(entry["density"])) for entry in blocks]


def settings_to_keep(config: MediatorSettings, density: float) -> dict[str, Any]:
    """What a plan file says beside its blocks: settings of the configuration that are not their default.

    Args:
        config: what the plan was made with.
        density: what came of it; it holds for what is targeted outside of the blocks.
    """
    settings = {item.name: getattr(config, item.name) for item in fields(MediatorSettings)} | {"density": density}
    plain = MediatorSettings()
    return {
        name: value
        for name, value in settings.items()
        if name in SETTABLE and name not in _SAID_BY_BLOCKS and value != getattr(plain, name)
    }


def planned_settings(path: Path) -> dict[str, Any]:
    """The settings that a plan was made with, as far as they are no defaults and its blocks do not say them.

    Raises:
        ConfigError: the file cannot be read, or a setting is unknown or out of range.
    """
    plan = _load(path)
    settings = plan.get("settings", {}) if isinstance(plan, dict) else {}
    faults = _settings_faults(settings)
    if faults:
        raise ConfigError(f"plan {str(path)!r}:\n- " + "\n- ".join(faults))
    return with_todays_names(settings)


def _load(path: Path) -> Any:
    try:
        return parse_json(read_text(path))
    except (DataFileError, MalformedJsonError) as fault:
        raise ConfigError(f"plan {str(path)!r} cannot be read: {fault}") from fault


def _settings_faults(settings: object) -> list[str]:
    if not isinstance(settings, dict):
        return [f"settings must be an object, got {settings!r}"]
    try:
        settings = with_todays_names(settings)
    except ConfigError as fault:
        return [str(fault)]
    faults = [unknown_name(key, SETTABLE, "setting of a plan") for key in settings if key not in SETTABLE]
    try:
        MediatorSettings(**{key: value for key, value in settings.items() if key in SETTABLE})
    except ConfigError as fault:
        faults += str(fault).splitlines()
    return faults


def _plan_faults(plan: object, num_blocks: int) -> list[str]:
    if not isinstance(plan, dict) or not isinstance(plan.get("blocks"), list):
        return ["it is no JSON object with a list 'blocks'. Make one with plan_mediator()."]
    faults = [unknown_name(key, _PLAN_KEYS, "key of a plan") for key in plan if key not in _PLAN_KEYS]
    if plan.get("plan_version") != PLAN_VERSION:
        faults.append(f"plan_version is {plan.get('plan_version')!r}, this mediator_peft reads {PLAN_VERSION}")
    faults += _settings_faults(plan.get("settings", {}))
    seen: list[int] = []
    for place, entry in enumerate(plan["blocks"]):
        if not isinstance(entry, dict):
            faults.append(f"entry {place} of 'blocks' is no object")
            continue
        faults += [
            unknown_name(key, _BLOCK_KEYS, f"key of block entry {place}") for key in entry if key not in _BLOCK_KEYS
        ]
        number, routed, density = (entry.get(key) for key in ("block", "routed", "density"))
        if not isinstance(number, int) or isinstance(number, bool):
            faults.append(f"entry {place}: block must be a whole number, got {number!r}")
            continue
        seen.append(number)
        if not isinstance(routed, bool):
            faults.append(f"block {number}: routed must be true or false, got {routed!r}")
        if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
            faults.append(f"block {number}: density must be in (0, 1], got {density!r}")
    if sorted(seen) != list(range(num_blocks)):
        faults.append(f"it must name each of the blocks 0 to {num_blocks - 1} once, it names {sorted(seen)}")
    return faults
