"""Intervals of the positional share and of what lesions leave: against the definition, and do they hold the truth?"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fixtures.planted_position import PositionCarrier
from streamlens.analyses.position import sums as position_sums
from streamlens.analyses.position.damage import LesionResult
from streamlens.analyses.position.door import positional_persistence
from streamlens.analyses.position.energies import jackknife, split, without_each_fold
from streamlens.analyses.position.lesion import position_lesion
from streamlens.analyses.position.sums import FOLDS, Folds, PositionSums
from streamlens.analyses.source import source_of
from tests.conftest import case


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sums_on(data: Tensor, fold: Tensor) -> PositionSums:
    found = PositionSums(case("gpt2").anatomy.stream(), data.shape[1], first=0, origins=False, states=[0], bands=False)
    found.count(fold)
    found.add_state(0, data, fold)
    return found


def test_leaving_a_group_out_equals_doing_without_it() -> None:
    data = noise(23, 7, 5) + noise(7, 5, seed=1) + 100 + 3 * noise(23, 1, 5, seed=2)
    fold = torch.arange(23) * 6 // 23
    shares, energies = without_each_fold(sums_on(data, fold), 0)
    assert len(shares) == 6
    for g in range(6):
        others = data[fold != g]
        own = split(sums_on(others, torch.zeros(len(others), dtype=torch.int64)), 0)
        assert shares[g] == pytest.approx(own.share, rel=1e-5)
        pairs = [
            float(((a - a.mean(0)) * (b - b.mean(0))).sum())
            for i, a in enumerate(others)
            for j, b in enumerate(others)
            if i != j
        ]
        assert energies[g] == pytest.approx(np.mean(pairs), rel=1e-5)
        assert own.energy == pytest.approx(np.mean(pairs), rel=1e-9)


def test_a_wide_stream_has_intervals_as_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    data = noise(64, 12, 96) + (1 + 0.5 * noise(64, 1, 1, seed=2)) * noise(12, 96, seed=1)
    fold = torch.arange(64) * FOLDS // 64

    def width() -> float:
        sums = sums_on(data, fold)
        low, high = jackknife(split(sums, 0).share, without_each_fold(sums, 0)[0], sums)
        return high - low

    exact = width()
    monkeypatch.setattr(position_sums, "WHOLE_WIDTH", 50)
    position_sums.sketch_of.cache_clear()
    try:
        assert width() == pytest.approx(exact, rel=0.4)
    finally:
        position_sums.sketch_of.cache_clear()


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_the_interval_holds_the_truth_as_often_as_it_says(strength: float) -> None:
    """Variances are known, so the share is: documents differ in how strongly they show position."""
    table = noise(10, 6, seed=99)
    table = strength * (table - table.mean(0))
    inside = 0
    for seed in range(300):
        data = table * (1 + 0.5 * noise(48, 1, 1, seed=seed + 10_000)) + noise(48, 10, 6, seed=seed)
        sums = sums_on(data, torch.arange(48) * FOLDS // 48)
        low, high = jackknife(split(sums, 0).energy, without_each_fold(sums, 0)[1], sums)
        inside += low <= float(table.square().sum()) <= high
    # Without any position a product of two averages is what remains: its spread is not normal, and a little overstated.
    assert 0.91 <= inside / 300 <= (0.985 if strength else 1.0)


def test_groups_are_of_documents_or_of_windows_where_documents_are_few() -> None:
    ids = torch.randint(0, 40, (40, 6), generator=torch.Generator().manual_seed(0))
    few = source_of(PositionCarrier(), tokens=[ids[:20].flatten().tolist(), ids[20:].flatten().tolist()], window=6)
    assert np.array_equal(Folds.of(few).numbers, np.arange(40) * FOLDS // 40)
    many = source_of(PositionCarrier(), tokens=ids.reshape(20, 12).tolist(), window=6)
    numbers = Folds.of(many).numbers
    assert np.array_equal(numbers[::2], numbers[1::2])  # both windows of a document are together
    assert len(np.unique(numbers)) == FOLDS


def test_the_share_of_a_model_has_an_interval_around_it() -> None:
    ids = torch.randint(0, 40, (64, 16), generator=torch.Generator().manual_seed(0))
    found = positional_persistence(PositionCarrier(), tokens=ids, progress=False)
    assert (found.low < found.position_share).all()
    assert (found.position_share < found.high).all()
    assert (found.high - found.low < 0.3).all()
    two = positional_persistence(PositionCarrier(), tokens=ids[:2], progress=False)
    assert np.isnan(two.low).all()  # without one of two documents nothing can be averaged


@pytest.fixture(scope="module")
def found() -> LesionResult:
    ids = torch.randint(0, 40, (48, 20), generator=torch.Generator().manual_seed(0))
    return position_lesion(PositionCarrier(), tokens=ids, skips=["1_attn_out"], alphas=[1.0, 0.5], progress=False)


class TestLesion:
    def test_what_is_left_is_energy_over_energy(self, found: LesionResult) -> None:
        """In the planted net no write touches position: half the skip leaves a quarter of its energy, exactly."""
        step = found.lesions[0].step
        np.testing.assert_array_equal(found.left.value[0, step + 1 :], 1.0)
        np.testing.assert_allclose(found.left.value[1, -1], 0.25, atol=0.05)
        assert found.left.low[1, -1] < 0.25 < found.left.high[1, -1]
        assert found.position_share.value[1, -1] > 0.3 * found.baseline[-1]  # a share hides that: all is smaller
        assert (abs(found.left.value[2, step + 1 :]) < 0.05).all()
        assert (found.left.value[3, step + 1 :] > 0.5).all()

    def test_it_is_judged_against_its_control(self, found: LesionResult) -> None:
        step = found.lesions[0].step
        assert found.control_of(2) == 3
        assert found.control_of(0) is found.control_of(3) is None
        ratio = found.left.value[2] / found.left.value[3]
        np.testing.assert_allclose(found.over_control.value[2, step + 1 :], ratio[step + 1 :])
        assert (found.over_control.high[2, step + 1 :] < 0.1).all()
        assert np.isnan(found.over_control.value[[0, 1, 3]]).all()
        row = found.rows()[2]
        assert row["position_left_last_over_control"] == found.over_control.value[2, -1]
        assert row["delta_loss_control"] == found.rows()[3]["delta_loss"]
        assert np.isnan(found.rows()[3]["delta_loss_control"])

    def test_probes_have_intervals(self, found: LesionResult) -> None:
        assert (found.probe_low <= found.probe_refitted).all()
        assert (found.probe_refitted <= found.probe_high).all()
