"""What is said about one distribution over the vocabulary beside another, in as few passes over the logits as possible.

A chunk of logits is far larger than anything it is reduced to, so the passes over it decide the cost. They run over a
few rows at a time, which stay in the processor's cache; nothing as large as the chunk is allocated; log-probabilities
are never written down: with m the largest logit of a row, z' = z - m and Z = sum exp z',

    KL(p||q) = sum p (z'_p - z'_q) - log Z_p + log Z_q    H(q) = log Z_q - sum exp(z'_q) z'_q / Z_q
    log q(t) = z'_q(t) - log Z_q                          rank(t) = #{v: z'_q(v) > z'_q(t)}

Where logits are the product h W^T and nothing else, sum p z_q = h (p W), and p W is the same for all states.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamlens.analyses.lens.head import Head

METRICS = ("kl", "entropy", "cross_entropy", "target_rank", "top1_rank", "top_probability")
"""What is measured of each token beside the overlaps; the last is the probability of the likeliest token."""

CACHE_BYTES = 3 << 20
"""Size of the rows that are worked on at once: about what one core keeps close."""

_GROUP = 128


@dataclass
class Measured:
    """What was found for some tokens at one state."""

    values: Tensor
    """(metric, token) in the order of `METRICS`, NaN where there is no target."""
    overlap: Tensor
    """(k, token) share of the k likeliest tokens that the k likeliest of the final distribution are."""
    top: Tensor
    """(token,) int64, the likeliest token."""
    jsd: Tensor | None
    """(token,) Jensen-Shannon divergence, if asked for."""


class _Desk(threading.local):
    """The buffers that one thread writes to; each thread that comes gets its own."""

    def __init__(self, chunk: int, rows: int, vocab: int, narrow: torch.dtype, wide: torch.dtype, device: torch.device):
        self.raw = torch.empty(chunk, vocab, dtype=narrow, device=device)
        self.scratch = torch.empty(rows, vocab, dtype=wide, device=device)
        self.widened = torch.empty(rows, vocab, dtype=wide, device=device) if narrow != wide else None


class Workspace:
    """Buffers for one size of chunk, used again and again, by several threads at once.

    Args:
        head: what makes the logits.
        chunk: number of tokens.
        ks: how many of the likeliest tokens to compare, in order.
        wide: dtype of the reductions, float32 or float64.
        jsd: whether the Jensen-Shannon divergence is wanted.
    """

    def __init__(self, head: Head, chunk: int, ks: Sequence[int], wide: torch.dtype, jsd: bool = False) -> None:
        self.head, self.chunk, self.ks, self.wide, self.jsd = head, chunk, tuple(ks), wide, jsd
        narrow = head.dtype or wide
        vocab, device = head.vocab, head.device
        fits = CACHE_BYTES // (vocab * wide.itemsize) if device.type == "cpu" else chunk
        self.rows = max(1, min(chunk, fits))
        self._final = torch.empty(chunk, vocab, dtype=wide, device=device)
        self._desk = _Desk(chunk, self.rows, vocab, narrow, wide, device)

    def logits(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return h (token, width) and raw logits (token, vocab), in a buffer of this thread until its next call."""
        hidden, raw = self.head.hidden(states), self._desk.raw[: len(states)]
        self.head.product(hidden, raw)
        return hidden, raw

    def blocks(self, raw: Tensor) -> list[tuple[slice, Tensor]]:
        """Cut raw logits into rows that stay in the cache."""
        return [(slice(a, min(a + self.rows, len(raw))), raw[a : a + self.rows]) for a in range(0, len(raw), self.rows)]

    def finished(self, raw: Tensor) -> Tensor:
        """Turn some rows of raw logits into logits in the wide type, in place where they are wide already."""
        if self._desk.widened is not None:
            raw = self._desk.widened[: len(raw)].copy_(raw)
        self.head.finish(raw)
        return raw

    def scratch(self, rows: int) -> Tensor:
        """(rows, vocab) in the wide type, overwritten by whoever asks next."""
        return self._desk.scratch[:rows]

    def final(self, rows: int) -> Tensor:
        """(rows, vocab) where the final distribution is held."""
        return self._final[:rows]


