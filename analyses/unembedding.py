"""The way from the last state to the logits as a linear map, its final norm frozen: what direct attribution needs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from streamlens.analyses.frozen import FrozenNorm, final_norm
from streamlens.analyses.source import Source
from streamlens.block import Block
from streamlens.calling import eager_math
from streamlens.edits import run_from
from streamlens.errors import MissingDataError
from streamlens.observation import tokens


class Unembedding:
    """Everything behind the final norm: projections, the scale of the logits, a bias, a soft-cap.

    The map is read off the model's own head, so no module is looked up by name. A soft-cap is left out: attributions
    are of the logits before it, which are what the parts of the stream add up to.
    """

    def __init__(self, source: Source) -> None:
        """Find the final norm and make sure that what follows is linear, but for a function of each logit alone.

        Raises:
            MissingDataError: the head has no vocabulary, or is not linear behind its norm (a masked-language-model
                head with its own hidden layer).
        """
        head = source.anatomy.head
        if head.vocab is None or head.stream != source.stream.name:
            raise MissingDataError(
                f"stream {source.stream.name!r} does not end in logits, so nothing can be attributed to them"
            )
        self._source, self.vocab = source, head.vocab
        module = source.model.module
        found = final_norm(source.stream, module)
        self.norm: FrozenNorm | None = None if found is None else found[1]
        self.index: int | None = None if found is None else found[0]
        path = "" if self.index is None else source.stream.norms[self.index].module
        self._after = None if self.index is None else module.get_submodule(path)
        self._check(next(iter(source.blocks())))

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
            (token, d_model): A_f^T J^T (e_target - 1/vocab), the norm's statistics those of the forward pass.
        """

        def pull(logits: Tensor) -> Tensor:
            known = targets >= 0
            chosen = logits.gather(-1, targets.clamp_min(0)[:, None].to(logits.device))[:, 0]
            scores = chosen - logits.mean(-1) if centred else chosen
            return (scores * known.to(scores)).sum()

        pulled = self._pulled(block, pull)
        rstd = self.rstd(block)
        return pulled if self.norm is None or rstd is None else self.norm.adjoint(pulled, rstd)

    def constant(
        self, block: Block, targets: Int64[Tensor, " token"], *, centred: bool = True
    ) -> Float[Tensor, " token"]:
        """Return what the target's logit has from no part of the stream: the norm's and the head's biases."""
        zero = torch.zeros(block.stop - block.start, self._source.stream.d_model)
        inside = zero if self.norm is None else zero + self.norm.bias
        logits = self._linear(block, inside)
        chosen = logits.gather(-1, targets.clamp_min(0)[:, None])[:, 0]
        return chosen - logits.mean(-1) if centred else chosen

    def _linear(self, block: Block, normalised: Float[Tensor, "token d_model"]) -> Float[Tensor, "token vocab"]:
        """Return the logits before any cap, to first order around zero (exact where there is none)."""
        with torch.enable_grad():
            start = torch.zeros_like(normalised).requires_grad_()
            value = self._head(block)(start)
            # The slope along a vector as the gradient of a gradient: J^T u is linear in u, and its own transpose is J.
            dual = torch.zeros_like(value).requires_grad_()
            (pulled,) = torch.autograd.grad(value, start, dual, create_graph=True)
            (slope,) = torch.autograd.grad(pulled, dual, normalised)
        return value.detach() + slope

    def _pulled(self, block: Block, score: Callable[[Tensor], Tensor]) -> Tensor:
        start, head = torch.zeros(block.stop - block.start, self._source.stream.d_model), self._head(block)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(score(head(start.requires_grad_())), start)
        return gradient

    def _head(self, block: Block) -> Callable[[Tensor], Tensor]:
        """Return the model's head as a function of what its final norm returns: (token, d_model) to (token, vocab)."""
        source, (docs, positions) = self._source, block.shape
        stream, module = source.stream, source.model.module
        # Fetched here and not in the function, which runs under transforms that know nothing of files.
        state, inputs = block.states[-1].reshape(docs, positions, -1), source.inputs(block)

        def head(normalised: Tensor) -> Tensor:
            laid_out = normalised.reshape(docs, positions, -1)
            own = laid_out.transpose(0, 1) if stream.position_first else laid_out

            def replaced(norm: nn.Module, args: object, output: Tensor) -> Tensor:
                return own.reshape(output.shape).to(output)

            handle = None if self._after is None else self._after.register_forward_hook(replaced)
            given = laid_out.to(state) if self._after is None else state
            try:
                with eager_math():
                    logits = run_from(module, source.anatomy, len(stream.steps), given, inputs, stream=stream.name)
            finally:
                if handle is not None:
                    handle.remove()
            return tokens(logits, stream, docs, positions).flatten(0, 1).float()

        return head

    def _check(self, block: Block) -> None:
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(block.stop - block.start, self._source.stream.d_model, generator=generator)
        with torch.no_grad():
            linear, whole = self._linear(block, probe)[:8], self._head(block)(probe)[:8]
        # A cap treats each logit alone and grows with it, so it keeps their order; a hidden layer does not.
        ordered = whole.gather(-1, linear.argsort(-1))
        steps = ordered.diff(dim=-1)
        if float((-steps).clamp_min(0).max()) > 1e-3 * float(whole.std()):
            raise MissingDataError(
                "the head is not linear behind its norm, so logits are no sum over the stream: use the lens instead"
            )
