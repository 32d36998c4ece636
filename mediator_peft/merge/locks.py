"""Locked checkpoints: the function of the base in other coordinates, which no merge survives.

Some owners protect a model by a change of coordinates that its outputs do not show (MergeLock, arXiv 2509.01548; PaRaMS
permutes and scales neurons), and some quantisation tools rotate or fold weights likewise (QuaRot). Averaged with models
in the usual coordinates, such weights are noise. They are recognised by products that the change leaves alone:

==================  ===========================================  =======================================
change              moved                                        kept
==================  ===========================================  =======================================
values and outputs  ``W_v -> C W_v``, ``W_o -> W_o C^-1``        ``W_o W_v`` of each key-value head
queries and keys    ``W_q -> A W_q``, ``W_k -> A^-T W_k``        ``W_q^T W_k`` of each query head
neurons, scaled     row of ``up`` by s, column of ``down`` by    outer product of both
                    1/s
neurons, permuted   rows and columns change places               the same, at another place
norm folded         ``g -> g / s``, ``W -> W diag(s)``           ``W diag(g)``
residual rotated    ``E -> E R``                                 ``E E^T``
==================  ===========================================  =======================================

Training does not do this: the gradient of any loss is orthogonal to directions along which the function stays the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.fused_parts import split_checkpoint
from ..checkpoints.opening import MeanCheckpoint
from ..checkpoints.tensor_inventory import widths_of
from ..errors import CheckpointMismatchError
from ..methods.sparsifying.selection import Floats
from ..storage import widened
from ..structure import LinearLayer
from .compatibility import Job, split_job

Places = NDArray[np.int64]

MOVED = 0.2
"""Relative change of the factors from which on they are looked at closely; fine-tunes usually have 0.005 to 0.05."""

RATIO = 10.0
"""The factors must have moved so many times further than their product; of an honest fine-tune it is below 1."""

_ROWS = 64
"""Rows of a matrix that stand for all of them in a product."""

_NEURONS = 48
_PAIRS_A_HEAD = 2
_MOST_BLOCKS = 8
"""At most so many blocks of each kind are tested exactly, those that moved most."""

_FUSED_EXPERTS = 3
"""Experts of a fused mixture whose matrices are looked at in each block."""
_LISTED = 3


class Finding(NamedTuple):
    """One change of coordinates."""

    what: str
    moved: float
    """How far the factors are from the base's, relative to their norm."""

    differs: float
    """How far their product is."""

    def __str__(self) -> str:
        return f"{self.what}: the factors differ by {self.moved:.0%}, their product by {self.differs:.1%}"


class _Part(NamedTuple):
    """Outputs of one matrix that belong to one role."""

    tensor: str
    is_transposed: bool
    start: int
    stop: int
    step: int = 1

    def read(self, checkpoint: Checkpoint, outputs: Places | None = None, inputs: Places | None = None) -> Floats:
        """Some outputs and inputs, by number; None for all: (O, I) float32."""
        every = np.arange(self.start, self.stop, self.step)
        wanted = every if outputs is None else every[outputs]
        if self.is_transposed:
            return _rows(checkpoint, self.tensor, inputs)[:, wanted].T
        found = _rows(checkpoint, self.tensor, wanted)
        return found if inputs is None else found[:, inputs]

    def num_inputs(self, checkpoint: Checkpoint) -> int:
        """I"""
        return checkpoint.tensors[self.tensor].shape[0 if self.is_transposed else 1]


class _Attention(NamedTuple):
    name: str
    parts: Mapping[str, _Part]
    """``q``, ``k``, ``v`` and ``o``."""

    head_size: int
    norms: Mapping[str, str]
    """``q`` and ``k`` → tensor of the norm of queries or keys, where the model has such norms."""


class _Neurons(NamedTuple):
    name: str
    parts: Mapping[str, _Part]
    """``up`` and ``down``."""


class _Norm(NamedTuple):
    tensor: str
    readers: list[_Part]
    """Matrices that may read its output."""


