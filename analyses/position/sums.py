"""Sums over documents from which the positional part of every state, and where it comes from, follow exactly.

On a full rectangle of documents c and positions t a state splits into h = mean + position_t + context_c + rest. The
first three are averages, so sums are all that has to be kept: one table (position, d_model) for each state and each
term of it, and a few numbers for each document, added up as they come.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from streamlens.analyses.frozen import FrozenNorm, stream_norms
from streamlens.analyses.source import Source
from streamlens.analyses.transport import BIAS, Factors, Summand, factors_of, transported
from streamlens.anatomy import Stream
from streamlens.block import Block
from streamlens.errors import MissingDataError

MOST_POSITIONS = 128
"""Positions of each document that are looked at where the caller names no number."""

WHOLE_WIDTH, SKETCH_WIDTH = 256, 64
"""Up to the first, a d_model x d_model matrix is kept whole; above it, its product with so many random columns."""


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
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), torch.nonzero(position[1:] <= position[:-1])[:, 0] + 1])
        lengths = torch.diff(starts, append=torch.tensor([len(position)]))
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
    ) -> None:
        """Start at nothing."""
        self.stream, self.positions, self.first = stream, positions, first
        self.states = tuple(range(len(stream.steps) + 1) if states is None else states)
        self.docs = self.left_out = 0
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
        self.terms: dict[tuple[int, int], Tensor] = {}
        """By state and term: (position, d_model) sum over documents; only where the term is not what it was."""
        self.fixed: dict[int, Tensor | None] = {}
        """By embedding part: its (position, d_model) as long as it is the same in all documents, else None."""
        self._norms, self._factors, self._origins = norms or {}, factors, origins
        self.term_names = _term_names(stream, bool(self._norms))

    def update(self, block: Block) -> None:
        """Fold the tokens of a block in.

        Raises:
            MissingDataError: positions or writes were left out of the capture.
        """
        rectangle = Rectangle.of(block, self.positions)
        self.left_out += rectangle.left_out
        if not len(rectangle.rows):
            return
        self.docs += len(rectangle.rows)
        for index in self.states:
            self.add_state(index, rectangle.take(block.states[index]))
        if self._origins:
            self._add_terms(block, rectangle)

    def add_state(self, index: int, state: Tensor) -> None:
        """Fold in one state of some documents, (doc, position, d_model); `docs` is the caller's to count."""
        wide = state.double()
        counted = wide[:, self.first :]
        doc_sums = torch.stack([counted.sum(1), wide.sum(1)])
        mean = doc_sums[0] / counted.shape[1]
        rest = (counted - mean[:, None]).float()
        sketch = _sketch(wide.shape[-1], wide.device)
        gram = rest @ rest.mT
        flat = rest.flatten(0, 1)
        _add(self.sums, index, wide.sum(0))
        _add(self.squares, index, wide.square().sum((0, 2)))
        _add(self.doc_squares, index, doc_sums.square().sum((1, 2)))
        _add(self.doc_products, index, mean.T @ (mean @ sketch))
        _add(self.scatter, index, (flat.T @ (flat @ sketch.float())).double())
        _add(self.own_scatter, index, gram.square().sum(dtype=torch.float64))

    def merge(self, other: PositionSums) -> None:
        """Fold another partial result in."""
        self.docs += other.docs
        self.left_out += other.left_out
        for name in ("sums", "squares", "doc_squares", "doc_products", "scatter", "own_scatter", "terms"):
            for key, value in getattr(other, name).items():
                _add(getattr(self, name), key, value)
        for part, table in other.fixed.items():
            self._agree(part, table)

    def term(self, state: int, term: int) -> Tensor | None:
        """Return (position, d_model) the sum over documents of a term of a state; None where it is not in it yet."""
        for index in range(state, -1, -1):
            if (index, term) in self.terms:
                return self.terms[index, term]
        return None

    def position_parts(self) -> list[int]:
        """Return the embedding parts that depend on the position alone."""
        return [i for i, table in self.fixed.items() if table is not None and not bool((table == table[:1]).all())]

    def _add_terms(self, block: Block, rectangle: Rectangle) -> None:
        for i in range(len(self.stream.parts)):
            if self.fixed.get(i, torch.zeros(0)) is not None:
                part = rectangle.take(block.parts[i])
                self._agree(i, part[0].clone() if bool((part == part[:1]).all()) else None)
        walk = transported(self.stream, self._norms, block, factors=self._factors)
        before: dict[int, Tensor] = {}
        for state, summands in enumerate(walk):
            for term, vectors in enumerate(_grouped(summands, bool(self._norms))):
                if before.get(term) is not vectors:
                    _add(self.terms, (state, term), rectangle.take(vectors).sum(0, dtype=torch.float64))
                before[term] = vectors

    def _agree(self, part: int, table: Tensor | None) -> None:
        known = self.fixed.get(part, table)
        same = known is not None and table is not None and torch.equal(known, table)
        self.fixed[part] = known if same else None


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
def _sketch(d_model: int, device: torch.device) -> Tensor:
    """(d_model, sketch) float64: the identity, or a random matrix R with E[R R^T] = 1, always the same one."""
    if d_model <= WHOLE_WIDTH:
        return torch.eye(d_model, dtype=torch.float64, device=device)
    seeded = torch.Generator().manual_seed(0)
    drawn: Tensor = torch.randn(d_model, SKETCH_WIDTH, generator=seeded, dtype=torch.float64) / SKETCH_WIDTH**0.5
    return drawn.to(device)


