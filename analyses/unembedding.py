"""The way from the last state to the logits as an affine map, its final norm frozen: what direct attribution needs."""

from __future__ import annotations

from functools import cached_property

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from streamlens.analyses.frozen import FrozenNorm, final_norm
from streamlens.analyses.lens.head import (
    PROBE_TOKENS,
    LinearHead,
    affine_count,
    head_of,
    in_float32,
    tolerance,
)
from streamlens.analyses.lens.trace import Chain
from streamlens.analyses.source import Source
from streamlens.block import Block
from streamlens.calling import eager_math
from streamlens.errors import MissingDataError

_ROWS = 4096
"""Rows of the unembedding that are added up at once."""
_HIDDEN = -1e4
"""Logits below this are of entries that the head hides (padding of the vocabulary)."""


class Unembedding:
    """Everything behind the final norm: projections, the scale of the logits, a bias, a soft-cap.

    The map is read off the model's own head (`head_of`), so no module is looked up by name. A soft-cap is left out:
    attributions are of the logits before it, which are what the parts of the stream add up to. Entries of the
    vocabulary that the head hides behind minus infinity do not count in means over the vocabulary. No tensor
    (token, vocab) is made but for a few tokens, on which the head taken apart is compared with the model's.

    Args:
        source: where the model and its tokens come from.

    Raises:
        MissingDataError: the head has no vocabulary, or is not linear behind its norm (a masked-language-model head
            with its own hidden layer).

    >>> from streamlens.analyses.source import source_of
    >>> from fixtures import zoo
    >>> source = source_of(zoo.build("gemma2").module, tokens=torch.arange(8)[None])
    >>> block = next(source.blocks())
    >>> found = Unembedding(source)
    >>> found.capped, found.directions(block, block.ids).shape
    (True, torch.Size([8, 32]))
    """

    def __init__(self, source: Source) -> None:
        """Take the head apart and compare it with the model."""
        stream, known = source.stream, source.anatomy.head
        if known.vocab is None or known.stream != stream.name:
            raise MissingDataError(
                f"stream {stream.name!r} does not end in logits, so nothing can be attributed to them"
            )
        self.vocab = known.vocab
        block = next(iter(source.blocks()))
        head = head_of(source, block)
        if not isinstance(head, LinearHead):
            raise MissingDataError(
                f"the head is no chain of operations on single tokens ({head.description}), so nothing can be "
                f"attributed to its logits: use the lens instead"
            )
        found = final_norm(stream, source.model.module)
        self.index: int | None = None if found is None else found[0]
        """Of the final norm, within the norms of the stream."""
        self.norm: FrozenNorm | None = None if found is None else found[1]
        self._head, self._prelude = head, head.prelude.in_float32()
        count = affine_count(head.after)
        self.capped = count < len(head.after)
        """Whether the logits pass something that is not affine afterwards: a soft-cap, or entries are hidden."""
        with torch.no_grad(), eager_math():
            own = block.states[-1][:PROBE_TOKENS].to(head.device)
            self._rest = self._behind_norm(source, own).in_float32()
            empty = torch.zeros(1, self.vocab, device=head.device)
            self._shift, one = (in_float32(head.after[:count], row) for row in (empty, empty + 1.0))
            self._slope = one - self._shift
            """(1, vocab) each: the logits before the cap are slope * (h @ weight.T) + shift."""
            self._shown = (head.logits(own).float() > _HIDDEN).any(0)
            """(vocab,) entries that are not hidden."""
            self._compare(block, own)

    def rstd(self, block: Block) -> Float[Tensor, " token"] | None:
        """Return the scale of the final norm for each token; None without such a norm."""
        return None if self.index is None else block.norms[self.index][1]

    def directions(
        self, block: Block, targets: Int64[Tensor, " token"], *, centred: bool = True
    ) -> Float[Tensor, "token d_model"]:
        """Return for each token the direction of x_K along which the logit of its target grows.

        Args:
            block: the tokens.
            targets: vocabulary indices; tokens with a negative one get a direction of zero.
            centred: against the mean logit over the vocabulary, which no softmax can see.

        Returns:
            (token, d_model) float32 on the block's device: A_f^T J^T (e_target - 1/vocab), the norm's statistics those
            of the forward pass.
        """
        rows = self._rows(targets)
        if centred:
            rows = rows - self._mean_row
        rows = rows * (targets >= 0).to(rows)[:, None]
        with torch.enable_grad():
            start = torch.zeros(len(rows), block.states[-1].shape[-1], device=rows.device, requires_grad=True)
            (pulled,) = torch.autograd.grad(self._rest(start), start, rows)
        rstd = self.rstd(block)
        found: Tensor = pulled if self.norm is None or rstd is None else self.norm.adjoint(pulled, rstd)
        return found.to(block.states[-1].device)

    def constant(
        self, block: Block, targets: Int64[Tensor, " token"], *, centred: bool = True
    ) -> Float[Tensor, " token"]:
        """Return what the target's logit has from no part of the stream: the norm's and the head's biases."""
        zero = torch.zeros(1, block.states[-1].shape[-1], device=self._head.device)
        with torch.no_grad():
            inside = self._rest(zero if self.norm is None else zero + self.norm.bias.to(zero))
            chosen = (self._rows(targets) * inside).sum(-1) + self._shift[0, targets.clamp_min(0).to(zero.device)]
            if centred:
                chosen = chosen - (self._mean_row * inside).sum() - self._shift[0, self._shown].mean()
        return chosen.to(block.states[-1].device)

    def target_logit(
        self, states: Float[Tensor, "token d_model"], targets: Int64[Tensor, " token"]
    ) -> Float[Tensor, " token"]:
        """Return the target's logit before any cap of any last states, their own norm applied to them as it is.

        Args:
            states: (token, d_model), such as those of a run with something left out.
            targets: vocabulary indices; a negative one gives the logit of entry 0.

        Returns:
            (token,) float32 on the model's device.
        """
        with torch.no_grad(), eager_math():
            hidden = self._prelude(states.to(self._head.device, torch.float32))
            found: Tensor = (hidden * self._rows(targets)).sum(-1)
            return found + self._shift[0, targets.clamp_min(0).to(found.device)]

    def _rows(self, targets: Tensor) -> Tensor:
        """(token, width): the slope of the target's logit in what is multiplied with the unembedding."""
        chosen = targets.clamp_min(0).to(self._head.device)
        return self._head.weight[chosen].detach().float() * self._slope[0, chosen, None]

    @cached_property
    def _mean_row(self) -> Tensor:
        """(width,) the slope of the mean logit over the entries that are shown."""
        share = (self._slope[0] * self._shown) / self._shown.sum()
        weight = self._head.weight.detach()
        total = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
        for first in range(0, len(weight), _ROWS):  # in float32, a copy of all of it would be large
            total += (share[first : first + _ROWS] @ weight[first : first + _ROWS].float()).double()
        return total.float()

    def _behind_norm(self, source: Source, own: Tensor) -> Chain:
        """What comes between the final norm and the unembedding."""
        if self.index is None:
            return self._head.prelude
        norm = source.model.module.get_submodule(source.stream.norms[self.index].module)
        rest = self._head.prelude.rest_after(own, norm(own))
        if rest is None:
            raise MissingDataError("the final norm does more than normalise, so it is not linear: use the lens instead")
        return rest

    def _compare(self, block: Block, own: Tensor) -> None:
        """Demand on a few tokens that the way is affine and leads where the model's own (`head_of`) does."""
        generator = torch.Generator().manual_seed(0)
        first, second = (torch.randn(own.shape, generator=generator).to(own.device) for _ in range(2))
        both = self._rest(first + second) + self._rest(torch.zeros_like(first))
        apart = self._rest(first) + self._rest(second)
        x, rstd = own.float(), self.rstd(block)
        if self.norm is not None and rstd is not None:
            x = self.norm.linear(x, rstd[: len(own)]) + self.norm.bias.to(x)
        found, truth = self._rest(x), self._prelude(own.float())
        allowed = max(1e-4, tolerance(own.dtype))
        for one, other in ((both, apart), (found, truth)):
            if not float((one - other).abs().max()) <= allowed * float(other.abs().max()):
                raise MissingDataError(
                    "the head is not linear behind its norm, so logits are no sum over the stream: use the lens instead"
                )
