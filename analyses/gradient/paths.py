"""How long the paths are by which the gradient comes back: the exact spectrum over the number of branches passed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from streamlens.analyses.gradient.answer import whiskers
from streamlens.analyses.gradient.graph import Graph, Objective
from streamlens.analyses.gradient.sequences import Sequences, Table, run_through, sequences_of
from streamlens.analyses.result import Result
from streamlens.analyses.source import Corpus, Origin, source_of
from streamlens.analyses.statistics import Floats, Unit
from streamlens.checkpoint.model import Model
from streamlens.errors import UsageError
from streamlens.rest import resting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SEQUENCES = 8
"""How many sequences are run unless more are asked for: each costs a backward pass for every length."""

AT_ONCE = 2
"""How many sequences share a graph unless told: a gradient is held for every length."""


_SUMS = ("energy", "share", "square", "rest", "moment")


@dataclass
class PathSpectrum(Sequences):
    """Folds in the spectrum of path lengths block by block.

    Args:
        source: where the blocks come from.
        at_once: how many sequences share a graph.
        max_length: up to which length paths are told apart.

    Raises:
        UsageError: a negative length.
    """

    max_length: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length < 0:
            raise UsageError(f"paths pass 0 branches or more, not {self.max_length}")
        self.max_length = min(self.max_length, len(self.source.stream.steps))

    def _measure(self, graph: Graph) -> dict[str, Tensor]:
        gradients, inner = graph.gradients(), graph.per_sequence
        paths, moment = spectrum_of(graph, gradients, self.max_length)
        paths = pad(paths, (0, 0, 0, 0, 0, self.max_length + 1 - len(paths)))
        own = gradients[0]
        rest = own.double() - paths.double().sum(0)
        return {
            "energy": inner(own, own)[None],
            "share": inner(paths, own),
            "square": inner(paths, paths),
            "rest": torch.stack([inner(rest, own), inner(rest, rest)]),
            "moment": inner(moment, own)[None],
        }

    def result(self) -> SpectrumResult:
        """Return the means over sequences and their intervals.

        Raises:
            MissingDataError: no sequence has a gradient.
        """
        table = self.table()
        branches = [len(step.sublayers) for step in self.source.stream.steps]
        return SpectrumResult(
            title=self.title("Gradient by path length", table),
            objective=self.objective,
            loss=table.mean(table.sums["loss"]),
            sequences=len(table.doc),
            documents=table.documents,
            unit=table.unit,
            branches=tuple(branches),
            paths=_spectrum(table, {name: table.sums[name][..., 1] for name in _SUMS}, branches),
            paths_all=_spectrum(table, {name: table.sums[name].sum(-1) for name in _SUMS}, branches),
        )


def spectrum_of(graph: Graph, gradients: Sequence[Tensor], max_length: int) -> tuple[Tensor, Tensor]:
    """Sort the gradient at x_0 by the number of branches that it passed, all paths at once.

    Each branch is given a formal weight t; then g_0(t) = sum_k t^k c_k, and the coefficients are carried backwards,
    c_k <- skip^T c_k + J^T c_{k-1} (the sum over all 2^S paths that Veit et al. 2016, arXiv 1605.06431, sampled). One
    more column carries dg_0/dt at t = 1, whose share is the mean path length, whatever the longest length told apart.

    Args:
        graph: the live graph.
        gradients: the gradient at each state, (token, d_model) each.
        max_length: longer paths are left out.

    Returns:
        (length, token, d_model) c_0, c_1, ...; and (token, d_model) sum_k k c_k over all lengths.
    """
    paths = gradients[-1][None]
    moment = torch.zeros_like(paths)
    for step in reversed(range(len(graph.stream.steps))):
        count = len(paths)
        pulled = graph.across(step, torch.cat([paths, moment, gradients[step + 1][None]]))
        paths, moment = pulled.skip[:count], pulled.skip[count : count + 1]
        longer = min(count, max_length)
        if longer == count:
            paths = pad(paths, (0, 0, 0, 0, 0, 1))
        for sublayer, at_write in pulled.writes.items():
            entering = torch.cat([at_write[:longer], at_write[-2:].sum(0, keepdim=True)])
            branch = graph.through(sublayer, entering)
            paths = paths + pad(branch[:-1], (0, 0, 0, 0, 1, 0))
            moment = moment + branch[-1:]
    return paths, moment[0]


@dataclass(frozen=True)
class Paths:
    """Means over sequences; the last axis of each array is (mean, low, high), with the 95 % interval."""

    share: Floats
    """(length, 3) <c_k, g_0> / ||g_0||^2; with the remainder it sums to 1."""
    energy: Floats
    """(length, 3) ||c_k||^2 over the sum of these."""
    relative_norm: Floats
    """(length, 3) ||c_k|| / ||g_0||."""
    remainder_share: Floats
    """(3,) share of the paths that are longer."""
    remainder_norm: Floats
    """(3,) their norm over ||g_0||; where no path is longer, the rounding error of the whole computation."""
    mean_length: Floats
    """(3,) mean path length, weighted by share, over all lengths."""
    law: Floats
    """(length,) the binomial law that fits the energies best: number of paths times odds^length, normalised."""
    odds: float
    """The energy that a path loses or gains with each further branch."""


@dataclass(frozen=True, kw_only=True)
class SpectrumResult(Result):
    """How the gradient at x_0 is made up of paths that pass 0, 1, 2, ... branches."""

    title: str
    objective: Objective
    """Which scalar was differentiated."""
    loss: Floats
    """(3,) its mean over sequences, with the interval."""
    sequences: int
    """How many windows (or documents kept whole) had a gradient."""
    documents: int
    """How many documents they come from."""
    unit: Unit
    """What the intervals are over: documents, or windows where these are few."""
    branches: tuple[int, ...]
    """(step,) branches of each step; a path passes one of them or the skip."""
    paths: Paths
    """Position 0 left out."""
    paths_all: Paths
    """All positions."""

    @property
    def lengths(self) -> range:
        """The lengths that are told apart."""
        return range(len(self.paths.share))

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each length; `_all` includes position 0, the last columns are the same in every row."""
        path_share = _path_counts(self.branches) / np.prod(np.array(self.branches, np.float64) + 1)
        found, whole = self.paths, self.paths_all
        return [
            {
                "length": k,
                "share": float(found.share[k, 0]),
                "low": float(found.share[k, 1]),
                "high": float(found.share[k, 2]),
                "relative_norm": float(found.relative_norm[k, 0]),
                "energy_share": float(found.energy[k, 0]),
                "binomial": float(found.law[k]),
                "path_share": float(path_share[k]),
                "share_all": float(whole.share[k, 0]),
                "mean_length": float(found.mean_length[0]),
                "remainder_share": float(found.remainder_share[0]),
                "steps": len(self.branches),
            }
            for k in self.lengths
        ]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the share of each length and, in a figure of their own, the energies with the binomial law below.

        Args:
            ax: draw the shares alone, there.
        """
        from streamlens.analyses.figures import panels

        if ax is not None:
            return self.plot_shares(ax)
        places = panels(2, 1, width=6.5, height=5.2)
        self.plot_energies(places[1])
        return self.plot_shares(places[0])

    def plot_shares(self, ax: Axes | None = None) -> Axes:
        """Draw the share of each length, signed: paths of different lengths may cancel."""
        from streamlens.analyses.figures import PALETTE, axes, finish, integer_ticks

        ax = axes(ax)
        mean, low, high = self.paths.share.T
        ax.bar(self.lengths, mean, color=PALETTE["attn"], alpha=0.75)
        whiskers(ax, self.lengths, mean, mean - low, high - mean)
        ax.axhline(0, color="black", linewidth=0.6)
        integer_ticks(ax)
        found, least, most = self.paths.mean_length
        x = f"Branches on the path (at most {len(self.branches)}; mean {found:.2f}, interval {least:.2f} to {most:.2f})"
        return finish(ax, x=x, y="Share of the gradient", title=self.title)

    def plot_energies(self, ax: Axes | None = None) -> Axes:
        """Draw the energy of each length, and the binomial law that fits best."""
        from streamlens.analyses.figures import PALETTE, axes, finish, integer_ticks

        ax = axes(ax)
        mean, low, high = self.paths.energy.T
        ax.bar(self.lengths, mean, color=PALETTE["mlp"], alpha=0.75, label="measured")
        whiskers(ax, self.lengths, mean, mean - low, high - mean)
        law = f"binomial law, odds {self.paths.odds:.3g}"
        ax.plot(self.lengths, self.paths.law, "o--", color=PALETTE["block"], linewidth=1, markersize=3, label=law)
        integer_ticks(ax)
        return finish(ax, x="Branches on the path", y="Share of the energy")


@resting
def path_spectrum(
    origin: Origin,
    max_length: int = 12,
    *,
    stream: str | None = None,
    model: Model | nn.Module | None = None,
    sequences: int | None = SEQUENCES,
    at_once: int = AT_ONCE,
    progress: bool = True,
    **corpus: Unpack[Corpus],
) -> SpectrumResult:
    """Split the gradient at x_0 by the number of branches that it passed on its way back, exactly.

    No path is sampled: see `spectrum_of`. If the Jacobians of the branches were independent Gaussian with
    E J^T J = e^2 I, the energies ||c_k||^2 would follow the binomial law with odds e^2, which is what they are
    compared with. The objective is that of `gradient_flow`.

    Shares are signed, and in a deep model they cancel: where each branch takes away a little of what the skip
    carries, (1 - a)^S = sum_k C(S, k) (-a)^k, whose terms are far larger than the sum. A large remainder at a short
    `max_length` says just that. The mean length is exact all the same. Where all lengths are told apart, the remainder
    is the rounding of this cancellation: with the 60 sublayers of SmolLM2-135M, 1 % of the gradient in float32.

    Args:
        origin: a capture whose model is to be had, a model, or a source. The model itself is run.
        max_length: longer paths are not told apart; what they carry is the remainder.
        stream: which stream; by default the one that the head reads.
        model: for a capture: its model, where it is loaded already.
        sequences: run so many windows (or documents kept whole), evenly spread over the text; None runs all.
        at_once: how many sequences share a graph; memory grows with it times `max_length`.
        progress: show a progress bar.
        **corpus: for a live model: what it is shown, as in `streamlens.capture`.

    Raises:
        MissingDataError: the capture's model or inputs are not to be had; or no sequence has a target.
        AnatomyError: the forward pass records no gradients.
        UsageError: a negative length; less than one sequence, in all or at a time.

    Example:
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        >>> model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        >>> found = path_spectrum(model, inputs=torch.randn(4, 5, 8), progress=False)
        >>> len(found.lengths), bool(abs(found.paths.share[:, 0].sum() - 1) < 1e-5)
        (5, True)
    """
    source = sequences_of(source_of(origin, stream=stream, model=model, **corpus), sequences)
    spectrum = PathSpectrum(source, at_once, max_length)
    run_through(spectrum, "paths", progress)
    return spectrum.result()


def _spectrum(table: Table, sums: dict[str, Floats], branches: Sequence[int]) -> Paths:
    energy, square = sums["energy"], sums["square"]
    with np.errstate(invalid="ignore", divide="ignore"):
        energies = table.mean(square / square.sum(1, keepdims=True))
        law, odds = binomial_law(energies[:, 0], branches)
        return Paths(
            share=table.mean(sums["share"] / energy),
            energy=energies,
            relative_norm=table.mean(np.sqrt(square / energy)),
            remainder_share=table.mean(sums["rest"][:, 0] / energy[:, 0]),
            remainder_norm=table.mean(np.sqrt(sums["rest"][:, 1] / energy[:, 0])),
            mean_length=table.mean(sums["moment"][:, 0] / energy[:, 0]),
            law=law,
            odds=odds,
        )


def binomial_law(energies: Floats, branches: Sequence[int]) -> tuple[Floats, float]:
    """Return the law n_k odds^k (normalised, cut at the same length) whose mean is that of `energies`, and its odds.

    n_k is the number of paths of length k: binomial coefficients where each step has one branch. Matching the mean is
    the maximum of the likelihood in this family.

    Args:
        energies: (length,) sums to 1.
        branches: (step,) branches of each step.

    >>> law, odds = binomial_law(np.array([4, 4, 1]) / 9, [1, 1])
    >>> law.round(6).tolist(), round(odds, 6)
    ([0.444444, 0.444444, 0.111111], 0.5)
    """
    lengths = np.arange(len(energies))
    wanted = float(lengths @ energies)
    counts = np.log(_path_counts(branches)[: len(energies)])

    def law(log_odds: float) -> Floats:
        weights = counts + lengths * log_odds
        weights = np.exp(weights - weights.max())
        return np.asarray(weights / weights.sum(), np.float64)

    low, high = -60.0, 60.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float(lengths @ law(middle)) < wanted else (low, middle)
    return law(low), float(np.exp(low))


def _path_counts(branches: Sequence[int]) -> Floats:
    """Return how many paths there are of each length, (length,)."""
    counts = np.ones(1)
    for several in branches:
        counts = np.convolve(counts, [1.0, several])
    return counts
