"""Contiguous blocks of layers: where a model can be cut, and how much of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from streamlens.analyses.ablation.proxies import Proxies
from streamlens.analyses.ablation.runs import Dropped
from streamlens.analyses.ablation.scores import Scores
from streamlens.analyses.ablation.spans import Drop, Mode, together, whole_layer
from streamlens.analyses.ablation.study import Options, Study, in_mode
from streamlens.analyses.ablation.sweep import score_rows
from streamlens.analyses.result import Result
from streamlens.analyses.source import Origin
from streamlens.analyses.statistics import Floats
from streamlens.anatomy import Stream
from streamlens.errors import UsageError
from streamlens.rest import resting

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class BlocksResult(Result):
    """What the model loses without layers start ... start + length - 1."""

    drops: tuple[Drop, ...]
    """(drop,) the blocks, by length and then by start."""
    scores: Scores
    proxies: Mapping[str, Floats]
    """(drop,) block_influence, relative_write and angular_distance over the whole block."""
    layers: int
    """How many the stream has."""
    title: str = ""
    other: BlocksResult | None = None
    """The same in the other mode, where skip and zero differ."""

    @property
    def mode(self) -> Mode:
        """How the blocks were left out."""
        return self.drops[0].mode

    @property
    def grid(self) -> Floats:
        """(length, start) the score; NaN where the block would reach beyond the last layer. Row 0 is length 1."""
        mean = self.scores.mean(self.scores.headline)
        grid = np.full((max(len(d.layers) for d in self.drops), self.layers), np.nan)
        for drop, value in zip(self.drops, mean, strict=True):
            grid[len(drop.layers) - 1, drop.layers[0]] = value
        return grid

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each block and mode; columns as in `AblationResult.rows`."""
        table = []
        for index, (row, drop) in enumerate(zip(score_rows(self.scores), self.drops, strict=True)):
            named = {"drop": drop.label, "start": drop.layers[0], "length": len(drop.layers), "mode": drop.mode}
            table.append(named | row | {name: float(values[index]) for name, values in self.proxies.items()})
        return table + (self.other.rows() if self.other else [])

    def best(self) -> list[dict[str, Any]]:
        """Return for each length the block that costs least, and the one that the angular distance would choose."""
        mean, angle = self.scores.mean(self.scores.headline), self.proxies["angular_distance"]
        found = []
        for length in dict.fromkeys(len(d.layers) for d in self.drops):
            rows = [i for i, d in enumerate(self.drops) if len(d.layers) == length]
            best, chosen = min(rows, key=lambda i: mean[i]), min(rows, key=lambda i: angle[i])
            found.append(
                {
                    "length": length,
                    "mode": self.mode,
                    "start": self.drops[best].layers[0],
                    self.scores.headline: float(mean[best]),
                    "start_by_angle": self.drops[chosen].layers[0],
                    f"{self.scores.headline}_by_angle": float(mean[chosen]),
                }
            )
        return found + (self.other.best() if self.other else [])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the score by start and length."""
        from streamlens.analyses.ablation.drawing import draw_blocks

        return draw_blocks(self, ax)


@resting
def ablate_blocks(
    origin: Origin,
    lengths: Sequence[int] | None = None,
    mode: Mode = "skip",
    **options: Unpack[Options],
) -> BlocksResult:
    """Leave out every contiguous block of layers.

    Gromov et al. (2403.17887) choose the block whose ends point in the most similar directions at the last token;
    `BlocksResult.best` holds that choice against the block that costs least.

    Args:
        origin: a capture, a model, or a source.
        lengths: how many layers; by default 1 to all but one.
        mode: as in `ablate`.
        **options: protect_first (leave position 0, the attention sink, as it is), draw_seed, stream, model, progress;
            for a live model also what it is shown, as in `streamlens.capture`. See `Options`.

    Raises:
        UsageError: a length that is not there.
        MissingDataError: the capture lacks what a run begins with.

    Example:
        >>> import torch
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        >>> encoder = torch.nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
        >>> ablate_blocks(encoder, inputs=torch.randn(4, 5, 8), progress=False).grid.shape
        (2, 3)
    """
    study = Study.of(origin, mode, **options)
    drops = _blocks(study.source.stream, lengths, mode)
    modes, proxies = study.modes(drops), Proxies(study.source.stream, drops)
    trials = [Dropped(d) for each in modes for d in in_mode(drops, each)]
    scores = study.measured(trials, "ablate blocks", also=proxies.update)
    title, found = study.title("Contiguous blocks left out", scores, modes), None
    for number, each in reversed(list(enumerate(modes))):
        own = scores.taken(range(number * len(drops), (number + 1) * len(drops)))
        layers = study.source.stream.layers
        found = BlocksResult(tuple(in_mode(drops, each)), own, proxies.result(), layers, title, other=found)
    assert found is not None, "there is always the mode that was asked for"
    return found


def _blocks(stream: Stream, lengths: Sequence[int] | None, mode: Mode) -> list[Drop]:
    count = stream.layers
    chosen = list(range(1, max(count, 2))) if lengths is None else sorted(set(lengths))
    for length in chosen:
        if not 1 <= length <= count:
            raise UsageError(f"stream {stream.name!r} has {count} layers: a block has 1 to {count}, not {length}")
    return [
        together([whole_layer(stream, layer, mode) for layer in range(start, start + length)])
        for length in chosen
        for start in range(count - length + 1)
    ]
