"""Figure of the results of ``measure_speed``."""

from __future__ import annotations

from pathlib import Path

from ..checkpoints.replacing import write_figure
from ..errors import MediatorError
from .speed import DENSE, SpeedReport

_ENDINGS = (".png", ".svg", ".pdf")
_BLUE, _GREY = "#0072B2", "0.6"


class PlotError(MediatorError, ValueError):
    """A picture cannot be drawn."""


def check_plot(path: Path) -> None:
    """Refuse, before anything is measured, a picture that could not be written.

    Raises:
        PlotError: matplotlib is missing, or the file's ending is unknown.
    """
    if path.suffix.lower() not in _ENDINGS:
        raise PlotError(f"{str(path)!r} is no picture: its name must end in {', '.join(_ENDINGS)}.")
    try:
        import matplotlib  # noqa: F401
    except ImportError as fault:
        raise PlotError("pictures need matplotlib: pip install 'mediator_peft[plot]'") from fault


def draw_speed(report: SpeedReport, path: Path) -> None:
    """Bars of tokens a second relative to the plain backbone, one for each kind of work."""
    from matplotlib.figure import Figure

    paces = [pace for pace in report.paces if pace.name != DENSE][::-1]
    figure = Figure(figsize=(7, 0.45 * len(paces) + 1.4), layout="constrained")
    axes = figure.add_subplot()
    labels = [f"{pace.work}, {pace.batch_size} row{'s' * (pace.batch_size > 1)}: {pace.name}" for pace in paces]
    bars = axes.barh(labels, [pace.ratio for pace in paces], color=_BLUE)
    axes.bar_label(bars, [f"{pace.ratio:.2f} ({pace.tokens_per_second:.0f}/s)" for pace in paces], padding=3)
    axes.axvline(1.0, color=_GREY, linewidth=1)
    axes.set_xlim(0, max(1.3, 1.25 * max(pace.ratio for pace in paces)))
    axes.set_xlabel("tokens a second, relative to the plain backbone")
    axes.set_title(
        f"{report.num_parameters / 1e6:.0f} M parameters, {report.dtype}, {report.threads} threads, "
        f"{len(report.experts)} experts",
        fontsize=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_figure(path, figure)
