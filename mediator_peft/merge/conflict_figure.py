"""Figure of the conflict scores as SVG text, without a plotting package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT = 720, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 34, 42
# Distinguishable with any colour vision (Okabe and Ito).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def draw_conflict(scores: Mapping[str, Sequence[float]], routed: Sequence[int], num_blocks: int) -> str:
    """Conflict scores over depth, one line a score; blocks that are averaged stand on grey.

    Args:
        scores: name → one number in [0, 1] a block.
        routed: numbers of the routed blocks.
        num_blocks: how many there are.
    """
    step = (_WIDTH - _LEFT - _RIGHT) / max(1, num_blocks)
    floor = _HEIGHT - _BOTTOM

    def x(block: int) -> float:
        return _LEFT + (block + 0.5) * step

    def y(score: float) -> float:
        return floor - min(1.0, max(0.0, score)) * (floor - _TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="11">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
    ]
    for block in sorted(set(range(num_blocks)) - set(routed)):
        parts.append(_rect(x(block) - step / 2, _TOP, step, floor - _TOP))
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(_line(_LEFT, y(tick), _WIDTH - _RIGHT, y(tick), dashed=tick == 0.5))
        parts.append(_text(_LEFT - 6, y(tick) + 4, f"{tick:g}", "end"))
    for block in range(0, num_blocks, max(1, num_blocks // 10)):
        parts.append(_text(x(block), floor + 16, str(block), "middle"))
    parts.append(_text(_LEFT, _HEIGHT - 8, "block (grey: averaged, not routed; 0.5: independent signs)"))
    for number, (name, values) in enumerate(scores.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        points = " ".join(f"{x(block):.1f},{y(score):.1f}" for block, score in enumerate(values))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        start = _LEFT + 120 * number
        parts.append(f'<line x1="{start}" y1="16" x2="{start + 22}" y2="16" stroke="{colour}" stroke-width="3"/>')
        parts.append(_text(start + 28, 20, name))
    return "\n".join([*parts, "</svg>", ""])


def _rect(left: float, top: float, width: float, height: float) -> str:
    return f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}" fill="#e4e4e4"/>'


def _line(x1: float, y1: float, x2: float, y2: float, dashed: bool) -> str:
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#bbb"{dash}/>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#222">{escape(text)}</text>'
