"""Commands whose parameters may be groups of options: a dataclass, of which each field is an option."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import cache, wraps
from inspect import Parameter, Signature, signature
from typing import Any, get_type_hints


def takes_groups(command: Callable[..., None]) -> Callable[..., None]:
    """A command that takes the fields of its groups one by one, as ``typer`` needs them, or whole groups by name.

    Args:
        command: some of its parameters are dataclasses, of which each field has the type, the help and the default of
            an option.
    """
    own = list(signature(command, eval_str=True).parameters.values())
    groups: dict[str, Any] = {each.name: each.annotation for each in own if is_dataclass(each.annotation)}

    @wraps(command)
    def with_options(*positional: Any, **given: Any) -> None:
        for name, group in groups.items():
            if name not in given:
                options = {item.name: given.pop(item.name) for item in fields(group) if item.name in given}
                given[name] = group(**options)
        command(*positional, **given)

    parameters = [option for each in own for option in _options(each)]
    with_options.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {each.name: each.annotation for each in parameters}
    del with_options.__wrapped__
    return with_options


@cache
def _types(group: Any) -> dict[str, Any]:
    """Field → type with help; the same objects for every command."""
    return get_type_hints(group, include_extras=True)


def _options(parameter: Parameter) -> Iterator[Parameter]:
    """A parameter, or one for each field of a group."""
    if not is_dataclass(parameter.annotation):
        yield parameter.replace(kind=Parameter.KEYWORD_ONLY)
        return
    group: Any = parameter.annotation
    types = _types(group)
    for item in fields(group):
        default = Parameter.empty if item.default is MISSING else item.default
        yield Parameter(item.name, Parameter.KEYWORD_ONLY, default=default, annotation=types[item.name])
