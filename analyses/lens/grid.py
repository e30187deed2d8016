"""The lens token by token: the likeliest token at each state and position of one document."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamlens.analyses.result import Result
from streamlens.analyses.source import Source
from streamlens.analyses.statistics import Floats
from streamlens.block import Block
from streamlens.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH = 9


@dataclass(frozen=True)
class TokenTable(Result):
    """A table over some positions of one document, with a token of the vocabulary in each cell."""

    title: str
    doc: int
    labels: tuple[str, ...]
    """(row,) what was written last, or which part it is."""
    position: NDArray[np.int64]
    """(position,) within the document."""
    ids: NDArray[np.int64]
    """(position,) the token that is read there; negative where the model takes none."""
    targets: NDArray[np.int64]
    """(position,) the token that should be predicted; negative where there is none."""
    text: dict[int, str]
    """The tokens as text; without a tokenizer their numbers."""

    @property
    @abstractmethod
    def cells(self) -> NDArray[np.int64]:
        """(row, position) the token of each cell."""

    def word(self, token: int | np.int64) -> str:
        """Return a token as text, nothing where it is negative."""
        return self.text.get(int(token), "")

    def read(self) -> list[str]:
        """Return the tokens that are read, as they are shown, by position."""
        return [f"{p} {shown(self.word(t))}".rstrip() for p, t in zip(self.position, self.ids, strict=True)]

    def words(self) -> list[list[str]]:
        """Return the tokens of the cells as they are shown, by row and position."""
        return [[shown(self.word(t)) for t in row] for row in self.cells]

    def _with_words(self, rows: list[dict[str, Any]], columns: int) -> list[dict[str, Any]]:
        """Add to each row the words at the first positions."""
        words = self.words()
        for j in range(min(columns, len(self.position))):
            heading = f"{self.position[j]}:{shown(self.word(self.ids[j]))}"
            for i, row in enumerate(rows):
                row[heading] = words[i][j]
        return rows


@dataclass(frozen=True)
class LensGrid(TokenTable):
    """What the lens shows at each state and a few positions; a row is a state."""

    states: NDArray[np.int64]
    """(state,) index k of each x_k."""
    top: NDArray[np.int64]
    """(state, position) the likeliest token."""
    probability: Floats
    """(state, position) its probability."""

    @property
    def cells(self) -> NDArray[np.int64]:
        """(state, position) the likeliest token."""
        return self.top

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each state and position."""
        return [
            {
                "state": int(self.states[i]),
                "label": label,
                "position": int(self.position[j]),
                "token": self.word(self.ids[j]),
                "prediction": self.word(self.top[i, j]),
                "probability": float(self.probability[i, j]),
                "target": self.word(self.targets[j]),
                "hit": bool(self.top[i, j] == self.targets[j]),
            }
            for i, label in enumerate(self.labels)
            for j in range(len(self.position))
        ]

    def short_rows(self, columns: int = 6) -> list[dict[str, Any]]:
        """Return a table for the terminal: a row for each state, a column for each of the first positions."""
        rows = [{"state": int(k), "label": label} for k, label in zip(self.states, self.labels, strict=True)]
        return self._with_words(rows, columns)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the table with the probability as colour; a frame marks the token that came."""
        from streamlens.analyses.lens.drawing import plot_table

        return plot_table(self, ax)


def shown(text: str, width: int = _WIDTH) -> str:
    """Make white space visible and cut what is long.

    >>> shown(" the"), shown("internationally")
    ('␣the', 'internat…')
    """
    visible = text.replace(" ", "␣")
    visible = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in visible)
    return visible if len(visible) <= width else visible[: width - 1] + "…"


@dataclass(frozen=True)
class _Column:
    row: int
    """Of the whole token axis."""
    token: int
    target: int
    top: Tensor
    probability: Tensor


class GridKeeper:
    """Keeps the likeliest tokens of a few positions of the first window of one document.

    Args:
        doc: which document; None takes the first one.
        positions: which positions of it.
        demanded: whether it is a mistake if none of them is there.
    """

    def __init__(self, doc: int | None, positions: Sequence[int], *, demanded: bool = False) -> None:
        self._doc, self._asked, self._positions = doc, doc is not None, tuple(positions)
        self._demanded = demanded or self._asked
        self._there: set[int] = set()
        self._kept: dict[int, _Column] = {}
        self._seen = [np.inf, -np.inf]

    def add(self, block: Block, targets: Tensor, top: Tensor, probability: Tensor) -> None:
        """Keep what belongs to the document; `top` and `probability` are (state, token)."""
        if not self._positions:
            return
        first, last = int(block.doc.min()), int(block.doc.max())
        self._seen = [min(self._seen[0], first), max(self._seen[1], last)]
        if self._doc is None:
            self._doc = first
        wanted = torch.isin(block.position, torch.tensor(self._positions, dtype=block.position.dtype))
        self._there |= set(block.position[block.doc == self._doc].tolist())
        for place in torch.nonzero((block.doc == self._doc) & wanted)[:, 0].tolist():
            position = int(block.position[place])
            if position not in self._kept:
                token, target = int(block.ids[place]), int(targets[place])
                self._kept[position] = _Column(
                    block.start + place, token, target, top[:, place].clone(), probability[:, place].clone()
                )

    def merge(self, other: GridKeeper) -> None:
        """Take over what another has, as if it had seen all tokens in their order."""
        self._seen = [min(self._seen[0], other._seen[0]), max(self._seen[1], other._seen[1])]
        if not self._asked and other._doc is not None and (self._doc is None or other._doc < self._doc):
            self._doc, self._kept, self._there = other._doc, {}, set()
        if self._doc == other._doc:
            self._there |= other._there
            for position, column in other._kept.items():
                own = self._kept.get(position)
                self._kept[position] = column if own is None or column.row < own.row else own

    def result(self, title: str, states: Sequence[int], labels: tuple[str, ...], source: Source) -> LensGrid | None:
        """Return the grid, None where none was wanted.

        Raises:
            UsageError: the document or the positions are not there.
        """
        if not self._positions:
            return None
        if not self._kept:
            if not self._demanded:
                return None
            assert self._doc is not None, "a source has at least one token"
            low, high = (int(n) for n in self._seen)
            raise _not_there(self._doc, self._positions, self._there, low, high)
        position = np.asarray(sorted(self._kept), np.int64)
        columns = [self._kept[int(p)] for p in position]
        ids, targets = (np.asarray([getattr(c, n) for c in columns], np.int64) for n in ("token", "target"))
        top, probability = (torch.stack([getattr(c, n) for c in columns], 1).numpy() for n in ("top", "probability"))
        text = texts(source, np.unique(np.concatenate([ids, targets, top.reshape(-1)])))
        assert self._doc is not None, "something was kept"
        return LensGrid(
            title=f"{title}, document {self._doc}",
            doc=self._doc,
            states=np.asarray(states),
            labels=labels,
            position=position,
            ids=ids,
            targets=targets,
            top=top,
            probability=probability,
            text=text,
        )


def texts(source: Source, ids: Sequence[int] | NDArray[np.int64]) -> dict[int, str]:
    """Return tokens as text by the model's own tokenizer; as numbers where it has none."""
    tokenizer = source.model.tokenizer
    decode: Callable[[int], str] = str if tokenizer is None else (lambda token: tokenizer.decode([token]))
    size = None if tokenizer is None else tokenizer.vocab_size
    return {int(t): decode(int(t)) if size is None or t < size else f"<{t}>" for t in ids if t >= 0}


