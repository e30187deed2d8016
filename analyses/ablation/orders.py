"""Neighbouring layers exchanged: does the order matter, or only the set?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

from torch import nn

from streamlens.analyses.ablation.runs import Ordered
from streamlens.analyses.ablation.scores import Scores
from streamlens.analyses.ablation.study import Study
from streamlens.analyses.ablation.sweep import score_rows
from streamlens.analyses.result import Result
from streamlens.analyses.source import Corpus, Origin
from streamlens.checkpoint.model import Model
from streamlens.errors import UsageError
from streamlens.rest import resting

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class SwapResult(Result):
    """What the model loses when a layer and the next one change places."""

    swaps: tuple[Ordered, ...]
    """(swap,) the order of all layers; swap i exchanges layers i and i + 1."""
    scores: Scores
    title: str = ""

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each swap; columns as in `AblationResult.rows`."""
        return [
            {"swap": swap.label, "layer": layer, **row}
            for layer, (swap, row) in enumerate(zip(self.swaps, score_rows(self.scores), strict=True))
        ]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the score by the first of the two layers."""
        from streamlens.analyses.ablation.drawing import draw_swaps

        return draw_swaps(self, ax)


@resting
def swap_neighbours(
    origin: Origin,
    *,
    stream: str | None = None,
    model: Model | nn.Module | None = None,
    progress: bool = True,
    **corpus: Unpack[Corpus],
) -> SwapResult:
    """Exchange each layer with the next one (Lad et al. 2406.19384).

    Args:
        origin: a capture, a model, or a source.
        stream: which stream; by default the one that the head reads.
        model: for a capture: its model, where it is loaded already.
        progress: show a progress bar.
        **corpus: for a live model: what it is shown, as in `streamlens.capture`.

    Raises:
        UsageError: there is only one layer.
        MissingDataError: the capture lacks what a run begins with.

    Example:
        >>> import torch
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        >>> encoder = torch.nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
        >>> found = swap_neighbours(encoder, inputs=torch.randn(4, 5, 8), progress=False)
        >>> [row["swap"] for row in found.rows()]
        ['layers 0 and 1', 'layers 1 and 2']
    """
    study = Study.of(origin, stream=stream, model=model, progress=progress, **corpus)
    name, count = study.source.stream.name, study.source.stream.layers
    if count < 2:
        raise UsageError(f"stream {name!r} has one layer: there are no neighbours to exchange")
    swaps = [Ordered(f"layers {i} and {i + 1}", (*range(i), i + 1, i, *range(i + 2, count))) for i in range(count - 1)]
    scores = study.measured(swaps, "swap neighbours")
    return SwapResult(tuple(swaps), scores, study.title("Neighbouring layers exchanged", scores))
