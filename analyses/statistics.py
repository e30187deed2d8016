"""Statistics over tokens and documents that stream, merge and say how sure they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]


class Moments:
    """Count, mean and variance of many series at once, in float64; entries that are NaN are left out.

    >>> moments = Moments(1)
    >>> moments.add(torch.tensor([[1.0, 2.0, float("nan"), 3.0]]))
    >>> moments.mean.tolist(), moments.count.tolist()
    ([2.0], [3.0])
    """

    def __init__(self, *shape: int) -> None:
        """Start at nothing, for series of this shape."""
        self.count: Floats = np.zeros(shape)
        self._sum: Floats = np.zeros(shape)
        self._square: Floats = np.zeros(shape)

    def add(self, values: Tensor, at: int | tuple[int, ...] = ()) -> None:
        """Fold values in.

        Args:
            values: (*series, token), any float dtype.
            at: index of the series, where `values` belongs to some of them only.
        """
        count = torch.full(values.shape[:-1], float(values.shape[-1]), dtype=torch.float64, device=values.device)
        total = values.sum(-1, dtype=torch.float64)
        square = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float64).square()
        gaps = total.isnan()
        if bool(gaps.any()):
            some = values[gaps].double()
            known = ~some.isnan()
            some = torch.where(known, some, 0.0)
            count[gaps], total[gaps], square[gaps] = known.sum(-1).double(), some.sum(-1), some.square().sum(-1)
        self.count[at] += count.cpu().numpy()
        self._sum[at] += total.cpu().numpy()
        self._square[at] += square.cpu().numpy()

    def merge(self, other: Moments) -> None:
        """Fold another partial result in."""
        self.count += other.count
        self._sum += other._sum
        self._square += other._square

    @property
    def mean(self) -> Floats:
        """(*series,) the mean; NaN where there was nothing."""
        return np.divide(self._sum, self.count, out=np.full_like(self._sum, np.nan), where=self.count > 0)

    @property
    def std(self) -> Floats:
        """(*series,) the standard deviation (biased)."""
        mean = self.mean
        square = np.divide(self._square, self.count, out=np.full_like(mean, np.nan), where=self.count > 0)
        return np.sqrt(np.maximum(square - mean**2, 0.0))


class Quantiles:
    """Quantiles of many series at once in constant memory, each within a relative error of 0.5 %.

    A histogram over logarithmic bins, signs apart (Masson et al. 2019, DDSketch); merging two adds their counts, so
    the result does not depend on how the tokens were cut. Magnitudes below 1e-8 count as zero, above 1e8 as 1e8.

    >>> sketch = Quantiles(1)
    >>> sketch.add(torch.arange(1.0, 102.0)[None])
    >>> bool(abs(sketch.at(0.5)[0] - 51.0) < 0.26)
    True
    """

    ACCURACY = 0.005
    _SMALLEST, _LARGEST = 1e-8, 1e8

    def __init__(self, *shape: int) -> None:
        """Start at nothing, for series of this shape."""
        gamma = (1 + self.ACCURACY) / (1 - self.ACCURACY)
        self._step = float(np.log(gamma))
        self._half = int(np.ceil(np.log(self._LARGEST / self._SMALLEST) / self._step)) + 1
        self.shape = shape
        self._counts: NDArray[np.int64] = np.zeros((*shape, 2 * self._half + 1), np.int64)

    def add(self, values: Tensor, at: int | tuple[int, ...] = ()) -> None:
        """Fold values in, (*series, token); NaN is left out."""
        wide = values.float().cpu()
        magnitude = wide.abs().clamp_(self._SMALLEST, self._LARGEST)
        rank = magnitude.log_().sub_(float(np.log(self._SMALLEST))).div_(self._step).ceil_().nan_to_num_(0)
        # Rank 0 is left to what is too small, whose logarithm the clamp has made the smallest.
        rank = rank.clamp_(max=self._half).mul_(wide.sign().nan_to_num_(0)).add_(self._half).long()
        counts = self._counts[at]
        bins = counts.shape[-1]
        rows = counts.reshape(-1, bins)
        flat, gaps = rank.reshape(len(rows), -1).numpy(), wide.isnan().reshape(len(rows), -1).numpy()
        for row, ranks, gap, partial in zip(rows, flat, gaps, np.asarray(gaps.any(-1)), strict=True):
            row += np.bincount(ranks[~gap] if partial else ranks, minlength=bins)

    def merge(self, other: Quantiles) -> None:
        """Fold another partial result in."""
        self._counts += other._counts

    def at(self, share: float) -> Floats:
        """Return the value below which this share of the tokens lies, (*series,); NaN where there was nothing."""
        running = self._counts.cumsum(-1)
        total = running[..., -1:]
        place = (running > share * (total - 1)).argmax(-1) - self._half
        size = self._SMALLEST * np.exp((np.abs(place) - 0.5) * self._step)
        found = np.sign(place) * size
        return np.where(total[..., 0] > 0, found, np.nan)


class DocumentSums:
    """Sums of many series for each document, in float64: what an interval over documents needs, and no more.

    >>> sums = DocumentSums(2)
    >>> sums.add(torch.tensor([[1.0, 3.0, float("nan")], [4.0, 4.0, 4.0]]), torch.tensor([0, 0, 7]))
    >>> sums.mean.tolist()
    [2.0, 4.0]
    >>> [bounds.tolist() for bounds in sums.intervals()]
    [[2.0, 4.0], [2.0, 4.0]]
    """

    def __init__(self, *shape: int) -> None:
        """Start at nothing, for series of this shape."""
        self.shape = shape
        self._sums: dict[int, tuple[Floats, Floats]] = {}

    def add(self, values: Tensor, doc: Tensor) -> None:
        """Fold values in; NaN is left out.

        Args:
            values: (*series, token), any float dtype.
            doc: (token,) number of the document.
        """
        wide = values.double()
        known = ~torch.isnan(wide)
        docs, place = torch.unique(doc, return_inverse=True)
        empty = torch.zeros(*self.shape, len(docs), dtype=torch.float64, device=wide.device)
        place = place.to(wide.device)
        sums = empty.index_add(-1, place, torch.where(known, wide, 0.0)).cpu().numpy()
        counts = empty.index_add(-1, place, known.double()).cpu().numpy()
        for column, number in enumerate(docs.tolist()):
            self._fold(number, sums[..., column], counts[..., column])

    def merge(self, other: DocumentSums) -> None:
        """Fold another partial result in."""
        for number, (sums, counts) in other._sums.items():
            self._fold(number, sums, counts)

    def _fold(self, number: int, sums: Floats, counts: Floats) -> None:
        old = self._sums.get(number)
        self._sums[number] = (sums.copy(), counts.copy()) if old is None else (old[0] + sums, old[1] + counts)

    @property
    def sums(self) -> Floats:
        """(*series, doc) the sums, in order of the documents' numbers."""
        return self._stacked(0)

    @property
    def counts(self) -> Floats:
        """(*series, doc) the number of values behind each sum."""
        return self._stacked(1)

    def _stacked(self, which: int) -> Floats:
        if not self._sums:
            return np.zeros((*self.shape, 0))
        return np.stack([self._sums[number][which] for number in sorted(self._sums)], axis=-1)

    @property
    def mean(self) -> Floats:
        """(*series,) mean over tokens; NaN where there was nothing."""
        total, size = self.sums.sum(-1), self.counts.sum(-1)
        found: Floats = np.divide(total, size, out=np.full_like(total, np.nan), where=size > 0)
        return found

    def intervals(self, *, draws: int = 1000, seed: int = 0) -> tuple[Floats, Floats]:
        """Return the ends of the 95 % interval of each mean, each (*series,); see `bootstrap`.

        All series are resampled alike, so that the interval of a difference is that of paired values.
        """
        sums, counts = self.sums, self.counts
        docs = sums.shape[-1]
        if docs < 2:  # one document says nothing about how documents differ
            return np.full(self.shape, np.nan), np.full(self.shape, np.nan)
        rng = np.random.default_rng(seed)
        weights = rng.multinomial(docs, np.full(docs, 1 / docs), size=draws).astype(np.float64).T
        size = counts @ weights
        means = np.divide(sums @ weights, size, out=np.full_like(size, np.nan), where=size > 0)
        known = counts.sum(-1) > 0
        low, high = np.full(self.shape, np.nan), np.full(self.shape, np.nan)
        if known.any():
            low[known], high[known] = np.nanquantile(means[known], [0.025, 0.975], axis=-1)
        return low, high


