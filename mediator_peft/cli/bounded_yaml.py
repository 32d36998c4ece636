"""YAML of bounded size: aliases, nesting and numbers of a file cannot take all memory."""

from __future__ import annotations

from typing import Any

LARGEST_FILE = 1 << 20
"""Bytes of a pipeline file."""

_MOST_VALUES = 10_000
"""Values of a file with every alias written out."""

_DEEPEST = 50


class MalformedYamlError(ValueError):
    """A text is no YAML, or more than is read."""


def parse_yaml(text: str) -> Any:
    """Plain YAML with unique text keys, as far as its aliases, written out, stay within bounds.

    Ten lines of aliases of aliases stand for gigabytes; merge keys (``<<``) are written out while they are read.

    Raises:
        MalformedYamlError: it is no YAML, or too large; the message says why, with the line where there is one.
    """
    import yaml  # huggingface_hub brings it along

    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {}, 0)
        return loader.construct_document(node)
    except MalformedYamlError:
        raise
    except yaml.YAMLError as fault:
        raise MalformedYamlError(" ".join(str(fault).split())) from fault
    except RecursionError as fault:
        raise MalformedYamlError("it is nested too deeply") from fault
    except (ValueError, OverflowError, TypeError, AttributeError) as fault:
        # What the constructors of numbers and dates raise.
        raise MalformedYamlError(str(fault)) from fault
    finally:
        if loader is not None:
            loader.dispose()


def _count(node: Any, known: dict[int, int], depth: int) -> int:
    """Values under a node with aliases written out; a node that is still being counted contains itself."""
    import yaml

    line = f"line {node.start_mark.line + 1}"
    if id(node) in known:
        if not known[id(node)]:
            raise MalformedYamlError(f"{line}: an alias stands within its own anchor")
        return known[id(node)]
    if depth > _DEEPEST:
        raise MalformedYamlError(f"{line}: nested more than {_DEEPEST} levels deep")
    known[id(node)] = 0
    total = 1
    if isinstance(node, yaml.SequenceNode):
        total += sum(_count(child, known, depth + 1) for child in node.value)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            _check_key(key, seen)
            total += 1 + _count(value, known, depth + 1)
    if total > _MOST_VALUES:
        raise MalformedYamlError(f"{line}: more than {_MOST_VALUES:,} values with aliases written out")
    known[id(node)] = total
    return total


def _check_key(key: Any, seen: set[str]) -> None:
    line = f"line {key.start_mark.line + 1}"
    if key.tag == "tag:yaml.org,2002:merge":
        return
    if key.tag != "tag:yaml.org,2002:str":
        raise MalformedYamlError(f"{line}: a key must be a text, got {str(key.value)[:40]!r}. Put it in quotes")
    if key.value in seen:
        raise MalformedYamlError(f"{line}: the key {key.value!r} comes twice")
    seen.add(key.value)