def check_locks(job: Job) -> None:
    """Refuse experts that hold the base's function in other coordinates.

    Looks at sampled rows of every block, and computes products only where these moved by more than ``MOVED``. Without a
    base, experts are compared with the first of them.

    Args:
        job: checkpoints of one shape.

    Raises:
        CheckpointMismatchError: an expert is locked; all such are listed, with what was found.
    """
    faults = lock_faults(job)
    if faults:
        raise CheckpointMismatchError("\n".join(faults.values()))


def lock_faults(job: Job) -> dict[str, str]:
    """Expert name → what is to be said of it, for every expert that is locked; see :func:`check_locks`."""
    experts = dict(job.experts)
    reference = job.base
    if isinstance(reference, MeanCheckpoint):
        reference = experts.pop(min(experts))
    faults = {}
    for name, expert in experts.items():
        with np.errstate(all="ignore"):
            found = find_locks(job, reference, expert)
        if found:
            more = f"; and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
            listed = "; ".join(str(finding) for finding in found[:_LISTED])
            faults[name] = (
                f"{expert.label} ({expert.source}) is locked: it computes what {reference.label} computes in other "
                f"coordinates ({listed}{more}). Merging it would ruin the backbone for all experts. It was protected, "
                "or rotated by a quantisation tool; ask its author for the plain weights, or leave it out."
            )
    return faults


def find_locks(job: Job, base: Checkpoint, expert: Checkpoint) -> list[Finding]:
    """All changes of coordinates of one expert that sampled rows lead to.

    Of fused mixtures of experts, the matrices of a few experts a block are looked at.
    """
    if not job.parts:
        job = split_job(job)
        base, expert = split_checkpoint(base, job.parts), split_checkpoint(expert, job.parts)
    attentions, neurons, norms = _modules_of(job)
    found: list[Finding] = []
    kinds: tuple[tuple[Sequence[Any], Callable[..., float], Callable[..., Iterator[Finding]]], ...] = (
        (attentions, _values_moved, _test_values),
        (attentions, _queries_moved, _test_queries),
        (neurons, _neurons_moved, _test_neurons),
        (norms, _norm_moved, _test_norm),
    )
    for modules, change, test in kinds:
        moved = [(change(base, expert, module), number) for number, module in enumerate(modules)]
        suspects = sorted((-far, number) for far, number in moved if far > MOVED)
        for _, number in suspects[:_MOST_BLOCKS]:
            found += test(base, expert, modules[number])
    return [*found, *_test_embedding(job, base, expert)]


def is_lock(moved: float, differs: float) -> bool:
    """Whether factors moved that far, and their product did not follow."""
    return moved > MOVED and moved > RATIO * differs


# --- where things are ------------------------------------------------------------------------------------------------

_OUTPUTS = ("o_proj", "out_proj", "dense")
_FUSED = ("qkv_proj", "c_attn", "Wqkv")
_MLPS = (
    ("up_proj", "down_proj"),
    ("gate_up_proj", "down_proj"),
    ("c_fc", "c_proj"),
    ("fc1", "fc2"),
    ("w3", "w2"),
    ("dense_h_to_4h", "dense_4h_to_h"),
)


def _modules_of(job: Job) -> tuple[list[_Attention], list[_Neurons], list[_Norm]]:
    siblings: dict[str, dict[str, LinearLayer]] = {}
    names = set(job.names)
    counts = Counter(layer.part.tensor for layer in job.structure.layers if layer.part is not None)
    for layer in job.structure.layers:
        if f"{layer.name}.weight" not in names:
            continue
        parent, _, leaf = layer.name.rpartition(".")
        if layer.part is not None:
            if layer.part.number not in _spread(counts[layer.part.tensor], _FUSED_EXPERTS):
                continue
            parent, leaf = f"{layer.part.module}.{layer.part.number}", layer.part.tensor.rpartition(".")[2]
        siblings.setdefault(parent, {})[leaf] = layer
    attentions = [
        found for parent, leaves in siblings.items() if (found := _attention(job, parent, leaves)) is not None
    ]
    neurons = [
        _Neurons(parent, {"up": part, "down": _part(job, leaves[down])})
        for parent, leaves in siblings.items()
        for up, down in _MLPS
        if up in leaves and down in leaves
        for part in _ups(job, leaves[up], up)
    ]
    return attentions, neurons, _norms(job)


