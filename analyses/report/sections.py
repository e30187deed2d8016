"""Each analysis as a section of the page: what is asked, what came out, the figures and their tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamlens.analyses.ablation.drawing import agreement
from streamlens.analyses.ablation.sweep import ablate
from streamlens.analyses.compare.door import compare
from streamlens.analyses.gradient.door import gradient_flow
from streamlens.analyses.lens.door import LensResult, logit_lens
from streamlens.analyses.lens.grid import shown
from streamlens.analyses.lens.head import NEAREST
from streamlens.analyses.lens.tracks import TokenTracks
from streamlens.analyses.norms.door import contribution_norms
from streamlens.analyses.position.door import positional_persistence
from streamlens.analyses.report.content import Grid, Section, figure, table
from streamlens.analyses.report.stream_map import Branch, draw_stream
from streamlens.analyses.sampling import sampled, window_lengths
from streamlens.analyses.source import Source
from streamlens.anatomy import Sublayer
from streamlens.errors import MissingDataError
from streamlens.wording import counted

SEQUENCES = 8
"""For the gradient, which is taken once for each of so many windows."""

KINDS: Mapping[str, str] = {"attn": "attention", "cross_attn": "cross-attention", "mixer": "mixer", "mlp": "MLP"}


@dataclass(frozen=True)
class Look:
    """How the capture is looked at."""

    source: Source
    tokens: int
    """For analyses that run the model or its head: about so many tokens, in windows spread over the text."""
    tracks: TokenTracks | None
    progress: bool
    against: Source | None = None
    """Another capture, to compare with."""

    def some(self) -> Source:
        """Return windows of about `tokens` tokens, spread over the text."""
        lengths = window_lengths(self.source)
        return sampled(self.source, max(1, round(self.tokens / max(1.0, float(lengths.mean())))))


def stream_section(look: Look) -> Section:
    """The stream itself, and the size of every write."""
    _demand_second_tokens(look)
    found = contribution_norms(look.source, progress=look.progress)
    stream, rows = look.source.stream, {row["label"]: row for row in found.rows()}
    branches = {s.label: _branch(s, rows[s.label]) for s in stream.sublayers}
    largest = max(branches, key=lambda label: branches[label].amount)
    shares = {s.label: float(rows[s.label]["projection_share"]) for s in stream.sublayers}
    most = max(shares, key=lambda label: abs(shares[label]))
    against = sum(float(rows[label]["cosine"]) < 0 for label in shares)
    answer = (
        f"Relative to what it reads, {largest} writes most: {branches[largest].amount:.2g} times the length of the "
        f"state (median). {most} makes up {_percent(shares[most])} of the last state. On average, {against} of "
        f"{len(shares)} writes point against what they read."
    )
    sizes = figure(found.plot(), "Relative writes", "Median of |w| / |x| over tokens, and the middle half of them.")
    parts = figure(
        found.plot_shares(),
        "Shares of the last state",
        "What each contribution is of the last state: its inner product with it, carried through all later norms.",
    )
    return Section(
        "stream",
        "The stream",
        "What does each sublayer write into the residual stream?",
        answer,
        figures=(sizes, parts),
        tables=(table(found, "Contribution norms", "norms.csv"),),
        stream=draw_stream(look.source.anatomy, stream, branches),
        legend=tuple((k, name) for k, name in KINDS.items() if any(s.kind == k for s in stream.sublayers)),
        notes=("Position 0 is left out: many models keep a vector of enormous norm there.",),
    )


def _demand_second_tokens(look: Look) -> None:
    if int(window_lengths(look.source).max()) < 2:
        raise MissingDataError("each window holds one token, and the first of a window is left out of all means")


def _branch(sublayer: Sublayer, row: Mapping[str, Any]) -> Branch:
    amount = float(row["relative_write_median"])
    return Branch(
        amount,
        f"{sublayer.label} ({KINDS[sublayer.kind]}, layer {sublayer.layer}): |w| / |x| {amount:.3g} (median), cosine "
        f"with what it read {row['cosine']:.2f}, share of the last state {_percent(row['projection_share'])}",
    )


def lens_section(look: Look) -> Section:
    """What each state predicts."""
    _demand_second_tokens(look)
    some = look.some()
    found = logit_lens(some, progress=look.progress, grid=False)
    nearest, causal = found.head == NEAREST, look.source.causal
    half = int(np.argmax(found.kl.mean < found.kl.mean[0] / 2))
    answer = (
        f"Half of the divergence from the final {'state' if nearest else 'prediction'} is gone at x_{half} "
        f"({found.labels[half]}); the {'nearest' if nearest else 'likeliest'} token is the final one "
        f"from state {found.mean_depth:.1f} on, on average, of {len(found.states) - 1}."
    )
    if not causal:
        answer += " The target is the token itself: this model sees what comes after it, too."
    means = f"Every state through {found.head}; means over tokens, with 95 % intervals. {some.description}."
    tables = [table(found, "Lens", "lens.csv")]
    if look.tracks is not None:
        tables.append(table(look.tracks, "Lens token by token", "tokens.csv"))
    return Section(
        "lens",
        "The lens",
        "Which word embeddings is each state nearest to?"
        if nearest
        else "What would the model say if it stopped at each state?",
        answer,
        grid=None if look.tracks is None else grid_of(look.tracks, causal=causal),
        figures=(figure(found.plot(), "Nearest-token lens" if nearest else "Logit lens", means),),
        tables=tuple(tables),
        notes=(_about_head(found),),
    )


def _about_head(found: LensResult) -> str:
    if found.head == NEAREST:
        return "This model has no head, so probabilities are those of inner products with its word embeddings."
    within = f"within {found.head_error:.0e} of the model's own" if found.head_error else "exactly the model's own"
    return f"The head as it is applied here is {within}."


def ablation_section(look: Look) -> Section:
    """What each layer is needed for."""
    some = look.some()
    found = ablate(some, units="layers", progress=look.progress)
    score = found.scores.headline
    if not np.isfinite(found.scores.mean(score)).all():
        raise MissingDataError(f"no {score} is defined on these tokens")
    ranked = sorted(found.rows(), key=lambda row: float(row[score]))
    worst, least = ranked[-1], ranked[0]
    what, unit = _SCORES[score]
    answer = (
        f"Without {worst['drop']}, {what} most: {worst[score]:.3g}{unit} (95 % interval {worst['low']:.3g} to "
        f"{worst['high']:.3g}). {str(least['drop']).capitalize()} is missed least: {least[score]:.3g}."
    )
    agrees = agreement(found)
    captions = (f"Each layer left out by itself, 95 % intervals. {some.description}.", agrees and f"{agrees}.")
    shown = figure(found.plot(), "Layer drop", " ".join(filter(None, captions)))
    return Section(
        "ablation",
        "Ablation",
        "Which layers does the model need?",
        answer,
        figures=(shown,),
        tables=(table(found, "Layer drop", "ablation.csv"),),
    )


_SCORES = {
    "delta_loss": ("the loss grows", " nats per token"),
    "kl": ("the prediction changes", " nats per token"),
    "pooled_distance": ("the embedding of a text turns", " (1 - cosine)"),
}


def position_section(look: Look) -> Section:
    """How long position lasts."""
    found = positional_persistence(look.source, progress=look.progress)
    shown = figure(
        found.plot(),
        "Positional share",
        "Share of the positional part in the variance of each state, beside what a stream without positions would "
        "show; below, which writes it comes from.",
    )
    return Section(
        "position",
        "Position",
        "How much of each state is position, and who put it there?",
        found.reading[0].upper() + found.reading[1:] + ".",
        figures=(shown,),
        tables=(table(found, "Positional persistence", "position.csv"),),
    )


def gradient_section(look: Look) -> Section:
    """How the gradient comes back."""
    found = gradient_flow(look.source, sequences=SEQUENCES, progress=look.progress)
    skip, first = float(found.flow.skip_share[:, 0].mean()), float(found.flow.relative_norm[0, 0])
    answer = (
        f"On average over depth, and over {counted(found.sequences, 'window')}, {_percent(skip)} of the gradient comes "
        f"back over the skip; at the embedding it is {first:.2g} times as long as at the last state."
    )
    shown = figure(
        found.plot(),
        "Gradient flow",
        f"Split exactly at every step, {counted(found.sequences, 'window')}; the parts add up to within "
        f"{found.closure:.0e}.",
    )
    return Section(
        "gradient",
        "Gradient",
        "What of the gradient comes over the skip, and what through the branch?",
        answer,
        figures=(shown,),
        tables=(table(found, "Gradient flow", "gradient.csv"),),
    )


def comparison_section(look: Look) -> Section:
    """What is other in another capture."""
    if look.against is None:
        raise MissingDataError("it takes another capture to compare with")
    found = compare(look.source, look.against, progress=look.progress)
    first, second = found.names
    clear, count = found.clear()
    answer = f"{clear} of {count} relative writes differ from those of {second} by more than their interval."
    if np.isnan(found.measures.low).all():
        answer = f"How sure the differences from {second} are cannot be said: there is one document or window only."
    if found.loss is not None:
        loss = found.loss
        answer += (
            f" The loss is {loss['first']:.4g} nats per token here and {loss['second']:.4g} there: a difference of "
            f"{loss['difference']:.3g} "
        )
        known = loss["low"] <= loss["high"]
        answer += f"(95 % interval {loss['low']:.3g} to {loss['high']:.3g})." if known else "(no interval)."
    over = f"{found.certainty[0].upper()}{found.certainty[1:]}."
    figures = [
        figure(found.plot_both(), "Relative writes of both", f"Means over tokens. Full: {first}. Dashed: {second}."),
        figure(found.plot(), "Difference of relative writes", f"{second} less {first}. {over}"),
    ]
    tables = [table(found, "Comparison", "comparison.csv")]
    if found.similarity is not None:
        tables.append(table(found.similarity, "Likeness of states", "similarity.csv"))
        what = "Debiased linear CKA: 1 for states that are equal up to rotation, shift and scale."
        figures.append(figure(found.similarity.plot(), "Likeness of states", what))
    if found.moved is not None:
        tables.append(table(found.moved, "Distance of vectors", "distance.csv"))
        what = "Cosine of each state and write with the other model's: it means something where both share coordinates."
        figures.append(figure(found.moved.plot(), "Distance of vectors", what))
    return Section(
        "comparison",
        "Comparison",
        f"What is other in {second}?",
        answer,
        figures=tuple(figures),
        tables=tuple(tables),
        notes=tuple(says[0].upper() + says[1:] + "." for says in found.says),
    )


SECTIONS: Mapping[str, Callable[[Look], Section]] = {
    "stream": stream_section,
    "lens": lens_section,
    "ablation": ablation_section,
    "position": position_section,
    "gradient": gradient_section,
    "comparison": comparison_section,
}
"""By name, in the order of the page; the comparison is there where something is compared with."""


def grid_of(tracks: TokenTracks, *, causal: bool) -> Grid:
    """Return the likeliest tokens as a table, the last state first."""
    rows = [
        {
            "name": f"{k} {label}",
            "state": k,
            "cells": [
                {"word": shown(tracks.word(token), 11), "hit": bool(token == target)}
                for token, target in zip(tracks.top[k, :, 0], tracks.targets, strict=True)
            ],
        }
        for k, label in reversed(list(enumerate(tracks.labels)))
    ]
    heads = tuple(shown(tracks.word(token), 11) or str(p) for token, p in zip(tracks.ids, tracks.position, strict=True))
    metrics = (
        ("kl", "KL to the final"),
        ("entropy", "entropy"),
        ("rank", "rank of what came" if causal else "rank of the token itself"),
        ("probability", "probability"),
    )
    target = "the token that came" if causal else "the token itself"
    return Grid(metrics, heads, tuple(rows), tracks.head, target)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
