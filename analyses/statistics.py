"""Statistics over tokens and documents that stream, merge and say how sure they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Unit = Literal["document", "window"]

DRAWS = 1000
"""How often units are drawn again for an interval."""

FEW_DOCUMENTS = 10
"""With fewer documents than these, intervals are over windows."""


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


class Resampled:
    """Sums of many series, and the same sums over units that are drawn again: what an interval needs, and no more.

    A Poisson bootstrap (Hanley and MacGibbon 2006; Chamandy et al. 2012): in each draw every unit counts Poisson(1)
    times, which for many units is drawing with replacement (Efron 1979), and needs to know no unit but the one at
    hand. How often comes from a counter-based generator (Philox, Salmon et al. 2011) whose key is the seed and the
    unit's number. So a unit may come in pieces, in any order and in parts that are merged later, and memory does not
    grow with the text, but for one byte a document.

    The units are documents, because the tokens of one depend on each other. With fewer than `FEW_DOCUMENTS` they are
    windows, where those are known: drawing three documents again says nothing. Windows of one document depend on each
    other, too, so such an interval is about this text and not about others; `unit` says which it is.

    >>> drawn = Resampled(1)
    >>> drawn.add(np.array([[1.0, 3.0]]), np.array([0, 7]))
    >>> drawn.total.tolist(), drawn.drawn.shape, drawn.documents, drawn.unit
    ([4.0], (1, 1000), 2, 'document')
    """

    def __init__(self, *shape: int, seed: int = 0) -> None:
        """Start at nothing, for series of this shape."""
        self.shape = shape
        self.total: Floats = np.zeros(shape)
        """(*series,) the sums over all units."""
        self._seed = seed
        self._by_document: Floats = np.zeros((*shape, DRAWS))
        self._by_window: Floats | None = None
        self._seen: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._windows: tuple[int, int] | None = None
        """The first and the last window, by number."""

    def add(self, sums: Floats, doc: NDArray[np.int64], window: NDArray[np.int64] | None = None) -> None:
        """Fold sums in.

        Args:
            sums: (*series, unit) over the tokens at hand of each window, or of each document.
            doc: (unit,) number of the document, not negative.
            window: (unit,) number of the window, unique in the whole text; given always, or never.
        """
        if not len(doc):
            return
        self.total += sums.sum(-1)
        self._by_document += sums @ self._times(doc)
        self._see(np.bincount(doc) > 0)
        if window is None:
            return
        ends = (int(window.min()), int(window.max()))
        self._windows = ends if self._windows is None else _around(self._windows, ends)
        if self.documents < FEW_DOCUMENTS:
            drawn = sums @ self._times(window)
            self._by_window = drawn if self._by_window is None else self._by_window + drawn

    def merge(self, other: Resampled) -> None:
        """Fold another partial result in, of other tokens and the same seed."""
        self.total += other.total
        self._by_document += other._by_document
        self._see(other._seen)
        if other._windows is not None:
            self._windows = other._windows if self._windows is None else _around(self._windows, other._windows)
        if other._by_window is not None and self.documents < FEW_DOCUMENTS:
            self._by_window = other._by_window + (0.0 if self._by_window is None else self._by_window)

    def _see(self, seen: NDArray[np.bool_]) -> None:
        longer, shorter = (seen.copy(), self._seen) if len(seen) > len(self._seen) else (self._seen, seen)
        longer[: len(shorter)] |= shorter
        self._seen = longer
        if self.documents >= FEW_DOCUMENTS:
            self._by_window = None

    def _times(self, numbers: NDArray[np.int64]) -> Floats:
        """(unit, draw) how often each unit counts."""
        return np.stack([times_drawn(self._seed, int(number)) for number in numbers]).astype(np.float64)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return int(self._seen.sum())

    @property
    def unit(self) -> Unit:
        """What is drawn again."""
        return "document" if self._by_window is None else "window"

    @property
    def drawn(self) -> Floats:
        """(*series, draw) the sums in each draw; NaN where there is only one unit, which says nothing about others."""
        found = self._by_document if self._by_window is None else self._by_window
        if self.unit == "document":
            several = self.documents > 1
        else:
            several = self._windows is not None and self._windows[0] < self._windows[1]
        return found if several else np.full_like(found, np.nan)


def _around(first: tuple[int, int], second: tuple[int, int]) -> tuple[int, int]:
    return min(first[0], second[0]), max(first[1], second[1])


@lru_cache(maxsize=4096)
def times_drawn(seed: int, number: int) -> NDArray[np.uint8]:
    """Return how often a unit counts in each draw, (draw,): Poisson(1), the same for the same seed and number.

    >>> bool((times_drawn(0, 5) == times_drawn(0, 5)).all()), bool((times_drawn(0, 5) == times_drawn(0, 6)).all())
    (True, False)
    """
    # The raw stream of Philox is the same in all versions of numpy; what its Generator makes of it need not be.
    uniform = np.random.Philox(key=[seed % 2**64, number % 2**64]).random_raw(DRAWS)
    return np.searchsorted(_POISSON, uniform >> np.uint64(11), side="right").astype(np.uint8)


_POISSON = (np.cumsum([math.exp(-1.0) / math.factorial(k) for k in range(18)]) * 2.0**53).astype(np.uint64)
"""The distribution function of Poisson(1) at 0, 1, 2 ..., on the scale of the upper 53 bits of a random number."""


def interval_of(sums: Floats, counts: Floats) -> tuple[Floats, Floats]:
    """Return the ends of the 95 % percentile interval of the mean, each (*series,).

    Args:
        sums: (*series, draw); for a paired difference those of the differences.
        counts: (*series, draw) or (draw,) number of values behind each sum; a draw without any is left out.
    """
    return ends_of(means_of(sums, counts))


def means_of(sums: Floats, counts: Floats) -> Floats:
    """Return (*series, draw) the mean in each draw; NaN where a draw has no values. As `interval_of`."""
    counts = np.broadcast_to(counts, sums.shape)
    means: Floats = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    return means


def ends_of(means: Floats) -> tuple[Floats, Floats]:
    """Return the ends of the 95 % percentile interval, each (*series,), of values in each draw (*series, draw)."""
    ends = np.quantile(means, [0.025, 0.975], axis=-1)
    # Most series have values in every draw, and those go the fast way above.
    gaps = np.isnan(means).any(-1) & ~np.isnan(means).all(-1)
    if gaps.any():
        ends[:, gaps] = np.nanquantile(means[gaps], [0.025, 0.975], axis=-1)
    return ends[0], ends[1]


class DocumentSums:
    """Means of many series over tokens, in float64, with intervals over documents or windows; see `Resampled`.

    >>> sums = DocumentSums(2)
    >>> sums.add(torch.tensor([[1.0, 3.0, float("nan")], [4.0, 4.0, 4.0]]), torch.tensor([0, 0, 7]))
    >>> sums.mean.tolist()
    [2.0, 4.0]
    >>> [bounds.tolist() for bounds in sums.intervals()]
    [[2.0, 4.0], [2.0, 4.0]]
    """

    def __init__(self, *shape: int, seed: int = 0) -> None:
        """Start at nothing, for series of this shape; the seed is that of the draws, see `Resampled`."""
        self.shape = shape
        self._both = Resampled(2, *shape, seed=seed)

    def add(self, values: Tensor, doc: Tensor, window: Tensor | None = None) -> None:
        """Fold values in; NaN is left out.

        Args:
            values: (*series, token), any float dtype.
            doc: (token,) number of the document.
            window: (token,) number of the window, unique in the whole text (its first token's, say); given always, or
                never: then intervals are over documents however few there are.
        """
        wide = values.double()
        known = ~torch.isnan(wide)
        units, place = torch.unique(doc if window is None else window, return_inverse=True)
        own_doc = torch.empty_like(units, dtype=torch.int64).index_copy_(0, place, doc.long()).cpu().numpy()
        empty = torch.zeros(2, *self.shape, len(units), dtype=torch.float64, device=wide.device)
        both = torch.stack([torch.where(known, wide, 0.0), known.double()])
        sums = empty.index_add(-1, place.to(wide.device), both).cpu().numpy()
        self._both.add(sums, own_doc, None if window is None else units.cpu().numpy().astype(np.int64))

    def merge(self, other: DocumentSums) -> None:
        """Fold another partial result in."""
        self._both.merge(other._both)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return self._both.documents

    @property
    def unit(self) -> Unit:
        """What intervals are over."""
        return self._both.unit

    @property
    def mean(self) -> Floats:
        """(*series,) mean over tokens; NaN where there was nothing."""
        total, size = self._both.total
        found: Floats = np.divide(total, size, out=np.full_like(total, np.nan), where=size > 0)
        return found

    def intervals(self) -> tuple[Floats, Floats]:
        """Return the ends of the 95 % interval of each mean, each (*series,); NaN where there is one unit only.

        All series are drawn alike, so that the interval of a difference is that of paired values.
        """
        return ends_of(self.drawn)

    @property
    def drawn(self) -> Floats:
        """(*series, draw) the mean in each draw; those of equal units and seeds are paired."""
        sums, counts = self._both.drawn
        return means_of(sums, counts)


@dataclass(frozen=True)
class Interval:
    """An estimate and the 95 % interval around it."""

    mean: float
    low: float
    high: float


def bootstrap(sums: Sequence[float] | Floats, counts: Sequence[float] | Floats, *, seed: int = 0) -> Interval:
    """Return the mean over tokens with its 95 % interval over documents; NaN ends for a single document.

    Args:
        sums: (doc,) sum of the values of each document; for a paired difference those of the differences.
        counts: (doc,) number of values in each document.
        seed: of the draws; see `Resampled`.

    >>> bootstrap([2.0, 2.0], [1, 1])
    Interval(mean=2.0, low=2.0, high=2.0)
    """
    both = np.array([sums, counts], np.float64)
    found = Resampled(2, seed=seed)
    found.add(both, np.arange(both.shape[-1]))
    low, high = interval_of(*found.drawn)
    total, size = found.total
    return Interval(float(total / size) if size else float("nan"), float(low), float(high))
