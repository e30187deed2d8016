"""The figures of the ablations."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from matplotlib.colors import Normalize, SymLogNorm
from matplotlib.ticker import MaxNLocator

from streamlens.analyses.ablation.greedy import GREEDY, INFLUENCE, RANDOM
from streamlens.analyses.figures import DIVERGING, PALETTE, SEQUENTIAL, axes, finish, interval, panels, spread_out

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh

    from streamlens.analyses.ablation.blocks import BlocksResult
    from streamlens.analyses.ablation.greedy import GreedyResult
    from streamlens.analyses.ablation.orders import SwapResult
    from streamlens.analyses.ablation.pairs import PairsResult
    from streamlens.analyses.ablation.repair import EffectsResult
    from streamlens.analyses.ablation.sweep import AblationResult
    from streamlens.analyses.statistics import Floats

NAMES = {"layer": "whole layer", "attn": "attention", "cross_attn": "cross-attention", "mlp": "MLP", "mixer": "mixer"}
SCORES = {
    "delta_loss": "Increase of the loss (nats per token)",
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

CHEAPEST = "Dots: the cheapest block of each length"
Both = TypeVar("Both", "BlocksResult", "PairsResult")


def draw_sweep(found: AblationResult, ax: Axes | None = None) -> Axes:
    """Draw the headline score by layer with its interval: whole layers, and each kind of sublayer beside them."""
    head = found.scores.headline
    single = [(i, d) for i, d in enumerate(found.drops) if d.layer is not None]
    if len(single) < 2:
        return _draw_bars(found, ax)
    drawn = axes(ax)
    modes = list(dict.fromkeys(d.mode for _, d in single))
    series = [(kind, mode) for kind in dict.fromkeys(d.kind for _, d in single) for mode in modes]
    mean = found.scores.mean(head)
    error = _error(mean, *found.scores.intervals(head))
    for place, (kind, mode) in enumerate(series):
        rows = [i for i, d in single if d.kind == kind and d.mode == mode]
        shift = (place - (len(series) - 1) / 2) * min(0.8 / len(series), 0.2)
        colour = PALETTE["block" if kind == "layer" else kind]
        drawn.errorbar(
            [found.drops[i].layers[0] + shift for i in rows],
            mean[rows],
            yerr=error[:, rows],
            fmt="o" if kind == "layer" else "s",
            markersize=4,
            linewidth=1,
            color=colour,
            markerfacecolor=HOLLOW.get(mode, colour) if len(modes) > 1 else colour,
            label=NAMES.get(kind, kind) + (f", {mode}" if len(modes) > 1 else ""),
        )
    drawn.axhline(0.0, color=PALETTE["norm"], linewidth=0.8, zorder=0)
    spread_out(drawn, [mean[i] for i, _ in single])
    drawn.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(series) > 3 or len(modes) > 1:
        _legend_beside(drawn)
    return finish(drawn, x="Layer", y=SCORES[head], title=". ".join(filter(None, (found.title, agreement(found)))))


def agreement(found: AblationResult) -> str:
    """Say how well each proxy orders the layers (else the sublayers) in the mode that was asked for."""
    rows = [row for row in found.correlations() if np.isfinite(row["spearman"])]
    rows = [row for row in rows if (row["over"], row["mode"]) == (rows[0]["over"], rows[0]["mode"])]
    said = ", ".join(f"{row['proxy'].replace('_', ' ')} {row['spearman']:.2f}" for row in rows)
    return f"Rank correlation with the score over {rows[0]['over']}s: {said}" if rows else ""


def _legend_beside(ax: Axes) -> None:
    """Put the legend beside the axes: many series, or tall intervals, leave no room between them."""
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize="small")


def _error(mean: Floats, low: Floats, high: Floats) -> Floats:
    """(2, row) the bars below and above each mean; none where there is no interval."""
    return np.nan_to_num(np.maximum([mean - low, high - mean], 0.0))


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
    return finish(drawn, x=SCORES[head], y="Dropped", title=found.title)


def draw_blocks(found: BlocksResult, ax: Axes | None = None) -> Axes:
    """Draw the headline score as a heat map: first layer left out across, number of layers up."""
    if found.other is not None and ax is None:
        return _side_by_side(found, found.other, _blocks_map)
    return _blocks_map(found, ax, f"{found.title}. {CHEAPEST}")


def _blocks_map(found: BlocksResult, ax: Axes | None, title: str) -> Axes:
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
        if row["mode"] == found.mode:
            drawn.plot(row["start"], row["length"], ".", color="white", markersize=3.5)
    drawn.xaxis.set_major_locator(MaxNLocator(integer=True))
    drawn.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return finish(drawn, x="First layer left out", y="Number of layers left out", title=title)


def _side_by_side(found: Both, other: Both, draw: Callable[[Both, Axes, str], Axes]) -> Axes:
    """Draw the two modes beside each other, under one title."""
    left, right = panels(1, 2, width=9.6, height=4.2)
    draw(found, left, f"mode {found.mode}")
    draw(other, right, f"mode {other.mode}")
    figure = left.get_figure()
    assert figure is not None, "axes without a figure"
    figure.suptitle("\n".join(textwrap.wrap(found.title, 115)), x=0.01, ha="left", fontsize=9)
    return left


def draw_pairs(found: PairsResult, ax: Axes | None = None) -> Axes:
    """Draw the interaction of every two units as a heat map around zero."""
    if found.other is not None and ax is None:
        return _side_by_side(found, found.other, _pairs_map)
    return _pairs_map(found, ax, found.title)


def _pairs_map(found: PairsResult, ax: Axes | None, title: str) -> Axes:
    grid = found.interaction
    drawn = axes(ax, width=5.2, height=4.2)
    largest = float(np.nanmax(np.abs(grid), initial=0.0)) or 1.0
    typical = float(np.nanmedian(np.abs(grid))) or largest
    wide = largest > 20 * typical
    norm = SymLogNorm(typical, vmin=-largest, vmax=largest) if wide else Normalize(-largest, largest)
    edges = np.arange(len(grid) + 1) - 0.5
    image = drawn.pcolormesh(edges, edges, np.ma.masked_invalid(grid), cmap=DIVERGING, norm=norm)
    drawn.set_aspect("equal")
    _bar(drawn, image, f"Interaction: {UNITS[found.scores.headline]}, + backup, - series")
    if found.units[0].kind == "layer":
        drawn.xaxis.set_major_locator(MaxNLocator(integer=True))
        drawn.yaxis.set_major_locator(MaxNLocator(integer=True))
        name = "Layer"
    else:
        step = max(1, len(found.units) // 20)
        ticks = range(0, len(found.units), step)
        labels = [found.units[i].label.removesuffix("_out").replace("_", " ") for i in ticks]
        drawn.set_xticks(ticks, labels, rotation=90)
        drawn.set_yticks(ticks, labels)
        name = "Sublayer"
    return finish(drawn, x=name, y=name, title=title)


def draw_greedy(found: GreedyResult, ax: Axes | None = None) -> Axes:
    """Draw the headline score by the number of layers left out, one line for each order; a second mode is dashed."""
    drawn = axes(ax)
    looks = {GREEDY: ("mlp", "o"), INFLUENCE: ("attn", "s")}
    names = {GREEDY: "greedy", INFLUENCE: "least Block Influence first", f"{RANDOM} 1": "random orders"}
    for one in (found, found.other):
        for name, scores in one.scores.items() if one is not None else ():
            assert one is not None, "a mode that was run"
            score = scores.headline
            count = list(range(1, len(one.orders[name]) + 1))
            kind, marker = looks.get(name, ("norm", "."))
            drawn.plot(
                count,
                scores.mean(score),
                marker=marker,
                markersize=4,
                color=PALETTE[kind],
                linestyle="-" if one is found else "--",
                markerfacecolor=PALETTE[kind] if one is found else "white",
                label=names[name] + (f", {one.mode}" if found.other else "") if name in names else None,
            )
            if name in looks:
                low, high = scores.intervals(score)
                interval(drawn, count, low.tolist(), high.tolist(), PALETTE[kind])
    drawn.set_ylim(bottom=min(0.0, drawn.get_ylim()[0]))
    drawn.xaxis.set_major_locator(MaxNLocator(integer=True))
    if found.other is not None:
        _legend_beside(drawn)
    first = next(iter(found.scores.values()))
    return finish(drawn, x="Layers left out", y=SCORES[first.headline], title=found.title)


def draw_swaps(found: SwapResult, ax: Axes | None = None) -> Axes:
    """Draw the headline score by the first of the two layers that change places."""
    drawn = axes(ax)
    score = found.scores.headline
    mean = found.scores.mean(score)
    error = _error(mean, *found.scores.intervals(score))
    drawn.errorbar(range(len(mean)), mean, yerr=error, fmt="o", markersize=4, linewidth=1, color=PALETTE["block"])
    drawn.axhline(0.0, color=PALETTE["norm"], linewidth=0.8, zorder=0)
    spread_out(drawn, list(mean))
    drawn.xaxis.set_major_locator(MaxNLocator(integer=True))
    return finish(drawn, x="Layer l, exchanged with l + 1", y=SCORES[score], title=found.title)


def draw_effects(found: EffectsResult, ax: Axes | None = None) -> Axes:
    """Draw the total effect of each unit against its direct effect: on the diagonal nothing repairs, nothing adds."""
    drawn = axes(ax, width=4.6, height=4.2)
    direct, total = found.means["direct"], found.means["total"]
    across, up = (_error(found.means[name], *found.scores.intervals(name)) for name in ("direct", "total"))
    for kind in dict.fromkeys(d.kind for d in found.units):
        rows = [i for i, d in enumerate(found.units) if d.kind == kind]
        drawn.errorbar(
            direct[rows],
            total[rows],
            xerr=across[:, rows],
            yerr=up[:, rows],
            fmt="o",
            markersize=4,
            linewidth=0.8,
            color=PALETTE["block" if kind == "layer" else kind],
            label=NAMES.get(kind, kind),
        )
        for i in sorted(rows, key=lambda i: -np.hypot(direct[i], total[i]))[:3]:
            layer = found.units[i].layers[0]
            drawn.annotate(str(layer), (direct[i], total[i]), xytext=(4, 3), textcoords="offset points", fontsize=7)
    drawn.axline((0.0, 0.0), slope=1.0, color=PALETTE["norm"], linewidth=0.8, linestyle="--", label="total = direct")
    drawn.axhline(0.0, color=PALETTE["norm"], linewidth=0.5, zorder=0)
    return finish(drawn, x="Direct effect (logits)", y="Total effect (logits)", title=found.title)


def _bar(ax: Axes, image: QuadMesh, label: str) -> None:
    figure = ax.get_figure()
    assert figure is not None, "axes without a figure"
    bar = figure.colorbar(image, ax=ax, label=label)
    bar.outline.set_visible(False)