@dataclass(frozen=True)
class Interval:
    """An estimate and the 95 % interval around it."""

    mean: float
    low: float
    high: float


def bootstrap(
    sums: Sequence[float] | Floats, counts: Sequence[float] | Floats, *, draws: int = 1000, seed: int = 0
) -> Interval:
    """Return the mean over tokens with its 95 % percentile interval over documents; NaN ends for a single document.

    Documents are drawn with replacement, because the tokens of one depend on each other (Efron 1979). For a paired
    difference, `sums` are the differences.

    Args:
        sums: (doc,) sum of the values of each document.
        counts: (doc,) number of values in each document.
        draws: how many resamples.
        seed: of the resampling.

    >>> bootstrap([2.0, 2.0], [1, 1])
    Interval(mean=2.0, low=2.0, high=2.0)
    """
    total, size = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    nan = float("nan")
    if not size.sum():
        return Interval(nan, nan, nan)
    mean = float(total.sum() / size.sum())
    if len(total) < 2:  # one document says nothing about how documents differ
        return Interval(mean, nan, nan)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(total), np.full(len(total), 1 / len(total)), size=draws).astype(np.float64)
    drawn = weights @ size
    means = (weights @ total)[drawn > 0] / drawn[drawn > 0]
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(mean, float(low), float(high))
