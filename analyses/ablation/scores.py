"""What a change does to the output: for each document the sums from which every score and interval is made.

Scores are paired: each token is compared with itself in the unchanged model. All are in nats or shares.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamlens.analyses.statistics import Floats, Interval, bootstrap

CHUNK = 2**19
"""Logits that are scored at once: so many that they stay in the cache of a core."""

FEW_DOCUMENTS = 10
"""With fewer documents the interval is over windows: resampling three documents says nothing."""

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
        yield rows, flat[rows].float().log_softmax(-1)


def _expected(p: Tensor, log_q: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vecdot(p, log_q)
    return found.double()


def _cross_entropy(log_p: Tensor, targets: Tensor) -> Tensor:
    picked = log_p.gather(-1, targets.clamp_min(0)[:, None])[:, 0].double()
    return torch.where(targets >= 0, -picked, torch.nan)


@dataclass(frozen=True)
class Scores:
    """Sums for each trial and window, and the means and intervals over them.

    Axis words: ``trial``, ``window`` (a run of tokens of one document, as the model sees them), ``part`` (0: all
    positions but the first, 1: the first one).
    """

    sums: Mapping[str, Floats]
    """(trial, part, window) by score."""
    counts: Mapping[str, Floats]
    """(part, window) by score: how many tokens (or windows) each sum is over."""
    loss: Floats
    """(part, window) sum of the unchanged model's loss."""
    doc: NDArray[np.int64]
    """(window,) the document that it belongs to."""

    @property
    def headline(self) -> str:
        """The score by which trials are ranked: delta_loss where there are targets, else kl, else pooled_distance."""
        return next((name for name in FIELDS if name in self.counts and self.counts[name].sum() > 0), FIELDS[0])

    @property
    def unit(self) -> str:
        """What intervals are over: documents, or windows where there are few documents."""
        return "document" if len(np.unique(self.doc)) >= FEW_DOCUMENTS else "window"

    @property
    def base_loss(self) -> float:
        """Mean loss of the unchanged model in nats, without position 0."""
        count = self.counts["delta_loss"][0].sum() if "delta_loss" in self.counts else 0.0
        return float(self.loss[0].sum() / count) if count else float("nan")

    def mean(self, name: str, *, with_first: bool = False) -> Floats:
        """(trial,) the mean of a score over tokens; NaN where there are none.

        Args:
            name: one of `FIELDS`.
            with_first: also over position 0.
        """
        trials = len(next(iter(self.sums.values())))
        if name not in self.sums:
            return np.full(trials, np.nan)
        total, count = self.columns(name, with_first=with_first)
        if not count.sum():
            return np.full(trials, np.nan)
        return np.asarray(total.sum(-1) / count.sum(), np.float64)

    def interval(self, name: str, trial: int) -> Interval:
        """Return the mean of a score with its 95 % bootstrap interval."""
        return self.interval_of(name, self.columns(name)[0][trial])

    def interval_of(self, name: str, sums: Floats) -> Interval:
        """Return the same of any linear combination of trials, (unit,)."""
        return bootstrap(sums, self.columns(name)[1])

    def taken(self, trials: Iterable[int]) -> Scores:
        """Return the scores of some of the trials."""
        rows = list(trials)
        return replace(self, sums={name: sums[rows] for name, sums in self.sums.items()})

    def columns(self, name: str, *, with_first: bool = False) -> tuple[Floats, Floats]:
        """Return sums (trial, unit) and counts (unit,) of a score, over what intervals are over."""
        parts = slice(0, 2) if with_first else slice(0, 1)
        sums, counts = self.sums[name][:, parts].sum(1), self.counts[name][parts].sum(0)
        if self.unit == "window":
            return sums, counts
        _, place = np.unique(self.doc, return_inverse=True)
        joined, size = np.zeros((len(sums), place.max() + 1)), np.zeros(place.max() + 1)
        np.add.at(joined.T, place, sums.T)
        np.add.at(size, place, counts)
        return joined, size


class Tally:
    """Collects the scores of all trials, block by block."""

    def __init__(self, trials: int, names: Sequence[str] = FIELDS) -> None:
        """Start with nothing, for so many trials and these scores."""
        self._trials, self._names = trials, tuple(names)
        self._blocks: dict[int, dict[str, Floats]] = {}

    def begin(self, start: int, doc: Tensor, loss: Tensor | None) -> None:
        """Open a block.

        Args:
            start: its first token.
            doc: (window,) which document each window belongs to.
            loss: (window, position) of the unchanged model, NaN without a target; None without logits.
        """
        empty = np.zeros((2, len(doc)))
        first = {"loss": empty if loss is None else _by_window(loss)[0]}
        self._blocks[start] = {"doc": doc.numpy().astype(np.int64), **first}

    def add(self, start: int, trial: int, scores: Mapping[str, Tensor]) -> None:
        """Add the scores of a trial in an open block: each (window, position), or (window,)."""
        block = self._blocks[start]
        for name, values in scores.items():
            sums, counts = _by_window(values)
            shape = (self._trials, *sums.shape)
            block.setdefault(f"sum/{name}", np.full(shape, np.nan))[trial] = sums
            block[f"count/{name}"] = counts

    def merge(self, other: Tally) -> None:
        """Fold another partial result in."""
        self._blocks |= other._blocks

    def result(self) -> Scores:
        """Return the sums so far, in the order of the tokens."""
        blocks = [self._blocks[start] for start in sorted(self._blocks)]
        names = [name for name in self._names if blocks and f"sum/{name}" in blocks[0]]

        def joined(key: str) -> Floats:
            return np.concatenate([block[key] for block in blocks], axis=-1)

        return Scores(
            {name: joined(f"sum/{name}") for name in names},
            {name: joined(f"count/{name}") for name in names},
            joined("loss"),
            joined("doc").astype(np.int64),
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
