"""Norms as linear maps: with the statistics of the forward pass held fixed, a norm is exactly affine in its input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from streamlens.anatomy import Norm, Stream
from streamlens.errors import MissingDataError
from streamlens.proof import norm_statistics
from streamlens.replay import advance, embed


@dataclass(frozen=True)
class FrozenNorm:
    """N(v) = gain * (v - mean(v)) * rstd + bias, without the subtraction in an RMS norm."""

    centred: bool
    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]

    def linear(
        self, part: Float[Tensor, "*any token d_model"], rstd: Float[Tensor, " token"]
    ) -> Float[Tensor, "*any token d_model"]:
        """Apply the linear part A of each token to one of the summands of what is normalised."""
        if self.centred:
            part = part - part.mean(-1, keepdim=True)
        return part * rstd[:, None] * self.gain

    def adjoint(
        self, direction: Float[Tensor, "*any token d_model"], rstd: Float[Tensor, " token"]
    ) -> Float[Tensor, "*any token d_model"]:
        """Apply the transpose of A: what a direction after the norm is before it."""
        scaled = direction * self.gain * rstd[:, None]
        return scaled - scaled.mean(-1, keepdim=True) if self.centred else scaled


def stream_norms(stream: Stream, parameters: Mapping[str, Tensor]) -> dict[int, FrozenNorm]:
    """Return the norms that the stream itself passes by the index of the state that they make (post-norm models).

    Gain and bias are read off the replayed step itself, so that a norm that adds one to its weight, or has no name
    for it, is as good as any other.

    Raises:
        MissingDataError: a step that is not one sum and at most one norm.
    """
    found: dict[int, FrozenNorm] = {}
    for norm in stream.norms:
        if norm.state is None:
            continue
        if norm.state in found:
            raise MissingDataError(f"state {norm.state} of stream {stream.name!r} passes two norms: not supported yet")

        def applied(v: Tensor, state: int = norm.state) -> Tensor:
            zero = torch.zeros_like(v)
            if state == 0:
                return embed(stream, [v, *[zero] * (len(stream.parts) - 1)], parameters)
            writes = dict.fromkeys(stream.steps[state - 1].sublayers, zero)
            first = next(iter(writes))
            return advance(stream, state - 1, zero, {**writes, first: v}, parameters)

        found[norm.state] = _read_off(norm, stream.d_model, applied)
    return found


def final_norm(stream: Stream, module: nn.Module) -> tuple[int, FrozenNorm] | None:
    """Return the index within `Stream.norms` and the map of the norm that reads the last state; None without one.

    Raises:
        MissingDataError: the norm is not a module of its own.
    """
    for index, norm in enumerate(stream.norms):
        if norm.state is None:
            own = dict(module.named_modules()).get(norm.module) if norm.module else None
            if own is None:
                raise MissingDataError("the final norm is not a module of its own, so it cannot be applied by itself")
            return index, _read_off(norm, stream.d_model, own)
    return None


def _read_off(norm: Norm, d_model: int, applied: Callable[[Tensor], Tensor]) -> FrozenNorm:
    """Learn gain and bias from what the norm makes of one vector and its negative."""
    weight = _first_weight(applied)
    probe = (1.0 + torch.arange(d_model) / d_model) * torch.where(torch.arange(d_model) % 2 == 0, 1.0, -1.0)
    probe = (probe - probe.mean())[None].to(weight.dtype if weight is not None else torch.float32)
    probe = probe if weight is None else probe.to(weight.device)
    with torch.no_grad():
        plus, minus = applied(probe).double(), applied(-probe).double()
    mean, rstd = norm_statistics(norm, probe)
    shape = (probe.double() - mean.double()[:, None]) * rstd.double()[:, None]
    gain, bias = (plus - minus) / 2 / shape, (plus + minus) / 2
    return FrozenNorm(norm.form == "layer_norm", gain[0].float(), bias[0].float())


def _first_weight(applied: object) -> Tensor | None:
    return next(applied.parameters(), None) if isinstance(applied, nn.Module) else None
