"""What is found about the flow of the gradient: the table and the figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from streamlens.analyses.gradient.graph import Objective
from streamlens.analyses.result import Result
from streamlens.analyses.statistics import Floats, Unit
from streamlens.anatomy import Kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OBJECTIVES: dict[Objective, str] = {
    "cross_entropy": "mean cross-entropy of the targets (nats)",
    "pooled_norm": "half the squared norm of the pooled last state",
}
"""What each objective is, in words."""


@dataclass(frozen=True)
class Flow:
    """Means over sequences; the last axis of each array is (mean, low, high), with the 95 % interval.

    The gradient of a sequence at a state is taken as one vector over its tokens.
    """

    gradient_norm: Floats
    """(state, 3) norm of g_s, in units of the objective per unit of the stream."""
    relative_norm: Floats
    """(state, 3) ||g_s|| / ||g_K||, K the last state."""
    identity_gain: Floats
    """(state, 3) the same for the gradient that enters no branch at all: 1 everywhere in a plain pre-norm model.

    Of a sequence it is the root of a ratio of energies, each summed over its tokens, like all norms here."""
    skip_share: Floats
    """(step, 3) <skip, g_s> / ||g_s||^2; with the shares of the step's branches it sums to 1."""
    norm_gain: Floats
    """(step, 3) ||J_P^T g_{s+1}|| / ||g_{s+1}||: what the norm after the addition does; 1 where there is none."""
    branch_share: Floats
    """(sublayer, 3) <branch, g_s> / ||g_s||^2."""
    branch_to_skip: Floats
    """(sublayer, 3) ||branch|| / ||skip||."""
    cosine: Floats
    """(sublayer, 3) cosine between branch and skip."""


