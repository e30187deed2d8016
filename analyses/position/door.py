"""Positional persistence: how much of each state is position, and who carries it.

Every state h of document c at position t is split as h = mean + position_t + context_c + rest (a two-way analysis of
variance; Song & Zhong 2023, arXiv:2310.04861). The positional part is linear in the state, so it is the sum of the
positional parts of the terms of the state: what the embedding brought and the skip carried, and what each sublayer
wrote. Whether position survives on the skip or is written anew is read off that sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamlens.analyses.position.geometry import debiased_cka, stable_rank, subspace_overlap, top_span
from streamlens.analyses.position.sums import PositionSums, null_band, relative_norm, split, sums_of
from streamlens.analyses.result import Result
from streamlens.analyses.source import Corpus, Origin, source_of, watched
from streamlens.checkpoint.model import Model
from streamlens.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = NDArray[np.float64]

SPAN = 16
"""Dimensions of the subspaces that are compared."""


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
    """(state, term) share of each term in the positional part, by inner products: the terms of a state sum to 1, and
    are negative where they take position away; NaN for writes that are still to come."""
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
        return total

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
        last = f"of the positional part of the last state, the skip carried {self.carried[-1]:.0%} from the embedding"
        return f"{start}; {last}"

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


def positional_persistence(
    origin: Origin,
    *,
    stream: str | None = None,
    model: Model | None = None,
    positions: int | None = None,
    include_first: bool = False,
    progress: bool = True,
    **corpus: Unpack[Corpus],
) -> PositionResult:
    """Measure how much of each state is position, and which term of the state it comes from.

    Memory is one table (position, d_model) for each state and each term, whatever the number of tokens; where the
    stream passes norms, terms change at each of them and have a table for each state.

    Args:
        origin: a capture or its path, a model or its file, or a source.
        stream: which stream; by default the one that the head reads.
        model: for a capture: its model, where it is loaded already (not needed here).
        positions: how many positions of each document, from 0; by default the length of the first, at most 128.
        include_first: whether position 0 counts in the headline numbers.
        progress: whether to show a progress bar.
        **corpus: for a live model: what it is shown, as in `streamlens.capture`.

    Raises:
        MissingDataError: too few documents, none that is long enough, or a capture without all positions and writes.
        UsageError: fewer than two positions that count.

    Example:
        >>> from fixtures import zoo
        >>> ids = torch.randint(0, 50, (16, 9), generator=torch.Generator().manual_seed(0))
        >>> found = positional_persistence(zoo.build("gpt2").module, tokens=ids, progress=False)
        >>> found.position_embedding, found.states[:2], bool((found.position_share > found.null_high).all())
        ('pos_embed', ('x_0', '0_attn_out'), True)
        >>> np.allclose(np.nansum(found.origin, axis=1), 1)
        True
    """
    least = 2 if include_first else 3
    if positions is not None and positions < least:
        raise UsageError(f"{positions} positions are too few to compare: ask for at least {least}")
    source = source_of(origin, stream=stream, model=model, **corpus)
    blocks = watched(source, "position", progress=progress)
    return result_of(sums_of(source, blocks, positions=positions, include_first=include_first), source.description)


def result_of(sums: PositionSums, description: str) -> PositionResult:
    """Work out the result from the sums over documents."""
    splits = {k: split(sums, k) for k in sums.states}
    parts = {k: own.parts for k, own in splits.items()}
    embedding = sums.position_parts()
    reference = _reference(sums, embedding, parts[0])
    bands = [null_band(sums, k, splits[k]) for k in sums.states]
    if not embedding and splits[0].share <= bands[0][1]:
        reference = torch.zeros_like(reference)
    span = top_span(reference, SPAN)

    def each(measure: Any) -> Floats:
        return np.array([measure(k) for k in sums.states], np.float64)

    return PositionResult(
        title=f"Positional persistence: {description}",
        states=sums.stream.state_labels,
        terms=tuple(label for label, _ in sums.term_names),
        kinds=tuple(kind for _, kind in sums.term_names),
        documents=sums.docs,
        documents_left_out=sums.left_out,
        positions=sums.positions - sums.first,
        include_first=sums.first == 0,
        position_embedding=" + ".join(sums.stream.parts[i].label for i in embedding) or None,
        position_share=each(lambda k: splits[k].share),
        null_low=np.array([low for low, _ in bands]),
        null_high=np.array([high for _, high in bands]),
        position_share_all=each(lambda k: split(sums, k, 0).share),
        position_share_raw=each(lambda k: splits[k].raw_share),
        context_share=each(lambda k: splits[k].context / splits[k].total if splits[k].total else np.nan),
        f_ratio=each(lambda k: splits[k].f_ratio),
        relative_norm=each(lambda k: relative_norm(sums, k, splits[k])),
        stable_rank=each(lambda k: stable_rank(parts[k])),
        retention=each(lambda k: _along(parts[k], reference)),
        subspace_overlap=each(lambda k: subspace_overlap(top_span(parts[k], SPAN), span)),
        overlap_chance=span.shape[1] / span.shape[0] if span.shape[1] else float("nan"),
        cka=each(lambda k: debiased_cka(parts[k], reference)),
        origin=_origins(sums, parts),
        position_vectors=np.stack([parts[k].float().cpu().numpy() for k in sums.states]),
    )


def _positional(sums: PositionSums, table: Tensor) -> Tensor:
    """(position, d_model) the positional part of what a table is the sum of."""
    means = table[sums.first :] / sums.docs
    return means - means.mean(0)


def _reference(sums: PositionSums, embedding: list[int], first: Tensor) -> Tensor:
    tables = [table for i in embedding if (table := sums.term(0, i)) is not None]
    return torch.stack([_positional(sums, t) for t in tables]).sum(0) if tables else first


def _along(part: Tensor, reference: Tensor) -> float:
    energy = reference.square().sum()
    return float((part * reference).sum() / energy) if energy > 0 else float("nan")


def _origins(sums: PositionSums, parts: dict[int, Tensor]) -> Floats:
    found = np.full((len(parts), len(sums.term_names)), np.nan)
    for row, (state, whole) in enumerate(parts.items()):
        for term in range(len(sums.term_names)):
            table = sums.term(state, term)
            if table is not None:
                found[row, term] = _along(_positional(sums, table), whole)
    return found
