"""The writes of single attention heads: each head's slice of the value mix, through the output projection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from streamlens.analyses.source import Source
from streamlens.anatomy import Point, Stream
from streamlens.block import Block
from streamlens.calling import invoke, without_cache
from streamlens.errors import MissingDataError
from streamlens.interception import Interception, Reaction
from streamlens.observation import Observer, observing, tokens


@dataclass(frozen=True)
class Projection:
    """What an attention does to the heads' outputs before they are added: affine, the same for every token."""

    weight: Float[Tensor, "head d_head d_model"]
    bias: Float[Tensor, " d_model"]

    def heads(self, mix: Float[Tensor, "token width"]) -> Float[Tensor, "token head d_model"]:
        """Return the write of each head; all of them and the bias add up to the write of the attention."""
        split = rearrange(mix.to(self.weight.dtype), "token (head d_head) -> token head d_head", head=len(self.weight))
        return einsum(split, self.weight, "token head d_head, head d_head d_model -> token head d_model")


class _Writes(Observer):
    """Keeps the writes of one stream as (token, d_model)."""

    def __init__(self, stream: Stream, shape: tuple[int, int]) -> None:
        self.stream, self.shape = stream, shape
        self.seen: dict[int, Tensor] = {}

    def write(self, stream: Stream, index: int, tensor: Tensor) -> None:
        if stream.name == self.stream.name:
            self.seen[index] = tokens(tensor, stream, *self.shape).flatten(0, 1).float().clone()


def projections(source: Source, *, tolerance: float = 1e-3) -> dict[int, Projection]:
    """Learn the output projection of every attention by running unit vectors through it, at all layers at once.

    No module is looked up by name: in a forward pass the value mix of each token is replaced by one basis vector, and
    the write that comes out is a row of the projection. A last random mix checks that the map is affine.

    Args:
        source: where the model comes from.
        tolerance: largest relative L2 error of that check.

    Returns:
        By sublayer index.

    Raises:
        MissingDataError: no attention whose value mix is known, or a write that is not affine in it because a norm
            follows the projection (sandwich norm).
    """
    stream = source.stream
    chosen = {s.index: s for s in stream.sublayers if s.value_mix is not None and s.heads}
    if not chosen:
        raise MissingDataError(f"no attention in stream {stream.name!r} has heads that can be told apart")
    block = next(iter(source.blocks()))
    probe = _Probe(source, block)
    width = max(probe.widths.values())
    rows: dict[int, list[Tensor]] = {index: [] for index in chosen}
    for first in range(0, width + 2, probe.room):
        for index, written in probe.run(first, width).items():
            rows[index].append(written)
    found = {}
    for index, sublayer in chosen.items():
        written, own = torch.cat(rows[index]), probe.widths[index]
        bias, check = written[width], written[width + 1]
        weight = written[:own] - bias
        expected = probe.random(own).to(weight) @ weight + bias
        if float((expected - check).norm()) > tolerance * float(check.norm()):
            raise MissingDataError(
                f"the write of {sublayer.label} is not a sum over its heads: something follows the output projection, "
                f"such as a norm, that mixes them"
            )
        found[index] = Projection(
            rearrange(weight, "(head d_head) d_model -> head d_head d_model", head=sublayer.heads), bias
        )
    return found


class _Probe:
    """Runs the model on one block with other value mixes in place of its own."""

    def __init__(self, source: Source, block: Block) -> None:
        self._source, self._block = source, block
        self._shape = block.shape
        self.room = block.stop - block.start
        self.widths: dict[int, int] = {}
        self._pass(self._measure)

    def _measure(self, index: int, mix: Tensor) -> None:
        self.widths[index] = mix.shape[-1]

    @staticmethod
    def random(width: int) -> Tensor:
        """Return the mix of the check, (width,)."""
        return torch.randn(width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def run(self, first: int, width: int) -> dict[int, Tensor]:
        """Return (row, d_model) for the probes `first` and following: unit vectors, then zero, then the random one."""
        count = min(self.room, width + 2 - first)

        def probes(index: int, mix: Tensor) -> Tensor:
            own = self.widths[index]
            rows = torch.zeros(self.room, own, dtype=mix.dtype, device=mix.device)
            for row in range(count):
                if first + row < own:
                    rows[row, first + row] = 1.0
                elif first + row == width + 1:
                    rows[row] = self.random(own).to(rows)
            return rows

        return {index: written[:count] for index, written in self._pass(probes).items()}

    def _pass(self, change: Callable[[int, Tensor], Tensor | None]) -> dict[int, Tensor]:
        source, stream = self._source, self._source.stream
        docs, positions = self._shape
        reactions: dict[Point, Reaction] = {}
        for sublayer in stream.sublayers:
            if sublayer.value_mix is None or not sublayer.heads:
                continue

            def react(
                mix: Tensor, index: int = sublayer.index, turned: bool = sublayer.mix_position_first
            ) -> Tensor | None:
                rows = change(index, mix)
                if rows is None:
                    return None
                laid_out = rows.reshape(docs, positions, -1)
                return (laid_out.transpose(0, 1) if turned else laid_out).reshape(mix.shape)

            reactions[sublayer.value_mix] = react
        seen = _Writes(stream, self._shape)
        module = source.model.module
        # The replacement is the inner context, so that the observer sees what comes of it.
        with torch.no_grad(), observing(module, source.anatomy, seen), Interception(module, source.anatomy, reactions):
            invoke(module, without_cache(module, source.inputs(self._block)))
        return {index: seen.seen[index] for index in self.widths}
