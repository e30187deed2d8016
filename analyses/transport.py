"""What has become of each embedding part, write and bias by the time it stands in a later state; exact, token by token.

A state is a sum. In a pre-norm stream each term stays what it was; where the stream passes a norm or a factor on the
skip, all terms so far pass it as well, and with the norm's statistics held at those of the forward pass that is
linear in each (Kobayashi et al. 2021). With A_k the linear part of the norm that makes x_k and c_k the factor:

    x_{k+1} = A_{k+1} (c_k x_k + sum of the writes) + beta_{k+1}

Nothing is ever a d_model x d_model matrix. To ask about many terms at every state, walk forwards (`transported`); to
ask how much each term contributes along one direction per token, walk backwards (`pulled_back`), which touches each
write once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from streamlens.analyses.frozen import FrozenNorm
from streamlens.anatomy import Instruction, Stream
from streamlens.block import Block
from streamlens.errors import FormatError, MissingDataError
from streamlens.replay import last, run

BIAS = "norm"
"""Kind of a summand that is the bias of a norm on the stream."""

Factor = float | Tensor
"""What a skip is multiplied with: a number, or one for each dimension (d_model,)."""


@dataclass(frozen=True)
class Summand:
    """One term of a state."""

    label: str
    """The embedding part's or the sublayer's label, or ``bias:`` and the label of the norm."""
    kind: str
    """``embed``, ``norm`` (a bias), or the kind of the sublayer."""
    index: int
    """Of the embedding part, of the sublayer, or of the state that the norm makes."""
    born: int
    """Index of the first state in which it stands."""
    vectors: Tensor
    """(token, d_model), as it stands in the state at hand. Not a copy where nothing has changed it: do not write."""


def transported(
    stream: Stream,
    norms: Mapping[int, FrozenNorm],
    block: Block,
    *,
    factors: Sequence[Factor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Iterator[list[Summand]]:
    """Yield for each state x_0 ... x_K the terms that sum to it.

    Args:
        stream: the stream.
        norms: its norms by the index of the state that they make (`stream_norms`); empty in a pre-norm model.
        block: the tokens. Its states are not looked at.
        factors: the factors on the skips (`skip_factors`); needed where they are parameters.
        dtype: float32 or float64, of everything that is yielded.

    Yields:
        The summands of x_k, in order of birth: embedding parts, then for each step its writes and the bias of its
        norm. Their sum is x_k up to rounding; after the end of the iteration nothing is kept.

    Raises:
        MissingDataError: the block lacks a write, or a factor is a parameter and `factors` is not given.

    >>> from streamlens.analyses.source import source_of
    >>> from fixtures import zoo
    >>> source = source_of(zoo.build("gpt2").module, tokens=torch.arange(8)[None])
    >>> block = next(source.blocks())
    >>> for state, parts in zip(block.states, transported(source.stream, {}, block)):
    ...     assert torch.allclose(sum(p.vectors for p in parts), state, atol=1e-5)
    >>> [p.label for p in parts]
    ['embed', 'pos_embed', '0_attn_out', '0_mlp_out', '1_attn_out', '1_mlp_out', '2_attn_out', '2_mlp_out']
    """
    scales = skip_factors(stream) if factors is None else factors
    rstds = _rstds(stream, norms, block)
    parts = [
        Summand(p.label, "embed", i, 0, block.parts[i].to(dtype)) for i, p in enumerate(stream.parts)
    ]  # fmt: skip
    parts = _through(stream, norms, rstds, 0, parts)
    yield list(parts)
    for index, step in enumerate(stream.steps):
        scale = scales[index]
        if not _is_one(scale):
            parts = [replace(p, vectors=p.vectors * _like(scale, p.vectors)) for p in parts]
        for s in step.sublayers:
            own = stream.sublayers[s]
            parts.append(Summand(own.label, own.kind, s, index + 1, block.writes[s].to(dtype)))
        parts = _through(stream, norms, rstds, index + 1, parts)
        yield list(parts)


def pulled_back(
    stream: Stream,
    norms: Mapping[int, FrozenNorm],
    block: Block,
    direction: Tensor,
    *,
    state: int | None = None,
    factors: Sequence[Factor] | None = None,
) -> Iterator[tuple[Summand, Tensor]]:
    """Yield each term as it was made, and what `direction` at a later state is where the term was made.

    The contribution of a term to ``<direction, x_k>`` is the inner product of the two: the same number as with
    `transported`, for one direction and at the cost of one pass.

    Args:
        stream: the stream.
        norms: its norms by the index of the state that they make.
        block: the tokens.
        direction: (token, d_model) float32 or float64.
        state: at which state it stands; by default the last.
        factors: as in `transported`.

    Yields:
        Summands, latest first, with the vectors (token, d_model) that were added, and directions (token, d_model).

    Raises:
        MissingDataError: as `transported`.

    >>> from streamlens.analyses.source import source_of
    >>> from fixtures import zoo
    >>> source = source_of(zoo.build("gpt2").module, tokens=torch.arange(8)[None])
    >>> block = next(source.blocks())
    >>> along = torch.ones(8, 32)
    >>> shares = [(p.vectors * u).sum(-1) for p, u in pulled_back(source.stream, {}, block, along)]
    >>> torch.allclose(sum(shares), (block.states[-1] * along).sum(-1), atol=1e-4)
    True
    """
    scales = skip_factors(stream) if factors is None else factors
    rstds = _rstds(stream, norms, block)
    dtype = direction.dtype
    for k in range(len(stream.steps) if state is None else state, -1, -1):
        if k in norms:
            yield _bias(stream, norms[k], k, direction), direction
            direction = _cast(norms[k], dtype).adjoint(direction, rstds[k].to(dtype))
        if k == 0:
            break
        for s in reversed(stream.steps[k - 1].sublayers):
            own = stream.sublayers[s]
            yield Summand(own.label, own.kind, s, k, block.writes[s].to(dtype)), direction
        if not _is_one(scales[k - 1]):
            direction = direction * _like(scales[k - 1], direction)
    for i, part in enumerate(stream.parts):
        yield Summand(part.label, "embed", i, 0, block.parts[i].to(dtype)), direction


def skip_factors(stream: Stream, parameters: Mapping[str, Tensor] | None = None) -> tuple[Factor, ...]:
    """Return the factor on the skip of each step, read off the recorded step itself; 1.0 where there is none.

    Args:
        stream: the stream.
        parameters: tensors by name, for factors that are learned.

    Raises:
        MissingDataError: a factor is a parameter that is not given.

    >>> from streamlens.discovery.streams import discover
    >>> from fixtures import zoo
    >>> specimen = zoo.build("scaled_skip_constant")
    >>> [round(c, 3) for c in skip_factors(discover(specimen.module, dict(specimen.inputs)[""]).stream())]
    [0.9, 1.2, 0.9, 1.2]
    """
    inputs = {norm.state: norm.input for norm in stream.norms if norm.state is not None}
    return tuple(_factor(stream, index, inputs.get(index + 1), parameters or {}) for index in range(len(stream.steps)))


def _factor(stream: Stream, index: int, norm_input: str | None, parameters: Mapping[str, Tensor]) -> Factor:
    step = stream.steps[index]
    summing = _until(step.instructions, norm_input)
    learned = parameters.get(step.scale) if isinstance(step.scale, str) else None
    one = torch.ones(1, stream.d_model, device=None if learned is None else learned.device)
    values = {"@state": one, **{f"@write:{s}": torch.zeros_like(one) for s in step.sublayers}}
    try:
        result = run(summing, values, parameters)[norm_input or last(summing, "@state")]
    except FormatError as error:
        raise MissingDataError(
            f"step {index} of stream {stream.name!r} scales its skip by a learned factor that is not here: {error}"
        ) from error
    row = result.reshape(-1)
    return float(row[0]) if bool((row == row[0]).all()) else row


def _until(instructions: Sequence[Instruction], output: str | None) -> Sequence[Instruction]:
    """The instructions up to the one that makes `output`."""
    for number, instruction in enumerate(instructions):
        if instruction.output == output:
            return instructions[: number + 1]
    return instructions


def _through(
    stream: Stream, norms: Mapping[int, FrozenNorm], rstds: Mapping[int, Tensor], state: int, parts: list[Summand]
) -> list[Summand]:
    norm = norms.get(state)
    if norm is None:
        return parts
    vectors = parts[0].vectors
    norm, rstd = _cast(norm, vectors.dtype), rstds[state].to(vectors.dtype)
    moved = [replace(p, vectors=norm.linear(p.vectors, rstd)) for p in parts]
    return [*moved, _bias(stream, norm, state, vectors)]


def _bias(stream: Stream, norm: FrozenNorm, state: int, like: Tensor) -> Summand:
    label = next(n.label for n in stream.norms if n.state == state)
    return Summand(f"bias:{label}", BIAS, state, state, norm.bias.to(like).expand_as(like))


def _rstds(stream: Stream, norms: Mapping[int, FrozenNorm], block: Block) -> dict[int, Tensor]:
    """(token,) by the index of the state that the norm makes."""
    return {n.state: block.norms[i][1] for i, n in enumerate(stream.norms) if n.state in norms}  # type: ignore[misc]


def _cast(norm: FrozenNorm, dtype: torch.dtype) -> FrozenNorm:
    return FrozenNorm(norm.centred, norm.gain.to(dtype), norm.bias.to(dtype))


def _is_one(factor: Factor) -> bool:
    return isinstance(factor, float) and factor == 1.0


def _like(factor: Factor, vectors: Tensor) -> Factor:
    return factor.to(vectors) if isinstance(factor, Tensor) else factor
