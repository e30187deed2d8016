"""Laws of the positional part (METHODS.md, T-P1 to T-P3) for real weights and real text, from one run of each model."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from streamlens.analyses.position.energies import null_band, positional, split
from streamlens.analyses.position.sums import PositionSums, sums_of
from streamlens.analyses.source import source_of
from streamlens.block import Block
from tests.conftest import minilm, smollm2
from tests.test_invariants_position import laid_out

pytestmark = pytest.mark.real

BOTH = pytest.mark.parametrize("name", ["smollm2", "minilm"])


@cache
def opened(name: str) -> tuple[list[Block], PositionSums]:
    source = source_of((smollm2 if name == "smollm2" else minilm)(), window=16, max_tokens=192)
    blocks = list(source.blocks())
    return blocks, sums_of(source, blocks)


def state(blocks: list[Block], k: int) -> Tensor:
    return laid_out(blocks, [b.states[k] for b in blocks])


@BOTH
@pytest.mark.parametrize("first", [0, 1])
def test_the_four_parts_add_up_and_their_energies_too(name: str, first: int) -> None:
    """T-P1 at every state, by plain means; position 0 of SmolLM2 is a thousand times as large as the others."""
    blocks, sums = opened(name)
    for k in range(len(blocks[0].states)):
        whole = state(blocks, k)[:, first:]
        own = split(sums, k, first)
        docs, positions, _ = whole.shape
        mean = whole.mean((0, 1))
        pos, ctx = whole.mean(0) - mean, whole.mean(1) - mean
        rest = whole - mean - pos - ctx[:, None]
        total = float(whole.square().sum())
        assert own.mean + own.total == pytest.approx(total, rel=1e-10)
        assert own.mean == pytest.approx(docs * positions * float(mean.square().sum()), rel=1e-9)
        np.testing.assert_allclose(own.parts.numpy(), pos.numpy(), atol=1e-10 * total**0.5)
        assert float(own.parts.sum(0).abs().max()) < 1e-10 * total**0.5
        expected = docs * pos.square().sum(), positions * ctx.square().sum(), rest.square().sum()
        found = own.position, own.context, own.rest
        np.testing.assert_allclose(found, [float(x) for x in expected], rtol=1e-6, atol=1e-10 * total)


@BOTH
def test_the_positional_parts_of_all_terms_add_up_to_that_of_the_state(name: str) -> None:
    """T-P3 at every state: to the roundings of float32, of the largest term that goes in."""
    blocks, sums = opened(name)
    for k in sums.states:
        terms = [t[0] for i in range(len(sums.term_names)) if (t := sums.term(k, i)) is not None]
        parts = [positional(t, sums.docs, sums.first) for t in terms]
        own = state(blocks, k)[:, sums.first :].mean(0)
        own = own - own.mean(0)
        size = max(float(part.norm()) for part in parts)
        assert float((torch.stack(parts).sum(0) - own).norm()) < 2e-5 * size, k


@BOTH
def test_shuffled_tokens_have_no_place_in_the_first_state_but_a_table_has(name: str) -> None:
    """T-P2: the tokens of each window in another order, so that none belongs anywhere."""
    blocks, _ = opened(name)
    ids = torch.cat([b.ids.reshape(b.shape) for b in blocks])
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.stack([row[torch.randperm(len(row), generator=generator)] for row in ids])
    source = source_of((smollm2 if name == "smollm2" else minilm)(), tokens=shuffled)
    sums = sums_of(source, source.blocks(), include_first=True, origins=False)
    own = split(sums, 0)
    low, high = null_band(sums, 0, own)
    assert (1.5 * low < own.share < 1.5 * high) == (name == "smollm2")
    assert own.share > 3 * high or name == "smollm2"
