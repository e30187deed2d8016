"""The sums behind the logit lens: what is kept of each block, and how it becomes means with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamlens.analyses.lens.grid import GridKeeper, LensGrid
from streamlens.analyses.lens.head import Head, LinearHead
from streamlens.analyses.lens.metrics import METRICS, Workspace, Yardstick
from streamlens.analyses.sampling import some_rows
from streamlens.analyses.source import Source, target_ids
from streamlens.analyses.statistics import DocumentSums, Floats, Moments, Quantiles, Unit
from streamlens.analyses.team import Team
from streamlens.block import Block
from streamlens.errors import UsageError

BUDGET_BYTES = 128 << 20
"""Size of the two buffers of a chunk: the logits at one state and the final distribution."""

SPREAD = METRICS[:5]
"""The metrics of which quartiles are kept, too."""

SAMPLE_TOKENS, SAMPLE_STATES = 32, 8
"""Tokens and states on which lower precision is compared with the model's own, spread evenly over both."""


class Translators(Protocol):
    """Maps of states into the coordinates of the last one, before the head."""

    @property
    def kind(self) -> str:
        """What they are called."""

    def translate(self, k: int, state: Tensor) -> Tensor:
        """Return state x_k, (token, d_model), as the head should see it."""


@dataclass(frozen=True)
class LensOptions:
    """What is asked for."""

    states: tuple[int, ...]
    """Indices in order, with the last state."""
    top_k: tuple[int, ...]
    dtype: torch.dtype | None
    jsd: bool
    chunk_tokens: int | None
    grid_doc: int | None
    grid_positions: tuple[int, ...]
    grid_demanded: bool = False
    """Whether it is a mistake if none of these positions is there."""


@dataclass(frozen=True)
class Summary:
    """A quantity along the stream; all (state,) float64."""

    mean: Floats
    """Over tokens, without the first of each document."""
    low: Floats
    high: Floats
    """Ends of the 95 % interval of the mean, over documents, or over windows where documents are few."""
    all_positions: Floats
    """Mean over all tokens."""
    median: Floats | None = None
    lower_quartile: Floats | None = None
    upper_quartile: Floats | None = None

    def row(self, name: str, i: int) -> dict[str, float]:
        """Return the columns of one state."""
        row = {name: self.mean[i], f"{name}_low": self.low[i], f"{name}_high": self.high[i]}
        if self.median is not None and self.lower_quartile is not None and self.upper_quartile is not None:
            row[f"{name}_median"] = self.median[i]
            row[f"{name}_lower_quartile"] = self.lower_quartile[i]
            row[f"{name}_upper_quartile"] = self.upper_quartile[i]
        row[f"{name}_all_positions"] = self.all_positions[i]
        return {key: float(value) for key, value in row.items()}


