"""The spectrum of path lengths: against the laws that it has to keep; against all paths in test_invariants_gradient."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import streamlens as sl
from streamlens.analyses.gradient.graph import Graph, open_graph
from streamlens.analyses.gradient.paths import PathSpectrum, binomial_law, path_spectrum, spectrum_of
from streamlens.analyses.source import source_of
from streamlens.cli.app import main
from streamlens.errors import UsageError
from tests.conftest import case
from tests.test_gradient import DOUBLE, EVERY_KIND, graph_of, relative
from tests.test_gradient_door import MODEL, SMALL

PARTLY_FLOAT32 = {"llama", "gemma2", "olmo2", "granite", "mamba", "t5"}
"""Models that do a part of their arithmetic, as a rule the norms, in float32 whatever their dtype is."""


@pytest.mark.parametrize("name", EVERY_KIND)
def test_all_lengths_add_up_to_the_gradient(name: str) -> None:
    found = case(name, DOUBLE)
    for stream in found.anatomy.streams:
        graph = graph_of(found, stream.name)
        gradients = graph.gradients()
        paths, moment = spectrum_of(graph, gradients, len(stream.steps))
        assert len(paths) == len(stream.steps) + 1
        assert relative(paths.sum(0), gradients[0]) < (1e-6 if name in PARTLY_FLOAT32 else 1e-12)
        lengths = torch.arange(len(paths), dtype=DOUBLE)[:, None, None]
        assert relative(moment, (lengths * paths).sum(0)) < (1e-6 if name in PARTLY_FLOAT32 else 1e-12)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gptj", "inplace_add"])
def test_in_a_pre_norm_model_the_path_of_no_branch_brings_the_last_gradient_unchanged(name: str) -> None:
    graph = graph_of(case(name))
    gradients = graph.gradients()
    assert torch.equal(spectrum_of(graph, gradients, 2)[0][0], gradients[-1])


def test_cut_short_it_is_the_beginning_of_the_whole() -> None:
    graph = graph_of(case("gpt2", DOUBLE))
    gradients = graph.gradients()
    whole, moment = spectrum_of(graph, gradients, 6)
    for cut in (0, 1, 3):
        some, same = spectrum_of(graph, gradients, cut)
        assert len(some) == cut + 1
        assert relative(some, whole[: cut + 1]) < 1e-13
        assert relative(same, moment) < 1e-13


class Loner(torch.autograd.Function):
    """A function that vmap does not know."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Square."""
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        """Of the square; the question about one number is what vmap cannot answer."""
        (x,) = ctx.saved_tensors
        return 2 * x * g if float(g.abs().max()) >= 0 else g


class Private(nn.Module):
    """Branches with a function of their own."""

    def __init__(self) -> None:
        """Two layers."""
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4).double() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        """(doc, position, d_model) to the same."""
        for layer in self.layers:
            x = x + Loner.apply(layer(x))  # type: ignore[no-untyped-call]
        return x


def test_a_branch_that_cannot_be_batched_is_pulled_back_column_by_column() -> None:
    module = Private().requires_grad_(False)
    x = torch.randn(2, 3, 4, dtype=DOUBLE)
    anatomy = sl.discover(module, x)
    graph = open_graph(module, anatomy, anatomy.stream(), x, (2, 3), None)
    gradients = graph.gradients()
    paths, _ = spectrum_of(graph, gradients, 2)
    assert not graph.batched
    assert relative(paths.sum(0), gradients[0]) < 1e-12


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "mamba"])
def test_batched_is_column_by_column(name: str) -> None:
    graph = graph_of(case(name, DOUBLE))
    columns = torch.randn(3, *graph.gradients()[0].shape, dtype=DOUBLE)
    for sublayer in range(len(graph.stream.sublayers)):
        together = graph.through(sublayer, columns)
        assert graph.batched
        for column, own in zip(columns, together, strict=True):
            assert relative(graph.through(sublayer, column[None])[0], own) < 1e-12


# ---- the laws -----------------------------------------------------------------------------------------------------


class Gaussian(nn.Module):
    """Linear branches with independent Gaussian entries: E J^T J = e^2 I."""

    def __init__(self, steps: int, width: int, size: float, seed: int) -> None:
        """Draw the weights."""
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList([nn.Linear(width, width, bias=False, dtype=DOUBLE) for _ in range(steps)])
        for layer in self.layers:
            drawn = torch.randn(width, width, generator=generator, dtype=DOUBLE)
            layer.weight.data = drawn * size / math.sqrt(width)

    def forward(self, x: Tensor) -> Tensor:
        """(doc, position, d_model) to the same."""
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_gaussian_branches_follow_the_binomial_law() -> None:
    steps, size = 8, 0.6
    energies = []
    for seed in range(6):
        generator = torch.Generator().manual_seed(100 + seed)
        x, end = (torch.randn(2, 2, 128, dtype=DOUBLE, generator=generator) for _ in range(2))
        module = Gaussian(steps, 128, size, seed).requires_grad_(False)
        anatomy = sl.discover(module, x)
        graph = open_graph(module, anatomy, anatomy.stream(), x, (2, 2), None)
        # The gradient that comes in is drawn, too: that of an objective would depend on the branches.
        paths, _ = spectrum_of(graph, [end.reshape(4, 128)] * (steps + 1), steps)
        energies.append(paths.square().sum((1, 2)).numpy())
    mean = np.sum(energies, axis=0) / np.sum(energies)
    p = size**2 / (1 + size**2)
    law = [math.comb(steps, k) * p**k * (1 - p) ** (steps - k) for k in range(steps + 1)]
    np.testing.assert_allclose(mean, law, atol=0.01)
    fitted, odds = binomial_law(mean, [1] * steps)
    np.testing.assert_allclose(fitted, law, atol=0.01)
    assert odds == pytest.approx(size**2, rel=0.05)


