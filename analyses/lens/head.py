"""The head of a model as a function of one state: whatever turns x_K into logits, applied to any x_k.

`run_from` from the last state is the head exactly as the model applies it, but it takes whole inputs and goes through
the whole module each time. Here the head is taken apart once: it is run on a few tokens while every operation on the
state is noted, and what is found is cut at the last matrix product into

    hidden = prelude(state)            the final norm, a transform, a projection
    raw    = hidden @ weight.T         the unembedding, by far the most work
    logits = after(raw)                bias, scale, soft-cap

Nothing is assumed about names or classes, and nothing is believed: the parts are used only if they give what the
model itself gives for real states. Otherwise the model's own head is run for each state (`WholeHead`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from streamlens.analyses.lens.trace import Chain, NotPerToken, Operation, listen
from streamlens.analyses.source import CaptureSource, Source
from streamlens.block import Block
from streamlens.calling import Inputs, eager_math, token_inputs
from streamlens.edits import run_from
from streamlens.errors import MissingDataError
from streamlens.observation import tokens
from streamlens.recorder.feed import select_docs

PROBE_TOKENS = 16
"""Tokens on which the head is taken apart and compared with the model's own."""

_AFFINE = frozenset({"add", "sub", "mul", "div", "neg", "_to_copy"})

OWN, NEAREST = "the model's own head", "nearest-token lens: inner products with the word embeddings, not a head"


class Head(Protocol):
    """What a lens looks through."""

    @property
    def vocab(self) -> int:
        """Number of logits."""

    @property
    def description(self) -> str:
        """What it is, for titles."""

    @property
    def error(self) -> float:
        """Largest difference from the model's own logits, relative to the largest logit."""

    @property
    def whole_blocks(self) -> bool:
        """Whether it takes all tokens of a block at once."""

    @property
    def device(self) -> torch.device:
        """Where the products are made."""

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the products, where it is known."""

    def begin(self, block: Block) -> None:
        """Prepare for the tokens of a block."""

    def hidden(self, states: Tensor) -> Tensor:
        """Return what is multiplied with the unembedding, (token, width), for states (token, d_model)."""

    def product(self, hidden: Tensor, out: Tensor) -> None:
        """Write the raw logits into `out`, (token, vocab)."""

    def finish(self, rows: Tensor) -> None:
        """Turn raw logits (token, vocab) into logits, in place."""

    def expectation(self, probability: Tensor) -> Tensor | None:
        """Return for distributions (token, vocab) the vectors (token, width) whose product with h is the mean logit.

        None where logits are more than a product with h.
        """

    def logits(self, states: Tensor) -> Tensor:
        """Return (token, vocab) logits of states (token, d_model); gradients flow through it."""


@dataclass
class LinearHead:
    """A head taken apart: prelude, one large matrix product, and what is done to each logit after it."""

    prelude: Chain
    weight: Tensor
    """(vocab, width)."""
    after: tuple[Operation, ...]
    description: str = OWN
    error: float = 0.0
    """Largest difference from the model's own logits on the probe, relative to the largest logit."""
    bounded: bool = True
    """Whether all logits are finite; a head may hide padding tokens behind minus infinity."""
    whole_blocks = False

    @property
    def vocab(self) -> int:
        """Number of logits."""
        return len(self.weight)

    @property
    def device(self) -> torch.device:
        """Where the products are made."""
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the products."""
        return self.weight.dtype

    def to(self, dtype: torch.dtype) -> LinearHead:
        """Return the same head with its large product in another dtype; the prelude stays as it is."""
        return replace(self, weight=self.weight.to(dtype))

    def begin(self, block: Block) -> None:
        """Nothing: this head sees nothing but states."""

    def hidden(self, states: Tensor) -> Tensor:
        """Return (token, width)."""
        return self.prelude(states.to(self.device))

    def product(self, hidden: Tensor, out: Tensor) -> None:
        """Write the raw logits into `out`, which has the dtype of the weight."""
        torch.mm(hidden.to(self.weight.dtype), self.weight.t(), out=out)

    def finish(self, rows: Tensor) -> None:
        """Turn raw logits into logits, in place."""
        for operation in self.after:
            operation.apply_(rows)
        if not self.bounded:
            rows.clamp_(min=-1e4)  # as good as minus infinity, and 0 * -1e4 is 0 where 0 * -inf is NaN

    def expectation(self, probability: Tensor) -> Tensor | None:
        """Return the mean rows of the unembedding under distributions (token, vocab): (token, width)."""
        return None if self.after or not self.bounded else torch.mm(probability.to(self.weight.dtype), self.weight)

    def logits(self, states: Tensor) -> Tensor:
        """Return (token, vocab) logits."""
        found = torch.mm(self.hidden(states).to(self.weight.dtype), self.weight.t())
        for operation in self.after:
            found = operation(found)
        return found


@dataclass
class WholeHead:
    """The model's own head, run as it is for each state: for heads that cannot be taken apart."""

    source: Source
    vocab: int
    description: str = OWN + ", run whole for each state"
    error: float = 0.0
    whole_blocks = True
    dtype = None
    _inputs: Inputs | None = None
    _shape: tuple[int, int] = (0, 0)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.source.model.module.parameters()).device

    def begin(self, block: Block) -> None:
        """Build the model's inputs for a block."""
        self._inputs, self._shape = self.source.inputs(block), block.shape

    def hidden(self, states: Tensor) -> Tensor:
        """Return the states themselves."""
        return states.to(self.device)

    def product(self, hidden: Tensor, out: Tensor) -> None:
        """Write the logits into `out`."""
        out.copy_(self.logits(hidden))

    def finish(self, rows: Tensor) -> None:
        """Nothing: they are logits already."""

    def expectation(self, probability: Tensor) -> None:
        """Nothing: the logits are not told apart from what makes them."""

    def logits(self, states: Tensor) -> Tensor:
        """Return (token, vocab) logits of all tokens of the block that was begun."""
        source, (docs, positions) = self.source, self._shape
        assert self._inputs is not None, "begin was not called"
        state = states.to(self.device).reshape(docs, positions, -1)
        return _own_logits(source, state, self._inputs)


