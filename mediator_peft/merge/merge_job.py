"""The list of work of a build, known before any weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..checkpoints.folders import FolderCheckpoint
from ..config import MediatorSettings
from ..methods.merging.row import TensorMethod
from .block_plan import BlockPlan
from .compatibility import Job
from .family_packing import NO_GROUPS, Groups
from .model_method import ModelMethod
from .tensor_work import Task, is_one_pass


@dataclass
class Merge:
    """Everything that is to be done, known before any weight is read."""

    job: Job
    config: MediatorSettings
    tasks: list[Task]
    blocks: dict[str, int]
    """Layer name → block, for every linear layer of the blocks and what is targeted outside of them (``OUTSIDE``)."""

    plan: Sequence[BlockPlan] | None
    method: ModelMethod
    """How tensors are merged."""

    sampled: frozenset[str]
    """Tensors whose values go into the fingerprint."""

    routed: list[int] | None = None
    """Blocks that were chosen beforehand; None where they are chosen by the scores of the pass."""

    density: float | None = None
    """Share of all routed entries that is kept, where densities were shared out."""

    samples: dict[str, dict[str, NDArray[np.float32]]] = field(default_factory=dict)
    """Tensor → column → some magnitudes of its delta, ascending, where they were looked at."""

    groups: Groups = NO_GROUPS
    """Experts that share deltas."""

    @property
    def sampled_fused(self) -> list[str]:
        """Those of the sampled tensors that no task writes alone; their values are looked up when all is done."""
        return sorted(self.sampled & {part.tensor for part in self.job.parts.values()})

    @property
    def needs_torch(self) -> bool:
        """Whether torch will be imported: for all but averages of plain checkpoints with deltas of signs."""
        config, job = self.config, self.job
        is_plain = config.merge_method in ("average", "base") and config.depth_scaling is None and not job.always
        is_by_kernels = is_one_pass(config) and config.for_quantization is None and config.families is None
        return not (is_plain and is_by_kernels and all(type(each) is FolderCheckpoint for each in job.experts.values()))

    def method_of_sample(self, task: Task) -> TensorMethod | str:
        """How a sample of a tensor is merged: by the average where the method cannot merge one, or takes long."""
        is_sampled = self.method.row.is_sampled and self.config.depth_scaling is None
        return self.method.of_tensor(task.name, task.is_transposed) if is_sampled else "average"

    def task(self, name: str) -> Task:
        """The task of one tensor."""
        return next(task for task in self.tasks if task.name == name)