class LensTally:
    """Folds blocks in. Two tallies over different tokens merge into the one over all of them.

    Args:
        source: where the tokens come from.
        head: what to look through.
        options: what is asked for.
        tuned: maps that are applied to each state before the head.

    Raises:
        UsageError: another precision for a head that only the model itself can run.
    """

    def __init__(self, source: Source, head: Head, options: LensOptions, tuned: Translators | None = None) -> None:
        self.source, self.options, self.tuned = source, options, tuned
        self.exact_head, self.head = head, _cast(head, options.dtype)
        self.names = [*METRICS, *(f"overlap_{k}" for k in options.top_k), *(["jsd"] if options.jsd else [])]
        states = len(options.states)
        self._documents = DocumentSums(len(self.names), states)
        self._moments = Moments(len(self.names), states)
        self._spread = Quantiles(len(SPREAD), states)
        self._delta_documents, self._delta_moments = DocumentSums(states - 1), Moments(states - 1)
        self._delta_spread = Quantiles(states - 1)
        self.depth: NDArray[np.int64] = np.zeros(states, np.int64)
        self.depth_all: NDArray[np.int64] = np.zeros(states, np.int64)
        self.tokens = 0
        self.precision: Mapping[str, float] | None = None
        self._keeper = GridKeeper(options.grid_doc, options.grid_positions, demanded=options.grid_demanded)
        self._work: Workspace | None = None
        alone = self.head.whole_blocks or self.head.device.type != "cpu"
        self._team = Team(1 if alone else None)

    def update(self, block: Block) -> None:
        """Fold one block in."""
        targets = target_ids(self.source, block)
        values, top = self._look(block, targets)
        if self.head is not self.exact_head and self.precision is None:
            self.precision = self._compare_precision(block, values)
        later = block.position > 0
        headline = torch.where(later, values, torch.nan)
        self._documents.add(headline, block.doc, block.window)
        self._moments.add(values)
        self._spread.add(headline[: len(SPREAD)])
        cross_entropy = values[METRICS.index("cross_entropy")]
        gained = cross_entropy[:-1] - cross_entropy[1:]
        self._delta_moments.add(gained)
        gained = torch.where(later, gained, torch.nan)
        self._delta_documents.add(gained, block.doc, block.window)
        self._delta_spread.add(gained)
        depth = prediction_depth(top)
        self.depth += torch.bincount(depth[later], minlength=len(self.depth)).numpy()
        self.depth_all += torch.bincount(depth, minlength=len(self.depth)).numpy()
        self.tokens += len(block.ids)
        self._keeper.add(block, targets, top, values[METRICS.index("top_probability")])

    def merge(self, other: LensTally) -> None:
        """Fold another tally in."""
        self._documents.merge(other._documents)
        self._moments.merge(other._moments)
        self._spread.merge(other._spread)
        self._delta_documents.merge(other._delta_documents)
        self._delta_moments.merge(other._delta_moments)
        self._delta_spread.merge(other._delta_spread)
        self.depth += other.depth
        self.depth_all += other.depth_all
        self.tokens += other.tokens
        self.precision = self.precision or other.precision
        self._keeper.merge(other._keeper)

    def _look(self, block: Block, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return (name, state, token) float64 and the likeliest tokens (state, token), on the CPU."""
        count, states = len(block.ids), self.options.states
        work = self._workspace(count)
        self.head.begin(block)
        values = torch.empty(len(self.names), len(states), count, dtype=torch.float64, device=self.head.device)
        top = torch.empty(len(states), count, dtype=torch.int64, device=self.head.device)
        for start in range(0, count, work.chunk):
            rows = slice(start, min(start + work.chunk, count))
            yardstick = Yardstick(work, self._translated(block, states[-1], rows), targets[rows])
            looked_at = (self._translated(block, k, rows) for k in states)
            for i, found in enumerate(self._team.map(yardstick.measure, looked_at)):
                values[:, i, rows] = torch.cat(
                    [found.values, found.overlap, *([] if found.jsd is None else [found.jsd[None]])]
                ).double()
                top[i, rows] = found.top
        return values.cpu(), top.cpu()

    def _translated(self, block: Block, k: int, rows: slice) -> Tensor:
        state = block.states[k][rows].to(self.head.device)
        return state if self.tuned is None else self.tuned.translate(k, state)

    def _workspace(self, count: int) -> Workspace:
        most = count if self.head.whole_blocks else min(self.options.chunk_tokens or self._affordable(), count)
        chunk = math.ceil(count / math.ceil(count / most))  # even pieces: a small last one would cost as much
        if self._work is None or self._work.chunk < chunk or self.head.whole_blocks:
            own = getattr(self.exact_head, "weight", None)
            wide = torch.float64 if own is not None and own.dtype == torch.float64 else torch.float32
            self._work = Workspace(self.head, chunk, self.options.top_k, wide, self.options.jsd)
        return self._work

    def _affordable(self) -> int:
        return max(16, BUDGET_BYTES // (2 * 4 * self.head.vocab) // 16 * 16)

    def _compare_precision(self, block: Block, values: Tensor) -> dict[str, float]:
        """Look at some tokens and states in the model's own precision, too: values are (name, state, token)."""
        rows, some = _spread(len(block.ids), SAMPLE_TOKENS), _spread(len(self.options.states), SAMPLE_STATES)
        states = tuple(self.options.states[i] for i in some)
        options = LensOptions(states, self.options.top_k, None, False, None, None, ())
        tally = LensTally(self.source, self.exact_head, options, self.tuned)
        exact = tally._look(some_rows(block, rows, block.start), target_ids(self.source, block)[rows])[0]
        error = (values[:, some][..., rows][: len(exact)] - exact).abs()
        report = {"tokens": float(len(rows)), "states": float(len(states))}
        for name in ("kl", "entropy", "cross_entropy"):
            of = error[METRICS.index(name)]
            report[f"{name}_error_max"] = float(of.nan_to_num(0).max())
            report[f"{name}_error_mean"] = float(of.nanmean())
            report[f"{name}_error_share"] = float(of.nansum() / exact[METRICS.index(name)].nansum())
        return report

    @property
    def documents(self) -> int:
        """Number of documents."""
        return self._documents.documents

    @property
    def unit(self) -> Unit:
        """What intervals are over."""
        return self._documents.unit

    def summaries(self) -> dict[str, Summary]:
        """Return every metric, each over (state,)."""
        low, high = self._documents.intervals()
        mean, everywhere = self._documents.mean, self._moments.mean
        quartiles = [self._spread.at(share) for share in (0.5, 0.25, 0.75)]
        ranks = [i for i, name in enumerate(SPREAD) if name.endswith("rank")]
        for q in quartiles:
            q[ranks] = q[ranks].round()  # they are integers: exact up to 99, where the sketch is within half of one
        found = {}
        for i, name in enumerate(self.names):
            spread = [q[i] for q in quartiles] if name in SPREAD else []
            found[name] = Summary(mean[i], low[i], high[i], everywhere[i], *spread)
        return found

    def delta(self) -> Summary:
        """Return what each step adds to the log-probability of the target, over (step,)."""
        low, high = self._delta_documents.intervals()
        spread = [self._delta_spread.at(share) for share in (0.5, 0.25, 0.75)]
        return Summary(self._delta_documents.mean, low, high, self._delta_moments.mean, *spread)

    def grid(self, title: str) -> LensGrid | None:
        """Return the tokens that were kept one by one.

        Raises:
            UsageError: none of those asked for is there.
        """
        labels = self.source.stream.state_labels
        chosen = tuple(labels[k] for k in self.options.states)
        return self._keeper.result(title, self.options.states, chosen, self.source)


def prediction_depth(top: Tensor) -> Tensor:
    """Return the first state from which the likeliest token is the final one, (token,) int64.

    Args:
        top: (state, token) likeliest tokens.

    >>> prediction_depth(torch.tensor([[5, 1, 2], [5, 2, 2], [5, 1, 2], [5, 1, 7]])).tolist()
    [0, 2, 3]
    """
    settled = (top == top[-1]).flip(0).cumprod(0)
    return len(top) - settled.sum(0)


def _spread(count: int, most: int) -> Tensor:
    """Return at most so many indices of 0 ... count - 1, first and last among them."""
    return torch.linspace(0, count - 1, min(most, count)).round().long()


def _cast(head: Head, dtype: torch.dtype | None) -> Head:
    if dtype is None or (isinstance(head, LinearHead) and head.weight.dtype == dtype):
        return head
    if not isinstance(head, LinearHead):
        raise UsageError(f"this head cannot be given another precision ({head.description}): leave dtype out")
    return head.to(dtype)
