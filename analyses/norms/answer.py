"""The result of contribution norms: table and figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streamlens.analyses.figures import KIND_NAMES, PALETTE, axes, finish, integer_ticks, interval, panels, style
from streamlens.analyses.norms.cosines import WriteCosinesResult
from streamlens.analyses.norms.measures import MEASURES, OVERLAPPING, SUBLAYER_KINDS, Contribution
from streamlens.analyses.norms.states import StateNormsResult
from streamlens.analyses.result import Result
from streamlens.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHORT = (
    "label", "relative_write", "cosine", "block_influence", "projection_share", "logit_attribution",
    "final_frame_norm", "proximity",
)  # fmt: skip

_ONE_OF = ("logit_attribution", "final_frame_norm", "proximity")
"""Of these the page has room for the first that there is."""

_OF_WRITES = ("projection_share", "proximity")
"""What whole layers do not have."""


@dataclass(frozen=True)
class NormsResult(Result):
    """Contribution norms; the axis ``row`` runs over `contributions`, ``measure`` over `MEASURES`."""

    title: str
    contributions: tuple[Contribution, ...]
    mean: NDArray[np.float64]
    """(row, measure) mean over tokens, without position 0; NaN where a measure has no meaning for a row."""
    mean_with_first: NDArray[np.float64]
    """(row, measure) the same over all tokens."""
    lower_quartile: NDArray[np.float64]
    """(row, measure) first quartile over tokens, without position 0."""
    median: NDArray[np.float64]
    """(row, measure) median."""
    upper_quartile: NDArray[np.float64]
    """(row, measure) third quartile."""
    ratio_of_means: NDArray[np.float64]
    """(row,) mean |w| / mean |x|: other than the mean of the ratios where tokens differ in size."""
    states: StateNormsResult
    """The size of the states, what the skips keep of them, and who stands out."""
    cosines: WriteCosinesResult
    """The cosine of every two writes: who cancels whom."""
    n_tokens: int

    @property
    def identity_gain(self) -> float:
        """What the skips alone keep of the size of x_0, up to the last state; see `StateNormsResult`."""
        return float(self.states.identity_gain[-1])

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
                row[f"{measure}_lower_quartile"] = _number(self.lower_quartile[index, place])
                row[f"{measure}_upper_quartile"] = _number(self.upper_quartile[index, place])
                row[f"{measure}_with_first"] = _number(self.mean_with_first[index, place])
            row["ratio_of_means"] = _number(self.ratio_of_means[index])
            found.append(row)
        return found

    def short_rows(self, *, layers_only: bool = False) -> list[dict[str, Any]]:
        """Return the columns that fit a page; those that say nothing of this model are left out.

        Args:
            layers_only: the rows of whole layers alone, and the columns that these have.
        """
        own_frame = bool((self.states.forgetting_factor[1:] != 1).any())
        last = "logit_attribution" if self.attributed else "final_frame_norm" if own_frame else "proximity"
        left_out = {name for name in _ONE_OF if name != last} | (set(_OF_WRITES) if layers_only else set())
        return [
            {key: row[key] for key in _SHORT if key not in left_out}
            for row in self.rows()
            if not layers_only or row["kind"] == "layer"
        ]

    @property
    def attributed(self) -> bool:
        """Whether the target's logit was attributed."""
        return not np.isnan(self.column("logit_attribution")).all()

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the relative write of every sublayer by layer and, where logits were attributed, those below.

        Args:
            ax: draw the relative writes alone, there.
        """
        if ax is not None or not self.attributed:
            return self.plot_writes(ax)
        upper, lower = panels(2, 1, width=6.0, height=5.6)
        self.plot_writes(upper)
        self.plot_logits(lower).set_title("", loc="left")
        return upper

    def plot_writes(self, ax: Axes | None = None) -> Axes:
        """Draw the relative write of every sublayer by layer: median and quartiles over tokens, without position 0."""
        with style():
            ax = self._by_layer("relative_write", axes(ax))
            ax.set_yscale("log")
            return finish(ax, x="Layer", y="Relative write |w| / |x|\n(median, quartiles)", title=self.title)

    def plot_logits(self, ax: Axes | None = None) -> Axes:
        """Draw what every sublayer adds to the target's logit, by layer: median and quartiles, without position 0.

        Raises:
            UsageError: no logits were attributed.
        """
        if not self.attributed:
            raise UsageError("no logits were attributed: call contribution_norms with logits=True")
        with style():
            ax = axes(ax)
            ax.axhline(0, color=PALETTE["norm"], linewidth=0.6)
            drawn = self._by_layer("logit_attribution", ax)
            title = self.title.replace("Contribution norms", "Direct logit attribution", 1)
            return finish(drawn, x="Layer", y="Added to the target's logit\n(logits; median, quartiles)", title=title)

    def _by_layer(self, measure: str, ax: Axes) -> Axes:
        place = MEASURES.index(measure)
        for kind in dict.fromkeys(c.kind for c in self.contributions if c.kind in SUBLAYER_KINDS):
            rows = [i for i, c in enumerate(self.contributions) if c.kind == kind]
            layers = [float(self.contributions[i].layer or 0) for i in rows]
            median, colour = self.median[rows, place], PALETTE[kind]
            ax.plot(layers, median, "o-", markersize=3, color=colour, label=KIND_NAMES[kind])
            lower, upper = (list(q[rows, place]) for q in (self.lower_quartile, self.upper_quartile))
            interval(ax, layers, lower, upper, colour)
        integer_ticks(ax)
        return ax

    def plot_shares(self, ax: Axes | None = None) -> Axes:
        """Draw each contribution's share of the last state, in the order of the stream; the bars sum to 1."""
        shares = self.column("projection_share")
        kept = [i for i, c in enumerate(self.contributions) if c.kind not in OVERLAPPING]
        kinds = [self.contributions[i].kind for i in kept]
        with style():
            ax = axes(ax, width=7.0)
            for kind in dict.fromkeys(kinds):
                at = [n for n, own in enumerate(kinds) if own == kind]
                bars = shares[[kept[n] for n in at]]
                ax.bar(at, bars, color=PALETTE[kind], width=0.8, label=KIND_NAMES[kind])
            ax.axhline(0, color="black", linewidth=0.6)
            every = range(0, len(kept), max(1, -(-len(kept) // 24)))
            labels = [self.contributions[kept[i]].label.replace("_out", "") for i in every]
            ax.set_xticks(list(every), labels, rotation=60, ha="right", rotation_mode="anchor")
            title = self.title.replace("Contribution norms", "Shares of the last state", 1)
            return finish(ax, x="Part of the last state", y="Projection share (sums to 1)", title=title)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
