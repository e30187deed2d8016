"""What has become of each embedding part, write and bias by the time it stands in a later state; exact, token by token.

A state is a sum. In a pre-norm stream each term stays what it was; where the stream passes a norm or a factor on the
skip, all terms so far pass it as well, and with the norm's statistics held at those of the forward pass that is
linear in each (Kobayashi et al. 2021). With A_k the linear part of the norm that makes x_k, c_k the factor on the
skip and e_s that on a write (they are equal where a whole sum is scaled, as in (x + f(x)) / sqrt(2)):

    x_{k+1} = A_{k+1} (c_k x_k + sum of e_s w_s) + beta_{k+1}

Nothing is ever a d_model x d_model matrix. To ask about many terms at every state, walk forwards (`transported`); to
ask how much each term contributes along one direction per token, walk backwards (`pulled_back`), which touches each
write once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from streamlens.analyses.frozen import FrozenNorm
from streamlens.anatomy import Instruction, Stream
from streamlens.block import Block
from streamlens.errors import FormatError, MissingDataError
from streamlens.proof import relative_error
from streamlens.replay import last, parameter_names, run

BIAS = "norm"
"""Kind of a summand that is the bias of a norm on the stream."""

Factor = float | Tensor
"""What a term is multiplied with: a number, or one for each dimension, (d_model,)."""


@dataclass(frozen=True)
class Factors:
    """What the terms of each sum of a stream are multiplied with, from the term up to the norm or the next state."""

    parts: tuple[Factor, ...]
    """(part,) of the embedding sum."""
    skips: tuple[Factor, ...]
    """(step,) of the state that the skip carries."""
    writes: tuple[Factor, ...]
    """(sublayer,)"""

    @property
    def plain(self) -> bool:
        """Whether all of them are 1."""
        return all(_is_one(f) for f in (*self.parts, *self.skips, *self.writes))


def times(vectors: Tensor, factor: Factor) -> Tensor:
    """Return (token, d_model) times a factor; the very same tensor where that is 1."""
    if isinstance(factor, Tensor):
        return vectors * factor.to(vectors)
    return vectors if factor == 1.0 else vectors * factor


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
    factors: Factors | None = None,
    dtype: torch.dtype = torch.float32,
) -> Iterator[list[Summand]]:
    """Yield for each state x_0 ... x_K the terms that sum to it.

    Args:
        stream: the stream.
        norms: its norms by the index of the state that they make (`stream_norms`); empty in a pre-norm model.
        block: the tokens. Of its states only the last of the first block is looked at: see Raises.
        factors: the factors on its sums (`factors_of`); needed where they are parameters.
        dtype: float32 or float64, of everything that is yielded.

    Yields:
        The summands of x_k, in order of birth: embedding parts, then for each step its writes and the bias of its
        norm. Their sum is x_k up to rounding; after the end of the iteration nothing is kept.

    Raises:
        MissingDataError: the block lacks a write, or a factor is a parameter and `factors` is not given; or the terms
            of the first block do not sum to its last state, because something else happens to the stream.

    >>> from streamlens.analyses.source import source_of
    >>> from fixtures import zoo
    >>> source = source_of(zoo.build("gpt2").module, tokens=torch.arange(8)[None])
    >>> block = next(source.blocks())
    >>> for state, parts in zip(block.states, transported(source.stream, {}, block)):
    ...     assert torch.allclose(sum(p.vectors for p in parts), state, atol=1e-5)
    >>> [p.label for p in parts]
    ['embed', 'pos_embed', '0_attn_out', '0_mlp_out', '1_attn_out', '1_mlp_out', '2_attn_out', '2_mlp_out']
    """
    known = factors_of(stream) if factors is None else factors
    rstds = _rstds(stream, norms, block)
    parts = [
        Summand(p.label, "embed", i, 0, times(block.parts[i].to(dtype), known.parts[i]))
        for i, p in enumerate(stream.parts)
    ]
    parts = _through(stream, norms, rstds, 0, parts)
    yield list(parts)
    for index, step in enumerate(stream.steps):
        parts = [replace(p, vectors=times(p.vectors, known.skips[index])) for p in parts]
        for s in step.sublayers:
            own = stream.sublayers[s]
            written = times(block.writes[s].to(dtype), known.writes[s])
            parts.append(Summand(own.label, own.kind, s, index + 1, written))
        parts = _through(stream, norms, rstds, index + 1, parts)
        yield list(parts)
    if block.start == 0:
        whole = torch.zeros_like(parts[0].vectors)
        for part in parts:
            whole += part.vectors
        demand_close(stream, block.states[-1], relative_error(whole, block.states[-1].to(whole.device)))


def pulled_back(
    stream: Stream,
    norms: Mapping[int, FrozenNorm],
    block: Block,
    direction: Tensor,
    *,
    state: int | None = None,
    factors: Factors | None = None,
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
        Summands, latest first, with the vectors (token, d_model) as the model made them, before any factor, and
        directions (token, d_model).

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
    known = factors_of(stream) if factors is None else factors
    rstds = _rstds(stream, norms, block)
    for k in range(len(stream.steps) if state is None else state, -1, -1):
        if k in norms:
            yield _bias(stream, norms[k], k, direction), direction
            direction = norms[k].adjoint(direction, rstds[k])
        if k == 0:
            break
        for s in reversed(stream.steps[k - 1].sublayers):
            own = stream.sublayers[s]
            written = Summand(own.label, own.kind, s, k, block.writes[s].to(direction))
            yield written, times(direction, known.writes[s])
        direction = times(direction, known.skips[k - 1])
    for i, part in enumerate(stream.parts):
        yield Summand(part.label, "embed", i, 0, block.parts[i].to(direction)), times(direction, known.parts[i])


def demand_sum(stream: Stream, norms: Mapping[int, FrozenNorm], block: Block, factors: Factors) -> None:
    """Make sure that the terms of a stream sum to its last state, for an analysis that does not walk forwards.

    Args:
        stream: the stream.
        norms: its norms by the index of the state that they make.
        block: some of its tokens.
        factors: the factors on its sums.

    Raises:
        MissingDataError: they do not, or the block lacks a write.
    """
    deque(transported(stream, norms, replace(block, start=0), factors=factors), maxlen=0)


def factors_of(stream: Stream, parameters: Mapping[str, Tensor] | None = None) -> Factors:
    """Return the factors on the terms of each sum, read off the recorded sums themselves; 1.0 where there is none.

    Args:
        stream: the stream.
        parameters: tensors by name, for factors that are learned.

    Returns:
        Numbers, or (d_model,) on the CPU in float64 where a factor is a vector.

    Raises:
        MissingDataError: a factor is a parameter that is not given.

    >>> from streamlens.discovery.streams import discover
    >>> from fixtures import zoo
    >>> specimen = zoo.build("scaled_skip_constant")
    >>> found = factors_of(discover(specimen.module, dict(specimen.inputs)[""]).stream())
    >>> found.skips, found.writes
    ((0.9, 1.2, 0.9, 1.2), (1.0, 1.0, 1.0, 1.0))
    """
    inputs = {norm.state: norm.input for norm in stream.norms if norm.state is not None}
    own = {n: parameters[n].detach().cpu() for n in parameter_names(stream) if parameters and n in parameters}
    terms = tuple(f"@part:{i}" for i in range(len(stream.parts)))
    parts = _read_off(stream, _until(stream.embedding, inputs.get(0)), terms, own, "the embedding")
    skips: list[Factor] = []
    writes: dict[int, Factor] = {}
    for index, step in enumerate(stream.steps):
        terms = ("@state", *(f"@write:{s}" for s in step.sublayers))
        summing = _until(step.instructions, inputs.get(index + 1))
        skip, *found = _read_off(stream, summing, terms, own, f"step {index}")
        skips.append(skip)
        writes |= dict(zip(step.sublayers, found, strict=True))
    return Factors(tuple(parts), tuple(skips), tuple(writes[s.index] for s in stream.sublayers))


def _read_off(
    stream: Stream,
    summing: Sequence[Instruction],
    terms: Sequence[str],
    parameters: Mapping[str, Tensor],
    where: str,
) -> list[Factor]:
    """What a sum makes of each term where the others are zero."""
    one = torch.ones(1, stream.d_model, dtype=torch.float64)
    found: list[Factor] = []
    for term in terms:
        values = {other: one if other == term else torch.zeros_like(one) for other in terms}
        try:
            row = run(summing, values, parameters)[last(summing, terms[0])].reshape(-1)
        except FormatError as error:
            raise MissingDataError(
                f"{where} of stream {stream.name!r} is scaled by a learned factor that is not here: {error}"
            ) from error
        found.append(float(row[0]) if bool((row == row[0]).all()) else row.double())
    return found


def _until(instructions: Sequence[Instruction], output: str | None) -> Sequence[Instruction]:
    """The instructions up to the one that makes `output`: all, if that is None, and none, if it is there already."""
    if output is None:
        return instructions
    outputs = [i.output for i in instructions]
    return instructions[: outputs.index(output) + 1] if output in outputs else ()


def _through(
    stream: Stream, norms: Mapping[int, FrozenNorm], rstds: Mapping[int, Tensor], state: int, parts: list[Summand]
) -> list[Summand]:
    norm = norms.get(state)
    if norm is None:
        return parts
    moved = [replace(p, vectors=norm.linear(p.vectors, rstds[state])) for p in parts]
    return [*moved, _bias(stream, norm, state, parts[0].vectors)]


def _bias(stream: Stream, norm: FrozenNorm, state: int, like: Tensor) -> Summand:
    label = next(n.label for n in stream.norms if n.state == state)
    return Summand(f"bias:{label}", BIAS, state, state, norm.bias.to(like).expand_as(like))


def _rstds(stream: Stream, norms: Mapping[int, FrozenNorm], block: Block) -> dict[int, Tensor]:
    """(token,) by the index of the state that the norm makes."""
    return {n.state: block.norms[i][1] for i, n in enumerate(stream.norms) if n.state in norms}  # type: ignore[misc]


def demand_close(stream: Stream, state: Tensor, error: Tensor) -> None:
    """Refuse terms that do not sum to the last state, as each step may round it once.

    Args:
        stream: the stream.
        state: its last state, of which the dtype counts.
        error: by how much their sum differs from it, relative to it.

    Raises:
        MissingDataError: by more than rounding explains.
    """
    allowed = max(1e-4, 2.0 * len(stream.steps) ** 0.5 * torch.finfo(state.dtype).eps)
    if not float(error) <= allowed:
        raise MissingDataError(
            f"the terms of stream {stream.name!r} do not sum to its last state: relative L2 error {float(error):.2g}, "
            f"where rounding explains {allowed:.1g}. Something that is neither a sum, nor a constant factor, nor one "
            f"norm happens to the stream between two states, so its terms have no shares"
        )


def _is_one(factor: Factor) -> bool:
    return isinstance(factor, float) and factor == 1.0
