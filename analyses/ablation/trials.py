"""Any number of trials over all blocks of a source: each block is run once for each trial, and forgotten."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from streamlens.analyses.ablation.runs import Runs, Setting, Spare, Trial, running
from streamlens.analyses.ablation.scores import PooledReference, Reference, Scores, Tally
from streamlens.analyses.source import Source, target_ids, watched
from streamlens.block import Block
from streamlens.errors import MissingDataError

Score = Callable[[int, Tensor], None]
"""Takes the index of a trial and its output."""

Play = Callable[[Runs, Score], None]
"""Runs all trials on one block and hands in their outputs, in any order."""


class Ablation:
    """Collects the scores of trials; what it keeps are a few sums for each window.

    Args:
        source: where blocks come from; asked for the inputs and targets of each.
        setting: what is the same for all blocks.
        trials: how many there are, or the trials themselves, each run by itself.
        play: how they are run, where they share work.
    """

    def __init__(
        self, source: Source, setting: Setting, trials: Sequence[Trial] | int, play: Play | None = None
    ) -> None:
        self._source = source
        self._setting = setting
        self._tally = Tally(trials if isinstance(trials, int) else len(trials))
        self._play = play or _one_by_one([] if isinstance(trials, int) else trials)
        self._spare = Spare()

    def update(self, block: Block) -> None:
        """Run every trial on one more block."""
        runs = Runs(self._setting, block, self._source.inputs(block), self._spare)
        docs, positions = runs.shape
        with running():
            output = runs.baseline()
            reference: Reference | PooledReference
            if self._setting.anatomy.head.vocab is None:
                reference = PooledReference(output)
                loss = None
            else:
                reference = Reference(output, self._targets(block, output))
                loss = reference.loss.reshape(output.shape[:-1])
            del output
            self._tally.begin(block.start, block.doc.reshape(docs, positions), loss)

            def score(index: int, changed: Tensor) -> None:
                self._tally.add(block.start, index, reference.compare(changed))

            self._play(runs, score)
            if self._setting.needs_spare:
                self._spare.keep(block)

    def merge(self, other: Ablation) -> None:
        """Fold another partial result of the same trials in."""
        self._tally.merge(other._tally)

    def result(self) -> Scores:
        """Return the scores of all blocks so far."""
        return self._tally.result()

    def _targets(self, block: Block, output: Tensor) -> Tensor:
        """(doc, position) targets; none where the output belongs to other tokens than the block's."""
        found = target_ids(self._source, block)
        if output.shape[:-1].numel() != len(found):
            return torch.full(output.shape[:-1], -1)
        return found.reshape(output.shape[:-1])


def _one_by_one(trials: Sequence[Trial]) -> Play:
    def play(runs: Runs, score: Score) -> None:
        for index, trial in enumerate(trials):
            score(index, trial.run(runs))

    return play


def measured(
    source: Source,
    setting: Setting,
    trials: Sequence[Trial] | int,
    label: str,
    *,
    play: Play | None = None,
    also: Callable[[Block], None] | None = None,
    progress: bool = True,
) -> Scores:
    """Run trials over a whole source.

    Args:
        source: where blocks come from.
        setting: what is the same for all blocks.
        trials: the trials, or how many `play` runs.
        label: the word in front of the progress bar.
        play: how the trials are run, where they share work.
        also: called with each block, for what is found without running the model.
        progress: whether to show the bar.

    Raises:
        MissingDataError: the capture does not hold what a run begins with.
    """
    ablation = Ablation(source, setting, trials, play)
    with explained():
        for block in watched(source, label, progress=progress):
            ablation.update(block)
            if also is not None:
                also(block)
    return ablation.result()


@contextmanager
def explained() -> Iterator[None]:
    """Add to an error about missing data what would work."""
    try:
        yield
    except MissingDataError as error:
        error.add_note(
            "A run begins at the state before what is dropped: capture the whole stream (without --layers, --kinds "
            "and --positions), or name the model instead of the capture."
        )
        raise


class MeanWrites:
    """The mean of every write over the text, for mode mean: without position 0, or for each position."""

    def __init__(self, sublayers: int, *, per_position: bool) -> None:
        """Start at nothing."""
        self._per_position = per_position
        self._sum: list[Tensor | None] = [None] * sublayers
        self._count = np.zeros(0)

    def update(self, block: Block) -> None:
        """Take one more block into account."""
        docs, positions = block.shape
        for index in range(len(self._sum)):
            write = block.writes[index].reshape(docs, positions, -1).double().sum(0)
            if not self._per_position:
                write = (write[1:] if positions > 1 else write).sum(0, keepdim=True)
            old = self._sum[index]
            self._sum[index] = write if old is None else _padded_sum(old, write)
        counted = np.full(positions, docs) if self._per_position else np.array([docs * max(positions - 1, 1)])
        size = max(len(self._count), len(counted))
        self._count = np.pad(self._count, (0, size - len(self._count))) + np.pad(counted, (0, size - len(counted)))

    def merge(self, other: MeanWrites) -> None:
        """Fold another partial result in."""
        for index, (own, theirs) in enumerate(zip(self._sum, other._sum, strict=True)):
            if own is None or theirs is None:
                self._sum[index] = theirs if own is None else own
            else:
                self._sum[index] = _padded_sum(own, theirs)
        size = max(len(self._count), len(other._count))
        self._count = np.pad(self._count, (0, size - len(self._count))) + np.pad(
            other._count, (0, size - len(other._count))
        )

    def result(self) -> Tensor:
        """(sublayer, 1 or position, d_model) float32."""
        sums = torch.stack([s for s in self._sum if s is not None])
        count = torch.from_numpy(self._count).to(sums.device)
        return (sums / count[None, :, None]).float()


def _padded_sum(first: Tensor, second: Tensor) -> Tensor:
    if len(first) < len(second):
        first, second = second, first
    first = first.clone()
    first[: len(second)] += second
    return first


def mean_writes(source: Source, *, per_position: bool, progress: bool) -> Tensor:
    """Return the mean of every write over a source, (sublayer, 1 or position, d_model) float32.

    Raises:
        MissingDataError: the capture does not hold all writes.
    """
    means = MeanWrites(len(source.stream.sublayers), per_position=per_position)
    with explained():
        for block in watched(source, "mean writes", progress=progress):
            means.update(block)
    return means.result()
