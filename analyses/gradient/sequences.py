"""What both gradient analyses accumulate: some numbers of each sequence, and means over them with intervals."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamlens.analyses.gradient.graph import Graph, Objective, graphs, objective_of
from streamlens.analyses.sampling import sampled
from streamlens.analyses.source import Source, watched
from streamlens.analyses.statistics import DocumentSums, Floats, Unit
from streamlens.block import Block
from streamlens.errors import MissingDataError, UsageError
from streamlens.wording import counted

Ints = NDArray[np.int64]

_ROOM = 256
"""For so many sequences there is room from the start."""


@dataclass(frozen=True)
class Table:
    """Numbers of each sequence.

    >>> table = Table({}, doc=np.array([0, 0]), window=np.array([0, 8]))
    >>> mean, low, high = table.mean(np.array([1.0, 3.0]))
    >>> float(mean), float(low), float(high), table.unit
    (2.0, 1.0, 3.0, 'window')
    """

    sums: dict[str, Floats]
    """(sequence, ..., 2) by name: over position 0, and over the later ones. The loss is (sequence,)."""
    doc: Ints
    """(sequence,) number of the document that each comes from."""
    window: Ints
    """(sequence,) number of its first token."""

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(np.unique(self.doc))

    @property
    def unit(self) -> Unit:
        """What intervals are over: documents, or windows where these are few."""
        return self._resampled(np.zeros(len(self.doc))).unit

    def mean(self, values: Floats) -> Floats:
        """Return the mean over sequences with its 95 % interval, (*series, 3): mean, low, high.

        Args:
            values: (sequence, *series); what is not finite leaves that sequence out of that series.
        """
        sums = self._resampled(np.where(np.isfinite(values), values, np.nan))
        return np.stack([sums.mean, *sums.intervals()], axis=-1)

    def _resampled(self, values: Floats) -> DocumentSums:
        sums = DocumentSums(*values.shape[1:])
        doc, window = torch.from_numpy(self.doc), torch.from_numpy(self.window)
        sums.add(torch.from_numpy(np.moveaxis(values, 0, -1)), doc, window)
        return sums


@dataclass
class Sequences(ABC):
    """Some numbers of each sequence of a source. A sequence is a window, or a document that was kept whole.

    Args:
        source: where the blocks come from; nothing is run yet.
        at_once: how many sequences share a graph.

    Raises:
        UsageError: less than one sequence at a time.
    """

    source: Source
    at_once: int
    objective: Objective = field(default="pooled_norm", init=False)
    sums: dict[str, Floats] = field(default_factory=dict, init=False)
    """(sequence, ...) by name, with room for more: one small array for each sequence, made between the large ones of
    its graph, would keep the memory of these from being given back."""
    doc: list[int] = field(default_factory=list, init=False)
    window: list[int] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.at_once < 1:
            raise UsageError("at least one sequence has to be run at a time")

    def update(self, block: Block) -> None:
        """Run the sequences of a block and fold them in."""
        docs, positions = block.shape
        self.objective = objective_of(self.source, block)
        start = len(self.doc)
        self.doc += block.doc.reshape(docs, positions)[:, 0].tolist()
        self.window += block.window.reshape(docs, positions)[:, 0].tolist()
        for graph in graphs(self.source, block, self.at_once):
            table = {name: _sequences_first(values) for name, values in self._measure(graph).items()}
            table["loss"] = graph.losses.detach().double().cpu().numpy()
            self._store(table, start)
            start += len(table["loss"])
            del graph  # or its memory would still be held while the next one is made

    def merge(self, other: Sequences) -> None:
        """Fold another partial result in, of other sequences of the same source."""
        self.objective = other.objective if not self.doc else self.objective
        self._store({name: values[: len(other.doc)] for name, values in other.sums.items()}, len(self.doc))
        self.doc += other.doc
        self.window += other.window

    def _store(self, table: dict[str, Floats], start: int) -> None:
        """Put the numbers of some sequences in place; room is doubled where there is none."""
        for name, values in table.items():
            stop, kept = start + len(values), self.sums.get(name)
            if kept is None or len(kept) < stop:
                larger = np.empty((max(_ROOM, 2 * stop), *values.shape[1:]))
                if kept is not None:
                    larger[:start] = kept[:start]
                self.sums[name] = kept = larger
            kept[start:stop] = values

    def table(self) -> Table:
        """Return the numbers of all sequences that have a gradient.

        Raises:
            MissingDataError: there is no such sequence.
        """
        joined = {name: values[: len(self.doc)] for name, values in self.sums.items()}
        moved = joined["energy"].reshape(len(self.doc), -1).sum(-1) > 0 if joined else np.zeros(0, bool)
        if not moved.any():
            raise MissingDataError(
                "no sequence has a gradient: each needs at least two tokens, so that one has a target"
            )
        doc, window = (np.array(numbers, np.int64)[moved] for numbers in (self.doc, self.window))
        return Table({name: values[moved] for name, values in joined.items()}, doc, window)

    def title(self, what: str, table: Table) -> str:
        """Say what was measured, where, and what the intervals are over."""
        over = counted(table.documents if table.unit == "document" else len(table.doc), table.unit)
        return f"{what}, {self.source.stream.name}: {self.source.description}; 95 % intervals over {over}"

    @abstractmethod
    def _measure(self, graph: Graph) -> dict[str, Tensor]:
        """Return the sums of each sequence by name, each (..., doc, 2)."""


def sequences_of(source: Source, count: int | None) -> Source:
    """Return a source of so many sequences, evenly spread: those of one token have nothing behind position 0.

    Raises:
        MissingDataError: no sequence has two tokens.
        UsageError: a count below 1.
    """
    return sampled(source, count, least=2)


def run_through(found: Sequences, label: str, progress: bool) -> None:
    """Fold in all blocks of the source."""
    for block in watched(found.source, label, progress=progress):
        found.update(block)


def _sequences_first(values: Tensor) -> Floats:
    """From (..., sequence, place) on any device to (sequence, ..., place) float64."""
    array: Floats = values.double().cpu().numpy()
    return np.moveaxis(array, -2, 0)
