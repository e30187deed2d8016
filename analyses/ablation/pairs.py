"""Two at a time: whether one stands in for the other, or needs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from streamlens.analyses.ablation.runs import Runs
from streamlens.analyses.ablation.scores import Scores
from streamlens.analyses.ablation.spans import Drop, Mode, every, extent, together
from streamlens.analyses.ablation.study import Options, Study, check_units, in_mode
from streamlens.analyses.ablation.trials import Play, Score
from streamlens.analyses.result import Result
from streamlens.analyses.source import Origin
from streamlens.analyses.statistics import Floats
from streamlens.anatomy import Stream
from streamlens.rest import resting

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
    other: PairsResult | None = None
    """The same in the other mode, where skip and zero differ."""

    @property
    def mode(self) -> Mode:
        """How the units were left out."""
        return self.units[0].mode

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
        """Return one row for each pair and mode, the strongest interaction first; low and high are its 95 % interval.

        It is over the documents or windows that ``interval_over`` names.
        """
        head, count = self.scores.headline, len(self.units)
        mean, first, second = self.scores.mean(head), *np.array(self.pairs, np.int64).reshape(-1, 2).T
        # The three runs are drawn alike, so the interval is that of the paired difference.
        low, high = self.scores.intervals_of(head, lambda sums: sums[count:] - sums[first] - sums[second])
        table: list[dict[str, Any]] = [
            {
                "first": self.units[i].label,
                "second": self.units[j].label,
                "mode": self.mode,
                "interaction": float(mean[count + index] - mean[i] - mean[j]),
                "low": float(low[index]),
                "high": float(high[index]),
                "interval_over": self.scores.unit,
                head: float(mean[count + index]),
                f"{head}_first": float(mean[i]),
                f"{head}_second": float(mean[j]),
            }
            for index, (i, j) in enumerate(self.pairs)
        ]
        table.sort(key=lambda row: -abs(row["interaction"]))
        return table + (self.other.rows() if self.other else [])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the interaction of every two units."""
        from streamlens.analyses.ablation.drawing import draw_pairs

        return draw_pairs(self, ax)


@resting
def ablate_pairs(
    origin: Origin,
    mode: Mode = "skip",
    *,
    units: str = "layers",
    **options: Unpack[Options],
) -> PairsResult:
    """Leave out every two layers and compare with each of them by itself.

    The state that a run reaches after its first drop is carried on for all its partners, so a pair costs what lies
    behind its second layer, not its first.

    Args:
        origin: a capture, a model, or a source.
        mode: as in `ablate`.
        units: ``layers`` or ``sublayers``.
        **options: protect_first (leave position 0, the attention sink, as it is), draw_seed, stream, model, progress;
            for a live model also what it is shown, as in `streamlens.capture`. See `Options`.

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
    check_units(units, "pairs", "layers", "sublayers")
    study = Study.of(origin, mode, **options)
    single = every(study.source.stream, units, mode)
    pairs = tuple((i, j) for i in range(len(single)) for j in range(i + 1, len(single)))
    modes, size = study.modes(single), len(single) + len(pairs)
    turns = [_in_turn(study.source.stream, in_mode(single, each), pairs) for each in modes]
    scores = study.measured(size * len(modes), "ablate pairs", play=_one_after_the_other(turns, size))
    title, found = study.title(f"Pairs of {units} left out", scores, modes), None
    for number, each in reversed(list(enumerate(modes))):
        own = scores.taken(range(number * size, (number + 1) * size))
        found = PairsResult(tuple(in_mode(single, each)), pairs, own, title, other=found)
    assert found is not None, "there is always the mode that was asked for"
    return found


def _one_after_the_other(plays: Sequence[Play], size: int) -> Play:
    """Run several plays of so many trials each, numbered on."""

    def play(runs: Runs, score: Score) -> None:
        for number, one in enumerate(plays):
            one(runs, lambda index, output, number=number: score(number * size + index, output))  # type: ignore[misc]

    return play


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
