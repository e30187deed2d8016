"""Transport through the norms of the stream: against the states, and against a product of plain matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures.recipe import D_MODEL
from streamlens.analyses.frozen import FrozenNorm, stream_norms
from streamlens.analyses.source import Source, source_of
from streamlens.analyses.transport import BIAS, Summand, factors_of, pulled_back, transported
from streamlens.block import Block
from streamlens.errors import MissingDataError
from streamlens.proof import relative_error
from tests.conftest import case

PRE = ("gpt2", "llama", "gemma2", "gptj", "granite", "t5", "transformer_pre", "parallel_chain")
CHANGED = ("bert", "user_post_norm", "bart", "bloom", "albert", "deepnorm", "scaled_skip_constant")
ALL = (*PRE, *CHANGED, "scaled_skip_parameter", "transformer_post", "user_post_norm_embeddings")


def opened(name: str) -> Source:
    found = case(name)
    return source_of(found.module, inputs=found.inputs, stream="decoder" if name.startswith("transformer") else None)


def walk(source: Source, block: Block, **options: Any) -> list[list[Summand]]:
    norms = stream_norms(source.stream, source.parameters)
    factors = factors_of(source.stream, source.parameters)
    return list(transported(source.stream, norms, block, factors=factors, **options))


@pytest.mark.parametrize("name", ALL)
def test_the_terms_sum_to_every_state(name: str) -> None:
    source = opened(name)
    for block in source.blocks():
        walked = walk(source, block)
        assert len(walked) == len(block.states)
        for state, parts in zip(block.states, walked, strict=True):
            assert relative_error(torch.stack([p.vectors for p in parts]).sum(0), state) < 1e-5


@pytest.mark.parametrize("name", PRE)
def test_what_nothing_changes_is_not_copied(name: str) -> None:
    source = opened(name)
    block = next(iter(source.blocks()))
    final = walk(source, block)[-1]
    for part in final:
        own = block.parts[part.index] if part.kind == "embed" else block.writes[part.index]
        assert part.vectors.data_ptr() == own.data_ptr()


@pytest.mark.parametrize("name", ALL)
def test_the_adjoint_gives_each_term_the_same_contribution(name: str) -> None:
    source = opened(name)
    block = next(iter(source.blocks()))
    norms, factors = stream_norms(source.stream, source.parameters), factors_of(source.stream, source.parameters)
    walked = walk(source, block, dtype=torch.float64)
    torch.manual_seed(0)
    for state in (0, 1, len(walked) - 1):
        direction = torch.randn(block.states[0].shape, dtype=torch.float64)
        forwards = {(p.kind, p.index): (p.vectors * direction).sum(-1) for p in walked[state]}
        pulled = pulled_back(source.stream, norms, block, direction, state=state, factors=factors)
        backwards = {(p.kind, p.index): (p.vectors * u).sum(-1) for p, u in pulled}
        assert backwards.keys() == forwards.keys()
        for key, value in forwards.items():
            assert torch.allclose(backwards[key], value, rtol=0, atol=1e-9)


def layer_norm(y: Tensor, gain: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """By its definition, biased variance, epsilon inside the root."""
    centred = y - y.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + epsilon) * gain + bias


def test_float64_is_exact_and_equals_a_product_of_matrices() -> None:
    """A post-norm stream made by hand: each term times the d_model x d_model matrices of the norms after it."""
    stream = case("bert").anatomy.stream()
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens, epsilon = 5, 1e-5
    parts, writes = [noise(tokens, D_MODEL) for _ in stream.parts], [noise(tokens, D_MODEL) for _ in stream.sublayers]
    norms = {k: FrozenNorm(True, 1 + 0.3 * noise(D_MODEL), noise(D_MODEL)) for k in range(len(stream.steps) + 1)}
    states: list[Tensor] = []
    rstds: list[tuple[Tensor, Tensor]] = []
    maps: list[Tensor] = []
    for k in range(len(stream.steps) + 1):
        y = sum(parts, torch.zeros(1)) if k == 0 else states[-1] + writes[k - 1]
        rstds.append((y.mean(-1), (y.var(-1, correction=0) + epsilon).rsqrt()))
        states.append(layer_norm(y, norms[k].gain, norms[k].bias, epsilon))
        centring = torch.eye(D_MODEL, dtype=torch.float64) - 1 / D_MODEL
        maps.append(torch.einsum("i,ij,t->tij", norms[k].gain, centring, rstds[-1][1]))
    nobody = torch.zeros(tokens, dtype=torch.int64)
    block = Block(0, tokens, nobody, nobody.int(), nobody.int(), parts, states, writes, rstds, {})
    for k, found in enumerate(transported(stream, norms, block, dtype=torch.float64)):
        assert relative_error(torch.stack([p.vectors for p in found]).sum(0), states[k]) < 1e-12
        for part in found:
            expected = {"embed": parts, BIAS: [norms[j].bias.expand(tokens, D_MODEL) for j in norms]}
            vector = expected.get(part.kind, writes)[part.index]
            for later in range(part.born + (part.kind == BIAS), k + 1):
                vector = torch.einsum("tij,tj->ti", maps[later], vector)
            assert torch.allclose(part.vectors, vector, rtol=0, atol=1e-11)


def test_a_learned_factor_needs_its_value() -> None:
    stream = case("scaled_skip_parameter").anatomy.stream()
    with pytest.raises(MissingDataError, match="learned factor"):
        factors_of(stream)


def test_factors_are_the_models_own() -> None:
    found = case("scaled_skip_parameter")
    module: Any = found.module
    expected = [float(lam) for layer in module.layers for lam in layer.lam]
    assert factors_of(found.anatomy.stream(), dict(module.named_parameters())).skips == pytest.approx(expected)
    assert factors_of(case("deepnorm").anatomy.stream()).skips == (1.5,) * 4
    assert factors_of(case("bert").anatomy.stream()).plain
