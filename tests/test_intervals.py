"""Intervals by drawing documents or windows again: against the exact bootstrap, normal theory, and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from streamlens.analyses.statistics import (
    DRAWS,
    FEW_DOCUMENTS,
    DocumentSums,
    Floats,
    Resampled,
    bootstrap,
    interval_of,
    times_drawn,
)


def drawn_again(sums: Floats, counts: Floats, seed: int, draws: int = 20_000) -> Floats:
    """The bootstrap as Efron wrote it: as many documents as there are, drawn one by one with replacement."""
    chosen = np.random.default_rng(seed).integers(0, len(sums), (draws, len(sums)))
    means: Floats = sums[chosen].sum(1) / counts[chosen].sum(1)
    return means


@pytest.mark.parametrize("documents", [12, 40, 300])
@pytest.mark.parametrize("seed", range(3))
def test_the_interval_is_that_of_the_exact_bootstrap(documents: int, seed: int) -> None:
    """A draw of 1,000 places the 2.5 % quantile within 0.12 sd (one standard error is 0.08 sd); Poisson adds a little.

    The number of documents in a draw varies, which widens the spread by a share of about 1/(2 n).
    """
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 9, documents).astype(float)
    sums = rng.normal(size=documents) * counts
    found, means = bootstrap(sums, counts, seed=seed), drawn_again(sums, counts, seed)
    assert found.mean == pytest.approx(sums.sum() / counts.sum())
    spread, around = float(np.std(means)), 0.25 + 2 / documents
    assert found.low == pytest.approx(np.quantile(means, 0.025), abs=around * spread)
    assert found.high == pytest.approx(np.quantile(means, 0.975), abs=around * spread)
    assert found == bootstrap(sums, counts, seed=seed)
    assert found != bootstrap(sums, counts, seed=seed + 1)


def test_the_width_is_that_of_normal_theory() -> None:
    """Mean of n equal documents: 2 * 1.96 sd / sqrt(n); over 20 samples the average width is within 2 %."""
    widths, expected = [], []
    for seed in range(20):
        sums = np.random.default_rng(seed).normal(3.0, 2.0, 400)
        found = bootstrap(sums, np.ones(400), seed=seed)
        widths.append(found.high - found.low)
        expected.append(2 * 1.96 * sums.std(ddof=1) / 20)
    assert np.mean(widths) == pytest.approx(np.mean(expected), rel=0.02)


@pytest.mark.parametrize("documents", [FEW_DOCUMENTS, 40])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(documents: int) -> None:
    """400 samples: 95 % is 380; percentile intervals of few documents are known to be short, hence the lower limits."""
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(400):
        counts = rng.integers(1, 20, documents).astype(float)
        sums = counts * (1.0 + rng.normal(0.0, 1.0, documents))
        found = bootstrap(sums, counts, seed=seed)
        hits += found.low <= 1.0 <= found.high
    assert {FEW_DOCUMENTS: 335, 40: 366}[documents] <= hits <= 394


def test_units_are_drawn_like_poisson_and_independently() -> None:
    times = np.stack([times_drawn(seed, number) for seed in (0, 1) for number in range(200)]).astype(float)
    assert times.shape == (400, DRAWS)
    shares = [(times == k).mean() for k in range(4)]
    assert shares == pytest.approx([0.36788, 0.36788, 0.18394, 0.06131], abs=0.003)
    correlation = np.corrcoef(times)[np.triu_indices(400, 1)]
    assert abs(correlation.mean()) < 3e-4
    assert correlation.std() == pytest.approx(DRAWS**-0.5, rel=0.03)
    along = np.corrcoef(times.T[:300])[np.triu_indices(300, 1)]
    assert abs(along.mean()) < 1e-3


def text(documents: int, windows: int = 3, tokens: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Two series over tokens with gaps; the number of the document and of the window of each token."""
    count = documents * windows * tokens
    values = torch.randn(2, count, generator=torch.Generator().manual_seed(documents), dtype=torch.float64)
    values[1, ::4] = torch.nan
    place = torch.arange(count)
    return values, place // (windows * tokens), place // tokens * tokens


