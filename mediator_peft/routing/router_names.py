"""Names of the routers for configurations, without the routers themselves: these are modules of torch."""

from __future__ import annotations

ROUTER_NAMES = ["gaussian", "knn", "mlp", "prototype"]
"""The keys of ``ROUTERS``; ``register_method`` adds to both."""

DELTA_ROUTER_NAMES = ["spectral"]
"""The keys of ``DELTA_ROUTERS``."""
