"""What dropping a sublayer does to the logit of the right token, and what the others do about it.

With the norms' statistics held as they were, the change of the logit splits exactly (McGrath et al. 2307.15771; the
share of the norm: Rushing and Nanda 2402.15390):

    logit - logit' = direct + indirect + norm

``direct`` is what the write itself gave, along the frozen norms to the end; ``indirect`` what all later sublayers write
less without it (negative where they make up for it: self-repair); ``norm`` what changes because the norms' statistics
do. Where the stream passes norms, all of them count, not the final one alone. The total on the left is measured: the
model runs without the write, and its own norm and unembedding are applied to the state that it ends in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from streamlens.analyses.ablation.runs import Runs, Setting, running
from streamlens.analyses.ablation.scores import Scores, Tally
from streamlens.analyses.ablation.spans import Drop, every, extent
from streamlens.analyses.ablation.study import check_units
from streamlens.analyses.ablation.trials import explained
from streamlens.analyses.frozen import stream_norms
from streamlens.analyses.result import Result
from streamlens.analyses.source import Corpus, Origin, Source, source_of, target_ids, watched
from streamlens.analyses.statistics import Floats
from streamlens.analyses.transport import demand_sum, factors_of, times
from streamlens.analyses.unembedding import Unembedding
from streamlens.anatomy import Stream
from streamlens.block import Block
from streamlens.checkpoint.model import Model
from streamlens.observation import observe, tokens
from streamlens.proof import norm_statistics
from streamlens.rest import resting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EFFECTS = ("direct", "indirect", "norm", "total")


@dataclass(frozen=True)
class EffectsResult(Result):
    """The change of the target's logit for each unit that writes nothing, and where it comes from."""

    units: tuple[Drop, ...]
    """(unit,) what writes nothing."""
    scores: Scores
    """Sums of direct, indirect, norm and total, in logits (before a soft-cap)."""
    response: Floats
    """(unit, sublayer) the mean of what each later sublayer gives less: negative where it repairs."""
    labels: tuple[str, ...]
    """(sublayer,) the names of the columns of `response`."""
    title: str = ""

    @property
    def means(self) -> dict[str, Floats]:
        """(unit,) the mean of each effect over tokens that have a target, without position 0."""
        return {name: self.scores.mean(name) for name in EFFECTS}

    @property
    def slope(self) -> float:
        """The slope through zero of total on direct effect: below 1 where later sublayers repair on the whole."""
        means = self.means
        size = float(means["direct"] @ means["direct"])
        return float(means["direct"] @ means["total"]) / size if size else float("nan")

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each unit, in logits; low and high are the 95 % interval of the total effect."""
        means = self.means
        table = []
        for index, unit in enumerate(self.units):
            found = self.scores.interval("total", index)
            row: dict[str, Any] = {"drop": unit.label, "kind": unit.kind, "layer": unit.layer}
            row |= {"direct": float(means["direct"][index]), "indirect": float(means["indirect"][index])}
            row |= {"norm_effect": float(means["norm"][index]), "total": found.mean}
            table.append(row | {"low": found.low, "high": found.high, "interval_over": self.scores.unit})
        return table

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the total against the direct effect."""
        from streamlens.analyses.ablation.drawing import draw_effects

        return draw_effects(self, ax)


