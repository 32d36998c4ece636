"""After how many blocks the hidden state decides best, where the tokenizer cannot read the reference prompts.

Copies with words left out and letters mistyped are most alike after few blocks, so this loss prefers few; where there
are requests in other wordings, :mod:`~mediator_peft.routing.wording` chooses by these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .calibration_data import content_hash, hash_folds
from .decision_rule import Negatives
from .routers import Router
from .rule_fitting import decision_loss, leave_out

_FOLDS = 4
_TEXTS_PER_EXPERT = 60


def choose_depth(
    candidates: Sequence[tuple[Tensor, Tensor | None, Negatives | None]],
    make_router: Callable[[], Router],
    labels: Tensor,
    keys: Sequence[str],
) -> int:
    """Number of the depth with the smallest loss on altered wordings and on families left out of the fit.

    The loss is :func:`~mediator_peft.routing.rule_fitting.decision_loss`. Without background prompts there is nothing
    to compare by, and the last candidate is taken.

    Args:
        candidates: for each depth (N, H) features of the texts, (V, N, H) of their altered copies, and the negatives.
        make_router: an unfitted router, one per fold.
        labels: (N,)
        keys: N texts or groups; rows of equal key share a fold.
    """
    folds = torch.tensor(hash_folds(keys, labels.tolist(), _FOLDS))
    # By their hash, so that the order of the data changes nothing.
    order = torch.tensor(sorted(range(len(keys)), key=lambda place: content_hash(keys[place])))
    some = torch.cat([order[labels[order] == label][:_TEXTS_PER_EXPERT] for label in labels.unique()])
    losses = []
    for features, augmented, negatives in candidates:
        if negatives is None:
            return len(candidates) - 1
        copies = None if augmented is None else augmented[:, some]
        left_out = leave_out(make_router, features[some], labels[some], folds[some], negatives, copies)
        losses.append(decision_loss(left_out, labels[some], negatives))
    return losses.index(min(losses))
