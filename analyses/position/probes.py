"""Can a linear map tell from a state where its token stands, in documents it was not trained on?

Controls go with it (Hewitt & Liang 2019, arXiv:1909.03368): labels in random order, which nothing can predict; a
random position for each kind of token, which shows how much the probe can learn by heart; the distance between the
latter and the real thing, the selectivity; and, where there is one, the same model before its training, since a causal
mask alone lets position be read off (Chi et al. 2023, arXiv:2305.13571). That position can be read off does not say
that the model reads it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from streamlens.analyses.position.sample import Halves, Sample, fit_ridge, r_squared, sample_of, score
from streamlens.analyses.result import Result
from streamlens.analyses.sampling import Ints
from streamlens.analyses.source import Corpus, Origin, Source, source_of, watched
from streamlens.analyses.statistics import Floats
from streamlens.anatomy import Stream
from streamlens.checkpoint.model import Model
from streamlens.checkpoint.sniff import is_hdf5
from streamlens.errors import UsageError
from streamlens.rest import resting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STRENGTHS = (1e-4, 1e-2, 1.0)
"""Inverse penalties of the logistic probe to choose from."""


@dataclass(frozen=True)
class ProbeResult(Result):
    """How well position is read off each state, on held-out documents. NaN stands where a control does not exist."""

    title: str
    states: tuple[str, ...]
    """(state,) the states that were probed."""
    state_index: Ints
    """(state,) k of x_k."""
    tokens: tuple[int, int]
    """How many tokens the probes were trained and tested on."""
    split_by: str
    """``document``, or ``window`` where there are too few documents to keep whole ones apart."""
    bins: int
    """Classes of the logistic probe: intervals of positions of equal length."""
    r_squared: Floats
    """(state,) of the ridge regression to the position; 1 is perfect, 0 no better than the mean."""
    low: Floats
    high: Floats
    """(state,) its 95 % interval, by bootstrap over the test documents."""
    r_squared_shuffled: Floats
    """(state,) the same with labels in random order."""
    r_squared_control: Floats
    """(state,) the same with a random position for each kind of token, on kinds that were seen in training."""
    r_squared_untrained: Floats
    """(state,) of the same model before its training, where one was given."""
    mean_absolute_error: Floats
    """(state,) in tokens."""
    mean_absolute_error_guess: float
    """What guessing the middle gives, in tokens."""
    accuracy: Floats
    """(state,) of the logistic regression to the bin of the position."""
    accuracy_control: Floats
    """(state,) the same with a random bin for each kind of token."""
    chance: float
    """The share of the most frequent bin."""
    penalty: Floats
    """(state,) the ridge penalty that was chosen."""

    @property
    def selectivity(self) -> Floats:
        """(state,) R^2 above that of the control with a random position for each kind of token."""
        return self.r_squared - self.r_squared_control

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each state; errors are in tokens."""
        rows = []
        for i, label in enumerate(self.states):
            row: dict[str, Any] = {"state": int(self.state_index[i]), "label": label}
            for name in _COLUMNS:
                row[name] = float(getattr(self, name)[i])
            rows.append({**row, "chance": self.chance})
        return rows

    def short_rows(self) -> list[dict[str, Any]]:
        """Return the columns that fit a terminal."""
        names = ("r_squared", "low", "high", "r_squared_control", "mean_absolute_error", "accuracy")
        return [
            {"label": label, **{n: float(getattr(self, n)[i]) for n in names}} for i, label in enumerate(self.states)
        ]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw R^2 by state with its interval and its controls."""
        from streamlens.analyses.position.drawing import plot_probes

        return plot_probes(self, ax)


_COLUMNS = (
    "r_squared",
    "low",
    "high",
    "r_squared_shuffled",
    "r_squared_control",
    "r_squared_untrained",
    "selectivity",
    "mean_absolute_error",
    "accuracy",
    "accuracy_control",
    "penalty",
)


@resting
def position_probes(
    origin: Origin,
    *,
    stream: str | None = None,
    model: Model | nn.Module | None = None,
    untrained: Origin | None = None,
    states: Sequence[int] | None = None,
    positions: int | None = None,
    include_first: bool = False,
    documents: int = 64,
    tokens_per_document: int = 24,
    bins: int = 8,
    sample_seed: int = 0,
    progress: bool = True,
    **corpus: Unpack[Corpus],
) -> ProbeResult:
    """Train and test linear probes for position on a sample of tokens.

    Args:
        origin: a capture or its path, a model or its file, or a source.
        stream: which stream; by default the one that the head reads.
        model: for a capture: its model, where it is loaded already (not needed here).
        untrained: the same model before its training (or a capture of it on the same tokens): a control.
        states: which states, by index; by default x_0 and the last one of each layer.
        positions: how many positions of each document, from 0; by default so many as half of them have, at most 128.
        include_first: whether position 0 may be in the sample.
        documents: windows in the sample, at most, spread over the text; this and the next bound the memory.
        tokens_per_document: tokens of each window.
        bins: classes of the logistic probe.
        sample_seed: of sample, split and controls.
        progress: whether to show a progress bar.
        **corpus: for a live model: what it is shown, as in `streamlens.capture`.

    Raises:
        MissingDataError: too few documents, or a capture that lacks positions or states.
        UsageError: a state that does not exist, fewer than two bins, or a control that was shown other tokens.

    Example:
        >>> import torch
        >>> from fixtures.planted_position import PositionCarrier
        >>> ids = torch.randint(0, 40, (32, 20), generator=torch.Generator().manual_seed(0))
        >>> found = position_probes(PositionCarrier(eraser=1), tokens=ids, states=[0, 6], progress=False)
        >>> bool(found.low[0] > 0.3), bool(found.r_squared[1] < 0.1)
        (True, True)
    """
    if bins < 2:
        raise UsageError(f"{bins} bins are no classes to tell apart: ask for at least 2")
    plan: dict[str, Any] = {"documents": documents, "tokens": tokens_per_document}
    plan |= {"include_first": include_first, "seed": sample_seed}
    source = source_of(origin, stream=stream, model=model, **corpus)
    chosen = _chosen(source.stream, states)
    features = _Features.of(source, positions, chosen, plan, progress)
    control = None
    if untrained is not None:
        # A model is shown the same; a capture or a source has its own tokens, which are compared below.
        shown = isinstance(untrained, (Model, nn.Module)) or (
            isinstance(untrained, (str, Path)) and not is_hdf5(Path(untrained))
        )
        same = source_of(untrained, stream=stream, **corpus) if shown else source_of(untrained)
        control = _Features.of(same, positions, chosen, plan, progress)
    return _probed(features, control, bins, sample_seed)


@dataclass(frozen=True)
class _Features:
    """The states of a sample of tokens."""

    source: Source
    sample: Sample
    tables: dict[int, NDArray[np.float32]]
    """By state: (sample, d_model)."""

    @classmethod
    def of(
        cls, source: Source, positions: int | None, states: Sequence[int], plan: dict[str, Any], progress: bool
    ) -> _Features:
        some, sample = sample_of(source, positions, **plan)
        seen: dict[int, list[NDArray[np.float32]]] = {k: [] for k in states}
        for block in watched(some, "position", progress=progress):
            rows = sample.rows(block)
            for k, tables in seen.items():
                state = block.states[k]
                tables.append(state[rows.to(state.device)].float().cpu().numpy())
        return cls(some, sample, {k: np.concatenate(tables) for k, tables in seen.items()})


def _chosen(stream: Stream, states: Sequence[int] | None) -> list[int]:
    count = len(stream.steps) + 1
    if states is None:
        ends = {stream.sublayers[s].layer: k + 1 for k, step in enumerate(stream.steps) for s in step.sublayers}
        return [0, *ends.values()]
    for k in states:
        if not 0 <= k < count:
            raise UsageError(f"stream {stream.name!r} has states 0 to {count - 1}, not {k}")
    return list(dict.fromkeys(states))


def control_labels(ids: Ints, position: Ints, seed: int) -> Floats:
    """Return (sample,) a random position for each kind of token, the same wherever that token stands."""
    kinds, place = np.unique(ids, return_inverse=True)
    drawn = np.random.default_rng(seed).choice(position, size=len(kinds))
    return drawn[place].astype(np.float64)


def _probed(features: _Features, untrained: _Features | None, bins: int, seed: int) -> ProbeResult:
    sample = features.sample
    position, halves = sample.position.astype(np.float64), Halves.of(sample.groups, seed)
    train, test = halves.train, halves.test
    control = control_labels(sample.ids, sample.position, seed)
    shuffled = np.random.default_rng(seed).permutation(position)
    known = np.isin(sample.ids[test], sample.ids[train]) & (sample.ids[test] >= 0)
    labels = np.stack([position, shuffled, control], axis=1)
    edges = np.linspace(position.min(), position.max() + 1, bins + 1)
    classes = [np.digitize(column, edges) for column in (position, control)]
    found: dict[str, list[float]] = {name: [] for name in _COLUMNS if name != "selectivity"}
    for k, table in features.tables.items():
        probe = fit_ridge(table, labels, halves)
        guess = probe.predict(table[test])
        own = score(position[test], guess[:, 0], sample.groups[test])
        found["r_squared"].append(own[0])
        found["low"].append(own[1])
        found["high"].append(own[2])
        found["r_squared_shuffled"].append(r_squared(shuffled[test], guess[:, 1]))
        found["r_squared_control"].append(r_squared(control[test][known], guess[known, 2]))
        found["mean_absolute_error"].append(float(np.abs(position[test] - guess[:, 0]).mean()))
        found["r_squared_untrained"].append(_untrained(untrained, k, sample, halves))
        found["penalty"].append(float(probe.penalties[0]))
        found["accuracy"].append(float(_classified(table, classes[0], halves).mean()))
        by_heart = _classified(table, classes[1], halves)[known] if known.any() else np.array([np.nan])
        found["accuracy_control"].append(float(by_heart.mean()))
    source, names = features.source, features.source.stream.state_labels
    return ProbeResult(
        title=f"Position read off by linear probes: {source.description}, {sample.tokens} positions of each window",
        states=tuple(names[k] for k in features.tables),
        state_index=np.array(list(features.tables), np.int64),
        tokens=(len(train), len(test)),
        split_by="document" if sample.by_document else "window",
        bins=bins,
        mean_absolute_error_guess=float(np.abs(position[test] - np.median(position[train])).mean()),
        chance=float(np.bincount(classes[0][test]).max() / len(test)),
        **{name: np.array(values, np.float64) for name, values in found.items()},
    )


def _classified(table: NDArray[np.float32], classes: Ints, halves: Halves) -> NDArray[np.bool_]:
    """(test token,) whether the logistic probe finds the class; its penalty is chosen on the first inner fold."""
    x, y = table[halves.train], classes[halves.train]
    inner, outer = halves.folds[0]
    with warnings.catch_warnings():
        # A probe that has not quite converged is a slightly weaker probe, and the weak penalties never do.
        warnings.simplefilter("ignore", ConvergenceWarning)
        merits = [_logistic(s).fit(x[inner], y[inner]).score(x[outer], y[outer]) for s in STRENGTHS]
        best = _logistic(STRENGTHS[int(np.argmax(merits))]).fit(x, y)
    return np.asarray(best.predict(table[halves.test]) == classes[halves.test])


def _logistic(strength: float) -> Any:
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=300, tol=1e-3))


def _untrained(features: _Features | None, state: int, sample: Sample, halves: Halves) -> float:
    """R^2 of the same probe on the model before its training."""
    if features is None:
        return float("nan")
    if not np.array_equal(features.sample.ids, sample.ids):
        raise UsageError("the model before its training was shown other tokens: give both the same text and windows")
    position = sample.position.astype(np.float64)
    table = features.tables[state]
    guess = fit_ridge(table, position[:, None], halves).predict(table[halves.test])[:, 0]
    return r_squared(position[halves.test], guess)