class Yardstick:
    """The final distribution of a chunk of tokens, to hold others against.

    Args:
        work: the buffers.
        states: (token, d_model) last states.
        targets: (token,) int64 token that each should predict; negative where there is none.

    >>> from streamlens.analyses.lens.trace import Chain
    >>> from streamlens.analyses.lens.head import LinearHead
    >>> head = LinearHead(Chain.of(None), torch.eye(4), ())
    >>> states = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    >>> yardstick = Yardstick(Workspace(head, 1, (1, 2), torch.float32), states, torch.tensor([2]))
    >>> found = yardstick.measure(states)
    >>> dict(zip(METRICS, [round(v, 3) for v in found.values[:, 0].tolist()]))["cross_entropy"]
    1.44
    >>> found.values[0].item(), found.overlap[:, 0].tolist(), found.top.tolist()
    (0.0, [1.0, 1.0], [3])
    """

    def __init__(self, work: Workspace, states: Tensor, targets: Tensor) -> None:
        self.work = work
        device = work.head.device
        self._known = ((targets >= 0) & (targets < work.head.vocab)).to(device)
        self._targets = targets.to(device).clamp(0, work.head.vocab - 1)
        hidden, raw = work.logits(states)
        count = len(raw)
        self._probability = work.final(count)
        self._cross, self._log_total, largest = torch.empty(3, count, dtype=work.wide, device=device)
        tops = []
        for rows, part in work.blocks(raw):
            z = work.finished(part)
            values, ids = top_k(z, max(work.ks))
            z.sub_(values[:, :1])
            p = _exp(z, out=work.scratch(len(z)))
            total = p.sum(-1, keepdim=True)
            self._probability[rows] = p.div_(total)
            # Made as `measure` makes its counterpart, so that the divergence of a distribution from itself is 0.
            self._cross[rows] = p.mul_(z).sum(-1)
            self._log_total[rows], largest[rows] = total[:, 0].log(), values[:, 0]
            tops.append(ids)
        self._top = torch.cat(tops)
        self._weights = work.head.expectation(self._probability)
        expected = self._expected(hidden)
        if expected is not None:
            self._cross = expected - largest

    def measure(self, states: Tensor) -> Measured:
        """Return how the distributions of other states of the same tokens compare.

        Args:
            states: (token, d_model).
        """
        work = self.work
        hidden, raw = work.logits(states)
        count, device, wide = len(raw), raw.device, work.wide
        expected = self._expected(hidden)
        values = torch.empty(len(METRICS), count, dtype=wide, device=device)
        overlap = torch.empty(len(work.ks), count, dtype=wide, device=device)
        top = torch.empty(count, dtype=torch.int64, device=device)
        jsd = torch.empty(count, dtype=wide, device=device) if work.jsd else None
        for rows, part in work.blocks(raw):
            z = work.finished(part)
            largest, ids = top_k(z, max(work.ks))
            z.sub_(largest[:, :1])
            top[rows] = ids[:, 0]
            for i, k in enumerate(work.ks):
                overlap[i, rows] = _shared(ids[:, :k], self._top[rows, :k])
            if expected is None:
                cross = torch.mul(self._probability[rows], z, out=work.scratch(len(z))).sum(-1)
            else:
                cross = expected[rows] - largest[:, 0]
            values[0, rows] = self._cross[rows] - cross
            self._reduce(z, rows, values, jsd)
        return Measured(values, overlap, top, jsd)

    def _expected(self, hidden: Tensor) -> Tensor | None:
        """Return the mean logit (token,) under the final distribution, if it can be told without the logits."""
        if self._weights is None:
            return None
        return (hidden.to(self._weights.dtype).to(self.work.wide) * self._weights).sum(-1, dtype=self.work.wide)

    def _reduce(self, z: Tensor, rows: slice, values: Tensor, jsd: Tensor | None) -> None:
        e = self.work.scratch(len(z))
        known = self._known[rows]
        if bool(known.any()):
            at = z.gather(1, self._targets[rows, None])
            values[2, rows] = -at[:, 0]
            values[3, rows] = torch.gt(z, at, out=e).sum(-1)
        values[4, rows] = torch.gt(z, z.gather(1, self._top[rows, :1]), out=e).sum(-1)
        _exp(z, out=e)
        total = e.sum(-1)
        log_total = total.log()
        if jsd is not None:
            jsd[rows] = _jsd(self._probability[rows], e / total[:, None])
        values[0, rows] = (values[0, rows] - (self._log_total[rows] - log_total)).clamp_min(0)  # below it is rounding
        values[1, rows] = log_total - e.mul_(z).sum(-1) / total
        values[2, rows] += log_total
        values[2:4, rows] = torch.where(known, values[2:4, rows], torch.nan)
        values[5, rows] = 1 / total


def top_k(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of each row and where they are, each (row, k), largest first.

    The same as `torch.topk`, which takes longer than all else over a vocabulary: the k largest lie in the k groups
    with the largest maxima, and finding those is one pass.

    >>> z = torch.randn(3, 5000)
    >>> values, ids = top_k(z, 10)
    >>> torch.equal(values, z.topk(10).values), torch.equal(z.gather(1, ids), values)
    (True, True)
    """
    vocab = z.shape[-1]
    k = min(k, vocab)
    groups = vocab // _GROUP
    if groups < 4 * k:
        found = z.topk(k, sorted=True)
        return found.values, found.indices
    # Group g is every `groups`-th logit from g on, so that the maxima are taken across whole rows of memory.
    grouped = z[:, : groups * _GROUP].view(len(z), _GROUP, groups)
    best = grouped.amax(1).topk(k).indices
    candidates = grouped.gather(2, best[:, None].expand(-1, _GROUP, -1)).flatten(1)
    found = torch.cat([candidates, z[:, groups * _GROUP :]], 1).topk(k, sorted=True)
    at, inside = found.indices, _GROUP * k
    ids = at.div(k, rounding_mode="floor") * groups + best.gather(1, at % k)
    return found.values, torch.where(at < inside, ids, at - inside + groups * _GROUP)


def _exp(z: Tensor, *, out: Tensor) -> Tensor:
    """exp(z): on a processor by way of 2^x, which PyTorch computes several times as fast."""
    torch.mul(z, math.log2(math.e), out=out)
    return out.exp2_()


def _shared(first: Tensor, second: Tensor) -> Tensor:
    """(token, k) and (token, k) -> (token,) share of ids that both have."""
    return (first[:, :, None] == second[:, None, :]).any(-1).to(torch.float32).mean(-1)


def _jsd(p: Tensor, q: Tensor) -> Tensor:
    middle: Tensor = torch.special.entr((p + q) / 2).sum(-1)
    mean: Tensor = (torch.special.entr(p).sum(-1) + torch.special.entr(q).sum(-1)) / 2
    return (middle - mean).clamp(0.0, math.log(2.0))
