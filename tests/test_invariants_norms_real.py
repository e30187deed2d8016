"""Laws of the contributions (METHODS.md, T-N1 to T-N6) for real weights and text, from one capture of each model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import streamlens as sl
from streamlens.analyses.frozen import stream_norms
from streamlens.analyses.heads import projections
from streamlens.analyses.norms.answer import NormsResult
from streamlens.analyses.norms.measures import OVERLAPPING
from streamlens.analyses.source import Source, source_of, target_ids
from streamlens.analyses.transport import factors_of, transported
from streamlens.analyses.unembedding import Unembedding
from streamlens.block import Block
from streamlens.reader.opening import Capture
from tests.conftest import minilm, smollm2
from tests.test_heads import relative
from tests.test_invariants_capture import worst_of_orders
from tests.test_invariants_norms import SIZES, layer_by_hand
from tests.test_invariants_transport import along, errors, share_of_all
from tests.test_norms import columns, norms_of

pytestmark = pytest.mark.real

Opened = tuple[Source, Block, NormsResult]


@pytest.fixture(scope="module")
def smol(smollm2_file: Capture) -> Opened:
    """SmolLM2's capture, with its model at hand, its one block, and the answer of the analysis."""
    source = source_of(smollm2_file, model=smollm2())
    (block,) = source.blocks()
    return source, block, norms_of(source, logits=True)


@pytest.fixture(scope="module")
def mini(minilm_file: Capture) -> Opened:
    source = source_of(minilm_file, model=minilm())
    (block,) = source.blocks()
    return source, block, norms_of(source)


@pytest.fixture(params=["smol", "mini"])
def each(request: pytest.FixtureRequest) -> Opened:
    found: Opened = request.getfixturevalue(request.param)
    return found


def test_terms_sum_to_every_state_and_shares_to_one(each: Opened) -> None:
    """T-N1 for each token, and T-N2 for each state: 13 of MiniLM behind 13 norms, 61 of SmolLM2 behind none.

    At position 0 SmolLM2's stream is a thousand times as large as elsewhere: that is where sums lose digits.
    """
    source, block, result = each
    found = errors(source, block)
    assert len(found) == len(source.stream.states)
    assert max(found) < 1e-5
    assert float((share_of_all(source, block) - 1).abs().max()) < 1e-5
    own = [i for i, c in enumerate(result.contributions) if c.kind not in OVERLAPPING]
    assert result.column("projection_share")[own].sum() == pytest.approx(1.0, abs=1e-6)


def test_the_chain_of_minilm_in_float64() -> None:
    """T-N2 to 1e-12, in weights and activations that somebody trained."""
    module = copy.deepcopy(minilm().module).double()
    source = source_of(module, inputs={"input_ids": torch.arange(2000, 2048).reshape(2, 24)})
    (block,) = source.blocks()
    assert block.states[-1].dtype == torch.float64
    assert max(errors(source, block, torch.float64)) < 1e-12
    assert float((share_of_all(source, block) - 1).abs().max()) < 1e-12


def test_the_order_of_the_terms_of_minilm_does_not_matter(mini: Opened) -> None:
    """T-C2 behind norms: the terms as they stand in a state, added in any order."""
    source, block, _ = mini
    norms, factors = stream_norms(source.stream, source.parameters), factors_of(source.stream, source.parameters)
    for k, parts in enumerate(transported(source.stream, norms, block, factors=factors)):
        assert worst_of_orders([p.vectors for p in parts], block.states[k]) < 1e-5, k


def test_sizes_and_influence_of_every_layer_by_a_plain_loop(each: Opened) -> None:
    """T-N3: layers and sublayers; influence from the states before and after a layer, not from its writes."""
    source, block, result = each
    for layer in range(source.stream.layers):
        for measure, truth in layer_by_hand(source.stream, block, layer).items():
            found = columns(result, f"layer.{layer}")[measure]
            assert found == pytest.approx(truth, rel=3e-5, abs=1e-5), (layer, measure)
    kept = block.position > 0
    for s in source.stream.sublayers:
        x, w = block.states[s.read].double()[kept], block.writes[s.index].double()[kept]
        rho, c = w.norm(dim=-1) / x.norm(dim=-1), torch.nn.functional.cosine_similarity(x, w, dim=-1)
        growth = 1 + 2 * rho * c + rho**2
        truths = (rho, c, growth, 1 - (1 + rho * c) / growth.sqrt())
        for measure, values in zip(SIZES, truths, strict=True):
            found = columns(result, s.label)[measure]
            assert found == pytest.approx(float(values.mean()), rel=3e-5, abs=1e-5), (s.label, measure)


