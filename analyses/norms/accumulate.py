"""Fold blocks of a stream into contribution norms; nothing grows with the number of tokens."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from einops import einsum
from torch import Tensor

from streamlens.analyses.frozen import stream_norms
from streamlens.analyses.heads import Projection
from streamlens.analyses.norms.answer import NormsResult
from streamlens.analyses.norms.measures import MEASURES, Contribution, Size, pair, proximities, size
from streamlens.analyses.source import Source, target_ids
from streamlens.analyses.statistics import Moments, Quantiles
from streamlens.analyses.transport import BIAS, pulled_back, skip_factors
from streamlens.analyses.unembedding import Unembedding
from streamlens.block import Block

_COSINE_TOKENS = 256
"""Tokens whose writes are held side by side for the cosines between them."""
_OUTLIER = 10.0


class ContributionNorms:
    """Contribution norms of one stream, block by block."""

    def __init__(
        self,
        source: Source,
        *,
        sample: int = 4096,
        projections: Mapping[int, Projection] | None = None,
        unembedding: Unembedding | None = None,
    ) -> None:
        """Prepare the rows.

        Args:
            source: where the blocks come from.
            sample: tokens over which cosines between writes are taken.
            projections: output projections by sublayer, for rows of single heads.
            unembedding: the way to the logits, for direct attribution.
        """
        self.source, self.stream = source, source.stream
        self._norms = stream_norms(self.stream, source.parameters)
        self._factors = skip_factors(self.stream, source.parameters)
        self._centred = any(n.state is None and n.form == "layer_norm" for n in self.stream.norms)
        self._projections, self._unembedding = projections or {}, unembedding
        self._left, self.tokens = sample, 0
        self.contributions = self._rows()
        self._row = {(c.kind, c.label): i for i, c in enumerate(self.contributions)}
        shape = len(self.contributions), len(MEASURES)
        self.without_first, self.with_first, self.quantiles = Moments(*shape), Moments(*shape), Quantiles(*shape)
        self.states, self.gain = Moments(len(self.stream.steps) + 1), Moments(1)
        self._spread = torch.zeros(len(self.stream.steps) + 1, self.stream.d_model, dtype=torch.float64)
        count = len(self.stream.sublayers)
        self._cosines, self._sampled = torch.zeros(count, count, dtype=torch.float64), 0

    def update(self, block: Block) -> None:
        """Fold one block in."""
        table = torch.full(
            (len(self.contributions), len(MEASURES), block.stop - block.start), torch.nan, dtype=torch.float64
        )
        sizes, first = self._states(block), block.position == 0
        self._writes(block, sizes, table)
        self._layers(block, sizes, table)
        self._shares(block, sizes, table)
        self.with_first.add(table)
        table[..., first] = torch.nan
        self.without_first.add(table)
        self.quantiles.add(table)
        self._between(block)
        self.tokens += block.stop - block.start

    def merge(self, other: ContributionNorms) -> None:
        """Fold another partial result of the same stream in."""
        for name in ("without_first", "with_first", "quantiles", "states", "gain"):
            getattr(self, name).merge(getattr(other, name))
        self._spread += other._spread
        self._cosines += other._cosines
        self._sampled += other._sampled
        self.tokens += other.tokens

    def result(self) -> NormsResult:
        """Return what was found so far."""
        mean = self.without_first.mean
        write, read = MEASURES.index("write_norm"), MEASURES.index("read_norm")
        rms = (self._spread / max(1, self.tokens)).sqrt()
        flags = rms > _OUTLIER * rms.median(-1, keepdim=True).values
        return NormsResult(
            title=self.source.description,
            contributions=self.contributions,
            mean=mean,
            mean_with_first=self.with_first.mean,
            low=self.quantiles.at(0.25),
            median=self.quantiles.at(0.5),
            high=self.quantiles.at(0.75),
            state_norm=self.states.mean,
            ratio_of_means=mean[:, write] / mean[:, read],
            identity_gain=float(self.gain.mean[0]) if self._norms else 1.0,
            labels=self.stream.labels,
            cosines=(self._cosines / max(1, self._sampled)).numpy(),
            outlier_dimensions=tuple(tuple(np.flatnonzero(row).tolist()) for row in flags.cpu().numpy()),
            n_tokens=self.tokens,
        )

    def _rows(self) -> tuple[Contribution, ...]:
        rows = [Contribution(part.label, "embed", None) for part in self.stream.parts]
        for sublayer in self.stream.sublayers:
            rows.append(Contribution(sublayer.label, sublayer.kind, sublayer.layer))
            for head in range(
                len(self._projections[sublayer.index].weight) if sublayer.index in self._projections else 0
            ):
                rows.append(Contribution(f"{sublayer.label}.{head}", "head", sublayer.layer))
        rows += [Contribution(f"bias:{n.label}", BIAS, None) for n in self.stream.norms if n.state is not None]
        rows += [Contribution(f"layer.{layer}", "layer", layer) for layer in range(self.stream.layers)]
        return tuple(rows)

    def _put(self, table: Tensor, kind: str, label: str, **values: Tensor) -> None:
        for measure, value in values.items():
            table[self._row[kind, label], MEASURES.index(measure)] = value

    def _states(self, block: Block) -> list[Size]:
        kept = block.position != 0
        sizes = []
        for index in range(len(self.stream.steps) + 1):
            state = block.states[index].float()
            square = state * state
            sizes.append(Size(square.sum(-1), state.abs().sum(-1)))
            self._spread[index] += square.sum(0).double().cpu()
            self.states.add(sizes[-1].square[kept].double().sqrt(), index)
        return sizes

    def _writes(self, block: Block, sizes: list[Size], table: Tensor) -> None:
        for index, step in enumerate(self.stream.steps):
            state, factor = block.states[index].float(), self._factors[index]
            skip = state if factor == 1.0 else state * factor
            writes = [block.writes[s].float() for s in step.sublayers]
            own = [size(w) for w in writes]
            for s, write, measured in zip(step.sublayers, writes, own, strict=True):
                product = torch.linalg.vecdot(state, write)
                sublayer = self.stream.sublayers[s]
                self._put(table, sublayer.kind, sublayer.label, **pair(sizes[index].square, measured.square, product))
                self._heads(block, s, state, sizes[index], table)
            self._nearness(index, skip, writes, own, sizes, table)

    def _nearness(
        self, index: int, skip: Tensor, writes: list[Tensor], own: list[Size], sizes: list[Size], table: Tensor
    ) -> None:
        """Proximity of each write within the sum of its step."""
        plain = index + 1 not in self._norms and self._factors[index] == 1.0
        if plain and len(writes) == 1:  # y is the next state and y - w the one before: both are measured already
            whole, without = sizes[index + 1].absolute, [own[0].absolute, sizes[index].absolute]
        else:
            total = torch.stack([skip, *writes]).sum(0)
            whole, without = total.abs().sum(-1), [(total - term).abs().sum(-1) for term in (skip, *writes)]
        shares = proximities(whole, without)
        for s, share in zip(self.stream.steps[index].sublayers, shares[1:], strict=True):
            sublayer = self.stream.sublayers[s]
            self._put(table, sublayer.kind, sublayer.label, proximity=share)

    def _layers(self, block: Block, sizes: list[Size], table: Tensor) -> None:
        """All writes of one block together; Block Influence between the states before and after it."""
        for layer in range(self.stream.layers):
            own = [s for s in self.stream.sublayers if s.layer == layer]
            before, after = own[0].read, own[-1].read + 1
            state, total = block.states[before].float(), block.writes[own[0].index].float()
            for s in own[1:]:
                total = total + block.writes[s.index].float()
            values = pair(sizes[before].square, torch.linalg.vecdot(total, total), torch.linalg.vecdot(state, total))
            moved = torch.linalg.vecdot(state, block.states[after].float()).double()
            moved /= (sizes[before].square.double() * sizes[after].square.double()).sqrt().clamp_min(1e-30)
            self._put(table, "layer", f"layer.{layer}", **{**values, "block_influence": 1 - moved.clamp(-1, 1)})

    def _heads(self, block: Block, sublayer: int, state: Tensor, read: Size, table: Tensor) -> None:
        if sublayer not in self._projections:
            return
        written = self._projections[sublayer].heads(block.mixes[sublayer])
        for head in range(written.shape[1]):
            product = torch.linalg.vecdot(state, written[:, head])
            square = torch.linalg.vecdot(written[:, head], written[:, head])
            label = f"{self.stream.sublayers[sublayer].label}.{head}"
            self._put(table, "head", label, **pair(read.square, square, product))

    def _shares(self, block: Block, sizes: list[Size], table: Tensor) -> None:
        """Walk back from the last state, once along the state itself and once along the targets' logits."""
        along = block.states[-1].float()
        if self._centred:
            along = along - along.mean(-1, keepdim=True)
        scale = torch.linalg.vecdot(along, along).clamp_min(1e-30)
        self._walk(block, along / scale[:, None], "projection_share", table)
        if self._unembedding is not None:
            targets = target_ids(self.source, block)
            self._walk(block, self._unembedding.directions(block, targets), "logit_attribution", table)
            table[:, MEASURES.index("logit_attribution"), targets < 0] = torch.nan
        if self._norms:
            self._identity(block, sizes)

    def _walk(self, block: Block, direction: Tensor, measure: str, table: Tensor) -> None:
        for summand, along in pulled_back(self.stream, self._norms, block, direction, factors=self._factors):
            self._put(table, summand.kind, summand.label, **{measure: torch.linalg.vecdot(summand.vectors, along)})
            if summand.kind in ("attn", "cross_attn") and summand.index in self._projections:
                heads = self._projections[summand.index].heads(block.mixes[summand.index])
                shares = einsum(heads, along, "token head d_model, token d_model -> head token")
                for head, share in enumerate(shares):
                    self._put(table, "head", f"{summand.label}.{head}", **{measure: share})

    def _identity(self, block: Block, sizes: list[Size]) -> None:
        """The factor by which the norms shrink x_0 on its way along the skips alone."""
        rstds = {n.state: block.norms[i][1] for i, n in enumerate(self.stream.norms)}
        state = block.states[0].float()
        for index, factor in enumerate(self._factors):
            state = state if factor == 1.0 else state * factor
            if index + 1 in self._norms:
                state = self._norms[index + 1].linear(state, rstds[index + 1])
        kept = block.position != 0
        self.gain.add((torch.linalg.vector_norm(state, dim=-1) / sizes[0].square.sqrt())[kept], 0)

    def _between(self, block: Block) -> None:
        """Cosines between the writes of one token, for the first tokens only."""
        count = min(self._left, block.stop - block.start)
        for start in range(0, count, _COSINE_TOKENS):
            chosen = slice(start, min(count, start + _COSINE_TOKENS))
            writes = torch.stack([w[chosen].float() for w in block.writes])
            unit = torch.nn.functional.normalize(writes, dim=-1).flatten(1)
            self._cosines += (unit @ unit.T).double().cpu()
        self._left -= count
        self._sampled += count
