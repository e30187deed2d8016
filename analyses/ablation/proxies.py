"""What the states alone say about how much a layer matters, without running the model again.

Block Influence is Men et al.'s (2403.03853), the angular distance Gromov et al.'s (2403.17887), the relative write
Csordás et al.'s (2505.13898). They cost one pass over the stored states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from streamlens.analyses.ablation.spans import Drop, extent, touched
from streamlens.analyses.statistics import Floats, Moments
from streamlens.anatomy import Stream
from streamlens.block import Block
from streamlens.errors import MissingDataError

PROXIES = ("block_influence", "relative_write", "angular_distance")


class Proxies:
    """Block Influence, relative write and angular distance of each unit.

    Args:
        stream: the stream.
        units: what is measured; a unit with a gap in it is measured from its first state to its last.
    """

    def __init__(self, stream: Stream, units: Sequence[Drop]) -> None:
        self._stream = stream
        self._units = tuple(units)
        self._moments = {name: Moments(len(units)) for name in PROXIES}

    def update(self, block: Block) -> None:
        """Take one more block into account."""
        docs, positions = block.shape
        running = _Running(block)
        # Sorted, so that a contiguous block of layers follows the one that it adds a layer to: no write is added twice.
        for index in sorted(range(len(self._units)), key=lambda i: self._units[i].sublayers):
            try:
                before, after, write = self._measured(block, self._units[index], running)
            except MissingDataError:
                continue  # a narrowed capture can hold all that a run needs, and not the state after it: no proxy then
            later = torch.arange(positions, device=before.device).repeat(docs) > 0
            cosine = torch.cosine_similarity(before, after, dim=-1).clamp(-1.0, 1.0)
            size = torch.linalg.vector_norm(write, dim=-1) / torch.linalg.vector_norm(before, dim=-1).clamp_min(1e-6)
            self._moments["block_influence"].add((1.0 - cosine)[later], index)
            self._moments["relative_write"].add(size[later], index)
            angle = torch.arccos(cosine.reshape(docs, positions)[:, -1]) / torch.pi
            self._moments["angular_distance"].add(angle, index)

    def merge(self, other: Proxies) -> None:
        """Fold another partial result in."""
        for name, moments in self._moments.items():
            moments.merge(other._moments[name])

    def result(self) -> Mapping[str, Floats]:
        """(unit,) the mean of each proxy: without position 0; the angular distance at each window's last token."""
        return {name: np.array(moments.mean) for name, moments in self._moments.items()}

    def _measured(self, block: Block, unit: Drop, running: _Running) -> tuple[Tensor, Tensor, Tensor]:
        first, last = extent(self._stream, unit)
        before, write = running.state(first), running.write(unit.sublayers)
        steps = touched(self._stream, unit)
        if len(steps) == 1 and len(steps[first]) < len(self._stream.steps[first].sublayers):
            return before, before + write, write  # one of two parallel writes has no state of its own after it
        return before, block.states[last].double(), write


class _Running:
    """The state and the sum of writes that were asked for last, in float64: the next ones often begin with them."""

    def __init__(self, block: Block) -> None:
        self._block = block
        self._at, self._state = -1, torch.empty(0)
        self._added: tuple[int, ...] = ()
        self._sum = torch.empty(0)

    def state(self, index: int) -> Tensor:
        if index != self._at:
            self._state, self._at = self._block.states[index].double(), index
        return self._state

    def write(self, sublayers: tuple[int, ...]) -> Tensor:
        have = len(self._added)
        if have and sublayers[:have] == self._added:
            total, rest = self._sum, sublayers[have:]
        else:
            total, rest = torch.zeros_like(self._block.writes[sublayers[0]], dtype=torch.float64), sublayers
        for s in rest:
            total = total + self._block.writes[s].double()
        self._added, self._sum = sublayers, total
        return total


def rank_correlation(proxy: Floats, score: Floats) -> tuple[float, float]:
    """Return Spearman's rank correlation and its p-value; NaN with fewer than three values or without any spread."""
    from scipy.stats import spearmanr

    known = np.isfinite(proxy) & np.isfinite(score)
    if known.sum() < 3 or np.ptp(proxy[known]) == 0 or np.ptp(score[known]) == 0:
        return float("nan"), float("nan")
    found = spearmanr(proxy[known], score[known])
    return float(found.statistic), float(found.pvalue)


def rank_interval(proxy: Floats, drawn: Floats) -> tuple[float, float]:
    """Return the ends of the 95 % percentile interval of Spearman's rank correlation; NaN where there is none.

    Args:
        proxy: (unit,).
        drawn: (unit, draw) the score of each unit in each draw, up to a factor for each draw.

    >>> rank_interval(np.arange(3.0), np.array([[1.0, 5.0], [2.0, 6.0], [3.0, 7.0]]))
    (1.0, 1.0)
    """
    from scipy.stats import rankdata

    known = np.isfinite(proxy)
    draws = drawn[known][:, np.isfinite(drawn[known]).all(0)]
    x, y = rankdata(proxy[known]), rankdata(draws, axis=0)
    x, y = x - x.mean(), y - y.mean(0)
    size = np.sqrt((x @ x) * (y * y).sum(0))
    rho = (x @ y)[size > 0] / size[size > 0]
    if known.sum() < 3 or not len(rho):
        return float("nan"), float("nan")
    low, high = np.quantile(rho, [0.025, 0.975])
    return float(low), float(high)
