"""Factors on the skip, on branches, on whole sums and on the embedding: every analysis takes a factor for each term."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import streamlens as sl
from streamlens.analyses.ablation.runs import Runs, Setting, running
from streamlens.analyses.ablation.spans import every
from streamlens.analyses.frozen import stream_norms
from streamlens.analyses.norms.measures import OVERLAPPING
from streamlens.analyses.position.theatre import Lesion
from streamlens.analyses.source import Source, source_of, target_ids
from streamlens.analyses.transport import factors_of, pulled_back, transported
from streamlens.analyses.unembedding import Unembedding
from streamlens.proof import relative_error
from tests import scaled_sums
from tests.test_position_lesion import played

NAMES = list(scaled_sums.MODELS)
QUIET: dict[str, Any] = {"progress": False}


def opened(name: str) -> Source:
    return source_of(scaled_sums.build(name), inputs=scaled_sums.IDS)


def gates(name: str, module: Any) -> list[tuple[Any, Any]]:
    """By step: what the model's code multiplies the skip and the write with."""
    steps: list[tuple[Any, Any]] = []
    for layer in module.layers:
        vector = layer.vector.detach()
        steps += {
            "halved": [(2**-0.5, 2**-0.5)] * 2,
            "scaled_embedding": [(2**-0.5, 2**-0.5)] * 2,
            "vector": [(vector, vector)] * 2,
            "divided": [(1 / layer.number.detach(), 1.0), (torch.sigmoid(vector), 1.0)],
            "halved_post_norm": [(0.5, 0.5), (vector, vector)],
        }[name]
    return steps


@pytest.mark.parametrize("name", NAMES)
def test_factors_are_those_of_the_code(name: str) -> None:
    source = opened(name)
    found = factors_of(source.stream, source.parameters)
    assert found.parts == ((3.0, 3.0) if name == "scaled_embedding" else (1.0, 1.0))
    assert not found.plain
    for index, (skip, write) in enumerate(gates(name, source.model.module)):
        for own, truth in ((found.skips[index], skip), (found.writes[index], write)):
            torch.testing.assert_close(torch.as_tensor(own).float(), torch.as_tensor(truth).float())


@pytest.mark.parametrize("name", NAMES)
def test_terms_sum_to_every_state_forwards_and_backwards(name: str) -> None:
    source = opened(name)
    norms, factors = stream_norms(source.stream, source.parameters), factors_of(source.stream, source.parameters)
    (block,) = source.blocks()
    walked = list(transported(source.stream, norms, block, factors=factors, dtype=torch.float64))
    for state, parts in zip(block.states, walked, strict=True):
        assert relative_error(torch.stack([p.vectors for p in parts]).sum(0), state) < 1e-6
    torch.manual_seed(0)
    direction = torch.randn(block.states[0].shape, dtype=torch.float64)
    forwards = {(p.kind, p.index): (p.vectors * direction).sum(-1) for p in walked[-1]}
    for part, along in pulled_back(source.stream, norms, block, direction, factors=factors):
        torch.testing.assert_close((part.vectors * along).sum(-1), forwards[part.kind, part.index])


@pytest.mark.parametrize("name", [n for n in NAMES if n != "halved_post_norm"])
def test_each_term_alone_by_hand(name: str) -> None:
    """Without norms on the stream: a write times its own factor and those of all later skips."""
    source = opened(name)
    (block,) = source.blocks()
    *_, last = transported(source.stream, {}, block, factors=factors_of(source.stream, source.parameters))
    steps = gates(name, source.model.module)
    for part in last:
        if part.kind == "embed":
            expected = block.parts[part.index] * (3.0 if name == "scaled_embedding" else 1.0)
        else:
            expected = block.writes[part.index] * steps[part.index][1]
        for skip, _ in steps[0 if part.kind == "embed" else part.index + 1 :]:
            expected = expected * skip
        torch.testing.assert_close(part.vectors, expected)


