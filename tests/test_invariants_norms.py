"""Laws of the contribution norms: every layer by hand, exact identities, scale and rotation, planted truth."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import streamlens as sl
from fixtures import planted
from fixtures.planted_position import PositionCarrier
from streamlens.analyses.norms.accumulate import ContributionNorms, _Walk
from streamlens.analyses.norms.answer import NormsResult
from streamlens.analyses.norms.measures import MEASURES, pair, proximities
from streamlens.analyses.source import source_of
from streamlens.anatomy import Stream
from streamlens.block import Block
from tests.conftest import case
from tests.scaled_sums import IDS, build
from tests.test_norms import columns, norms_of, source_for

SIZES = ("relative_write", "cosine", "growth", "block_influence")


def layer_by_hand(stream: Stream, block: Block, layer: int) -> dict[str, float]:
    """X before the layer, w the sum of its writes as they stand at its end, y their sum; influence from real states."""
    own = [s for s in stream.sublayers if s.layer == layer]
    first, last = min(s.read for s in own), max(s.read for s in own) + 1
    sums = dict.fromkeys(SIZES, 0.0)
    kept = [t for t in range(block.stop) if int(block.position[t]) > 0]
    states, writes = (block.states[first], block.states[last]), {s.index: block.writes[s.index] for s in own}
    for token in kept:
        x, after = (state[token].double() for state in states)
        w, carried = torch.zeros_like(x), x
        for index in range(first, last):
            scale = stream.steps[index].scale
            factor = scale if isinstance(scale, float) else 1.0
            w, carried = w * factor, carried * factor
            for s in stream.steps[index].sublayers:
                w = w + writes[s][token].double()
        y = carried + w
        sums["relative_write"] += float(w.norm() / x.norm())
        sums["cosine"] += float(w @ x / (w.norm() * x.norm()))
        sums["growth"] += float(y @ y / (x @ x))
        sums["block_influence"] += 1 - float(x @ after / (x.norm() * after.norm()))
    return {measure: total / len(kept) for measure, total in sums.items()}


LAYERED = ["gpt2", "llama", "gptj", "parallel_chain", "gemma2", "granite", "bert", "user_post_norm", "t5", "bart"]


@pytest.mark.parametrize("name", [*LAYERED, "mamba", "scaled_skip_constant"])
def test_layers_by_a_plain_loop(name: str) -> None:
    found = case(name)
    for stream in found.anatomy.streams:
        source = source_for(found, stream=stream.name)
        (block,) = source.blocks()
        result = norms_of(source)
        for layer in range(stream.layers):
            for measure, truth in layer_by_hand(stream, block, layer).items():
                own = columns(result, f"layer.{layer}")[measure]
                assert own == pytest.approx(truth, rel=3e-5, abs=3e-6), (layer, measure)


@pytest.mark.parametrize("name", ["scaled_skip_constant", "deepnorm", "a whole sum scaled"])
def test_factors_are_part_of_the_sum(name: str) -> None:
    """Growth and block influence of c x + e w, against the sum as it is formed, not of x + w."""
    scaled = name == "a whole sum scaled"
    source = source_of(build("halved"), inputs=IDS) if scaled else source_for(case(name))
    (block,) = source.blocks()
    result, stream = norms_of(source), source.stream
    for s in stream.sublayers:
        x, w = (v.double()[block.position > 0] for v in (block.states[s.read], block.writes[s.index]))
        scale = stream.steps[s.read].scale
        y = (x + w) / math.sqrt(2) if scaled else (scale if isinstance(scale, float) else 1.0) * x + w
        growth = (y.square().sum(-1) / x.square().sum(-1)).mean()
        influence = 1 - torch.nn.functional.cosine_similarity(x, y, dim=-1).mean()
        found = columns(result, s.label)
        assert found["growth"] == pytest.approx(float(growth), rel=1e-5)
        assert found["block_influence"] == pytest.approx(float(influence), rel=1e-4, abs=1e-6)
        assert found["relative_write"] == pytest.approx(float((w.norm(dim=-1) / x.norm(dim=-1)).mean()), rel=1e-5)


def test_identities_of_a_pair() -> None:
    """Growth = 1 + 2 rho c + rho^2 and influence = 1 - (1 + rho c) / sqrt(growth), also for w = -x and w = 0."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 50, 16, generator=generator, dtype=torch.float64)
    w[0], w[1], w[2] = -x[0], 0.0, 1e-9 * w[2]
    found = pair((x * x).sum(-1), (w * w).sum(-1), (x * w).sum(-1))
    rho, c = found["relative_write"], found["cosine"]
    assert float((found["growth"] - (1 + 2 * rho * c + rho**2)).abs().max()) < 1e-12
    exact = 1 - (1 + rho * c) / found["growth"].sqrt()
    assert float((found["block_influence"] - exact)[1:].abs().max()) < 1e-12
    truth = [1 - torch.nn.functional.cosine_similarity(x[t], x[t] + w[t], dim=0) for t in range(3, 50)]
    assert float((found["block_influence"][3:] - torch.stack(truth)).abs().max()) < 1e-12
    assert (float(found["growth"][0]), float(found["block_influence"][0])) == (0, 1)
    assert found["block_influence"][1] == 0
    thrice = pair((x * x).sum(-1), 9 * (w * w).sum(-1), 3 * (x * w).sum(-1))
    assert float((thrice["relative_write"] - 3 * rho).abs().max()) < 1e-9
    assert float((thrice["cosine"] - c).abs().max()) < 1e-9


