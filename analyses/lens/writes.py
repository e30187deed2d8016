"""The write lens: what each part of the last state adds to every logit, with the final norm held fixed.

The logit lens recomputes the final norm on each state, so that each state speaks as if the model stopped there; its
steps do not add up. Here the norm's statistics are those of the last state, which makes the head linear:

    logits = sum over parts of  U A p  +  U beta + b        (before a soft-cap, if there is one)

The parts are the embeddings, the writes and, in a post-norm stream, the norms' biases, each as it stands in the last
state (`transport`). What is shown is centred over the vocabulary, because a constant added to all logits is invisible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from streamlens.analyses.frozen import final_norm, stream_norms
from streamlens.analyses.lens.grid import TokenTable, some_tokens, texts
from streamlens.analyses.lens.head import LinearHead, affine_count, head_of, in_float32, tolerance
from streamlens.analyses.lens.trace import Chain
from streamlens.analyses.sampling import some_rows
from streamlens.analyses.source import Corpus, Origin, Source, source_of, target_ids
from streamlens.analyses.statistics import Floats
from streamlens.analyses.transport import factors_of, transported
from streamlens.block import Block
from streamlens.calling import eager_math
from streamlens.checkpoint.model import Model
from streamlens.errors import MissingDataError
from streamlens.rest import resting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CLOSE = 1e-3
"""By how much the sum of the parts may miss the model's logits, relative to the largest of them."""


@dataclass(frozen=True)
class WriteLensResult(TokenTable):
    """What each part adds to the logits at a few positions of one document; logits are centred over the vocabulary.

    A row is a part: an embedding part, a write or a bias; their sum is the model's own logits.
    """

    kinds: tuple[str, ...]
    """(part,) ``embed``, a kind of sublayer, ``norm`` or ``head`` (biases)."""
    target_logit: Floats
    """(part, position) what the part adds to the target's logit; NaN without a target."""
    promoted: NDArray[np.int64]
    """(part, position) the token whose logit it raises most."""
    promoted_logit: Floats
    """(part, position) by how much."""
    suppressed: NDArray[np.int64]
    """(part, position) the token whose logit it lowers most."""
    spread: Floats
    """(part, position) standard deviation of what it adds, over the vocabulary."""
    error: float
    """Largest difference between the sum over parts and the model's logits, relative to the largest logit: above 0.1 %
    (in half precision four roundings) there is no result but an error."""
    capped: bool
    """Whether the model passes these logits through something that is not linear (a soft-cap) afterwards."""

    @property
    def cells(self) -> NDArray[np.int64]:
        """(part, position) the token that the part promotes most."""
        return self.promoted

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each part and position."""
        return [
            {
                "label": label,
                "kind": self.kinds[i],
                "position": int(self.position[j]),
                "token": self.word(self.ids[j]),
                "target": self.word(self.targets[j]),
                "target_logit": float(self.target_logit[i, j]),
                "promoted": self.word(self.promoted[i, j]),
                "promoted_logit": float(self.promoted_logit[i, j]),
                "suppressed": self.word(self.suppressed[i, j]),
                "spread": float(self.spread[i, j]),
            }
            for i, label in enumerate(self.labels)
            for j in range(len(self.position))
        ]

    def short_rows(self, columns: int = 5) -> list[dict[str, Any]]:
        """Return a table for the terminal: a row for each part, the token that it promotes at the first positions."""
        rows: list[dict[str, Any]] = [
            {"label": label, "target_logit": float(np.nanmean(self.target_logit[i]))}
            for i, label in enumerate(self.labels)
        ]
        return self._with_words(rows, columns)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw what each part adds to the target's logit, with the token that it promotes most."""
        from streamlens.analyses.lens.drawing import plot_writes

        return plot_writes(self, ax)


@resting
def write_lens(
    origin: Origin,
    *,
    stream: str | None = None,
    model: Model | nn.Module | None = None,
    doc: int | None = None,
    positions: Sequence[int] = range(10),
    **corpus: Unpack[Corpus],
) -> WriteLensResult:
    """Take the logits of a few tokens apart into what each part of the last state adds.

    Args:
        origin: a capture or its path, a model, module or its path.
        stream: which stream; by default the one that the head reads.
        model: for a capture: its model, where it is loaded already.
        doc: which document; by default the first.
        positions: which positions of it.
        **corpus: for a live model: what it is shown, as in `streamlens.capture`.

    Raises:
        UsageError: the document or the positions are not there.
        MissingDataError: the head is not linear in the last state even with its norm held fixed, or has no logits; or
            the parts do not add up to the model's own logits.

    >>> from fixtures import zoo
    >>> found = write_lens(zoo.build("llama").module, tokens=torch.arange(12)[None], positions=range(4))
    >>> found.labels[:3], found.target_logit.shape, found.error < 1e-5
    (('embed', '0_attn_out', '0_mlp_out'), (7, 4), True)
    """
    source = source_of(origin, stream=stream, model=model, **corpus)
    with torch.no_grad(), eager_math():
        whole, rows = some_tokens(source, doc, positions)
        block, targets = some_rows(whole, rows, 0), target_ids(source, whole)[rows]
        head = _FrozenHead(source, head_of(source, whole), block)
        return _shares(source, head, block, targets)


class _FrozenHead:
    """The head as an affine map: its norm's statistics are those of some tokens."""

    def __init__(self, source: Source, head: object, block: Block) -> None:
        if not isinstance(head, LinearHead):
            raise MissingDataError("the write lens needs a head that can be taken apart, and this one cannot")
        self.head, stream, module = head, source.stream, source.model.module
        self.norm = final_norm(stream, module)
        own = block.states[len(stream.steps)].to(head.device)
        rest: Chain | None = head.prelude
        if self.norm is not None and head.prelude.module is None:
            path = next(n.module for n in stream.norms if n.state is None)
            rest = head.prelude.rest_after(own, module.get_submodule(path)(own))
        elif self.norm is not None:
            rest = Chain.of(None)
        if rest is None:
            raise MissingDataError("the final norm does more than normalise, so the write lens does not apply")
        self.rest = rest.in_float32()
        count = affine_count(head.after)
        self.capped = count < len(head.after)
        self.after = head.after[:count]
        self.weight = head.weight.float()
        self._demand_affine(own)

    def logits(self, normalised: Tensor) -> Tensor:
        """(token, d_model) after the norm -> (token, vocab), before any soft-cap."""
        return in_float32(self.after, self.rest(normalised).float() @ self.weight.t())

    def own(self, state: Tensor) -> Tensor:
        """(token, d_model) last states -> (token, vocab) by the model's own prelude."""
        return in_float32(self.after, self.head.prelude(state).float() @ self.weight.t())

    def _demand_affine(self, own: Tensor) -> None:
        generator = torch.Generator().manual_seed(0)  # the user's own stream of random numbers is left alone
        first, second = (torch.randn(own.shape, generator=generator).to(self.head.device) for _ in range(2))
        if self.norm is not None or self.head.prelude.operations:
            whole = self.rest(first + second).double() + self.rest(torch.zeros_like(first)).double()
            apart = self.rest(first).double() + self.rest(second).double()
            if not torch.allclose(whole, apart, rtol=1e-3, atol=1e-3 * float(whole.abs().max())):
                raise MissingDataError(
                    "between the last state and the unembedding this head does something that is not linear (a "
                    "transform with an activation), so no write has a share of the logits: ask for the logit lens"
                )


def _shares(source: Source, frozen: _FrozenHead, block: Block, targets: Tensor) -> WriteLensResult:
    stream, device = source.stream, frozen.head.device
    norms = stream_norms(stream, source.parameters)
    factors = factors_of(stream, source.parameters)
    parts = list(transported(stream, norms, block, factors=factors))[-1]
    vectors = [(p.label, p.kind, p.vectors.to(device)) for p in parts]
    if frozen.norm is not None:
        index, norm = frozen.norm
        rstd = block.norms[index][1].to(device)
        vectors = [(label, kind, norm.linear(v, rstd)) for label, kind, v in vectors]
        if bool(norm.bias.any()):
            vectors.append(("bias:final", "norm", norm.bias.expand(len(block.ids), -1)))
    constant = frozen.logits(torch.zeros_like(vectors[0][2]))
    total = constant.clone()
    noted = _Noted(targets.to(device))
    for label, kind, vector in vectors:
        added = frozen.logits(vector) - constant
        total += added
        noted.add(label, kind, added)
    if bool(constant.any()):
        noted.add("bias:head", "head", constant)
    truth = frozen.own(block.states[len(stream.steps)].to(device))
    error = float((total - truth).abs().max() / truth.abs().max().clamp_min(1e-30))
    own = next(source.model.module.parameters()).dtype
    bound = max(_CLOSE, tolerance(own))
    if not error <= bound:
        raise MissingDataError(
            f"the parts add up to other logits than the model's, by {error:.1e} of the largest (bound {bound:.1e}), "
            "so what each of them adds is not known: ask for the logit lens, which runs the head as it is"
        )
    ids = block.ids.numpy()
    promoted, suppressed = noted.stacked("promoted"), noted.stacked("suppressed")
    known = np.concatenate([ids, targets.numpy(), promoted.reshape(-1), suppressed.reshape(-1)])
    return WriteLensResult(
        title=f"write lens: {source.description}, document {int(block.doc[0])}",
        doc=int(block.doc[0]),
        labels=tuple(noted.labels),
        kinds=tuple(noted.kinds),
        position=block.position.numpy().astype(np.int64),
        ids=ids,
        targets=targets.numpy(),
        target_logit=noted.stacked("target_logit").astype(np.float64),
        promoted=promoted,
        promoted_logit=noted.stacked("promoted_logit").astype(np.float64),
        suppressed=suppressed,
        spread=noted.stacked("spread").astype(np.float64),
        error=error,
        capped=frozen.capped,
        text=texts(source, np.unique(known)),
    )


class _Noted:
    """What is kept of each part's logits."""

    def __init__(self, targets: Tensor) -> None:
        self.labels: list[str] = []
        self.kinds: list[str] = []
        self._targets = targets
        self._columns: dict[str, list[Tensor]] = {}

    def add(self, label: str, kind: str, logits: Tensor) -> None:
        """Note one part's (token, vocab)."""
        centred = logits - logits.mean(-1, keepdim=True)
        high, low = centred.max(-1), centred.min(-1)
        at = centred.gather(-1, self._targets.clamp(0, centred.shape[-1] - 1)[:, None])[:, 0]
        known = (self._targets >= 0) & (self._targets < centred.shape[-1])
        self.labels.append(label)
        self.kinds.append(kind)
        for name, value in (
            ("target_logit", torch.where(known, at, torch.nan)),
            ("promoted", high.indices),
            ("promoted_logit", high.values),
            ("suppressed", low.indices),
            ("spread", centred.square().mean(-1).sqrt()),
        ):
            self._columns.setdefault(name, []).append(value.cpu())

    def stacked(self, name: str) -> NDArray[Any]:
        """Return (part, position)."""
        found: NDArray[Any] = torch.stack(self._columns[name]).numpy()
        return found