@pytest.mark.parametrize("name", NAMES)
def test_norms(name: str) -> None:
    source = opened(name)
    result = sl.contribution_norms(source, heads=False, logits=True, **QUIET)
    own = [i for i, c in enumerate(result.contributions) if c.kind not in OVERLAPPING]
    assert result.column("projection_share")[own].sum() == pytest.approx(1.0, abs=1e-6)
    (block,) = source.blocks()
    with torch.no_grad():
        logits: Tensor = source.model.module(scaled_sums.IDS).flatten(0, 1)
    targets = target_ids(source, block)
    kept = (targets >= 0) & (block.position > 0)
    whole = (logits.gather(-1, targets.clamp_min(0)[:, None])[:, 0] - logits.mean(-1))[kept]
    constant = Unembedding(source).constant(block, targets)[kept].mean()
    total = result.column("logit_attribution")[own].sum() + float(constant)
    assert total == pytest.approx(float(whole.mean()), abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_proximity_against_a_plain_loop(name: str) -> None:
    source = opened(name)
    (block,) = source.blocks()
    result = sl.contribution_norms(source, **QUIET)
    labels = [c.label for c in result.contributions]
    for index, (skip, write) in enumerate(gates(name, source.model.module)):
        shares = []
        for token in (t for t in range(block.stop) if int(block.position[t]) > 0):
            terms = [skip * block.states[index][token].double(), write * block.writes[index][token].double()]
            y = sum(terms, torch.zeros(len(terms[0])))
            near = [max(float(y.abs().sum() - (y - term).abs().sum()), 0.0) for term in terms]
            shares.append(near[1] / sum(near) if sum(near) else 0.5)
        row = labels.index(source.stream.sublayers[index].label)
        assert result.column("proximity")[row] == pytest.approx(np.mean(shares), abs=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_effects(name: str) -> None:
    """Direct, indirect and norm effect are algebra with the factors; the total is the model's own logits."""
    source = opened(name)
    found = sl.effects(source, **QUIET)
    (block,) = source.blocks()
    runs = Runs(Setting.of(source), block, source.inputs(block))
    targets = target_ids(source, block).reshape(block.shape)[:, 1:]
    means = found.means
    for index, unit in enumerate(every(source.stream, "sublayers", "zero")):
        with running():
            change = (runs.baseline() - runs.without(unit)).double()[:, 1:]
        truth = float(change.gather(-1, targets.clamp_min(0)[..., None])[..., 0][targets >= 0].mean())
        assert means["total"][index] == pytest.approx(truth, abs=1e-5)
        assert means["direct"][index] + means["indirect"][index] + means["norm"][index] == pytest.approx(
            truth, abs=1e-5
        )


@pytest.mark.parametrize("name", NAMES)
def test_write_lens_and_origins_of_positions(name: str) -> None:
    source = opened(name)
    assert sl.write_lens(source).error < 1e-5
    found = sl.positional_persistence(source, positions=11, **QUIET)
    np.testing.assert_allclose(np.nansum(found.origin, axis=1), 1.0, atol=2e-5)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "halved_post_norm"])
def test_what_a_lesion_takes_from_a_skip(name: str) -> None:
    """It is taken from the write beside it, which passes the same sum with a factor of its own."""
    source = opened(name)
    lesions = [Lesion("scale", s, "", 0.3) for s in range(len(source.stream.steps))]
    _, _, theatre = played(source.model.module, lesions, inputs=scaled_sums.IDS)
    (block,) = source.blocks()
    for index, (skip, write) in enumerate(gates(name, source.model.module)):
        expected = 0.3 * skip * block.states[index] + write * block.writes[index]
        docs = expected.view(*block.shape, -1).double().sum(0)
        torch.testing.assert_close(theatre.sums[index].sums[index + 1], docs, rtol=1e-5, atol=1e-4)
