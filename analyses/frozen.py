"""Norms as linear maps: with the statistics of the forward pass held fixed, a norm is exactly affine in its input."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from streamlens.anatomy import Instruction, Norm, Stream
from streamlens.errors import MissingDataError
from streamlens.replay import last, parameter_names, run

_LARGE = 2.0**40
"""Size of the probe: a power of two, so that scaling is exact, beside which any epsilon is nothing."""


@dataclass(frozen=True)
class FrozenNorm:
    """N(v) = gain * (v - mean(v)) * rstd + bias, without the subtraction in an RMS norm.

    What it is applied to may be of any floating-point dtype and on any device; the result is like it.
    """

    centred: bool
    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]

    def linear(
        self, part: Float[Tensor, "*any token d_model"], rstd: Float[Tensor, " token"]
    ) -> Float[Tensor, "*any token d_model"]:
        """Apply the linear part A of each token to one of the summands of what is normalised."""
        if self.centred:
            part = part - part.mean(-1, keepdim=True)
        return part * rstd.to(part)[:, None] * self.gain.to(part)

    def adjoint(
        self, direction: Float[Tensor, "*any token d_model"], rstd: Float[Tensor, " token"]
    ) -> Float[Tensor, "*any token d_model"]:
        """Apply the transpose of A: what a direction after the norm is before it."""
        scaled = direction * self.gain.to(direction) * rstd.to(direction)[:, None]
        return scaled - scaled.mean(-1, keepdim=True) if self.centred else scaled


def stream_norms(stream: Stream, parameters: Mapping[str, Tensor]) -> dict[int, FrozenNorm]:
    """Return the norms that the stream itself passes by the index of the state that they make (post-norm models).

    Gain and bias are read off the recorded step itself, in float64 on the CPU, so that a norm that adds one to its
    weight, or has no name for it, is as good as any other, and half precision costs nothing.

    Args:
        stream: the stream.
        parameters: at least those that its steps use, by name; any dtype, any device.

    Returns:
        Maps in float32 (float64 where the parameters are), on the parameters' device.

    Raises:
        MissingDataError: a step that is not one sum and at most one norm.

    >>> from fixtures import zoo
    >>> from streamlens.discovery.streams import discover
    >>> specimen = zoo.build("bert")
    >>> stream = discover(specimen.module, dict(specimen.inputs)).stream()
    >>> list(stream_norms(stream, dict(specimen.module.named_parameters())))
    [0, 1, 2, 3, 4]
    """
    found: dict[int, FrozenNorm] = {}
    own = {name: parameters[name] for name in parameter_names(stream) if name in parameters}
    exact = {name: p.detach().cpu().double() for name, p in own.items() if p.is_floating_point()}
    for norm in stream.norms:
        if norm.state is None:
            continue
        if norm.state in found:
            raise MissingDataError(f"state {norm.state} of stream {stream.name!r} passes two norms: not supported yet")
        found[norm.state] = _like(_probed(norm, stream.d_model, _alone(stream, norm, exact)), own)
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
            exact = copy.deepcopy(own).cpu().double()
            return index, _like(_probed(norm, stream.d_model, exact), dict(own.named_parameters()))
    return None


def read_off(centred: bool, plus: Float[Tensor, " d_model"], minus: Float[Tensor, " d_model"]) -> FrozenNorm:
    """Learn gain and bias from what a norm makes of `probe_of` and of its negative.

    Args:
        centred: whether it subtracts the mean.
        plus: (d_model,) what it makes of the probe.
        minus: (d_model,) what it makes of the negative.

    Returns:
        The map, in the dtype and on the device of `plus`.

    >>> norm = nn.LayerNorm(4, eps=1e-3).double()
    >>> torch.nn.init.uniform_(norm.weight).shape
    torch.Size([4])
    >>> with torch.no_grad():
    ...     found = read_off(True, norm(probe_of(4))[0], norm(-probe_of(4))[0])
    >>> torch.equal(found.gain, norm.weight.data), found.bias.tolist()
    (True, [0.0, 0.0, 0.0, 0.0])
    """
    probe = probe_of(len(plus))[0]
    shape = probe - probe.mean() if centred else probe
    shape = (shape / shape.square().mean().sqrt()).to(plus)
    return FrozenNorm(centred, (plus - minus) / 2 / shape, (plus + minus) / 2)


def probe_of(d_model: int, size: float = _LARGE) -> Float[Tensor, "1 d_model"]:
    """Return float64 entries of signs that alternate, so large that epsilon is nothing beside them.

    Each entry is as large as their root mean square, so that a norm gives its gain to the last bit where d_model is
    even.

    >>> probe_of(4, 8.0).tolist()
    [[8.0, -8.0, 8.0, -8.0]]
    """
    return torch.where(torch.arange(d_model) % 2 == 0, size, -size).double()[None]


def _probed(norm: Norm, d_model: int, applied: Callable[[Tensor], Tensor]) -> FrozenNorm:
    probe = probe_of(d_model)
    with torch.no_grad():
        return read_off(norm.form == "layer_norm", applied(probe).double()[0], applied(-probe).double()[0])


def _alone(stream: Stream, norm: Norm, parameters: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """A norm on the stream as a function of what it normalises, without the sum before it."""
    index = norm.state
    assert index is not None, "the final norm is no part of a step"
    step = stream.embedding if index == 0 else stream.steps[index - 1].instructions
    wide = [Instruction(i.operator, _wide(i.args), _wide(dict(i.kwargs)), i.output) for i in step]
    place = next((n + 1 for n, i in enumerate(wide) if i.output == norm.input), 0)
    zero = torch.zeros(1, stream.d_model, dtype=torch.float64)
    names = ["@state", *(f"@part:{i}" for i in range(len(stream.parts)))]
    names += [f"@write:{s.index}" for s in stream.sublayers]
    known = run(wide[:place], dict.fromkeys(names, zero), parameters)

    def applied(v: Tensor) -> Tensor:
        return run(wide[place:], {**known, norm.input: v}, parameters)[last(wide, norm.input)]

    return applied


def _wide(value: Any) -> Any:
    """The same argument, but casts are to float64."""
    if isinstance(value, dict):
        return {k: _wide(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_wide(v) for v in value)
    return "dtype:float64" if isinstance(value, str) and value.startswith("dtype:") else value


def _like(norm: FrozenNorm, parameters: Mapping[str, Tensor]) -> FrozenNorm:
    """The map in the dtype (but at least float32) and on the device of the parameters that it was read from."""
    some = [p for p in parameters.values() if p.is_floating_point()]
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in some) else torch.float32
    device = some[0].device if some else torch.device("cpu")
    return FrozenNorm(norm.centred, norm.gain.to(device, dtype), norm.bias.to(device, dtype))
