"""What a comparison finds: tables and figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from streamlens.analyses.compare.folding import COMPARED, Differences
from streamlens.analyses.figures import (
    KIND_NAMES,
    PALETTE,
    axes,
    finish,
    integer_ticks,
    interval,
    literal,
    spread_out,
    style,
)
from streamlens.analyses.norms.measures import SUBLAYER_KINDS, Contribution
from streamlens.analyses.result import Result
from streamlens.analyses.statistics import Floats, Unit
from streamlens.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WORDS: Mapping[str, str] = {
    "relative_write": "relative write |w| / |x|",
    "cosine": "cosine of write and read",
    "growth": "growth |y|² / |x|²",
    "block_influence": "block influence 1 - cos(x, y)",
    "proximity": "proximity (share by L1 distance)",
    "projection_share": "share of the last state",
    "write_norm": "|w|",
    "read_norm": "|x|",
    "final_frame_norm": "|w| in the last state",
}
"""What measures are called on axes."""


@dataclass(frozen=True)
class Similarity(Result):
    """How alike the states of two models are as wholes, whatever their coordinates."""

    title: str
    states: tuple[tuple[int, int], ...]
    """(layer + 1,) which state of the first beside which of the second: before each layer, and the last."""
    labels: tuple[tuple[str, str], ...]
    """(layer + 1,) their names."""
    cka: Floats
    """(layer + 1,) debiased linear CKA over the sampled tokens, none at position 0: 1 for equal up to rotation, shift
    and scale; around 0 for unrelated."""
    tokens: int
    """Sampled."""

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each pair of states."""
        return [
            {"state": i, "other_state": j, "label": label, "other_label": other, "cka": float(value)}
            for (i, j), (label, other), value in zip(self.states, self.labels, self.cka, strict=True)
        ]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw CKA along depth."""
        with style():
            ax = axes(ax)
            ax.plot(range(len(self.cka)), self.cka, "o-", markersize=3, color=PALETTE["block"])
            ax.set_ylim(min(0.0, float(np.nanmin(self.cka))) - 0.02, 1.02)
            integer_ticks(ax)
            return finish(
                ax, x="State before layer", y=f"Debiased linear CKA\n({self.tokens} tokens)", title=self.title
            )


@dataclass(frozen=True)
class MovedResult(Result):
    """How far states and writes of one model lie from those of another, token by token; see `Moved`."""

    title: str
    labels: tuple[str, ...]
    """(row,) the states and then the writes."""
    kinds: tuple[str, ...]
    """(row,) state, or the kind of the sublayer."""
    at: tuple[int, ...]
    """(row,) the state that the row is, or that the sublayer reads."""
    mean: Floats
    """(row, 2) |v - u| / |u| and the cosine of u and v; means over tokens without position 0."""
    low: Floats
    high: Floats
    """(row, 2) ends of the 95 % interval."""
    unit: Unit
    """What intervals are over."""

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each state and each write."""
        return [
            {"label": label, "kind": kind}
            | {
                f"{name}{end}": float(values[i, column])
                for column, name in enumerate(("distance", "cosine"))
                for end, values in (("", self.mean), ("_low", self.low), ("_high", self.high))
            }
            for i, (label, kind) in enumerate(zip(self.labels, self.kinds, strict=True))
        ]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the cosine of the states, and of the writes, of the two models along the stream."""
        with style():
            ax = axes(ax)
            for kind in dict.fromkeys(self.kinds):
                rows = [i for i, own in enumerate(self.kinds) if own == kind]
                colour = PALETTE["block" if kind == "state" else kind]
                x = [float(self.at[i]) for i in rows]
                name = "state" if kind == "state" else f"write of {KIND_NAMES[kind]}"
                ax.plot(x, self.mean[rows, 1], "o-", markersize=3, color=colour, label=name)
                interval(ax, x, list(self.low[rows, 1]), list(self.high[rows, 1]), colour)
            ax.axhline(0, color="black", linewidth=0.6)
            integer_ticks(ax)
            return finish(
                ax,
                x="State, and the state that a sublayer reads",
                y=f"Cosine with the other model's\n(95 % interval over {self.unit}s)",
                title=self.title,
            )


@dataclass(frozen=True)
class Comparison(Result):
    """Two captures side by side; the axis ``row`` runs over `pairs`, ``measure`` over `COMPARED`."""

    title: str
    names: tuple[str, str]
    """The captures."""
    measure: str
    """The one of `COMPARED` that is drawn."""
    paired: bool
    """Whether both saw the same tokens, so that each is compared with itself."""
    says: tuple[str, ...]
    """How rows were aligned and tokens paired, in words."""
    over: str
    """What intervals are over: documents, or windows where these are few."""
    pairs: tuple[tuple[Contribution, Contribution], ...]
    """(row,) what stands side by side."""
    measures: Differences
    """(row, measure) means over tokens without position 0, and their differences."""
    loss: Mapping[str, float] | None
    """nats per token, without position 0: ``first``, ``second``, ``difference``, ``low`` and ``high``; None where a
    capture has none."""
    similarity: Similarity | None
    """Where both saw the same tokens."""
    moved: MovedResult | None
    """Where the streams have the same shape, too."""

    def at(self, label: str, measure: str) -> dict[str, float]:
        """Return the means, the difference and its interval of one row, by its name in the first capture.

        Raises:
            UsageError: no such row or measure.
        """
        labels = [own.label for own, _ in self.pairs]
        if label not in labels:
            raise UsageError(f"there is no row {label!r}; there are {', '.join(labels[:6])} ...")
        return self.measures.at(labels.index(label), column_of(measure))

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each pair and measure; measures without a meaning for a row are left out."""
        return [row for measure in COMPARED for row in self.rows_of(measure)]

    def rows_of(self, measure: str) -> list[dict[str, Any]]:
        """Return one row for each pair.

        Raises:
            UsageError: no such measure.
        """
        column = column_of(measure)
        found = []
        for i, (own, other) in enumerate(self.pairs):
            row = self.measures.at(i, column)
            if not np.isnan(row["difference"]):
                names = {"label": own.label, "other_label": other.label, "kind": own.kind, "layer": own.layer}
                found.append({"measure": measure, **names, **row})
        return found

    @property
    def certainty(self) -> str:
        """What is to be said of the intervals."""
        if np.isnan(self.measures.low).all():
            return "no intervals: there is one document or window only"
        return f"95 % intervals over {self.over} of this text; they say nothing of another training"

    def clear(self) -> tuple[int, int]:
        """Return for how many sublayers the interval of `measure` leaves out 0, and of how many."""
        rows = [row for own in self._of_sublayers().values() for row in own]
        return sum(row["low"] > 0 or row["high"] < 0 for row in rows), len(rows)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the difference of `measure` by layer, with its 95 % interval."""
        with style():
            ax = axes(ax)
            rows = self._of_sublayers()
            for kind, own in rows.items():
                layers, colour = [float(row["layer"]) for row in own], PALETTE[kind]
                values = [row["difference"] for row in own]
                ax.plot(layers, values, "o-", markersize=3, color=colour, label=KIND_NAMES[kind])
                interval(ax, layers, [row["low"] for row in own], [row["high"] for row in own], colour)
            ax.axhline(0, color="black", linewidth=0.6)
            spread_out(ax, [row["difference"] for own in rows.values() for row in own])
            integer_ticks(ax)
            y = f"Difference of {WORDS[self.measure]}\n(95 % interval over {self.over})"
            return finish(ax, x=f"Layer of {self.names[0]}", y=y, title=self.title)

    def plot_both(self, ax: Axes | None = None) -> Axes:
        """Draw `measure` of both by layer: the first in full lines, the second dashed."""
        with style():
            ax = axes(ax)
            rows = self._of_sublayers()
            for kind, own in rows.items():
                layers = [float(row["layer"]) for row in own]
                for side, line, name in (("first", "o-", self.names[0]), ("second", "s--", self.names[1])):
                    values = [row[side] for row in own]
                    label = literal(f"{KIND_NAMES[kind]}, {name}")
                    ax.plot(layers, values, line, markersize=3, color=PALETTE[kind], label=label)
            spread_out(ax, [row[side] for own in rows.values() for row in own for side in ("first", "second")])
            integer_ticks(ax)
            return finish(ax, x=f"Layer of {self.names[0]}", y=f"Mean {WORDS[self.measure]}", title=self.title)

    def _of_sublayers(self) -> dict[str, list[dict[str, Any]]]:
        """Rows of `measure` by kind of sublayer."""
        found: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows_of(self.measure):
            if row["kind"] in SUBLAYER_KINDS:
                found.setdefault(row["kind"], []).append(row)
        return found


def column_of(measure: str) -> int:
    """Return the place of a measure in `COMPARED`.

    Raises:
        UsageError: no such measure.
    """
    if measure not in COMPARED:
        raise UsageError(f"there is no measure {measure!r}; there are {', '.join(COMPARED)}")
    return COMPARED.index(measure)
