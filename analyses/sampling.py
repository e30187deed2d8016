"""Some windows of a source, spread evenly over all of it: for analyses that cannot, or need not, look at every token.

A window is a run of tokens that the model sees at once: a piece of a document, or a document that was kept whole.
Windows need not be equally long. What is left out is not run either, and the source that is left says in its
description how many windows it holds, so a title tells what was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamlens.analyses.source import CaptureSource, LiveSource, Source
from streamlens.anatomy import Anatomy, Stream
from streamlens.block import Block, LazyRows, LazyTable
from streamlens.calling import Inputs
from streamlens.checkpoint.model import Model
from streamlens.errors import MissingDataError, UsageError
from streamlens.recorder.feed import Load, select_docs
from streamlens.recorder.plan import Plan

Ints = NDArray[np.int64]


def sampled(source: Source, count: int | None, *, least: int = 1) -> Source:
    """Return a source of at most `count` windows of another, every so many windows of it.

    Every window that is long enough counts alike, wherever it stands and however long it is.

    Args:
        source: a capture or a live model.
        count: how many windows, at most; None for all that are long enough.
        least: leave shorter windows out (tokens).

    Returns:
        The source itself, where all of its windows are in the sample.

    Raises:
        MissingDataError: no window is long enough.
        UsageError: a count below 1.

    Example:
        >>> from fixtures import zoo
        >>> from streamlens.analyses.source import source_of
        >>> live = source_of(zoo.build("gpt2").module, tokens=[[1, 2, 3]] * 9 + [[4, 5, 6, 7]] * 9, window=None)
        >>> some = sampled(live, 6)
        >>> window_lengths(some).tolist(), some.n_tokens
        ([3, 3, 3, 4, 4, 4], 21)
    """
    if count is not None and count < 1:
        raise UsageError("at least one window has to be looked at")
    lengths = window_lengths(source)
    enough = np.flatnonzero(lengths >= least)
    if not len(enough):
        raise MissingDataError(
            f"no document or window of {source.description} has {least} positions: the longest has "
            f"{lengths.max(initial=0)}, ask for fewer"
        )
    chosen = enough if count is None else enough[spread(len(enough), count)]
    if len(chosen) == len(lengths):
        return source
    windows = _Chosen(np.cumsum(lengths) - lengths, lengths, chosen)
    if isinstance(source, LiveSource):
        return LiveSource(source.model, _plan_of_some(source, windows), source.name)
    if isinstance(source, _SomeOfASource):  # number them as the whole source does
        return _SomeOfASource(source.source, replace(source.windows, chosen=source.windows.chosen[chosen]))
    return _SomeOfASource(source, windows)


def spread(total: int, count: int) -> Ints:
    """Return (min(total, count),) indices below `total` in rising order, at distances as equal as integers can be.

    >>> spread(10, 4).tolist(), spread(3, 9).tolist()
    ([2, 4, 7, 9], [0, 1, 2])
    """
    count = min(total, count)
    return -(-(np.arange(1, count + 1, dtype=np.int64) * total) // max(count, 1)) - 1


def window_lengths(source: Source) -> Ints:
    """Return (window,) the tokens of every window, in the order in which they come."""
    if isinstance(source, _SomeOfASource):
        return source.windows.lengths[source.windows.chosen]
    doc, position = _doc_and_position(source)
    lengths: Ints = np.diff(_starts(position), append=len(doc))
    return lengths


def window_documents(source: Source) -> Ints:
    """Return (window,) the number of the document that every window is of."""
    doc, position = _doc_and_position(source)
    documents: Ints = doc[_starts(position)].astype(np.int64)
    return documents[source.windows.chosen] if isinstance(source, _SomeOfASource) else documents


def _doc_and_position(source: Source) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Document and position of each token, where they are known before anything is run; else it is run."""
    if isinstance(source, _SomeOfASource):
        source = source.source
    if isinstance(source, LiveSource):
        feed, kept = source.plan.feed, source.plan.keep
        return feed.doc[kept], feed.position[kept]
    if isinstance(source, CaptureSource):
        tokens = source.capture.tokens
        return tokens.doc.numpy(), tokens.position.numpy()
    each = [(block.doc.numpy(), block.position.numpy()) for block in source.blocks()]
    return np.concatenate([doc for doc, _ in each]), np.concatenate([position for _, position in each])


def _starts(position: NDArray[np.int32]) -> Ints:
    return np.flatnonzero(np.diff(position, prepend=position[:1]) <= 0)


