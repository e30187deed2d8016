"""Laws of the positional part: energies and origins add up, permuted inputs, known answers; on tiny and real models."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fixtures import train, witnesses
from fixtures.planted_position import POSITIONS, PositionCarrier, UniformAverage
from streamlens.analyses.position.door import positional_persistence
from streamlens.analyses.position.energies import null_band, positional, split
from streamlens.analyses.position.lesion import position_lesion
from streamlens.analyses.position.probes import position_probes
from streamlens.analyses.position.sums import sums_of
from streamlens.analyses.position.theatre import Lesion
from streamlens.analyses.source import Source, source_of
from streamlens.block import Block
from streamlens.checkpoint.model import Model, wrap
from tests.conftest import case, minilm, smollm2
from tests.test_position_lesion import played

WIDE = torch.float64


def opened(name: str, dtype: torch.dtype = WIDE) -> Source:
    found = case(name, dtype)
    stream = "decoder" if name in ("t5", "bart", "transformer_pre", "transformer_post") else None
    return source_of(found.module, inputs=found.inputs, stream=stream)


def laid_out(blocks: list[Block], states: list[Tensor]) -> Tensor:
    """(doc, position, d_model) float64 of a state, or a write, over all blocks."""
    return torch.cat([t.view(*b.shape, -1) for b, t in zip(blocks, states, strict=True)]).double()


def ids(docs: int, positions: int, vocab: int = 40, seed: int = 0) -> Tensor:
    return torch.randint(0, vocab, (docs, positions), generator=torch.Generator().manual_seed(seed))


def energies_add_up(source: Source, states: list[int]) -> None:
    """T-P1: mean, position, context and rest have all of the energy, and the positional part sums to nothing."""
    blocks = list(source.blocks())
    sums = sums_of(source, blocks, origins=False)
    for k in states:
        whole = laid_out(blocks, [b.states[k] for b in blocks])[:, : sums.positions]
        for first in (0, 1):
            own = split(sums, k, first)
            total = float(whole[:, first:].square().sum())
            assert own.mean + own.total == pytest.approx(total, rel=1e-10)
            assert min(own.mean, own.position, own.context, own.rest) >= 0
            assert float(own.parts.sum(0).abs().max()) < 1e-9 * total**0.5


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "gemma2", "gptj", "user_post_norm", "granite", "bart"])
def test_energies_add_up_to_the_squares_of_the_states(name: str) -> None:
    source = opened(name)
    energies_add_up(source, list(range(len(source.stream.steps) + 1)))


CARRIED = ("gpt2", "gptj", "opt", "gptneo", "nanogpt", "parallel_chain")
"""Terms are carried as they are."""
MOVED = ("bert", "user_post_norm", "gemma2", "llama", "granite", "t5", "bart", "transformer_post", "deepnorm", "bloom")
"""Terms are moved through norms, or scaled."""


@pytest.mark.parametrize("name", [*CARRIED, *MOVED])
def test_the_positional_parts_of_all_terms_add_up_to_that_of_the_state(name: str) -> None:
    """T-P3."""
    source = opened(name)
    sums = sums_of(source, source.blocks())
    for k in sums.states:
        own = positional(sums.sums[k], sums.docs, sums.first)
        terms = [t[0] for i in range(len(sums.term_names)) if (t := sums.term(k, i)) is not None]
        total = sum(positional(t, sums.docs, sums.first) for t in terms)
        assert float((torch.as_tensor(total) - own).norm() / own.norm()) < 1e-10


@pytest.mark.parametrize("name", ["gpt2", "opt", "gptneo", "nanogpt"])
def test_retention_changes_by_the_projections_of_the_writes(name: str) -> None:
    """T-P4: kappa_s - 1 is the sum of <pos(w_j), pos(table)> over <pos(table), pos(table)>, from plain averages."""
    source = opened(name)
    blocks = list(source.blocks())
    found = positional_persistence(source, progress=False)

    def part(tensors: list[Tensor]) -> Tensor:
        means = laid_out(blocks, tensors)[:, 1:].mean(0)
        return means - means.mean(0)

    place = next(i for i, p in enumerate(source.stream.parts) if p.label == "pos_embed")
    table = part([b.parts[place] for b in blocks])
    start = part([b.states[0] for b in blocks])
    kappa = float((start * table).sum() / table.square().sum())
    assert found.retention[0] == pytest.approx(kappa, rel=1e-9)
    for k, step in enumerate(source.stream.steps):
        for s in step.sublayers:
            kappa += float((part([b.writes[s] for b in blocks]) * table).sum() / table.square().sum())
        assert found.retention[k + 1] == pytest.approx(kappa, rel=1e-9)


class TestPermutedInputs:
    """T-P5: what sees both sides and is told no positions gives permuted states for permuted inputs."""

    @pytest.mark.parametrize("name", ["encoder_pre", "encoder_post", "bert"])
    def test_states_and_writes_are_permuted(self, name: str) -> None:
        found = case(name, WIDE)
        module = copy.deepcopy(found.module)
        if name == "bert":
            table: Any = module.get_submodule("bert.embeddings.position_embeddings")
            torch.nn.init.zeros_(table.weight)
            given = {"input_ids": ids(3, 9, 50)}
            order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
            permuted: Any = {"input_ids": given["input_ids"][:, order]}
        else:
            given = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(0), dtype=WIDE)  # type: ignore[assignment]
            order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
            permuted = given[:, order]  # type: ignore[index]
        (one,), (two,) = (list(source_of(module, inputs=x).blocks()) for x in (given, permuted))
        for mine, other in zip([*one.states, *one.writes], [*two.states, *two.writes], strict=True):
            expected = laid_out([one], [mine])[:, order]
            torch.testing.assert_close(laid_out([two], [other]), expected, rtol=1e-11, atol=1e-11)

    @pytest.mark.real
    def test_minilm_without_its_table_has_no_position(self) -> None:
        model = minilm()
        module = copy.deepcopy(model.module)
        table: Any = module.get_submodule("embeddings.position_embeddings")
        torch.nn.init.zeros_(table.weight)
        tokens = ids(64, 16, 20_000)
        source = source_of(module, tokens=tokens)
        sums = sums_of(source, source.blocks(), include_first=True)
        for k in (0, 3, 6, 12):
            own = split(sums, k)
            assert own.share < 1.5 * null_band(sums, k, own)[1]
        energies_add_up(source, [0, 6, 12])


def test_the_size_of_an_average_falls_as_its_number_does() -> None:
    """T-P6 (Chi et al. 2023): squares of writes times t + 1 equal the mean square of a value, exactly known."""
    net = UniformAverage()
    source = source_of(net, tokens=ids(30_000, 16), batch_tokens=64_000)
    square, docs = torch.zeros(16, dtype=WIDE), 0
    for block in source.blocks():
        square += block.writes[0].view(*block.shape, -1).double().square().sum((0, 2))
        docs += block.shape[0]
    attention: Any = net.attn
    with torch.no_grad():
        values = attention.out(attention.qkv(net.embed.weight).chunk(3, dim=-1)[2]).double()
    expected = float(values.square().sum(1).mean())
    assert docs == 30_000
    assert float(values.mean(0).abs().max()) < 1e-6
    np.testing.assert_allclose((square / docs * torch.arange(1, 17)).numpy() / expected, 1.0, rtol=0.02)


class TestLesion:
    def test_before_the_eraser_it_changes_nothing_behind_it(self) -> None:
        """T-P9: what the MLP of layer 1 clears anyway is not missed behind it, and is missed in front of it."""
        net = PositionCarrier(eraser=1)
        names = source_of(net, tokens=ids(32, 20)).stream.state_labels
        cleared, basis = names.index("1_mlp_out"), torch.eye(24, dtype=WIDE)[:, POSITIONS]
        lesion = Lesion("position", 0, "", mean=torch.zeros(24, dtype=WIDE), basis=basis)
        (output,), plain, theatre = played(net, [lesion], tokens=ids(32, 20))
        torch.testing.assert_close(output, plain, rtol=1e-4, atol=1e-5)
        for k in range(1, len(names)):
            changed, unchanged = theatre.sums[0].sums[k], theatre.base.sums[k]
            if k < cleared:
                assert float(changed[:, POSITIONS].norm()) < 1e-4 < float(unchanged[:, POSITIONS].norm())
            else:
                torch.testing.assert_close(changed, unchanged, rtol=1e-4, atol=1e-4)

    @pytest.mark.real
    def test_minilm_needs_its_positions_more_than_anything_else_of_that_size(self) -> None:
        options: dict[str, Any] = {"window": 32, "max_tokens": 32 * 48, "progress": False}
        found = position_lesion(minilm(), skips=["0_attn_out"], alphas=[1.0], **options)
        assert [x.mode for x in found.lesions] == ["scale", "position", "random"]
        assert found.damage[0] == 0.0
        np.testing.assert_array_equal(found.left.value[0, 1:], 1.0)
        assert found.left.value[1, 1] < 0.8 * found.left.value[2, 1]

    @pytest.mark.real
    def test_smollm2_with_a_factor_of_one_is_itself(self) -> None:
        options: dict[str, Any] = {"window": 24, "max_tokens": 24 * 8, "progress": False}
        found = position_lesion(smollm2(), skips=["14_attn_out"], alphas=[1.0, 0.0], **options)
        assert found.damage[0] == 0.0
        assert found.damage[1] > 0.5
        assert found.rounding.max() == 0.0


class TestProbes:
    @pytest.mark.real
    def test_minilm_shows_its_table_and_smollm2_builds_position_up(self) -> None:
        """T-P8: a learned table is read off x_0; with rotary positions there is nothing there, and something later."""
        options: dict[str, Any] = {"window": 24, "max_tokens": 48 * 24, "documents": 48, "progress": False}
        learned = position_probes(minilm(), states=[0, 6], **options)
        assert learned.r_squared[0] > 0.9
        rotary = position_probes(smollm2(), states=[0, 30], **options)
        assert rotary.r_squared[0] < 0.1
        assert rotary.r_squared[1] > 0.3
        for found in (learned, rotary):
            assert (found.r_squared_shuffled < 0.1).all()

    def test_a_witness_without_positions_learns_to_build_them(self) -> None:
        """H16: nothing in x_0; more in the middle than the causal mask gives before training."""
        model: Model = witnesses.model("nope")
        early = wrap(witnesses.untrained("nope"), "untrained", model.config, model.tokenizer)
        tokens = train.split_text()[1][: 64 * 64].view(64, 64)
        found = position_probes(model, untrained=early, states=[0, 8], tokens=tokens, progress=False)
        assert found.r_squared[0] < 0.1
        assert found.low[1] > 0.3
        assert found.low[1] > found.r_squared_untrained[1] + 0.1
        with_table = position_probes(witnesses.model("pre_norm"), states=[0], tokens=tokens, progress=False)
        assert with_table.low[0] > 0.9