@pytest.mark.parametrize("name", ["gpt2", "gptj", "bert"])
def test_block_influence_is_that_of_the_ablation(name: str) -> None:
    found = case(name)
    result = norms_of(source_for(found))
    swept = sl.ablate(found.module, inputs=found.inputs, units="layers", progress=False)
    for row in swept.rows():
        if row["kind"] == "layer" and row["mode"] == "skip":
            own = columns(result, f"layer.{row['layer']}")["block_influence"]
            assert row["block_influence"] == pytest.approx(own, abs=1e-5)


class _Rotated(nn.Module):
    """x + W2 relu(W1 N x) with an RMS norm without a gain, all weights turned by one orthogonal matrix."""

    def __init__(self, turn: Tensor) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embed, self.head = nn.Embedding(13, 16), nn.Linear(16, 13, bias=False)
        self.up, self.down = nn.Linear(16, 24, bias=False), nn.Linear(24, 16, bias=False)
        self.norm, self.last = nn.RMSNorm(16, eps=1e-6), nn.RMSNorm(16, eps=1e-6)
        for weight in (self.embed.weight, self.up.weight, self.down.weight, self.head.weight):
            weight.data = torch.randn(weight.shape, generator=generator)
        self.embed.weight.data = self.embed.weight.data @ turn
        self.up.weight.data, self.head.weight.data = self.up.weight.data @ turn, self.head.weight.data @ turn
        self.down.weight.data = turn.T @ self.down.weight.data

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        out: Tensor = self.head(self.last(x))
        return out


def test_another_basis_changes_nothing_but_the_proximity() -> None:
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).Q
    ids = torch.arange(26).reshape(2, 13) % 13
    first, second = (
        norms_of(source_of(_Rotated(t).eval(), inputs=ids)) for t in (torch.eye(16), turn.float())
    )  # fmt: skip
    for label in ("embed", "0_mlp_out", "layer.0"):
        for measure, value in columns(first, label).items():
            if measure not in ("proximity", "logit_attribution"):
                assert columns(second, label)[measure] == pytest.approx(value, rel=1e-5, abs=1e-6, nan_ok=True), measure
    assert abs(columns(first, "0_mlp_out")["proximity"] - columns(second, "0_mlp_out")["proximity"]) > 1e-3


def test_proximities_are_shares() -> None:
    generator = torch.Generator().manual_seed(3)
    terms = torch.randn(5, 40, 8, generator=generator, dtype=torch.float64)
    whole = terms.sum(0)
    found = proximities(whole.abs().sum(-1), [(whole - t).abs().sum(-1) for t in terms])
    assert float((torch.stack(found).sum(0) - 1).abs().max()) < 1e-12
    size = whole.abs().sum(-1)
    assert all((share == 1).all() for share in proximities(size, [torch.zeros(40)]))
    one, *none = proximities(size, [torch.zeros(40), size, size])
    assert (one == 1).all()
    assert all((share == 0).all() for share in none)
    assert all((share == 1 / 3).all() for share in proximities(torch.zeros(40), [torch.zeros(40)] * 3))


@pytest.mark.parametrize("name", ["gemma2", "granite", "llama"])
def test_the_short_way_to_the_proximity_is_the_long_one(name: str) -> None:
    source = source_for(case(name))
    (block,) = source.blocks()
    folded, place = ContributionNorms(source), MEASURES.index("proximity")
    tables = []
    for plain in (True, False):
        assert folded._plain
        table = torch.full((len(folded.contributions), len(MEASURES), block.stop), torch.nan)
        walk = _Walk(folded, block, table)
        walk.run()
        if not plain:
            folded._plain = False
            for index, step in enumerate(source.stream.steps):
                writes = [block.writes[s].float() for s in step.sublayers]
                walk._nearness(index, block.states[index].float(), writes, step.sublayers)
        tables.append(table[:, place])
    torch.testing.assert_close(tables[0], tables[1], rtol=1e-4, atol=2e-5, equal_nan=True)


class TestPlanted:
    def of(self, module: nn.Module) -> NormsResult:
        ids = torch.randint(0, 10, (4, 12), generator=torch.Generator().manual_seed(4))
        return sl.contribution_norms(module, inputs=ids, progress=False)

    def test_a_dead_layer_has_no_part_in_anything(self) -> None:
        result = self.of(planted.dead_layer())
        for label in ("1_attn_out", "1_mlp_out", "layer.1"):
            labels = [c.label for c in result.contributions]
            if label in labels:
                found = columns(result, label)
                assert (found["relative_write"], found["block_influence"], found["growth"]) == (0, 0, 1)
                if label != "layer.1":
                    assert found["projection_share"] == 0

    def test_an_eraser_writes_against_what_it_reads(self) -> None:
        result = self.of(PositionCarrier(eraser=1))
        assert columns(result, "1_mlp_out")["cosine"] < -0.1
