"""Real weights: the gradients against those at the hidden states that the models hand out themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import streamlens as sl
from streamlens.analyses.gradient.graph import graphs
from streamlens.analyses.source import source_of
from streamlens.checkpoint.model import Model
from tests.conftest import minilm, smollm2

pytestmark = pytest.mark.real


def relative(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).norm() / second.norm())


def own_gradients(model: Model, ids: torch.Tensor) -> list[torch.Tensor]:
    """Gradients at the hidden states that a Hugging Face model returns, of the same objective."""
    module: Any = model.module
    embeddings = module.get_input_embeddings()(ids).detach().requires_grad_()
    output = module(inputs_embeds=embeddings, output_hidden_states=True)
    if hasattr(output, "logits"):
        each = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = each.reshape(len(ids), -1).mean(-1).sum()
    else:
        loss = output.last_hidden_state.mean(1).square().sum() / 2
    return [g.flatten(0, 1) for g in torch.autograd.grad(loss, output.hidden_states)]


@pytest.mark.parametrize(("load", "objective"), [(smollm2, "cross_entropy"), (minilm, "pooled_norm")])
def test_real_weights(load: Callable[[], Model], objective: str) -> None:
    model = load()
    source = source_of(model, window=24, max_tokens=48)
    (block,) = source.blocks()
    (graph,) = graphs(source, block, 2)
    gradients = graph.gradients()
    theirs = own_gradients(model, block.ids.reshape(block.shape))
    # They return the last state after its norm, so that one is compared where the stream has no norm behind it.
    for layer, gradient in enumerate(theirs[:-1]):
        assert relative(gradients[2 * layer], gradient) < 1e-3, layer

    flow = sl.gradient_flow(source, progress=False)
    assert flow.objective == objective
    assert flow.closure < 1e-4
    np.testing.assert_allclose(flow.flow.skip_share[:, 0] + flow.flow.branch_share[:, 0], 1, atol=1e-4)
    if objective == "cross_entropy":  # the skip carries the last gradient down to the embedding, whole
        assert np.abs(flow.flow.identity_gain[:, 0] - 1).max() == 0
    else:  # each norm on the stream shrinks it
        assert flow.flow.identity_gain[0, 0] < 0.5
        assert (flow.flow.norm_gain[:, 0] < 1).mean() > 0.5
