"""One look for all plots: colour-blind-safe colours, labelled axes, sizes that fit a paper's column."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PALETTE: dict[str, str] = {
    "attn": "#0072B2",
    "cross_attn": "#56B4E9",
    "mlp": "#D55E00",
    "mixer": "#009E73",
    "embed": "#CC79A7",
    "norm": "#7f7f7f",
    "block": "#333333",
    "other": "#E69F00",
}
"""Okabe and Ito's colours, by what they stand for everywhere."""

SEQUENTIAL, DIVERGING = "viridis", "vlag"
"""Colour maps of heat maps: amounts, and amounts around zero."""

_TEXT, _SMALL = 9.0, 8.0
"""Points."""
_CHARACTERS_PER_INCH = 13

_STYLE: Any = {
    "figure.dpi": 110,
    "savefig.dpi": 200,
    "font.size": _TEXT,
    "axes.titlesize": _TEXT,
    "axes.labelsize": _TEXT,
    "legend.fontsize": _SMALL,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "svg.fonttype": "path",
    "svg.hashsalt": "streamlens",
}


@contextmanager
def style() -> Iterator[None]:
    """Use the house style for what is drawn inside, and leave the user's settings as they were."""
    with sns.axes_style("ticks"), mpl.rc_context(_STYLE):
        yield


def axes(ax: Axes | None, *, width: float = 6.0, height: float = 3.2) -> Axes:
    """Return `ax`, or the axes of a new figure (inches) that no global state knows of."""
    if ax is not None:
        return ax
    with style():
        return Figure(figsize=(width, height), layout="constrained").add_subplot()


def panels(rows: int, columns: int, *, width: float = 7.0, height: float = 5.0) -> Sequence[Axes]:
    """Return the axes of a new figure with several panels, row by row."""
    with style():
        figure = Figure(figsize=(width, height), layout="constrained")
        return list(figure.subplots(rows, columns, squeeze=False).flat)


def interval(ax: Axes, x: Sequence[float], low: Sequence[float], high: Sequence[float], colour: str) -> None:
    """Shade the interval of a line."""
    ax.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def finish(ax: Axes, *, x: str, y: str, title: str = "") -> Axes:
    """Label the axes, with units, set the title, and bring all text to the house's sizes."""
    ax.set_xlabel(x, fontsize=_TEXT)
    ax.set_ylabel(y, fontsize=_TEXT)
    ax.tick_params(labelsize=_SMALL)
    if title:
        # Texts name the model and the corpus and can be long; a cut title says nothing.
        inches = ax.get_position().width * float(_figure_of(ax).get_figwidth())
        lines = textwrap.wrap(title, max(20, int(inches * _CHARACTERS_PER_INCH)))
        ax.set_title("\n".join(lines), loc="left", fontsize=_TEXT)
    for axis in (ax.xaxis, ax.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
    for drawn in ax.collections:
        if drawn.colorbar is not None:
            drawn.colorbar.ax.tick_params(labelsize=_SMALL)
            drawn.colorbar.ax.yaxis.label.set_fontsize(_TEXT)
    sns.despine(ax=ax)
    if ax.get_legend_handles_labels()[0] and ax.get_legend() is None:
        ax.legend(frameon=False, fontsize=_SMALL)
    return ax


def save_figure(ax: Axes, path: Path | io.StringIO) -> None:
    """Write the figure that `ax` belongs to; into a text buffer as SVG. The same numbers give the same bytes."""
    suffix = path.suffix[1:] if isinstance(path, Path) else "svg"
    dated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(suffix)
    with style():
        _figure_of(ax).savefig(path, format=suffix, metadata=dated)


def _figure_of(ax: Axes) -> Figure:
    """The whole figure, also where the axes stand in a part of it."""
    figure: Any = ax.get_figure(root=True)
    assert figure is not None, "axes without a figure"
    return figure  # type: ignore[no-any-return]
