"""Tokens -> windows: the rows that a model is shown, cut so that no padding is ever needed.

A window is a run of tokens of one document, given to the model as one row. By default all windows have the same
length and a document's tail, too short for a window, is left out and counted; `ragged` keeps every document whole
and sorts the windows by length. Either way a batch holds windows of one length only, so every row that is captured
is a real token seen in its real context.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from streamlens.corpus.documents import (
    BUILTIN_TEXT,
    IntArray,
    Text,
    builtin_documents,
    checked_text,
    id_documents,
    random_tokens,
    read_documents,
)
from streamlens.errors import CorpusError, UsageError
from streamlens.wording import counted

if TYPE_CHECKING:
    from streamlens.checkpoint.model import Model, Tokenizer

DEFAULT_WINDOW = 256
"""Tokens per window when the user names none; a model with a lower limit gets its limit."""

DEFAULT_MAX_TOKENS = 16_384
"""Tokens taken from the built-in text, or drawn at random, when the user names neither a text nor a number."""

MIN_WINDOW = 2
"""A window of one token has neither context nor a next token."""


@dataclass(frozen=True)
class Batch:
    """Windows of one length that are run together: rows `start` to `stop` of the token axis."""

    index: int
    """Number of the batch, from 0."""
    start: int
    """First row on the token axis."""
    count: int
    """How many windows."""
    length: int
    """Tokens in each window."""

    @property
    def stop(self) -> int:
        """The row after the last one."""
        return self.start + self.count * self.length


@dataclass(frozen=True, eq=False)
class Windows:
    """All windows of a corpus, one after another on the token axis.

    Raises:
        ValueError: the arrays do not describe the same tokens.

    >>> windows = windows_from_ids([[5, 6, 7, 8]], window=2)
    >>> len(windows), windows.n_tokens, windows.position.tolist()
    (2, 4, [0, 1, 0, 1])
    >>> windows.batches(batch_tokens=4)
    [Batch(index=0, start=0, count=2, length=2)]
    """

    ids: IntArray
    """(token,) token ids."""
    doc: NDArray[np.int32]
    """(token,) number of the document in the source, empty documents counted."""
    position: NDArray[np.int32]
    """(token,) position within the window, which is the position that the model sees."""
    lengths: IntArray
    """(window,) tokens in each window."""
    description: str
    """Where the tokens come from, for people."""
    notes: tuple[str, ...] = ()
    """What the user must be told: tokens left out, documents cut, a fallback taken."""
    sha256: str = field(init=False)
    """Hash over lengths, ids, documents and positions: two equal hashes are the same rows in the same order."""

    def __post_init__(self) -> None:
        """Check that the arrays fit each other and hash them."""
        if not self.ids.shape == self.doc.shape == self.position.shape == (int(self.lengths.sum()),):
            raise ValueError(
                f"ids {self.ids.shape}, doc {self.doc.shape}, position {self.position.shape} and lengths (which sum "
                f"to {int(self.lengths.sum())}) must describe the same tokens"
            )
        digest = hashlib.sha256()
        for values in (self.lengths, self.ids, self.doc, self.position):
            digest.update(np.ascontiguousarray(values, dtype="<i8").tobytes())
        object.__setattr__(self, "sha256", digest.hexdigest())

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.lengths)

    @property
    def n_tokens(self) -> int:
        """Number of tokens in all windows."""
        return len(self.ids)

    def batches(self, batch_tokens: int) -> list[Batch]:
        """Neighbouring windows of equal length, as many as fit into `batch_tokens`, at least one.

        Raises:
            UsageError: `batch_tokens` is below 1.
        """
        if batch_tokens < 1:
            raise UsageError(f"batch_tokens is {batch_tokens}: a batch needs at least 1 token")
        batches: list[Batch] = []
        start = 0
        edges = np.flatnonzero(np.diff(self.lengths)) + 1
        for run in np.split(self.lengths, edges) if len(self) else []:
            length, left = int(run[0]), len(run)
            while left:
                count = min(left, max(1, batch_tokens // length))
                batches.append(Batch(len(batches), start, count, length))
                start, left = batches[-1].stop, left - count
        return batches

    def batch_ids(self, batch: Batch) -> torch.Tensor:
        """The token ids of a batch, (doc position), a copy of type int64."""
        rows = self.ids[batch.start : batch.stop].copy()
        return torch.from_numpy(rows).reshape(batch.count, batch.length)


@dataclass(frozen=True)
class _Piece:
    """A run of tokens cut from one document."""

    doc: int
    ids: IntArray


@dataclass
class _Tally:
    """What cutting met on its way, for the notes and the errors."""

    documents: int = 0
    empty: int = 0
    cut: int = 0
    longest: int = 0
    tails: list[_Piece] = field(default_factory=list)

    @property
    def tail_tokens(self) -> int:
        return sum(len(tail.ids) for tail in self.tails)


def windows_from_text(
    documents: str | Iterable[str],
    tokenizer: Tokenizer,
    *,
    window: int | None = None,
    max_tokens: int | None = None,
    ragged: bool = False,
    limit: int | None = None,
    vocab_size: int | None = None,
    description: str = "text",
) -> Windows:
    """Encode documents, one at a time and no more of them than needed, and cut them into windows.

    Args:
        documents: one text, or any iterable of texts; each is a document.
        tokenizer: the model's own tokenizer.
        window: tokens per window; None takes DEFAULT_WINDOW or the model's limit, and keeps documents whole where
            not one of them fills that.
        max_tokens: take the first windows up to so many tokens (whole windows, at least one).
        ragged: keep every document whole, cutting only at `window` (where it is given) or at `limit`.
        limit: the most positions that the model can take.
        vocab_size: rows of the model's embedding; a token id beyond it is an error.
        description: where the text comes from.

    Raises:
        CorpusError: no tokens, ids beyond the vocabulary, text that is not valid Unicode, or an impossible window.
    """
    encoded = _encoded(documents, tokenizer)
    return _windows(encoded, _Plan(window, max_tokens, ragged, limit, vocab_size), description)


def windows_from_ids(
    ids: Any,
    *,
    window: int | None = None,
    max_tokens: int | None = None,
    ragged: bool = False,
    limit: int | None = None,
    vocab_size: int | None = None,
    description: str = "token ids",
) -> Windows:
    """Cut documents that are token ids already; the other arguments are those of `windows_from_text`.

    `ids` is a tensor or array, 1-d (one document) or 2-d (each row a document), a list of ids, or a list of
    documents of any lengths.

    Raises:
        CorpusError: as in `windows_from_text`; also ids that are negative, or not integers.

    >>> windows_from_ids([[1, 2, 3], [4]], ragged=True).lengths.tolist()
    [1, 3]
    """
    return _windows(id_documents(ids), _Plan(window, max_tokens, ragged, limit, vocab_size), description)


def windows_for(
    model: Model,
    *,
    documents: Text | None = None,
    ids: Any = None,
    description: str | None = None,
    window: int | None = None,
    max_tokens: int | None = None,
    ragged: bool = False,
    seed: int = 0,
) -> Windows:
    """Windows that fit a model: of a text, of token ids, or of what there is when neither is given.

    A string is a document as it stands; a `Path` is read (`text_documents`, `load_ids`). With neither, the built-in
    English text is used, or seeded random tokens for a model without a tokenizer, up to DEFAULT_MAX_TOKENS; the notes
    say so.

    Raises:
        UsageError: both a text and ids; a text for a model without a tokenizer; a model that takes no token ids.
        CorpusError: as in `windows_from_text`.
    """
    notes: tuple[str, ...] = ()
    if documents is None and ids is None:
        max_tokens = DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens
        if model.tokenizer is not None:
            documents, description = builtin_documents(), BUILTIN_TEXT
        elif model.vocab_size is not None:
            ids, description = random_tokens(model.vocab_size, max_tokens, seed), f"random tokens (seed {seed})"
        else:
            raise UsageError(f"{model.source} takes no token ids, so there is no text to show it: pass its inputs")
        notes = (f"no text was given: {description}, at most {max_tokens:,} tokens",)
    plan = _Plan(window, max_tokens, ragged, model.max_positions, model.vocab_size)
    if documents is None:
        return _windows(id_documents(ids), plan, description or "token ids", notes)
    if ids is not None:
        raise UsageError("both a text and token ids are given: choose one of them")
    if model.tokenizer is None:
        raise UsageError(f"{model.source} has no tokenizer, so text cannot be encoded for it: pass token ids")
    return _windows(_encoded(read_documents(documents), model.tokenizer), plan, description or "text", notes)


@dataclass(frozen=True)
class _Plan:
    """What was asked for, checked before any text is read."""

    window: int | None
    max_tokens: int | None
    ragged: bool
    limit: int | None
    vocab_size: int | None

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UsageError(f"max_tokens is {self.max_tokens}: a corpus needs at least 1 token")
        if self.window is None:
            return
        if self.window < MIN_WINDOW:
            raise CorpusError(f"a window of {self.window} is too short: choose a window of {MIN_WINDOW} tokens or more")
        if self.limit is not None and self.window > self.limit:
            raise CorpusError(
                f"a window of {self.window:,} tokens is longer than the {self.limit:,} positions that this model "
                f"has: choose a window of {self.limit:,} or less"
            )

    @property
    def length(self) -> int | None:
        """Where documents are cut; None keeps them whole whatever their length."""
        if self.window is not None:
            return self.window
        if self.ragged:
            return self.limit
        return DEFAULT_WINDOW if self.limit is None else min(DEFAULT_WINDOW, self.limit)


def _encoded(documents: str | Iterable[str], tokenizer: Tokenizer) -> Iterator[IntArray]:
    """The token ids of each document, (token,), encoded when it is asked for."""
    for number, text in enumerate([documents] if isinstance(documents, str) else documents):
        yield np.asarray(tokenizer.encode(checked_text(text, number)), dtype=np.int64)


def _windows(documents: Iterable[IntArray], plan: _Plan, description: str, notes: tuple[str, ...] = ()) -> Windows:
    tally = _Tally()
    pieces = _first(_pieces(documents, plan, tally), plan.max_tokens)
    if not pieces:
        if not tally.longest:
            raise CorpusError(_no_tokens(description, tally))
        if plan.window is not None:
            raise CorpusError(
                f"no document of {description} fills a window of {plan.window:,} tokens (the longest has "
                f"{tally.longest:,}): choose a shorter window, or keep documents whole with --ragged"
            )
        # No document filled a window, so every tail is a whole document.
        pieces, tally.tails = _first(tally.tails, plan.max_tokens), []
        notes = (
            *notes,
            f"no document fills a window of {plan.length:,} tokens (the longest has {tally.longest:,}): "
            "documents are kept whole",
        )
    pieces.sort(key=lambda piece: len(piece.ids))
    lengths = np.array([len(piece.ids) for piece in pieces], dtype=np.int64)
    ids = np.concatenate([piece.ids for piece in pieces])
    _check_vocabulary(ids, plan.vocab_size, description)
    starts = np.cumsum(lengths) - lengths
    return Windows(
        ids=ids,
        doc=np.repeat(np.array([piece.doc for piece in pieces], dtype=np.int32), lengths),
        position=(np.arange(len(ids)) - np.repeat(starts, lengths)).astype(np.int32),
        lengths=lengths,
        description=description,
        notes=(*notes, *_notes(plan, tally, len(ids))),
    )


def _pieces(documents: Iterable[IntArray], plan: _Plan, tally: _Tally) -> Iterator[_Piece]:
    """Cut documents one by one; tails go to the tally unless the plan is ragged."""
    for number, ids in enumerate(documents):
        size = plan.length or max(1, len(ids))
        tally.documents += 1
        tally.empty += len(ids) == 0
        tally.cut += len(ids) > size
        tally.longest = max(tally.longest, len(ids))
        for start in range(0, len(ids), size):
            piece = _Piece(number, np.asarray(ids[start : start + size], dtype=np.int64))
            if plan.ragged or len(piece.ids) == size:
                yield piece
            else:
                tally.tails.append(piece)


def _first(pieces: Iterable[_Piece], max_tokens: int | None) -> list[_Piece]:
    """The first pieces that hold no more than `max_tokens` together, at least one where there is one."""
    if max_tokens is None:
        return list(pieces)
    taken: list[_Piece] = []
    left = max_tokens
    for piece in pieces:
        left -= len(piece.ids)
        if taken and left < 0:
            break
        taken.append(piece)
        if left <= 0:
            break
    return taken


def _check_vocabulary(ids: IntArray, vocab_size: int | None, description: str) -> None:
    smallest, largest = int(ids.min()), int(ids.max())
    if smallest < 0:
        raise CorpusError(f"{description} holds the token id {smallest}: ids start at 0 (is it a padding mark?)")
    if vocab_size is not None and largest >= vocab_size:
        raise CorpusError(
            f"{description} holds the token id {largest:,}, but this model's vocabulary has {vocab_size:,} entries: "
            "the tokenizer that made it belongs to another model"
        )


def _no_tokens(description: str, tally: _Tally) -> str:
    if not tally.documents:
        return f"{description} holds no documents: give it at least one with some text in it"
    return f"{description} holds no tokens, not one in {counted(tally.documents, 'document')}: give it some text"


def _notes(plan: _Plan, tally: _Tally, kept: int) -> Iterator[str]:
    if tally.tails:
        share = 100 * tally.tail_tokens / (tally.tail_tokens + kept)
        yield (
            f"left out {tally.tail_tokens:,} tokens ({share:.0f} %) in tails shorter than the window: "
            "--ragged keeps them"
        )
    if tally.empty:
        yield f"empty documents skipped: {tally.empty:,}"
    if plan.ragged and tally.cut:
        reason = "the window" if plan.window is not None else "the model's limit"
        yield f"documents longer than {plan.length:,} tokens ({reason}), cut into several windows: {tally.cut:,}"
    if plan.max_tokens is not None and kept > plan.max_tokens:
        yield f"took one whole window of {kept:,} tokens, more than the {plan.max_tokens:,} asked for"
