"""Look-up of a method by name, with an error that names the choices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TypeVar

from .errors import ConfigError

Method = TypeVar("Method")


def lookup(table: Mapping[str, Method], name: str, kind: str) -> Method:
    """Return ``table[name]``; ``kind`` is what the message calls the entry, e.g. "sparsifier".

    Raises:
        ConfigError: the name is not in the table.
    """
    if name in table:
        return table[name]
    raise ConfigError(unknown_name(name, table, kind))


def unknown_name(name: object, known: Iterable[str], kind: str) -> str:
    """What to say of a name that is not among ``known``, with the nearest one as a suggestion."""
    choices = sorted(known)
    near = get_close_matches(str(name), choices, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}; choose one of {choices}.{hint}"
