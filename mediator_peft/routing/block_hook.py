"""Looking at the hidden state inside a model that other threads run at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..forking import renew_after_fork

Listener = Callable[[Tensor], None]


class BlockHook:
    """Shows each thread what its own forward pass brings to one point between the blocks.

    A hook is put on a block once and stays. Hooks that come and go with each pass would not do: registering one is no
    single step in torch, so that two threads may be given the same number and one of them never hears of its pass.
    """

    def __init__(self) -> None:
        self._local = threading.local()
        self._lock = threading.Lock()
        self._handles: dict[int, RemovableHandle] = {}
        renew_after_fork(self, rank=-1)

    def locks(self) -> tuple[Any, ...]:
        """What is held at a fork."""
        return (self._lock,)

    def renew_locks(self) -> None:
        """In a forked child."""
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        # Copies of a model carry the hooks; what threads listen for is not copied.
        return {"handles": self._handles}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._local = threading.local()
        self._lock = threading.Lock()
        self._handles = state["handles"]
        renew_after_fork(self, rank=-1)

    def start(self, blocks: nn.ModuleList, layer: int, listener: Listener) -> None:
        """Hand the hidden state after the first ``layer`` blocks of this thread's next pass to ``listener``, once.

        Args:
            blocks: those of the one model that this tap belongs to.
            layer: from 0 (embedding alone) to all.
            listener: gets (B, T, H); what it raises ends the forward pass.
        """
        is_last = layer == len(blocks)
        block = blocks[-1 if is_last else layer]
        if layer not in self._handles:
            with self._lock:
                if layer not in self._handles:
                    self._handles[layer] = (
                        block.register_forward_hook(self._after)
                        if is_last
                        else block.register_forward_pre_hook(self._before, with_kwargs=True)
                    )
        self._local.listening = (block, is_last, listener)

    @contextmanager
    def none_added(self) -> Iterator[None]:
        """Inside the block, no thread puts a hook on a block: those that are there can be gone through."""
        with self._lock:
            yield

    def stop(self) -> bool:
        """Listen for nothing more in this thread; returns whether the listener has still been waiting."""
        was_waiting = self._listening is not None
        self._local.listening = None
        return was_waiting

    def remove(self) -> None:
        """Take the hooks off their blocks."""
        with self._lock:
            for handle in self._handles.values():
                handle.remove()
            self._handles.clear()

    @property
    def _listening(self) -> tuple[nn.Module, bool, Listener] | None:
        return getattr(self._local, "listening", None)

    # While another thread registers its first hook, torch may call it without the keywords.
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        self._hear(module, False, args[0] if args else (kwargs or {}).get("hidden_states"))

    def _after(self, module: nn.Module, args: object, output: Any) -> None:
        self._hear(module, True, output if isinstance(output, Tensor) else output[0])

    @torch.compiler.disable
    def _hear(self, module: nn.Module, is_after: bool, hidden: Any) -> None:
        listening = self._listening
        if listening is not None and listening[0] is module and listening[1] == is_after:
            self._local.listening = None
            listening[2](hidden)
