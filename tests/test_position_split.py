"""The arithmetic of the positional split: against plain loops, exact identities, and data without any position."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamlens.analyses.position import sums as position_sums
from streamlens.analyses.position.energies import Split, null_band, relative_norm, split
from streamlens.analyses.position.sums import FOLDS, PositionSums
from streamlens.errors import MissingDataError
from tests.conftest import case


def sums_on(data: Tensor, *, first: int = 1) -> PositionSums:
    """Sums of one state, fed document by document."""
    found = PositionSums(case("gpt2").anatomy.stream(), data.shape[1], first=first, origins=False, states=[0])
    for number, row in enumerate(data):
        fold = torch.tensor([number * FOLDS // len(data)])
        found.count(fold)
        found.add_state(0, row[None], fold)
    return found


def dense(data: NDArray[np.float64]) -> dict[str, Any]:
    """The decomposition by plain loops over (doc, position, d_model)."""
    docs, positions, width = data.shape
    mean = np.zeros(width)
    for row in data:
        for vector in row:
            mean += vector / (docs * positions)
    position = np.stack([sum(data[c, t] for c in range(docs)) / docs - mean for t in range(positions)])
    context = np.stack([sum(data[c, t] for t in range(positions)) / positions - mean for c in range(docs)])
    rest = np.zeros_like(data)
    for c in range(docs):
        for t in range(positions):
            rest[c, t] = data[c, t] - mean - position[t] - context[c]
    return {"mean": mean, "position": position, "context": context, "rest": rest}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestSplit:
    @pytest.mark.parametrize("first", [0, 1])
    def test_equals_plain_loops_and_the_energies_add_up(self, first: int) -> None:
        data = noise(6, 5, 7) + 3 * noise(5, 7, seed=1) + noise(6, 1, 7, seed=2) + 10
        own = split(sums_on(data, first=first), 0)
        counted = data[:, first:].numpy()
        plain = dense(counted)
        docs, positions, _ = counted.shape
        expected = [
            docs * positions * (plain["mean"] ** 2).sum(),
            docs * (plain["position"] ** 2).sum(),
            positions * (plain["context"] ** 2).sum(),
            (plain["rest"] ** 2).sum(),
        ]
        assert [own.mean, own.position, own.context, own.rest] == pytest.approx(expected, rel=1e-10)
        assert own.mean + own.total == pytest.approx((counted**2).sum(), rel=1e-12)
        np.testing.assert_allclose(own.parts.numpy(), plain["position"], atol=1e-12)
        mean_square = expected[1] / (positions - 1) / (expected[3] / ((docs - 1) * (positions - 1)))
        assert own.f_ratio == pytest.approx(mean_square, rel=1e-10)

    def test_a_large_mean_does_not_drown_the_rest(self) -> None:
        data = noise(8, 6, 5) + noise(6, 5, seed=1)
        near, far = split(sums_on(data), 0), split(sums_on(data + 1e4), 0)
        assert far.share == pytest.approx(near.share, rel=1e-6)

    def test_what_was_planted_comes_back(self) -> None:
        """Variances 1 for each of position, context and rest: a third each, and the positional vectors themselves."""
        position, context = noise(40, 30, seed=1), noise(200, 1, 30, seed=2)
        data = 5.0 + position + context + noise(200, 40, 30, seed=3)
        own = split(sums_on(data, first=0), 0)
        assert own.share == pytest.approx(1 / 3, abs=0.02)
        assert own.context / own.total == pytest.approx(1 / 3, abs=0.02)
        truth = position - position.mean(0)
        assert float((own.parts - truth).norm() / truth.norm()) < 0.1

    def test_without_position_the_corrected_share_is_centred_on_zero_and_the_raw_one_is_not(self) -> None:
        shares = [split(sums_on(noise(12, 10, 4, seed=s)), 0) for s in range(200)]
        corrected, raw = np.array([s.share for s in shares]), np.array([s.raw_share for s in shares])
        error = corrected.std() / len(corrected) ** 0.5
        assert abs(corrected.mean()) < 4 * error
        assert raw.mean() > 20 * error

    def test_too_little_to_average_over(self) -> None:
        with pytest.raises(MissingDataError, match="1 document with 4 positions"):
            split(sums_on(noise(1, 5, 3)), 0)


def correlated(seed: int, docs: int = 16, positions: int = 12, width: int = 6) -> Tensor:
    """No position, but neighbours are alike, dimensions unequal, and documents differ in what they are about."""
    data = noise(docs, positions + 4, width, seed=seed)
    data = sum(data[:, i : i + positions] for i in range(4)) * torch.tensor([9.0, 3.0, 1.0, 1.0, 0.5, 0.1])
    return torch.as_tensor(data + 4 * noise(docs, 1, width, seed=seed + 1000))


class TestNullBand:
    @pytest.mark.parametrize("docs", [4, 16])
    def test_equals_permuted_positions(self, docs: int) -> None:
        data = correlated(7, docs) + 2 * noise(12, 6, seed=3)
        sums = sums_on(data, first=0)
        low, high = null_band(sums, 0, split(sums, 0))
        generator = np.random.default_rng(0)
        drawn = []
        for _ in range(2000):
            order = np.stack([generator.permutation(12) for _ in range(len(data))])
            shuffled = np.take_along_axis(data.numpy(), order[..., None], axis=1)
            means = shuffled.mean(0)
            position = len(data) * ((means - means.mean(0)) ** 2).sum()
            own = split(sums, 0)
            within = own.position + own.rest
            drawn.append((position - (within - position) / (len(data) - 1)) / own.total)
        drawn_low, drawn_high = np.quantile(drawn, [0.025, 0.975])
        width = drawn_high - drawn_low
        assert abs(np.mean(drawn)) < 0.02 * width
        assert low == pytest.approx(drawn_low, abs=0.06 * width)
        assert high == pytest.approx(drawn_high, abs=0.06 * width)

    def test_holds_what_it_promises_without_position(self) -> None:
        inside = 0
        for seed in range(300):
            sums = sums_on(noise(10, 8, 5, seed=seed) * torch.tensor([5.0, 2.0, 1.0, 1.0, 0.2]), first=0)
            own = split(sums, 0)
            low, high = null_band(sums, 0, own)
            inside += low <= own.share <= high
        assert 0.91 <= inside / 300 <= 0.98

    def test_a_sketch_of_a_wide_stream_gives_nearly_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        data = noise(30, 9, 96) * torch.linspace(0.1, 3, 96) + noise(9, 96, seed=1)
        whole = sums_on(data)
        monkeypatch.setattr(position_sums, "WHOLE_WIDTH", 50)
        position_sums.sketch_of.cache_clear()
        try:
            narrow = sums_on(data)
            assert narrow.scatter[0].shape == (96, position_sums.SKETCH_WIDTH)
            exact, rough = null_band(whole, 0, split(whole, 0)), null_band(narrow, 0, split(narrow, 0))
            assert rough[1] - rough[0] == pytest.approx(exact[1] - exact[0], rel=0.25)
            assert relative_norm(narrow, 0, split(narrow, 0)) == pytest.approx(_spectral(data), rel=1e-6)
        finally:
            position_sums.sketch_of.cache_clear()


def _spectral(data: Tensor) -> float:
    """The relative norm from the whole matrices, a row for each document and position."""
    plain = dense(data[:, 1:].numpy())
    docs, positions = data.shape[0], data.shape[1] - 1
    every = [(c, t) for c in range(docs) for t in range(positions)]
    position = np.stack([plain["position"][t] for _, t in every])
    both = np.stack([plain["mean"] + plain["position"][t] + plain["context"][c] for c, t in every])
    return float(np.linalg.norm(position, 2) / np.linalg.norm(both, 2))


def test_relative_norm_equals_the_spectral_norms_of_the_whole_matrices() -> None:
    data = noise(7, 6, 9) + noise(6, 9, seed=1) + 2 * noise(7, 1, 9, seed=2) + 1
    sums = sums_on(data)
    assert relative_norm(sums, 0, split(sums, 0)) == pytest.approx(_spectral(data), rel=1e-9)


def test_own_split_is_nan_where_nothing_varies() -> None:
    still = Split(1.0, 0.0, 0.0, 0.0, 3, 4, torch.zeros(4, 2))
    assert np.isnan([still.share, still.raw_share, still.f_ratio]).all()
