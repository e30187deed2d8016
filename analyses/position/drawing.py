"""Figures of positional persistence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from streamlens.analyses.figures import PALETTE, axes, finish, interval, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from streamlens.analyses.position.door import PositionResult
    from streamlens.analyses.position.lesion import LesionResult
    from streamlens.analyses.position.probes import ProbeResult

NAMES = {
    "embed": "embedding, carried by the skip",
    "norm": "biases of the norms",
    "attn": "written by attention",
    "cross_attn": "written by cross-attention",
    "mlp": "written by MLPs",
    "mixer": "written by mixers",
}
"""What the kinds of terms are called in figures."""

SHARE = "Share of the energy\naround the mean"
STATE = "State (0: the embedding; then after each sublayer)"


def plot_share(found: PositionResult, ax: Axes | None = None) -> Axes:
    """Draw the positional share of each state and its null band."""
    with style():
        ax = axes(ax)
        x = np.arange(len(found.states))
        ax.axhline(0, color=PALETTE["norm"], linewidth=0.6)
        interval(ax, x, found.null_low, found.null_high, PALETTE["block"])  # type: ignore[arg-type]
        ax.plot([], [], color=PALETTE["block"], alpha=0.3, linewidth=6, label="without position (95 %)")
        if not found.include_first:
            # The vector of position 0 can make this so large that nothing else would be seen: then it leaves the axes.
            ax.plot(
                x,
                found.position_share_all,
                color=PALETTE["norm"],
                linewidth=0.9,
                linestyle="--",
                label=f"with position 0 (up to {found.position_share_all.max():.2g})",
            )
        ax.plot(x, found.position_share, color=PALETTE["attn"], marker="o", markersize=3, label="positional part")
        low, high = (
            min(found.null_low.min(), found.position_share.min(), 0),
            max(found.null_high.max(), found.position_share.max()),
        )
        ax.set_ylim(low - 0.1 * (high - low), high + 0.4 * (high - low))
        integer_ticks(ax)
        return finish(ax, x=STATE, y=SHARE, title=found.title)


def plot_origin(found: PositionResult, ax: Axes | None = None) -> Axes:
    """Stack the shares of the terms by kind, what adds above zero and what takes away below it."""
    with style():
        ax = axes(ax)
        x = np.arange(len(found.states))
        kinds = [kind for kind in dict.fromkeys(found.kinds) if np.any(found.share_of(kind))]
        shares = np.stack([found.share_of(kind) for kind in kinds])
        for sign in (1.0, -1.0):
            base = np.zeros(len(x))
            for kind, own in zip(kinds, shares, strict=True):
                height = np.where(own * sign > 0, own, 0.0)
                label = NAMES.get(kind, kind) if sign > 0 else None
                ax.bar(
                    x,
                    height,
                    bottom=base,
                    width=1.0,
                    color=PALETTE.get(kind, PALETTE["other"]),
                    label=label,
                    edgecolor="none",
                )
                base += height
        ax.axhline(0, color=PALETTE["block"], linewidth=0.6)
        ax.axhline(1, color=PALETTE["block"], linewidth=0.6, linestyle=":")
        ax.set_xlim(-0.5, len(x) - 0.5)
        integer_ticks(ax)
        finish(ax, x=STATE, y="Share of the positional part", title=found.title)
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return ax


def plot_path(found: PositionResult, ax: Axes | None = None, *, state: int = -1) -> Axes:
    """Draw the positional part of one state in its two strongest directions."""
    with style():
        ax = axes(ax, width=4.2, height=3.6)
        table = found.position_vectors[state].astype(np.float64)
        left, strength, _ = np.linalg.svd(table, full_matrices=False)
        points = left[:, :2] * strength[:2]
        start = 0 if found.include_first else 1
        position = np.arange(start, start + len(points))
        ax.plot(points[:, 0], points[:, 1], color=PALETTE["norm"], linewidth=0.6, zorder=1)
        dots = ax.scatter(points[:, 0], points[:, 1], c=position, cmap="viridis", s=12, zorder=2)
        figure = ax.get_figure()
        assert figure is not None, "axes without a figure"
        figure.colorbar(dots, ax=ax, label="Position (token)")
        share = strength[:2] ** 2 / (strength**2).sum()
        labels = [f"Direction {i + 1} ({part:.0%} of the positional energy)" for i, part in enumerate(share)]
        return finish(ax, x=labels[0], y=labels[1], title=f"Positional part of {found.states[state]}")


def plot_probes(found: ProbeResult, ax: Axes | None = None) -> Axes:
    """Draw R^2 of the ridge probe with its interval, and those of its controls."""
    with style():
        ax = axes(ax)
        x = found.state_index
        interval(ax, x, found.low, found.high, PALETTE["attn"])  # type: ignore[arg-type]
        controls = (
            (found.r_squared_control, PALETTE["mlp"], "s", "control: a random position for each kind of token"),
            (found.r_squared_shuffled, PALETTE["norm"], "^", "control: positions in random order"),
        )
        ax.plot(x, found.r_squared, color=PALETTE["attn"], marker="o", markersize=3, label="position (95 % interval)")
        for values, colour, marker, name in controls:
            if not np.isnan(values).all():
                ax.plot(x, values, color=colour, marker=marker, markersize=3, linewidth=0.9, label=name)
        ax.axhline(0, color=PALETTE["norm"], linewidth=0.6)
        lowest = np.nanmin([values.min() for values in (found.r_squared, *(c[0] for c in controls))])
        ax.set_ylim(max(min(lowest, 0.0) - 0.05, -1.0), 1.45)
        ax.set_yticks([t for t in np.arange(-1.0, 1.01, 0.25) if t >= ax.get_ylim()[0]])
        integer_ticks(ax)
        finish(ax, x=STATE, y="R² on held-out documents", title=found.title)
        ax.legend(loc="upper left")
        return ax


def plot_lesions(found: LesionResult, ax: Axes | None = None) -> Axes:
    """Draw the positional share by state, unchanged and after each removal, beside its control."""
    with style():
        ax = axes(ax)
        x = np.arange(len(found.states))
        ax.fill_between(x, 0, found.null_high, color=PALETTE["block"], alpha=0.2, linewidth=0)
        ax.plot(x, found.baseline, color=PALETTE["block"], marker="o", markersize=3, label="unchanged")
        looks = {"position": (PALETTE["mlp"], "-", "s"), "random": (PALETTE["attn"], "--", "^")}
        names = {"position": "position subspace removed from the skip", "random": "random subspace, same energy"}
        for number, lesion in enumerate(found.lesions):
            if lesion.mode in looks:
                colour, line, marker = looks[lesion.mode]
                label = names.pop(lesion.mode, None)
                shares = found.position_share[number]
                ax.plot(x, shares, color=colour, linestyle=line, marker=marker, markersize=3, label=label)
                ax.axvline(lesion.step + 0.5, color=PALETTE["norm"], linewidth=0.6, linestyle=":")
        ax.axhline(0, color=PALETTE["norm"], linewidth=0.6)
        integer_ticks(ax)
        ax.legend(frameon=True, facecolor="white", edgecolor="none", framealpha=1.0)  # over the dotted lines
        return finish(ax, x=STATE, y=SHARE, title=found.title)


def plot_scale(found: LesionResult, ax: Axes | None = None) -> Axes:
    """Draw the positional share of the last state against the factor on the skip."""
    with style():
        ax = axes(ax)
        ax.axhspan(0, found.null_high[-1], color=PALETTE["block"], alpha=0.2, linewidth=0)
        rows = [
            (x.label, x.alpha, found.position_share[i, -1]) for i, x in enumerate(found.lesions) if x.mode == "scale"
        ]
        colours = [PALETTE[kind] for kind in ("attn", "mlp", "mixer", "embed", "other", "cross_attn", "block")]
        for number, label in enumerate(dict.fromkeys(label for label, _, _ in rows)):
            points = sorted((alpha, share) for name, alpha, share in rows if name == label)
            colour = colours[number % len(colours)]
            ax.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, label=f"skip around {label}")
        ax.axhline(found.baseline[-1], color=PALETTE["norm"], linewidth=0.6, linestyle=":", label="unchanged")
        return finish(ax, x="Factor on the skip", y=f"{SHARE},\nlast state", title=found.title)


def integer_ticks(ax: Axes) -> None:
    """Number states and layers by integers only."""
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
