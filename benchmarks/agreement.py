"""Did two contestants store the same numbers?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.plain_file import Piece
from streamlens.reader.opening import Capture


@dataclass(frozen=True)
class Agreement:
    """How what was stored compares with a capture that holds every write and read."""

    compared: int
    """How many numbers were compared."""
    wanted: int
    """How many the capture holds."""
    equal: bool
    """Whether all compared numbers are the same bits."""
    difference: float
    """The largest absolute difference."""
    relative: float
    """The L2 norm of the difference over that of the capture's numbers."""

    def __str__(self) -> str:
        """Return the verdict in a few words."""
        if self.compared != self.wanted:
            return f"holds {self.compared} of {self.wanted} numbers"
        if self.equal:
            return "bit for bit"
        return f"differs: {self.difference:.2g} at most, {self.relative:.1e} in L2"


def compare(pieces: Iterable[Piece], capture: Capture) -> Agreement:
    """Compare all that was stored with a full capture of the same tokens."""
    expected = {"write": capture.writes, "read": capture.reads}
    compared, equal, difference, off, size = 0, True, 0.0, 0.0, 0.0
    for piece in pieces:
        wanted = expected[piece.what][piece.row, piece.start : piece.start + len(piece.tensor)]
        compared += piece.tensor.numel()
        size += float(wanted.float().square().sum(dtype=torch.float64))
        if not torch.equal(_bits(piece.tensor), _bits(wanted)):
            gap = piece.tensor.float() - wanted.float()
            equal = False
            difference = max(difference, float(gap.abs().max()))
            off += float(gap.square().sum(dtype=torch.float64))
    total = sum(tensor.numel() for tensor in expected.values())
    return Agreement(compared, total, equal, difference, (off / size) ** 0.5 if size else 0.0)


def _bits(tensor: Tensor) -> Tensor:
    """Integers of the same width: equality that tells NaN and the sign of zero apart as well."""
    return tensor.contiguous().view(torch.int16 if tensor.itemsize == 2 else torch.int32)
