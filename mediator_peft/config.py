"""The settings of a Mediator model, checked when made. Plain data: building needs them and needs no PEFT."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from math import isfinite
from typing import Any

from .errors import AdapterError, ConfigError
from .methods.conflict import CONFLICT_SCORES
from .methods.encoding import ENCODINGS
from .methods.encoding.scales import SIGN_SCALES
from .methods.merging import MERGE_METHODS
from .methods.rounding import ROUNDINGS
from .methods.sparsifying import SPARSIFIERS
from .routing.router_names import ROUTER_NAMES
from .tables import unknown_name

FORMAT_VERSION = 1
"""Version of the adapter's files. A newer one is refused, an older one is migrated."""

FALLBACKS = ("base", "backbone")
DENSITY_SCOPES = ("matrix", "model")
ROUTING_TURNS = ("last", "first", "all")
FALLBACK_EXPERT = "base"
"""Name of the expert-weight column that stands for the base model."""

CORRECTION = "_correction"
"""Name of the delta that corrects quantization error of the backbone; no expert can have it."""

ALWAYS = "*"
"""In a column map, stands for the weight that a delta has whatever the expert weights are."""

ALWAYS_PREFIX = "_always "
"""Names of deltas that every prompt gets begin so."""

ALWAYS_RULES = ("alpha", "alpha-omega")

FAMILY_PREFIX = "_family "
"""Names of deltas that a family of experts shares begin so; no expert's name does."""

OLD_FIELDS = {
    "values": "encoding",
    "sign_scale": "rescale",
    "top_p": "routing_top_p",
    "route_on": "routing_turn",
}
"""Former names of fields → names of today. Files of former versions have them; in code they warn for one release."""

_PEFT_NAMES = {
    "layers_to_transform": "layers_to_transform is not a field of MediatorConfig: say which blocks get experts with "
    "routed_layers=[0, 1].",
    "bias": "bias is not a field of MediatorConfig: biases of routed layers always get deltas.",
    "modules_to_save": "modules_to_save is not a field of MediatorConfig: what lies outside of the routed layers is "
    "averaged into the backbone.",
    "r": "r is not a field of MediatorConfig: use rank, with sparsifier='svd'.",
}
"""What other PEFT methods call a field → what to use here."""

_OLD_CHOICES = {"sparsifier": {"random": "dare"}}

_SIMILAR = 0.75
"""From this likeness on (``difflib``), an unknown name in a file is a misspelt one of ours."""

_MOST_BLOCKS = 100_000

_BUDGET = re.compile(r"\d+(\.\d+)?\s*(x|b|[kmgt]i?b)?")
_EXPERT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_\- ]{0,63}")