def some_tokens(source: Source, doc: int | None, positions: Sequence[int]) -> tuple[Block, Tensor]:
    """Return a block and which of its tokens are some positions of the first window of a document.

    Args:
        source: where to look.
        doc: which document; None takes the first one.
        positions: which positions of it; those that it does not have are left out.

    Raises:
        UsageError: it has none of them, or is not there.
    """
    seen: list[int] = []
    there: set[int] = set()
    for block in source.blocks():
        wanted = int(block.doc[0]) if doc is None else doc
        there |= set(block.position[block.doc == (seen[0] if doc is None and seen else wanted)].tolist())
        seen += [int(block.doc.min()), int(block.doc.max())]
        chosen = torch.isin(block.position, torch.tensor(list(positions), dtype=block.position.dtype))
        rows = torch.nonzero((block.doc == wanted) & chosen)[:, 0]
        if len(rows):
            place = block.position[rows]
            again = torch.nonzero(place[1:] <= place[:-1])[:, 0]
            rows = rows[: int(again[0]) + 1] if len(again) else rows
            return block, rows
    raise _not_there(seen[0] if doc is None else doc, positions, there, min(seen), max(seen))


def _not_there(doc: int, positions: Sequence[int], there: set[int], low: int, high: int) -> UsageError:
    """The mistake of asking for positions that a document does not have; `low` and `high` are documents there are."""
    if not there:
        return UsageError(f"there is no document {doc}: there are documents {low} to {high}")
    own = f"it has {'position' if len(there) == 1 else 'positions'} {spans(there)}"
    return UsageError(f"document {doc} has none of the positions {spans(positions)}: {own}")


def spans(numbers: Iterable[int]) -> str:
    """Return whole numbers as runs, each by its ends.

    >>> spans([5, 3, 4, 9]), spans([7])
    ('3 to 5, 9', '7')
    """
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][-1] + 1:
            runs[-1][1:] = [n]
        else:
            runs.append([n])
    return ", ".join(" to ".join(map(str, run)) for run in runs)
