"""The result of contribution norms: table and figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streamlens.analyses.figures import PALETTE, axes, finish, interval
from streamlens.analyses.norms.measures import MEASURES, OVERLAPPING, SUBLAYER_KINDS, Contribution
from streamlens.analyses.result import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class NormsResult(Result):
    """Contribution norms; the axis ``row`` runs over `contributions`, ``measure`` over `MEASURES`."""

    title: str
    contributions: tuple[Contribution, ...]
    mean: NDArray[np.float64]
    """(row, measure) mean over tokens, without position 0; NaN where a measure has no meaning for a row."""
    mean_with_first: NDArray[np.float64]
    """(row, measure) the same over all tokens."""
    low: NDArray[np.float64]
    """(row, measure) first quartile over tokens, without position 0."""
    median: NDArray[np.float64]
    """(row, measure) median."""
    high: NDArray[np.float64]
    """(row, measure) third quartile."""
    state_norm: NDArray[np.float64]
    """(state,) mean of |x_k|, without position 0."""
    ratio_of_means: NDArray[np.float64]
    """(row,) mean |w| / mean |x|: other than the mean of the ratios where tokens differ in size."""
    identity_gain: float
    """Mean product of |A x| / |x| over all norms that the stream passes: what is left of x_0's size on the way."""
    labels: tuple[str, ...]
    """(sublayer,)"""
    cosines: NDArray[np.float64]
    """(sublayer, sublayer) mean cosine of two writes at the same token, over a sample: who cancels whom."""
    outlier_dimensions: tuple[tuple[int, ...], ...]
    """(state,) dimensions whose root mean square is above ten times the median dimension's."""
    n_tokens: int

    def column(self, measure: str) -> NDArray[np.float64]:
        """Return (row,) means of one measure, without position 0."""
        return self.mean[:, MEASURES.index(measure)]

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each contribution."""
        found = []
        for index, what in enumerate(self.contributions):
            row: dict[str, Any] = {"label": what.label, "kind": what.kind, "layer": what.layer}
            for place, measure in enumerate(MEASURES):
                row[measure] = _number(self.mean[index, place])
                row[f"{measure}_median"] = _number(self.median[index, place])
                row[f"{measure}_low"] = _number(self.low[index, place])
                row[f"{measure}_high"] = _number(self.high[index, place])
                row[f"{measure}_with_first"] = _number(self.mean_with_first[index, place])
            row["ratio_of_means"] = _number(self.ratio_of_means[index])
            found.append(row)
        return found

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the relative write of every sublayer by layer: median and quartiles over tokens."""
        ax, place = axes(ax), MEASURES.index("relative_write")
        for kind in dict.fromkeys(c.kind for c in self.contributions if c.kind in SUBLAYER_KINDS):
            rows = [i for i, c in enumerate(self.contributions) if c.kind == kind]
            layers = [float(self.contributions[i].layer or 0) for i in rows]
            ax.plot(layers, self.median[rows, place], "o-", markersize=3, color=PALETTE[kind], label=kind)
            interval(ax, layers, list(self.low[rows, place]), list(self.high[rows, place]), PALETTE[kind])
        ax.set_yscale("log")
        return finish(ax, x="layer", y="relative write |w| / |x|", title=self.title)

    def plot_shares(self, ax: Axes | None = None) -> Axes:
        """Draw each contribution's share of the last state, in the order of the stream; the bars sum to 1."""
        ax = axes(ax, width=7.0)
        shares = self.column("projection_share")
        kept = [i for i, c in enumerate(self.contributions) if c.kind not in OVERLAPPING]
        colours = [PALETTE[self.contributions[i].kind] for i in kept]
        ax.bar(range(len(kept)), shares[kept], color=colours, width=0.8)
        ax.axhline(0, color="black", linewidth=0.6)
        step = max(1, len(kept) // 16)
        ax.set_xticks(range(0, len(kept), step))
        ax.set_xticklabels(
            [self.contributions[kept[i]].label for i in range(0, len(kept), step)], rotation=60, ha="right"
        )
        return finish(ax, x="", y="share of the last state", title=self.title)

    def plot_cosines(self, ax: Axes | None = None) -> Axes:
        """Draw the cosine of every two writes."""
        import seaborn as sns

        from streamlens.analyses.figures import DIVERGING

        ax = axes(ax, width=5.6, height=4.8)
        step = max(1, len(self.labels) // 12)
        ticks = [label if i % step == 0 else "" for i, label in enumerate(self.labels)]
        limit = float(np.abs(self.cosines - np.eye(len(self.labels))).max()) or 1.0
        sns.heatmap(
            self.cosines, ax=ax, cmap=DIVERGING, center=0, vmin=-limit, vmax=limit, square=True, xticklabels=ticks,
            yticklabels=ticks, cbar_kws={"label": "mean cosine of two writes"},
        )  # fmt: skip
        ax.tick_params(length=0)
        return finish(ax, x="", y="", title=self.title)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
