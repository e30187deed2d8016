"""What is found about the flow of the gradient: the table and the figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from streamlens.analyses.gradient.graph import Objective
from streamlens.analyses.result import Result
from streamlens.analyses.statistics import DocumentSums, Floats
from streamlens.anatomy import Kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OBJECTIVES: dict[Objective, str] = {
    "cross_entropy": "mean cross-entropy of the targets (nats)",
    "pooled_norm": "half the squared norm of the pooled last state",
}
"""What each objective is, in words."""


def interval_mean(values: Floats, doc: NDArray[np.int64]) -> Floats:
    """Return the mean over sequences with its 95 % interval over documents, (*series, 3): mean, low, high.

    Documents are resampled whole, because the windows of one depend on each other; a single one has no interval.

    Args:
        values: (sequence, *series); what is not finite leaves that sequence out of that series.
        doc: (sequence,) number of the document that each comes from.

    >>> interval_mean(np.array([[1.0, 5.0], [3.0, np.nan]]), np.array([0, 0])).tolist()
    [[2.0, nan, nan], [5.0, nan, nan]]
    """
    sums = DocumentSums(*values.shape[1:])
    one_each = torch.from_numpy(np.moveaxis(np.where(np.isfinite(values), values, np.nan), 0, -1))
    sums.add(one_each, torch.from_numpy(doc))
    return np.stack([sums.mean, *sums.intervals()], axis=-1)


@dataclass(frozen=True)
class Flow:
    """Means over sequences; the last axis of each array is (mean, low, high), with the 95 % interval over documents.

    The gradient of a sequence at a state is taken as one vector over its tokens.
    """

    gradient_norm: Floats
    """(state, 3) norm of g_s, in units of the objective per unit of the stream."""
    relative_norm: Floats
    """(state, 3) ||g_s|| / ||g_K||, K the last state."""
    identity_gain: Floats
    """(state, 3) the same for the gradient that enters no branch at all: 1 everywhere in a plain pre-norm model."""
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
        """Return one row for each sublayer; `low` and `high` bound its branch share, `_all` includes position 0."""
        return [self._row(index, step) for index, step in enumerate(self.steps)]

    def _row(self, index: int, step: int) -> dict[str, Any]:
        flow, whole = self.flow, self.flow_all
        share = flow.branch_share[index]
        return {
            "layer": self.layers[index],
            "kind": self.kinds[index],
            "label": self.labels[index],
            "step": step,
            "skip_share": float(flow.skip_share[step, 0]),
            "branch_share": float(share[0]),
            "low": float(share[1]),
            "high": float(share[2]),
            "branch_to_skip": float(flow.branch_to_skip[index, 0]),
            "cosine": float(flow.cosine[index, 0]),
            "gradient_norm": float(flow.gradient_norm[step, 0]),
            "relative_norm": float(flow.relative_norm[step, 0]),
            "norm_gain": float(flow.norm_gain[step, 0]),
            "identity_gain": float(flow.identity_gain[step, 0]),
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
        if self.has_norms:
            places = panels(3, 1, width=6.5, height=7.2)
            self.plot_norm_gain(places[2])
        else:
            places = panels(2, 1, width=6.5, height=5.2)
        self.plot_shares(places[1])
        return self.plot_norms(places[0])

    @property
    def has_norms(self) -> bool:
        """Whether the stream itself passes norms."""
        return bool(np.any(np.abs(self.flow.norm_gain[:, 0] - 1) > 1e-6))

    def plot_norms(self, ax: Axes | None = None) -> Axes:
        """Draw the norm of the gradient by depth, of all of it and of what never entered a branch."""
        from streamlens.analyses.figures import PALETTE, axes, finish, interval

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
        whole_numbers(ax)
        return finish(ax, x="state (0: embedding)", y="gradient norm\n/ that at the last state", title=self.title)

    def plot_shares(self, ax: Axes | None = None) -> Axes:
        """Draw the shares of skip and branches at each step, stacked; those below zero point down."""
        from streamlens.analyses.figures import PALETTE, axes, finish, style

        ax = axes(ax)
        steps = np.arange(len(self.flow.skip_share))
        skip = self.flow.skip_share[:, 0]
        ax.bar(steps, skip, width=0.85, color="#c8c8c8", label="skip")
        above, below = np.maximum(skip, 0), np.minimum(skip, 0)
        for kind in dict.fromkeys(self.kinds):
            height = np.zeros(len(steps))
            for index, step in enumerate(self.steps):
                if self.kinds[index] == kind:
                    height[step] += self.flow.branch_share[index, 0]
            ax.bar(
                steps, height, width=0.85, bottom=np.where(height < 0, below, above), color=PALETTE[kind], label=kind
            )
            above, below = above + np.maximum(height, 0), below + np.minimum(height, 0)
        ax.axhline(1, color="black", linewidth=0.6)
        ax.axhline(0, color="black", linewidth=0.6)
        with style():
            ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        ax.set_ylim(min(0.0, 1.2 * below.min()), 1.08 * above.max())
        whole_numbers(ax)
        return finish(ax, x="step (sublayer)", y="share of the gradient")

    def plot_norm_gain(self, ax: Axes | None = None) -> Axes:
        """Draw what the norm after each addition does to the length of the gradient."""
        from streamlens.analyses.figures import PALETTE, axes, finish, interval

        ax = axes(ax)
        mean, low, high = self.flow.norm_gain.T
        ax.plot(range(len(mean)), mean, color=PALETTE["norm"], marker=".")
        interval(ax, range(len(mean)), low, high, PALETTE["norm"])
        ax.axhline(1, color="black", linewidth=0.6, linestyle=":")
        whole_numbers(ax)
        return finish(ax, x="step (sublayer)", y="gain of the norm\non the gradient")


def whole_numbers(ax: Axes) -> None:
    """Put ticks of the horizontal axis at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _logarithmic(ax: Axes) -> None:
    """Give the vertical axis a logarithmic scale over at least one decade, so that small changes look small."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    if high / low < 10:
        middle = (low * high) ** 0.5
        ax.set_ylim(middle / 10**0.5, middle * 10**0.5)
