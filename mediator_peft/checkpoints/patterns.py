"""Regular expressions from files that nobody vouches for: matched as PEFT matches them, within bounded time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence

from ..errors import CheckpointError

SECONDS = 10.0
"""After so long the patterns are refused; honest ones take milliseconds."""

# Without these, matching takes time in proportion to the text.
_REPEATS = frozenset("*+?{")
_PROGRAM = """
import json, re, sys
patterns, names = json.load(sys.stdin)
compiled = [re.compile(pattern) for pattern in patterns]
print(json.dumps([next((n for n, known in enumerate(compiled) if known.match(name)), None) for name in names]))
"""


def first_matches(patterns: Sequence[str], names: Iterable[str]) -> dict[str, int]:
    """Which pattern is the first to match the end of each name, as in PEFT's ``get_pattern_key``.

    A pattern with repetitions may take exponential time, and Python cannot stop itself there: these are matched in a
    process of their own.

    Args:
        patterns: regular expressions.
        names: of modules.

    Returns:
        Name → number of the pattern, where one matches.

    Raises:
        CheckpointError: it takes longer than ``SECONDS``.
    """
    names = list(names)
    whole = [rf"(.*\.)?({pattern})$" for pattern in patterns]
    if not patterns or not any(_REPEATS & set(pattern) for pattern in patterns):
        compiled = [re.compile(pattern) for pattern in whole]
        numbers = [next((n for n, known in enumerate(compiled) if known.match(name)), None) for name in names]
    else:
        numbers = _apart(whole, names)
    return {name: number for name, number in zip(names, numbers, strict=True) if number is not None}


def _apart(patterns: Sequence[str], names: Sequence[str]) -> list[int | None]:
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PROGRAM],
            input=json.dumps([patterns, names]),
            capture_output=True,
            check=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired as fault:
        raise CheckpointError(f"its patterns take longer than {SECONDS:.0f} s to match") from fault
    except (OSError, subprocess.CalledProcessError) as fault:
        raise CheckpointError(f"its patterns cannot be matched: {fault}") from fault
    numbers: list[int | None] = json.loads(done.stdout)
    return numbers
