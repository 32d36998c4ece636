"""The adapter of a wrapped model that is active now: its settings, columns, router and layers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..bank.column_map import ColumnMap, identity_rows
from ..config import ALWAYS, CORRECTION
from ..errors import RoutingError, UnsupportedError
from ..forking import renew_after_fork
from ..routing.routers import Router
from .config import FALLBACK_EXPERT, FitSettings, MediatorConfig
from .expert_weights import Columns, ExpertWeights, expert_weight_rows
from .layer import MediatorLayer, routed_layers
from .quantized import are_corrected, uncorrected_quantization


class ActiveAdapter:
    """The adapter of a wrapped model that is active now, as the parts of the tuner see it.

    Args:
        model: the wrapped model.
        configs: adapter name → settings; PEFT's own table.
        routers: adapter name → router; a part of the tuner, so that routers are saved with it.
        active_names: gives the names of the active adapters, which PEFT notes on the tuner.
    """

    def __init__(
        self,
        model: Any,
        configs: Mapping[str, MediatorConfig],
        routers: nn.ModuleDict,
        active_names: Callable[[], list[str]],
    ) -> None:
        self.model = model
        self.configs = configs
        self.routers = routers
        self._active_names = active_names
        self._lock, self._changes = threading.Lock(), threading.RLock()
        # Whoever changes or saves the adapter goes on to lock the board and layers.
        renew_after_fork(self, rank=-2)
        self.awaited: set[str] = set()
        """Adapters whose layers are there and whose deltas have not been loaded yet."""
        self._editions: dict[tuple[str, str | None], int] = {}
        self._maps: dict[str, tuple[Any, list[str], ColumnMap]] = {}

    @property
    def exists(self) -> bool:
        """Whether an adapter is active: there is none after the last one was deleted."""
        return bool(self._active_names())

    def check_loaded(self) -> None:
        """Refuse an adapter whose deltas are still awaited.

        Raises:
            UnsupportedError: its configuration came from a file, and its tensors did not.
        """
        if self.name in self.awaited:
            raise UnsupportedError(
                f"adapter {self.name!r} was made from the configuration of a saved adapter and has no deltas. Load it: "
                "PeftModel.from_pretrained(backbone, folder) or load_mediator(folder). To build it anew, make a "
                "MediatorConfig with the experts."
            )

    @property
    def name(self) -> str:
        """PEFT's name of the adapter.

        Raises:
            UnsupportedError: none is active, or several are.
        """
        names = self._active_names()
        if not names:
            raise UnsupportedError(
                "no Mediator adapter is active: the last one was deleted, and the model is its plain backbone. Load "
                "another (load_adapter) and activate it (set_adapter)."
            )
        if len(names) != 1:
            raise UnsupportedError(
                f"one Mediator adapter can be active at a time, not {names}. Mix experts of one adapter with "
                "expert_weights=."
            )
        return names[0]

    @property
    def config(self) -> MediatorConfig:
        """Its settings.

        Raises:
            UnsupportedError: PEFT has put another method's in their place.
        """
        found: Any = self.configs[self.name]
        if not isinstance(found, MediatorConfig):
            raise UnsupportedError(
                f"another PEFT method ({type(found).__name__}) was put around this model, and took the place of its "
                "Mediator adapter. Load the model anew; to train one of its experts, train the expert and add it again."
            )
        return found

    @property
    def columns(self) -> Columns:
        """Names and editions of the columns that its experts have now."""
        adapter = self.name
        of_adapter = self._editions.get((adapter, None), 0)
        names = self.config.columns
        return Columns.of(names, ((adapter, of_adapter, self._editions.get((adapter, name), 0)) for name in names))

    def begin_edition(self, adapter_name: str, names: Sequence[str | None] = (None,)) -> None:
        """Note that what columns of an adapter, or all of it, held is taken away: what computed with it cannot go on.

        Args:
            adapter_name: of an adapter that is there, or was.
            names: of the columns; None stands for all of them.
        """
        for name in names:
            self._editions[adapter_name, name] = self._editions.get((adapter_name, name), 0) + 1

    @property
    def router(self) -> Router:
        """Its router; a new one takes the old one's place whole."""
        return self.routers[self.name]  # type: ignore[return-value]

    @property
    def layers(self) -> dict[str, MediatorLayer]:
        """Layer name → routed layer."""
        return routed_layers(self.model)

    @property
    def device(self) -> torch.device:
        """Where the model takes token ids."""
        return next(self.model.parameters()).device

    def table(self, spec: ExpertWeights) -> Tensor:
        """Expert weights as a caller gave them → (1 or B, C) float32; see :func:`expert_weight_rows`."""
        return self.named_table(spec)[0]

    def named_table(self, spec: ExpertWeights) -> tuple[Tensor, Columns]:
        """The same, with the names of the columns that it is a table of."""
        config = self.config
        columns = self.columns
        num_experts = len(columns) - (columns[-1:] == (FALLBACK_EXPERT,) and config.fallback == FALLBACK_EXPERT)
        return expert_weight_rows(spec, columns, num_experts), columns

    @contextmanager
    def changes_wait(self) -> Iterator[None]:
        """No fit and no edit of other threads takes effect inside the block; whoever routes goes on."""
        with self._changes:
            yield

    def column_map(self, adapter_name: str | None = None) -> ColumnMap | None:
        """The map from an adapter's expert weights to what its bank stores; None where that is the identity.

        Args:
            adapter_name: None takes the active one.
        """
        name = self.name if adapter_name is None else adapter_name
        config = self.configs[name]
        if config.column_map is None and config.for_quantization is None:
            return None
        known = self._maps.get(name)
        if known is None or known[0] is not config.column_map or known[1] != config.columns:
            rows = identity_rows(config.columns) if config.column_map is None else dict(config.column_map)
            # Where no layer is quantised for it, there is nothing to correct.
            if self.has_corrected_layers(name):
                rows[CORRECTION] = {ALWAYS: 1.0}
            known = self._maps[name] = (config.column_map, config.columns, ColumnMap.of(rows, config.columns))
        made = known[2]
        return None if made.columns == made.inputs else made

    def has_corrected_layers(self, adapter_name: str | None = None) -> bool:
        """Whether quantised layers of an adapter, by default the active one, have their error corrected."""
        name = self.name if adapter_name is None else adapter_name
        return self.configs[name].for_quantization is not None and are_corrected(self.layers.values(), name)

    def uncorrected_quantization(self) -> str | None:
        """In what quantisation prompts are read; None for plain weights, and for those whose error is corrected."""
        return uncorrected_quantization(self.layers.values(), self.name)

    def put_router(
        self,
        router: Router,
        expert_names: list[str],
        experts: dict[str, str],
        column_map: dict[str, dict[str, float]] | None,
    ) -> None:
        """Change the router and the experts that it decides among, in one step for whoever routes meanwhile."""
        with self._changes, self._lock:
            config = self.config
            self.begin_edition(self.name, [name for name in config.expert_names or () if name not in expert_names])
            config.expert_names, config.experts, config.column_map = expert_names, experts, column_map
            self.routers[self.name] = router

    def put_fit(self, router: Router, names: list[str], settings: FitSettings) -> None:
        """Put a fitted router in the place of the last one, with the settings that it was fitted by, in one step.

        Args:
            router: fitted.
            names: of its experts.
            settings: how its prompts were read.

        Raises:
            RoutingError: the model has other experts by now.
        """
        with self._changes, self._lock:
            config = self.config
            if list(config.expert_names or ()) != names:
                raise RoutingError(
                    f"experts were added or removed while the router of {names} was fitted. Fit it again."
                )
            settings.write_to(config)
            self.routers[self.name] = router

    def put_settings(self, adapter_name: str, settings: FitSettings, router: Router | None = None) -> None:
        """Change how an adapter's prompts are read, and with ``router`` what they are judged by."""
        with self._changes, self._lock:
            settings.write_to(self.configs[adapter_name])
            if router is not None:
                self.routers[adapter_name] = router

    def fitted(self) -> tuple[Router, Columns, FitSettings]:
        """The router, the columns that it decides, and how its prompts are read: all of one fit."""
        with self._lock:
            return self.router, self.columns, FitSettings.of(self.config)

    def locks(self) -> tuple[Any, ...]:
        """What is held at a fork, in the order in which they are taken."""
        return (self._changes, self._lock)

    def renew_locks(self) -> None:
        """In a forked child."""
        self._lock, self._changes = threading.Lock(), threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_changes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.renew_locks()
        renew_after_fork(self, rank=-2)
