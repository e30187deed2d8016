"""One forward pass with its graph kept: what it takes to pull a gradient back over the skip and through a branch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from streamlens.analyses.source import Source, target_ids
from streamlens.anatomy import Anatomy, Point, Stream
from streamlens.block import Block
from streamlens.calling import Inputs, invoke, without_cache
from streamlens.errors import AnatomyError
from streamlens.interception import Interception, Reaction
from streamlens.observation import tokens
from streamlens.recorder.feed import select_docs
from streamlens.recorder.pilot import parameters_of
from streamlens.replay import last, run

Objective = Literal["cross_entropy", "pooled_norm"]
"""The scalar that is differentiated: the mean cross-entropy of a sequence's targets (nats), or, where there are no
targets, half the squared norm of the last state averaged over the sequence's positions."""


@dataclass(frozen=True)
class Pulled:
    """Gradients pulled back across one step, each (column, token, d_model)."""

    skip: Tensor
    """Through everything but the branches: J_norm^T where the sum is normalised, times the factor on the skip."""
    writes: dict[int, Tensor]
    """At each write of the step, by sublayer."""
    sum: Tensor
    """At the sum before the norm: what came in, where the stream passes no norm."""


@dataclass
class Graph:
    """The states and writes of some sequences, as nodes of the graph of one forward pass.

    A column is one of several gradients that are pulled back together; tokens count sequence by sequence.
    """

    stream: Stream
    docs: int
    positions: int
    parameters: Mapping[str, Tensor]
    states: list[Tensor]
    """x_0 ... x_K in the model's own layout: the very tensors that branch and skip read."""
    writes: dict[int, Tensor]
    """(doc, position, d_model) by sublayer, as they are added."""
    losses: Tensor
    """(doc,) the objective of each sequence."""
    batched: bool = field(default=True)
    """Whether several columns go through a branch at once; found out at the first branch that cannot."""

    def gradients(self) -> list[Tensor]:
        """Return the gradient of each sequence's objective at every state, each (token, d_model)."""
        found = torch.autograd.grad(
            self.losses.sum(), self.states, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return [self._flat(g) for g in found]

    def across(self, step: int, pulled: Tensor) -> Pulled:
        """Pull gradients at x_{step+1} back across a step, its writes held fixed.

        The step is run again on copies, in the model's own arithmetic, so that it can be differentiated by itself.

        Args:
            step: index of the step.
            pulled: (column, token, d_model).
        """
        recorded = self.stream.steps[step]
        columns = len(pulled)

        def copy(flat: Tensor) -> Tensor:
            return flat.detach().expand(columns, *flat.shape).requires_grad_()

        given = {"@state": copy(self._flat(self.states[step]))}
        given |= {f"@write:{s}": copy(self.writes[s].flatten(0, 1)) for s in recorded.sublayers}
        with torch.enable_grad():
            values = run(recorded.instructions, given, self.parameters)
        made = values[last(recorded.instructions, "@state")]
        norm = next((n for n in self.stream.norms if n.state == step + 1), None)
        wanted = list(given.values()) + ([] if norm is None else [values[norm.input]])
        skip, *rest = torch.autograd.grad(made, wanted, pulled.to(made.dtype), materialize_grads=True)
        return Pulled(
            skip, dict(zip(recorded.sublayers, rest, strict=False)), pulled if norm is None else rest[-1].detach()
        )

    def through(self, sublayer: int, pulled: Tensor) -> Tensor:
        """Pull gradients at a write back through its branch, to the state that the branch read.

        Args:
            sublayer: index of the write.
            pulled: (column, token, d_model).
        """
        write, state = self.writes[sublayer], self.states[self.stream.sublayers[sublayer].read]
        if not write.requires_grad:  # a branch that is constant
            return torch.zeros_like(pulled)
        given = pulled.reshape(len(pulled), *write.shape).to(write.dtype)
        if len(pulled) > 1 and self.batched:
            try:
                return torch.stack([self._flat(g) for g in _batched(write, state, given)])
            except RuntimeError:  # an operation that vmap does not know: one after the other is as exact
                self.batched = False
        return torch.stack([self._flat(_pull(write, state, column)) for column in given])

    def per_sequence(self, first: Tensor, second: Tensor) -> Tensor:
        """Return inner products summed over position 0 and over all later ones, (..., doc, 2) float64.

        Args:
            first: (..., token, d_model).
            second: (..., token, d_model), broadcast against `first`.
        """
        product = (first.double() * second.double()).sum(-1)
        product = product.reshape(*product.shape[:-1], self.docs, self.positions)
        return torch.stack([product[..., 0], product[..., 1:].sum(-1)], -1)

    def _flat(self, tensor: Tensor) -> Tensor:
        return tokens(tensor, self.stream, self.docs, self.positions).flatten(0, 1)


def _pull(write: Tensor, state: Tensor, column: Tensor) -> Tensor:
    return torch.autograd.grad(write, state, column, retain_graph=True, allow_unused=True, materialize_grads=True)[0]


def _batched(write: Tensor, state: Tensor, columns: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vmap tells of each operation that it runs one by one
        return torch.autograd.grad(
            write, state, columns, retain_graph=True, allow_unused=True, materialize_grads=True, is_grads_batched=True
        )[0]


def objective_of(source: Source, block: Block) -> Objective:
    """Return what is differentiated: cross-entropy where there are logits and targets for them."""
    known = source.anatomy.head.vocab is not None and not bool((block.ids < 0).any())
    return "cross_entropy" if known else "pooled_norm"


def graphs(source: Source, block: Block, at_once: int) -> Iterator[Graph]:
    """Run the sequences of a block a few at a time, each time with the graph kept.

    A sequence is a window, or a document that was kept whole.

    Args:
        source: where the block comes from; its model is run.
        block: whole sequences.
        at_once: how many sequences share a graph, which bounds the memory.

    Raises:
        MissingDataError: the capture's model or inputs are not to be had.
        AnatomyError: the model's forward pass cannot be differentiated.
    """
    module, (docs, positions) = source.model.module, block.shape
    inputs = without_cache(module, source.inputs(block))
    axis = 1 if source.anatomy.stream().position_first else 0
    targets = target_ids(source, block).reshape(docs, positions)
    objective = objective_of(source, block)
    for first in range(0, docs, at_once):
        chosen = list(range(first, min(docs, first + at_once)))
        some = select_docs(inputs, chosen, axis, docs)
        wanted = targets[chosen] if objective == "cross_entropy" else None
        yield open_graph(module, source.anatomy, source.stream, some, (len(chosen), positions), wanted)


def open_graph(
    module: nn.Module,
    anatomy: Anatomy,
    stream: Stream,
    inputs: Inputs,
    shape: tuple[int, int],
    targets: Tensor | None,
) -> Graph:
    """Run a model once and keep the graph from x_0 of a stream to each sequence's objective.

    Args:
        module: the model; its parameters need no gradients.
        anatomy: its anatomy.
        stream: the stream whose states and writes are kept.
        inputs: forward's arguments.
        shape: (docs, positions) of the stream.
        targets: (doc, position) int64, -1 where there is none; None for the pooled norm.

    Raises:
        AnatomyError: the forward pass records no gradients, or adds in place in a way that hides the state.
    """
    keeper, head = _Keeper(stream), anatomy.stream()
    reactions = keeper.reactions()
    end = head.states[-1].made
    ends: list[Tensor] = []
    if end is not None:
        reactions.setdefault(end, ends.append)
    with torch.inference_mode(False), torch.enable_grad():
        own = keeper.begin(inputs)
        with Interception(module, anatomy, reactions):
            output = invoke(module, own)
        states = [keeper.states[k] for k in range(len(stream.states))]
        if targets is None:
            losses = _pooled_norm([*states, *ends][-1], head, shape[0])
        else:
            losses = _cross_entropy(tokens(output, head, *shape), targets.to(output.device))
        if not losses.requires_grad:
            raise AnatomyError(
                f"no gradient reaches stream {stream.name!r} from the output: the model's forward pass does not "
                "record gradients (a no_grad or detach inside it), so they cannot be followed"
            )
        writes = {s: tokens(w, stream, *shape) for s, w in keeper.writes.items()}
    return Graph(stream, *shape, parameters_of(module), states, writes, losses)


class _Keeper:
    """Holds the very tensors of the graph, and sees to it that additions in place leave them alone."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.states: dict[int, Tensor] = {}
        self.writes: dict[int, Tensor] = {}

    def reactions(self) -> dict[Point, Reaction]:
        found: dict[Point, Reaction] = {}
        for index, state in enumerate(self.stream.states):
            if state.made is not None:
                found[state.made] = self._made(index)
            if state.used is not None:
                found[state.used] = self._used(index)
        for sublayer in self.stream.sublayers:
            found[sublayer.write] = self._written(sublayer.index, sublayer.sign)
        return found

    def begin(self, inputs: Inputs) -> Inputs:
        """Return the inputs to run with: x_0 may be one of them."""
        first = self.stream.states[0]
        if first.made is not None:
            return inputs
        if isinstance(inputs, Mapping):
            name = str(first.argument)
            return {**inputs, name: self._start(inputs[name])}
        return self._start(inputs)

    def _start(self, tensor: Tensor) -> Tensor:
        """Begin the graph at x_0; a copy, because a leaf may not be overwritten."""
        self.states[0] = tensor.detach().clone().requires_grad_().clone()
        return self.states[0]

    def _made(self, index: int) -> Reaction:
        def react(tensor: Tensor) -> Tensor:
            if index == 0:
                return self._start(tensor)
            self.states[index] = tensor
            return tensor

        return react

    def _used(self, index: int) -> Reaction:
        def react(tensor: Tensor) -> Tensor:
            held = self.states.get(index)
            if held is None or not torch.equal(held.detach().reshape(tensor.shape), tensor.detach()):
                raise AnatomyError(
                    f"state {index} of stream {self.stream.name!r} is overwritten in place and not handed on, so its "
                    "gradient cannot be told from that of the next state: write x = x + branch instead of x.add_(...)"
                )
            # Given back, it is copied where the addition would overwrite it: autograd still needs what was read.
            return tensor

        return react

    def _written(self, index: int, sign: float) -> Reaction:
        def react(tensor: Tensor) -> Tensor:
            self.writes[index] = tensor if sign == 1.0 else tensor * sign
            return tensor

        return react


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the targets of each sequence, (doc,) nats; 0 where one has none."""
    wide = logits.float() if logits.dtype.itemsize < 4 else logits
    each = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
    count = (targets >= 0).sum(-1).clamp_min(1)
    return each.reshape(targets.shape).sum(-1) / count


def _pooled_norm(state: Tensor, head: Stream, docs: int) -> Tensor:
    """Half the squared norm of the mean over positions, (doc,)."""
    positions = state.numel() // (docs * state.shape[-1])
    return tokens(state, head, docs, positions).mean(1).square().sum(-1) / 2