@pytest.mark.parametrize("branches", [(1, 1, 1, 1), (2, 2, 2), (1, 2, 1)])
def test_the_law_counts_paths_and_finds_the_odds(branches: tuple[int, ...]) -> None:
    ways = itertools.product(*[range(several + 1) for several in branches])
    counts = np.bincount([sum(way > 0 for way in choice) for choice in ways])
    for longest in (2, len(branches)):
        weights = counts[: longest + 1] * 0.3 ** np.arange(longest + 1)
        law, odds = binomial_law(weights / weights.sum(), branches)
        assert odds == pytest.approx(0.3)
        np.testing.assert_allclose(law, weights / weights.sum(), rtol=1e-9)


def test_the_law_where_no_branch_is_ever_passed() -> None:
    law, odds = binomial_law(np.array([1.0, 0.0, 0.0]), [1, 1])
    assert odds < 1e-20
    np.testing.assert_allclose(law, [1, 0, 0], atol=1e-20)


# ---- sums, means, door --------------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_a_plain_loop() -> None:
    found = case("gptj")
    graph: Graph = graph_of(found)
    gradients = graph.gradients()
    paths, moment = spectrum_of(graph, gradients, 1)
    own, lengths = (t.reshape(graph.docs, graph.positions, -1).double().numpy() for t in (gradients[0], moment))
    terms = paths.reshape(2, graph.docs, graph.positions, -1).double().numpy()
    # The same objective, on the door's side: without ids there is no cross-entropy.
    source = source_of(found.module, inputs=found.inputs)
    (block,) = source.blocks()
    block.ids.fill_(-1)
    spectrum = PathSpectrum(source, 2, 1)
    spectrum.update(block)
    result = spectrum.result()
    assert result.objective == "pooled_norm"
    for positions, whole in ((slice(1, None), result.paths), (slice(None), result.paths_all)):
        shares, energies, means, rests = [], [], [], []
        for doc in range(graph.docs):
            g = own[doc, positions].ravel()
            c = [term[doc, positions].ravel() for term in terms]
            shares.append([term @ g / (g @ g) for term in c])
            energies.append([term @ term / sum(t @ t for t in c) for term in c])
            means.append(lengths[doc, positions].ravel() @ g / (g @ g))
            rests.append((g - sum(c)) @ g / (g @ g))
        np.testing.assert_allclose(whole.share[:, 0], np.mean(shares, 0), rtol=1e-4)
        np.testing.assert_allclose(whole.energy[:, 0], np.mean(energies, 0), rtol=1e-4)
        assert whole.mean_length[0] == pytest.approx(np.mean(means), rel=1e-4)
        assert whole.remainder_share[0] == pytest.approx(np.mean(rests), rel=1e-3, abs=1e-6)
    assert [row["path_share"] for row in result.rows()] == pytest.approx([1 / 9, 4 / 9])


def test_two_halves_merged_are_the_whole() -> None:
    found = case("bert", DOUBLE)
    source = source_of(found.module, inputs=found.inputs, batch_tokens=11)
    blocks = list(source.blocks())
    parts = [PathSpectrum(source, 1, 12) for _ in range(2)]
    parts[0].update(blocks[0])
    for block in blocks[1:]:
        parts[1].update(block)
    parts[0].merge(parts[1])
    whole = path_spectrum(found.module, inputs=found.inputs, progress=False)
    np.testing.assert_allclose(parts[0].result().paths.share, whole.paths.share, rtol=1e-9)
    assert whole.paths.remainder_norm[0] < 1e-12
    lengths = np.arange(len(whole.lengths))
    assert whole.paths.mean_length[0] == pytest.approx(lengths @ whole.paths.share[:, 0], rel=1e-9)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = CliRunner()
    done = run.invoke(main, ["gradient", MODEL, *SMALL, "--paths", "--max-length", "2", "--json", "--plot", "p.svg"])
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["length"] for row in rows] == [0, 1, 2]
    assert sum(row["share"] for row in rows) + rows[0]["remainder_share"] == pytest.approx(1, abs=1e-5)
    assert "mean path length" in done.stderr
    assert "--max-length 16 tells all of them apart" in done.stderr
    assert "<svg" in (tmp_path / "p.svg").read_text()


def test_a_negative_length() -> None:
    with pytest.raises(UsageError, match="0 branches or more"):
        path_spectrum(case("gpt2").module, -1, inputs=case("gpt2").inputs, progress=False)
