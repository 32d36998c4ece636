r"""Routed fused experts of a mixture of experts: a wrapper in the place of transformers' ``experts`` module.

Each matrix of a fused tensor (E, O, I) or (E, I, O) is a routed layer of its own, whose weight is a view of the tensor.
Where all rows of a batch have one mix, it is written into these views and taken out again, as in linear layers.
Otherwise the module computes once for each mix, over the tokens of its rows, with :math:`D + \sum_k w_k S_k` in the
place of its tensors, of those experts that the tokens are sent to: dense, one mix at a time.

PEFT's ``target_parameters`` parametrizes such a tensor, which gives one weight for all rows of a batch, and forms it of
all experts: hence a wrapper of our own.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..forking import renew_after_fork
from ..structure import follows_interface
from .execution import float32_inside
from .expert_weights import LayerRoute, Mix
from .layer import MediatorLayer
from .merged_weight import copy_if_in_use, mixed_bias, mixed_weight
from .request_board import RequestBoard

_NOT_COPIED = ("_lock", "_route", "_mix", "_kept", "matrices")


class ExpertMatrix(nn.Module):
    """One matrix of a fused tensor, as a linear layer has it: a view, made anew at every reading."""

    def __init__(self, experts: nn.Module, key: str, number: int) -> None:
        super().__init__()
        self.key, self.number = key, number
        self.is_transposed = bool(experts.is_transposed)
        self.has_bias = getattr(experts, f"{key}_bias", None) is not None
        self._home = (experts,)

    def bind(self, experts: nn.Module) -> None:
        """Say which module holds the tensor; it is no part of this one."""
        self._home = (experts,)

    @property
    def weight(self) -> Tensor:
        """(O, I)"""
        matrix = getattr(self._home[0], self.key)[self.number]
        return matrix.T if self.is_transposed else matrix

    @property
    def bias(self) -> Tensor | None:
        """(O,), or None."""
        return getattr(self._home[0], f"{self.key}_bias")[self.number] if self.has_bias else None

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_home"}


class RoutedMatrix(MediatorLayer):
    """One matrix of fused experts with its deltas. It computes nothing: the module around it does."""

    base_layer: ExpertMatrix  # type: ignore[assignment]

    def __init__(self, base_layer: ExpertMatrix, board: RequestBoard) -> None:
        super().__init__(base_layer, board)  # type: ignore[arg-type]

    def _start(self) -> None:
        super()._start()
        self._owner: tuple[RoutedExperts, ...] = ()
        """The wrapper; no part of this module. Empty until the matrix has joined it."""

    def join(self, owner: RoutedExperts, lock: Any) -> None:
        """Become a part of a wrapper: its matrices have one lock, since one product reads all of them."""
        self._owner = (owner,)
        self.weight_state.share_lock(lock)
        self.base_layer.bind(owner.base_layer)

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.base_layer.weight.shape
        return rows, columns

    @property
    def is_transposed(self) -> bool:
        return self.base_layer.is_transposed

    def switch(self, mix: Mix) -> None:
        """Write a mix into the matrix, after taking out what was there; an empty one restores the backbone."""
        self.weight_state.merged.switch(self.active_bank, mix)

    def forget_steps(self) -> None:
        super().forget_steps()
        for owner in self._owner:
            owner.forget_steps()

    def cache_merged_experts(self, mixes: Sequence[Mix]) -> None:
        # Whole weights are of the module; the first of its matrices to be asked makes them, or drops them.
        for owner in self._owner:
            owner.cache_merged_experts(mixes)

    @property
    def cached_bytes(self) -> int:
        return sum(owner.bytes_cached_of(self.base_layer.key, self.base_layer.number) for owner in self._owner)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raise UnsupportedError("a matrix of fused experts computes only within its module.")

    def _apply(self, fn: Any, recurse: bool = True) -> RoutedMatrix:
        # The wrapper has brought the weights back to the backbone's.
        nn.Module._apply(self, fn, recurse)
        return self

    def _copied_state(self) -> dict[str, Any]:
        return {key: value for key, value in super()._copied_state().items() if key != "_owner"}


class RoutedExperts(nn.Module):
    """A module with fused experts, whose matrices are routed layers.

    Args:
        base_layer: follows transformers' interface for experts.
        board: of the model.
    """

    def __init__(self, base_layer: nn.Module, board: RequestBoard) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.board = board
        self._start()

    def _start(self) -> None:
        self._lock = threading.RLock()
        self._route: LayerRoute | None = None
        """The route that the mix in the weights was settled for."""
        self._mix: Mix = ()
        self._kept: dict[Mix, dict[str, Tensor]] = {}
        self.matrices: tuple[RoutedMatrix, ...] = ()
        """All that may have deltas; they are parts of this module under the names of their tensors."""
        renew_after_fork(self)

    def locks(self) -> tuple[Any, ...]:
        """What is held at a fork."""
        return (self._lock,)

    def renew_locks(self) -> None:
        """In a forked child."""
        self._lock = threading.RLock()
        self._bind()

    def _bind(self) -> None:
        """Gather the matrices, which then share the module's tensors and its lock."""
        containers = [module for module in self._modules.values() if isinstance(module, nn.ModuleDict)]
        found = [matrix for container in containers for matrix in container.values()]
        self.matrices = tuple(matrix for matrix in found if isinstance(matrix, RoutedMatrix))
        for matrix in self.matrices:
            matrix.join(self, self._lock)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # What the module around wants to know of its experts, e.g. how many there are.
            modules = self.__dict__.get("_modules", {})
            if "base_layer" not in modules or name.startswith("__"):
                raise
            return getattr(modules["base_layer"], name)

    def add_matrix(self, key: str, number: int) -> None:
        """Have one more matrix routed; nothing where it is already."""
        if key not in self._modules:
            # Past add_module, which takes the attributes of the experts for the wrapper's own.
            self._modules[key] = nn.ModuleDict()
        container: Any = self._modules[key]
        if str(number) not in container:
            container[str(number)] = matrix = RoutedMatrix(ExpertMatrix(self.base_layer, key, number), self.board)
            matrix.join(self, self._lock)
            self.matrices += (matrix,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own: tokens (N, H), ids of their experts (N, k), weights of these (N, k) → (N, H)."""
        if self.matrices and self.matrices[0].merged_adapters:
            return self.base_layer(*args, **kwargs)
        # As in linear layers.
        if torch.compiler.is_compiling():
            return self._outside_graph(*args, **kwargs)
        return self._forward(*args, **kwargs)

    @torch.compiler.disable
    def _outside_graph(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            is_off = not self.matrices or self.matrices[0].disable_adapters
            route = None if is_off else self.board.route
            if route is not None and self._route is route:
                return self.base_layer(*args, **kwargs)
            if route is None or all(matrix.active_bank is None for matrix in self.matrices):
                self._switch(())
                return self.base_layer(*args, **kwargs)
            self._check_readable()
            route = self.board.as_readers_allow(route)
            if route.is_differentiable:
                self._switch(())
                return self._differentiable(route, args, kwargs)
            mix = route.groups[0].mix
            may_merge = route.may_merge and route.execution in (None, "merged") and mix not in self._kept
            if len(route.groups) == 1 and (may_merge or not mix):
                self._switch(mix)
                self._route = route
                return self.base_layer(*args, **kwargs)
            self._switch(())
            return self._by_group(route, args, kwargs)

    def _switch(self, mix: Mix) -> None:
        """Bring the weights to one mix."""
        if not mix and not self._mix:
            return
        self._route = None
        # Kept before the first write: after an exception in the middle everything is taken out again.
        self._mix = mix or self._mix
        for matrix in self.matrices:
            matrix.switch(mix)
        self._mix = mix

    def forget_steps(self) -> None:
        """Drop what was settled for further steps under the last route."""
        self._route = None

    def _check_readable(self) -> None:
        """Refuse tensors that are not at hand as numbers.

        Raises:
            UnsupportedError: they are quantised, offloaded or sharded.
        """
        for key in {matrix.base_layer.key for matrix in self.matrices}:
            tensor = getattr(self.base_layer, key)
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type == "meta" or not _is_wide(tensor):
                raise UnsupportedError(
                    f"the fused experts' tensor {key!r} is quantised, offloaded or sharded; deltas can only be added "
                    "to it unquantised and whole. Load it so, or build without 'experts' in target_modules."
                )

    def _by_group(self, route: LayerRoute, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The output with each row's own mix."""
        if len(route.groups) == 1:
            return self._mixed(route.groups[0].mix, args, kwargs)
        calls = _Tokens(args, kwargs, len(route.expert_weights))
        parts, places = [], []
        for rows, mix in route.groups:
            assert rows is not None
            place = calls.of_rows(rows)
            parts.append(self._mixed(mix, calls.at(place), {}))
            places.append(place)
        # Back to the order of the tokens.
        return torch.cat(parts)[torch.cat(places).argsort()]

    def _mixed(self, mix: Mix, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The output of all given tokens under one mix."""
        if not mix:
            output: Tensor = self.base_layer(*args, **kwargs)
            return output
        tensors = self._kept.get(mix)
        if tensors is None:
            with float32_inside(args[0].device):
                tensors = self._mixed_tensors(mix, _experts_of(args, kwargs))
        return self._call(tensors, args, kwargs)

    def _mixed_tensors(self, mix: Mix, wanted: set[int] | None) -> dict[str, Tensor]:
        """The fused tensors with a mix in them, rounded once. Of experts that are not wanted they hold zeros."""
        tensors = self._copies(wanted)
        for matrix in self.matrices:
            key, number, bank = matrix.base_layer.key, matrix.base_layer.number, matrix.active_bank
            if bank is None or (wanted is not None and number not in wanted):
                continue
            # Of the copy: no view of a tensor that may be sharded is held.
            weight = tensors[key][number].T if matrix.is_transposed else tensors[key][number]
            mixed = mixed_weight(weight, bank, mix)
            tensors[key][number] = mixed.T if matrix.is_transposed else mixed
            shift = mixed_bias(bank, mix)
            if shift is not None:
                bias = tensors[f"{key}_bias"][number]
                tensors[f"{key}_bias"][number] = (bias.float() + shift).to(bias.dtype)
        return tensors

    def _copies(self, wanted: set[int] | None) -> dict[str, Tensor]:
        """Copies of the fused tensors that have routed matrices, and of their biases; zeros for unwanted experts."""
        tensors = {}
        for key in {matrix.base_layer.key: None for matrix in self.matrices}:
            for name in (key, f"{key}_bias"):
                tensor = getattr(self.base_layer, name, None)
                if tensor is None:
                    continue
                if wanted is None or name != key:
                    tensors[name] = tensor.detach().clone()
                    continue
                tensors[name] = torch.zeros_like(tensor, requires_grad=False)
                for number in wanted:
                    tensors[name][number] = tensor.detach()[number]
        return tensors

    def _call(self, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The module's own computation with other tensors; the module itself is left as it is, for other threads."""
        twin = copy.copy(self.base_layer)
        twin.__dict__["_parameters"] = {**self.base_layer._parameters, **tensors}
        # A forward function that was put on the module would compute with the module's tensors.
        twin.__dict__.pop("forward", None)
        output: Tensor = twin(*args, **kwargs)
        return output

    def _differentiable(self, route: LayerRoute, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """As :meth:`_by_group`, with gradients to the expert weights: row by row."""
        calls = _Tokens(args, kwargs, len(route.expert_weights))
        parts = []
        for row, weights in enumerate(route.expert_weights.to(args[0].device)):
            own = calls.at(calls.of_rows(torch.tensor([row])))
            wanted = _experts_of(own, {}) or set()
            with float32_inside(args[0].device):
                tensors = self._mixed_with_gradients(route.columns, weights, wanted)
            parts.append(self._call(tensors, own, {}))
        return torch.cat(parts)

    def _mixed_with_gradients(self, columns: Sequence[str], weights: Tensor, wanted: set[int]) -> dict[str, Tensor]:
        """The fused tensors of one row's mix: weights (C,)."""
        shifts: dict[str, list[Tensor]] = {}
        copies = self._copies(wanted)
        for name, tensor in copies.items():
            shifts[name] = list(torch.zeros_like(tensor, dtype=torch.float32))
        for matrix in self.matrices:
            key, number, bank = matrix.base_layer.key, matrix.base_layer.number, matrix.active_bank
            if bank is None or number not in wanted:
                continue
            for weight, column in zip(weights, columns, strict=True):
                delta = bank.get(column)
                if delta is None:
                    continue
                dense = delta.dense().T if matrix.is_transposed else delta.dense()
                shifts[key][number] = shifts[key][number] + weight * dense
                if delta.bias is not None:
                    shifts[f"{key}_bias"][number] = shifts[f"{key}_bias"][number] + weight * delta.bias
        return {name: (tensor.float() + torch.stack(shifts[name])).to(tensor.dtype) for name, tensor in copies.items()}

    # --- kept weights, copies, files -----------------------------------------------------------------------------

    def cache_merged_experts(self, mixes: Sequence[Mix]) -> None:
        """Hold whole tensors of these mixes, and of no others; see :meth:`MediatorLayer.cache_merged_experts`."""
        with self._lock:
            if set(mixes) == self._kept.keys():
                return
            kept = {mix: self._kept[mix] for mix in mixes if mix in self._kept}
            self._kept = {}
            for matrix in self.matrices:
                matrix.unmerge()
            if mixes:
                self._check_readable()
            self._kept = {mix: kept[mix] if mix in kept else self._mixed_tensors(mix, None) for mix in mixes}

    def bytes_cached_of(self, key: str, number: int) -> int:
        """Bytes that are held of one matrix."""
        return sum(tensors[key][number].nbytes for tensors in self._kept.values() if key in tensors)

    @contextmanager
    def _plain(self) -> Iterator[None]:
        """The backbone's own weights inside the block, which nobody else reads or writes."""
        with self._lock:
            for matrix in self.matrices:
                matrix.unmerge()
            self._mix = ()
            yield

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As in torch; see :meth:`MediatorLayer.state_dict`."""
        with self._plain():
            state = super().state_dict(*args, **kwargs)
            prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
            keep_vars = kwargs.get("keep_vars", False)
            copy_if_in_use(state, f"{prefix}base_layer.", self.base_layer._parameters, self.board, keep_vars)
            return state

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.board.check_idle("load_state_dict")
        self.cache_merged_experts(())
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> RoutedExperts:
        kept = tuple(self._kept)
        self.cache_merged_experts(())
        with self._plain():
            super()._apply(fn, recurse)
        self.cache_merged_experts(kept)
        return self

    def _copied_state(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in _NOT_COPIED}

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutedExperts:
        with self._plain():
            copied = memo[id(self)] = type(self).__new__(type(self))
            copied.__setstate__(copy.deepcopy(self._copied_state(), memo))
            return copied

    def __getstate__(self) -> dict[str, Any]:
        with self._plain():
            state = self._copied_state()
            if self.board.has_requests:
                # As in linear layers: tensors are written later, and may be merged into before that.
                state["_modules"] = {**state["_modules"], "base_layer": copy.deepcopy(self.base_layer)}
            return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start()
        self._bind()


class _Tokens:
    """The inputs of an experts module, which can be taken apart by rows of the batch.

    Raises:
        UnsupportedError: they are not one entry a token, in the order of the batch.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], num_rows: int) -> None:
        given = (*args, *kwargs.values())
        number = len(args[0]) if args else 0
        is_known = args and all(isinstance(value, Tensor) and len(value) == number for value in given)
        if not is_known or args[0].ndim != 2 or number % num_rows or len(given) < 2:
            shapes = [tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in given]
            raise UnsupportedError(
                f"fused experts got inputs {shapes} for {num_rows} rows with different expert weights; they cannot "
                "tell which row a token belongs to. Run the prompts one by one, or build without 'experts' in "
                "target_modules."
            )
        self._given, self._length = given, number // num_rows

    def of_rows(self, rows: Tensor) -> Tensor:
        """Numbers of the tokens of some rows."""
        device = self._given[0].device
        inside = torch.arange(self._length, device=device)
        return (rows.to(device)[:, None] * self._length + inside).flatten()

    def at(self, places: Tensor) -> tuple[Tensor, ...]:
        """The inputs of some tokens."""
        return tuple(value[places] for value in self._given)


def _experts_of(args: Iterable[Any], kwargs: Mapping[str, Any]) -> set[int] | None:
    """The experts that some tokens are sent to; None where that is not said."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and not value.is_floating_point():
            return set(value.unique().tolist())
    return None


def _is_wide(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize >= 2


class _Place(NamedTuple):
    """Where a matrix of fused experts lies."""

    module: str
    key: str
    number: int


def _place_of(modules: Mapping[str, nn.Module], name: str) -> _Place | None:
    """Where the matrix of a fused tensor lies that a layer's name means; None for other layers."""
    tensor, _, number = name.rpartition(".")
    owner, _, key = tensor.rpartition(".")
    module = modules.get(owner)
    experts = module.base_layer if isinstance(module, RoutedExperts) else module
    if experts is None or not number.isdigit() or not follows_interface(experts):
        return None
    fused = experts._parameters.get(key)
    return None if fused is None or fused.ndim != 3 or int(number) >= len(fused) else _Place(owner, key, int(number))


def is_expert_matrix(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Whether a layer's name means a matrix of fused experts.

    Args:
        modules: name → module of the whole model.
        name: of the layer.
    """
    return _place_of(modules, name) is not None


def check_experts(modules: Mapping[str, nn.Module], names: Sequence[str]) -> None:
    """Refuse matrices of fused experts that cannot be wrapped, before anything is changed.

    Args:
        modules: name → module of the whole model.
        names: of the layers that are to be routed; others are passed over.

    Raises:
        UnsupportedError: fused experts are quantised.
    """
    places = [place for name in names if (place := _place_of(modules, name)) is not None]
    for owner, key in {(place.module, place.key) for place in places}:
        module: Any = modules[owner]
        experts = module.base_layer if isinstance(module, RoutedExperts) else module
        # On the meta device a model waits for its weights, or has them elsewhere: it says so when it computes.
        if not _is_wide(getattr(experts, key)):
            raise UnsupportedError(
                f"the adapter has deltas for {owner}.{key}, which is quantised here. Load the experts unquantised."
            )


def wrap_experts(model: nn.Module, names: Sequence[str], board: RequestBoard) -> None:
    """Put a wrapper in the place of each module that holds some of the named matrices of fused experts.

    Args:
        model: to be routed; may have wrappers already.
        names: of all layers that are to be routed.
        board: of the model.
    """
    modules = dict(model.named_modules())
    for name in names:
        place = _place_of(modules, name)
        if place is None:
            continue
        module = modules[place.module]
        if not isinstance(module, RoutedExperts):
            parent, _, child = place.module.rpartition(".")
            module = modules[place.module] = RoutedExperts(module, board)
            setattr(modules[parent], child, module)
        module.add_matrix(place.key, place.number)


def unwrap_experts(model: nn.Module) -> None:
    """The reverse of :func:`wrap_experts`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, RoutedExperts):
            for matrix in module.matrices:
                matrix.unmerge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.base_layer)


def is_fused(layer: MediatorLayer) -> bool:
    """Whether a routed layer is a matrix of fused experts."""
    return isinstance(layer, RoutedMatrix)
