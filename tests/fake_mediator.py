"""What stand-ins for a Mediator model have in common."""

from __future__ import annotations

from contextlib import contextmanager

import torch


class TakesExperts(torch.nn.Module):
    """Knows in ``active`` under which expert weights it is asked at the moment."""

    active = None

    @contextmanager
    def use_experts(self, weights):
        self.active = weights
        yield
        self.active = None
