"""A few positions of one document under the lens, in full: every state's likeliest tokens, and where tokens come from.

The logit lens averages over a text; this keeps what it says at single positions. Of each position some tokens are
followed through all states: the one that came, the model's final favourites, and whatever was in the lead on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from streamlens.analyses.figures import PALETTE, axes, finish
from streamlens.analyses.lens.grid import TokenTable, shown, some_tokens, texts
from streamlens.analyses.lens.head import Head, head_of
from streamlens.analyses.lens.metrics import top_k as largest
from streamlens.analyses.sampling import some_rows
from streamlens.analyses.source import Corpus, Origin, Source, source_of, target_ids
from streamlens.analyses.statistics import Floats
from streamlens.block import Block
from streamlens.calling import eager_math
from streamlens.checkpoint.model import Model
from streamlens.errors import UsageError
from streamlens.rest import resting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DEFAULT_POSITIONS = 32


@dataclass(frozen=True)
class TokenTracks(TokenTable):
    """What the lens shows at each state and a few positions of one document; a row of the table is a state."""

    head: str
    """What the states were looked at through."""
    kl: Floats
    """(state, position) KL divergence of the final distribution from the state's, nats."""
    entropy: Floats
    """(state, position) nats."""
    target_rank: Floats
    """(state, position) number of tokens that are likelier than the target; NaN where there is none."""
    top: NDArray[np.int64]
    """(state, position, k) the likeliest tokens, in order."""
    top_probability: Floats
    """(state, position, k) their probabilities."""
    followed: tuple[NDArray[np.int64], ...]
    """For each position, (token,) the tokens that are followed there."""
    rank: tuple[NDArray[np.int64], ...]
    """For each position, (state, token) number of tokens that are likelier."""
    probability: tuple[Floats, ...]
    """For each position, (state, token)."""

    @property
    def cells(self) -> NDArray[np.int64]:
        """(state, position) the likeliest token."""
        return self.top[..., 0]

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each state and position."""
        return [
            {
                "state": k,
                "label": label,
                "position": int(self.position[j]),
                "read": self.word(self.ids[j]),
                "target": self.word(self.targets[j]),
                "prediction": self.word(self.top[k, j, 0]),
                "probability": float(self.top_probability[k, j, 0]),
                "kl": float(self.kl[k, j]),
                "entropy": float(self.entropy[k, j]),
                "target_rank": float(self.target_rank[k, j]),
            }
            for k, label in enumerate(self.labels)
            for j in range(len(self.position))
        ]

    def plot(self, ax: Axes | None = None, *, at: int | None = None, most: int = 5) -> Axes:
        """Draw the probability of the followed tokens of one position along the stream.

        Args:
            ax: where to draw; by default a new figure.
            at: which position, one of `position`; by default the last.
            most: tokens at most: those that are likeliest somewhere.

        Raises:
            UsageError: the position is not one of those that were looked at.
        """
        column = self._column(at)
        ax, found = axes(ax), self.probability[column]
        colours = [PALETTE[name] for name in ("attn", "mlp", "mixer", "embed", "cross_attn", "other", "norm")]
        for place, c in enumerate(np.argsort(-found.max(0), kind="stable")[:most]):
            token = self.followed[column][c]
            came = " (came)" if token == self.targets[column] else ""
            ax.plot(found[:, c], color=colours[place % len(colours)], label=f"{shown(self.word(token))}{came}")
        ax.set_yscale("log")
        read = shown(self.word(self.ids[column]))
        title = f"{self.title}, position {self.position[column]} (reads {read})"
        return finish(ax, x="State x_k", y="Probability", title=title)

    def _column(self, position: int | None) -> int:
        if position is None:
            return len(self.position) - 1
        there: list[int] = self.position.tolist()
        if position not in there:
            known = ", ".join(map(str, there))
            raise UsageError(f"position {position} was not looked at: plot(at=...) takes one of {known}")
        return there.index(position)


@resting
def token_tracks(
    origin: Origin,
    *,
    stream: str | None = None,
    model: Model | nn.Module | None = None,
    doc: int | None = None,
    positions: Sequence[int] = range(DEFAULT_POSITIONS),
    top_k: int = 5,
    **corpus: Unpack[Corpus],
) -> TokenTracks:
    """Look at a few positions of one document through every state.

    Args:
        origin: a capture or its path, a model, module or its path.
        stream: which stream; by default the one that the head reads.
        model: for a capture: its model, where it is loaded already.
        doc: which document; by default the first.
        positions: which positions of its first window.
        top_k: how many of the likeliest tokens to keep.
        **corpus: for a live model: what it is shown, as in `streamlens.capture`.

    Raises:
        UsageError: the document or the positions are not there.
        MissingDataError: neither a head nor word embeddings; or a capture lacks states, or its model is not here.

    >>> from fixtures import zoo
    >>> found = token_tracks(zoo.build("gpt2").module, tokens=torch.arange(12)[None], positions=range(3), top_k=2)
    >>> found.top.shape, float(found.kl[-1].max()), int(found.rank[0][-1].min())
    ((7, 3, 2), 0.0, 0)
    """
    source = source_of(origin, stream=stream, model=model, **corpus)
    with torch.no_grad(), eager_math():
        block, rows = some_tokens(source, doc, positions)
        return _Look(source, block, rows, top_k).result()


class _Look:
    """The logits of some tokens of one block at every state, made twice: first to see which tokens to follow."""

    def __init__(self, source: Source, block: Block, rows: Tensor, top_k: int) -> None:
        self._source, self._block, self._rows = source, block, rows
        self._head: Head = head_of(source, block)
        self._head.begin(block)
        self._k = min(top_k, self._head.vocab)
        self._few = block if self._head.whole_blocks else some_rows(block, rows, 0)
        self._states = len(source.stream.steps) + 1
        self._targets = target_ids(source, block)[rows]

    def _log_probabilities(self, k: int) -> Tensor:
        """(position, vocab), float32 or better."""
        logits = self._head.logits(self._few.states[k])
        logits = logits[self._rows.to(logits.device)] if self._head.whole_blocks else logits
        logits = logits.double() if logits.dtype == torch.float64 else logits.float()
        return logits.clamp_min(-1e4).log_softmax(-1)

    def result(self) -> TokenTracks:
        """Look."""
        known, targets = self._targets >= 0, self._targets.clamp_min(0)[:, None]
        final = self._log_probabilities(self._states - 1)
        kl, entropy, target_rank = (np.empty((self._states, len(self._rows))) for _ in range(3))
        top, probability = [], []
        for k in range(self._states):
            log_q = self._log_probabilities(k)
            kl[k] = (final.exp() * (final - log_q)).sum(-1).clamp_min(0).cpu().numpy()
            entropy[k] = -(log_q.exp() * log_q).sum(-1).cpu().numpy()
            at = log_q.gather(1, targets.to(log_q.device))
            target_rank[k] = torch.where(known, (log_q > at).sum(-1).cpu(), torch.nan).numpy()
            values, likeliest = largest(log_q, self._k)
            top.append(likeliest.cpu().numpy())
            probability.append(values.exp().double().cpu().numpy())
        followed = self._followed(np.stack(top))
        rank, track = self._followed_through(followed)
        ids = self._block.ids[self._rows].numpy()
        seen = np.concatenate([ids, self._targets.numpy(), np.stack(top).reshape(-1), *followed])
        return TokenTracks(
            title=self._source.description,
            head=self._head.description,
            doc=int(self._block.doc[self._rows[0]]),
            labels=self._source.stream.state_labels,
            position=self._block.position[self._rows].numpy(),
            ids=ids,
            targets=self._targets.numpy(),
            kl=kl,
            entropy=entropy,
            target_rank=target_rank,
            top=np.stack(top),
            top_probability=np.stack(probability),
            followed=followed,
            rank=rank,
            probability=track,
            text=texts(self._source, np.unique(seen)),
        )

    def _followed(self, top: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
        """For each position: the target, the final favourites, and every token that leads at some state."""
        found = []
        for j, target in enumerate(self._targets.tolist()):
            several = [*([target] if target >= 0 else []), *top[-1, j].tolist(), *top[::-1, j, 0].tolist()]
            found.append(np.asarray(list(dict.fromkeys(several)), np.int64))
        return tuple(found)

    def _followed_through(
        self, followed: Sequence[NDArray[np.int64]]
    ) -> tuple[tuple[NDArray[np.int64], ...], tuple[Floats, ...]]:
        ranks = tuple(np.empty((self._states, len(tokens)), np.int64) for tokens in followed)
        tracks = tuple(np.empty((self._states, len(tokens))) for tokens in followed)
        for k in range(self._states):
            log_q = self._log_probabilities(k)
            for j, tokens in enumerate(followed):
                at = log_q[j, torch.from_numpy(tokens).to(log_q.device)]
                ranks[j][k] = (log_q[j][None] > at[:, None]).sum(-1).cpu().numpy()
                tracks[j][k] = at.exp().double().cpu().numpy()
        return ranks, tracks
