r"""Deltas that every prompt gets, whatever its route: a safety vector, or what else no expert may lose.

With :math:`\tau_s = \theta_s - \theta_r` of a checkpoint and its reference (the base, or a harmful twin of it), every
column of the expert weights, the fallback's included, is served with :math:`b\, \tau_s` added. Merge formula of
EnchTable (arXiv 2511.09880): :math:`\theta = \theta_0 + \tau_k + \omega_k \alpha_k \tau_s`. A bank holds one delta
for all experts, so :math:`\alpha` and :math:`\omega` are means over the experts (our choice).
"""

from __future__ import annotations

from math import exp, isfinite
from typing import TYPE_CHECKING, NamedTuple

from ..bank.column_map import identity_rows
from ..bank.packed_arrays import PackedArrays
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.opening import PLAIN, Reading, open_checkpoints
from ..config import ALWAYS, ALWAYS_PREFIX, MediatorSettings
from ..deferred import torch
from ..errors import ConfigError
from ..storage import FloatType
from .compatibility import Job, check_job
from .delta_packing import pack_delta
from .distance import sampled_norms
from .tensor_work import Task, deltas_needed
from .tiles import refuse_not_finite

if TYPE_CHECKING:
    from torch import Tensor


_RATE = 200.0
_SHARE = 0.5
_MOST_WEIGHT = 1000.0


class AlwaysOn(NamedTuple):
    """One always-on delta."""

    checkpoint: Checkpoint
    reference: Checkpoint
    weight: float
    """As given: b itself, or the :math:`\\beta` of the rule."""


def parse_always(text: str) -> tuple[str, str | None, float]:
    """``"PATH:0.1"`` or ``"PATH,REFERENCE:0.1"`` → path, reference or None, weight.

    Raises:
        ConfigError: it is neither, or the weight is beyond 1000 in size.
    """
    paths, _, number = text.rpartition(":")
    path, _, reference = paths.partition(",")
    try:
        weight = float(number)
    except ValueError:
        weight = float("nan")
    if not path or not isfinite(weight):
        raise ConfigError(
            f"an always-on delta is PATH:WEIGHT or PATH,REFERENCE:WEIGHT, such as aligned:0.1, got {text!r}."
        )
    if abs(weight) > _MOST_WEIGHT:
        raise ConfigError(f"the weight of an always-on delta is at most {_MOST_WEIGHT:g} in size, got {text!r}.")
    return path, reference or None, weight


def with_always(job: Job, config: MediatorSettings, reading: Reading = PLAIN) -> Job:
    """The job with the checkpoints of the configuration's always-on deltas, opened and compared with the base.

    Raises:
        CheckpointError, CheckpointMismatchError: one is missing, damaged, or does not belong to the base.
    """
    found = {}
    for name, text in (config.always or {}).items():
        path, reference, weight = parse_always(text)
        places = {"checkpoint": path} | ({} if reference is None else {"reference": reference})
        labels = {f"always-on {name!r} ({role})": place for role, place in places.items()}
        opened = open_checkpoints(labels, reading)
        pair = check_job(job.base, dict(zip(places, opened.values(), strict=True)), may_untie=True).experts
        found[name] = AlwaysOn(pair["checkpoint"], pair.get("reference", job.base), weight)
    return job._replace(always=found) if found else job


def always_deltas(job: Job, config: MediatorSettings, task: Task) -> dict[str, PackedArrays]:
    """The always-on deltas of one tensor, by the names of their columns."""
    if task.density is None:
        return {}
    packed = {}
    for name, always in job.always.items():
        column = ALWAYS_PREFIX + name
        delta = _difference(always, task.name, job.dtype)
        bias = None if task.bias is None else _difference(always, task.bias, job.dtype)
        delta = delta.T.contiguous() if task.is_transposed else delta
        if config.always_rule == "alpha-omega":
            mean = sum(
                omega(_rows(expert, task.name, job.dtype) - _rows(job.base, task.name, job.dtype), own)
                for expert, own in _scaled(job, task.name, always)
            ) / len(job.experts)
            delta = delta * mean
        kept = pack_delta(config, f"{task.name}/{column}", delta, task.density, job.dtype, bias)
        packed[column] = PackedArrays.of(kept)
    return packed


def always_rows(job: Job, config: MediatorSettings) -> dict[str, dict[str, float]] | None:
    """The column map of a build with always-on deltas; None without."""
    if not job.always:
        return None
    rows = identity_rows(deltas_needed(config))
    for name, always in job.always.items():
        alphas = _alphas(job, always) if config.always_rule is not None else [always.weight]
        rows[ALWAYS_PREFIX + name] = {ALWAYS: sum(alphas) / len(alphas)}
    return rows


def omega(task_vector: Tensor, safety_vector: Tensor) -> float:
    r"""How little two task vectors of one matrix interfere, in (0, 1].

    .. math:: R = (U^T U - I)\, \operatorname{diag}(s)\, (V V^T - I),\quad \omega = \exp(-200 \operatorname{mean} |R|)

    U, s, V: the upper halves of both singular value decompositions, side by side. EnchTable, arXiv 2511.09880, as in
    the authors' code, where the norm of R is the mean of absolute entries.

    Args:
        task_vector: (O, I), of an expert.
        safety_vector: (O, I), already scaled.

    Returns:
        1 where the leading directions of both are orthogonal.
    """
    lefts, sizes, rights = [], [], []
    for matrix in (task_vector, safety_vector):
        left, size, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        count = max(1, int(len(size) * _SHARE))
        lefts.append(left[:, :count])
        sizes.append(size[:count])
        rights.append(right[:count])
    left, right, size = torch.cat(lefts, dim=1), torch.cat(rights), torch.cat(sizes)
    one = torch.eye(len(size), dtype=torch.float64)
    rest = (left.T @ left - one) * size @ (right @ right.T - one)
    return exp(-_RATE * float(rest.abs().mean()))


def alpha(beta: float, task_norm: float, safety_norm: float) -> float:
    r""":math:`\beta \lVert \tau_k \rVert / \lVert \tau_s \rVert`; EnchTable takes :math:`\beta = 0.1`."""
    return beta * task_norm / safety_norm if safety_norm else 0.0


def _alphas(job: Job, always: AlwaysOn) -> list[float]:
    """Of each expert, by sampled norms."""
    safety = sampled_norms(job, always.reference, always.checkpoint)
    return [
        alpha(always.weight, sampled_norms(job, job.base, job.experts[name]), safety) for name in sorted(job.experts)
    ]


def _scaled(job: Job, tensor: str, always: AlwaysOn) -> list[tuple[Checkpoint, Tensor]]:
    difference = _difference(always, tensor, job.dtype)
    experts = [job.experts[name] for name in sorted(job.experts)]
    return [(expert, difference * scale) for expert, scale in zip(experts, _alphas(job, always), strict=True)]


def _difference(always: AlwaysOn, tensor: str, dtype: FloatType) -> Tensor:
    return _rows(always.checkpoint, tensor, dtype) - _rows(always.reference, tensor, dtype)


def _rows(checkpoint: Checkpoint, tensor: str, dtype: FloatType) -> Tensor:
    """A whole tensor, rounded to the storage dtype: float32.

    Raises:
        CheckpointError: it holds NaN or infinity.
    """
    weight = checkpoint.tensor(tensor).to(dtype.torch).float()
    refuse_not_finite(checkpoint, tensor, int((~weight.isfinite()).sum()), 0, len(weight))
    return weight
