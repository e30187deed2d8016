"""Does the skip carry position? Damage it, leave what the sublayer reads intact, and see whether position comes back.

Two lesions of the skip around a sublayer, x_{s+1} = x_s + w_s before any norm:

- ``scale``: alpha x_s + w_s. Alpha 1 is the unchanged model, bit for bit.
- ``position``: what x_s has in the subspace of its positional part, apart from the mean, is taken off the skip. Its
  control ``random`` takes as much energy, in a random subspace of the same dimension that is orthogonal to the first.

If position is as strong downstream as before, later sublayers compute it anew; if it is gone, the skip was the carrier.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch
from numpy.typing import NDArray

from streamlens.analyses.ablation.runs import Setting
from streamlens.analyses.ablation.scores import Scores
from streamlens.analyses.ablation.trials import Ablation, explained
from streamlens.analyses.position.geometry import control_subspace, top_span
from streamlens.analyses.position.sample import Halves, fit_ridge
from streamlens.analyses.position.sums import (
    PositionSums,
    first_length,
    null_band,
    split,
    sums_of,
)
from streamlens.analyses.position.theatre import Lesion, Theatre, Tokens
from streamlens.analyses.result import Result
from streamlens.analyses.source import Corpus, Origin, Source, source_of
from streamlens.analyses.statistics import Floats
from streamlens.anatomy import Stream
from streamlens.block import Block
from streamlens.checkpoint.model import Model
from streamlens.errors import MissingDataError, UsageError
from streamlens.progress import Progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes


ALPHAS = (1.0, 0.9, 0.5, 0.0)
ENERGY, MOST_DIMENSIONS = 0.99, 16
"""The position subspace holds this share of the positional energy, in so many dimensions at most."""


@dataclass(frozen=True)
class LesionResult(Result):
    """What each lesion does to position in the states after it, and to the output. NaN where there is no number."""

    title: str
    lesions: tuple[Lesion, ...]
    """(lesion,)."""
    states: tuple[str, ...]
    """(state,)."""
    dimensions: NDArray[np.int64]
    """(lesion,) of the subspace that is removed; 0 where all is scaled."""
    energy_removed: Floats
    """(lesion,) mean squared norm of what the skip loses, over that of the state around its mean."""
    baseline: Floats
    """(state,) share of the positional part in the unchanged model."""
    null_high: Floats
    """(state,) what it would be at most if positions stood in random order."""
    position_share: Floats
    """(lesion, state) the same share after the lesion; NaN for states before it."""
    probe_states: NDArray[np.int64]
    """(lesion, 2) where position is read off: in the state that the lesion makes, and in the last."""
    probe_baseline: Floats
    """(lesion, 2) R^2 of a ridge regression to the position on the unchanged states, on held-out documents."""
    probe_refitted: Floats
    """(lesion, 2) of one that is trained anew on the states after the lesion: is position there in any form?"""
    probe_transferred: Floats
    """(lesion, 2) of the one trained on the unchanged states: is it there in the old form?"""
    score: str
    """Which score the next three are: ``delta_loss`` in nats per token, or ``pooled_distance`` without logits."""
    damage: Floats
    low: Floats
    high: Floats
    """(lesion,) mean and 95 % interval, by bootstrap over documents."""

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each lesion; `after` is the state that it makes, `last` the last one."""
        rows = []
        for i, lesion in enumerate(self.lesions):
            row: dict[str, Any] = {
                "label": lesion.label,
                "mode": lesion.mode,
                "alpha": lesion.alpha if lesion.mode == "scale" else None,
                "dimensions": int(self.dimensions[i]),
                "energy_removed": float(self.energy_removed[i]),
            }
            for column, name in enumerate(("after", "last")):
                k = int(self.probe_states[i, column])
                row[f"position_share_{name}"] = float(self.position_share[i, k])
                row[f"position_share_{name}_unchanged"] = float(self.baseline[k])
                row[f"r_squared_{name}"] = float(self.probe_refitted[i, column])
                row[f"r_squared_{name}_transferred"] = float(self.probe_transferred[i, column])
                row[f"r_squared_{name}_unchanged"] = float(self.probe_baseline[i, column])
            rows.append(
                {**row, self.score: float(self.damage[i]), "low": float(self.low[i]), "high": float(self.high[i])}
            )
        return rows

    def short_rows(self) -> list[dict[str, Any]]:
        """Return the columns that fit a terminal."""
        names = ("label", "mode", "alpha", "position_share_after", "position_share_last", "r_squared_last", self.score)
        short = {"position_share_after": "share_after", "position_share_last": "share_last"}
        return [{short.get(name, name): row[name] for name in names} for row in self.rows()]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the positional share by state, unchanged and after each selective lesion with its control.

        In a figure of its own, the lesions that scale the skip (`plot_scale`) are drawn below.
        """
        from streamlens.analyses.figures import panels
        from streamlens.analyses.position.drawing import plot_lesions, plot_scale

        if ax is not None or not any(x.mode == "scale" for x in self.lesions):
            return plot_lesions(self, ax)
        above, below = panels(2, 1, width=7.0, height=5.6)
        plot_scale(self, below).set_title("", loc="left")
        return plot_lesions(self, above)

    def plot_scale(self, ax: Axes | None = None) -> Axes:
        """Draw the positional share of the last state against the factor on the skip."""
        from streamlens.analyses.position.drawing import plot_scale

        return plot_scale(self, ax)


def position_lesion(
    origin: Origin,
    *,
    stream: str | None = None,
    model: Model | None = None,
    skips: Sequence[str] | None = None,
    alphas: Sequence[float] = ALPHAS,
    positions: int | None = None,
    include_first: bool = False,
    protect_first: bool = False,
    documents: int = 64,
    tokens_per_document: int = 24,
    sample_seed: int = 0,
    progress: bool = True,
    **corpus: Unpack[Corpus],
) -> LesionResult:
    """Damage skips in a running model and measure position downstream.

    Args:
        origin: a capture or its path (its model is loaded, too), a model or its file, or a source.
        stream: which stream; by default the one that the head reads.
        model: for a capture: its model, where it is loaded already.
        skips: the skips around these sublayers, by label; by default around the first one of three layers.
        alphas: factors of the ``scale`` lesions; empty for none.
        positions: how many positions of each document are measured; by default the length of the first, at most 128.
        include_first: whether position 0 counts.
        protect_first: leave the skip of position 0 alone, which in many models holds a vector of enormous norm.
        documents: windows that are run, at most.
        tokens_per_document: tokens of each that the probes see.
        sample_seed: of the probes' sample and of the random subspaces.
        progress: whether to show a progress bar.
        **corpus: for a live model: what it is shown, as in `streamlens.capture`.

    Raises:
        MissingDataError: a label that does not exist, too few documents, or a capture whose model is not here.
        UsageError: neither a scale nor a subspace to remove.

    Example:
        >>> from fixtures.planted_position import PositionCarrier
        >>> ids = torch.randint(0, 40, (32, 20), generator=torch.Generator().manual_seed(0))
        >>> found = position_lesion(PositionCarrier(), tokens=ids, skips=["1_attn_out"], progress=False)
        >>> [(x.mode, bool(share < 0.01)) for x, share in zip(found.lesions[-2:], found.position_share[-2:, -1])]
        [('position', True), ('random', False)]
    """
    source = source_of(origin, stream=stream, model=model, **corpus)
    steps = _steps(source.stream, skips)
    setting = Setting.of(source, protect_first=protect_first)

    with explained():
        sample = Tokens(steps, documents, tokens_per_document, positions, 0 if include_first else 1, sample_seed)
        tapped = sample.tapped(_bounded(source, "position", documents, progress))
        base = sums_of(source, tapped, positions=positions, include_first=include_first, origins=False)
        lesions = _lesions(source.stream, base, sample, alphas, sample_seed)
        if not lesions:
            raise UsageError("there is nothing to do: no factor is given, and there is no positional part to remove")
        theatre = Theatre(source, setting, lesions, base, sample)
        ablation = Ablation(source, setting, len(lesions), theatre.play)
        for block in _bounded(source, "lesion", documents, progress):
            theatre.prepare(block)
            ablation.update(block)
    return _result(theatre, ablation.result(), sample_seed)


def _bounded(source: Source, what: str, documents: int, progress: bool) -> Iterator[Block]:
    """The blocks up to the one with which there are enough windows, behind a progress bar."""
    blocks = iter(source.blocks())
    first = next(blocks, None)
    if first is None:
        return
    total, seen = min(source.n_tokens, documents * first_length(first)), 0
    with Progress(total, what, enabled=progress) as bar:
        for block in chain([first], blocks):
            yield block
            bar.update(min(block.stop - block.start, total - bar.tokens), 0)
            seen += int((block.position[1:] <= block.position[:-1]).sum()) + 1
            if seen >= documents:
                return


def _steps(stream: Stream, skips: Sequence[str] | None) -> list[int]:
    if skips is None:
        firsts: dict[int, int] = {}
        for sublayer in stream.sublayers:
            firsts.setdefault(sublayer.layer, sublayer.read)
        layers = sorted({0, stream.layers // 3, 2 * stream.layers // 3})
        return [firsts[layer] for layer in layers if layer in firsts]
    return list(dict.fromkeys(stream.find(label).read for label in skips))


def _lesions(stream: Stream, base: PositionSums, sample: Tokens, alphas: Sequence[float], seed: int) -> list[Lesion]:
    found: list[Lesion] = []
    labels = stream.state_labels
    generator = torch.Generator().manual_seed(seed)
    for step in sample.steps:
        label = labels[step + 1]
        found += [Lesion("scale", step, label, alpha) for alpha in alphas]
        own = split(base, step)
        strength = torch.linalg.svdvals(own.parts).square()
        if not strength.sum():
            continue
        needed = int((strength.cumsum(0) < ENERGY * strength.sum()).sum()) + 1
        basis = top_span(own.parts, min(needed, MOST_DIMENSIONS, stream.d_model // 2))
        mean = base.sums[step][base.first :].mean(0) / base.docs
        control, factor = control_subspace(torch.cat(sample.states[step]) - mean, basis, generator)
        found.append(Lesion("position", step, label, mean=mean, basis=basis))
        found.append(Lesion("random", step, label, mean=mean, basis=control, factor=factor))
    return found


def _result(theatre: Theatre, scores: Scores, seed: int) -> LesionResult:
    """Fit the probes and put everything together."""
    splits = {k: split(theatre.base, k) for k in theatre.base.states}
    shares = np.full((len(theatre.lesions), len(splits)), np.nan)
    for i, sums in enumerate(theatre.sums):
        for k in sums.states:
            shares[i, k] = split(sums, k).share
    places = np.array([[x.step + 1, theatre.last] for x in theatre.lesions], np.int64)
    probes = _probes(theatre, places, seed)
    intervals = [scores.interval(scores.headline, i) for i in range(len(theatre.lesions))]
    around = [splits[x.step].total / (splits[x.step].docs * splits[x.step].positions) for x in theatre.lesions]
    return LesionResult(
        title=f"Lesions of the skip: {theatre.source.description}",
        lesions=tuple(theatre.lesions),
        states=theatre.source.stream.state_labels,
        dimensions=np.array([0 if x.basis is None else x.basis.shape[1] for x in theatre.lesions], np.int64),
        energy_removed=theatre.energy[:, 0] / theatre.energy[:, 1] / np.array(around),
        baseline=np.array([splits[k].share for k in splits]),
        null_high=np.array([null_band(theatre.base, k, splits[k])[1] for k in splits]),
        position_share=shares,
        probe_states=places,
        probe_baseline=probes[0],
        probe_refitted=probes[1],
        probe_transferred=probes[2],
        score=scores.headline,
        damage=np.array([i.mean for i in intervals]),
        low=np.array([i.low for i in intervals]),
        high=np.array([i.high for i in intervals]),
    )


def _probes(theatre: Theatre, places: NDArray[np.int64], seed: int) -> Floats:
    """(kind, lesion, 2) R^2 on held-out documents: unchanged, refitted, transferred."""
    found = np.full((3, *places.shape), np.nan)
    labels = theatre.sample.labels.position.astype(np.float64)[:, None]
    try:
        halves = Halves.of(theatre.sample.labels.groups, seed)
    except MissingDataError:
        return found  # with few documents the other measures still stand
    tables = {key: np.concatenate(rows) for key, rows in theatre.features.items()}
    own = {k: fit_ridge(tables[-1, k], labels, halves) for k in np.unique(places)}
    truth = labels[halves.test, 0]

    def score(guess: Floats) -> float:
        return 1 - float(((truth - guess[:, 0]) ** 2).sum() / ((truth - truth.mean()) ** 2).sum())

    for i, pair in enumerate(places):
        for column, k in enumerate(pair):
            changed = tables[i, k]
            found[0, i, column] = score(own[k].predict(tables[-1, k][halves.test]))
            found[1, i, column] = score(fit_ridge(changed, labels, halves).predict(changed[halves.test]))
            found[2, i, column] = score(own[k].predict(changed[halves.test]))
    return found