def test_proximities_with_that_of_the_skip_sum_to_one(each: Opened) -> None:
    """T-N6: the share of the write and the share of the stream that it joined are all there is."""
    source, block, result = each
    kept = block.position > 0
    for step in source.stream.steps:
        (s,) = (source.stream.sublayers[i] for i in step.sublayers)
        x, w = block.states[s.read].double()[kept], block.writes[s.index].double()[kept]
        size = (x + w).abs().sum(-1)
        skip, own = ((size - other.abs().sum(-1)).clamp_min(0) for other in (w, x))
        total = skip + own
        share = torch.where(total > 0, own / total.clamp_min(1e-30), 0.5)
        assert columns(result, s.label)["proximity"] == pytest.approx(float(share.mean()), abs=1e-5), s.label


def test_attributions_of_smollm2_sum_to_the_logits(smol: Opened) -> None:
    """T-N4: each token, and the public column; the logits are from a run of the model itself."""
    source, block, result = smol
    module: Any = source.model.module
    with torch.no_grad():
        logits = module(block.ids.reshape(block.shape), use_cache=False).logits.flatten(0, 1)
    targets = target_ids(source, block)
    kept, wanted = (targets >= 0) & (block.position > 0), targets.clamp_min(0)
    unembedding = Unembedding(source)
    constant = unembedding.constant(block, wanted)
    total = along(source, block, unembedding.directions(block, wanted)) + constant
    chosen = logits.gather(-1, wanted[:, None])[:, 0]
    whole = chosen - logits.mean(-1)
    assert float((total - whole).abs().max()) < 1e-4 * float(whole.abs().max())
    measured = unembedding.target_logit(block.states[-1], wanted)
    assert float((measured - chosen).abs().max()) < 1e-4 * float(logits.abs().max())
    own = [i for i, c in enumerate(result.contributions) if c.kind not in OVERLAPPING]
    column = result.column("logit_attribution")[own].sum() + float(constant[kept].double().mean())
    assert column == pytest.approx(float(whole[kept].double().mean()), abs=1e-4 * float(whole.abs().max()))


@pytest.mark.parametrize(
    ("each", "count", "place"),
    [("smol", 9, "model.layers.{}.self_attn.o_proj"), ("mini", 12, "encoder.layer.{}.attention.output.dense")],
    indirect=["each"],
)
def test_heads_of_every_layer(each: Opened, count: int, place: str) -> None:
    """Their sum is the write; each by a loop over the own matrix. SmolLM2 has nine heads over three keys and values."""
    source, block, _ = each
    learned = projections(source)
    assert len(learned) == source.stream.layers
    for layer, (index, projection) in enumerate(learned.items()):
        mix, write = block.mixes[index], block.writes[index]
        heads, rest = projection.split(mix, write)
        assert heads.shape[1] == count
        assert relative(heads.sum(1) + rest, write) < 1e-5
        linear: Any = source.model.module.get_submodule(place.format(layer))
        weight, size = linear.weight.detach(), linear.weight.shape[1] // count
        for token, head in ((0, 0), (30, 4), (127, count - 1)):
            truth = torch.zeros(source.stream.d_model)
            for column in range(head * size, (head + 1) * size):
                truth += mix[token, column] * weight[:, column]
            # A small head of a large write is judged by the size of the write.
            assert float((heads[token, head] - truth).norm()) < 1e-5 * float(write[token].norm()), (layer, head)


def test_norms_of_a_file_are_those_of_the_model(smollm2_file: Capture, smol: Opened) -> None:
    """The two ways in: without a model nothing about logits, and the same about everything else."""
    result = sl.contribution_norms(smollm2_file, progress=False)
    for label in ("embed", "0_attn_out", "15_mlp_out", "layer.29"):
        own = columns(smol[2], label)
        for measure, value in columns(result, label).items():
            if measure != "logit_attribution":
                assert value == pytest.approx(own[measure], rel=1e-6, nan_ok=True)
