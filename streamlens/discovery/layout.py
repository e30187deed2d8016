"""Which axis of a model's input counts positions: found by changing one slice and looking where the output changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from streamlens.anatomy import Stream, Sublayer
from streamlens.calling import Inputs, eager_math, invoke

_FIRST = ("decoder_input_ids", "input_ids")


def main_input(inputs: Inputs) -> tuple[str | None, Tensor]:
    """Return the input that is laid out as tokens, with its name (None for a lone tensor)."""
    if isinstance(inputs, Tensor):
        return None, inputs
    for name in _FIRST:
        if isinstance(inputs.get(name), Tensor):
            return name, inputs[name]
    return next((name, value) for name, value in inputs.items() if isinstance(value, Tensor))


def is_position_first(module: nn.Module, inputs: Inputs) -> bool:
    """Tell whether tokens are laid out as (position, doc), PyTorch's older convention, not (doc, position).

    Documents never see each other, positions do: so the axis along which a change spreads is the position. With fake
    or meta weights there are no values to compare and (doc, position) is assumed.
    """
    tokens = main_input(inputs)[1]
    weights = next(module.parameters(), None)
    fake = weights is not None and (weights.is_meta or type(weights.data).__name__ == "FakeTensor")
    if fake or tokens.ndim not in (2, 3) or min(tokens.shape[:2]) < 2:
        return False
    with torch.no_grad(), eager_math():
        plain = invoke(module, inputs)
        if plain.ndim < 3:
            return False
        along_docs = invoke(module, changed_at(inputs, 1, 0))
        if not torch.equal(plain[:, 1:], along_docs[:, 1:]):
            return False
        along_positions = invoke(module, changed_at(inputs, 0, 0))
    return not torch.equal(plain[1:], along_positions[1:])


def changed_at(inputs: Inputs, axis: int, index: int) -> Inputs:
    """Return inputs of which every token of one slice is another one, to see what depends on it.

    Args:
        inputs: forward's arguments; the main one holds ids, (..., ...), or embeddings, (..., ..., d_model).
        axis: 0 or 1, the axis along which the slice is taken.
        index: which slice.

    Returns:
        The same arguments with a changed copy of the main one.

    Example:
        >>> changed_at(torch.tensor([[7, 7], [7, 7]]), 1, 0)
        tensor([[6, 7],
                [6, 7]])
    """
    name, tokens = main_input(inputs)
    changed = tokens.clone()
    part = changed.select(axis, index)
    if tokens.is_floating_point():
        # Not one number for all: a norm would take that away again.
        part.add_(1.0 + torch.arange(part.shape[-1], device=part.device) / part.shape[-1])
    else:
        low, high = tokens.min(), tokens.max()
        if low == high:  # the id next to it: below, since only those are sure to be in the vocabulary
            low = high - 1 if high > 0 else high + 1
        part.copy_(torch.where(part == high, low, high))
    if isinstance(inputs, Mapping):
        assert name is not None
        return {**inputs, name: changed}
    return changed


def with_mix_layouts(module: nn.Module, stream: Stream) -> Stream:
    """Say for each value mix of a stream whether positions come first in it.

    They do inside PyTorch's own attention, which turns around what it is given when that is documents first; anybody
    else's attention is taken to keep the layout of the stream.
    """
    paths = dict(module.named_modules())

    def described(sublayer: Sublayer) -> Sublayer:
        point = sublayer.value_mix
        own = point is not None and isinstance(paths.get(point.site.module), nn.MultiheadAttention)
        return replace(sublayer, mix_position_first=own or stream.position_first)

    return replace(stream, sublayers=tuple(described(s) for s in stream.sublayers))
