"""Is a stream fit to be analysed? Numbers that are not finite, and massive activations, write by write."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streamlens.reader.stream import StreamView

MASSIVE, MASSIVE_RATIO = 100.0, 1000.0
"""An activation is massive when its magnitude is above the first and above the second times the median magnitude of
its tensor (Sun et al., 2024)."""


@dataclass
class Health:
    """One stored tensor of (token, d_model), over all tokens."""

    label: str
    not_finite: int = 0
    """Entries that are NaN or infinite."""
    largest: float = 0.0
    """Largest magnitude of a finite entry."""
    massive: int = 0
    """Entries that are massive activations."""
    dimensions: tuple[int, ...] = ()
    """The d_model indices in which they lie, at most eight."""
    zero_tokens: int = 0
    """Tokens for which every entry is zero."""

    def take(self, tensor: Tensor) -> None:
        """Take some more tokens into account, (token, d_model)."""
        wide = tensor.float().abs()
        finite = torch.isfinite(wide)
        self.not_finite += int((~finite).sum())
        wide = wide.where(finite, 0.0)
        self.largest = max(self.largest, float(wide.max()))
        self.zero_tokens += int((wide.amax(-1) == 0).sum())
        if self.largest <= MASSIVE:
            return
        flags = (wide > MASSIVE) & (wide > MASSIVE_RATIO * wide.median())
        self.massive += int(flags.sum())
        here = flags.any(0).nonzero().flatten().tolist()
        self.dimensions = tuple(sorted({*self.dimensions, *here}))[:8]


def examine(view: StreamView) -> list[Health]:
    """Look at every stored write and at the last state, block by block; memory does not grow with the tokens."""
    found = [Health(label) for label in view.labels] + [Health("final")]
    for block in view.blocks():
        for health, index in zip(found, view.stored, strict=False):
            health.take(block.writes[index])
        found[-1].take(block.states[len(view.anatomy.steps)])
    return found
