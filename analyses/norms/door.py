"""`contribution_norms`: the door."""

from __future__ import annotations

from typing import Unpack

from torch import nn

from streamlens.analyses.heads import projections
from streamlens.analyses.norms.accumulate import ContributionNorms
from streamlens.analyses.norms.answer import NormsResult
from streamlens.analyses.source import Corpus, Origin, source_of, watched
from streamlens.analyses.unembedding import Unembedding
from streamlens.checkpoint.model import Model
from streamlens.rest import resting


@resting
def contribution_norms(
    origin: Origin,
    *,
    stream: str | None = None,
    model: Model | nn.Module | None = None,
    heads: bool = False,
    logits: bool = False,
    sample: int = 512,
    progress: bool = True,
    **corpus: Unpack[Corpus],
) -> NormsResult:
    """Measure what every sublayer adds to the stream, see `MEASURES`.

    Args:
        origin: a capture or a model, see `source_of`.
        stream: which stream; by default the one that the head reads.
        model: for a capture: its model, where it is at hand. It is only needed for `heads` and `logits`.
        heads: also every attention head by itself; a capture needs its value mixes (``--heads``).
        logits: also attribute the target's logit directly to every contribution.
        sample: so many first tokens, less the first of each window, over which the cosines between writes and the
            outlier dimensions are taken.
        progress: show a progress bar.
        **corpus: what a live model is shown.

    Returns:
        One row for each embedding part, sublayer, head, bias of a norm on the stream and layer; `NormsResult.states`
        has the size of the states, `NormsResult.cosines` the cosines of every two writes.

    Raises:
        MissingDataError: a narrowed capture, which lacks some of the writes; heads or logits that cannot be told apart.

    Example:
        >>> import torch
        >>> from streamlens.analyses.norms.measures import OVERLAPPING
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> module = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        >>> found = contribution_norms(module, inputs=torch.randn(4, 5, 8), progress=False)
        >>> rows = [i for i, c in enumerate(found.contributions) if c.kind not in OVERLAPPING]
        >>> round(float(found.column("projection_share")[rows].sum()), 6)
        1.0
    """
    source = source_of(origin, stream=stream, model=model, heads=heads, **corpus)
    folded = ContributionNorms(
        source,
        sample=sample,
        projections=projections(source) if heads else None,
        unembedding=Unembedding(source) if logits else None,
    )
    for block in watched(source, "norms", progress=progress):
        folded.update(block)
    return folded.result()
