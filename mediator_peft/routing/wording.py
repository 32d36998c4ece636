"""How the wording of a request varies in a model's hidden states, learnt from tasks that are each put in many ways.

Calibration texts of an expert often share one wording, and nothing in them says which directions another wording would
change. Reference tasks show it: the covariance within a task, over its wordings and languages, is a property of the
backbone and not of the experts. In a basis in which this covariance is round, a ridge and a distance discount what
another wording changes: within-class covariance normalisation (Hatch et al. 2006, Interspeech), here with classes that
are not the experts'.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor

from .metrics import auroc
from .reference_texts import FURTHER_LANGUAGES, FURTHER_TASKS, REFERENCE_TASKS

_SHRINKAGE = 0.1


def reference_prompts(seed: int) -> tuple[list[str], Tensor, Tensor]:
    """Each reference task in each of its wordings, one item each.

    Args:
        seed: gives other items.

    Returns:
        P prompts, and (P,) numbers of their tasks and of their wordings.
    """
    prompts, tasks, wordings = [], [], []
    for task, (items, forms) in enumerate((*REFERENCE_TASKS, *FURTHER_TASKS)):
        rng = Random(f"{seed} reference {task}")
        for wording, form in enumerate(forms):
            prompts.append(form.format(rng.choice(items)))
            tasks.append(task)
            wordings.append(wording)
    first = max(wordings) + 1
    for language, forms_of_tasks in enumerate(FURTHER_LANGUAGES):
        for task, form in forms_of_tasks:
            rng = Random(f"{seed} reference {task} {language}")
            prompts.append(form.format(rng.choice(REFERENCE_TASKS[task][0])))
            tasks.append(task)
            wordings.append(first + language)
    return prompts, torch.tensor(tasks), torch.tensor(wordings)


def wording_basis(features: Tensor, tasks: Tensor) -> Tensor:
    r"""The symmetric root :math:`B` of the inverse of the shrunk covariance within tasks; ``z @ B`` has a round one.

    .. math:: B = D^{-1} \bigl((1 - s) R + s I\bigr)^{-1/2}, \qquad s = 0.1

    with :math:`D` the standard deviations and :math:`R` the correlations of the features around their task's mean. The
    shrinkage is our choice (``docs/routing.md``).

    Args:
        features: (P, H) of reference prompts.
        tasks: (P,)

    Returns:
        (H, H) float32
    """
    rows = features.double().cpu()
    places = tasks.unique(return_inverse=True)[1]
    means = torch.stack([rows[places == place].mean(dim=0) for place in range(int(places.max()) + 1)])
    centred = rows - means[places]
    scale = centred.square().mean(dim=0).sqrt()
    scale = scale.clamp(min=max(1e-12, 1e-6 * float(scale.max())))
    standard = centred / scale
    correlation = standard.T @ standard / len(standard)
    shrunk = (1 - _SHRINKAGE) * correlation + _SHRINKAGE * torch.eye(len(scale), dtype=correlation.dtype)
    values, vectors = torch.linalg.eigh(shrunk)
    return (vectors * values.rsqrt() @ vectors.T / scale.unsqueeze(1)).float()


def recognised_across_wordings(features: Tensor, tasks: Tensor, wordings: Tensor) -> float:
    """AUROC of a task's other wordings against other tasks' prompts, by the distance to one wording of the task.

    The basis comes from the other half of the tasks, so that it is judged on tasks that it was not made from. Mean over
    tasks and wordings.

    Args:
        features: (P, H) of reference prompts after some block.
        tasks: (P,)
        wordings: (P,)
    """
    found = []
    for half in (0, 1):
        judged = tasks % 2 == half
        rows = features[judged].double().cpu() @ wording_basis(features[~judged], tasks[~judged]).double()
        their_tasks, their_wordings = tasks[judged], wordings[judged]
        distances = torch.cdist(rows, rows)
        for centre in range(len(rows)):
            same = their_tasks == their_tasks[centre]
            other_wording = same & (their_wordings != their_wordings[centre])
            found.append(auroc(distances[centre][other_wording], distances[centre][~same]))
    return sum(found) / len(found)


def choose_depth_by_wordings(states: Sequence[Tensor], tasks: Tensor, wordings: Tensor) -> int:
    """Number of the depth at which requests are recognised best across wordings; the earlier one of equals.

    Args:
        states: (P, H) features of the reference prompts at each depth.
        tasks: (P,)
        wordings: (P,)
    """
    values = [recognised_across_wordings(features, tasks, wordings) for features in states]
    return values.index(max(values))
