"""Matching of answers and confidence intervals of accuracies. Plain strings and numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from math import sqrt
from typing import NamedTuple

Matcher = Callable[[str, str], bool]

# A minus counts as a sign only where no number or word stands before it: "10-4" ends in 4, "= -4" in -4.
_NUMBER = re.compile(r"((?<![\w.)])-)?[$€£]?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?)")


def is_exact(output: str, answer: str) -> bool:
    """Output and answer are the same text, whitespace around them aside."""
    return output.strip() == answer.strip()


def contains(output: str, answer: str) -> bool:
    """The answer stands in the output as whole words, in upper or lower case."""
    words = r"\s+".join(re.escape(word) for word in answer.split())
    return bool(words) and re.search(rf"(?<!\w){words}(?!\w)", output, flags=re.IGNORECASE) is not None


def ends_in_number(output: str, answer: str) -> bool:
    """The last number of the output equals the last number of the answer; ``$1,200.00`` equals ``1200 dollars``."""
    expected = last_number(answer)
    return expected is not None and last_number(output) == expected


def last_number(text: str) -> Decimal | None:
    """The last number in a text, thousands separators taken out; None where there is none."""
    found = _NUMBER.findall(text)
    return Decimal("".join(found[-1]).replace(",", "")) if found else None


MATCHERS: dict[str, Matcher] = {
    "exact": is_exact,
    "contains": contains,
    "last_number": ends_in_number,
}
"""(output of the model, reference answer) → whether the output is right."""


class Interval(NamedTuple):
    """A confidence interval of a share."""

    low: float
    high: float


def wilson_interval(num_right: int, num_items: int, z: float = 1.96) -> Interval:
    r"""Wilson's score interval of a share, 95 % by default.

    .. math:: \frac{p + z^2/2n \pm z\sqrt{p(1-p)/n + z^2/4n^2}}{1 + z^2/n}

    E. B. Wilson, *Probable inference, the law of succession, and statistical inference*, JASA 22 (1927). Unlike the
    normal interval it stays within [0, 1] and has a width at 0 and 1. No items give [0, 1].
    """
    if num_items == 0:
        return Interval(0.0, 1.0)
    share = num_right / num_items
    centre = share + z * z / (2 * num_items)
    half = z * sqrt(share * (1 - share) / num_items + z * z / (4 * num_items * num_items))
    scale = 1 + z * z / num_items
    # At 0 and 1 the ends are exact in theory, and off by a rounding error in floating point.
    low = 0.0 if num_right == 0 else (centre - half) / scale
    high = 1.0 if num_right == num_items else (centre + half) / scale
    return Interval(low, high)
