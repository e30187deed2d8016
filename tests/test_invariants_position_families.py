"""Laws of the positional part on one small model of each family: null bands, permuted inputs, probes, lesions."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from streamlens.analyses.position.door import positional_persistence
from streamlens.analyses.position.energies import null_band, split
from streamlens.analyses.position.lesion import position_lesion
from streamlens.analyses.position.probes import position_probes
from streamlens.analyses.position.sums import sums_of
from streamlens.analyses.source import Source, source_of
from tests.conftest import case
from tests.test_invariants_position import WIDE, ids, laid_out

WITH_TABLE = ("gpt2", "bert", "user_post_norm", "bart")
WITHOUT = ("llama", "gemma2", "gptj", "granite", "t5")
"""Positions come into these inside attention alone."""


def shown(name: str, docs: int = 48, positions: int = 11, module: nn.Module | None = None) -> Source:
    """A specimen on random tokens, which are independent of where they stand."""
    found = case(name)
    tokens = ids(docs, positions, 50)
    if isinstance(found.inputs, Tensor):
        return source_of(module or found.module, inputs=tokens.T.contiguous(), stream=None)
    given: dict[str, Any] = dict(found.inputs)
    for number, key in enumerate(k for k, v in given.items() if isinstance(v, Tensor)):
        given[key] = ids(docs, positions, 50, seed=number)
    return source_of(module or found.module, inputs=given, stream=found.anatomy.stream().name)


@pytest.mark.parametrize("name", [*WITH_TABLE, *WITHOUT])
def test_the_first_state_has_position_where_there_is_a_table_and_within_its_null_band_where_not(name: str) -> None:
    """T-P2: random tokens alone leave the corrected share around zero; a table is above the band by far."""
    source = shown(name, docs=96)
    sums = sums_of(source, source.blocks(), origins=False)
    own = split(sums, 0)
    low, high = null_band(sums, 0, own)
    if name in WITHOUT:
        assert 1.5 * low < own.share < 1.5 * high
        assert own.raw_share > 3 * high  # of averages over few documents a part is noise, and is taken off
    else:
        assert own.share > 3 * high


@pytest.mark.parametrize("name", ["gpt2", "nanogpt", "opt"])
def test_where_all_tokens_are_the_same_the_first_state_is_the_table(name: str) -> None:
    """T-P7: both measures of likeness are 1 there, however little they are for what the layers write."""
    found = positional_persistence(case(name).module, tokens=torch.full((4, 11), 7), progress=False)
    assert found.cka[0] == pytest.approx(1.0, abs=1e-5)
    assert found.subspace_overlap[0] == pytest.approx(1.0, abs=1e-5)
    assert (found.cka[1:] < 1 - 1e-5).all()
    noisy = positional_persistence(case(name).module, tokens=ids(48, 11, 40), progress=False)
    assert 0.5 < noisy.cka[0] < found.cka[0]


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_permuted_inputs_give_permuted_states_of_an_encoder(name: str) -> None:
    """T-P5: an encoder sees both sides; without its table of positions (or of distances) it cannot tell them."""
    found = case(name, WIDE)
    tables = {
        "t5": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        "bart": "model.encoder.embed_positions",
    }
    tokens, order = ids(3, 9, 50), torch.randperm(9, generator=torch.Generator().manual_seed(1))

    def seen(module: nn.Module, given: Tensor) -> list[Tensor]:
        source = source_of(module, inputs={**found.inputs, "input_ids": given}, stream="encoder")  # type: ignore[dict-item]
        (block,) = source.blocks()
        return [laid_out([block], [tensor]) for tensor in (*block.states, *block.writes)]

    without = copy.deepcopy(found.module)
    table: Any = without.get_submodule(tables[name])
    nn.init.zeros_(table.weight)
    # The norms of T5 are float32 whatever they are given.
    exact = 1e-5 if name == "t5" else 1e-11
    for one, two in zip(seen(without, tokens), seen(without, tokens[:, order]), strict=True):
        torch.testing.assert_close(two, one[:, order], rtol=exact, atol=exact)
    last = [seen(found.module, given)[-1] for given in (tokens, tokens[:, order])]
    assert float((last[1] - last[0][:, order]).abs().max()) > 1e-3


@pytest.mark.parametrize("name", [*WITH_TABLE, *WITHOUT])
def test_probes_read_tables_and_nothing_else(name: str) -> None:
    """T-P8: on documents held out; labels that were shuffled are not found anywhere, and tokens alone have no place."""
    last = len(case(name).anatomy.stream().steps)
    found = position_probes(shown(name, docs=96), states=[0, last], progress=False)
    assert (found.r_squared_shuffled < 0.05).all()
    if name in WITH_TABLE:
        assert found.low[0] > 0.3
    else:
        assert found.r_squared[0] < 0.05


@pytest.mark.parametrize("name", [*WITH_TABLE, *WITHOUT])
def test_a_lesion_that_takes_nothing_away_costs_nothing(name: str) -> None:
    """T-P9 through the door: scores, shares and probes of a factor of one are those of the model itself."""
    found = position_lesion(shown(name, docs=24), alphas=[1.0, 0.0], progress=False)
    for number, lesion in enumerate(found.lesions):
        if lesion.mode == "scale" and lesion.alpha == 1.0:
            assert found.damage[number] == 0.0
            later = slice(lesion.step + 1, None)
            np.testing.assert_array_equal(found.position_share.value[number, later], found.baseline[later])
        elif lesion.mode == "scale":
            assert found.damage[number] != 0.0
