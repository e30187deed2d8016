"""The file that the contestants without a format of their own write: two ordinary h5py datasets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import h5py
import numpy as np
import torch
from torch import Tensor

from benchmarks.setting import Setting

WHAT = ("write", "read")


@dataclass(frozen=True)
class Piece:
    """Some consecutive tokens of one stored tensor."""

    what: str
    """"write" or "read"."""
    row: int
    """The sublayer."""
    start: int
    """The first token."""
    tensor: Tensor
    """(token, d_model)."""


class PlainFile:
    """Datasets `write` and `read`, each (sublayer, token, d_model); bfloat16, unknown to h5py, as its raw bits."""

    def __init__(self, path: Path, setting: Setting) -> None:
        """Create the file."""
        kind = np.dtype("<u2") if setting.dtype is torch.bfloat16 else np.dtype("<f4")
        self._file = h5py.File(path, "w")
        self._datasets = {what: self._file.create_dataset(what, setting.shape, kind) for what in WHAT}
        self._start = 0

    def begin(self, start: int) -> None:
        """Let what follows belong to the batch whose first token is `start`."""
        self._start = start

    def put(self, what: str, row: int, tensor: Tensor) -> None:
        """Store one tensor of the batch, (doc, position, d_model)."""
        flat = tensor.flatten(0, 1)
        raw = flat.view(torch.uint16) if flat.dtype is torch.bfloat16 else flat
        self._datasets[what][row, self._start : self._start + len(flat)] = raw.numpy()

    def __enter__(self) -> PlainFile:
        """Return the file."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self._file.close()


def plain_pieces(path: Path, setting: Setting) -> Iterator[Piece]:
    """Read a `PlainFile` back, one sublayer at a time."""
    with h5py.File(path, "r") as file:
        for what in WHAT:
            for row in range(setting.shape[0]):
                tensor = torch.from_numpy(file[what][row])
                yield Piece(what, row, 0, tensor.view(setting.dtype))
