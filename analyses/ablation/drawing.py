"""The figures of the ablations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import MaxNLocator

from streamlens.analyses.figures import PALETTE, axes, finish

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from streamlens.analyses.ablation.sweep import AblationResult

NAMES = {"layer": "whole layer", "attn": "attention", "cross_attn": "cross-attention", "mlp": "MLP", "mixer": "mixer"}
SCORES = {
    "delta_loss": "increase of the loss (nats per token)",
    "kl": "KL(full || dropped) (nats per token)",
    "pooled_distance": "1 - cosine of the pooled output",
}
HOLLOW = {"zero": "white"}
"""Fill of the markers of a second mode."""


def draw_sweep(found: AblationResult, ax: Axes | None = None) -> Axes:
    """Draw the headline score by layer with its interval: whole layers, and each kind of sublayer beside them."""
    head = found.scores.headline
    single = [(i, d) for i, d in enumerate(found.drops) if d.layer is not None]
    if len(single) < 2:
        return _draw_bars(found, ax)
    drawn = axes(ax)
    modes = list(dict.fromkeys(d.mode for _, d in single))
    series = [(kind, mode) for kind in dict.fromkeys(d.kind for _, d in single) for mode in modes]
    highest = 0.0
    for place, (kind, mode) in enumerate(series):
        rows = [(i, d) for i, d in single if d.kind == kind and d.mode == mode]
        values = [found.scores.interval(head, i) for i, _ in rows]
        mean = np.array([v.mean for v in values])
        low, high = np.array([v.low for v in values]), np.array([v.high for v in values])
        shift = (place - (len(series) - 1) / 2) * min(0.8 / len(series), 0.2)
        colour = PALETTE["block" if kind == "layer" else kind]
        drawn.errorbar(
            [d.layers[0] + shift for _, d in rows],
            mean,
            yerr=np.maximum([mean - low, high - mean], 0.0),
            fmt="o" if kind == "layer" else "s",
            markersize=4,
            linewidth=1,
            color=colour,
            markerfacecolor=HOLLOW.get(mode, colour) if len(modes) > 1 else colour,
            label=NAMES.get(kind, kind) + (f", {mode}" if len(modes) > 1 else ""),
        )
        highest = max(highest, float(np.nanmax(np.abs(mean), initial=0.0)))
    drawn.axhline(0.0, color=PALETTE["norm"], linewidth=0.8, zorder=0)
    _spread(drawn, [found.scores.mean(head)[i] for i, _ in single])
    drawn.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(series) > 3:
        drawn.legend(ncols=2)
    return finish(drawn, x="layer", y=SCORES[head], title=found.title)


def _draw_bars(found: AblationResult, ax: Axes | None) -> Axes:
    head = found.scores.headline
    drawn = axes(ax, height=1.2 + 0.4 * len(found.drops))
    for row, drop in enumerate(found.drops):
        value = found.scores.interval(head, row)
        error = [[max(value.mean - value.low, 0.0)], [max(value.high - value.mean, 0.0)]]
        drawn.barh(row, value.mean, xerr=error, color=PALETTE.get(drop.kind, PALETTE["block"]), height=0.6)
    drawn.set_yticks(range(len(found.drops)), [f"{d.label} ({d.mode})" for d in found.drops])
    drawn.invert_yaxis()
    drawn.axvline(0.0, color=PALETTE["norm"], linewidth=0.8)
    return finish(drawn, x=SCORES[head], y="dropped", title=found.title)


def _spread(ax: Axes, values: Sequence[float]) -> None:
    """Use a scale that is linear around zero and logarithmic beyond, where one layer dwarfs the others."""
    sizes = np.abs([v for v in values if np.isfinite(v) and v != 0])
    if len(sizes) and sizes.max() > 20 * np.median(sizes):
        ax.set_yscale("symlog", linthresh=float(np.median(sizes)))
