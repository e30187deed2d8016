"""Where each tensor of a capture lies: the datasets of a file, the blocks of its token axis, a name for each row.

Nothing here touches a file. The writer, the checker and the reader share it, so that they cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from streamlens.errors import UsageError

FORMAT = "streamlens-capture"
FORMAT_VERSION = 1
PARTIAL_SUFFIX = ".partial"

PROOF_COLUMNS: Mapping[str, str] = {
    "done": "|u1",
    "hash": "<u8",
    "exact": "|u1",
    "worst": "<f8",
    "where": "<i4",
    "seal": "<u8",
}
"""What a commit leaves per block under /proof, with its numpy type.

``hash`` has one column for each row of an item; ``seal`` is the hash of the hashes and of the proof's outcome.
"""


@dataclass(frozen=True)
class Item:
    """One dataset that a capture fills block by block, of shape (rows?, token, width?)."""

    name: str
    """Full path in the file, such as ``/streams/main/write``."""
    rows: int | None
    """Length of the leading axis (sublayer, norm); None when there is none."""
    width: int | None
    """Length of the last axis (d_model, k); None when there is one number per token."""
    dtype: torch.dtype

    def shape(self, n_tokens: int) -> tuple[int, ...]:
        """Return the shape of the dataset: (rows?, token, width?).

        >>> Item("/streams/main/write", 24, 768, torch.bfloat16).shape(4096)
        (24, 4096, 768)
        """
        return (*(() if self.rows is None else (self.rows,)), *self.part_shape(n_tokens))

    def part_shape(self, n_tokens: int) -> tuple[int, ...]:
        """Return the shape of `n_tokens` tokens of one row: (token, width?)."""
        return (n_tokens,) if self.width is None else (n_tokens, self.width)

    def row_names(self) -> list[str]:
        """Return one name per row, as listed in /proof/items.

        >>> Item("/streams/main/read", 2, 64, torch.float32).row_names()
        ['/streams/main/read[0]', '/streams/main/read[1]']
        """
        return [self.name] if self.rows is None else [f"{self.name}[{row}]" for row in range(self.rows)]


@dataclass(frozen=True)
class Layout:
    """All items of a capture and the blocks that its token axis is cut into.

    Raises:
        UsageError: names that repeat or are not absolute, or blocks that do not cover the tokens one after another.
    """

    items: tuple[Item, ...]
    n_tokens: int
    blocks: tuple[tuple[int, int], ...]
    """(start, stop) of each block; together they cover the token axis without gap or overlap."""

    def __post_init__(self) -> None:
        """Refuse a layout that could not be written."""
        names = [item.name for item in self.items]
        if len(set(names)) < len(names):
            raise UsageError(f"a capture was given two datasets of the same name: {sorted(names)}")
        for name in names:
            if not name.startswith("/") or name.startswith("/proof/") or name.endswith("/"):
                raise UsageError(f"{name!r} cannot name a captured dataset: use a full path outside /proof")
        if not self.blocks:
            raise UsageError("there is nothing to capture: no tokens were given")
        starts, stops = [start for start, _ in self.blocks], [stop for _, stop in self.blocks]
        if starts != [0, *stops[:-1]] or stops[-1] != self.n_tokens or any(a >= b for a, b in self.blocks):
            raise UsageError(f"the blocks must cover tokens 0 to {self.n_tokens} in order, none of them empty")

    @cached_property
    def columns(self) -> Mapping[tuple[str, int | None], int]:
        """The hash column of each (item name, row)."""
        rows = ((i.name, row) for i in self.items for row in ([None] if i.rows is None else range(i.rows)))
        return {key: column for column, key in enumerate(rows)}

    @cached_property
    def row_names(self) -> list[str]:
        """The name of each hash column, such as ``/streams/main/write[3]``."""
        return [name for item in self.items for name in item.row_names()]

    @cached_property
    def _keys(self) -> tuple[tuple[str, int | None], ...]:
        return tuple(self.columns)

    @cached_property
    def _by_name(self) -> Mapping[str, Item]:
        return {item.name: item for item in self.items}

    def item(self, name: str, row: int | None) -> Item:
        """Return the item called `name`.

        Raises:
            UsageError: no such item, or no such row of it.
        """
        if (name, row) not in self.columns:
            known = self._by_name.get(name)
            hint = f"known datasets: {list(self._by_name)}" if known is None else f"number of its rows: {known.rows}"
            raise UsageError(f"this capture has no dataset {name!r} with row {row}; {hint}")
        return self._by_name[name]

    def span(self, column: int, block: int) -> tuple[str, int, int]:
        """Return (item name, first byte within its dataset, number of bytes) of one row of one block."""
        name, row = self._keys[column]
        item, (start, stop) = self._by_name[name], self.blocks[block]
        per_token = item.dtype.itemsize * (1 if item.width is None else item.width)
        return name, ((row or 0) * self.n_tokens + start) * per_token, (stop - start) * per_token

    def proof_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each dataset of /proof that commits fill."""
        n = len(self.blocks)
        return {key: (n, len(self.columns)) if key == "hash" else (n,) for key in PROOF_COLUMNS}

    def signature(self) -> dict[str, Any]:
        """Return what must be equal for one run to go on with another's file, as JSON."""
        starts = ",".join(str(start) for start, _ in self.blocks)
        return {
            "tokens": self.n_tokens,
            "blocks": len(self.blocks),
            "longest_block": max(stop - start for start, stop in self.blocks),
            "block_starts": xxhash.xxh3_64_hexdigest(starts.encode()),
            "datasets": {i.name: f"{dtype_name(i.dtype)} {list(i.shape(self.n_tokens))}" for i in self.items},
        }


def seal(hashes: npt.NDArray[np.uint64], exact: bool, worst: float, where: int) -> int:
    """Return the hash over all that a commit says about one block."""
    state = xxhash.xxh3_64(hashes.astype(PROOF_COLUMNS["hash"]).tobytes())
    for key, value in (("exact", exact), ("worst", worst), ("where", where)):
        state.update(np.asarray(value).astype(PROOF_COLUMNS[key]).tobytes())
    return state.intdigest()


def n_bytes(shape: Sequence[int], itemsize: int) -> int:
    """Return the number of bytes of an array.

    >>> n_bytes((3, 4), 2)
    24
    """
    return math.prod(shape) * itemsize


def dtype_name(dtype: torch.dtype) -> str:
    """Return the plain name of a torch dtype.

    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")
