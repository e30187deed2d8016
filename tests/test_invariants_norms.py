"""Laws of the contribution norms: every layer by hand, exact identities, scale and rotation, planted truth."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import streamlens as sl
from fixtures import planted, zoo
from fixtures.planted_position import PositionCarrier
from streamlens.analyses.norms.accumulate import ContributionNorms, _Walk
from streamlens.analyses.norms.answer import NormsResult
from streamlens.analyses.norms.measures import MEASURES, SUBLAYER_KINDS, pair, proximities
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


@pytest.mark.parametrize("name", ["gpt2", "gptj", "bert", "gemma2", "granite", "t5", "bart"])
def test_block_influence_is_that_of_the_ablation(name: str) -> None:
    found = case(name)
    result = norms_of(source_for(found))
    swept = sl.ablate(found.module, inputs=found.inputs, units="layers", progress=False)
    for row in swept.rows():
        if row["kind"] == "layer" and row["mode"] == "skip":
            own = columns(result, f"layer.{row['layer']}")["block_influence"]
            assert row["block_influence"] == pytest.approx(own, abs=1e-5)


class _Rotated(nn.Module):
    """Branches W2 relu(W1 x) in a stream of some shape, RMS norms without gains, all weights turned by one matrix."""

    def __init__(self, shape: str, turn: Tensor) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embed, self.head = nn.Embedding(13, 16), nn.Linear(16, 13, bias=False)
        self.up = nn.ModuleList(nn.Linear(16, 24, bias=False) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(24, 16, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.RMSNorm(16, eps=1e-6) for _ in range(5))
        self.shape = shape
        for weight in self.parameters():
            if weight.ndim == 2:
                weight.data = torch.randn(weight.shape, generator=generator)
        for reader in (self.embed, self.head, *self.up):
            reader.weight.data = reader.weight.data @ turn
        for writer in self.down:
            writer.weight.data = turn.T @ writer.weight.data  # type: ignore[operator]

    def branch(self, i: int, x: Tensor) -> Tensor:
        out: Tensor = self.down[i](torch.relu(self.up[i](x)))
        return out

    def forward(self, ids: Tensor) -> Tensor:
        x, n, shape = self.embed(ids), self.norms, self.shape
        if shape == "parallel":
            read = n[0](x)
            x = x + self.branch(0, read) + self.branch(1, read)
        else:
            for i in range(2):
                if shape == "post":
                    x = n[i](x + self.branch(i, x))
                elif shape == "sandwich":
                    x = x + n[2 + i](self.branch(i, n[i](x)))
                else:
                    x = x + (0.4 if shape == "scaled" else 1.0) * self.branch(i, n[i](x))
        out: Tensor = self.head(x if shape == "post" else n[4](x))
        return out


@pytest.mark.parametrize("shape", ["pre", "post", "sandwich", "parallel", "scaled"])
def test_another_basis_changes_nothing_but_the_proximity(shape: str) -> None:
    """T-N5."""
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).Q
    ids = torch.arange(26).reshape(2, 13) % 13
    first, second = (
        norms_of(source_of(_Rotated(shape, t).eval(), inputs=ids)) for t in (torch.eye(16), turn.float())
    )  # fmt: skip
    labels = [c.label for c in first.contributions]
    writes = [c.label for c in first.contributions if c.kind in SUBLAYER_KINDS]
    assert len(writes) == 2
    assert labels == [c.label for c in second.contributions]
    for label in labels:
        for measure, value in columns(first, label).items():
            if measure not in ("proximity", "logit_attribution"):
                assert columns(second, label)[measure] == pytest.approx(value, rel=2e-5, abs=2e-6, nan_ok=True), measure
    assert abs(columns(first, writes[0])["proximity"] - columns(second, writes[0])["proximity"]) > 5e-4


FIRST = {
    "gpt2": "transformer.h.0.attn.c_proj",
    "llama": "model.layers.0.self_attn.o_proj",
    "gptj": "transformer.h.0.attn.out_proj",
    "granite": "model.layers.0.self_attn.o_proj",
    "gemma2": "model.layers.0.post_attention_layernorm",
    "bert": "bert.encoder.layer.0.attention.output.dense",
    "user_post_norm": "layers.0.attention.out_proj",
    "t5": "decoder.block.0.layer.0.SelfAttention.o",
    "bart": "model.decoder.layers.0.self_attn.out_proj",
}
"""What makes the first write of each stream linearly: its output projection, or the norm behind that."""


@pytest.mark.parametrize("name", list(FIRST))
def test_four_times_the_first_write(name: str) -> None:
    """T-N5 in models: the write reads x_0, which stays; times a power of two nothing is rounded."""
    specimen = zoo.build(name)
    given: Any = specimen.inputs.get("", dict(specimen.inputs))
    results = [norms_of(source_of(specimen.module, inputs=given))]
    with torch.no_grad():
        for own in specimen.module.get_submodule(FIRST[name]).parameters():
            own.copy_(4 * (own + 1) - 1 if name == "gemma2" else 4 * own)  # Gemma's norms add one to their weight
    results.append(norms_of(source_of(specimen.module, inputs=given)))
    before, after = (columns(r, "0_attn_out") for r in results)
    close = 1e-5 if name == "gemma2" else 1e-9
    assert after["relative_write"] == pytest.approx(4 * before["relative_write"], rel=close)
    assert after["write_norm"] == pytest.approx(4 * before["write_norm"], rel=close)
    assert after["read_norm"] == before["read_norm"]
    assert after["cosine"] == pytest.approx(before["cosine"], abs=close)


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
