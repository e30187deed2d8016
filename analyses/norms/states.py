"""The states themselves: how large they are along depth, what each step keeps of the one before, who stands out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamlens.analyses.figures import PALETTE, axes, finish, integer_ticks, interval, style
from streamlens.analyses.frozen import FrozenNorm
from streamlens.analyses.result import Result
from streamlens.analyses.statistics import Floats, Moments, Quantiles
from streamlens.analyses.transport import Factor, times
from streamlens.anatomy import Stream
from streamlens.block import Block

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MASSIVE_SIZE, MASSIVE_RATIO = 100.0, 1000.0
"""An activation is massive above this size, and at this multiple of the median size of the entries of its state, all
tokens of a block and all dimensions (Sun et al. 2024, arXiv 2402.17762)."""

_ENTRIES = 1 << 14
"""So many entries, evenly spread, give the median."""

OUTLIER_RATIO = 10.0
"""A dimension stands out above this multiple of the median dimension's root mean square."""


@dataclass(frozen=True)
class MassiveActivation:
    """One dimension of one state that is massive at some tokens."""

    state: int
    dimension: int
    tokens: int
    """At how many tokens."""
    first_tokens: int
    """At how many of these the position is 0."""
    largest: float
    """The largest size."""


@dataclass(frozen=True)
class StateNormsResult(Result):
    """The size of the states, over tokens without position 0 unless it says so; the axis ``state`` is x_0 ... x_K."""

    title: str
    labels: tuple[str, ...]
    """(state,) ``x_0``, then what was written last."""
    mean: Floats
    """(state,) mean of |x_k|."""
    lower_quartile: Floats
    median: Floats
    upper_quartile: Floats
    """(state,) quartiles of |x_k| over tokens."""
    mean_with_first: Floats
    """(state,) mean over all tokens."""
    mean_at_first: Floats
    """(state,) mean at position 0 alone."""
    forgetting_factor: Floats
    """(state,) mean of |A_k c x_{k-1}| / |x_{k-1}|, A_k the linear part of the norm that makes x_k and c the factor
    on the skip: how much of a state's size the step keeps. 1 in a pre-norm stream, NaN at x_0."""
    identity_gain: Floats
    """(state,) sqrt(mean |T x_0|^2 / mean |x_0|^2), T all norms and factors of the skips up to x_k: what the skips
    alone keep of x_0. 1 in a pre-norm stream. The ratio of energies, as in `gradient_flow`, where it runs backwards."""
    outlier_dimensions: tuple[tuple[int, ...], ...]
    """(state,) dimensions whose root mean square over a sample of tokens, massive activations left out, is above ten
    times the median dimension's."""
    massive: tuple[MassiveActivation, ...]
    """Activations above 100 and above 1000 times the median entry of their state (Sun et al. 2024), at any token."""
    layer_states: NDArray[np.int64]
    """(layer + 1,) the state before each layer and the one after the last."""
    tokens: int

    @property
    def growth(self) -> float:
        """Factor by which the mean |x_k| grows in each layer: e^b, b the least-squares slope of its logarithm."""
        return float(np.exp(self._fit()[0]))

    @property
    def growth_fit(self) -> float:
        """Share of the variance of log |x_k| over layers that this growth explains (R^2)."""
        return self._fit()[1]

    def _fit(self) -> tuple[float, float]:
        size = np.log(self.mean[self.layer_states])
        layer = np.arange(len(size)) - (len(size) - 1) / 2
        slope = float(layer @ size / (layer @ layer))
        spread = float(np.square(size - size.mean()).sum())
        return slope, slope**2 * float(layer @ layer) / spread if spread else 1.0

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each state."""
        found = []
        for k, label in enumerate(self.labels):
            massive = [m for m in self.massive if m.state == k]
            found.append(
                {
                    "state": k,
                    "label": label,
                    "norm": float(self.mean[k]),
                    "norm_median": float(self.median[k]),
                    "norm_lower_quartile": float(self.lower_quartile[k]),
                    "norm_upper_quartile": float(self.upper_quartile[k]),
                    "norm_with_first": float(self.mean_with_first[k]),
                    "norm_at_first": float(self.mean_at_first[k]),
                    "forgetting_factor": float(self.forgetting_factor[k]),
                    "identity_gain": float(self.identity_gain[k]),
                    "outlier_dimensions": list(self.outlier_dimensions[k]),
                    "massive_dimensions": [m.dimension for m in massive],
                    "massive_tokens": max((m.tokens for m in massive), default=0),
                    "massive_tokens_at_first": max((m.first_tokens for m in massive), default=0),
                    "largest_massive": max((m.largest for m in massive), default=None),
                }
            )
        return found

    def short_rows(self) -> list[dict[str, Any]]:
        """Return the columns that fit a terminal."""
        names = {
            "label": "label", "norm": "norm", "norm_at_first": "at_first", "forgetting_factor": "forgetting",
            "identity_gain": "identity_gain", "outlier_dimensions": "outliers", "massive_dimensions": "massive",
        }  # fmt: skip
        return [{short: _few(row[name]) for name, short in names.items()} for row in self.rows()]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw |x_k| along depth: median and quartiles over tokens, and position 0 by itself."""
        with style():
            ax, x = axes(ax), list(range(len(self.labels)))
            ax.plot(x, self.median, "o-", markersize=2.5, color=PALETTE["attn"], label="median, quartiles")
            interval(ax, x, list(self.lower_quartile), list(self.upper_quartile), PALETTE["attn"])
            if np.isfinite(self.mean_at_first).all():
                ax.plot(x, self.mean_at_first, "--", color=PALETTE["mlp"], linewidth=1.2, label="position 0, mean")
            ax.set_yscale("log")
            integer_ticks(ax)
            return finish(ax, x="State (sublayers done)", y="Size of the state |x|", title=self.title)