@dataclass(init=False)
class MediatorSettings:
    """What to merge, how to thin out the deltas, and how to route.

    Raises:
        ConfigError: a field is unknown, out of range or contradicts another; all such faults are listed at once.
    """

    experts: dict[str, str] = field(default_factory=dict)
    """Expert name → folder (or hub id) of its checkpoint. The names become the columns of the expert weights, in this
    order. Letters, digits, ``_``, ``-`` and spaces; ``base`` is taken by the fallback."""

    merge_method: str = "average"
    """A key of ``MERGE_METHODS``: how the experts become the dense backbone. ``"base"`` keeps the base as it is."""

    merge_parameters: dict[str, Any] = field(default_factory=dict)
    """Parameters of the merge method that are not its default, e.g. ``{"density": 0.1}`` with ``"ties"``. Each method
    declares its own; ``mediator-peft methods`` lists them."""

    merge_data: str | None = None
    """File or folder of data that the merge method reads: ``coefficients.json`` for ``"weighted"``, measurements for
    others."""

    depth_scaling: str | list[float] | None = None
    """Scale the merged task vector by depth (LiNeS, arXiv 2410.17146): ``[alpha, beta]`` multiplies block l of L by
    ``alpha + beta * l / (L - 1)`` and all others by ``alpha``; ``"auto"`` computes both from L1 norms, for methods that
    are no plain sum in one more pass. ``None`` does not scale."""

    conflict_score: str = "sign"
    """A key of ``CONFLICT_SCORES``: what ranks the blocks. Larger means more conflict."""

    conflict_density: float = 0.2
    """Share of a task vector's largest entries that vote in the conflict score, in (0, 1]."""

    conflict_threshold: float = 0.1
    """With ``routed_layers="auto"``: a block is routed when its conflict score reaches this."""

    routed_layers: str | float | list[int] = "auto"
    """Which blocks get sparse experts: ``"auto"`` (by threshold), ``"all"``, a share of blocks in (0, 1] (those with
    the most conflict), or a list of block numbers. The others use the backbone alone."""

    target_modules: list[str] | str | None = None
    """Names, or last parts of names, of the matrices that get deltas, e.g. ``["q_proj", "mlp.down_proj"]``. ``None``
    and ``"all-linear"`` take every linear layer of a routed block. Embeddings and ``lm_head`` get deltas when named
    (``["all-linear", "embed_tokens"]``); tied ones are one matrix, and either name stands for both."""

    sparsifier: str = "magnitude"
    """A key of ``SPARSIFIERS``: what of a delta is kept. ``"magnitude"`` keeps the largest entries, ``"dare"`` some
    by chance (DARE), ``"svd"`` the largest singular values."""

    density: float = 0.2
    """Share of a delta's entries that is kept, in (0, 1]; 0.2 keeps one weight in five. With a budget, what came of it
    is written here."""

    density_scope: str = "matrix"
    """Where ``density`` holds: in each ``"matrix"``, or in the ``"model"``: one threshold for all routed matrices and
    experts, so that bytes go where the experts differ most."""

    budget: str | int | None = None
    """Bytes of the built weights, backbone and adapter together, to which ``density`` is fitted: ``"1.5x"`` the
    backbone alone, ``"400MB"``, or a number of bytes. ``None`` takes ``density`` as it is."""

    encoding: str = "sign"
    """A key of ``ENCODINGS``: how kept entries are stored. ``"sign"`` (mask, sign and scale: T-Switch, arXiv
    2412.00054) is one bit each and one scale a row; ``"float"`` is
    exact at density 1. ``"svd"`` stores ``"factors"``, whatever stands here by default."""

    rescale: str = "projection"
    """A key of ``SIGN_SCALES``: how large kept entries are made, signs or numbers. ``"projection"`` keeps the delta's
    full effect, ``"norm"`` the norm of each row, ``"mean"`` the mean of what is kept: numbers as they are."""

    rank: int | None = None
    """With ``sparsifier="svd"``: rank of every delta. ``None`` takes as many bytes as signs of this density."""

    families: str | float | None = None
    """Whether equal experts are stored once, and related ones as one shared delta with thin residuals: ``"auto"`` for
    those whose deltas have a mean cosine of at least 0.3, or the least cosine. ``None``: one delta an expert."""

    for_quantization: str | None = None
    """A key of ``ROUNDINGS``: the quantisation that the backbone is meant for. One more delta, shared by all experts,
    then corrects the largest of its quantization errors where the backbone is loaded so."""

    correction_density: float = 0.5
    """Share of the quantization errors that is corrected, in (0, 1]."""

    always: dict[str, str] | None = None
    """Deltas that every prompt gets, whatever its route: name → ``"PATH:WEIGHT"``, the checkpoint minus the base, or
    ``"PATH,REFERENCE:WEIGHT"``, the checkpoint minus another. E.g. ``{"safety": "aligned,harmful:0.1"}``."""

    always_rule: str | None = None
    """How their weights are meant: ``None`` as they are; ``"alpha"`` relative to the experts' task vectors, as the beta
    of EnchTable (arXiv 2511.09880); ``"alpha-omega"`` also less where they interfere with the experts."""

    router: str = "gaussian"
    """A key of ``ROUTERS``."""

    router_layer: int | str | None = "auto"
    """The router reads the backbone's hidden state after this many blocks; 0 is the embedding. ``"auto"`` has the fit
    choose among up to half of the blocks, by how well other wordings and left-out background families are told apart.
    ``None`` takes a tenth of the depth, which is cheap."""

    routing_turn: str = "last"
    """What of a chat decides its route, where its turns can be told apart: the ``"last"`` user turn (each turn is
    routed anew), the ``"first"`` (one route a chat), or ``"all"`` tokens so far."""

    ood_alpha: float = 0.01
    """Share of known prompts that may be taken for unknown, in (0, 1)."""

    ood_beta: float = 0.03
    """Share of unknown prompts that may reach an expert, in (0, 1); of kinds of prompts that the fit has not seen."""

    routing_top_p: float = 0.5
    """The gate keeps the fewest experts whose probability reaches this, in (0, 1]; 1.0 keeps all. At 0.5 an expert more
    likely than all others together answers alone."""

    fallback: str = "base"
    """Where an unknown prompt goes: ``"base"`` (one more sparse delta, back to the base) or ``"backbone"``."""

    seed: int = 0
    """Seeds whatever is drawn: random sparsifiers, the router's splits."""

    max_resident_experts: int | None = None
    """Most experts whose deltas are held in memory, the last used; the others lie in mapped files. ``None`` holds all.
    It belongs to the machine at hand: given to ``load_mediator``, it is not saved."""

    pinned_experts: list[str] | None = None
    """Experts that never leave memory, with ``max_resident_experts``, of which they are a part. Not saved."""

    expert_folder: str | None = None
    """Where the mapped files go, with ``max_resident_experts``: a folder on a local disk. ``None`` takes the system's
    temporary one. Not saved."""

    format_version: int = FORMAT_VERSION
    """Version of the saved files."""

    expert_names: list[str] | None = None
    """Columns of the expert weights. Written by the build."""

    routed_modules: list[str] | None = None
    """Full names of the layers that carry deltas. Written by the build."""

    num_blocks: int | None = None
    """How many repeated blocks the model has. Written by the build."""

    column_map: dict[str, dict[str, float]] | None = None
    """Which deltas are stored, and the weight of each: stored column → expert → factor, or ``"*"`` → constant weight
    (see :mod:`mediator_peft.bank.column_map`). ``None``: one delta an expert. Written when experts share deltas."""

    turn_markers: list[list[int]] | None = None
    """Token ids that open and close a user turn. Written when the router is fitted."""

    prompt_form: dict[str, list[int]] | None = None
    """How prompts are brought to one form for routing: see ``tuner/prompt_form.py``. Written when the router is fitted;
    ``None`` in adapters of earlier versions, whose prompts are read with their chat markers."""

    fitted_router_layer: int | None = None
    """After how many blocks the fitted router reads the hidden state. Written when it is fitted."""

    backbone_fingerprint: dict[str, Any] | None = None
    """Shapes and sampled values of the backbone the deltas belong to. Written by the build."""

    provenance: dict[str, Any] | None = None
    """Where base and experts came from. Written by the build."""

    base_model_name_or_path: str | None = None
    """Where the backbone lies: a hub id, or a folder, relative to the adapter's."""

    def __init__(self, **settings: Any) -> None:
        # A saved file says its format version; code that calls this does not.
        settings = with_todays_names(settings, _say_nothing if "format_version" in settings else warn_of_old_name)
        known = {item.name: item for item in fields(type(self))}
        unknown = [name for name in settings if name not in known]
        if unknown:
            faults = (unknown_name(name, known, "field of MediatorConfig") for name in unknown)
            pairs = zip(unknown, faults, strict=True)
            raise ConfigError("\n".join(_PEFT_NAMES.get(name, fault) for name, fault in pairs))
        for name, item in known.items():
            if name in settings:
                setattr(self, name, settings[name])
            else:
                setattr(self, name, item.default_factory() if callable(item.default_factory) else item.default)
        self.__post_init__()

    def __post_init__(self) -> None:
        sparsifier = SPARSIFIERS.get(self.sparsifier) if isinstance(self.sparsifier, str) else None
        if sparsifier is not None and sparsifier.is_low_rank and self.encoding == type(self).encoding:
            self.encoding = "factors"
        self.check()

    def check(self) -> None:
        """Raise a ``ConfigError`` that lists every fault of the settings, if there is one."""
        faults = list(self._faults())
        if faults:
            raise ConfigError("\n".join(faults))

    def _faults(self) -> Iterator[str]:
        """Every fault of the settings, one message each."""
        yield from expert_name_faults(self.experts)
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
            value = getattr(self, name)
            if not isinstance(value, str):
                yield f"{name} must be a name, one of {', '.join(table)}, got {value!r}."
            elif value not in table:
                yield unknown_name(value, table, kind)
        wanted = self.for_quantization
        if wanted is not None and not (isinstance(wanted, str) and wanted in ROUNDINGS):
            yield unknown_name(str(wanted), ROUNDINGS, "for_quantization")
        for name, hint in (
            ("density", "1.0 keeps every weight"),
            ("correction_density", "1.0 corrects every weight"),
            ("conflict_density", "1.0 lets every entry vote"),
            ("routing_top_p", "1.0 keeps every expert"),
        ):
            if not _is_share(getattr(self, name)):
                yield f"{name} must be in (0, 1], got {getattr(self, name)!r}. Use a share: {hint}."
        if not (_is_share(self.ood_alpha) and self.ood_alpha < 1):
            yield (f"ood_alpha must be in (0, 1), got {self.ood_alpha!r}. 0.01 lets 1 known prompt in 100 fall back.")
        if not (isinstance(self.conflict_threshold, (int, float)) and isfinite(self.conflict_threshold)):
            yield f"conflict_threshold must be a finite number, got {self.conflict_threshold!r}."
        if not (_is_share(self.ood_beta) and self.ood_beta < 1):
            yield f"ood_beta must be in (0, 1), got {self.ood_beta!r}. 0.05 lets 5 unknown prompts in 100 pass."
        if self.router_layer not in (None, "auto") and not _is_count(self.router_layer):
            yield f"router_layer must be 'auto' or a whole number of blocks, 0 or more, got {self.router_layer!r}."
        if not _is_count(self.seed) or self.seed >= 2**63:
            yield f"seed must be a whole number, 0 or more and below 2**63, got {self.seed!r}."
        targets = self.target_modules
        if not (targets is None or isinstance(targets, str)) and not _are_names(targets):
            yield f"target_modules must be a name or a list of names, got {targets!r}."
        limit = self.max_resident_experts
        if limit is not None and (not _is_count(limit) or limit < 1):
            yield f"max_resident_experts must be a whole number, 1 or more, or None for all, got {limit!r}."
        pinned = self.pinned_experts
        if pinned is not None and (limit is None or isinstance(pinned, str) or not _are_names(pinned)):
            yield f"pinned_experts must be names of experts, beside max_resident_experts, got {pinned!r}."
        elif pinned is not None and self.expert_names is not None:
            strangers = [name for name in pinned if name not in self.columns]
            if strangers:
                yield f"pinned_experts {strangers} are no experts of this model; it has {self.columns}."
        rule = self.always_rule
        if rule is not None and rule not in ALWAYS_RULES:
            yield unknown_name(str(rule), ALWAYS_RULES, "always_rule")
        always = self.always
        if always is not None and not (isinstance(always, dict) and _are_names([*always, *always.values()])):
            yield f"always must give PATH:WEIGHT for each name, got {always!r}."
        elif always:
            yield from expert_name_faults(dict.fromkeys(always))
            if self.sparsifier == "svd":
                yield "always needs positions: use another sparsifier than 'svd'."
        yield from self._merge_faults()
        yield from self._form_faults()
        yield from self._routed_layers_faults()

    def _merge_faults(self) -> Iterator[str]:
        """Of what the merge method is given."""
        method = MERGE_METHODS.get(self.merge_method) if isinstance(self.merge_method, str) else None
        given, path = self.merge_parameters, self.merge_data
        if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
            yield f"merge_parameters must give a value for each name, e.g. {{'density': 0.1}}, got {given!r}."
        elif method is not None:
            yield from method.faults(given, self.merge_method)
        if path is not None and not (isinstance(path, str) and path):
            yield f"merge_data must be a path, got {path!r}."
        elif method is not None and path is not None and method.open_data is None:
            yield f"merge_method {self.merge_method!r} reads no data: leave out merge_data."
        elif method is not None and path is None and method.needs_data and not self.is_built:
            yield f"merge_method {self.merge_method!r} needs merge_data: {method.data}."
        number = None if method is None else method.num_experts
        if number is not None and len(self.experts) not in (0, number) and not self.is_built:
            yield f"merge_method {self.merge_method!r} merges {number} experts, got {len(self.experts)}."
        scaling = self.depth_scaling
        is_pair = isinstance(scaling, (list, tuple)) and len(scaling) == 2 and all(_is_finite(each) for each in scaling)
        if not (scaling is None or scaling == "auto" or is_pair):
            yield f"depth_scaling must be 'auto' or [alpha, beta], two numbers, got {scaling!r}."

    def _form_faults(self) -> Iterator[str]:
        if self.budget is not None and not _is_budget(self.budget):
            yield f"budget must be like '1.5x' (the backbone), '400MB' or a number of bytes, got {self.budget!r}."
        if self.rank is not None and (not _is_count(self.rank) or self.rank < 1):
            yield f"rank must be a whole number, 1 or more, or None, got {self.rank!r}."
        is_known = all(isinstance(name, str) for name in (self.encoding, self.sparsifier))
        is_known = is_known and self.encoding in ENCODINGS and self.sparsifier in SPARSIFIERS
        is_low_rank = is_known and SPARSIFIERS[self.sparsifier].is_low_rank
        if is_known and is_low_rank != (self.encoding == "factors"):
            yield (
                f"sparsifier {self.sparsifier!r} does not go with encoding {self.encoding!r}: 'svd' stores 'factors', "
                "and nothing else does. Leave encoding out with 'svd'."
            )
        if is_known and self.rank is not None and not is_low_rank:
            yield f"rank is for sparsifier='svd', not for {self.sparsifier!r}. Use density."
        if self.rank is not None and (self.budget is not None or self.density_scope != "matrix"):
            yield "rank fixes the size of every delta: leave out budget and density_scope, or leave out rank."
        families = self.families
        is_cosine = isinstance(families, (int, float)) and _is_finite(families) and -1 <= families <= 1
        if families not in (None, "auto") and not is_cosine:
            yield f"families must be 'auto' or the least cosine, in [-1, 1], got {families!r}."
        if families is not None and is_known and not ENCODINGS[self.encoding].has_positions:
            yield f"families need positions, which encoding {self.encoding!r} has not. Use another encoding."
        if families is not None and (self.budget is not None or self.density_scope != "matrix"):
            yield "families share deltas of one density a matrix: leave out budget and density_scope."
        if self.for_quantization is not None and is_low_rank:
            yield "for_quantization needs positions: rounding errors have no low rank. Use another sparsifier."

    def _routed_layers_faults(self) -> Iterator[str]:
        choice = self.routed_layers
        if isinstance(choice, str):
            if choice not in ("auto", "all"):
                yield unknown_name(choice, ("auto", "all"), "routed_layers")
        elif isinstance(choice, (list, tuple)):
            if not choice or not all(_is_count(number) for number in choice) or len(set(choice)) != len(choice):
                yield f"routed_layers must list different block numbers, 0 or more, got {list(choice)!r}."
        elif not _is_share(choice):
            yield (
                "routed_layers must be 'auto', 'all', a share of blocks in (0, 1] or a list of block numbers, "
                f"got {choice!r}."
            )

    def __getattr__(self, name: str) -> Any:
        # Reached only for names that are no fields.
        if name in OLD_FIELDS:
            warn_of_old_name(name, OLD_FIELDS[name])
            return getattr(self, OLD_FIELDS[name])
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OLD_FIELDS:
            warn_of_old_name(name, OLD_FIELDS[name])
            name = OLD_FIELDS[name]
        object.__setattr__(self, name, value)

    @property
    def is_built(self) -> bool:
        """Whether this describes a bank that exists, rather than one to be built."""
        return self.routed_modules is not None

    @property
    def columns(self) -> list[str]:
        """Names of the expert-weight columns: the experts, then ``"base"`` where that is the fallback."""
        names = list(self.expert_names or self.experts)
        return [*names, FALLBACK_EXPERT] if self.fallback == FALLBACK_EXPERT else names


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
    }
)
"""Fields that a file has only where they are set, so that adapters without them have the bytes that they always had."""


