"""The PEFT tuner: a backbone whose routed layers add each prompt's mix of deltas."""

# First of all: config.py registers the tuner with PEFT when it is complete, and must not meet it half imported.
from .. import config as _config  # noqa: F401
