"""What every study begins with: the source, what its runs need, and the modes that are reported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Unpack

from torch import nn

from streamlens.analyses.ablation.runs import Setting, Trial
from streamlens.analyses.ablation.scores import Scores
from streamlens.analyses.ablation.spans import MODES, Drop, Mode, in_modes
from streamlens.analyses.ablation.trials import Play, mean_writes, measured
from streamlens.analyses.source import Corpus, Origin, Source, source_of
from streamlens.block import Block
from streamlens.checkpoint.model import Model
from streamlens.errors import UsageError


class Options(Corpus, total=False):
    """What all studies of drops take, besides what a live model is shown."""

    protect_first: bool
    """Leave position 0 as it is, so that what is measured is not the loss of the attention sink. [False]"""
    draw_seed: int
    """Of the pairing of windows in mode resample, and of random orders. [0]"""
    stream: str | None
    """Which stream; by default the one that the head reads."""
    model: Model | nn.Module | None
    """For a capture: its model, where it is loaded already."""
    progress: bool
    """Show a progress bar. [True]"""


@dataclass(frozen=True)
class Study:
    """A source and what runs on it need."""

    source: Source
    setting: Setting
    mode: Mode
    progress: bool

    @classmethod
    def of(
        cls,
        origin: Origin,
        mode: Mode = "skip",
        *,
        per_position: bool = False,
        protect_first: bool = False,
        draw_seed: int = 0,
        stream: str | None = None,
        model: Model | nn.Module | None = None,
        progress: bool = True,
        **corpus: Unpack[Corpus],
    ) -> Study:
        """Open the source and load its model; mode mean looks at all writes first. Arguments as in `ablate`.

        Raises:
            UsageError: a mode that does not exist.
            MissingDataError: the model of a capture is not there, or the capture does not hold all writes.
        """
        if mode not in MODES:
            raise UsageError(f"no mode {mode!r}; there are {', '.join(MODES)}")
        source = source_of(origin, stream=stream, model=model, **corpus)
        means = mean_writes(source, per_position=per_position, progress=progress) if mode == "mean" else None
        setting = Setting.of(
            source, protect_first=protect_first, means=means, seed=draw_seed, needs_spare=mode == "resample"
        )
        return cls(source, setting, mode, progress)

    def measured(
        self,
        trials: Sequence[Trial] | int,
        label: str,
        *,
        play: Play | None = None,
        also: Callable[[Block], None] | None = None,
    ) -> Scores:
        """Run trials over the whole source; see `trials.measured`."""
        return measured(self.source, self.setting, trials, label, play=play, also=also, progress=self.progress)

    def modes(self, drops: Sequence[Drop]) -> tuple[Mode, ...]:
        """Return the mode that was asked for, and the other of skip and zero where these drops differ in them."""
        found = in_modes(self.source.stream, drops, self.setting.parameters)
        return tuple(dict.fromkeys(d.mode for d in found))

    def title(self, what: str, scores: Scores, modes: Sequence[Mode] = ()) -> str:
        """Return the title of a result: what was done, in which modes, to which model and text, and what is sure."""
        said = " and ".join(modes) + (", position 0 left alone" if self.setting.protect_first else "")
        how = f" ({said.removeprefix(', ')})" if said else ""
        return f"{what}{how}: {self.source.description}; 95 % intervals over {scores.over}"


def in_mode(drops: Sequence[Drop], mode: Mode) -> list[Drop]:
    """Return the same drops in another mode."""
    return [replace(drop, mode=mode) for drop in drops]


def check_units(units: str, of: str, *there: str) -> None:
    """Refuse units that there are not.

    Raises:
        UsageError: they are none of these.
    """
    if units not in there:
        raise UsageError(f"units of {of} are {', '.join(there[:-1])} or {there[-1]}, not {units!r}")