def saved_fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fields as they are written to a file."""
    return {name: value for name, value in settings.items() if name not in OMITTED_UNSET or value not in (None, {})}


_WRITTEN_BY_BUILD = frozenset(
    {"expert_names", "routed_modules", "num_blocks", "backbone_fingerprint", "provenance", "column_map"}
)
SETTABLE = (
    frozenset(item.name for item in fields(MediatorSettings))
    - _WRITTEN_BY_BUILD
    - {"experts", "base_model_name_or_path", "format_version"}
)
"""Fields that a person sets in a file; the others have their own place, or are written by the build."""


def warn_of_old_name(old: str, new: str) -> None:
    """Say that a name has changed; the old one is understood for one more release."""
    warnings.warn(f"{old!r} is now called {new!r}; the old name goes with the next release.", DeprecationWarning, 4)


def _say_nothing(old: str, new: str) -> None:
    pass


def with_todays_names(settings: Mapping[str, Any], warn: Callable[[str, str], None] = _say_nothing) -> dict[str, Any]:
    """Settings under the names that their fields and choices have today.

    Args:
        settings: as given, or as a file of a former version has them.
        warn: called with the old and the new name of each that has changed.

    Raises:
        ConfigError: a field is given under both names.
    """
    renamed = dict(settings)
    for old, new in OLD_FIELDS.items():
        if old in renamed:
            if new in renamed:
                raise ConfigError(f"{old!r} is the former name of {new!r}: give one of them.")
            warn(old, new)
            renamed[new] = renamed.pop(old)
    for name, choices in _OLD_CHOICES.items():
        value = renamed.get(name)
        if isinstance(value, str) and value in choices:
            warn(value, choices[value])
            renamed[name] = choices[value]
    return renamed


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
    if not isinstance(experts, dict) or not _are_names([*experts, *experts.values()]):
        yield "experts must give a path for each name."
    for name in ("expert_names", "routed_modules"):
        value = found.get(name)
        if value is not None and not (isinstance(value, list) and _are_names(value) and len(set(value)) == len(value)):
            yield f"{name} must be a list of different names, got {shortened(value)}."
        elif value is not None and name == "expert_names":
            yield from expert_name_faults(dict.fromkeys(value))
    if found.get("routed_modules") is not None and not found.get("expert_names"):
        yield "expert_names must name the experts of the deltas."
    yield from _map_faults(found)
    blocks, layer = found.get("num_blocks"), found.get("router_layer")
    if blocks is not None and (not _is_count(blocks) or not 1 <= blocks <= _MOST_BLOCKS):
        yield f"num_blocks must be a whole number of blocks, got {shortened(blocks)}."
    elif blocks is not None and _is_count(layer) and layer > blocks:
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
        if not all(isinstance(entry, (int, float)) and isfinite(entry) for entry in row.values()):
            yield f"column_map of {shortened(stored)!r} must hold finite numbers."


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(_is_count(number) and number < 2**63 for number in value)


def _is_sample(entry: object) -> bool:
    if not isinstance(entry, dict) or not _are_counts(entry.get("shape")) or not isinstance(entry.get("values"), list):
        return False
    return all(isinstance(value, (int, float)) and abs(value) < 2.0**1023 for value in entry["values"])


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


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def _are_names(value: object) -> bool:
    return isinstance(value, Collection) and all(isinstance(name, str) for name in value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_budget(value: object) -> bool:
    if isinstance(value, str):
        return _BUDGET.fullmatch(value.strip().lower()) is not None
    return _is_count(value) and value != 0
