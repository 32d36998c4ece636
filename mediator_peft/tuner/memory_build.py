"""Building into a model that is already loaded."""

from __future__ import annotations

from dataclasses import fields

from torch import nn

from ..build.builder import Bank, checkpoints_by_name, label_checkpoints, merge_in_memory, require_experts
from ..build.checkpoints import ModelCheckpoint, open_checkpoints
from ..build.compatibility import check_job
from ..config import MediatorConfig


def build_in_memory(model: nn.Module, config: MediatorConfig) -> Bank:
    """Merge ``config.experts`` around the weights of ``model``, which become the backbone's.

    Nothing is written to the model before all is computed: a fault leaves it as it was. ``config`` gets what the build
    found out.
    """
    require_experts(config)
    experts = open_checkpoints(label_checkpoints(None, config.experts))
    job = check_job(ModelCheckpoint(model), checkpoints_by_name(experts, config.experts))
    bank, backbone, built, _ = merge_in_memory(job, config)
    state = model.state_dict()
    for name, tensor in backbone.items():
        state[name].copy_(tensor)
    for item in fields(config):
        setattr(config, item.name, getattr(built, item.name))
    return bank
