"""The writes of single attention heads: each head's slice of the value mix, through the output projection.

Where a norm stands between the projection and the stream (Gemma 2, OLMo 2), it is held at the statistics of the forward
pass, as everywhere else: then each head has a share of the write, and the shares add up to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from streamlens.analyses.frozen import FrozenNorm, probe_of, read_off
from streamlens.analyses.source import Source
from streamlens.anatomy import RESULT, Point, Stream, Sublayer
from streamlens.block import Block
from streamlens.calling import invoke, without_cache
from streamlens.errors import MissingDataError
from streamlens.interception import Interception, Reaction
from streamlens.observation import Observer, observing, tokens


@dataclass(frozen=True)
class Projection:
    """What an attention does to the heads' outputs before they are added to the stream, the same for every token."""

    weight: Float[Tensor, "head d_head d_model"]
    bias: Float[Tensor, " d_model"]
    norm: FrozenNorm | None = None
    """The norm behind the projection, if there is one."""

    def split(
        self, mix: Float[Tensor, "token width"], write: Float[Tensor, "token d_model"]
    ) -> tuple[Float[Tensor, "token head d_model"], Float[Tensor, "token d_model"]]:
        """Take the write of an attention apart.

        Args:
            mix: (token, heads * d_head) the heads' outputs side by side.
            write: (token, d_model) what the attention wrote; from it comes the scale of a norm behind the projection.

        Returns:
            The writes of the heads, (token, head, d_model), and what no head has written (the biases),
            (token, d_model): together they add up to the write. In the dtype of the weight, on the device of the mix.

        >>> projection = Projection(torch.eye(4).reshape(2, 2, 4), torch.ones(4))
        >>> heads, rest = projection.split(torch.arange(4.0)[None], torch.arange(4.0)[None] + 1)
        >>> heads[0].tolist(), rest[0].tolist()
        ([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 2.0, 3.0]], [1.0, 1.0, 1.0, 1.0])
        """
        weight, bias = self.weight.to(mix.device), self.bias.to(mix.device)
        mixed = rearrange(mix.to(weight.dtype), "token (head d_head) -> token head d_head", head=len(weight))
        heads = einsum(mixed, weight, "token head d_head, head d_head d_model -> token head d_model")
        rest = bias.expand(len(mix), -1)
        if self.norm is None:
            return heads, rest
        one = torch.ones(len(mix), dtype=weight.dtype, device=mix.device)
        shape = self.norm.linear(heads.sum(1) + rest, one)
        around = write.to(shape) - self.norm.bias.to(shape)
        rstd = (around * shape).sum(-1) / shape.square().sum(-1).clamp_min(torch.finfo(shape.dtype).tiny)
        heads = self.norm.linear(heads.transpose(0, 1), rstd).transpose(0, 1)
        return heads, self.norm.linear(rest, rstd) + self.norm.bias.to(shape)