@pytest.mark.parametrize("documents", [1, 2, FEW_DOCUMENTS - 1, FEW_DOCUMENTS, 25])
def test_sums_of_documents_and_windows_by_plain_loops(documents: int) -> None:
    values, doc, window = text(documents)
    found = DocumentSums(2)
    found.add(values, doc, window)
    assert found.documents == documents
    assert found.unit == ("document" if documents >= FEW_DOCUMENTS else "window")
    unit = doc if found.unit == "document" else window
    low, high = found.intervals()
    for row in range(2):
        known = ~values[row].isnan()
        total, size = np.zeros(DRAWS), np.zeros(DRAWS)
        for number in sorted(set(unit.tolist())):
            own = values[row][(unit == number) & known]
            times = times_drawn(0, number)
            total += float(own.sum()) * times
            size += len(own) * times
        means = total[size > 0] / size[size > 0]
        assert found.mean[row] == pytest.approx(float(values[row][known].mean()), rel=1e-12)
        assert (low[row], high[row]) == pytest.approx(np.quantile(means, [0.025, 0.975]), rel=1e-9)


@pytest.mark.parametrize("documents", [1, FEW_DOCUMENTS - 1, FEW_DOCUMENTS, 25])
def test_parts_merge_to_the_whole_in_any_order_and_however_they_are_cut(documents: int) -> None:
    """Also through the middle of a window, and where each part has few documents but all together have not."""
    values, doc, window = text(documents)
    whole = DocumentSums(2)
    whole.add(values, doc, window)
    parts = []
    for piece in np.array_split(np.arange(values.shape[1]), 4):
        part = DocumentSums(2)
        for some in np.array_split(piece, len(piece) // 3):
            part.add(values[:, some], doc[some], window[some])
        parts.append(part)
    merged = DocumentSums(2)
    for part in reversed(parts):
        merged.merge(part)
    assert (merged.unit, merged.documents) == (whole.unit, whole.documents)
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(merged.intervals(), whole.intervals(), rtol=1e-9)


def test_without_windows_documents_are_drawn_however_few() -> None:
    values, doc, window = text(3)
    found, known = DocumentSums(2), DocumentSums(2)
    found.add(values, doc)
    known.add(values, doc, window)
    assert (found.unit, known.unit) == ("document", "window")
    assert (found.intervals()[0] != known.intervals()[0]).all()


def test_one_unit_says_nothing_about_others() -> None:
    values, doc, window = text(1, windows=1)
    found = DocumentSums(2)
    found.add(values, doc, window)
    assert not np.isnan(found.mean).any()
    assert np.isnan(found.intervals()).all()
    assert np.isnan(bootstrap([3.0], [2.0]).low)
    assert np.isnan(bootstrap([], []).mean)
    assert np.isnan(bootstrap([0.0, 0.0], [0, 0]).low)


def test_memory_does_not_grow_with_the_text() -> None:
    def size(documents: int) -> int:
        sums = Resampled(4)
        for doc in range(documents):
            sums.add(np.ones((4, 1)), np.array([doc]), np.array([doc]))
        return sum(value.nbytes for value in vars(sums).values() if isinstance(value, np.ndarray))

    assert size(3000) - size(1000) <= 2000  # one byte for each document
    assert size(3000) < 4 * DRAWS * 8 * 2


def test_a_paired_difference_is_narrower_than_its_ends() -> None:
    """Two series that rise and fall together: the draws are the same for both."""
    rng = np.random.default_rng(0)
    base = rng.normal(0, 10, 50)
    both = Resampled(3)
    both.add(np.stack([base + rng.normal(1, 0.1, 50), base, np.ones(50)]), np.arange(50))
    first, second, count = both.drawn
    low, high = interval_of(first - second, count)
    assert 0.9 < low < 1.0 < high < 1.1
    assert float(np.diff(interval_of(first, count))[0]) > 4
