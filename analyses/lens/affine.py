"""States of a post-norm stream in the coordinates of the last one: each norm's own gain and bias exchanged for its."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streamlens.analyses.frozen import FrozenNorm, stream_norms
from streamlens.analyses.source import Source
from streamlens.errors import UsageError


@dataclass(frozen=True)
class AffineMatch:
    """The map (x_k - beta_k) / gamma_k * gamma_K + beta_K for each state that a norm makes.

    In a post-norm model the head reads what the last norm makes; an earlier state was scaled and shifted by another
    norm, dimension by dimension, and this undoes it. A state that no norm makes (x_0 of some models) stays as it is,
    and so does the last one, bit for bit. Where gamma_k is zero, what was normalised is lost and counts as zero.
    """

    norms: dict[int, FrozenNorm]
    """By the index of the state that they make."""
    last: int
    """Index of the last state."""

    @property
    def kind(self) -> str:
        """What it is called."""
        return "affine match"

    @classmethod
    def of(cls, source: Source) -> AffineMatch:
        """Read the norms of a stream.

        Raises:
            UsageError: no norm makes its last state: it is not a post-norm stream.
        """
        norms, last = stream_norms(source.stream, source.parameters), len(source.stream.steps)
        if last not in norms:
            raise UsageError(
                f"affine_match is for post-norm streams: no norm makes the last state of {source.stream.name!r}, and "
                "the head applies its own norm to every state anyway. Leave it out"
            )
        return cls(norms, last)

    def translate(self, k: int, state: Tensor) -> Tensor:
        """Return state x_k (token, d_model) in the coordinates of the last one.

        >>> from fixtures import zoo
        >>> from streamlens.analyses.source import source_of
        >>> source = source_of(zoo.build("user_post_norm").module, tokens=torch.arange(8)[None])
        >>> state = next(source.blocks()).states[2]
        >>> match = AffineMatch.of(source)
        >>> match.translate(2, state).shape, match.translate(4, state) is state
        (torch.Size([8, 32]), True)
        """
        own, target = self.norms.get(k), self.norms[self.last]
        if own is None or k == self.last:
            return state
        wide = torch.float64 if state.dtype == torch.float64 else torch.float32
        gain, bias = own.gain.to(state.device, wide), own.bias.to(state.device, wide)
        normalised = torch.where(gain != 0, (state.to(wide) - bias) / torch.where(gain != 0, gain, 1.0), 0.0)
        matched = normalised * target.gain.to(state.device, wide) + target.bias.to(state.device, wide)
        return matched.to(state.dtype)
