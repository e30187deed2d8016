"""Sums over documents from which the positional part of every state, and where it comes from, follow exactly.

On a full rectangle of documents c and positions t a state splits into h = mean + position_t + context_c + rest. The
first three are averages, so sums are all that has to be kept: one table (position, d_model) for each state and each
term of it, and a few numbers for each document, added up as they come.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamlens.analyses.frozen import FrozenNorm, stream_norms
from streamlens.analyses.sampling import Ints, usual_length, window_documents, window_lengths
from streamlens.analyses.source import Source
from streamlens.analyses.statistics import FEW_DOCUMENTS
from streamlens.analyses.transport import BIAS, Factors, Summand, factors_of, transported
from streamlens.anatomy import Stream
from streamlens.block import Block
from streamlens.errors import MissingDataError

MOST_POSITIONS = 128
"""Positions of each document that are looked at where the caller names no number."""

WHOLE_WIDTH, SKETCH_WIDTH = 256, 64
"""Up to the first, a d_model x d_model matrix is kept whole; above it, its product with so many random columns."""

FOLDS = 16
"""Into so many groups the documents are put, one of which is left out at a time; with few documents, windows are."""


@dataclass(frozen=True)
class Rectangle:
    """Which rows of a block are positions 0 ... T-1 of its documents."""

    rows: Tensor
    """(doc, position) int64."""
    left_out: int
    """Documents of the block that are too short."""
    whole: int | None
    """Length of the documents, where all of the block are equally long: then nothing has to be gathered."""

    @classmethod
    def of(cls, block: Block, positions: int) -> Rectangle:
        """Find the documents of a block that are long enough.

        Raises:
            MissingDataError: some of their positions were left out of the capture.
        """
        position = block.position.long()
        starts, lengths = torch.unique_consecutive(block.window - block.start, return_counts=True)
        rows = starts[lengths >= positions][:, None] + torch.arange(positions)
        if not torch.equal(position[rows], torch.arange(positions).expand(rows.shape)):
            raise MissingDataError(
                f"tokens {block.start} to {block.stop} do not hold every position from 0 on, which the positional part "
                "needs: capture without --positions"
            )
        even = len(rows) > 0 and bool((lengths == lengths[0]).all())
        return cls(rows, int((lengths < positions).sum()), int(lengths[0]) if even else None)

    def take(self, tensor: Tensor) -> Tensor:
        """Return (doc, position, ...) of a tensor (token, ...)."""
        docs, positions = self.rows.shape
        if self.whole is not None:
            return tensor.reshape(docs, self.whole, *tensor.shape[1:])[:, :positions]
        return tensor[self.rows.to(tensor.device)]


@dataclass(frozen=True)
class Folds:
    """In which group of documents each window of a source is: neighbours are together, windows of a document always."""

    starts: Ints
    """(window,) first token."""
    numbers: Ints
    """(window,) group, below `FOLDS`."""

    @classmethod
    def of(cls, source: Source) -> Folds:
        """Put the documents of a source into groups of equal size, or its windows where there are few documents."""
        lengths, documents = window_lengths(source), window_documents(source)
        changes = np.flatnonzero(np.diff(documents)) + 1
        if len(changes) + 1 >= FEW_DOCUMENTS:
            unit = np.searchsorted(changes, np.arange(len(lengths)), side="right")
        else:
            unit = np.arange(len(lengths))
        units = int(unit.max(initial=0)) + 1
        return cls(np.cumsum(lengths) - lengths, unit * min(FOLDS, units) // units)

    def within(self, block: Block, rectangle: Rectangle) -> Tensor:
        """Return (doc,) the group of each document that is looked at."""
        first = block.start + rectangle.rows[:, 0].numpy()
        return torch.from_numpy(self.numbers[np.searchsorted(self.starts, first, side="right") - 1])


class PositionSums:
    """The running sums of one stream.

    Args:
        stream: the stream.
        positions: how many positions of each document are looked at, from 0.
        first: the first position that counts, 0 or 1.
        norms: the norms that the stream passes (`stream_norms`).
        factors: the factors on its sums (`factors_of`).
        origins: whether to follow the terms of each state, too; without it only states are read.
        states: which states to look at; by default all.
        bands: whether to keep what is asked of the unchanged model alone: null bands, origins, the positional subspace.
    """

    def __init__(
        self,
        stream: Stream,
        positions: int,
        *,
        first: int = 1,
        norms: Mapping[int, FrozenNorm] | None = None,
        factors: Factors | None = None,
        origins: bool = True,
        states: Sequence[int] | None = None,
        bands: bool = True,
    ) -> None:
        """Start at nothing."""
        self.stream, self.positions, self.first, self.bands = stream, positions, first, bands
        self.states = tuple(range(len(stream.steps) + 1) if states is None else states)
        self.left_out = 0
        self.fold_docs = torch.zeros(FOLDS, dtype=torch.float64)
        """(fold,) documents in each group."""
        self.sums: dict[int, Tensor] = {}
        """By state: (position, d_model) sum over documents."""
        self.squares: dict[int, Tensor] = {}
        """By state: (position,) sum over documents of the squared norm."""
        self.doc_squares: dict[int, Tensor] = {}
        """By state: sum over documents of the squared norm of the sum over positions; from `first`, and from 0."""
        self.doc_products: dict[int, Tensor] = {}
        """By state: (d_model, sketch) sum over documents of the outer product of the mean with itself, sketched."""
        self.scatter: dict[int, Tensor] = {}
        """By state: (d_model, sketch) sum of the outer products of what is left without the document's mean."""
        self.own_scatter: dict[int, Tensor] = {}
        """By state: sum over documents of the squared Frobenius norm of its own scatter."""
        self.fold_parts: dict[int, Tensor] = {}
        """By state: (fold, position, sketch) sum of what is left without the document's mean, sketched."""
        self.fold_squares: dict[int, Tensor] = {}
        """By state: (fold, 3) sums of squared norms: of the sketch, of what is sketched, of the documents' means."""
        self.fold_means: dict[int, Tensor] = {}
        """By state: (fold, d_model) sum of the documents' means."""
        self.halves: dict[int, Tensor] = {}
        """By state: (position, d_model) sum over the documents of the even folds; only with `bands`."""
        self.terms: dict[tuple[int, int], Tensor] = {}
        """By state and term: (2, position, d_model) sum over documents, and over those of the even folds; only where
        the term is not what it was."""
        self.fixed: dict[int, Tensor | None] = {}
        """By embedding part: its (position, d_model) as long as it is the same in all documents, else None."""
        self._norms, self._factors, self._origins = norms or {}, factors, origins
        self.term_names = _term_names(stream, bool(self._norms))

    @property
    def docs(self) -> int:
        """Documents so far."""
        return int(self.fold_docs.sum())

    def update(self, block: Block, folds: Folds) -> None:
        """Fold the tokens of a block in.

        Raises:
            MissingDataError: positions or writes were left out of the capture.
        """
        rectangle = Rectangle.of(block, self.positions)
        self.left_out += rectangle.left_out
        if not len(rectangle.rows):
            return
        fold = folds.within(block, rectangle)
        self.count(fold)
        for index in self.states:
            self.add_state(index, rectangle.take(block.states[index]), fold)
        if self._origins:
            self._add_terms(block, rectangle, fold)

    def count(self, fold: Tensor) -> None:
        """Count documents, (doc,) the group of each: once, before or after their states are added."""
        self.fold_docs += torch.bincount(fold, minlength=FOLDS).double()

    def add_state(self, index: int, state: Tensor, fold: Tensor) -> None:
        """Fold in one state of some documents, (doc, position, d_model); `count` is the caller's to call.

        Args:
            index: which state.
            state: its values, any float dtype.
            fold: (doc,) int64 the group of each document.
        """
        wide = doubled(state)
        counted, fold = wide[:, self.first :], fold.to(wide.device)
        doc_sums = torch.stack([counted.sum(1), wide.sum(1)])
        mean = doc_sums[0] / counted.shape[1]
        rest = (counted - mean[:, None]).float()
        sketch = sketch_of(wide.shape[-1], wide.device)
        narrow = rest @ sketch.float()
        _add(self.sums, index, wide.sum(0))
        _add(self.squares, index, wide.square().sum((0, 2)))
        _add(self.doc_squares, index, doc_sums.square().sum((1, 2)))
        _add(self.fold_parts, index, _by_fold(fold, narrow.double()))
        _add(self.fold_means, index, _by_fold(fold, mean))
        squares = [each.square().flatten(1).sum(1, dtype=torch.float64) for each in (narrow, rest, mean)]
        _add(self.fold_squares, index, _by_fold(fold, torch.stack(squares, dim=1)))
        if self.bands:
            _add(self.halves, index, wide[fold % 2 == 0].sum(0))
            _add(self.doc_products, index, mean.T @ (mean @ sketch))
            _add(self.scatter, index, (rest.flatten(0, 1).T @ narrow.flatten(0, 1)).double())
            _add(self.own_scatter, index, (rest @ rest.mT).square().sum(dtype=torch.float64))

    def merge(self, other: PositionSums) -> None:
        """Fold another partial result in."""
        self.fold_docs += other.fold_docs
        self.left_out += other.left_out
        for name in _TABLES:
            for key, value in getattr(other, name).items():
                _add(getattr(self, name), key, value)
        for part, table in other.fixed.items():
            self._agree(part, table)

    def term(self, state: int, term: int) -> Tensor | None:
        """Return (2, position, d_model) a term of a state, summed over all documents and over those of the even folds.

        None where it is not in the state yet.
        """
        for index in range(state, -1, -1):
            if (index, term) in self.terms:
                return self.terms[index, term]
        return None

    def position_parts(self) -> list[int]:
        """Return the embedding parts that depend on the position alone."""
        return [i for i, table in self.fixed.items() if table is not None and not bool((table == table[:1]).all())]

    def _add_terms(self, block: Block, rectangle: Rectangle, fold: Tensor) -> None:
        for i in range(len(self.stream.parts)):
            if self.fixed.get(i, torch.zeros(0)) is not None:
                part = rectangle.take(block.parts[i])
                self._agree(i, part[0].clone() if bool((part == part[:1]).all()) else None)
        dtype = torch.float64 if block.writes[0].dtype == torch.float64 else torch.float32
        walk = transported(self.stream, self._norms, block, factors=self._factors, dtype=dtype)
        before: dict[int, Tensor] = {}
        for state, summands in enumerate(walk):
            for term, vectors in enumerate(_grouped(summands, bool(self._norms))):
                if before.get(term) is not vectors:
                    taken = rectangle.take(vectors)
                    chosen = (taken, taken[(fold % 2 == 0).to(taken.device)])
                    _add(self.terms, (state, term), torch.stack([doubled(each).sum(0) for each in chosen]))
                before[term] = vectors

    def _agree(self, part: int, table: Tensor | None) -> None:
        known = self.fixed.get(part, table)
        same = known is not None and table is not None and torch.equal(known, table)
        self.fixed[part] = known if same else None


