"""Fold blocks of a stream into contribution norms; nothing grows with the number of tokens.

A block is gone through once, in the order of the stream: each tensor is read, measured while it is in the cache, and
forgotten. What is left of it are a few numbers per token, from which everything else follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from einops import einsum
from torch import Tensor

from streamlens.analyses.frozen import stream_norms
from streamlens.analyses.heads import Projection
from streamlens.analyses.norms.answer import NormsResult
from streamlens.analyses.norms.cosines import WriteCosinesResult
from streamlens.analyses.norms.measures import (
    MEASURES,
    OVERLAPPING,
    SUBLAYER_KINDS,
    Contribution,
    pair,
    proximities,
)
from streamlens.analyses.norms.states import StateTally
from streamlens.analyses.sampling import some_rows
from streamlens.analyses.source import Source, target_ids
from streamlens.analyses.statistics import Moments, Quantiles
from streamlens.analyses.transport import BIAS, demand_close, factors_of, pulled_back, times, transported
from streamlens.analyses.unembedding import Unembedding
from streamlens.block import Block
from streamlens.errors import MissingDataError

_dot = torch.linalg.vecdot

_FRAME_BYTES = 8 << 20
"""Size of all terms of the tokens that are carried to the last state at once."""


def _absolute(vectors: Tensor) -> Tensor:
    return vectors.abs().sum(-1)  # four times as fast as torch.linalg.vector_norm with ord=1


def _norm(vectors: Tensor) -> Tensor:
    square: Tensor = _dot(vectors, vectors)
    return square.sqrt()


class ContributionNorms:
    """Contribution norms of one stream, block by block."""

    def __init__(
        self,
        source: Source,
        *,
        sample: int = 512,
        projections: Mapping[int, Projection] | None = None,
        unembedding: Unembedding | None = None,
    ) -> None:
        """Prepare the rows.

        Args:
            source: where the blocks come from.
            sample: so many first tokens, less the first of each window, are those over which cosines between writes
                and outlier dimensions are taken.
            projections: output projections by sublayer, for rows of single heads.
            unembedding: the way to the logits, for direct attribution.
        """
        self.source, self.stream = source, source.stream
        self._norms = stream_norms(self.stream, source.parameters)
        self._factors = factors_of(self.stream, source.parameters)
        self._plain = not self._norms and self._factors.plain
        self._centred = any(n.state is None and n.form == "layer_norm" for n in self.stream.norms)
        self._projections, self._unembedding = projections or {}, unembedding
        self._sample, self.tokens = sample, 0
        self.contributions = self._rows()
        self._row = {(c.kind, c.label): i for i, c in enumerate(self.contributions)}
        shape = len(self.contributions), len(MEASURES)
        self.without_first, self.with_first, self.quantiles = Moments(*shape), Moments(*shape), Quantiles(*shape)
        self.states = StateTally(self.stream, self._norms, self._factors.skips)
        count = len(self.stream.sublayers)
        self._cosines, self._sampled = torch.zeros(count, count, dtype=torch.float64), 0

    def update(self, block: Block) -> Tensor:
        """Fold one block in.

        Returns:
            (row, measure, token) float32, what was measured at each token; NaN where a measure has no meaning.
        """
        count = block.stop - block.start
        table = torch.full((len(self.contributions), len(MEASURES), count), torch.nan)
        _Walk(self, block, table).run()
        if self._plain:
            self._demand_whole(block, table)
        else:
            self._walk_back(block, _direction(block, self._centred), "projection_share", table)
            self._final_frame(block, table)
        if self._unembedding is not None:
            targets = target_ids(self.source, block)
            self._walk_back(block, self._unembedding.directions(block, targets), "logit_attribution", table)
            table[:, MEASURES.index("logit_attribution"), targets < 0] = torch.nan
        self.with_first.add(table)
        later = table[..., block.position != 0]
        self.without_first.add(later)
        self.quantiles.add(later)
        self.tokens += count
        return table

    def merge(self, other: ContributionNorms) -> None:
        """Fold another partial result of the same stream in."""
        for name in ("without_first", "with_first", "quantiles", "states"):
            getattr(self, name).merge(getattr(other, name))
        self._cosines += other._cosines
        self._sampled += other._sampled
        self.tokens += other.tokens

    def result(self) -> NormsResult:
        """Return what was found so far."""
        mean = self.without_first.mean
        write, read = MEASURES.index("write_norm"), MEASURES.index("read_norm")
        return NormsResult(
            title=f"Contribution norms: {self.source.description}",
            contributions=self.contributions,
            mean=mean,
            mean_with_first=self.with_first.mean,
            lower_quartile=self.quantiles.at(0.25),
            median=self.quantiles.at(0.5),
            upper_quartile=self.quantiles.at(0.75),
            ratio_of_means=mean[:, write] / mean[:, read],
            states=self.states.result(self.source.description),
            cosines=WriteCosinesResult(
                title=f"Cosines of writes: {self.source.description}",
                labels=self.stream.labels,
                matrix=(self._cosines / max(1, self._sampled)).numpy(),
                tokens=self._sampled,
            ),
            n_tokens=self.tokens,
        )

    def _rows(self) -> tuple[Contribution, ...]:
        rows = [Contribution(part.label, "embed", None) for part in self.stream.parts]
        for sublayer in self.stream.sublayers:
            rows.append(Contribution(sublayer.label, sublayer.kind, sublayer.layer))
            heads = len(self._projections[sublayer.index].weight) if sublayer.index in self._projections else 0
            rows += [Contribution(f"{sublayer.label}.{head}", "head", sublayer.layer) for head in range(heads)]
        rows += [Contribution(f"bias:{n.label}", BIAS, None) for n in self.stream.norms if n.state is not None]
        rows += [Contribution(f"layer.{layer}", "layer", layer) for layer in range(self.stream.layers)]
        return tuple(rows)

    def _put(self, table: Tensor, kind: str, label: str, rows: Tensor | None = None, **values: Tensor) -> None:
        row = table[self._row[kind, label]]
        for measure, value in values.items():
            row[MEASURES.index(measure), slice(None) if rows is None else rows] = value.to(row)

    def _walk_back(self, block: Block, direction: Tensor, measure: str, table: Tensor) -> None:
        """Measure every part along a direction at the last state, through all norms that it passes on its way."""
        for summand, along in pulled_back(self.stream, self._norms, block, direction, factors=self._factors):
            self._put(table, summand.kind, summand.label, **{measure: _dot(summand.vectors, along)})
            if summand.kind in ("attn", "cross_attn") and summand.index in self._projections:
                self._heads_along(block, summand.index, along, measure, table)

    def _heads_along(self, block: Block, sublayer: int, along: Tensor, measure: str, table: Tensor) -> None:
        heads, _ = self._projections[sublayer].split(block.mixes[sublayer], block.writes[sublayer])
        shares = einsum(heads, along, "token head d_model, token d_model -> head token")
        for head, share in enumerate(shares):
            self._put(table, "head", f"{self.stream.sublayers[sublayer].label}.{head}", **{measure: share})

    def _demand_whole(self, block: Block, table: Tensor) -> None:
        """Make sure, on the first block, that the terms of a plain stream make up the last state.

        Along that state, where their shares are known already; other streams are looked at by `transported`.
        """
        if block.start == 0:
            own = [i for i, c in enumerate(self.contributions) if c.kind not in OVERLAPPING]
            missing = table[own, MEASURES.index("projection_share")].double().sum(0) - 1
            last = block.states[-1]
            size = 1 / _norm(_direction(block, self._centred)).cpu().double()
            demand_close(self.stream, last, (missing * size).norm() / last.cpu().double().norm())

    def _final_frame(self, block: Block, table: Tensor) -> None:
        """Measure every term as it stands in the last state, a few tokens at a time: all terms are there at once."""
        terms = len(self.stream.parts) + len(self.stream.sublayers) + len(self._norms)
        count = max(16, _FRAME_BYTES // (4 * terms * self.stream.d_model))
        layer = {s.index: s.layer for s in self.stream.sublayers}
        for start in range(0, block.stop - block.start, count):
            rows = torch.arange(start, min(start + count, block.stop - block.start))
            *_, last = transported(
                self.stream, self._norms, some_rows(block, rows, block.start + start), factors=self._factors
            )
            sums: dict[int, Tensor] = {}
            for summand in last:
                self._put(table, summand.kind, summand.label, rows, final_frame_norm=_norm(summand.vectors))
                if summand.kind in SUBLAYER_KINDS:
                    own = layer[summand.index]
                    sums[own] = sums[own] + summand.vectors if own in sums else summand.vectors
            for own, vectors in sums.items():
                self._put(table, "layer", f"layer.{own}", rows, final_frame_norm=_norm(vectors))


def _direction(block: Block, centred: bool) -> Tensor:
    """(token, d_model) x_K / |x_K|^2, without its mean where the head's norm takes that away."""
    along = block.states[-1].float()
    if centred:
        along = along - along.mean(-1, keepdim=True)
    scaled: Tensor = along / _dot(along, along).clamp_min(1e-30)[:, None]
    return scaled


