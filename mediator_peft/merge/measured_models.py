"""Side files of statistics must be of the models that are merged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..checkpoints.fingerprint import sample
from ..checkpoints.opening import Checkpoint, LoraCheckpoint
from ..errors import ConfigError
from .compatibility import Job


def check_measured_models(fingerprints: Mapping[str, Mapping[str, Any]], job: Job) -> None:
    """Compare sampled values in the headers of side files with the checkpoints.

    A file may have been measured on the expert or on the base. Adapters are not compared: their weights are products,
    whose rounding is not that of the model that was measured.

    Args:
        fingerprints: expert → tensor name → what ``checkpoints.fingerprint.sample`` gave.
        job: base and experts.

    Raises:
        ConfigError: a file is of another model; all such are listed.
    """
    faults = []
    for expert, known in fingerprints.items():
        checkpoint = job.experts[expert]
        if isinstance(checkpoint.whole, LoraCheckpoint):
            continue
        differing = _first_difference(known, checkpoint)
        if differing is not None and _first_difference(known, job.base) is not None:
            faults.append(
                f"the file of expert {expert!r} was measured on another model than {checkpoint.source} or the base: "
                f"{differing!r} has other values there. Measure this expert again with `mediator-peft measure`"
            )
    if faults:
        raise ConfigError("merge_data cannot be used:\n- " + "\n- ".join(faults))


def _first_difference(known: Mapping[str, Any], checkpoint: Checkpoint) -> str | None:
    """The first tensor with other sampled values; None where there is none.

    Tensors of other names or shapes are passed over: a vocabulary may have been cut to the base's.
    """
    return next(
        (
            name
            for name, values in known.items()
            if name in checkpoint.tensors
            and list(checkpoint.tensors[name].shape) == values["shape"]
            and sample(checkpoint.read(name)) != values
        ),
        None,
    )
