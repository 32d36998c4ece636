"""Entering methods of other packages into the tables: the public way to extend the library.

The tables are plain dicts that a reader can see whole (``MERGE_METHODS``, ``SPARSIFIERS``, ``CONFLICT_SCORES``,
``ENCODINGS``, ``ROUTERS``); one row is all that a method needs.
"""

from __future__ import annotations

from typing import Any

from .errors import ConfigError
from .methods.conflict import CONFLICT_SCORES, ConflictScore
from .methods.encoding import ENCODINGS, Encoding
from .methods.merging import MERGE_METHODS, MergeMethod
from .methods.sparsifying import SPARSIFIERS, Sparsifier
from .routing.router_names import ROUTER_NAMES
from .routing.routers import ROUTERS, Router
from .tables import lookup

METHOD_TABLES: dict[str, tuple[dict[str, Any], type]] = {
    "merge_method": (MERGE_METHODS, MergeMethod),
    "sparsifier": (SPARSIFIERS, Sparsifier),
    "conflict_score": (CONFLICT_SCORES, ConflictScore),
    "encoding": (ENCODINGS, Encoding),
    "router": (ROUTERS, Router),
}
"""Field of ``MediatorConfig`` → its table and what its rows are."""


def register_method(field: str, name: str, method: Any) -> None:
    """Enter a method, so that ``MediatorConfig(field=name)`` finds it.

    Call it at import of your package, before a build, and again in any process that loads the result: an adapter names
    its methods and does not carry their code.

    Args:
        field: ``"merge_method"``, ``"sparsifier"``, ``"conflict_score"``, ``"encoding"`` or ``"router"``.
        name: how configurations call it: letters, digits and underscores.
        method: a ``MergeMethod``, a ``Sparsifier``, a ``ConflictScore``, an ``Encoding`` object, or a subclass of
            ``Router``.

    Raises:
        ConfigError: the field is unknown, the name is taken or not usable, or the method is of the wrong type.
    """
    table, kind = lookup(METHOD_TABLES, field, "field of methods")
    if not (isinstance(name, str) and name.isidentifier()):
        raise ConfigError(f"method name {name!r} cannot be used: take letters, digits and underscores.")
    fits = issubclass(method, kind) if kind is Router and isinstance(method, type) else isinstance(method, kind)
    if not fits:
        what = f"a subclass of {kind.__name__}" if kind is Router else f"a {kind.__name__}"
        raise ConfigError(f"{field} {name!r} must be {what}, got {method!r}.")
    if name in table and table[name] is not method:
        raise ConfigError(f"{field} {name!r} is taken by {table[name]!r}. Choose another name.")
    table[name] = method
    if kind is Router and name not in ROUTER_NAMES:
        ROUTER_NAMES.append(name)
