"""A bounded sample of tokens, the same ones in every run, and how well a linear map tells where they stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import GroupKFold, GroupShuffleSplit
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from streamlens.analyses.position.sums import MOST_POSITIONS, Rectangle
from streamlens.analyses.sampling import Ints, sampled, usual_length
from streamlens.analyses.source import Source
from streamlens.analyses.statistics import Floats, bootstrap
from streamlens.block import Block
from streamlens.errors import MissingDataError

PENALTIES = np.logspace(-2, 4, 7)
"""Ridge penalties to choose from, for standardised features."""

TEST_SHARE, FOLDS, FEWEST_GROUPS = 0.25, 3, 6


@dataclass
class Sample:
    """Which tokens are looked at: some positions of each window, drawn anew from the seed for each.

    Args:
        positions: how many positions of each window there are to choose from, from 0.
        tokens: how many of them to take.
        first: the first position that may be taken.
        seed: of the choice.
    """

    positions: int
    tokens: int
    first: int = 1
    seed: int = 0
    seen: int = 0
    labels: list[tuple[Ints, Ints, Ints, Ints]] = field(default_factory=list)
    """For each block: position, token id, document and window of each token."""

    def rows(self, block: Block) -> Tensor:
        """Return the rows of a block that are in the sample, and note where they stand. Once for each block.

        Raises:
            MissingDataError: some positions were left out of the capture.
        """
        chosen: list[Tensor] = []
        windows: list[int] = []
        for row in Rectangle.of(block, self.positions).rows:
            drawn = np.random.default_rng([self.seed, self.seen]).permutation(self.positions - self.first)
            chosen.append(row[torch.from_numpy(np.sort(drawn[: self.tokens])) + self.first])
            windows += [self.seen] * len(chosen[-1])
            self.seen += 1
        rows = torch.cat(chosen) if chosen else torch.zeros(0, dtype=torch.int64)
        own = (block.position[rows], block.ids[rows], block.doc[rows], torch.tensor(windows))
        self.labels.append(tuple(t.numpy().astype(np.int64) for t in own))  # type: ignore[arg-type]
        return rows

    def column(self, which: int) -> Ints:
        """Return (sample,) one of the labels of all tokens."""
        return np.concatenate([labels[which] for labels in self.labels])

    @property
    def position(self) -> Ints:
        """(sample,) the position within the window."""
        return self.column(0)

    @property
    def ids(self) -> Ints:
        """(sample,) the token; negative where the model takes none."""
        return self.column(1)

    @property
    def by_document(self) -> bool:
        """Whether there are enough documents to keep whole ones apart; else windows are."""
        return len(np.unique(self.column(2))) >= FEWEST_GROUPS

    @property
    def groups(self) -> Ints:
        """(sample,) what is never on both sides of a split: the document, or the window where documents are few."""
        return self.column(2 if self.by_document else 3)


def sample_of(
    source: Source, positions: int | None, *, documents: int, tokens: int, include_first: bool, seed: int
) -> tuple[Source, Sample]:
    """Return a source of some windows, spread over all of another, and the plan of what is looked at in them.

    Args:
        source: all windows.
        positions: how many positions of each, from 0; by default so many as half of them have, at most 128.
        documents: how many windows, at most.
        tokens: how many positions of each.
        include_first: whether position 0 may be among them.
        seed: of the choice of positions.

    Raises:
        MissingDataError: no window has so many positions.
    """
    count = usual_length(source, MOST_POSITIONS) if positions is None else positions
    return sampled(source, documents, least=count), Sample(count, tokens, 0 if include_first else 1, seed)


@dataclass(frozen=True)
class Halves:
    """What a probe is trained on and what it is tested on, and the folds within the former."""

    train: Ints
    test: Ints
    folds: Sequence[tuple[Ints, Ints]]
    """Pairs of indices into `train`."""

    @classmethod
    def of(cls, groups: Ints, seed: int) -> Halves:
        """Split by group.

        Raises:
            MissingDataError: too few groups.
        """
        count = len(np.unique(groups))
        if count < FEWEST_GROUPS:
            raise MissingDataError(
                f"a probe is tested on other documents than it is trained on, and {count} are too few: "
                f"use at least {FEWEST_GROUPS} documents or windows"
            )
        splitter = GroupShuffleSplit(n_splits=1, test_size=TEST_SHARE, random_state=seed)
        train, test = next(splitter.split(groups, groups=groups))
        folds = list(GroupKFold(FOLDS).split(train, groups=groups[train]))
        return cls(train, test, folds)


@dataclass(frozen=True)
class Ridge:
    """Linear maps from standardised features to several labels, each with the penalty that its folds liked best."""

    scaler: StandardScaler
    weights: Floats
    """(d_model, label)."""
    intercept: Floats
    """(label,)."""
    penalties: Floats
    """(label,)."""

    def predict(self, features: NDArray[np.float32]) -> Floats:
        """Return (sample, label)."""
        return np.asarray(self.scaler.transform(features) @ self.weights + self.intercept, np.float64)


def fit_ridge(features: NDArray[np.float32], labels: Floats, halves: Halves) -> Ridge:
    """Fit on the training half; each label chooses its penalty from `PENALTIES` by the error in the inner folds.

    Args:
        features: (sample, d_model), of both halves.
        labels: (sample, label); NaN where a token has none, which must hold for whole columns or not at all.
        halves: who is in which half.
    """
    x, y = features[halves.train], labels[halves.train]
    errors = np.zeros((len(PENALTIES), y.shape[1]))
    for inner, outer in halves.folds:
        scaler = StandardScaler().fit(x[inner])
        mean = y[inner].mean(0)
        weights = _path(scaler.transform(x[inner]), y[inner] - mean, PENALTIES)
        guesses = np.einsum("nd,pdl->pnl", scaler.transform(x[outer]), weights) + mean
        errors += ((guesses - y[outer]) ** 2).sum(1)
    best = errors.argmin(0)
    scaler = StandardScaler().fit(x)
    mean = y.mean(0)
    path = _path(scaler.transform(x), y - mean, PENALTIES)
    chosen = np.stack([path[p, :, label] for label, p in enumerate(best)], axis=1)
    return Ridge(scaler, chosen, mean, PENALTIES[best])


def _path(x: NDArray[np.float32], y: Floats, penalties: Floats) -> Floats:
    """(penalty, d_model, label) the ridge solutions for all penalties, from one eigendecomposition.

    Of the smaller of X^T X and X X^T: w = V (L + penalty)^-1 V^T X^T y, or X^T U (L + penalty)^-1 U^T y.
    """
    wide = np.asarray(x, np.float64)
    if wide.shape[0] >= wide.shape[1]:
        strength, basis = np.linalg.eigh(wide.T @ wide)
        rotated = basis.T @ (wide.T @ y)
        return np.stack([basis @ (rotated / (strength + p)[:, None]) for p in penalties])
    strength, basis = np.linalg.eigh(wide @ wide.T)
    rotated = basis.T @ y
    return np.stack([wide.T @ (basis @ (rotated / (strength + p)[:, None])) for p in penalties])


def r_squared(truth: Floats, guess: Floats) -> float:
    """Return the share of the variance of the truth that is explained; NaN where it does not vary."""
    spread = float(((truth - truth.mean()) ** 2).sum()) if len(truth) else 0.0
    return 1 - float(((truth - guess) ** 2).sum()) / spread if spread else float("nan")


def score(truth: Floats, guess: Floats, groups: Ints) -> tuple[float, float, float]:
    """Return R^2 with the ends of its 95 % interval, by bootstrap over the groups."""
    _, place = np.unique(groups, return_inverse=True)
    error = np.bincount(place, (truth - guess) ** 2).astype(np.float64)
    spread = np.bincount(place, (truth - truth.mean()) ** 2).astype(np.float64)
    missed = bootstrap(error, spread)
    return 1 - missed.mean, 1 - missed.high, 1 - missed.low
