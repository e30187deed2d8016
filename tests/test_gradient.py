"""The split of the gradient into skip and branch: exact, equal to a forward written by hand, and to differences."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import streamlens as sl
from streamlens.analyses.gradient.door import gradient_flow
from streamlens.analyses.gradient.graph import Graph, open_graph
from streamlens.calling import invoke
from streamlens.observation import observe
from tests.conftest import Case, case

DOUBLE = torch.float64
EVERY_KIND = [
    "gpt2",
    "llama",
    "bert",
    "user_pre_norm",
    "user_post_norm",
    "user_post_norm_embeddings",
    "gemma2",
    "olmo2",
    "granite",
    "parallel_chain",
    "gpt_neox_parallel",
    "inplace_add",
    "inplace_into_branch",
    "scaled_skip_parameter",
    "deepnorm",
    "flat_tokens",
    "vit",
    "mamba",
    "t5",
    "bart",
    "transformer_pre",
    "transformer_post",
]


def length(found: Case, stream: str) -> int:
    """Positions of a stream, in its own run."""
    with torch.no_grad(), observe(found.module, found.anatomy) as seen:
        invoke(found.module, found.inputs)
    state = seen.states[stream][0]
    return state.numel() // state.shape[-1] // found.docs


def graph_of(found: Case, stream: str | None = None, targets: Tensor | None = None) -> Graph:
    """Run a specimen once."""
    own = found.anatomy.stream(stream)
    shape = found.docs, length(found, own.name)
    return open_graph(found.module, found.anatomy, own, found.inputs, shape, targets)


def relative(first: Tensor, second: Tensor) -> float:
    return float((first - second).norm() / second.norm())


# ---- the split ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY_KIND)
def test_skip_and_branches_add_up_to_the_gradient(name: str) -> None:
    found = case(name, DOUBLE)
    for stream in found.anatomy.streams:
        graph = graph_of(found, stream.name)
        gradients = graph.gradients()
        for step in range(len(stream.steps)):
            pulled = graph.across(step, gradients[step + 1][None])
            whole = pulled.skip + sum(graph.through(s, at_write) for s, at_write in pulled.writes.items())
            assert relative(whole[0], gradients[step]) < 1e-12, (stream.name, step)
            assert gradients[step].norm() > 0


def test_a_norm_after_the_addition_is_pulled_back_as_its_formula_says() -> None:
    found = case("bert", DOUBLE)
    graph = graph_of(found)
    gradients = graph.gradients()
    for step, norm in enumerate(n for n in graph.stream.norms if n.state):
        y = (graph.states[step] + graph.writes[step]).detach().flatten(0, 1)
        module = dict(found.module.named_modules())[norm.module]
        sigma = (y.var(-1, correction=0, keepdim=True) + norm.epsilon).sqrt()
        hat = (y - y.mean(-1, keepdim=True)) / sigma
        h = gradients[step + 1] * module.weight
        expected = (h - h.mean(-1, keepdim=True) - hat * (h * hat).mean(-1, keepdim=True)) / sigma
        pulled = graph.across(step, gradients[step + 1][None])
        assert relative(pulled.sum[0], expected) < 1e-12
        assert torch.equal(pulled.sum, pulled.skip)


def test_a_scaled_skip_is_scaled() -> None:
    graph = graph_of(case("scaled_skip_constant", DOUBLE))
    gradients = graph.gradients()
    assert relative(graph.across(0, gradients[1][None]).skip[0], 0.9 * gradients[1]) < 1e-15
    assert relative(graph.across(1, gradients[2][None]).skip[0], 1.2 * gradients[2]) < 1e-15


class Elementwise(nn.Module):
    """dL/dx = dL/dy (F' + 1), number by number."""

    def __init__(self, width: int = 4) -> None:
        """Two layers, F(x) = tanh(a x)."""
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width, bias=False, dtype=DOUBLE) for _ in range(2)])
        for layer, factor in zip(self.layers, (0.7, -1.3), strict=True):
            layer.weight.data = factor * torch.eye(width, dtype=DOUBLE)

    def forward(self, x: Tensor) -> Tensor:
        """(doc, position, d_model) to the same."""
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("width", [1, 4])
def test_the_textbook_example(width: int) -> None:
    module = Elementwise(width).requires_grad_(False)
    x = torch.randn(2, 3, width, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    anatomy = sl.discover(module, x)
    graph = open_graph(module, anatomy, anatomy.stream(), x, (2, 3), None)
    gradients, states = graph.gradients(), [s.detach().reshape(6, width) for s in graph.states]
    for step, factor in enumerate([0.7, -1.3]):
        slope = factor * (1 - torch.tanh(factor * states[step]) ** 2)
        assert torch.allclose(gradients[step], gradients[step + 1] * (slope + 1), rtol=1e-12, atol=1e-16)
        pulled = graph.across(step, gradients[step + 1][None])
        assert torch.equal(pulled.skip[0], gradients[step + 1])
        branch = graph.through(step, pulled.writes[step])[0]
        assert torch.allclose(branch, gradients[step + 1] * slope, rtol=1e-12, atol=1e-16)


# ---- against a forward written by hand -----------------------------------------------------------------------------


def by_hand(found: Case) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """States, sums, writes and output of GPT-2 and of the user's post-norm model, in this code's own forward."""
    module: Any = found.module
    inputs: Any = found.inputs
    states, sums, writes = [], [], []

    def add(x: Tensor, write: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
        states.append(x)
        writes.append(write)
        sums.append(x + write)
        return norm(sums[-1])

    def same(x: Tensor) -> Tensor:
        return x

    if found.name == "gpt2":
        ids = inputs["input_ids"]
        body = module.transformer
        x = (body.wte(ids) + body.wpe(torch.arange(ids.shape[1]))).requires_grad_()
        for block in body.h:
            x = add(x, block.attn(block.ln_1(x))[0], same)
            x = add(x, block.mlp(block.ln_2(x)), same)
        output = module.lm_head(body.ln_f(x))
    else:
        x = (module.token(inputs) + module.position(torch.arange(len(inputs)))[:, None]).requires_grad_()
        for layer in module.layers:
            x = add(x, layer.attention(x, x, x)[0], layer.norm1)
            x = add(x, layer.linear2(layer.activation(layer.linear1(x))), layer.norm2)
        output = module.unembed(x).transpose(0, 1)
    return [*states, x], sums, writes, output


@pytest.mark.parametrize("name", ["gpt2", "user_post_norm"])
def test_equals_plain_autograd_on_a_forward_written_by_hand(name: str) -> None:
    found = case(name, DOUBLE)
    states, sums, writes, output = by_hand(found)
    ids: Tensor = found.inputs["input_ids"] if name == "gpt2" else found.inputs.T  # type: ignore[index,union-attr]
    targets = torch.full_like(ids, -1)
    targets[:, :-1] = ids[:, 1:]
    loss = torch.stack([F.cross_entropy(output[d, :-1], ids[d, 1:]) for d in range(len(ids))]).sum()
    first = name != "gpt2"

    def doc_first(tensor: Tensor) -> Tensor:
        return (tensor.transpose(0, 1) if first else tensor).flatten(0, 1)

    at_states = torch.autograd.grad(loss, states, retain_graph=True)
    at_sums = torch.autograd.grad(loss, sums, retain_graph=True)
    graph = graph_of(found, targets=targets)
    assert float(graph.losses.detach().sum()) == pytest.approx(float(loss.detach()), rel=1e-13)
    gradients = graph.gradients()
    for own, hand in zip(gradients, at_states, strict=True):
        assert relative(own, doc_first(hand)) < 1e-12
    for step, (write, state) in enumerate(zip(writes, states[:-1], strict=True)):
        pulled = graph.across(step, gradients[step + 1][None])
        assert relative(pulled.skip[0], doc_first(at_sums[step])) < 1e-12
        branch = torch.autograd.grad(write, state, at_sums[step], retain_graph=True)[0]
        assert relative(graph.through(step, pulled.writes[step])[0], doc_first(branch)) < 1e-12


@pytest.mark.parametrize(
    "name", ["gpt2", "bert", "inplace_add", "scaled_skip_parameter", "parallel_chain", "bart", "transformer_pre", "vit"]
)
def test_the_gradient_is_the_slope_of_the_objective(name: str) -> None:
    found = case(name, DOUBLE)
    for stream in found.anatomy.streams:
        gradients = graph_of(found, stream.name).gradients()
        shape = found.docs, length(found, stream.name)
        for index in {1, len(stream.steps) // 2, len(stream.steps)}:
            g = gradients[index] / gradients[index].norm()
            up, down = (_moved(found, stream.name, index, 1e-4 * sign * g, shape) for sign in (1, -1))
            assert (up - down) / 2e-4 == pytest.approx(float(gradients[index].norm()), rel=1e-5)


def _moved(found: Case, stream: str, index: int, change: Tensor, shape: tuple[int, int]) -> float:
    """The pooled norm of the last state where state `index` was moved, computed here."""
    head = found.anatomy.stream()

    def move(state: Tensor) -> Tensor:
        shift = change.reshape(*shape, -1)
        shift = shift.transpose(0, 1) if found.anatomy.stream(stream).position_first else shift
        return state + shift.reshape(state.shape)

    with torch.no_grad(), sl.edit(found.module, found.anatomy, states={index: move}, stream=stream):
        with observe(found.module, found.anatomy) as seen:
            invoke(found.module, found.inputs)
        last = seen.states[head.name][len(head.steps)]
    last = last.transpose(0, 1) if head.position_first else last
    return float(last.reshape(found.docs, -1, head.d_model).mean(1).square().sum() / 2)


# ---- laws ---------------------------------------------------------------------------------------------------------


def test_closed_branches_leave_the_gradient_alone() -> None:
    found = case("layer_scale", DOUBLE)
    module: Any = copy.deepcopy(found.module)
    for layer in module.layers:
        layer.gamma1.zero_()
        layer.gamma2.zero_()
    flow = gradient_flow(module, inputs=found.inputs, progress=False).flow
    assert np.abs(flow.skip_share - 1).max() < 1e-12
    assert np.abs(flow.branch_share).max() < 1e-12
    assert np.abs(flow.relative_norm - 1).max() < 1e-12
    assert np.abs(flow.identity_gain - 1).max() < 1e-12


@pytest.mark.parametrize("name", ["gpt2", "bert", "gemma2", "gptj", "granite", "parallel_chain", "deepnorm", "t5"])
def test_shares_sum_to_one(name: str) -> None:
    found = gradient_flow(case(name).module, inputs=case(name).inputs, progress=False)
    assert found.closure < 1e-5
    for flow in (found.flow, found.flow_all):
        total = flow.skip_share[:, 0].copy()
        np.add.at(total, list(found.steps), flow.branch_share[:, 0])
        np.testing.assert_allclose(total, 1, atol=1e-5)


def test_parallel_branches_share_a_step_and_its_skip() -> None:
    found = gradient_flow(case("gptj").module, inputs=case("gptj").inputs, progress=False)
    rows = found.rows()
    assert [row["step"] for row in rows] == [0, 0, 1, 1]
    assert rows[0]["skip_share"] == rows[1]["skip_share"]
    assert rows[0]["branch_share"] != rows[1]["branch_share"]


def test_only_norms_and_factors_on_the_stream_change_the_gradient_of_the_skips() -> None:
    pre = gradient_flow(case("gpt2").module, inputs=case("gpt2").inputs, progress=False)
    post = gradient_flow(case("bert").module, inputs=case("bert").inputs, progress=False)
    assert np.array_equal(pre.flow.identity_gain, np.ones_like(pre.flow.identity_gain))
    assert np.array_equal(pre.flow.norm_gain, np.ones_like(pre.flow.norm_gain))
    assert not pre.has_norms
    assert post.has_norms
    assert np.abs(post.flow.identity_gain[:-1] - 1).min() > 1e-3
    scaled = gradient_flow(
        case("scaled_skip_constant").module, inputs=case("scaled_skip_constant").inputs, progress=False
    )
    np.testing.assert_allclose(
        scaled.flow.identity_gain[:, 0], [(0.9 * 1.2) ** 2, 1.2 * 1.2 * 0.9, 1.2 * 0.9, 1.2, 1], rtol=1e-6
    )