class StateTally:
    """Folds the states of blocks in; nothing grows with the number of tokens."""

    def __init__(self, stream: Stream, norms: Mapping[int, FrozenNorm], factors: Sequence[Factor]) -> None:
        count = len(stream.steps) + 1
        self._stream, self._norms, self._factors = stream, norms, factors
        self._sizes, self._first, self._forgetting = Moments(count), Moments(count), Moments(count)
        self._quantiles = Quantiles(count)
        self._energy = np.zeros(count)
        self._square = torch.zeros(count, stream.d_model, dtype=torch.float64)
        self._sampled = torch.zeros(count, stream.d_model, dtype=torch.float64)
        self._massive: dict[tuple[int, int], tuple[int, int, float]] = {}
        self._tokens = 0

    def look(self, index: int, size: Tensor, position: Tensor, sample: Tensor) -> None:
        """Look for what stands out in a state, of which `size` has the sizes of the entries, (token, d_model)."""
        big = torch.nonzero(size.amax(-1) > MASSIVE_SIZE)[:, 0]
        if len(big):
            flat = size.flatten()
            typical = flat[:: max(1, len(flat) // _ENTRIES)].median()
            found = ((size[big] > MASSIVE_SIZE) & (size[big] >= MASSIVE_RATIO * typical)).cpu()
            rows, first = size[big].cpu(), position[big.cpu()] == 0
            for dimension in torch.nonzero(found.any(0))[:, 0].tolist():
                at = found[:, dimension]
                self._note(index, dimension, int(at.sum()), int((at & first).sum()), float(rows[at, dimension].max()))
        if len(sample):
            known = size[sample]
            count: Tensor | int = len(sample)
            if float(known.amax()) > MASSIVE_SIZE:
                massive = (known > MASSIVE_SIZE) & (known >= MASSIVE_RATIO * typical)
                known = known.masked_fill(massive, 0.0)
                count = (~massive).sum(0).cpu()
            self._square[index] += known.square().sum(0, dtype=torch.float64).cpu()
            self._sampled[index] += count

    def _note(self, index: int, dimension: int, tokens: int, first: int, largest: float) -> None:
        old = self._massive.get((index, dimension), (0, 0, 0.0))
        self._massive[index, dimension] = old[0] + tokens, old[1] + first, max(old[2], largest)

    def add(self, sizes: Tensor, position: Tensor) -> None:
        """Fold |x_k| in, (state, token)."""
        later = position != 0
        self._sizes.add(sizes[:, later])
        self._first.add(sizes[:, ~later])
        self._quantiles.add(sizes[:, later])
        self._tokens += len(position)

    def merge(self, other: StateTally) -> None:
        """Fold another partial result of the same stream in."""
        for name in ("_sizes", "_first", "_forgetting", "_quantiles"):
            getattr(self, name).merge(getattr(other, name))
        self._energy += other._energy
        self._square += other._square
        self._sampled += other._sampled
        for (index, dimension), values in other._massive.items():
            self._note(index, dimension, *values)
        self._tokens += other._tokens

    def result(self, title: str) -> StateNormsResult:
        """Return what was found so far."""
        stream, plain = self._stream, not self._energy[0]
        rms = (self._square / self._sampled.clamp_min(1)).sqrt()
        out = rms > OUTLIER_RATIO * rms.median(-1, keepdim=True).values
        everywhere = self._sizes.mean * self._sizes.count + np.nan_to_num(self._first.mean) * self._first.count
        forgetting = np.where(np.arange(len(rms)) > 0, 1.0, np.nan) if plain else self._forgetting.mean
        return StateNormsResult(
            title=f"Size of the states: {title}",
            labels=stream.state_labels,
            mean=self._sizes.mean,
            lower_quartile=self._quantiles.at(0.25),
            median=self._quantiles.at(0.5),
            upper_quartile=self._quantiles.at(0.75),
            mean_with_first=everywhere / (self._sizes.count + self._first.count),
            mean_at_first=self._first.mean,
            forgetting_factor=forgetting,
            identity_gain=np.ones(len(rms)) if plain else np.sqrt(self._energy / self._energy[0]),
            outlier_dimensions=tuple(tuple(np.flatnonzero(row).tolist()) for row in out.numpy()),
            massive=tuple(MassiveActivation(k, d, *seen) for (k, d), seen in sorted(self._massive.items())),
            layer_states=np.asarray(stream.layer_states, np.int64),
            tokens=self._tokens,
        )

    def skips(self, block: Block) -> SkipWalk:
        """Begin to follow the skips of a block."""
        return SkipWalk(self, block)


class SkipWalk:
    """What the skips of one block keep of each state, and of x_0 all the way."""

    def __init__(self, tally: StateTally, block: Block) -> None:
        self._tally, self._later = tally, block.position != 0
        self._rstds = {n.state: block.norms[i][1] for i, n in enumerate(tally._stream.norms)}
        self._carried: Tensor | None = None

    def step(self, index: int, state: Tensor) -> None:
        """Follow the skip of one step, from the state (token, d_model) float32 before it; in order."""
        if self._carried is None:
            self._carried = state[self._later]
            self._tally._energy[0] += float(self._carried.double().square().sum())
        read = state[self._later]
        after = self._kept(index, read)
        ratio = torch.linalg.vector_norm(after, dim=-1) / torch.linalg.vector_norm(read, dim=-1).clamp_min(1e-30)
        self._tally._forgetting.add(ratio, index + 1)
        self._carried = self._kept(index, self._carried)
        self._tally._energy[index + 1] += float(self._carried.double().square().sum())

    def _kept(self, index: int, vectors: Tensor) -> Tensor:
        norm = self._tally._norms.get(index + 1)
        vectors = times(vectors, self._tally._factors[index])
        return vectors if norm is None else norm.linear(vectors, self._rstds[index + 1][self._later])


def _few(value: Any) -> Any:
    """Cut a list of dimensions to what fits a cell."""
    if not isinstance(value, list):
        return value
    return " ".join(map(str, value[:4])) + (f" +{len(value) - 4}" if len(value) > 4 else "") if value else None
