"""The figures of the ablations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import Normalize, SymLogNorm
from matplotlib.ticker import MaxNLocator

from streamlens.analyses.ablation.greedy import GREEDY, INFLUENCE, RANDOM
from streamlens.analyses.figures import DIVERGING, PALETTE, SEQUENTIAL, axes, finish, interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh

    from streamlens.analyses.ablation.blocks import BlocksResult
    from streamlens.analyses.ablation.greedy import GreedyResult
    from streamlens.analyses.ablation.orders import SwapResult
    from streamlens.analyses.ablation.pairs import PairsResult
    from streamlens.analyses.ablation.repair import EffectsResult
    from streamlens.analyses.ablation.sweep import AblationResult

NAMES = {"layer": "whole layer", "attn": "attention", "cross_attn": "cross-attention", "mlp": "MLP", "mixer": "mixer"}
SCORES = {
    "delta_loss": "increase of the loss (nats per token)",
    "kl": "KL(full || dropped) (nats per token)",
    "pooled_distance": "1 - cosine of the pooled output",
}
UNITS = {
    "delta_loss": "loss (nats per token)",
    "kl": "KL (nats per token)",
    "pooled_distance": "1 - cosine",
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
        # Beside the axes: six series leave no room between them.
        drawn.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize="small")
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


def draw_blocks(found: BlocksResult, ax: Axes | None = None) -> Axes:
    """Draw the headline score as a heat map: first layer left out across, number of layers up."""
    grid = found.grid
    drawn = axes(ax, width=5.2, height=4.2)
    lengths = len(grid)
    known = grid[np.isfinite(grid)]
    typical = float(np.median(np.abs(known)))
    wide = typical > 0 and known.max() > 20 * typical
    norm = SymLogNorm(typical, vmin=float(known.min()), vmax=float(known.max())) if wide else None
    edges = np.arange(found.layers + 1) - 0.5, np.arange(lengths + 1) + 0.5
    image = drawn.pcolormesh(*edges, np.ma.masked_invalid(grid), cmap=SEQUENTIAL, norm=norm)
    _bar(drawn, image, SCORES[found.scores.headline])
    for row in found.best():
        drawn.plot(row["start"], row["length"], ".", color="white", markersize=3.5)
    drawn.xaxis.set_major_locator(MaxNLocator(integer=True))
    drawn.yaxis.set_major_locator(MaxNLocator(integer=True))
    title = f"{found.title}. Dots: the cheapest block of each length"
    return finish(drawn, x="first layer left out", y="number of layers left out", title=title)


def draw_pairs(found: PairsResult, ax: Axes | None = None) -> Axes:
    """Draw the interaction of every two units as a heat map around zero."""
    grid = found.interaction
    drawn = axes(ax, width=5.2, height=4.2)
    largest = float(np.nanmax(np.abs(grid), initial=0.0)) or 1.0
    typical = float(np.nanmedian(np.abs(grid))) or largest
    wide = largest > 20 * typical
    norm = SymLogNorm(typical, vmin=-largest, vmax=largest) if wide else Normalize(-largest, largest)
    edges = np.arange(len(grid) + 1) - 0.5
    image = drawn.pcolormesh(edges, edges, np.ma.masked_invalid(grid), cmap=DIVERGING, norm=norm)
    drawn.set_aspect("equal")
    _bar(drawn, image, f"interaction: {UNITS[found.scores.headline]}, + backup, - series")
    if found.units[0].kind == "layer":
        drawn.xaxis.set_major_locator(MaxNLocator(integer=True))
        drawn.yaxis.set_major_locator(MaxNLocator(integer=True))
        name = "layer"
    else:
        step = max(1, len(found.units) // 20)
        ticks = range(0, len(found.units), step)
        labels = [found.units[i].label.removesuffix("_out").replace("_", " ") for i in ticks]
        drawn.set_xticks(ticks, labels, rotation=90)
        drawn.set_yticks(ticks, labels)
        name = "sublayer"
    return finish(drawn, x=name, y=name, title=found.title)


def draw_greedy(found: GreedyResult, ax: Axes | None = None) -> Axes:
    """Draw the headline score by the number of layers left out, one line for each order."""
    drawn = axes(ax)
    looks = {GREEDY: ("mlp", "o"), INFLUENCE: ("attn", "s")}
    for name, scores in found.scores.items():
        head = scores.headline
        values = [scores.interval(head, i) for i in range(len(found.orders[name]))]
        count = list(range(1, len(values) + 1))
        kind, marker = looks.get(name, ("norm", "."))
        label = {GREEDY: "greedy", INFLUENCE: "least Block Influence first", f"{RANDOM} 1": "random orders"}.get(name)
        drawn.plot(count, [v.mean for v in values], marker=marker, markersize=4, color=PALETTE[kind], label=label)
        if name in looks:
            interval(drawn, count, [v.low for v in values], [v.high for v in values], PALETTE[kind])
    drawn.set_ylim(bottom=min(0.0, drawn.get_ylim()[0]))
    drawn.xaxis.set_major_locator(MaxNLocator(integer=True))
    first = next(iter(found.scores.values()))
    return finish(drawn, x="layers left out", y=SCORES[first.headline], title=found.title)


def draw_swaps(found: SwapResult, ax: Axes | None = None) -> Axes:
    """Draw the headline score by the first of the two layers that change places."""
    drawn = axes(ax)
    head = found.scores.headline
    values = [found.scores.interval(head, i) for i in range(len(found.swaps))]
    mean = np.array([v.mean for v in values])
    error = np.maximum([mean - [v.low for v in values], [v.high for v in values] - mean], 0.0)
    drawn.errorbar(range(len(values)), mean, yerr=error, fmt="o", markersize=4, linewidth=1, color=PALETTE["block"])
    drawn.axhline(0.0, color=PALETTE["norm"], linewidth=0.8, zorder=0)
    _spread(drawn, list(mean))
    drawn.xaxis.set_major_locator(MaxNLocator(integer=True))
    return finish(drawn, x="layer l, exchanged with l + 1", y=SCORES[head], title=found.title)


def draw_effects(found: EffectsResult, ax: Axes | None = None) -> Axes:
    """Draw the total effect of each unit against its direct effect: on the diagonal nothing repairs, nothing adds."""
    drawn = axes(ax, width=4.6, height=4.2)
    means = found.means
    for kind in dict.fromkeys(d.kind for d in found.units):
        rows = [i for i, d in enumerate(found.units) if d.kind == kind]
        colour = PALETTE["block" if kind == "layer" else kind]
        x, y = means["direct"][rows], means["total"][rows]
        drawn.plot(x, y, "o", markersize=4, color=colour, label=NAMES.get(kind, kind))
        far = np.argsort(-np.hypot(x, y))[:3]
        for i in far:
            layer = found.units[rows[i]].layers[0]
            drawn.annotate(str(layer), (x[i], y[i]), xytext=(4, 3), textcoords="offset points", fontsize=7)
    drawn.axline((0.0, 0.0), slope=1.0, color=PALETTE["norm"], linewidth=0.8, linestyle="--", label="total = direct")
    drawn.axhline(0.0, color=PALETTE["norm"], linewidth=0.5, zorder=0)
    return finish(drawn, x="direct effect (logits)", y="total effect (logits)", title=found.title)


def _bar(ax: Axes, image: QuadMesh, label: str) -> None:
    figure = ax.get_figure()
    assert figure is not None, "axes without a figure"
    bar = figure.colorbar(image, ax=ax, label=label)
    bar.outline.set_visible(False)