def projections(source: Source) -> dict[int, Projection]:
    """Learn the output projection of every attention by running unit vectors through it, at all layers at once.

    No module is looked up by name: in a forward pass the value mix of each token is replaced by one basis vector, and
    the write that comes out is a row of the projection. A last random mix checks that the map is affine. Where it is
    not, rows are taken from the result of the projection itself, and what follows is tried as a norm.

    Args:
        source: where the model comes from.

    Returns:
        By sublayer index, in float32 (float64 where the model is).

    Raises:
        MissingDataError: no attention whose value mix is known, or a write that is no sum over its heads even with the
            statistics of a norm held fixed.

    >>> from fixtures import zoo
    >>> from streamlens.analyses.source import source_of
    >>> found = projections(source_of(zoo.build("gemma2").module, tokens=torch.arange(8)[None]))
    >>> {index: (tuple(p.weight.shape), p.norm is not None) for index, p in found.items()}
    {0: ((4, 8, 32), True), 2: ((4, 8, 32), True)}
    """
    stream = source.stream
    chosen = [s for s in stream.sublayers if s.value_mix is not None and s.heads]
    if not chosen:
        raise MissingDataError(f"no attention in stream {stream.name!r} has heads that can be told apart")
    probe = _Probe(source, next(iter(source.blocks())), chosen)
    made, written = probe.rows()
    found: dict[int, Projection] = {}
    for sublayer in chosen:
        affine = probe.affine(sublayer, written[sublayer.index])
        if affine is not None:
            found[sublayer.index] = affine
    normed = [s for s in chosen if s.index not in found]
    answers = probe.answers() if normed else {}
    for sublayer in normed:
        index = sublayer.index
        before = probe.affine(sublayer, made[index]) if index in made else None
        behind = None if before is None else probe.normed(before, made[index], written[index], answers[index])
        if behind is None:
            raise MissingDataError(
                f"the write of {sublayer.label} is not a sum over its heads: something follows the output projection "
                f"that mixes them and is no norm"
            )
        found[index] = behind
    return {s.index: found[s.index] for s in chosen}


class _Writes(Observer):
    """Keeps the writes of one stream as (token, d_model)."""

    def __init__(self, stream: Stream, shape: tuple[int, int]) -> None:
        self.stream, self.shape = stream, shape
        self.seen: dict[int, Tensor] = {}

    def write(self, stream: Stream, index: int, tensor: Tensor) -> None:
        if stream.name == self.stream.name:
            self.seen[index] = _single(tokens(tensor, stream, *self.shape).flatten(0, 1)).clone()


