"""What is found out about position in a stream: one row for each state, and where its positional part comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streamlens.analyses.result import Result
from streamlens.analyses.statistics import Floats
from streamlens.wording import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class PositionResult(Result):
    """The positional part of every state. NaN stands where a number does not exist."""

    title: str
    states: tuple[str, ...]
    """(state,) what each state is called: ``x_0``, then after the sublayers that made it."""
    terms: tuple[str, ...]
    """(term,) embedding parts, the biases of the norms on the stream, and writes, by label."""
    kinds: tuple[str, ...]
    """(term,) ``embed``, ``norm``, or the kind of the sublayer."""
    documents: int
    """Documents or windows that the averages are over."""
    documents_left_out: int
    """Those that are shorter than the positions that were asked for."""
    positions: int
    """Positions that count, without position 0 unless `include_first`."""
    include_first: bool
    position_embedding: str | None
    """Label of the embedding parts that depend on the position alone; None for RoPE, ALiBi and no positions at all."""
    position_share: Floats
    """(state,) share of the positional part in the energy around the mean, corrected for its bias."""
    low: Floats
    high: Floats
    """(state,) its 95 % interval, by the jackknife over groups of documents, or of windows where documents are few."""
    null_low: Floats
    null_high: Floats
    """(state,) 95 % of what `position_share` would be if each document's positions stood in random order."""
    position_share_all: Floats
    """(state,) the same with position 0, which in many models holds a vector of enormous norm."""
    position_share_raw: Floats
    """(state,) without the correction."""
    context_share: Floats
    """(state,) share of the documents' means, as it is."""
    f_ratio: Floats
    """(state,) mean square between positions over mean square of the rest; 1 without a positional part."""
    relative_norm: Floats
    """(state,) spectral norm of the positional part over that of mean, position and context together: falls where the
    mean grows, which is why `position_share` leaves the mean out."""
    stable_rank: Floats
    """(state,) how many directions the positional part takes up."""
    retention: Floats
    """(state,) the positional part along the reference, in units of the reference: 1 where it is carried untouched,
    0 where it is gone. The reference is the position embedding as it stands in x_0; without one it is the positional
    part of x_0, and where that is within its null band, this and the next two are NaN."""
    subspace_overlap: Floats
    """(state,) mean squared cosine between the strongest directions of the positional part and of the reference."""
    overlap_chance: float
    """What two random subspaces have."""
    cka: Floats
    """(state,) debiased linear CKA between the positional part and the reference."""
    origin: Floats
    """(state, term) share of each term in the positional part, by inner products that averaging over documents does
    not bias: the terms of a state sum to 1, and are negative where they take position away; NaN for writes that are
    still to come, and in states whose positional part is within its null band."""
    position_vectors: NDArray[np.float32]
    """(state, position, d_model) the positional part itself."""

    @property
    def carried(self) -> Floats:
        """(state,) share of the positional part that the skip carried from the embedding."""
        return self.share_of("embed")

    def share_of(self, kind: str) -> Floats:
        """Return (state,) the share of the positional part that terms of a kind brought."""
        chosen = [i for i, k in enumerate(self.kinds) if k == kind]
        total: Floats = np.nansum(self.origin[:, chosen], axis=1)
        return np.where(np.isnan(self.origin).all(axis=1), np.nan, total)

    @property
    def scope(self) -> str:
        """What the averages are over, in words."""
        first = 0 if self.include_first else 1
        left = f"; {self.documents_left_out:,} shorter ones left out" if self.documents_left_out else ""
        of = f"{counted(self.documents, 'document')} or window{'' if self.documents == 1 else 's'}"
        return f"positions {first} to {first + self.positions - 1} of {of}{left}"

    @property
    def origins(self) -> OriginResult:
        """Which term brought the positional part of each state: a table and a heat map of their own."""
        return OriginResult(self.title, self.states, self.terms, self.kinds, self.origin)

    @property
    def reading(self) -> str:
        """One sentence on where position comes from."""
        seen = np.flatnonzero(self.position_share > self.null_high)
        if self.position_embedding:
            start = f"position enters with {self.position_embedding}"
        elif not len(seen):
            return "no position embedding, and no state tells positions apart"
        else:
            start = f"no position embedding; position is first above its null band after {self.states[seen[0]]}"
        if not len(seen):
            return f"{start}, and no state tells positions apart"
        last = int(seen[-1])
        name = f"x_{last}, the last state" + ("" if last == len(self.states) - 1 else " above its null band")
        carried = round(float(self.carried[last]), 2) + 0.0  # or a share just below zero would read -0%
        return f"{start}; of the positional part of {name}, the skip carried {100 * carried:.0f} % from the embedding"

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each state; shares are fractions of 1."""
        kinds = list(dict.fromkeys(self.kinds))
        rows = []
        for k, state in enumerate(self.states):
            row: dict[str, Any] = {"state": k, "label": state}
            for name in _COLUMNS:
                row[name] = float(getattr(self, name)[k])
            row["overlap_chance"] = self.overlap_chance
            row.update({f"from_{kind}": float(self.share_of(kind)[k]) for kind in kinds})
            rows.append(row)
        return rows

    def short_rows(self) -> list[dict[str, Any]]:
        """Return the columns that fit a terminal."""
        kinds = [kind for kind in dict.fromkeys(self.kinds) if kind != "embed"]
        return [
            {
                "label": state,
                "share": float(self.position_share[k]),
                "null_high": float(self.null_high[k]),
                "retention": float(self.retention[k]),
                "carried": float(self.carried[k]),
                **{kind: float(self.share_of(kind)[k]) for kind in kinds},
            }
            for k, state in enumerate(self.states)
        ]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the positional share of each state with the band that it has without position.

        In a figure of its own, where the positional part comes from (`plot_origin`) is drawn below.
        """
        from streamlens.analyses.figures import panels
        from streamlens.analyses.position.drawing import plot_origin, plot_share

        if ax is not None:
            return plot_share(self, ax)
        above, below = panels(2, 1, width=7.0, height=5.6)
        plot_origin(self, below).set_title("", loc="left")
        return plot_share(self, above)

    def plot_origin(self, ax: Axes | None = None) -> Axes:
        """Draw where the positional part of each state comes from, as stacked shares that sum to 1."""
        from streamlens.analyses.position.drawing import plot_origin

        return plot_origin(self, ax)

    def plot_path(self, ax: Axes | None = None, *, state: int = -1) -> Axes:
        """Draw the positional part of one state in its two strongest directions, position by position."""
        from streamlens.analyses.position.drawing import plot_path

        return plot_path(self, ax, state=state)


_COLUMNS = (
    "position_share",
    "low",
    "high",
    "null_low",
    "null_high",
    "position_share_all",
    "position_share_raw",
    "context_share",
    "f_ratio",
    "relative_norm",
    "stable_rank",
    "retention",
    "subspace_overlap",
    "cka",
)


@dataclass(frozen=True)
class OriginResult(Result):
    """Which term brought the positional part of each state: what the skip carried on, and what each sublayer wrote.

    A share below 0 is erasure: the sublayer wrote against what was there.
    """

    title: str
    states: tuple[str, ...]
    """(state,)."""
    terms: tuple[str, ...]
    """(term,)."""
    kinds: tuple[str, ...]
    """(term,)."""
    share: Floats
    """(state, term) as in `PositionResult.origin`."""

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each state and each term that is in it; `share` is a fraction of 1, NaN without one."""
        return [
            {"state": k, "label": state, "term": term, "kind": kind, "share": float(self.share[k, i])}
            for k, state in enumerate(self.states)
            for i, (term, kind) in enumerate(zip(self.terms, self.kinds, strict=True))
            if np.isnan(self.share[k]).all() or not np.isnan(self.share[k, i])
        ]

    def short_rows(self, states: int = 5) -> list[dict[str, Any]]:
        """Return a row for each term and a column for some of the states that have shares, the last one among them."""
        told = np.flatnonzero(~np.isnan(self.share).all(axis=1))
        chosen = told[np.unique(np.linspace(0, len(told) - 1, states).round().astype(int))] if len(told) else told
        return [
            {"term": term, "kind": kind, **{f"x_{k}": _number(self.share[k, i]) for k in chosen}}
            for i, (term, kind) in enumerate(zip(self.terms, self.kinds, strict=True))
        ]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the shares as a heat map around zero: states across, terms up."""
        from streamlens.analyses.position.drawing import plot_origins

        return plot_origins(self, ax)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
