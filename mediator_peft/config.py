"""The settings of a Mediator model, checked when made. Plain data: building needs them and needs no PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .errors import ConfigError
from .methods.sparsifying import SPARSIFIERS
from .setting_checks import FALLBACK_EXPERT as FALLBACK_EXPERT
from .setting_checks import setting_faults
from .tables import unknown_name

FORMAT_VERSION = 1
"""Version of the adapter's files. A newer one is refused, an older one is migrated."""

CORRECTION = "_correction"
"""Name of the delta that corrects quantization error of the backbone; no expert can have it."""

ALWAYS = "*"
"""In a column map, stands for the weight that a delta has whatever the expert weights are."""

ALWAYS_PREFIX = "_always "
"""Names of deltas that every prompt gets begin so."""

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
    """A key of ``ROUTERS``: what a fit on texts makes."""

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

    fitted_router: str | None = None
    """A key of ``DELTA_ROUTERS`` where the router was made from the experts' deltas, without texts. ``None``: it is, or
    will be, the one of ``router``, fitted on texts. Written when the router is fitted."""

    fitted_quantization: str | None = None
    """Quantisation of the weights that prompts were read with when the router was fitted. ``None``: plain weights,
    quantised ones with their correction, or an adapter of an earlier version. Written when the router is fitted."""

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
        faults = list(setting_faults(self))
        if faults:
            raise ConfigError("\n".join(faults))

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
