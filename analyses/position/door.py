"""Positional persistence: how much of each state is position, and who carries it.

Every state h of document c at position t is split as h = mean + position_t + context_c + rest (a two-way analysis of
variance; Song & Zhong 2023, arXiv:2310.04861). The positional part is linear in the state, so it is the sum of the
positional parts of the terms of the state: what the embedding brought and the skip carried, and what each sublayer
wrote. Whether position survives on the skip or is written anew is read off that sum.
"""

from __future__ import annotations

from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from streamlens.analyses.position.answer import PositionResult
from streamlens.analyses.position.energies import (
    jackknife,
    null_band,
    origin_shares,
    positional,
    relative_norm,
    split,
    without_each_fold,
)
from streamlens.analyses.position.geometry import debiased_cka, stable_rank, subspace_overlap, top_span
from streamlens.analyses.position.sums import PositionSums, sums_of
from streamlens.analyses.source import Corpus, Origin, source_of, watched
from streamlens.analyses.statistics import Floats
from streamlens.checkpoint.model import Model
from streamlens.errors import UsageError
from streamlens.rest import resting

SPAN = 16
"""Dimensions of the subspaces that are compared."""


@resting
def positional_persistence(
    origin: Origin,
    *,
    stream: str | None = None,
    model: Model | nn.Module | None = None,
    positions: int | None = None,
    include_first: bool = False,
    progress: bool = True,
    **corpus: Unpack[Corpus],
) -> PositionResult:
    """Measure how much of each state is position, and which term of the state it comes from.

    Memory is one table (position, d_model) for each state and each term, whatever the number of tokens; where the
    stream passes norms, terms change at each of them and have a table for each state. Each of the latter two is kept
    twice: for all documents, and for half of them.

    Args:
        origin: a capture or its path, a model or its file, or a source.
        stream: which stream; by default the one that the head reads.
        model: for a capture: its model, where it is loaded already (not needed here).
        positions: how many positions of each document, from 0; by default so many as half of them
            have, at most 128; shorter documents are left out.
        include_first: whether position 0 counts in the headline numbers.
        progress: whether to show a progress bar.
        **corpus: for a live model: what it is shown, as in `streamlens.capture`.

    Raises:
        MissingDataError: too few documents, none that is long enough, or a capture without all positions and writes.
        UsageError: fewer than two positions that count.

    Example:
        >>> from fixtures import zoo
        >>> ids = torch.randint(0, 50, (16, 9), generator=torch.Generator().manual_seed(0))
        >>> found = positional_persistence(zoo.build("gpt2").module, tokens=ids, progress=False)
        >>> found.position_embedding, found.states[:2], bool((found.position_share > found.null_high).all())
        ('pos_embed', ('x_0', '0_attn_out'), True)
        >>> np.allclose(np.nansum(found.origin, axis=1), 1)
        True
    """
    least = 2 if include_first else 3
    if positions is not None and positions < least:
        raise UsageError(f"{positions} positions are too few to compare: ask for at least {least}")
    source = source_of(origin, stream=stream, model=model, **corpus)
    blocks = watched(source, "position", progress=progress)
    return result_of(sums_of(source, blocks, positions=positions, include_first=include_first), source.description)


def result_of(sums: PositionSums, description: str) -> PositionResult:
    """Work out the result from the sums over documents."""
    splits = {k: split(sums, k) for k in sums.states}
    parts = {k: own.parts for k, own in splits.items()}
    embedding = sums.position_parts()
    reference = _reference(sums, embedding, parts[0])
    bands = [null_band(sums, k, splits[k]) for k in sums.states]
    above = [splits[k].share > bands[k][1] for k in sums.states]
    if not embedding and not above[0]:
        reference = torch.zeros_like(reference)
    span = top_span(reference, SPAN)
    ends = [jackknife(splits[k].share, without_each_fold(sums, k)[0], sums) for k in sums.states]
    nothing = np.full(len(sums.term_names), np.nan)

    def each(measure: Any) -> Floats:
        return np.array([measure(k) for k in sums.states], np.float64)

    return PositionResult(
        title=f"Positional persistence: {description}, {sums.docs:,} x {sums.positions - sums.first:,} positions",
        states=sums.stream.state_labels,
        terms=tuple(label for label, _ in sums.term_names),
        kinds=tuple(kind for _, kind in sums.term_names),
        documents=sums.docs,
        documents_left_out=sums.left_out,
        positions=sums.positions - sums.first,
        include_first=sums.first == 0,
        position_embedding=" + ".join(sums.stream.parts[i].label for i in embedding) or None,
        position_share=each(lambda k: splits[k].share),
        low=np.array([low for low, _ in ends]),
        high=np.array([high for _, high in ends]),
        null_low=np.array([low for low, _ in bands]),
        null_high=np.array([high for _, high in bands]),
        position_share_all=each(lambda k: split(sums, k, 0).share),
        position_share_raw=each(lambda k: splits[k].raw_share),
        context_share=each(lambda k: splits[k].context / splits[k].total if splits[k].total else np.nan),
        f_ratio=each(lambda k: splits[k].f_ratio),
        relative_norm=each(lambda k: relative_norm(sums, k, splits[k])),
        stable_rank=each(lambda k: stable_rank(parts[k])),
        retention=each(lambda k: _along(parts[k], reference)),
        subspace_overlap=each(lambda k: subspace_overlap(top_span(parts[k], SPAN), span)),
        overlap_chance=span.shape[1] / span.shape[0] if span.shape[1] else float("nan"),
        cka=each(lambda k: debiased_cka(parts[k], reference)),
        origin=np.stack([origin_shares(sums, k) if above[k] else nothing for k in sums.states]),
        position_vectors=np.stack([parts[k].float().cpu().numpy() for k in sums.states]),
    )


def _reference(sums: PositionSums, embedding: list[int], first: Tensor) -> Tensor:
    tables = [tables[0] for i in embedding if (tables := sums.term(0, i)) is not None]
    return torch.stack([positional(t, sums.docs, sums.first) for t in tables]).sum(0) if tables else first


def _along(part: Tensor, reference: Tensor) -> float:
    energy = reference.square().sum()
    return float((part * reference).sum() / energy) if energy > 0 else float("nan")
