"""Gradient descent on KL(final || lens) for the translators of a tuned lens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from streamlens.analyses.lens.head import LinearHead
from streamlens.block import Block

WEIGHT_DECAY = 1e-3
CLIP = 1.0
JUDGED_STEPS = 4
"""Batches, the first ones, on which the outcome is compared with the beginning."""


@dataclass(frozen=True)
class Descent:
    """How to descend."""

    steps: int
    step_tokens: int
    learning_rate: float
    dtype: torch.dtype | None
    seed: int


def descend(
    head: LinearHead, blocks: Callable[[], Iterator[Block]], matrix: Tensor | None, bias: Tensor, settings: Descent
) -> tuple[tuple[Tensor, Tensor], int]:
    """Improve translators.

    Args:
        head: the model's head; nothing in it is changed.
        blocks: begins a pass over the training documents; as many passes are made as the steps need.
        matrix: (state, d_model, d_model) to begin with; None for zeros.
        bias: (state, d_model) to begin with.
        settings: how.

    Returns:
        The matrices and biases, float32 on the CPU, and how many tokens were used. A state whose divergence on the
        first batches is not lower at the end than at the beginning keeps what it began with.
    """
    count, width = bias.shape
    begun = torch.zeros(count, width, width) if matrix is None else matrix
    weights = [begun[k].clone().to(head.device).requires_grad_() for k in range(count)]
    biases = [bias[k].clone().to(head.device).requires_grad_() for k in range(count)]
    optimiser = torch.optim.AdamW([*weights, *biases], lr=settings.learning_rate, weight_decay=WEIGHT_DECAY)
    judged: list[list[Tensor]] = []
    used = 0
    for step, states in enumerate(_batches(blocks, settings)):
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * (1 - step / settings.steps)
        if step < JUDGED_STEPS:
            judged.append(states)
        used += len(states[-1])
        final = _final(head, states)
        optimiser.zero_grad(set_to_none=True)
        for k in range(count):
            _divergence(head, final, states[k], weights[k], biases[k], backward=True)
            torch.nn.utils.clip_grad_norm_([weights[k], biases[k]], CLIP)
        optimiser.step()
    with torch.no_grad():
        for k in range(count):
            first, own = (begun[k].to(head.device), bias[k].to(head.device)), (weights[k], biases[k])
            before, after = (sum(_mean(head, s, k, *pair) for s in judged) for pair in (first, own))
            if not after < before:
                weights[k], biases[k] = first
    found = torch.stack([w.detach().cpu() for w in weights]), torch.stack([b.detach().cpu() for b in biases])
    return found, used


def _batches(blocks: Callable[[], Iterator[Block]], settings: Descent) -> Iterator[list[Tensor]]:
    """Yield the states x_0 ... x_K of some tokens, for each step; tokens are shuffled within a block."""
    generator = torch.Generator().manual_seed(settings.seed)
    done = 0
    while done < settings.steps:
        for block in blocks():
            order = torch.randperm(len(block.ids), generator=generator)
            for rows in torch.split(order, settings.step_tokens):
                if done == settings.steps:
                    return
                done += 1
                yield [block.states[k][rows.to(block.states[k].device)] for k in range(len(block.states))]


def _final(head: LinearHead, states: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return head.logits(states[-1]).float().log_softmax(-1)


def _divergence(
    head: LinearHead, final: Tensor, state: Tensor, weight: Tensor, bias: Tensor, *, backward: bool
) -> float:
    """Return the mean KL of some tokens, and add its gradient to the parameters'."""
    with torch.enable_grad():
        wide = state.to(head.device, torch.float32)
        logits = head.logits((wide + wide @ weight.t() + bias).to(state.dtype))
    with torch.no_grad():
        lens = logits.float().log_softmax(-1)
        value = torch.linalg.vecdot(final.exp(), final - lens).mean()
        if backward:
            # d KL / d logits, by hand: a graph through the softmax would hold three more tensors of this size.
            gradient = lens.exp_().sub_(final.exp()).div_(len(final))
    if backward:
        logits.backward(gradient.to(logits.dtype))  # type: ignore[no-untyped-call]
    return float(value)


def _mean(head: LinearHead, states: list[Tensor], k: int, weight: Tensor, bias: Tensor) -> float:
    with torch.no_grad():
        return _divergence(head, _final(head, states), states[k], weight, bias, backward=False)