class _Walk:
    """One pass over a block, from its embedding to its last state."""

    def __init__(self, norms: ContributionNorms, block: Block, table: Tensor) -> None:
        self.norms, self.stream, self.block, self.table = norms, norms.stream, block, table
        self.along = _direction(block, norms._centred) if norms._plain else None
        # By place and not by count, so that parts which are merged take the same tokens as the whole.
        chosen = (torch.arange(block.start, block.stop) < norms._sample) & (block.position != 0)
        self.sample = torch.nonzero(chosen)[:, 0]
        self.unit: list[Tensor] = []
        """For each write, (sampled token, d_model) of length one."""
        count = len(self.stream.sublayers), block.stop - block.start
        self.square, self.absolute, self.along_read = (torch.empty(count) for _ in range(3))
        """For each write: |w|^2, |w|_1, <w, the state x that it read>."""
        self.after_square, self.after_read = (torch.empty(count) for _ in range(2))
        """For each write, where terms have factors, of its sum y with the state x that it read: |y|^2, <x, y>."""
        states = len(self.stream.steps) + 1, block.stop - block.start
        self.state_square, self.state_absolute = torch.empty(states), torch.empty(states)
        layers = self.stream.layers, block.stop - block.start
        self.layer_square, self.layer_read, self.layer_states = (torch.zeros(layers) for _ in range(3))
        """For each layer, of the sum w of its writes and the state x before it: |w|^2, <w, x>, <x, state after>."""
        self.layer_after_square, self.layer_after_read = (torch.empty(layers) for _ in range(2))
        """The same as for writes."""

    def run(self) -> None:
        """Measure."""
        if self.along is not None:
            for part, vectors in zip(self.stream.parts, self.block.parts, strict=True):
                vectors = vectors.float()
                self._put(
                    "embed", part.label, projection_share=_dot(vectors, self.along), final_frame_norm=_norm(vectors)
                )
        current = self._state(0)
        opened: dict[int, tuple[Tensor, list[tuple[int, Tensor]]]] = {}
        skips = None if self.norms._plain else self.norms.states.skips(self.block)
        for index, step in enumerate(self.stream.steps):
            writes = [self._write(s, current) for s in step.sublayers]
            following = self._state(index + 1)
            self._nearness(index, current, writes, step.sublayers)
            if skips is not None:
                skips.step(index, current)
            for s, write in zip(step.sublayers, writes, strict=True):
                opened.setdefault(self.stream.sublayers[s].layer, (current, []))[1].append((s, write))
            for layer in [k for k in opened if self._ends(k) == index]:
                self._layer(layer, *opened.pop(layer), following)
            current = following
        self._derive()
        self._sampled()

    def _put(self, kind: str, label: str, **values: Tensor) -> None:
        self.norms._put(self.table, kind, label, **values)

    def _state(self, index: int) -> Tensor:
        state = self.block.states[index].float()
        sizes = state.abs()
        self.state_square[index], self.state_absolute[index] = _dot(state, state), sizes.sum(-1)
        self.norms.states.look(index, sizes, self.block.position, self.sample)
        return state

    def _write(self, s: int, state: Tensor) -> Tensor:
        write, sublayer = self.block.writes[s].float(), self.stream.sublayers[s]
        self.square[s], self.absolute[s], self.along_read[s] = _dot(write, write), _absolute(write), _dot(write, state)
        if self.along is not None:
            self._put(sublayer.kind, sublayer.label, projection_share=_dot(write, self.along))
        factors = self.norms._factors
        if not factors.plain:
            summed = times(state, factors.skips[sublayer.read]) + times(write, factors.writes[s])
            self.after_square[s], self.after_read[s] = _dot(summed, summed), _dot(summed, state)
        if s in self.norms._projections:
            self._heads(s, state)
        if len(self.sample):
            self.unit.append(torch.nn.functional.normalize(write[self.sample], dim=-1).flatten())
        return write

    def _heads(self, s: int, state: Tensor) -> None:
        if s not in self.block.mixes:
            label = self.stream.sublayers[s].label
            raise MissingDataError(
                f"the writes of the heads of {label} come from its value mix, which is not here: capture again with "
                f"--heads, or measure the live model"
            )
        written, _ = self.norms._projections[s].split(self.block.mixes[s], self.block.writes[s])
        read = _dot(state, state)
        for head in range(written.shape[1]):
            own = written[:, head]
            values = pair(read, _dot(own, own), _dot(state, own))
            self._put("head", f"{self.stream.sublayers[s].label}.{head}", **values)
        if self.along is not None:
            self.norms._heads_along(self.block, s, self.along, "projection_share", self.table)

    def _nearness(self, index: int, state: Tensor, writes: Sequence[Tensor], sublayers: Sequence[int]) -> None:
        """Proximity of each write within the sum of its step."""
        if self.norms._plain and len(writes) == 1:
            # y is the next state, y - w the one before: their sizes are known.
            whole, without = self.state_absolute[index + 1], [self.absolute[sublayers[0]], self.state_absolute[index]]
        else:
            factors = self.norms._factors
            scaled = [times(w, factors.writes[s]) for s, w in zip(sublayers, writes, strict=True)]
            terms = [times(state, factors.skips[index]), *scaled]
            total = torch.stack(terms).sum(0)
            whole, without = _absolute(total), [_absolute(total - term) for term in terms]
        for s, share in zip(sublayers, proximities(whole, without)[1:], strict=True):
            self._put(self.stream.sublayers[s].kind, self.stream.sublayers[s].label, proximity=share)

    def _ends(self, layer: int) -> int:
        return max(s.read for s in self.stream.sublayers if s.layer == layer)

    def _layer(self, layer: int, before: Tensor, writes: Sequence[tuple[int, Tensor]], after: Tensor) -> None:
        own, factors = [s for s, _ in writes], self.norms._factors
        if self.norms._plain and len(own) == 2:
            # One product more is enough: |a + m|^2, <a + m, x> and <x, x + a + m> follow from those that are known,
            # whichever of x and x + a the second branch has read.
            between = _dot(writes[0][1], writes[1][1])
            serial = self.stream.sublayers[own[1]].read > self.stream.sublayers[own[0]].read
            self.layer_square[layer] = self.square[own].sum(0) + 2 * between
            self.layer_read[layer] = self.along_read[own].sum(0) - (between if serial else 0)
            first = self.stream.sublayers[own[0]].read
            self.layer_states[layer] = self.state_square[first] + self.layer_read[layer]
            return
        # As they stand at the layer's end: later factors on the skip multiply earlier writes.
        total, carried, step = torch.zeros_like(before), before, self.stream.sublayers[own[0]].read - 1
        for s, write in writes:
            if self.stream.sublayers[s].read > step:
                step = self.stream.sublayers[s].read
                total, carried = times(total, factors.skips[step]), times(carried, factors.skips[step])
            total = total + times(write, factors.writes[s])
        self.layer_square[layer], self.layer_read[layer] = _dot(total, total), _dot(total, before)
        self.layer_states[layer] = _dot(before, after)
        if not factors.plain:
            summed = carried + total
            self.layer_after_square[layer], self.layer_after_read[layer] = _dot(summed, summed), _dot(summed, before)

    def _derive(self) -> None:
        """Everything that follows from the products, for all sublayers and layers at once."""
        reads, plain = [s.read for s in self.stream.sublayers], self.norms._factors.plain
        self.norms.states.add(self.state_square.double().sqrt(), self.block.position)
        after = None if plain else (self.after_square, self.after_read)
        found = pair(self.state_square[reads], self.square, self.along_read, after)
        self._fill([self.norms._row[s.kind, s.label] for s in self.stream.sublayers], found)
        first = list(self.stream.layer_states[:-1])
        last = [self._ends(k) + 1 for k in range(self.stream.layers)]
        after = None if plain else (self.layer_after_square, self.layer_after_read)
        found = pair(self.state_square[first], self.layer_square, self.layer_read, after)
        sizes = (self.state_square[first].double() * self.state_square[last].double()).sqrt().clamp_min(1e-30)
        found["block_influence"] = 1 - (self.layer_states.double() / sizes).clamp(-1, 1)
        self._fill([self.norms._row["layer", f"layer.{k}"] for k in range(self.stream.layers)], found)

    def _fill(self, rows: list[int], found: dict[str, Tensor]) -> None:
        if self.norms._plain:
            found["final_frame_norm"] = found["write_norm"]
        for measure, values in found.items():
            self.table[rows, MEASURES.index(measure)] = values.float()

    def _sampled(self) -> None:
        """Cosines between the writes of one token."""
        if len(self.sample):
            unit = torch.stack(self.unit)
            self.norms._cosines += (unit @ unit.T).double().cpu()
            self.norms._sampled += len(self.sample)
