"""Does the skip carry position? Damage it, leave what the sublayer reads intact, and see whether position comes back.

Two lesions of the skip around a sublayer, x_{s+1} = x_s + w_s before any norm:

- ``scale``: alpha x_s + w_s. Alpha 1 is the unchanged model, bit for bit.
- ``position``: what x_s has in the subspace of its positional part, apart from the mean, is taken off the skip. Its
  control ``random`` takes the same energy from each token, in a random subspace of the same dimension.

If position is as strong downstream as before, later sublayers compute it anew; if it is gone, the skip was the carrier.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamlens.analyses.ablation.runs import Runs, Setting
from streamlens.analyses.ablation.trials import Ablation, Score, explained
from streamlens.analyses.position import state_labels
from streamlens.analyses.position_geometry import top_span
from streamlens.analyses.position_sample import Halves, Sample, fit_ridge
from streamlens.analyses.position_sums import PositionSums, Rectangle, null_band, split, sums_of
from streamlens.analyses.result import Result
from streamlens.analyses.source import Corpus, Origin, Source, source_of, watched
from streamlens.analyses.statistics import Floats
from streamlens.analyses.transport import Factor, skip_factors
from streamlens.anatomy import Stream
from streamlens.block import Block
from streamlens.checkpoint.model import Model
from streamlens.errors import MissingDataError, UsageError
from streamlens.observe import Observer, observing, tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Mode = Literal["scale", "position", "random"]
Features = NDArray[np.float32]

ALPHAS = (1.0, 0.9, 0.5, 0.0)
ENERGY, MOST_DIMENSIONS = 0.99, 16
"""The position subspace holds this share of the positional energy, in so many dimensions at most."""


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
    """(d_model, dimension) orthonormal: where position is."""
    other: Tensor | None = None
    """(d_model, dimension) orthonormal: a random subspace, for its control."""

    def removed(self, state: Tensor) -> Tensor:
        """Return what the skip loses, in the shape and dtype of the state (doc, position, d_model)."""
        if self.mode == "scale":
            return (1.0 - self.alpha) * state
        assert self.mean is not None, "a selective lesion has a subspace"
        assert self.basis is not None, "a selective lesion has a subspace"
        basis = self.basis.to(state.device)
        around = state.double() - self.mean.to(state.device)
        lost = around @ basis @ basis.T
        if self.mode == "random":
            assert self.other is not None, "the control has a subspace of its own"
            other = self.other.to(state.device)
            drawn = around @ other @ other.T
            lost = drawn * (lost.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True).clamp_min(1e-30))
        return lost.to(state.dtype)


@dataclass(frozen=True)
class LesionResult(Result):
    """What each lesion does to position in the states after it, and to the output. NaN where there is no number."""

    title: str
    lesions: tuple[Lesion, ...]
    """(lesion,)."""
    states: tuple[str, ...]
    """(state,)."""
    dimensions: NDArray[np.int64]
    """(lesion,) of the subspace that is removed; 0 where all is scaled."""
    energy_removed: Floats
    """(lesion,) mean squared norm of what the skip loses, over that of the state around its mean."""
    baseline: Floats
    """(state,) share of the positional part in the unchanged model."""
    null_high: Floats
    """(state,) what it would be at most if positions stood in random order."""
    position_share: Floats
    """(lesion, state) the same share after the lesion; NaN for states before it."""
    probe_states: NDArray[np.int64]
    """(lesion, 2) where position is read off: in the state that the lesion makes, and in the last."""
    probe_baseline: Floats
    """(lesion, 2) R^2 of a ridge regression to the position on the unchanged states, on held-out documents."""
    probe_refitted: Floats
    """(lesion, 2) of one that is trained anew on the states after the lesion: is position there in any form?"""
    probe_transferred: Floats
    """(lesion, 2) of the one trained on the unchanged states: is it there in the old form?"""
    score: str
    """Which score the next three are: ``delta_loss`` in nats per token, or ``pooled_distance`` without logits."""
    damage: Floats
    low: Floats
    high: Floats
    """(lesion,) mean and 95 % interval, by bootstrap over documents."""

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each lesion; `after` is the state that it makes, `last` the last one."""
        rows = []
        for i, lesion in enumerate(self.lesions):
            row: dict[str, Any] = {
                "label": lesion.label,
                "mode": lesion.mode,
                "alpha": lesion.alpha if lesion.mode == "scale" else None,
                "dimensions": int(self.dimensions[i]),
                "energy_removed": float(self.energy_removed[i]),
            }
            for column, name in enumerate(("after", "last")):
                k = int(self.probe_states[i, column])
                row[f"position_share_{name}"] = float(self.position_share[i, k])
                row[f"position_share_{name}_unchanged"] = float(self.baseline[k])
                row[f"r_squared_{name}"] = float(self.probe_refitted[i, column])
                row[f"r_squared_{name}_transferred"] = float(self.probe_transferred[i, column])
                row[f"r_squared_{name}_unchanged"] = float(self.probe_baseline[i, column])
            rows.append(
                {**row, self.score: float(self.damage[i]), "low": float(self.low[i]), "high": float(self.high[i])}
            )
        return rows

    def short_rows(self) -> list[dict[str, Any]]:
        """Return the columns that fit a terminal."""
        names = ("label", "mode", "alpha", "position_share_after", "position_share_last", "r_squared_last", self.score)
        short = {"position_share_after": "share_after", "position_share_last": "share_last"}
        return [{short.get(name, name): row[name] for name in names} for row in self.rows()]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the positional share by state, unchanged and after each selective lesion with its control.

        In a figure of its own, the lesions that scale the skip (`plot_scale`) are drawn below.
        """
        from streamlens.analyses.figures import panels
        from streamlens.analyses.position_figures import plot_lesions, plot_scale

        if ax is not None or not any(x.mode == "scale" for x in self.lesions):
            return plot_lesions(self, ax)
        above, below = panels(2, 1, width=7.0, height=5.6)
        plot_scale(self, below).set_title("")
        return plot_lesions(self, above)

    def plot_scale(self, ax: Axes | None = None) -> Axes:
        """Draw the positional share of the last state against the factor on the skip."""
        from streamlens.analyses.position_figures import plot_scale

        return plot_scale(self, ax)


def position_lesion(
    origin: Origin,
    *,
    stream: str | None = None,
    model: Model | None = None,
    skips: Sequence[str] | None = None,
    alphas: Sequence[float] = ALPHAS,
    positions: int | None = None,
    include_first: bool = False,
    protect_first: bool = False,
    documents: int = 64,
    tokens_per_document: int = 24,
    sample_seed: int = 0,
    progress: bool = True,
    **corpus: Unpack[Corpus],
) -> LesionResult:
    """Damage skips in a running model and measure position downstream.

    Args:
        origin: a capture or its path (its model is loaded, too), a model or its file, or a source.
        stream: which stream; by default the one that the head reads.
        model: for a capture: its model, where it is loaded already.
        skips: the skips around these sublayers, by label; by default around the first one of three layers.
        alphas: factors of the ``scale`` lesions; empty for none.
        positions: how many positions of each document are measured; by default the length of the first, at most 128.
        include_first: whether position 0 counts.
        protect_first: leave the skip of position 0 alone, which in many models holds a vector of enormous norm.
        documents: windows that are run, at most.
        tokens_per_document: tokens of each that the probes see.
        sample_seed: of the probes' sample and of the random subspaces.
        progress: whether to show a progress bar.
        **corpus: for a live model: what it is shown, as in `streamlens.capture`.

    Raises:
        MissingDataError: a label that does not exist, too few documents, or a capture whose model is not here.
        UsageError: neither a scale nor a subspace to remove.

    Example:
        >>> from fixtures.planted_position import PositionCarrier
        >>> ids = torch.randint(0, 40, (32, 20), generator=torch.Generator().manual_seed(0))
        >>> found = position_lesion(PositionCarrier(), tokens=ids, skips=["1_attn_out"], progress=False)
        >>> [(x.mode, bool(share < 0.01)) for x, share in zip(found.lesions[-2:], found.position_share[-2:, -1])]
        [('position', True), ('random', False)]
    """
    source = source_of(origin, stream=stream, model=model, **corpus)
    steps = _steps(source.stream, skips)
    setting = Setting.of(source, protect_first=protect_first)

    def blocks(what: str) -> Iterator[Block]:
        return _first(watched(source, what, progress=progress), documents)

    with explained():
        base = sums_of(source, blocks("position"), positions=positions, include_first=include_first, origins=False)
        lesions = _lesions(source.stream, base, steps, alphas, sample_seed)
        if not lesions:
            raise UsageError("there is nothing to do: no factor is given, and there is no positional part to remove")
        sample: Sample | None = None
        for block in blocks("lesion"):
            if sample is None:
                sample = Sample(base.positions, documents, documents, tokens_per_document, base.first, sample_seed)
                theatre = _Theatre(source, setting, lesions, base, sample)
                ablation = Ablation(source, setting, len(lesions), theatre.play)
            theatre.prepare(block)
            ablation.update(block)
    return theatre.result(ablation.result(), sample_seed)


def _first(blocks: Iterator[Block], documents: int) -> Iterator[Block]:
    """The blocks up to the one with which there are enough windows."""
    seen = 0
    for block in blocks:
        yield block
        seen += int((block.position[1:] <= block.position[:-1]).sum()) + 1
        if seen >= documents:
            return


def _steps(stream: Stream, skips: Sequence[str] | None) -> list[int]:
    if skips is None:
        firsts: dict[int, int] = {}
        for sublayer in stream.sublayers:
            firsts.setdefault(sublayer.layer, sublayer.read)
        layers = sorted({0, stream.layers // 3, 2 * stream.layers // 3})
        return [firsts[layer] for layer in layers if layer in firsts]
    return list(dict.fromkeys(stream.find(label).read for label in skips))


def _lesions(
    stream: Stream, base: PositionSums, steps: Sequence[int], alphas: Sequence[float], seed: int
) -> list[Lesion]:
    found: list[Lesion] = []
    labels = state_labels(stream)
    generator = torch.Generator().manual_seed(seed)
    for step in steps:
        found += [Lesion("scale", step, labels[step + 1], alpha) for alpha in alphas]
        own = split(base, step)
        strength = torch.linalg.svdvals(own.parts).square()
        if not strength.sum():
            continue
        needed = int((strength.cumsum(0) < ENERGY * strength.sum()).sum()) + 1
        count = min(needed, MOST_DIMENSIONS, stream.d_model // 2)
        basis = top_span(own.parts, count)
        drawn = torch.randn(basis.shape, generator=generator, dtype=torch.float64).to(basis.device)
        other = torch.linalg.qr(drawn).Q
        mean = base.sums[step][base.first :].mean(0) / base.docs
        found += [Lesion(mode, step, labels[step + 1], float("nan"), mean, basis, other) for mode in _SELECTIVE]
    return found


_SELECTIVE: tuple[Mode, ...] = ("position", "random")


class _Watcher(Observer):
    """Feeds the states of one run, from some state on, to sums and to the probes' sample."""

    def __init__(self, name: str, after: int, shape: tuple[int, int], receive: Any) -> None:
        self._name, self._after, self._shape, self._receive = name, after, shape, receive

    def state(self, stream: Stream, index: int, tensor: Tensor) -> None:
        if stream.name == self._name and index > self._after:
            self._receive(index, tokens(tensor, stream, *self._shape).flatten(0, 1))


