"""What a change does to the output: the sums from which every score and interval is made.

Scores are paired: each token is compared with itself in the unchanged model. All are in nats or shares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamlens.analyses.statistics import Floats, Interval, Resampled, Unit, interval_of
from streamlens.wording import counted

CHUNK = 2**19
"""Logits that are scored at once: so many that they stay in the cache of a core."""

LEAST = -1e4
"""Log-probability of a token that the head hides behind minus infinity: 0 * LEAST is 0, where 0 * -inf is NaN."""

FIELDS = ("delta_loss", "kl", "top1_agreement", "pooled_distance")


class Reference:
    """The unchanged output of a block, to which others are compared.

    Args:
        logits: (doc, position, vocab); kept as probabilities until the next block.
        targets: (doc, position) int64, negative where there is none.
    """

    def __init__(self, logits: Tensor, targets: Tensor) -> None:
        self._shape = logits.shape[:-1]
        self._targets = targets.flatten().to(logits.device)
        self._p = torch.empty(logits.shape, dtype=torch.float32, device=logits.device).flatten(0, -2)
        self._top = torch.empty(len(self._p), dtype=torch.int64, device=logits.device)
        self._own, self.loss = (torch.empty(len(self._p), dtype=torch.float64, device=logits.device) for _ in range(2))
        for rows, log_p in _pieces(logits):
            self._top[rows] = log_p.argmax(-1)
            torch.exp(log_p, out=self._p[rows])
            self._own[rows] = _expected(self._p[rows], log_p)
            self.loss[rows] = _cross_entropy(log_p, self._targets[rows])

    def compare(self, logits: Tensor) -> dict[str, Tensor]:
        """Return the scores of each token, (doc, position) float64; delta_loss is NaN where there is no target.

        A token agrees where no other logit is larger than that of the unchanged model's first choice.
        """
        delta, kl, agree = (torch.empty_like(self._own) for _ in range(3))
        for rows, log_q in _pieces(logits):
            # KL(p || q) = E_p[log p - log q]; for equal logits the same number is taken from itself, so it is 0.
            kl[rows] = self._own[rows] - _expected(self._p[rows], log_q)
            delta[rows] = _cross_entropy(log_q, self._targets[rows]) - self.loss[rows]
            agree[rows] = (log_q.gather(-1, self._top[rows, None])[:, 0] >= log_q.amax(-1)).double()
        found = {"delta_loss": delta, "kl": kl, "top1_agreement": agree}
        return {name: values.reshape(self._shape) for name, values in found.items()}


class PooledReference:
    """The same for a model without logits over a vocabulary: one vector for each document.

    The vector is the mean of what the model returns over all positions, none left out; where it returns one vector
    for each document, it is that one.
    """

    def __init__(self, output: Tensor) -> None:
        """Take the unchanged output, (doc, position, width) or (doc, width)."""
        self._pooled = _pooled(output)

    def compare(self, output: Tensor) -> dict[str, Tensor]:
        """Return 1 - cosine of each document's vector to the unchanged one, (doc,) float64."""
        pooled = _pooled(output)
        if torch.equal(pooled, self._pooled):
            return {"pooled_distance": torch.zeros(len(pooled), dtype=torch.float64, device=pooled.device)}
        cosine: Tensor = torch.cosine_similarity(pooled, self._pooled, dim=-1)
        return {"pooled_distance": 1.0 - cosine.clamp(-1.0, 1.0)}


def _pooled(output: Tensor) -> Tensor:
    wide = output.double()
    return wide.mean(1) if wide.ndim == 3 else wide.flatten(1)


