"""Which writes point the same way, and which cancel each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from streamlens.analyses.figures import DIVERGING, axes, colour_bar, finish, style
from streamlens.analyses.result import Result
from streamlens.analyses.statistics import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TICKS = 30


@dataclass(frozen=True)
class WriteCosinesResult(Result):
    """The cosine of every two writes at the same token, on average over a sample without position 0."""

    title: str
    labels: tuple[str, ...]
    """(sublayer,)"""
    matrix: Floats
    """(sublayer, sublayer) mean cosine."""
    tokens: int
    """In the sample."""

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each pair."""
        return [
            {"label": label, "other": self.labels[j], "cosine": float(self.matrix[i, j])}
            for i, label in enumerate(self.labels)
            for j in range(i + 1, len(self.labels))
        ]

    def short_rows(self) -> list[dict[str, Any]]:
        """Return for each write the other that opposes it most, and the one that is most like it."""
        rows = []
        for i, label in enumerate(self.labels):
            others = np.where(np.arange(len(self.labels)) == i, np.nan, self.matrix[i])
            row: dict[str, Any] = {"label": label}
            if np.isfinite(others).any():
                low, high = int(np.nanargmin(others)), int(np.nanargmax(others))
                row |= {"lowest": float(others[low]), "with": self.labels[low]}
                row |= {"highest": float(others[high]), "and with": self.labels[high]}
            rows.append(row)
        return rows

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the cosine of every two writes; the diagonal, which is 1, is left empty."""
        with style():
            ax = axes(ax, width=5.6, height=4.8)
            count = len(self.labels)
            drawn = np.where(np.eye(count, dtype=bool), np.nan, self.matrix)
            limit = float(np.nanmax(np.abs(drawn), initial=1e-3, where=np.isfinite(drawn)))
            image = ax.imshow(drawn, cmap=DIVERGING, vmin=-limit, vmax=limit, interpolation="nearest")
            every = range(0, count, -(-count // _TICKS))
            names = [self.labels[i].replace("_out", "") for i in every]
            ax.set_xticks(list(every), names, rotation=90)
            ax.set_yticks(list(every), names)
            ax.tick_params(length=0)
            colour_bar(ax, image, "Mean cosine of two writes")
            finish(ax, x="Write", y="Write", title=self.title)
            ax.tick_params(labelsize=6)
            return ax