def _part(job: Job, layer: LinearLayer, start: int = 0, stop: int | None = None) -> _Part:
    shape = job.base.tensors[f"{layer.name}.weight"].shape
    outputs = shape[1] if layer.is_transposed else shape[0]
    return _Part(f"{layer.name}.weight", layer.is_transposed, start, outputs if stop is None else stop)


def _ups(job: Job, layer: LinearLayer, leaf: str) -> Iterator[_Part]:
    """Where the rows of ``up`` are: of a matrix with ``gate``, in its second half, or every second one (gpt-oss)."""
    whole = _part(job, layer)
    if leaf != "gate_up_proj":
        yield whole
        return
    yield whole._replace(start=whole.stop // 2)
    if layer.part is not None:
        yield whole._replace(start=1, step=2)


def _attention(job: Job, parent: str, leaves: Mapping[str, LinearLayer]) -> _Attention | None:
    output = next((leaves[leaf] for leaf in _OUTPUTS if leaf in leaves), None)
    fused = next((leaves[leaf] for leaf in _FUSED if leaf in leaves), None)
    if fused is not None and output is None:
        output = leaves.get("c_proj")
    if output is None:
        return None
    parts = {"o": _part(job, output)}
    if all(leaf in leaves for leaf in ("q_proj", "k_proj", "v_proj")):
        parts |= {role: _part(job, leaves[f"{role}_proj"]) for role in "qkv"}
    elif fused is not None:
        whole = _part(job, fused)
        queries = parts["o"].num_inputs(job.base)
        keys = (whole.stop - queries) // 2
        edges = (0, queries, queries + keys, whole.stop)
        parts |= {role: whole._replace(start=a, stop=b) for role, (a, b) in zip("qkv", pairwise(edges), strict=True)}
    else:
        return None
    norms = {role: f"{parent}.{role}_norm.weight" for role in "qk" if f"{parent}.{role}_norm.weight" in job.names}
    size = _head_size(job, norms.values())
    if size is None:
        return None
    sizes = {role: part.stop - part.start for role, part in parts.items() if role != "o"}
    sizes["o"] = parts["o"].num_inputs(job.base)
    is_known = sizes["q"] == sizes["o"] and sizes["k"] == sizes["v"] and sizes["v"]
    if not is_known or any(number % size for number in sizes.values()) or sizes["q"] % sizes["v"]:
        return None
    return _Attention(parent, parts, size, norms)


def _head_size(job: Job, norms: Iterable[str]) -> int | None:
    """Width of a head, from its norms where it has some; None where the configuration does not say it."""
    for name in norms:
        return prod(job.base.tensors[name].shape)
    return widths_of(job.base).head


def _norms(job: Job) -> list[_Norm]:
    """Every vector that may scale the residual stream, with the matrices of its block that read the stream."""
    structure, width = job.structure, widths_of(job.base).hidden
    of_layers = {f"{layer.name}.weight" for layer in (*structure.layers, *structure.outer)}
    readers: dict[str, list[_Part]] = {}
    for layer in (*structure.layers, *structure.outer[1:]):
        part = _part(job, layer) if f"{layer.name}.weight" in job.base.tensors else None
        if part is not None and part.num_inputs(job.base) == width:
            readers.setdefault(_block_of(layer.name, structure.blocks), []).append(part)
    return [
        _Norm(name, readers[_block_of(name, structure.blocks)])
        for name in job.names
        if name.endswith(".weight")
        and name not in of_layers
        and job.base.tensors[name].shape == (width,)
        and _block_of(name, structure.blocks) in readers
    ]


def _block_of(name: str, blocks: str) -> str:
    return name.removeprefix(f"{blocks}.").split(".")[0] if name.startswith(f"{blocks}.") else ""


# --- first look: sampled rows ----------------------------------------------------------------------------------------


def _values_moved(base: Checkpoint, expert: Checkpoint, module: _Attention) -> float:
    """Largest relative change of a head's columns of ``W_o``, by some of its rows."""
    rows = _spread(module.parts["o"].stop, 8)
    ours, theirs = (module.parts["o"].read(checkpoint, rows) for checkpoint in (base, expert))
    return _largest(_heads(ours.T, module.head_size), _heads(theirs.T, module.head_size))


def _queries_moved(base: Checkpoint, expert: Checkpoint, module: _Attention) -> float:
    """Largest relative change of a head, by some rows of each."""
    changes = []
    for role in "qk":
        part, size = module.parts[role], module.head_size
        starts = np.arange(0, part.stop - part.start, size)
        inside = _spread(size, 2 * _PAIRS_A_HEAD)
        rows = (starts[:, None] + inside).reshape(-1)
        ours, theirs = (
            _heads(part.read(checkpoint, rows), len(inside)) for checkpoint in (base, expert)
        )  # fmt: skip
        changes.append(_largest(ours, theirs))
    return max(changes)


def _neurons_moved(base: Checkpoint, expert: Checkpoint, module: _Neurons) -> float:
    """Largest relative change of a neuron's column of ``down``, by some of its rows."""
    rows = _spread(module.parts["down"].stop, 8)
    ours, theirs = (module.parts["down"].read(checkpoint, rows).T for checkpoint in (base, expert))
    return _largest(ours[:, None], theirs[:, None])


def _norm_moved(base: Checkpoint, expert: Checkpoint, module: _Norm) -> float:
    ours, theirs = (_rows(checkpoint, module.tensor, None) for checkpoint in (base, expert))
    # A folded norm may be near to what it was; what reads it is looked at where it moved at all.
    return 2 * _change(ours, theirs)


# --- exact tests -----------------------------------------------------------------------------------------------------


def _test_values(base: Checkpoint, expert: Checkpoint, module: _Attention) -> Iterator[Finding]:
    """``W_o W_v`` of each key-value head; where heads changed places, the sum over all heads."""
    size, part = module.head_size, module.parts["o"]
    rows = _spread(part.stop, _ROWS)
    outputs, values = [], []
    for checkpoint in (base, expert):
        heads = _heads(module.parts["v"].read(checkpoint), size)
        queries = _heads(part.read(checkpoint, rows).T, size).transpose(0, 2, 1)
        outputs.append(queries.reshape(len(heads), -1, *queries.shape[1:]))
        values.append(heads)
    products = [queries @ heads[:, None] for queries, heads in zip(outputs, values, strict=True)]
    # (heads, queries a head, rows, H) each
    moved = [
        max(_change(values[0][head], values[1][head]), _change(outputs[0][head], outputs[1][head]))
        for head in range(len(values[0]))
    ]
    differs = [_change(products[0][head], products[1][head]) for head in range(len(moved))]
    yield from _heads_found(f"{module.name}, values and outputs of key-value", moved, differs)
    total = _change(*(product.sum(axis=(0, 1)) for product in products))
    if is_lock(min(moved), total) and not any(map(is_lock, moved, differs)):
        yield Finding(f"{module.name}, heads in another order", min(moved), total)


def _test_queries(base: Checkpoint, expert: Checkpoint, module: _Attention) -> Iterator[Finding]:
    """``W_q^T diag(g_q g_k) W_k`` of each query head, up to its scale where queries and keys are normalised.

    With rotary positions this product is the score at distance 0, which every change of coordinates must keep.
    """
    inputs = _spread(module.parts["q"].num_inputs(base), _ROWS)
    factors, products = [], []
    for checkpoint in (base, expert):
        queries, keys = (
            _heads(module.parts[role].read(checkpoint), module.head_size) for role in "qk"
        )  # fmt: skip
        factors.append((queries, keys))
        scaled = [
            _normed(checkpoint, module, role, heads) for role, heads in (("q", queries[..., inputs]), ("k", keys))
        ]
        groups = scaled[0].reshape(len(keys), -1, *scaled[0].shape[1:])
        product = groups.transpose(0, 1, 3, 2) @ scaled[1][:, None]
        products.append(product.reshape(-1, *product.shape[2:]))
    number = len(factors[0][0]) // len(factors[0][1])
    moved, differs = [], []
    for head, (ours, theirs) in enumerate(zip(*products, strict=True)):
        moved.append(
            max(
                _change(factors[0][0][head], factors[1][0][head]),
                _change(factors[0][1][head // number], factors[1][1][head // number]),
            )
        )
        scale = float((ours * theirs).sum() / np.square(theirs).sum()) if module.norms else 1.0
        differs.append(_change(ours, theirs * scale))
    yield from _heads_found(f"{module.name}, queries and keys of query", moved, differs)


def _test_neurons(base: Checkpoint, expert: Checkpoint, module: _Neurons) -> Iterator[Finding]:
    """Outer product of a neuron's row of ``up`` and its column of ``down``, at its own place and at another one."""
    up, down = module.parts["up"], module.parts["down"]
    rows = _spread(down.stop, _ROWS)
    columns = [down.read(checkpoint, rows).T for checkpoint in (base, expert)]
    change = _norms_of(columns[1] - columns[0]) / np.maximum(_norms_of(columns[0]), 1e-30)
    suspects = np.flatnonzero(change > MOVED)
    suspects = suspects[_spread(len(suspects), _NEURONS)]
    if not len(suspects):
        return
    theirs = _Pairs(up.read(expert, suspects), columns[1][suspects])
    ours = _Pairs(up.read(base, suspects), columns[0][suspects])
    moved, differs = ours.change(theirs), ours.product_change(theirs)
    if is_lock(moved, differs):
        yield Finding(f"{module.name}, neurons scaled", moved, differs)
        return
    every = up.read(base)
    alike = _unit(theirs.rows) @ _unit(every).T
    best = np.abs(alike).argmax(axis=1)
    elsewhere = (best != suspects) & (np.abs(alike[np.arange(len(best)), best]) > 0.9)
    if elsewhere.sum() * 2 < len(suspects):
        return
    at_best = _Pairs(every[best], columns[0][best])
    differs = at_best.select(elsewhere).product_change(theirs.select(elsewhere))
    moved = ours.select(elsewhere).change(theirs.select(elsewhere))
    if is_lock(moved, differs):
        yield Finding(f"{module.name}, neurons in another order", moved, differs)


def _test_norm(base: Checkpoint, expert: Checkpoint, module: _Norm) -> Iterator[Finding]:
    """``W diag(g)``; some models add 1 to what they store of g."""
    ours, theirs = (_rows(checkpoint, module.tensor, None) for checkpoint in (base, expert))
    for part in module.readers:
        outputs = _spread(part.stop - part.start, _ROWS)
        weights = [part.read(checkpoint, outputs) for checkpoint in (base, expert)]
        moved = _change(*weights)
        differs = min(_change(weights[0] * (ours + offset), weights[1] * (theirs + offset)) for offset in (0.0, 1.0))
        if is_lock(moved, differs):
            yield Finding(f"{module.tensor}, folded into {part.tensor}", moved, differs)
            return


def _test_embedding(job: Job, base: Checkpoint, expert: Checkpoint) -> Iterator[Finding]:
    """``E E^T`` of some tokens' rows."""
    for layer in job.structure.outer[:1]:
        part = _part(job, layer)
        rows = _spread(part.stop, _ROWS)
        ours, theirs = (part.read(checkpoint, rows) for checkpoint in (base, expert))
        moved, differs = _change(ours, theirs), _change(ours @ ours.T, theirs @ theirs.T)
        if is_lock(moved, differs):
            yield Finding(f"{layer.name}, residual stream rotated", moved, differs)


class _Pairs(NamedTuple):
    """Rows of ``up`` (n, H) and columns of ``down`` (n, rows) of some neurons."""

    rows: Floats
    columns: Floats

    def select(self, which: NDArray[np.bool_]) -> _Pairs:
        """Some of them."""
        return _Pairs(self.rows[which], self.columns[which])

    def change(self, other: _Pairs) -> float:
        """The larger relative change of the two factors."""
        return max(_change(self.rows, other.rows), _change(self.columns, other.columns))

    def product_change(self, other: _Pairs) -> float:
        """Relative change of the outer products, which are not formed."""
        own = np.square(self.rows).sum(1) * np.square(self.columns).sum(1)
        theirs = np.square(other.rows).sum(1) * np.square(other.columns).sum(1)
        inner = (self.rows * other.rows).sum(1) * (self.columns * other.columns).sum(1)
        apart = np.maximum((own + theirs - 2 * inner).sum(), 0.0)
        return float(np.sqrt(apart / own.sum())) if own.sum() else float("inf")


def _heads_found(what: str, moved: Sequence[float], differs: Sequence[float]) -> Iterator[Finding]:
    heads = [head for head, pair in enumerate(zip(moved, differs, strict=True)) if is_lock(*pair)]
    if heads:
        listed = ", ".join(map(str, heads[:8])) + (", ..." if len(heads) > 8 else "")
        yield Finding(f"{what} heads {listed}", max(moved[h] for h in heads), max(differs[h] for h in heads))


def _normed(checkpoint: Checkpoint, module: _Attention, role: str, heads: Floats) -> Floats:
    """Heads (n, d, H), times the weight of the norm of queries or keys if there is one."""
    if role not in module.norms:
        return heads
    weight = _rows(checkpoint, module.norms[role], None)
    if weight.size == heads.shape[1]:
        return heads * weight[:, None]
    return heads * weight.reshape(len(heads), -1, 1) if weight.size == len(heads) * heads.shape[1] else heads


def _heads(rows: Floats, size: int) -> Floats:
    """Rows (n * size, H) as (n, size, H)."""
    return rows.reshape(-1, size, *rows.shape[1:])


def _norms_of(groups: Floats) -> Floats:
    """Norm of each group (groups, *shape)."""
    norms: Floats = np.sqrt(np.square(groups).sum(axis=tuple(range(1, groups.ndim))))
    return norms


def _change(ours: Floats, theirs: Floats) -> float:
    """Norm of the difference over that of ``ours``; infinite for zeros."""
    norm = float(np.linalg.norm(ours))
    return float(np.linalg.norm(theirs - ours)) / norm if norm else float("inf")


def _largest(ours: Floats, theirs: Floats) -> float:
    """Largest relative change of a group: (groups, n, m) each."""
    norms = _norms_of(ours)
    changes = _norms_of(theirs - ours)[norms > 0] / norms[norms > 0]
    return float(changes.max()) if len(changes) else 0.0


def _unit(rows: Floats) -> Floats:
    norms = np.maximum(_norms_of(rows), np.float32(1e-30))
    return np.divide(rows, norms[:, None], dtype=np.float32)


def _spread(number: int, most: int) -> Places:
    """Up to ``most`` of ``number`` places, evenly spread."""
    if number <= most:
        return np.arange(number)
    return np.arange(most) * number // most


def _rows(checkpoint: Checkpoint, tensor: str, rows: Places | None) -> Floats:
    """Some rows of a tensor, in rising order; None for all: float32."""
    if rows is None:
        return widened(checkpoint.read(tensor))
    numbers = rows.tolist()
    groups: list[tuple[int, int]] = []
    for number in numbers:
        if groups and groups[-1][1] == number:
            groups[-1] = (groups[-1][0], number + 1)
        else:
            groups.append((number, number + 1))
    # What is read lies in a buffer that the next reading uses.
    return widened(checkpoint.read_groups(tensor, groups))
