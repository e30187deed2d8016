"""Figures of positional persistence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from streamlens.analyses.figures import (
    DIVERGING,
    PALETTE,
    axes,
    colour_bar,
    finish,
    integer_ticks,
    interval,
    panels,
    style,
    wrapped,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from streamlens.analyses.position.answer import OriginResult, PositionResult
    from streamlens.analyses.position.damage import LesionResult
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
        interval(ax, x, found.low, found.high, PALETTE["attn"])  # type: ignore[arg-type]
        label = "positional part" if np.isnan(found.low).all() else "positional part (95 % interval)"
        ax.plot(x, found.position_share, color=PALETTE["attn"], marker="o", markersize=3, label=label)
        # With few documents intervals are so wide that nothing else would be seen: then they leave the axes.
        reach = 2 * np.abs(found.position_share).max()
        low = min(found.null_low.min(), found.position_share.min(), max(np.nanmin(found.low, initial=0), -reach), 0)
        high = max(found.null_high.max(), found.position_share.max(), min(np.nanmax(found.high, initial=0), reach))
        ax.set_ylim(low - 0.1 * (high - low), high + 0.4 * (high - low))
        ax.set_xlim(-0.5, len(x) - 0.5)
        integer_ticks(ax)
        return finish(ax, x=STATE, y=SHARE, title=found.title)


def plot_origin(found: PositionResult, ax: Axes | None = None) -> Axes:
    """Stack the shares of the terms by kind, what adds above zero and what takes away below it."""
    with style():
        ax = axes(ax)
        x = np.arange(len(found.states))
        above, below = np.zeros(len(x)), np.zeros(len(x))
        for kind in dict.fromkeys(found.kinds):
            # Term by term, or what one sublayer takes away would hide in what another of its kind adds.
            own = np.nan_to_num(found.origin[:, [i for i, k in enumerate(found.kinds) if k == kind]])
            if not own.any():
                continue
            look = {"color": PALETTE.get(kind, PALETTE["other"]), "width": 1.0, "edgecolor": "none"}
            added, taken = own.clip(min=0).sum(1), own.clip(max=0).sum(1)
            ax.bar(x, added, bottom=above, label=NAMES.get(kind, kind), **look)  # type: ignore[arg-type]
            ax.bar(x, taken, bottom=below, **look)  # type: ignore[arg-type]
            above, below = above + added, below + taken
        ax.axhline(0, color=PALETTE["block"], linewidth=0.6)
        ax.axhline(1, color=PALETTE["block"], linewidth=0.6, linestyle=":")
        ax.set_xlim(-0.5, len(x) - 0.5)
        integer_ticks(ax)
        unknown = np.flatnonzero(np.isnan(found.origin).all(axis=1))
        if 0 < len(unknown) < len(x):
            ax.bar(unknown, 1.0, width=1.0, color="#dcdcdc", edgecolor="none", label="within its null band: unknown")
        finish(ax, x=STATE, y="Share of the positional part", title=found.title)
        if len(unknown) == len(x):
            ax.text(0.5, 0.5, "every state is within its null band", ha="center", transform=ax.transAxes)
        else:
            ax.set_ylim(top=ax.get_ylim()[1] * 1.35)
            ax.legend(loc="upper left", ncols=2)
        return ax


def plot_origins(found: OriginResult, ax: Axes | None = None) -> Axes:
    """Draw the share of each term in the positional part of each state as a heat map around zero."""
    with style():
        ax = axes(ax, width=7.0, height=min(8.0, 1.6 + 0.16 * len(found.terms)))
        known = np.abs(found.share[~np.isnan(found.share)])
        limit = max(float(known.max(initial=0.0)), 0.1)
        edges = [np.arange(n + 1) - 0.5 for n in reversed(found.share.shape)]
        ax.set_facecolor("#e4e4e4")
        ax.grid(visible=False)
        image = ax.pcolormesh(
            edges[1], edges[0], np.ma.masked_invalid(found.share).T, cmap=DIVERGING, vmin=-limit, vmax=limit
        )
        colour_bar(ax, image, "Share of the positional part")
        step = -(-len(found.terms) // 40)
        ticks = range(0, len(found.terms), step)
        ax.set_yticks(ticks, [found.terms[i].removesuffix("_out").replace("_", " ") for i in ticks])
        ax.invert_yaxis()
        integer_ticks(ax)
        return finish(
            ax,
            x=f"{STATE}\nbelow 0: position is taken away; grey: not written yet, or within the null band",
            y="Term",
            title=found.title,
        )


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
        labels = [f"Direction {i + 1} ({100 * part:.0f} % of the positional energy)" for i, part in enumerate(share)]
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
            (found.r_squared_untrained, PALETTE["mixer"], "D", "control: before training"),
        )
        ax.plot(x, found.r_squared, color=PALETTE["attn"], marker="o", markersize=3, label="position (95 % interval)")
        for values, colour, marker, name in controls:
            if not np.isnan(values).all():
                ax.plot(x, values, color=colour, marker=marker, markersize=3, linewidth=0.9, label=name)
        ax.axhline(0, color=PALETTE["norm"], linewidth=0.6)
        lowest = np.nanmin([np.nanmin(values, initial=0.0) for values in (found.r_squared, *(c[0] for c in controls))])
        ax.set_ylim(max(min(lowest, 0.0) - 0.05, -1.0), 1.45)
        ax.set_yticks([t for t in np.arange(-1.0, 1.01, 0.25) if t >= ax.get_ylim()[0]])
        integer_ticks(ax)
        finish(ax, x=STATE, y="R² on held-out documents", title=found.title)
        ax.legend(loc="upper left")
        return ax


LEFT = "Positional energy over that\nof the unchanged model"
REMOVED = {
    "position": ("-", "s", "position subspace removed"),
    "random": ("--", "^", "random subspace, equal energy"),
}
_SKIPS = [PALETTE[kind] for kind in ("attn", "mlp", "mixer", "embed", "other", "cross_attn", "block")]


def draw_lesions(found: LesionResult) -> Axes:
    """Draw a panel for each damaged skip, and one below it where the skip is scaled, too."""
    steps = list(dict.fromkeys(x.step for x in found.lesions))
    modes = {x.mode for x in found.lesions}
    rows = [draw for draw, wanted in ((plot_lesions, "position"), (plot_scale, "scale")) if wanted in modes]
    drawn = panels(len(rows), len(steps), width=max(4.0, 2.4 * len(steps)), height=0.5 + 2.5 * len(rows))
    for row, draw in enumerate(rows):
        places = drawn[row * len(steps) : (row + 1) * len(steps)]
        for step, ax in zip(steps, places, strict=True):
            draw(found, ax, step=step)
            name = next(x.label for x in found.lesions if x.step == step).removesuffix("_out").replace("_", " ")
            ax.set_title(f"skip around {name}" if row == 0 else "", loc="left", fontsize=9)
        ends = [ax.get_ylim() for ax in places]
        for ax in places:
            ax.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))
        for ax in places[1:]:
            ax.set_ylabel("")
            if (legend := ax.get_legend()) is not None:
                legend.remove()
    figure = drawn[0].get_figure(root=True)
    assert figure is not None, "axes without a figure"
    figure.suptitle(wrapped(found.title, float(figure.get_figwidth())), fontsize=9, x=0.01, ha="left")
    return drawn[0]


def plot_lesions(found: LesionResult, ax: Axes | None = None, *, step: int | None = None) -> Axes:
    """Draw what is left of position in each state after each removal and after its control, with intervals.

    Args:
        found: the lesions.
        ax: where to draw.
        step: only the lesions of this skip; by default all, each in a colour of its own.
    """
    with style():
        ax = axes(ax)
        ax.axhline(1, color=PALETTE["block"], linewidth=0.6)
        top = 1.0
        steps = list(dict.fromkeys(x.step for x in found.lesions))
        for number, lesion in enumerate(found.lesions):
            if lesion.mode not in REMOVED or step not in (None, lesion.step):
                continue
            line, marker, name = REMOVED[lesion.mode]
            colour = PALETTE["mlp" if lesion.mode == "position" else "attn"]
            if step is None and len(steps) > 1:
                colour, name = _SKIPS[steps.index(lesion.step) % len(_SKIPS)], f"{name} at {lesion.label}"
            values, low, high = (each[number] for each in (found.left.value, found.left.low, found.left.high))
            x = np.arange(len(values))
            interval(ax, x, low, high, colour)  # type: ignore[arg-type]
            ax.plot(x, values, color=colour, linestyle=line, marker=marker, markersize=3, linewidth=1, label=name)
            most = float(np.nanmax(values, initial=1.0))
            top = max(top, most, min(float(np.nanmax(high, initial=0.0)), 2 * most))
            if lesion.mode == "position":
                ax.axvline(lesion.step + 0.5, ymax=0.7, color=PALETTE["norm"], linewidth=0.6, linestyle=":")
        ax.set_ylim(-0.05 * top, 1.4 * top)
        ax.set_xlim(-0.5, len(found.states) - 0.5)
        integer_ticks(ax)
        finish(ax, x="State" if step is not None else STATE, y=LEFT, title=found.title)
        ax.legend(loc="upper left", fontsize=7)
        return ax


def plot_scale(found: LesionResult, ax: Axes | None = None, *, step: int | None = None) -> Axes:
    """Draw what is left of position in the last state against the factor on the skip, with intervals.

    Args:
        found: the lesions.
        ax: where to draw.
        step: only the lesions of this skip; by default all, each in a colour of its own.
    """
    with style():
        ax = axes(ax)
        rows = [i for i, x in enumerate(found.lesions) if x.mode == "scale" and step in (None, x.step)]
        ax.axhline(1, color=PALETTE["block"], linewidth=0.6)
        for number, label in enumerate(dict.fromkeys(found.lesions[i].label for i in rows)):
            own = sorted((i for i in rows if found.lesions[i].label == label), key=lambda i: found.lesions[i].alpha)
            alphas = [found.lesions[i].alpha for i in own]
            colour = _SKIPS[number % len(_SKIPS)] if step is None else PALETTE["mixer"]
            interval(ax, alphas, found.left.low[own, -1], found.left.high[own, -1], colour)  # type: ignore[arg-type]
            name = f"skip around {label}" if step is None else "last state"
            ax.plot(alphas, found.left.value[own, -1], color=colour, marker="o", markersize=3, label=name)
        ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
        return finish(ax, x="Factor on the skip", y=f"{LEFT},\nlast state", title=found.title)