def _pieces(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield some tokens at a time: which, and their log-probabilities (token, vocab) float32."""
    flat = logits.flatten(0, -2)
    step = max(1, CHUNK // flat.shape[-1])
    for start in range(0, len(flat), step):
        rows = slice(start, min(len(flat), start + step))
        yield rows, flat[rows].float().log_softmax(-1).clamp_(min=LEAST)


def _expected(p: Tensor, log_q: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vecdot(p, log_q)
    return found.double()


def _cross_entropy(log_p: Tensor, targets: Tensor) -> Tensor:
    picked = log_p.gather(-1, targets.clamp_min(0)[:, None])[:, 0].double()
    return torch.where(targets >= 0, -picked, torch.nan)


@dataclass(frozen=True)
class Scores:
    """Sums for each trial, and the means and intervals over them.

    Axis words: ``trial``, ``part`` (0: all positions but the first, 1: the first one), ``draw`` (of the units that
    intervals are over; see `statistics.Resampled`).
    """

    sums: Mapping[str, Floats]
    """(trial, part) by score."""
    counts: Mapping[str, Floats]
    """(part,) by score: how many tokens (or windows) each sum is over."""
    loss: Floats
    """(part,) sum of the unchanged model's loss."""
    drawn: Mapping[str, Floats]
    """(trial, draw) by score: the sums without position 0 in each draw."""
    drawn_counts: Mapping[str, Floats]
    """(draw,) by score: how many tokens (or windows) those are over."""
    unit: Unit
    """What intervals are over: documents, or windows where there are few documents."""
    units: int
    """How many of them."""

    @property
    def over(self) -> str:
        """What intervals are over, and how many: ``16 documents``, ``1 window``."""
        return counted(self.units, self.unit)

    @property
    def headline(self) -> str:
        """The score by which trials are ranked: delta_loss where there are targets, else kl, else pooled_distance."""
        return next((name for name in FIELDS if name in self.counts and self.counts[name].sum() > 0), FIELDS[0])

    @property
    def base_loss(self) -> float:
        """Mean loss of the unchanged model in nats, without position 0."""
        count = self.counts["delta_loss"][0] if "delta_loss" in self.counts else 0.0
        return float(self.loss[0] / count) if count else float("nan")

    def mean(self, name: str, *, with_first: bool = False) -> Floats:
        """(trial,) the mean of a score over tokens; NaN where there are none.

        Args:
            name: one of `FIELDS`.
            with_first: also over position 0.
        """
        parts = slice(0, 2) if with_first else slice(0, 1)
        count = self.counts[name][parts].sum() if name in self.counts else 0.0
        if not count:
            return np.full(len(next(iter(self.sums.values()))), np.nan)
        return np.asarray(self.sums[name][:, parts].sum(-1) / count, np.float64)

    @cached_property
    def _intervals(self) -> dict[str, tuple[Floats, Floats]]:
        return {}

    def intervals(self, name: str) -> tuple[Floats, Floats]:
        """Return the ends of the 95 % interval of each trial's mean, each (trial,); found once and kept."""
        if name not in self._intervals:
            self._intervals[name] = self.intervals_of(name, lambda sums: sums)
        return self._intervals[name]

    def intervals_of(self, name: str, combine: Callable[[Floats], Floats]) -> tuple[Floats, Floats]:
        """Return the same of linear combinations of trials: `combine` makes (row, draw) of (trial, draw)."""
        if name not in self.drawn:
            return self.mean(name), self.mean(name)
        return interval_of(combine(self.drawn[name]), self.drawn_counts[name])

    def interval(self, name: str, trial: int) -> Interval:
        """Return the mean of a score with its 95 % bootstrap interval."""
        low, high = self.intervals(name)
        return Interval(float(self.mean(name)[trial]), float(low[trial]), float(high[trial]))

    def taken(self, trials: Iterable[int]) -> Scores:
        """Return the scores of some of the trials."""
        rows = list(trials)
        return replace(
            self,
            sums={name: sums[rows] for name, sums in self.sums.items()},
            drawn={name: sums[rows] for name, sums in self.drawn.items()},
        )


@dataclass
class _Open:
    """The scores of one block, window by window, before they are folded in."""

    start: int
    doc: NDArray[np.int64]
    positions: int
    sums: dict[str, Floats] = field(default_factory=dict)
    """(trial, part, window) by score."""
    counts: dict[str, Floats] = field(default_factory=dict)
    """(part, window) by score."""


class Tally:
    """Collects the scores of all trials, block by block, in memory that does not grow with the text."""

    def __init__(self, trials: int, names: Sequence[str] = FIELDS) -> None:
        """Start with nothing, for so many trials and these scores."""
        self._trials, self._names = trials, tuple(names)
        self._open: _Open | None = None
        self._sums: dict[str, Floats] = {}
        self._counts: dict[str, Floats] = {}
        self._drawn: dict[str, Resampled] = {}
        self._loss, self._windows = np.zeros(2), 0

    def begin(self, start: int, doc: Tensor, loss: Tensor | None) -> None:
        """Open a block; the one before is closed.

        Args:
            start: its first token.
            doc: (window, position) int, which document each token belongs to.
            loss: (window, position) of the unchanged model, NaN without a target; None without logits.
        """
        self._close()
        self._open = _Open(start, doc[:, 0].cpu().numpy().astype(np.int64), doc.shape[1])
        self._windows += len(doc)
        if loss is not None:
            self._loss += _by_window(loss)[0].sum(-1)

    def add(self, start: int, trial: int, scores: Mapping[str, Tensor]) -> None:
        """Add the scores of a trial in the open block: each (window, position), or (window,)."""
        block = self._open
        assert block is not None, "no block is open"
        assert block.start == start, "another block is open"
        for name, values in scores.items():
            sums, counts = _by_window(values)
            block.sums.setdefault(name, np.full((self._trials, *sums.shape), np.nan))[trial] = sums
            block.counts[name] = counts

    def _close(self) -> None:
        """Fold the open block in."""
        block, self._open = self._open, None
        if block is None:
            return
        # The first token of a window is its number, whatever else its block holds.
        window = block.start + block.positions * np.arange(len(block.doc))
        for name, sums in block.sums.items():
            counts = block.counts[name]
            if name not in self._sums:
                self._sums[name], self._counts[name] = np.zeros(sums.shape[:2]), np.zeros(2)
                self._drawn[name] = Resampled(self._trials + 1)
            self._sums[name] += sums.sum(-1)
            self._counts[name] += counts.sum(-1)
            self._drawn[name].add(np.concatenate([sums[:, 0], counts[None, 0]]), block.doc, window)

    def merge(self, other: Tally) -> None:
        """Fold another partial result in."""
        self._close()
        other._close()
        self._loss += other._loss
        self._windows += other._windows
        for name, drawn in other._drawn.items():
            if name not in self._drawn:
                self._sums[name], self._counts[name] = np.zeros_like(other._sums[name]), np.zeros(2)
                self._drawn[name] = Resampled(self._trials + 1)
            self._sums[name] += other._sums[name]
            self._counts[name] += other._counts[name]
            self._drawn[name].merge(drawn)

    def result(self) -> Scores:
        """Return the sums so far."""
        self._close()
        names = [name for name in self._names if name in self._drawn]
        first = self._drawn[names[0]] if names else Resampled()
        drawn = {name: self._drawn[name].drawn for name in names}
        return Scores(
            {name: self._sums[name].copy() for name in names},
            {name: self._counts[name].copy() for name in names},
            self._loss.copy(),
            {name: sums[:-1].copy() for name, sums in drawn.items()},
            {name: sums[-1].copy() for name, sums in drawn.items()},
            first.unit,
            first.documents if first.unit == "document" else self._windows,
        )


def _by_window(values: Tensor) -> tuple[Floats, Floats]:
    """Sum values (window, position) into (part, window), and count them; NaN is left out."""
    wide = values.double().cpu()
    if wide.ndim == 1:  # one value for each window: it belongs to the headline
        known = torch.stack([~wide.isnan(), torch.zeros_like(wide, dtype=torch.bool)])
        return np.where(known, np.nan_to_num(torch.stack([wide, wide]).numpy()), 0.0), known.double().numpy()
    known = ~wide.isnan()
    wide = wide.nan_to_num()
    sums = torch.stack([wide[:, 1:].sum(1), wide[:, 0]])
    counts = torch.stack([known[:, 1:].sum(1), known[:, 0]]).double()
    return sums.numpy(), counts.numpy()