def usual_length(source: Source, most: int) -> int:
    """Return a number of positions that at least half of the windows have: their median length, at most `most`."""
    lengths = np.sort(window_lengths(source))
    return min(most, int(lengths[(len(lengths) - 1) // 2]))


@dataclass(frozen=True)
class _Chosen:
    """Which windows of a source are in the sample."""

    starts: Ints
    """(window,) first token, of all windows."""
    lengths: Ints
    """(window,) tokens."""
    chosen: Ints
    """(sample,) indices of windows."""

    @property
    def tokens(self) -> int:
        """Tokens in the sample."""
        return int(self.lengths[self.chosen].sum())

    def within(self, start: int, stop: int) -> Ints:
        """Return the chosen windows that begin at these tokens."""
        starts = self.starts[self.chosen]
        return self.chosen[(starts >= start) & (starts < stop)]

    def __str__(self) -> str:
        return f"{len(self.chosen):,} of {len(self.lengths):,} windows"


def _plan_of_some(source: LiveSource, windows: _Chosen) -> Plan:
    """A plan that runs the chosen windows of each batch."""
    axis = 1 if source.anatomy.stream().position_first else 0
    feed = source.plan.feed
    loads: list[Load] = []
    rows: list[Ints] = []
    start = 0
    for load in feed.loads:
        kept = windows.within(load.start, load.start + load.docs * load.positions)
        if not len(kept):
            continue
        docs = ((windows.starts[kept] - load.start) // load.positions).tolist()
        loads.append(Load(start, len(docs), load.positions, _inputs_of_some(load, docs, axis)))
        rows += [np.arange(windows.starts[w], windows.starts[w] + load.positions) for w in kept]
        start += len(docs) * load.positions
    taken = np.concatenate(rows)
    cut = replace(
        feed,
        loads=tuple(loads),
        ids=feed.ids[taken],
        doc=feed.doc[taken],
        position=feed.position[taken],
        description=f"{feed.description}, {windows}",
    )
    return Plan(source.plan.pilot, cut, source.plan.choice)


def _inputs_of_some(load: Load, docs: list[int], axis: int) -> Callable[[], Inputs]:
    return lambda: select_docs(load.inputs(), docs, axis, load.docs)


@dataclass
class _SomeOfASource:
    """A source that is not run, of which some windows are looked at."""

    source: Source
    windows: _Chosen

    @property
    def anatomy(self) -> Anatomy:
        """The whole anatomy."""
        return self.source.anatomy

    @property
    def stream(self) -> Stream:
        """The stream that is analysed."""
        return self.source.stream

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Those of the whole source."""
        return self.source.parameters

    @property
    def n_tokens(self) -> int:
        """Number of tokens in the sample."""
        return self.windows.tokens

    @property
    def causal(self) -> bool:
        """Whether the stream is blind to later positions."""
        return self.source.causal

    @property
    def description(self) -> str:
        """Model, text and sample in one line."""
        whole = self.source.description.removesuffix(f", {self.source.n_tokens:,} tokens")
        return f"{whole}, {self.windows}, {self.n_tokens:,} tokens"

    @property
    def model(self) -> Model:
        """The model itself."""
        return self.source.model

    def blocks(self) -> Iterator[Block]:
        """Yield the chosen windows of each block; what is not chosen is not kept."""
        start = 0
        for block in self.source.blocks():
            kept = self.windows.within(block.start, block.stop)
            if len(kept):
                offsets = self.windows.starts[kept] - block.start
                pieces = [np.arange(a, a + n) for a, n in zip(offsets, self.windows.lengths[kept], strict=True)]
                cut = some_rows(block, torch.from_numpy(np.concatenate(pieces)), start)
                start = cut.stop
                yield cut

    def inputs(self, block: Block) -> Inputs:
        """Return the arguments of forward that give this block."""
        return self.source.inputs(block)


def some_rows(block: Block, rows: Tensor, start: int) -> Block:
    """Return a block of some rows of another, each tensor taken when it is asked for.

    Args:
        block: the block.
        rows: (token,) int64, rising.
        start: number of the first token of the new block.
    """

    def pick(tensor: Tensor) -> Tensor:
        return tensor if len(rows) == len(tensor) else tensor[rows.to(tensor.device)]

    return Block(
        start,
        start + len(rows),
        ids=pick(block.ids),
        doc=pick(block.doc),
        position=pick(block.position),
        parts=LazyRows(len(block.parts), lambda i: pick(block.parts[i])),
        states=LazyRows(len(block.states), lambda i: pick(block.states[i])),
        writes=LazyRows(len(block.writes), lambda i: pick(block.writes[i])),
        norms=LazyRows(len(block.norms), lambda i: (pick(block.norms[i][0]), pick(block.norms[i][1]))),
        mixes=LazyTable(tuple(block.mixes), lambda i: pick(block.mixes[i])),
    )