def head_of(source: Source, block: Block) -> Head:
    """Find what a lens on this stream looks through.

    Args:
        source: the stream.
        block: some of its tokens, on which the head is tried.

    Returns:
        The model's head, where it has logits and reads this stream; otherwise its table of word embeddings, which
        is not a head and says so in `description`.

    Raises:
        MissingDataError: the model has neither; or a capture does not tell where its model is.

    >>> from streamlens.analyses.source import source_of
    >>> from fixtures import zoo
    >>> source = source_of(zoo.build("gemma2").module, tokens=torch.arange(8)[None])
    >>> block = next(source.blocks())
    >>> head = head_of(source, block)
    >>> head.description, [o.name for o in head.after], head.logits(block.states[-1]).shape
    ("the model's own head", ['div', 'tanh', 'mul'], torch.Size([8, 97]))
    """
    stream, known = source.stream, source.anatomy.head
    if known.vocab is None or known.stream != stream.name:
        return _nearest(source)
    inputs, states = _probe(source, block)
    try:
        with torch.no_grad(), eager_math():
            found = _taken_apart(source, states, inputs)
            return _compared(source, found, states, inputs)
    except (NotPerToken, RuntimeError, IndexError, TypeError) as reason:
        # An operation that cannot even be run on tokens laid out flat is one more that treats them together.
        return WholeHead(source, known.vocab, description=f"{OWN}, run whole for each state ({reason})")


def tolerance(dtype: torch.dtype) -> float:
    """Return by how much a head taken apart may differ from the model's, relative to the largest logit.

    The products are summed in another order when tokens are laid out differently, in float32 a few hundred roundings
    of the last bit; in half precision the logits themselves are rounded.
    """
    eps = torch.finfo(dtype).eps
    return 4 * eps if dtype in (torch.bfloat16, torch.float16) else 100 * eps


