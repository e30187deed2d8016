"""Nets whose answers were written into their weights, shown to the analyses that do not ablate: norms, lens, gradient.

What ablations and positional analyses find in them is in test_invariants_ablation_studies and test_position.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import streamlens as sl
from fixtures import planted
from fixtures.planted_position import POSITIONS, TOKENS, PositionCarrier
from streamlens.analyses.gradient.graph import graphs
from streamlens.analyses.gradient.paths import spectrum_of
from streamlens.analyses.source import source_of

SHOWN: dict[str, Any] = {"tokens": list(planted.documents()), "window": planted.POSITIONS}
Net = Callable[[], planted.WiredNet]


def norms_of(net: Any, label: str, **shown: Any) -> dict[str, Any]:
    (row,) = [row for row in sl.contribution_norms(net, **shown, progress=False).rows() if row["label"] == label]
    return row


def slot(number: int) -> slice:
    return slice(number * planted.VOCAB, (number + 1) * planted.VOCAB)


@pytest.mark.parametrize("make", [planted.dead_layer, planted.backup_pair, planted.serial_pair])
def test_a_dead_layer_has_no_norm_and_is_seen_by_no_lens(make: Net) -> None:
    row = norms_of(make(), "1_mlp_out", **SHOWN)
    assert row["relative_write"] == row["projection_share"] == row["block_influence"] == 0.0
    assert row["growth"] == 1.0
    lens = sl.logit_lens(make(), **SHOWN, progress=False).rows()
    assert lens[1]["kl"] == lens[2]["kl"]
    assert lens[1]["cross_entropy"] == lens[2]["cross_entropy"]


def test_the_lens_knows_the_answer_after_the_layer_that_gives_it() -> None:
    """A right answer has a logit of 6 (of 12 where both layers of a pair gave it), all others 0."""

    def loss(answer: float) -> float:
        return float(np.log(np.exp(answer) + planted.VOCAB - 1) - answer)

    known = {planted.dead_layer: [0, 1, 1], planted.backup_pair: [0, 1, 1, 2], planted.serial_pair: [0, 0, 0, 1]}
    for make, answers in known.items():
        rows = sl.logit_lens(make(), **SHOWN, progress=False).rows()
        expected = [loss(times * planted.STRENGTH) for times in answers]
        assert [row["cross_entropy"] for row in rows] == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("make", [planted.backup_pair, planted.serial_pair])
def test_paths_are_as_long_as_the_wires(make: Net) -> None:
    """The gradient at the token slot came through one layer of a backup pair, and through both of a series."""
    source = source_of(make().double(), **SHOWN)
    (block,) = source.blocks()
    (graph,) = graphs(source, block, len(planted.documents()))
    gradients = graph.gradients()
    paths, _ = spectrum_of(graph, gradients, 3)
    serial = make is planted.serial_pair
    places = {0: planted.ANSWER, 1: planted.REGISTER if serial else planted.TOKEN, 2: planted.TOKEN}
    for length in range(3):
        own = slot(places[length])
        if length == 2 and not serial:
            assert not paths[2].any()
            continue
        assert float(paths[length][:, own].norm()) > 1e-6
        torch.testing.assert_close(paths[length][:, own], gradients[0][:, own], rtol=1e-12, atol=1e-15)
        others = paths[length].clone()
        others[:, own] = 0
        assert not others.any()
    assert not paths[3].any()


def test_an_eraser_writes_against_what_it_reads_and_a_carrier_does_not() -> None:
    """What the eraser writes is minus the position dimensions, so its cosine to the stream is what they have of it."""
    tokens = torch.randint(0, 40, (48, 20), generator=torch.Generator().manual_seed(5))
    net = PositionCarrier(eraser=1)
    source = source_of(net, tokens=tokens)
    (block,) = source.blocks()
    at = [s.label for s in source.stream.sublayers].index("1_mlp_out")
    read, write = block.states[at].double(), block.writes[at].double()
    torch.testing.assert_close(write[:, POSITIONS], -read[:, POSITIONS], rtol=1e-5, atol=1e-6)
    assert not write[:, TOKENS].any()
    later = block.position > 0
    expected = (read[:, POSITIONS].norm(dim=1) / read.norm(dim=1))[later].mean()
    row = norms_of(source, "1_mlp_out")
    assert row["cosine"] == pytest.approx(-float(expected), rel=1e-4)
    assert row["growth"] < 1 < norms_of(PositionCarrier(), "1_mlp_out", tokens=tokens)["growth"]