class Effects:
    """Collects the effects of each unit.

    Args:
        source: where blocks come from.
        units: what writes nothing, one after the other.

    Raises:
        MissingDataError: the logits are no linear function of the normalised stream.
    """

    def __init__(self, source: Source, units: list[Drop]) -> None:
        self._source, self._units = source, units
        self._setting = Setting.of(source)
        self._unembedding = Unembedding(source)
        self._norms = stream_norms(source.stream, self._setting.parameters)
        self._factors = factors_of(source.stream, self._setting.parameters)
        self._place = {norm.state: index for index, norm in enumerate(source.stream.norms)}
        self._tally = Tally(len(units), EFFECTS)
        self._response = np.zeros((len(units), len(source.stream.sublayers)))
        self._count = 0.0

    def update(self, block: Block) -> None:
        """Run every unit on one more block."""
        if block.start == 0:
            demand_sum(self._source.stream, self._norms, block, self._factors)
        runs = Runs(self._setting, block, self._source.inputs(block))
        docs, positions = runs.shape
        targets = target_ids(self._source, block)
        known = (targets >= 0).reshape(docs, positions)
        with running():
            last = self._unembedding.directions(block, targets, centred=False).to(self._setting.device).double()
            chain = self._directions(block, last)
            whole = self._unembedding.target_logit(block.states[-1], targets).double()
            self._tally.begin(block.start, block.doc.reshape(docs, positions), None)
            counted = (known & (torch.arange(positions) > 0)).flatten().to(last.device)
            self._count += float(counted.sum())
            for index, unit in enumerate(self._units):
                found, response = self._effects(runs, unit, chain, whole, targets)
                for sublayer, values in response.items():
                    self._response[index, sublayer] += float(values[counted].sum())
                laid_out = {
                    name: torch.where(known.to(v.device), v.reshape(docs, positions), torch.nan)
                    for name, v in found.items()
                }
                self._tally.add(block.start, index, laid_out)

    def merge(self, other: Effects) -> None:
        """Fold another partial result of the same units in."""
        self._tally.merge(other._tally)
        self._response += other._response
        self._count += other._count

    def result(self) -> EffectsResult:
        """Return the effects so far."""
        stream = self._source.stream
        response, scores = self._response / max(self._count, 1.0), self._tally.result()
        title = f"Direct and total effect on the target's logit: {self._source.description}"
        title += f"; 95 % intervals over {scores.over}"
        return EffectsResult(tuple(self._units), scores, response, stream.labels, title)

    def _directions(self, block: Block, last: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For each step the direction of its sum and of its state: (token, d_model) before and after its norm."""
        after = last
        found: list[tuple[Tensor, Tensor]] = []
        for step in reversed(range(len(self._source.stream.steps))):
            before = after
            if step + 1 in self._norms:
                before = self._norms[step + 1].adjoint(after, block.norms[self._place[step + 1]][1])
            found.append((before, after))
            after = times(before, self._factors.skips[step])
        return found[::-1]

    def _effects(
        self, runs: Runs, unit: Drop, chain: list[tuple[Tensor, Tensor]], whole: Tensor, targets: Tensor
    ) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
        """Return each effect, and what each later sublayer gives less, (token,) float64."""
        stream, block, device = self._source.stream, runs.block, self._setting.device
        first, final = extent(stream, unit)[0], len(stream.steps)
        states, writes = self._without(runs, unit)
        direct, indirect, norms = (torch.zeros(block.stop - block.start, device=device).double() for _ in range(3))
        response: dict[int, Tensor] = {}
        for step in range(first, final):
            direction, total = chain[step][0], times(states[step], self._factors.skips[step])
            for s in stream.steps[step].sublayers:
                factor = self._factors.writes[s]
                lost = (times(block.writes[s].to(device).double() - writes[s], factor) * direction).sum(-1)
                if s in unit.sublayers:
                    direct += lost
                else:
                    indirect += lost
                    response[s] = lost
                total = total + times(writes[s], factor)
            if step + 1 in self._norms:
                norms += self._shift(block, self._place[step + 1], direction, total)
        if self._unembedding.index is not None:
            norms += self._shift(block, self._unembedding.index, chain[-1][1], states[final])
        change = whole - self._unembedding.target_logit(states[final], targets).double()
        total = torch.where((targets >= 0).to(device), change, 0.0)
        return {"direct": direct, "indirect": indirect, "norm": norms, "total": total}, response

    def _shift(self, block: Block, index: int, direction: Tensor, changed: Tensor) -> Tensor:
        """What a norm gives less because its statistics changed: ((A - A') v') along what comes after it."""
        rstd = block.norms[index][1]  # what stays as it was has these very bits, and shifts nothing
        new = norm_statistics(self._source.stream.norms[index], changed.to(rstd))[1]
        return (direction * changed).sum(-1) * (1.0 - new.to(changed) / rstd.to(changed))

    def _without(self, runs: Runs, unit: Drop) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Return all states and writes from the first dropped step on, (token, d_model) float64."""
        stream, block, setting = self._source.stream, runs.block, self._setting
        first = extent(stream, unit)[0]
        at, state, changes = runs.after(unit)
        assert not changes, "a layer is dropped in one piece"
        with observe(setting.module, setting.anatomy) as seen:
            runs.finish(at, state)
        docs, positions = runs.shape

        def plain(tensor: Tensor) -> Tensor:
            return tokens(tensor, stream, docs, positions).flatten(0, 1).double()

        states = {k: plain(seen.states[stream.name][k]) for k in range(at + 1, len(stream.steps) + 1)}
        states |= {at: state.flatten(0, 1).double(), first: block.states[first].to(setting.device).double()}
        for step in range(first + 1, at):  # between two dropped steps of one layer
            states[step] = runs.after(_until(stream, unit, step))[1].flatten(0, 1).double()
        writes: dict[int, Tensor] = {}
        for step in range(first, len(stream.steps)):
            for s in stream.steps[step].sublayers:
                own = block.writes[s].to(setting.device).double()
                if s in unit.sublayers:
                    writes[s] = torch.zeros_like(own)
                else:
                    writes[s] = plain(seen.writes[stream.name][s]) if step >= at else own
        return states, writes


def _until(stream: Stream, unit: Drop, stop: int) -> Drop:
    """The part of a unit that comes before a step."""
    earlier = {s for step in stream.steps[:stop] for s in step.sublayers}
    return replace(unit, sublayers=tuple(s for s in unit.sublayers if s in earlier))


@resting
def effects(
    origin: Origin,
    *,
    units: str = "sublayers",
    stream: str | None = None,
    model: Model | nn.Module | None = None,
    progress: bool = True,
    **corpus: Unpack[Corpus],
) -> EffectsResult:
    """Split what a drop does to the logit of the right token into direct, indirect and norm effect.

    Each unit writes nothing (mode zero), because a write that is not there is what the split is about.

    Args:
        origin: a capture, a model, or a source.
        units: ``sublayers`` or ``layers``.
        stream: which stream; by default the one that the head reads.
        model: for a capture: its model, where it is loaded already.
        progress: show a progress bar.
        **corpus: for a live model: what it is shown, as in `streamlens.capture`.

    Returns:
        Means in logits, before a soft-cap. The total is measured in the run without the write; direct, indirect and
        norm effect add up to it but for rounding (about 1e-6 of a logit in float32, 1e-2 in bfloat16).

    Raises:
        UsageError: other units.
        MissingDataError: no logits, no linear way to them, or a stream whose terms do not add up.

    Example:
        >>> from fixtures import planted
        >>> ids = list(planted.documents())
        >>> found = effects(planted.dead_layer(), tokens=ids, window=planted.POSITIONS, progress=False)
        >>> [(row["drop"], row["direct"], row["total"]) for row in found.rows()]
        [('0_mlp_out', 6.0, 6.0), ('1_mlp_out', 0.0, 0.0)]
    """
    source = source_of(origin, stream=stream, model=model, **corpus)
    check_units(units, "effects", "layers", "sublayers")
    found = Effects(source, every(source.stream, units, "zero"))
    with explained():
        for block in watched(source, "effects", progress=progress):
            found.update(block)
    return found.result()
