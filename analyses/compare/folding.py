"""What is kept of two captures while they are gone through: sums from which differences and their intervals follow."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from streamlens.analyses.norms.accumulate import ContributionNorms
from streamlens.analyses.norms.measures import MEASURES
from streamlens.analyses.sampling import Ints, some_rows
from streamlens.analyses.source import CaptureSource
from streamlens.analyses.statistics import DocumentSums, Floats, ends_of
from streamlens.block import Block
from streamlens.replay import widest

COMPARED = tuple(measure for measure in MEASURES if measure != "logit_attribution")
"""The measures that a file alone gives."""


@dataclass(frozen=True)
class Differences:
    """Means of the same series in two captures, and how they differ; all (*series,) float64."""

    first: Floats
    second: Floats
    low: Floats
    high: Floats
    """Ends of the 95 % interval of `difference`."""

    @property
    def difference(self) -> Floats:
        """Second less first."""
        return self.second - self.first

    def at(self, *index: int) -> dict[str, float]:
        """Return the columns of one of the series."""
        names = ("first", "second", "difference", "low", "high")
        return {name: float(getattr(self, name)[index]) for name in names}


def same_tokens(first: CaptureSource, second: CaptureSource) -> bool:
    """Tell whether two captures saw the same tokens at the same positions of the same documents, and nothing else."""
    captures = first.capture, second.capture
    one, two = (capture.tokens for capture in captures)
    same = all(torch.equal(getattr(one, name), getattr(two, name)) for name in ("id", "doc", "position"))
    # A model that takes no tokens has none to compare: -1 everywhere says nothing.
    if not same or not bool((one.id >= 0).all()):
        return False
    if all(len(c.anatomy.streams) == 1 and not json.loads(str(c.attrs.get("further_inputs", "[]"))) for c in captures):
        return True
    # The tokens in the file are those of one stream: what else went in is known by its hash alone.
    return len({str(capture.attrs["text_sha256"]) for capture in captures}) == 1


def differences(
    first: DocumentSums, second: DocumentSums, pairs: Sequence[tuple[int, int]] | None = None
) -> Differences:
    """Return the differences of means; paired where both were drawn with the same seed (see `Resampled`).

    Args:
        first: sums of one capture.
        second: sums of the other.
        pairs: which series of each, along the first axis; by default they are the same.
    """
    rows: tuple[list[int] | slice, ...] = (slice(None), slice(None))
    if pairs is not None:
        rows = [i for i, _ in pairs], [j for _, j in pairs]
    (mean, drawn), (other_mean, other_drawn) = (
        (sums.mean[at], sums.drawn[at]) if sums.shape else (sums.mean, sums.drawn)
        for sums, at in zip((first, second), rows, strict=True)
    )
    return Differences(mean, other_mean, *ends_of(other_drawn - drawn))


class Side:
    """One of the two captures."""

    def __init__(self, source: CaptureSource, seed: int) -> None:
        """Prepare the sums; the seed of the draws is the other side's where both are paired."""
        self.norms = ContributionNorms(source)
        self._kept = [MEASURES.index(measure) for measure in COMPARED]
        self.sums = DocumentSums(len(self.norms.contributions), len(COMPARED), seed=seed)
        self.loss = DocumentSums(seed=seed)
        output = source.capture.output
        self._summary = (output["lse"], output["target_logit"]) if "lse" in output else None
        self.tells_loss = self._summary is not None

    def update(self, block: Block) -> None:
        """Fold one block in."""
        table = self.norms.update(block)[:, self._kept]
        self.sums.add(torch.where(block.position > 0, table, torch.nan), block.doc, block.window)
        if self._summary is not None:
            lse, target = (rows[block.start : block.stop].double() for rows in self._summary)
            self.loss.add(torch.where(block.position > 0, lse - target, torch.nan), block.doc, block.window)


class Moved:
    """How far the vectors of one capture lie from those of another, token by token.

    Series, for each of the K + 1 states and then for each write: |v - u| / |u| and the cosine of u and v, with u of the
    first capture and v of the second. They mean something where the two models share their coordinates: one was
    trained on from the other, say. Two trainings from other weights give cosines around 0.
    """

    def __init__(self, states: int, writes: int) -> None:
        """Prepare the sums."""
        self._states, self._count = states, states + writes
        self.sums = DocumentSums(self._count, 2)

    def update(self, first: Block, second: Block) -> None:
        """Fold in two blocks of the same tokens."""
        table = torch.empty(self._count, 2, first.stop - first.start, dtype=torch.float64)
        for index in range(self._count):
            s = index - self._states
            pair = [block.states[index] if s < 0 else block.writes[s] for block in (first, second)]
            wide = widest([torch.float32, *(vectors.dtype for vectors in pair)])
            u, v = (vectors.to(wide) for vectors in pair)
            uu, vv, uv = (torch.linalg.vecdot(a, b).double() for a, b in ((u, u), (v, v), (u, v)))
            away = v - u
            table[index, 0] = (torch.linalg.vecdot(away, away).double() / uu).sqrt()
            table[index, 1] = uv / (uu * vv).sqrt()
        table[~table.isfinite()] = torch.nan  # a vector of zeros has neither
        self.sums.add(torch.where(first.position > 0, table, torch.nan), first.doc, first.window)


class StateSample:
    """Some states of some tokens, for what needs all tokens at once."""

    def __init__(self, states: Sequence[int], d_model: int, tokens: Ints) -> None:
        """Say which states, how wide they are, and which tokens by number, in rising order."""
        self._states, self._tokens = tuple(states), torch.from_numpy(tokens)
        # Made once: small pieces, kept from block to block, would hold on to the memory of the large ones between them.
        self.tables = torch.empty(len(self._states), len(tokens), d_model)
        """(state, sampled token, d_model) float32."""

    def update(self, block: Block) -> None:
        """Fold one block in."""
        first, last = torch.searchsorted(self._tokens, torch.tensor([block.start, block.stop])).tolist()
        inside = self._tokens[first:last] - block.start
        for table, k in zip(self.tables, self._states, strict=True):
            table[first:last] = block.states[k][inside]


def together(first: Iterator[Block], second: Iterator[Block]) -> Iterator[tuple[Block, Block]]:
    """Yield two streams over the same tokens in blocks of the same tokens, however each was cut.

    Both end where the next window begins: blocks hold whole windows.
    """
    one, two = next(first, None), next(second, None)
    while one is not None and two is not None:
        start, stop = max(one.start, two.start), min(one.stop, two.stop)
        yield _cut(one, start, stop), _cut(two, start, stop)
        one = next(first, None) if one.stop == stop else one
        two = next(second, None) if two.stop == stop else two


def _cut(block: Block, start: int, stop: int) -> Block:
    if (block.start, block.stop) == (start, stop):
        return block
    return some_rows(block, torch.arange(start - block.start, stop - block.start), start)