def _probe(source: Source, block: Block) -> tuple[Inputs, list[Tensor]]:
    """Return inputs of a few tokens, and states (doc, position, d_model) from along the stream."""
    chosen = [block.states[k] for k in sorted({0, len(source.stream.steps) // 2, len(source.stream.steps)})]
    if isinstance(source, CaptureSource) and source.model.vocab_size is not None:
        # The head sees states alone, so any tokens will do for the rest: a capture may not know its own, or hold only
        # some positions of each window.
        count = min(PROBE_TOKENS, len(block.ids))
        docs, positions = (2, count // 2) if count > 1 else (1, 1)
        ids = torch.arange(docs * positions).reshape(docs, positions) % source.model.vocab_size
        laid_out = (ids.T if source.anatomy.stream().position_first else ids).contiguous()
        module = source.model.module
        inputs = token_inputs(module, laid_out.to(next(module.parameters()).device))
    else:
        docs, positions = block.shape
        axis, few = int(source.anatomy.stream().position_first), min(2, docs)
        inputs = select_docs(source.inputs(block), list(range(few)), axis, docs)
        kept = max(1, PROBE_TOKENS // few)
        cropped = _cropped(inputs, 1 - axis, positions, kept)
        chosen = [s.reshape(docs, positions, -1)[:few] for s in chosen]
        if cropped is not None:
            inputs, chosen, positions = cropped, [s[:, :kept] for s in chosen], min(kept, positions)
        docs = few
    return inputs, [s.reshape(-1, s.shape[-1])[: docs * positions].reshape(docs, positions, -1) for s in chosen]


def _cropped(inputs: Inputs, axis: int, positions: int, kept: int) -> Inputs | None:
    """Cut token ids to their first positions; None where there are inputs of another kind."""
    values = [v for v in (inputs.values() if isinstance(inputs, Mapping) else [inputs]) if isinstance(v, Tensor)]
    if any(v.ndim != 2 or v.is_floating_point() or v.shape[axis] != positions for v in values):
        return None

    def cut(value: Any) -> Any:
        return value.narrow(axis, 0, min(kept, positions)).contiguous() if isinstance(value, Tensor) else value

    return {k: cut(v) for k, v in inputs.items()} if isinstance(inputs, Mapping) else cut(inputs)


def _own_logits(source: Source, state: Tensor, inputs: Inputs) -> Tensor:
    """(doc, position, d_model) -> (token, vocab), by the model itself."""
    stream = source.stream
    found = run_from(source.model.module, source.anatomy, len(stream.steps), state, inputs, stream=stream.name)
    return tokens(found, stream, state.shape[0], state.shape[1]).flatten(0, 1)


def _taken_apart(source: Source, states: list[Tensor], inputs: Inputs) -> LinearHead:
    device = next(source.model.module.parameters()).device
    probe = states[-1].to(device).clone()
    chain = listen(lambda: _own_logits(source, probe, inputs), probe)
    vocab = source.anatomy.head.vocab
    place = max((i for i, o in enumerate(chain.operations) if o.is_product and o.width == vocab), default=None)
    if place is None:
        raise NotPerToken("there is no single matrix product that makes the logits")
    prelude, weight, after = chain.cut(place)
    return LinearHead(prelude, weight, after)


def _compared(source: Source, head: LinearHead, states: list[Tensor], inputs: Inputs) -> LinearHead:
    """Return the head with its error, if it gives what the model gives."""
    worst, bounded = 0.0, True
    for state in states:
        state = state.to(head.device)
        truth = _own_logits(source, state, inputs).double()
        # Every other token alone, so that an operation across tokens cannot pass for one on each.
        flat = state.flatten(0, 1)[::2]
        own, known = head.logits(flat).double(), truth[::2]
        finite = known.isfinite()
        bounded = bounded and bool(finite.all())
        if not torch.equal(finite, own.isfinite()):
            raise NotPerToken("its parts give other logits than the whole")
        error = (own - known)[finite].abs().max() / known[finite].abs().max().clamp_min(1e-30)
        worst = max(worst, float(error))
    if not worst <= tolerance(states[0].dtype):
        raise NotPerToken(f"its parts give other logits than the whole, by {worst:.1e}")
    return replace(head, error=worst, bounded=bounded)


def _nearest(source: Source) -> LinearHead:
    """The table of word embeddings in place of a head."""
    model, stream = source.model, source.stream
    for found in model.module.modules():
        if isinstance(found, nn.Embedding) and (found.num_embeddings, found.embedding_dim) == (
            model.vocab_size,
            stream.d_model,
        ):
            norm = _final_norm_module(source)
            return LinearHead(Chain.of(norm), found.weight.detach(), (), description=NEAREST)
    reads = f"its head reads the stream {source.anatomy.head.stream!r}" if source.anatomy.head.vocab else "no head"
    raise MissingDataError(
        f"a lens needs a vocabulary to look through: for stream {stream.name!r} this model has no logits ({reads}) and "
        f"no table of word embeddings of width {stream.d_model}. Load the model with its language-model head, or ask "
        "for `norms`, which needs none"
    )


def _final_norm_module(source: Source) -> Callable[[Tensor], Tensor] | None:
    paths = dict(source.model.module.named_modules())
    found = [n for n in source.stream.norms if n.state is None]
    return paths[found[0].module] if found and found[0].module in paths else None


def affine_count(operations: Sequence[Operation]) -> int:
    """Return how many of the operations on each logit come before the first that is not affine."""
    count = 0
    for operation in operations:
        constants = [a for a in (*operation.args, *operation.kwargs.values()) if isinstance(a, Tensor)]
        if operation.name not in _AFFINE or not all(bool(c.isfinite().all()) for c in constants):
            # The scale inside a soft-cap belongs to it: cap * tanh(logits / cap).
            scaled = count and operation.name == "tanh" and operations[count - 1].name in ("div", "mul")
            return count - 1 if scaled else count
        count += 1
    return count


def in_float32(operations: Sequence[Operation], logits: Tensor) -> Tensor:
    """Apply affine operations to logits, but stay in float32."""
    for operation in operations:
        logits = logits if operation.name == "_to_copy" else operation(logits).float()
    return logits
