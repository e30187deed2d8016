"""Subspaces and kernels: identities, chance levels, and plain formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from streamlens.analyses.position.geometry import (
    control_subspace,
    debiased_cka,
    stable_rank,
    subspace_overlap,
    top_span,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(width: int) -> Tensor:
    return torch.as_tensor(torch.linalg.qr(noise(width, width, seed=9)).Q)


class TestOverlap:
    def test_of_a_span_with_itself_however_it_is_written(self) -> None:
        table = noise(20, 30)
        first = top_span(table, 6)
        assert subspace_overlap(first, first @ rotation(6)) == pytest.approx(1.0, abs=1e-12)
        assert subspace_overlap(first, top_span(-3 * table, 6)) == pytest.approx(1.0, abs=1e-12)

    def test_of_orthogonal_spans(self) -> None:
        assert subspace_overlap(torch.eye(8)[:, :3], torch.eye(8)[:, 3:6]) == 0.0

    def test_of_random_spans_is_chance(self) -> None:
        k, width = 8, 64
        drawn = [
            subspace_overlap(top_span(noise(k, width, seed=2 * s), k), top_span(noise(k, width, seed=2 * s + 1), k))
            for s in range(100)
        ]
        assert np.mean(drawn) == pytest.approx(k / width, rel=0.05)

    def test_equals_the_principal_angles(self) -> None:
        first, second = top_span(noise(5, 12), 5), top_span(noise(5, 12, seed=1), 5)
        cosines = torch.linalg.svdvals(first.T @ second)
        assert subspace_overlap(first, second) == pytest.approx(float(cosines.square().mean()))

    def test_an_empty_span_has_none(self) -> None:
        assert top_span(torch.zeros(4, 6), 3).shape == (6, 0)
        assert np.isnan(subspace_overlap(top_span(torch.zeros(4, 6), 3), torch.eye(6)))


class TestKernels:
    def test_rotation_shift_and_scale_change_nothing(self) -> None:
        table = noise(15, 10)
        assert debiased_cka(table, -2.5 * table @ rotation(10) + 7) == pytest.approx(1.0, abs=1e-8)

    def test_unrelated_tables_give_nothing_on_average_even_with_few_samples(self) -> None:
        drawn = [debiased_cka(noise(8, 40, seed=2 * s), noise(8, 40, seed=2 * s + 1)) for s in range(300)]
        assert abs(np.mean(drawn)) < 4 * np.std(drawn) / 300**0.5

    def test_equals_the_published_sum(self) -> None:
        """HSIC_1 of Song et al.: (tr KL + 1K1 1L1 / ((n-1)(n-2)) - 2 1KL1 / (n-2)) / (n (n-3)), zero diagonals."""
        first, second = noise(9, 4), noise(9, 6, seed=1)

        def hsic(a: Tensor, b: Tensor) -> float:
            k, m, n = a @ a.T, b @ b.T, len(a)
            k.fill_diagonal_(0)
            m.fill_diagonal_(0)
            cross = k.sum() * m.sum() / (n - 1) / (n - 2) - 2 * (k @ m).sum() / (n - 2)
            return float((torch.trace(k @ m) + cross) / n / (n - 3))

        expected = hsic(first, second) / (hsic(first, first) * hsic(second, second)) ** 0.5
        assert debiased_cka(first, second) == pytest.approx(expected, abs=1e-12)

    def test_too_few_samples(self) -> None:
        assert np.isnan(debiased_cka(noise(3, 5), noise(3, 5)))
        assert np.isnan(debiased_cka(torch.zeros(6, 5), noise(6, 5)))


def test_stable_rank() -> None:
    assert stable_rank(torch.eye(7)) == pytest.approx(7)
    assert stable_rank(noise(6, 1) @ noise(1, 9)) == pytest.approx(1)
    assert np.isnan(stable_rank(torch.zeros(3, 3)))


class TestControl:
    @pytest.mark.parametrize("chosen", [slice(3, 6), slice(10, 13)])  # more, and less, energy than a random one has
    def test_holds_as_much_energy_and_nothing_of_the_first(self, chosen: slice) -> None:
        data = noise(400, 16) * torch.linspace(3, 0.1, 16) @ rotation(16)
        basis = rotation(16).T[:, chosen]
        other, factor = control_subspace(data, basis, torch.Generator().manual_seed(0))
        assert factor == 1.0
        assert torch.allclose(other.T @ other, torch.eye(3, dtype=torch.float64), atol=1e-10)
        assert float((other.T @ basis).abs().max()) < 1e-10
        assert float((data @ other).square().sum()) == pytest.approx(float((data @ basis).square().sum()), rel=1e-6)

    def test_is_multiplied_where_nothing_holds_enough(self) -> None:
        data = noise(400, 10) * torch.tensor([50.0, 50.0, *[1.0] * 8])
        basis = torch.eye(10, dtype=torch.float64)[:, :2]
        other, factor = control_subspace(data, basis, torch.Generator().manual_seed(0))
        assert factor > 10
        taken = factor**2 * float((data @ other).square().sum())
        assert taken == pytest.approx(float((data @ basis).square().sum()), rel=1e-6)

    def test_depends_on_the_seed(self) -> None:
        data, basis = noise(50, 8), torch.eye(8, dtype=torch.float64)[:, :2]
        first, second, again = (control_subspace(data, basis, torch.Generator().manual_seed(s))[0] for s in (0, 1, 0))
        assert torch.equal(first, again)
        assert not torch.allclose(first, second)
