"""Runs in which a skip is damaged, and what is kept of them: sums for the positional part, features for probes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamlens.analyses.ablation.runs import Runs, Setting
from streamlens.analyses.ablation.trials import Score
from streamlens.analyses.position.sample import Sample
from streamlens.analyses.position.sums import Folds, PositionSums, Rectangle, doubled
from streamlens.analyses.source import Source
from streamlens.analyses.statistics import Floats
from streamlens.analyses.transport import Factors, factors_of, times
from streamlens.anatomy import Stream
from streamlens.block import Block
from streamlens.observation import Observer, observing, tokens

Mode = Literal["scale", "position", "random"]
Features = NDArray[np.float32]


@dataclass(frozen=True)
class Lesion:
    """One damage to one skip."""

    mode: Mode
    step: int
    """Index of the state that the skip carries."""
    label: str
    """The sublayer that the skip goes round."""
    alpha: float = float("nan")
    mean: Tensor | None = None
    """(d_model,) of the state."""
    basis: Tensor | None = None
    """(d_model, dimension) orthonormal: what is removed."""
    factor: float = 1.0
    """On what is removed; above 1 where no control of this dimension holds enough energy."""

    def removed(self, state: Tensor) -> Tensor:
        """Return what the skip loses, in the shape and dtype of the state (doc, position, d_model)."""
        if self.mode == "scale":
            return (1.0 - self.alpha) * state
        assert self.mean is not None, "a selective lesion has a subspace"
        assert self.basis is not None, "a selective lesion has a subspace"
        basis = self.basis.to(doubled(state[:0]).device)
        around = doubled(state) - self.mean.to(basis.device)
        lost = around @ basis @ basis.T * self.factor
        return lost.to(state.device, state.dtype)


@dataclass
class Tokens:
    """The tokens that the probes see, and the states there that are carried by the skips in question."""

    steps: Sequence[int]
    labels: Sample
    rows: dict[int, Tensor] = field(default_factory=dict)
    """By the first token of the block."""
    states: dict[int, list[Tensor]] = field(default_factory=dict)
    """By step: (sample, d_model) of each block."""

    def tapped(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """Hand blocks on and keep the sample."""
        for block in blocks:
            rows = self.labels.rows(block)
            self.rows[block.start] = rows
            for step in self.steps:
                state = block.states[step]
                self.states.setdefault(step, []).append(doubled(state[rows.to(state.device)]))
            yield block


class _Watcher(Observer):
    """Feeds the states of one run, from some state on, to sums and to the probes' sample."""

    def __init__(self, name: str, after: int, shape: tuple[int, int], receive: Callable[[int, Tensor], None]) -> None:
        self._name, self._after, self._shape, self._receive = name, after, shape, receive

    def state(self, stream: Stream, index: int, tensor: Tensor) -> None:
        if stream.name == self._name and index > self._after:
            self._receive(index, tokens(tensor, stream, *self._shape).flatten(0, 1))


@dataclass
class Theatre:
    """Runs all lesions on each block."""

    source: Source
    setting: Setting
    lesions: Sequence[Lesion]
    base: PositionSums
    sample: Tokens
    features: dict[tuple[int, int], list[Features]] = field(default_factory=dict)
    """By lesion (-1: none) and state."""
    energy: Floats = field(init=False)
    """(lesion, 2) sum of the squared norms of what was removed, and number of tokens."""
    sums: list[PositionSums] = field(init=False)
    factors: Factors = field(init=False)
    rounding: Floats = field(init=False)
    """(lesion,) largest relative error of the damaged sum from rounding, in a model below 32 bits; else 0."""

    def __post_init__(self) -> None:
        stream, last = self.source.stream, len(self.source.stream.steps)
        shape = {"first": self.base.first, "origins": False, "bands": False}
        self.sums = [
            PositionSums(stream, self.base.positions, states=range(x.step + 1, last + 1), **shape)  # type: ignore[arg-type]
            for x in self.lesions
        ]
        self.factors = factors_of(stream, self.source.parameters)
        self.last = last
        self.folds = Folds.of(self.source)
        self.rounding = np.zeros(len(self.lesions))
        self.energy = np.zeros((len(self.lesions), 2))

    def prepare(self, block: Block) -> None:
        """Take what is needed of the unchanged states."""
        self._rectangle = Rectangle.of(block, self.base.positions)
        self._fold = self.folds.within(block, self._rectangle)
        self._rows = self.sample.rows[block.start]
        for k in {x.step + 1 for x in self.lesions} | {self.last}:
            self._keep(-1, k, block.states[k])

    def play(self, runs: Runs, score: Score) -> None:
        """Run all lesions on the block."""
        for number, lesion in enumerate(self.lesions):
            state = runs.state(lesion.step)
            removed = self._removed(number, lesion, state)
            stream = self.source.stream
            first = stream.steps[lesion.step].sublayers[0]
            change = self._change(
                number, *(x.transpose(0, 1) if stream.position_first else x for x in (removed, state))
            )

            def receive(index: int, flat: Tensor, number: int = number) -> None:
                self.sums[number].add_state(index, self._rectangle.take(flat), self._fold)
                self._keep(number, index, flat)

            watcher = _Watcher(stream.name, lesion.step, runs.shape, receive)
            with observing(self.setting.module, self.setting.anatomy, watcher):
                output = runs.finish(lesion.step, state, {first: change})
            self.sums[number].count(self._fold)
            score(number, output)

    def _change(self, number: int, removed: Tensor, state: Tensor) -> Callable[[Tensor], Tensor]:
        """The edit of a write that takes from the sum what the skip shall lose: the model adds the whole skip to it."""

        def change(write: Tensor) -> Tensor:
            own = removed.reshape(write.shape)
            changed = write - own
            if write.dtype.itemsize < 4:
                exact = write.float() - own.float()
                whole = exact + state.reshape(write.shape).float()
                error = float((changed.float() - exact).norm() / whole.norm())
                self.rounding[number] = max(self.rounding[number], error)
            return changed

        return change

    def _removed(self, number: int, lesion: Lesion, state: Tensor) -> Tensor:
        removed = lesion.removed(state)
        if self.setting.protect_first:
            removed = torch.cat([torch.zeros_like(removed[:, :1]), removed[:, 1:]], dim=1)
        counted = doubled(removed[:, self.base.first :])
        self.energy[number] += np.array([float(counted.square().sum()), counted.numel() / counted.shape[-1]])
        first = self.source.stream.steps[lesion.step].sublayers[0]
        # It is taken from a write, which may have a factor of its own.
        return times(times(removed, self.factors.skips[lesion.step]), 1.0 / self.factors.writes[first])

    def _keep(self, number: int, index: int, flat: Tensor) -> None:
        wanted = index == self.last or number < 0 or index == self.lesions[number].step + 1
        if wanted and len(self._rows):
            rows = flat[self._rows.to(flat.device)].float().cpu().numpy()
            self.features.setdefault((number, index), []).append(rows)