_TABLES = (
    "sums",
    "squares",
    "doc_squares",
    "doc_products",
    "scatter",
    "own_scatter",
    "fold_parts",
    "fold_squares",
    "fold_means",
    "halves",
    "terms",
)


def doubled(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, on the CPU where the device has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def _by_fold(fold: Tensor, values: Tensor) -> Tensor:
    """(fold, ...) sums over the documents of each group, from (doc, ...)."""
    empty = torch.zeros(FOLDS, *values.shape[1:], dtype=values.dtype, device=values.device)
    return empty.index_add_(0, fold, values)


def _term_names(stream: Stream, normed: bool) -> tuple[tuple[str, str], ...]:
    """Label and kind of each term; the biases of all norms on the stream are one term, between the parts and writes."""
    parts = [(p.label, "embed") for p in stream.parts]
    order = [s for step in stream.steps for s in step.sublayers]
    return (*parts, *([("norm_bias", BIAS)] if normed else []), *((_of(stream, s)) for s in order))


def _of(stream: Stream, index: int) -> tuple[str, str]:
    return stream.sublayers[index].label, stream.sublayers[index].kind


def _grouped(summands: Sequence[Summand], normed: bool) -> Iterator[Tensor]:
    """The vectors of the terms in the order of `_term_names`."""
    yield from (p.vectors for p in summands if p.kind == "embed")
    if normed:
        biases = [p.vectors for p in summands if p.kind == BIAS]
        # A single one is handed on as it is, so that it is recognised where nothing changes it any more.
        yield biases[0] if len(biases) == 1 else _total(biases, summands[0].vectors)
    yield from (p.vectors for p in summands if p.kind not in ("embed", BIAS))


def _total(vectors: Sequence[Tensor], like: Tensor) -> Tensor:
    total = torch.zeros_like(like)
    for each in vectors:
        total += each
    return total


def _add(sums: dict[Any, Tensor], key: Any, value: Tensor) -> None:
    if key in sums:
        sums[key] += value.to(sums[key].device)
    else:
        sums[key] = value.clone()


@lru_cache(maxsize=4)
def sketch_of(d_model: int, device: torch.device) -> Tensor:
    """(d_model, sketch) float64: the identity, or a random matrix R with E[R R^T] = 1, always the same one."""
    if d_model <= WHOLE_WIDTH:
        return torch.eye(d_model, dtype=torch.float64, device=device)
    seeded = torch.Generator().manual_seed(0)
    drawn: Tensor = torch.randn(d_model, SKETCH_WIDTH, generator=seeded, dtype=torch.float64) / SKETCH_WIDTH**0.5
    return drawn.to(device)


def sums_of(
    source: Source,
    blocks: Iterable[Block],
    *,
    positions: int | None = None,
    include_first: bool = False,
    origins: bool = True,
) -> PositionSums:
    """Add up the blocks of a source.

    Args:
        source: where the blocks come from.
        blocks: its blocks, behind a progress bar perhaps.
        positions: how many positions of each document; by default so many as half of them have, at most 128.
        include_first: whether position 0 counts in the headline numbers.
        origins: whether to follow the terms of each state, too.

    Raises:
        MissingDataError: no document is long enough, or something was left out of the capture.
    """
    count = usual_length(source, MOST_POSITIONS) if positions is None else positions
    found = PositionSums(
        source.stream,
        count,
        first=0 if include_first else 1,
        norms=stream_norms(source.stream, source.parameters) if origins else {},
        factors=factors_of(source.stream, source.parameters) if origins else None,
        origins=origins,
    )
    folds = Folds.of(source)
    for block in blocks:
        found.update(block, folds)
    if not found.docs:
        raise MissingDataError(f"no document or window of {source.description} has {count} positions: ask for fewer")
    return found