@dataclass
class _Theatre:
    """Runs all lesions on each block."""

    source: Source
    setting: Setting
    lesions: Sequence[Lesion]
    base: PositionSums
    sample: Sample
    features: dict[tuple[int, int], list[Features]] = field(default_factory=dict)
    """By lesion (-1: none) and state."""
    energy: Floats = field(init=False)
    """(lesion, 2) sum of the squared norms of what was removed, and number of tokens."""
    sums: list[PositionSums] = field(init=False)
    factors: Sequence[Factor] = field(init=False)

    def __post_init__(self) -> None:
        stream, last = self.source.stream, len(self.source.stream.steps)
        shape = {"first": self.base.first, "origins": False}
        self.sums = [
            PositionSums(stream, self.base.positions, states=range(x.step + 1, last + 1), **shape)  # type: ignore[arg-type]
            for x in self.lesions
        ]
        self.factors = skip_factors(stream, self.source.parameters)
        self._last = last
        self.energy = np.zeros((len(self.lesions), 2))

    def prepare(self, block: Block) -> None:
        """Take what is needed of the unchanged states."""
        self._rectangle = Rectangle.of(block, self.base.positions)
        self._rows = self.sample.rows(block)
        for k in {x.step + 1 for x in self.lesions} | {self._last}:
            self._keep(-1, k, block.states[k])

    def play(self, runs: Runs, score: Score) -> None:
        """Run all lesions on the block."""
        for number, lesion in enumerate(self.lesions):
            state = runs.state(lesion.step)
            removed = self._removed(number, lesion, state)
            stream = self.source.stream
            own = removed.transpose(0, 1) if stream.position_first else removed
            first = stream.steps[lesion.step].sublayers[0]

            def change(write: Tensor, own: Tensor = own) -> Tensor:
                return write - own.reshape(write.shape)

            def receive(index: int, flat: Tensor, number: int = number) -> None:
                self.sums[number].add_state(index, self._rectangle.take(flat))
                self._keep(number, index, flat)

            watcher = _Watcher(stream.name, lesion.step, runs.shape, receive)
            with observing(self.setting.module, self.setting.anatomy, watcher):
                output = runs.finish(lesion.step, state, {first: change})
            self.sums[number].docs += len(self._rectangle.rows)
            score(number, output)

    def _removed(self, number: int, lesion: Lesion, state: Tensor) -> Tensor:
        factor = self.factors[lesion.step]
        removed = lesion.removed(state)
        if self.setting.protect_first:
            removed = torch.cat([torch.zeros_like(removed[:, :1]), removed[:, 1:]], dim=1)
        counted = removed[:, self.base.first :].double()
        self.energy[number] += np.array([float(counted.square().sum()), counted.numel() / counted.shape[-1]])
        return removed * (factor if isinstance(factor, float) else factor.to(removed))

    def _keep(self, number: int, index: int, flat: Tensor) -> None:
        wanted = index == self._last or number < 0 or index == self.lesions[number].step + 1
        if wanted and len(self._rows):
            rows = flat[self._rows.to(flat.device)].float().cpu().numpy()
            self.features.setdefault((number, index), []).append(rows)

    def result(self, scores: Any, seed: int) -> LesionResult:
        """Fit the probes and put everything together."""
        splits = {k: split(self.base, k) for k in self.base.states}
        shares = np.full((len(self.lesions), len(splits)), np.nan)
        for i, sums in enumerate(self.sums):
            for k in sums.states:
                shares[i, k] = split(sums, k).share
        places = np.array([[x.step + 1, self._last] for x in self.lesions], np.int64)
        probes = self._probes(places, seed)
        intervals = [scores.interval(scores.headline, i) for i in range(len(self.lesions))]
        around = [splits[x.step].total / (splits[x.step].docs * splits[x.step].positions) for x in self.lesions]
        return LesionResult(
            title=f"Lesions of the skip: {self.source.description}",
            lesions=tuple(self.lesions),
            states=state_labels(self.source.stream),
            dimensions=np.array([0 if x.basis is None else x.basis.shape[1] for x in self.lesions], np.int64),
            energy_removed=self.energy[:, 0] / self.energy[:, 1] / np.array(around),
            baseline=np.array([splits[k].share for k in splits]),
            null_high=np.array([null_band(self.base, k, splits[k])[1] for k in splits]),
            position_share=shares,
            probe_states=places,
            probe_baseline=probes[0],
            probe_refitted=probes[1],
            probe_transferred=probes[2],
            score=scores.headline,
            damage=np.array([i.mean for i in intervals]),
            low=np.array([i.low for i in intervals]),
            high=np.array([i.high for i in intervals]),
        )

    def _probes(self, places: NDArray[np.int64], seed: int) -> Floats:
        """(kind, lesion, 2) R^2 on held-out documents: unchanged, refitted, transferred."""
        found = np.full((3, *places.shape), np.nan)
        labels = self.sample.position.astype(np.float64)[:, None]
        try:
            halves = Halves.of(self.sample.groups, seed)
        except MissingDataError:
            return found  # with few documents the other measures still stand
        tables = {key: np.concatenate(rows) for key, rows in self.features.items()}
        own = {k: fit_ridge(tables[-1, k], labels, halves) for k in np.unique(places)}
        truth = labels[halves.test, 0]

        def score(guess: Floats) -> float:
            return 1 - float(((truth - guess[:, 0]) ** 2).sum() / ((truth - truth.mean()) ** 2).sum())

        for i, pair in enumerate(places):
            for column, k in enumerate(pair):
                changed = tables[i, k]
                found[0, i, column] = score(own[k].predict(tables[-1, k][halves.test]))
                found[1, i, column] = score(fit_ridge(changed, labels, halves).predict(changed[halves.test]))
                found[2, i, column] = score(own[k].predict(changed[halves.test]))
        return found