class _Probe:
    """Runs the model on one block with other value mixes, or results of the output projections, in place of its own."""

    def __init__(self, source: Source, block: Block, chosen: list[Sublayer]) -> None:
        self._source, self._block, self._chosen = source, block, chosen
        self._shape = block.shape
        self._room = block.stop - block.start
        self._widths: dict[int, int] = {}
        dtypes = [block.states[0].dtype]

        def measure(index: int, mix: Tensor) -> None:
            self._widths[index] = mix.shape[-1]
            dtypes.append(mix.dtype)

        self._pass(measure)
        self._dtype = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
        # Beside it a bias is nothing, which in half precision would round the weights away.
        self._size = 2.0**8 if self._dtype == torch.float16 else 2.0**20

    def rows(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Return results of the projection and writes, (row, d_model): of each unit vector, of zero, of a random mix.

        Only those results are there that have one row for each token.
        """
        width = max(self._widths.values())
        made: dict[int, list[Tensor]] = {}
        written: dict[int, list[Tensor]] = {}
        for first in range(0, width + 2, self._room):
            count = min(self._room, width + 2 - first)

            def probes(index: int, mix: Tensor, first: int = first, count: int = count) -> Tensor:
                own = self._widths[index]
                rows = torch.zeros(self._room, own, dtype=mix.dtype, device=mix.device)
                for row in range(count):
                    if first + row < own:
                        rows[row, first + row] = self._size
                    elif first + row == width + 1:
                        rows[row] = _random(own).to(rows)
                return rows

            results, writes = self._pass(probes)
            for kept, seen in ((made, results), (written, writes)):
                for index, rows in seen.items():
                    kept.setdefault(index, []).append(rows[:count])
        return tuple({i: torch.cat(rows) for i, rows in kept.items()} for kept in (made, written))  # type: ignore[return-value]

    def affine(self, sublayer: Sublayer, rows: Tensor) -> Projection | None:
        """Return the map that has these rows, if it is one."""
        own = self._widths[sublayer.index]
        bias, check = rows[-2], rows[-1]
        weight = (rows[:own] - bias) / self._size
        expected = _random(own).to(self._dtype).to(weight) @ weight + bias
        if not self._agree(expected, check):
            return None
        by_head = rearrange(weight, "(head d_head) d_model -> head d_head d_model", head=sublayer.heads)
        return Projection(by_head, bias)

    def answers(self) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        """Return what becomes of three results of the projections: a probe, its negative, and equal entries."""
        probe = probe_of(self._source.stream.d_model, self._size)
        found: list[dict[int, Tensor]] = []
        for row in (probe, -probe, torch.full_like(probe, self._size)):

            def result(index: int, own: Tensor, row: Tensor = row) -> Tensor:
                return row.to(own).expand(self._room, -1)

            found.append({i: rows[0] for i, rows in self._pass(None, result)[1].items()})
        return {s.index: (found[0][s.index], found[1][s.index], found[2][s.index]) for s in self._chosen}

    def normed(
        self, before: Projection, made: Tensor, written: Tensor, answers: tuple[Tensor, Tensor, Tensor]
    ) -> Projection | None:
        """Return the projection with the norm that follows it, if that is what follows."""
        plus, minus, even = answers
        bias = (plus + minus) / 2
        centred = float((even - bias).norm()) < 0.1 * float((plus - bias).norm())
        norm = read_off(centred, plus, minus)
        found = Projection(before.weight, before.bias, norm)
        one = torch.ones(1, dtype=made.dtype, device=made.device)
        shape = norm.linear(made[-1:], one)[0]
        around = written[-1] - norm.bias.to(shape)
        rstd = (around @ shape) / (shape @ shape)
        return found if self._agree(rstd * shape, around) else None

    def _agree(self, one: Tensor, other: Tensor) -> bool:
        allowed = max(1e-3, 4 * torch.finfo(self._dtype).eps)
        return float((one - other).norm()) <= allowed * float(other.norm())

    def _pass(
        self,
        mixes: Callable[[int, Tensor], Tensor | None] | None,
        results: Callable[[int, Tensor], Tensor | None] | None = None,
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Run with rows (token, width) in place of value mixes or of what the projections make of them.

        Returns:
            By sublayer index: what the projections gave, and what was written, (token, d_model).
        """
        source, stream = self._source, self._source.stream
        made: dict[int, Tensor] = {}
        reactions: dict[Point, Reaction] = {}

        def keep(index: int, own: Tensor) -> Tensor | None:
            if own.shape[-1] == stream.d_model:
                made[index] = _single(own).clone()
            return None if results is None else results(index, own)

        for sublayer in self._chosen:
            assert sublayer.value_mix is not None, "chosen for it"
            if mixes is not None:
                reactions[sublayer.value_mix] = self._reaction(sublayer, mixes)
            reactions[Point(sublayer.value_mix.site, RESULT)] = self._reaction(sublayer, keep)
        seen = _Writes(stream, self._shape)
        module = source.model.module
        # The replacement is the inner context, so that the observer sees what comes of it.
        with torch.no_grad(), observing(module, source.anatomy, seen), Interception(module, source.anatomy, reactions):
            invoke(module, without_cache(module, source.inputs(self._block)))
        return made, {s.index: seen.seen[s.index] for s in self._chosen}

    def _reaction(self, sublayer: Sublayer, change: Callable[[int, Tensor], Tensor | None]) -> Reaction:
        """Return what lays tokens out as (token, width) for `change`, and its answer as the model has them."""
        docs, positions = self._shape

        def react(own: Tensor) -> Tensor | None:
            if own.numel() != docs * positions * own.shape[-1]:
                return None
            turned = sublayer.mix_position_first
            flat = own.reshape(positions, docs, -1).transpose(0, 1) if turned else own
            rows = change(sublayer.index, flat.reshape(docs * positions, -1))
            if rows is None:
                return None
            laid_out = rows.reshape(docs, positions, -1)
            return (laid_out.transpose(0, 1) if turned else laid_out).reshape(own.shape)

        return react


def _random(width: int) -> Tensor:
    """(width,) float64 the mix of the check, always the same one."""
    return torch.randn(width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _single(tensor: Tensor) -> Tensor:
    """In float32, or wider where it is."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor
