"""One look for all plots: colour-blind-safe colours, labelled axes, sizes that fit a paper's column."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    SymmetricalLogLocator,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable

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

KIND_NAMES: dict[str, str] = {
    "attn": "attention",
    "cross_attn": "cross-attention",
    "mlp": "MLP",
    "mixer": "mixer",
    "embed": "embedding",
    "norm": "bias of a norm",
    "layer": "whole layer",
}
"""What kinds of rows are called in legends."""

SEQUENTIAL, DIVERGING = "viridis", "vlag"
"""Colour maps of heat maps: amounts, and amounts around zero."""

_TEXT, _SMALL = 9.0, 8.0
"""Points."""
_CHARACTERS_PER_INCH = 15
_FEW = 1e4
"""Ratio up to which a logarithmic axis has ticks between the powers of ten."""

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


def integer_ticks(ax: Axes, *, both: bool = False) -> None:
    """Put ticks of the horizontal axis (or of both) at whole numbers only: states and layers have no others."""
    for axis in (ax.xaxis, ax.yaxis)[: 1 + both]:
        axis.set_major_locator(MaxNLocator(integer=True))


def colour_bar(ax: Axes, image: ScalarMappable, label: str) -> None:
    """Put a thin scale of colours beside the axes."""
    bar = _figure_of(ax).colorbar(image, ax=ax, label=label, fraction=0.05, pad=0.02, aspect=40)
    bar.outline.set_visible(False)


def spread_out(ax: Axes, values: Sequence[float], *, linear: float | None = None) -> None:
    """Make the vertical axis linear up to some size and logarithmic beyond, where few values would flatten all others.

    Args:
        ax: the axes.
        values: what is drawn.
        linear: up to where; by default the median size.
    """
    size = np.abs([v for v in values if np.isfinite(v) and v != 0])
    if not len(size):
        return
    most = float(np.median(size)) if linear is None else linear
    if size.max() > max(20 * most, 5 * float(np.median(size))):
        ax.set_yscale("symlog", linthresh=most)
        ax.autoscale_view(scalex=False)  # or the margins would be those of the linear scale: none at the upper end
        ax.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=most, subs=[1, 2, 5]))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def literal(text: str) -> str:
    r"""Return a text that is drawn as it is: names of files may hold a dollar, which would begin a formula.

    >>> print(literal("cost_$a.h5"))
    cost_\$a.h5
    """
    return text.replace("$", r"\$")


def wrapped(text: str, inches: float) -> str:
    """Break a title where a line of so many inches ends; texts name the model and the corpus and can be long."""
    width = max(20, int(inches * _CHARACTERS_PER_INCH))
    lines = textwrap.wrap(text, width, break_on_hyphens=False)
    # As many lines, as equally long as can be: a last line of one word looks like a mistake.
    while width > 20 and len(closer := textwrap.wrap(text, width - 1, break_on_hyphens=False)) == len(lines):
        width, lines = width - 1, closer
    return "\n".join(lines)


def finish(ax: Axes, *, x: str, y: str, title: str = "") -> Axes:
    """Label the axes, with units, set the title, and bring all text to the house's sizes."""
    ax.set_xlabel(literal(x), fontsize=_TEXT)
    ax.set_ylabel(literal(y), fontsize=_TEXT)
    ax.tick_params(labelsize=_SMALL)
    if title:
        inches = ax.get_position().width * float(_figure_of(ax).get_figwidth())
        ax.set_title(literal(wrapped(title, inches)), loc="left", fontsize=_TEXT)
    for axis in (ax.xaxis, ax.yaxis):
        if axis.get_scale() == "log":
            low, high = axis.get_view_interval()
            between = (1.0, 2.0, 5.0) if high < _FEW * low else (1.0,)
            axis.set_major_locator(LogLocator(subs=between, numticks=12))
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