@dataclass(frozen=True, kw_only=True)
class GradientResult(Result):
    """How the gradient came back to each state. Index s of a step is that of the state which its branches read."""

    title: str
    objective: Objective
    """Which scalar was differentiated."""
    loss: Floats
    """(3,) its mean over sequences, with the interval."""
    sequences: int
    """How many windows (or documents kept whole) had a gradient."""
    documents: int
    """How many documents they come from."""
    unit: Unit
    """What the intervals are over: documents, or windows where these are few."""
    labels: tuple[str, ...]
    """(sublayer,)"""
    kinds: tuple[Kind, ...]
    """(sublayer,)"""
    layers: tuple[int, ...]
    """(sublayer,)"""
    steps: tuple[int, ...]
    """(sublayer,) the step to which each sublayer belongs: parallel ones share it, and its skip."""
    flow: Flow
    """Position 0 left out: it often draws most of the attention."""
    flow_all: Flow
    """All positions."""
    closure: float
    """Largest ||g_s - skip - branches|| / ||g_s|| over steps and sequences: rounding, where the split is right."""

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each sublayer.

        `low` and `high` bound its branch share, `<column>_low` and `<column>_high` that column (95 %); `_all` includes
        position 0. What belongs to a step or its state is the same in the rows of parallel sublayers.
        """
        return [self._row(index, step) for index, step in enumerate(self.steps)]

    def _row(self, index: int, step: int) -> dict[str, Any]:
        flow, whole = self.flow, self.flow_all
        row = {
            "layer": self.layers[index],
            "kind": self.kinds[index],
            "label": self.labels[index],
            "step": step,
            **_bounded("skip_share", flow.skip_share[step]),
            "branch_share": float(flow.branch_share[index, 0]),
            "low": float(flow.branch_share[index, 1]),
            "high": float(flow.branch_share[index, 2]),
            **_bounded("branch_to_skip", flow.branch_to_skip[index]),
            **_bounded("cosine", flow.cosine[index]),
        }
        for name in ("gradient_norm", "relative_norm", "norm_gain", "identity_gain"):
            row |= _bounded(name, getattr(flow, name)[step])
        return {
            **row,
            "skip_share_all": float(whole.skip_share[step, 0]),
            "branch_share_all": float(whole.branch_share[index, 0]),
            "relative_norm_all": float(whole.relative_norm[step, 0]),
        }

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the gradient's norm by depth and, in a figure of their own, the shares and the gain of the norms too.

        Args:
            ax: draw the norm by depth alone, there.
        """
        from streamlens.analyses.figures import panels

        if ax is not None:
            return self.plot_norms(ax)
        drawn = [self.plot_norms, self.plot_shares, *([self.plot_norm_gain] if self.has_norms else [])]
        places = panels(len(drawn), 1, width=6.5, height=2.4 * len(drawn) + 0.3)
        for draw, place in zip(drawn, places, strict=True):
            draw(place)
            place.set_xlim(-0.5, len(self.flow.relative_norm) - 0.5)  # one axis for all: a step between two states
            if place is not places[-1]:
                place.set_xlabel("")
        return places[0]

    @property
    def has_norms(self) -> bool:
        """Whether the stream itself passes norms."""
        return bool(np.any(np.abs(self.flow.norm_gain[:, 0] - 1) > 1e-6))

    def plot_norms(self, ax: Axes | None = None) -> Axes:
        """Draw the norm of the gradient by depth, of all of it and of what never entered a branch."""
        from streamlens.analyses.figures import PALETTE, axes, finish, integer_ticks, interval

        ax = axes(ax)
        states = range(len(self.flow.relative_norm))
        for values, label, colour, line in (
            (self.flow.relative_norm, "all paths", PALETTE["block"], "-"),
            (self.flow.identity_gain, "skips only", PALETTE["other"], "--"),
        ):
            mean, low, high = values.T
            ax.plot(states, mean, line, color=colour, label=label, marker=".", markersize=4)
            interval(ax, states, low, high, colour)
        _logarithmic(ax)
        integer_ticks(ax)
        return finish(ax, x="State (0: embedding)", y="Gradient norm\n/ that at the last state", title=self.title)

    def plot_shares(self, ax: Axes | None = None) -> Axes:
        """Draw the shares of skip and branches at each step, stacked; those below zero point down.

        A step stands between the two states that it joins. Each bar has the interval of its own length at its end.
        """
        from streamlens.analyses.figures import KIND_NAMES, PALETTE, axes, finish, integer_ticks

        ax = axes(ax)
        count = len(self.flow.skip_share)
        above, below = np.zeros(count), np.zeros(count)
        bars = [(step, self.flow.skip_share[step], "#c8c8c8", "skip") for step in range(count)]
        for index, step in enumerate(self.steps):
            kind = self.kinds[index]
            bars.append((step, self.flow.branch_share[index], PALETTE[kind], KIND_NAMES[kind]))
        named: set[str] = set()
        for place, (step, (mean, low, high), colour, name) in enumerate(bars):
            bottom = below if mean < 0 else above
            label = None if name in named else name
            ax.bar(step + 0.5, mean, width=0.85, bottom=bottom[step], color=colour, label=label)
            bottom[step] += mean
            aside = step + (0.4 if place < count else 0.6)  # the ends of skip and branch may coincide
            whiskers(ax, [aside], [bottom[step]], [mean - low], [high - mean])
            named.add(name)
        ax.axhline(1, color="black", linewidth=0.6)
        ax.axhline(0, color="black", linewidth=0.6)
        ax.set_ylim(min(0.0, 1.2 * below.min()), 1.08 * above.max())
        integer_ticks(ax)
        _legend_above(ax)
        return finish(ax, x=_STEPS, y="Share of the gradient")

    def plot_norm_gain(self, ax: Axes | None = None) -> Axes:
        """Draw what the norm after each addition does to the length of the gradient."""
        from streamlens.analyses.figures import PALETTE, axes, finish, integer_ticks, interval

        ax = axes(ax)
        mean, low, high = self.flow.norm_gain.T
        steps = np.arange(len(mean)) + 0.5
        ax.plot(steps, mean, color=PALETTE["norm"], marker=".")
        interval(ax, list(steps), low, high, PALETTE["norm"])
        ax.axhline(1, color="black", linewidth=0.6, linestyle=":")
        integer_ticks(ax)
        return finish(ax, x=_STEPS, y="Gain of the norm\non the gradient")


_STEPS = "State (0: embedding); each sublayer between those that it joins"


def _bounded(name: str, values: Floats) -> dict[str, float]:
    return {key: float(value) for key, value in zip((name, f"{name}_low", f"{name}_high"), values, strict=True)}


def whiskers(ax: Axes, x: ArrayLike, ends: ArrayLike, down: ArrayLike, up: ArrayLike) -> None:
    """Draw intervals at the ends of bars; the arguments are (bar,), distances from the end in both directions."""
    distances = np.maximum(np.stack([np.asarray(down), np.asarray(up)]), 0)  # rounding may have turned a sign
    ax.errorbar(x, ends, distances, fmt="none", ecolor="black", elinewidth=0.7, capsize=1.5, capthick=0.7)


def _legend_above(ax: Axes) -> None:
    """Put the legend in a line above the axes, where it covers nothing and takes no width away."""
    from streamlens.analyses.figures import style

    with style():
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=6, borderaxespad=0.2, handlelength=1.2)


def _logarithmic(ax: Axes) -> None:
    """Give the vertical axis a logarithmic scale over at least one decade, so that small changes look small."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    if high / low < 10:
        middle = (low * high) ** 0.5
        ax.set_ylim(middle / 10**0.5, middle * 10**0.5)
