"""Does the skip carry position? Damage it, leave what the sublayer reads intact, and see whether position comes back.

Two lesions of the skip around a sublayer, x_{s+1} = x_s + w_s before any norm:

- ``scale``: alpha x_s + w_s. Alpha 1 is the unchanged model, bit for bit.
- ``position``: what x_s has in the subspace of its positional part, apart from the mean, is taken off the skip. Its
  control ``random`` takes as much energy, in a random subspace of the same dimension that is orthogonal to the first.

If as much of it is left downstream as after the control, later sublayers compute it anew; if much less is, the skip was
the carrier. What counts is the energy of the positional part: its share grows with everything else that is taken off.

The lesion changes what is added to the skip. In a model of 16 bits that sum is rounded as finely as the whole skip, so
where little of it shall be left, `LesionResult.rounding` says how far off it is: run such a model in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from streamlens.analyses.ablation.runs import Setting
from streamlens.analyses.ablation.scores import Scores
from streamlens.analyses.ablation.trials import Ablation, explained
from streamlens.analyses.position.damage import LesionResult
from streamlens.analyses.position.energies import (
    Estimates,
    Split,
    jackknife,
    null_band,
    positional_span,
    split,
    without_each_fold,
)
from streamlens.analyses.position.geometry import control_subspace
from streamlens.analyses.position.sample import Halves, fit_ridge, r_squared, sample_of, score
from streamlens.analyses.position.sums import PositionSums, sums_of
from streamlens.analyses.position.theatre import Lesion, Theatre, Tokens
from streamlens.analyses.source import Corpus, Origin, source_of, watched
from streamlens.analyses.statistics import Floats
from streamlens.anatomy import Stream
from streamlens.checkpoint.model import Model
from streamlens.errors import MissingDataError, UsageError
from streamlens.rest import resting

ALPHAS = (1.0, 0.9, 0.5, 0.0)
ENERGY, MOST_DIMENSIONS = 0.99, 16
"""The position subspace holds this share of the positional energy, in so many dimensions at most."""


@resting
def position_lesion(
    origin: Origin,
    *,
    stream: str | None = None,
    model: Model | nn.Module | None = None,
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
        positions: how many positions of each document are measured; by default so many as half of them have, at most
            128.
        include_first: whether position 0 counts.
        protect_first: leave the skip of position 0 alone, which in many models holds a vector of enormous norm.
        documents: windows that are run, at most, spread over the text; those that are too short are left out.
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
        >>> [(x.mode, bool(share < 0.01)) for x, share in zip(found.lesions[-2:], found.position_share.value[-2:, -1])]
        [('position', True), ('random', False)]
    """
    whole = source_of(origin, stream=stream, model=model, **corpus)
    source, labels = sample_of(
        whole, positions, documents=documents, tokens=tokens_per_document, include_first=include_first, seed=sample_seed
    )
    sample = Tokens(_steps(source.stream, skips), labels)
    with explained():
        tapped = sample.tapped(watched(source, "position", progress=progress))
        base = sums_of(source, tapped, positions=labels.positions, include_first=include_first, origins=False)
        lesions = _lesions(source.stream, base, sample, alphas, sample_seed)
        if not lesions:
            raise UsageError("there is nothing to do: no factor is given, and there is no positional part to remove")
        theatre = Theatre(source, Setting.of(source, protect_first=protect_first), lesions, base, sample)
        ablation = Ablation(source, theatre.setting, len(lesions), theatre.play)
        for block in watched(source, "lesion", progress=progress):
            theatre.prepare(block)
            ablation.update(block)
    return _result(theatre, ablation.result(), sample_seed)


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
        basis = positional_span(base, step, ENERGY, min(MOST_DIMENSIONS, stream.d_model // 2))
        if not basis.shape[1]:
            continue
        mean = base.sums[step][base.first :].mean(0) / base.docs
        control, factor = control_subspace(torch.cat(sample.states[step]) - mean, basis, generator)
        found.append(Lesion("position", step, label, mean=mean, basis=basis))
        found.append(Lesion("random", step, label, mean=mean, basis=control, factor=factor))
    return found


def _result(theatre: Theatre, scores: Scores, seed: int) -> LesionResult:
    """Fit the probes and put everything together."""
    base, lesions = theatre.base, theatre.lesions
    splits = {k: split(base, k) for k in base.states}
    null_high = np.array([null_band(base, k, splits[k])[1] for k in splits])
    shares, left, over_control = _left(theatre, splits, null_high)
    places = np.array([[x.step + 1, theatre.last] for x in lesions], np.int64)
    probes = _probes(theatre, places, seed)
    intervals = [scores.interval(scores.headline, i) for i in range(len(lesions))]
    run = f"{base.docs:,} x {base.positions - base.first:,} positions"
    around = [splits[x.step].total / (base.docs * splits[x.step].positions) for x in lesions]
    return LesionResult(
        title=f"Lesions of the skip: {theatre.source.description}, {run}",
        lesions=tuple(lesions),
        states=theatre.source.stream.state_labels,
        dimensions=np.array([0 if x.basis is None else x.basis.shape[1] for x in lesions], np.int64),
        energy_removed=theatre.energy[:, 0] / theatre.energy[:, 1] / np.array(around),
        baseline=np.array([splits[k].share for k in splits]),
        null_high=null_high,
        position_share=shares,
        left=left,
        over_control=over_control,
        probe_states=places,
        probe_baseline=probes[0],
        probe_refitted=probes[1],
        probe_low=probes[2],
        probe_high=probes[3],
        probe_transferred=probes[4],
        score=scores.headline,
        damage=np.array([i.mean for i in intervals]),
        low=np.array([i.low for i in intervals]),
        high=np.array([i.high for i in intervals]),
        rounding=theatre.rounding,
    )


def _left(theatre: Theatre, splits: dict[int, Split], null_high: Floats) -> tuple[Estimates, Estimates, Estimates]:
    """Shares after each lesion, what is left of position, and what is left of it over the control; (lesion, state)."""
    base, lesions = theatre.base, theatre.lesions
    found = np.full((3, 3, len(lesions), len(splits)), np.nan)
    controls = {x.step: i for i, x in enumerate(lesions) if x.mode == "random"}

    def note(which: int, i: int, k: int, value: float, without: Floats) -> None:
        found[which, :, i, k] = (value, *jackknife(value, without, base))

    for k in splits:
        whole, whole_without = splits[k].energy, without_each_fold(base, k)[1]
        energy: dict[int, tuple[float, Floats]] = {}
        for i, sums in enumerate(theatre.sums):
            if k in sums.states:
                own, (share, without) = split(sums, k), without_each_fold(sums, k)
                note(0, i, k, own.share, share)
                energy[i] = own.energy, without
                if splits[k].share > null_high[k]:
                    note(1, i, k, own.energy / whole, without / whole_without)
        for i, (own_energy, without) in energy.items():
            control = energy.get(controls.get(lesions[i].step, -1))
            if lesions[i].mode == "position" and control is not None and found[1, 1, i, k] == found[1, 1, i, k]:
                note(2, i, k, own_energy / control[0], without / control[1])
    return Estimates(*found[0]), Estimates(*found[1]), Estimates(*found[2])


def _probes(theatre: Theatre, places: NDArray[np.int64], seed: int) -> Floats:
    """(kind, lesion, 2) R^2 on held-out documents: unchanged, refitted with its ends, transferred."""
    found = np.full((5, *places.shape), np.nan)
    groups = theatre.sample.labels.groups
    labels = theatre.sample.labels.position.astype(np.float64)[:, None]
    try:
        halves = Halves.of(groups, seed)
    except MissingDataError:
        return found  # with few documents the other measures still stand
    tables = {key: np.concatenate(rows) for key, rows in theatre.features.items()}
    own = {k: fit_ridge(tables[-1, k], labels, halves) for k in np.unique(places)}
    truth = labels[halves.test, 0]
    for i, pair in enumerate(places):
        for column, k in enumerate(pair):
            changed = tables[i, k]
            refitted = fit_ridge(changed, labels, halves).predict(changed[halves.test])[:, 0]
            found[0, i, column] = r_squared(truth, own[k].predict(tables[-1, k][halves.test])[:, 0])
            found[1:4, i, column] = score(truth, refitted, groups[halves.test])
            found[4, i, column] = r_squared(truth, own[k].predict(changed[halves.test])[:, 0])
    return found
