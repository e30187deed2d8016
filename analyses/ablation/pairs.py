"""Two at a time: whether one stands in for the other, or needs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from streamlens.analyses.ablation.runs import Runs
from streamlens.analyses.ablation.scores import Scores
from streamlens.analyses.ablation.spans import Drop, Mode, every, extent, together
from streamlens.analyses.ablation.sweep import check_mode, setting_for
from streamlens.analyses.ablation.trials import Play, Score, measured
from streamlens.analyses.result import Result
from streamlens.analyses.source import Corpus, Origin, source_of
from streamlens.analyses.statistics import Floats
from streamlens.anatomy import Stream
from streamlens.checkpoint.model import Model
from streamlens.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class PairsResult(Result):
    """The interaction ``I_ij = D_ij - D_i - D_j`` of two drops.

    Positive where either of the two suffices (backups), negative where one of them already breaks the other (a series).
    """

    units: tuple[Drop, ...]
    """(unit,) what is dropped."""
    pairs: tuple[tuple[int, int], ...]
    """(pair,) indices of units."""
    scores: Scores
    """(trial,): the units first, then the pairs."""
    title: str = ""

    @property
    def alone(self) -> Floats:
        """(unit,) the score of each unit by itself."""
        return self.scores.mean(self.scores.headline)[: len(self.units)]

    @property
    def interaction(self) -> Floats:
        """(unit, unit) I_ij, symmetric; NaN on the diagonal."""
        mean = self.scores.mean(self.scores.headline)
        found = np.full((len(self.units), len(self.units)), np.nan)
        for (i, j), both in zip(self.pairs, mean[len(self.units) :], strict=True):
            found[i, j] = found[j, i] = both - mean[i] - mean[j]
        return found

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each pair, the strongest interaction first; low and high are its 95 % interval."""
        head, count = self.scores.headline, len(self.units)
        sums, mean = self.scores.columns(head)[0], self.scores.mean(head)
        table = []
        for index, (i, j) in enumerate(self.pairs):
            found = self.scores.interval_of(head, sums[count + index] - sums[i] - sums[j])
            table.append(
                {
                    "first": self.units[i].label,
                    "second": self.units[j].label,
                    "mode": self.units[i].mode,
                    "interaction": found.mean,
                    "low": found.low,
                    "high": found.high,
                    head: float(mean[count + index]),
                    f"{head}_first": float(mean[i]),
                    f"{head}_second": float(mean[j]),
                }
            )
        return sorted(table, key=lambda row: -abs(row["interaction"]))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the interaction of every two units."""
        from streamlens.analyses.ablation.drawing import draw_pairs

        return draw_pairs(self, ax)


def ablate_pairs(
    origin: Origin,
    mode: Mode = "skip",
    *,
    units: str = "layers",
    protect_first: bool = False,
    draw_seed: int = 0,
    stream: str | None = None,
    model: Model | None = None,
    progress: bool = True,
    **corpus: Unpack[Corpus],
) -> PairsResult:
    """Leave out every two layers and compare with each of them by itself.

    The state that a run reaches after its first drop is carried on for all its partners, so a pair costs what lies
    behind its second layer, not its first.

    Args:
        origin: a capture, a model, or a source.
        mode: as in `ablate`.
        units: ``layers`` or ``sublayers``.
        protect_first: leave position 0 as it is.
        draw_seed: of the pairing of documents in mode resample.
        stream: which stream; by default the one that the head reads.
        model: for a capture: its model, where it is loaded already.
        progress: show a progress bar.
        **corpus: for a live model: what it is shown, as in `streamlens.capture`.

    Raises:
        UsageError: other units.
        MissingDataError: the capture lacks what a run begins with.

    Example:
        >>> import torch
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        >>> encoder = torch.nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
        >>> ablate_pairs(encoder, inputs=torch.randn(4, 5, 8), progress=False).interaction.shape
        (3, 3)
    """
    source = source_of(origin, stream=stream, model=model, **corpus)
    check_mode(mode)
    if units not in ("layers", "sublayers"):
        raise UsageError(f"units of pairs are layers or sublayers, not {units!r}")
    single = every(source.stream, units, mode)
    pairs = tuple((i, j) for i in range(len(single)) for j in range(i + 1, len(single)))
    setting = setting_for(source, mode, protect_first=protect_first, seed=draw_seed, progress=progress)
    scores = measured(
        source,
        setting,
        len(single) + len(pairs),
        "ablate pairs",
        play=_in_turn(source.stream, single, pairs),
        progress=progress,
    )
    title = f"Pairs of {units} left out ({mode}): {source.description}"
    return PairsResult(tuple(single), pairs, scores, title)


def _in_turn(stream: Stream, units: Sequence[Drop], pairs: Sequence[tuple[int, int]]) -> Play:
    """Drop each unit and carry the state behind it on to the next partner."""
    place = {pair: len(units) + index for index, pair in enumerate(pairs)}

    def play(runs: Runs, score: Score) -> None:
        for i, first in enumerate(units):
            at, state, changes = runs.after(first)
            score(i, runs.finish(at, state, changes))
            for j in range(i + 1, len(units)):
                second = units[j]
                start = extent(stream, second)[0]
                if start < at or changes:  # two parallel writes: nothing lies between them
                    score(place[i, j], runs.without(together([first, second])))
                    continue
                state = runs.between(at, state, start)
                at = start
                score(place[i, j], runs.without(second, at, state))

    return play