@dataclass(frozen=True)
class Split:
    """How the energy of one state splits; the four add up to the sum of its squares."""

    mean: float
    position: float
    context: float
    rest: float
    docs: int
    positions: int
    parts: Tensor
    """(position, d_model) float64 the positional part of the state."""

    @property
    def total(self) -> float:
        """What is split without the mean."""
        return self.position + self.context + self.rest

    @property
    def raw_share(self) -> float:
        """Share of the positional part, as it is."""
        return self.position / self.total if self.total else float("nan")

    @property
    def share(self) -> float:
        """Share of the positional part without what the average over finitely many documents adds to it."""
        excess = self.rest / (self.docs - 1)
        return (self.position - excess) / self.total if self.total else float("nan")

    @property
    def f_ratio(self) -> float:
        """Mean square between positions over mean square of the rest."""
        return self.position * (self.docs - 1) / self.rest if self.rest > 0 else float("nan")


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
        positions: how many positions of each document; by default those of the first document, at most 128.
        include_first: whether position 0 counts in the headline numbers.
        origins: whether to follow the terms of each state, too.

    Raises:
        MissingDataError: no document is long enough, or something was left out of the capture.
    """
    norms = stream_norms(source.stream, source.parameters) if origins else {}
    factors = factors_of(source.stream, source.parameters) if origins else None
    found: PositionSums | None = None
    for block in blocks:
        if found is None:
            count = min(MOST_POSITIONS, first_length(block)) if positions is None else positions
            first = 0 if include_first else 1
            found = PositionSums(source.stream, count, first=first, norms=norms, factors=factors, origins=origins)
        found.update(block)
    if found is None or not found.docs:
        raise MissingDataError(
            f"no document or window of {source.description} has {positions} positions: ask for fewer"
        )
    return found


def first_length(block: Block) -> int:
    """Return how many tokens the first document or window of a block has."""
    ends = torch.nonzero(block.position[1:] <= block.position[:-1])
    return int(ends[0]) + 1 if len(ends) else len(block.position)


def split(sums: PositionSums, state: int, first: int | None = None) -> Split:
    """Return the energies of a state (two-way analysis of variance).

    Args:
        sums: what was added up.
        state: which state.
        first: the first position that counts; by default that of the sums.

    Raises:
        MissingDataError: fewer than two documents or positions.
    """
    start = sums.first if first is None else first
    docs, count = sums.docs, sums.positions - start
    if docs < 2 or count < 2:
        raise MissingDataError(
            f"the positional part is an average over documents: {docs} documents with {count} positions that count are "
            "too few. Use more text, or shorter windows"
        )
    table = sums.sums[state][start:] / docs
    mean = table.mean(0)
    parts = table - mean
    energy = docs * count * float(mean.square().sum())
    position = docs * float(parts.square().sum())
    context = float(sums.doc_squares[state][0 if start == sums.first else 1]) / count - energy
    rest = float(sums.squares[state][start:].sum()) - energy - position - context
    return Split(energy, position, max(context, 0.0), max(rest, 0.0), docs, count, parts)


def null_band(sums: PositionSums, state: int, own: Split, share: float = 0.95) -> tuple[float, float]:
    """Return the central interval of `Split.share` if each document's positions stood in random order.

    Under random permutations within each document, the mean and the variance of the positional energy follow exactly
    from the scatter matrices of the documents (the permuted sums of Hoeffding 1951). The quantiles are those of the
    gamma distribution with these two moments, by the cube-root approximation of Wilson and Hilferty (1931). In a
    stream wider than `WHOLE_WIDTH` the variance comes from a sketch, which may change the width of the band by a tenth.
    """
    within = own.position + own.rest
    mean = within / own.docs
    pairs = float(sums.scatter[state].square().sum() - sums.own_scatter[state])
    variance = max(2 * pairs / (own.docs**2 * (own.positions - 1)), 0.0)
    if not variance or not own.total:
        return 0.0, 0.0
    spread = variance / (9 * mean**2)
    bounds = []
    for tail in ((1 - share) / 2, (1 + share) / 2):
        energy = mean * max(1 - spread + NormalDist().inv_cdf(tail) * spread**0.5, 0.0) ** 3
        bounds.append((own.docs * energy - within) / ((own.docs - 1) * own.total))
    return bounds[0], bounds[1]


def relative_norm(sums: PositionSums, state: int, own: Split) -> float:
    """Return ||P||_2 / ||M||_2 of Song & Zhong (2023): P the positional part, M all but the rest, spectral norms.

    M has a row for each document and position; its Gram matrix is docs * P^T P plus positions * (the sum of the outer
    products of the documents' means), the latter from a sketch (Nystroem) in a wide stream.
    """
    product = sums.doc_products[state]
    sketch = _sketch(product.shape[0], product.device)
    core, basis = torch.linalg.eigh(sketch.T @ product)
    kept = core > core[-1] * 1e-12
    root = (product @ basis[:, kept]) * core[kept].rsqrt()
    position = own.parts * own.docs**0.5
    both = torch.cat([position, root.T * own.positions**0.5])
    return float(torch.linalg.matrix_norm(position, 2) / torch.linalg.matrix_norm(both, 2))
