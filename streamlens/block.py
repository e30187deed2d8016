"""What every analysis is fed: some consecutive tokens of one stream, from a file or from a live run alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, overload

import torch
from torch import Tensor

from streamlens.errors import MissingDataError

Row = TypeVar("Row")

NormStatistics = tuple[Tensor, Tensor]
"""mean and rstd with which a norm treats each token, each (token,) float32, or float64 in a float64 model."""


_KEPT = 8
"""Rows that are kept at once: an analysis goes through a stream in order and looks back a step or two. More would be
the whole stream of the block, and memory that is new for each block costs more than reading a row twice."""


class LazyRows(Sequence[Row]):
    """A sequence of which each entry is fetched when it is asked for; the last few are kept."""

    def __init__(self, count: int, fetch: Callable[[int], Row]) -> None:
        """Say how many there are and how to fetch one."""
        self._fetch = fetch
        self._kept: dict[int, Row] = {}
        self._indices = range(count)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        """Return one, or a list of some."""
        if isinstance(index, slice):
            return [self[i] for i in self._indices[index]]
        place = self._indices[index]
        if place not in self._kept:
            if len(self._kept) >= _KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[place] = self._fetch(place)
        return self._kept[place]


class LazyTable(Mapping[int, Row]):
    """A mapping by sublayer index of which each entry is fetched when it is asked for."""

    def __init__(self, keys: Sequence[int], fetch: Callable[[int], Row]) -> None:
        """Say which entries there are and how to fetch one."""
        self._keys = tuple(keys)
        self._fetch = fetch

    def __getitem__(self, key: int) -> Row:
        """Return one entry."""
        if key not in self._keys:
            raise KeyError(key)
        return self._fetch(key)

    def __iter__(self) -> Iterator[int]:
        """Iterate over the keys."""
        return iter(self._keys)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._keys)


@dataclass(frozen=True)
class Block:
    """Some consecutive tokens of a stream, whole documents (or windows) only."""

    start: int
    stop: int
    ids: Tensor
    """(token,) int64; negative where the model takes no tokens."""
    doc: Tensor
    """(token,) int32."""
    position: Tensor
    """(token,) int32, within the document."""
    parts: Sequence[Tensor]
    """The embedding parts, in the order of `Stream.parts`; each (token, d_model)."""
    states: Sequence[Tensor]
    """x_0 ... x_K, one more than `Stream.steps`; each (token, d_model)."""
    writes: Sequence[Tensor]
    """One for each of `Stream.sublayers`; each (token, d_model)."""
    norms: Sequence[NormStatistics]
    """One for each of `Stream.norms`."""
    mixes: Mapping[int, Tensor]
    """Value mixes (token, heads * d_head) by sublayer index, those that were stored."""

    @property
    def window(self) -> Tensor:
        """(token,) int64, number of the first token of the window in which each token was run.

        >>> ids, doc = torch.arange(5), torch.zeros(5, dtype=torch.int32)
        >>> Block(8, 13, ids, doc, torch.tensor([0, 1, 2, 0, 1]), [], [], [], [], {}).window.tolist()
        [8, 8, 8, 11, 11]
        """
        starts = torch.zeros(len(self.position), dtype=torch.int64)
        edges = self._edges()
        starts[edges] = edges
        return self.start + starts.cummax(0).values

    def _edges(self) -> Tensor:
        """Where windows begin, but for the first."""
        return torch.nonzero(self.position[1:] <= self.position[:-1])[:, 0] + 1

    @property
    def shape(self) -> tuple[int, int]:
        """(docs, positions) of the rectangle that the tokens fill.

        Raises:
            MissingDataError: the documents are not equally long, or some of their positions were left out.
        """
        docs = len(self._edges()) + 1
        length = len(self.position) // docs
        whole = torch.arange(length, dtype=self.position.dtype).repeat(docs)
        first = self.position[:1]
        if len(self.position) != docs * length or not torch.equal(self.position - first, whole):
            raise MissingDataError(
                f"tokens {self.start} to {self.stop} are not whole windows of equal length: capture without --positions"
            )
        return docs, length
