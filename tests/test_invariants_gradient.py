"""Laws that the split of the gradient has to keep, against oracles that share nothing with it but the model."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import streamlens as sl
from fixtures import planted, train, witnesses, zoo_styles
from fixtures.zoo_torch import PostNormLayer, PreNormLayer
from streamlens.analyses.gradient.graph import open_graph
from streamlens.analyses.gradient.paths import spectrum_of
from streamlens.calling import invoke
from streamlens.errors import AnatomyError
from streamlens.observation import tokens
from tests.conftest import Case, case
from tests.test_gradient import DOUBLE, graph_of, relative
from tests.test_gradient_paths import PARTLY_FLOAT32

# ---- what arrives at a write ----------------------------------------------------------------------------------------


def next_tokens(found: Case) -> Tensor:
    """Targets of a specimen's own ids (doc, position), -1 at the end."""
    given: Any = found.inputs
    ids: Tensor = given if isinstance(given, Tensor) else given.get("decoder_input_ids", given.get("input_ids"))
    ids = ids.T if found.anatomy.stream().position_first else ids
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -1)], dim=1)


def loss_of(found: Case, targets: Tensor) -> Tensor:
    """Sum over documents of the mean cross-entropy of their targets, in nats."""
    logits = tokens(invoke(found.module, found.inputs), found.anatomy.stream(), *targets.shape)
    known = (targets >= 0).sum(1)
    wide = logits.float() if logits.dtype.itemsize < 4 else logits
    each = [F.cross_entropy(row, own, ignore_index=-1, reduction="sum") for row, own in zip(wide, targets, strict=True)]
    return (torch.stack(each) / known).sum()


def at_writes(found: Case, targets: Tensor) -> list[Tensor]:
    """Gradient at each write, (token, d_model), from a zero that is added to it."""
    stream = found.anatomy.stream()
    leaves: dict[int, Tensor] = {}

    def added(index: int) -> Callable[[Tensor], Tensor]:
        def change(write: Tensor) -> Tensor:
            leaves[index] = torch.zeros_like(write).requires_grad_()
            return write + leaves[index]

        return change

    with sl.edit(found.module, found.anatomy, writes={s.index: added(s.index) for s in stream.sublayers}):
        loss = loss_of(found, targets)
    order = [leaves[s.index] for s in stream.sublayers]
    found_at = torch.autograd.grad(loss, order)
    return [tokens(g, stream, *targets.shape).flatten(0, 1) for g in found_at]


WITH_LOGITS = ["gpt2", "llama", "gemma2", "gptj", "granite", "t5", "nanogpt", "olmo2", "parallel_chain"]


@pytest.mark.parametrize("name", [*WITH_LOGITS, "bert", "user_post_norm", "deepnorm", "bart"])
def test_the_gradient_at_a_write_is_that_of_a_zero_added_to_it(name: str) -> None:
    """In a stream without norms it is the gradient at the next state."""
    found = case(name, DOUBLE)
    targets = next_tokens(found)
    expected = at_writes(found, targets)
    graph = graph_of(found, targets=targets)
    gradients = graph.gradients()
    exact = 1e-6 if name in PARTLY_FLOAT32 else 1e-12
    normed = {norm.state for norm in graph.stream.norms}
    for step in range(len(graph.stream.steps)):
        pulled = graph.across(step, gradients[step + 1][None])
        for sublayer, at_write in pulled.writes.items():
            assert relative(at_write[0], expected[sublayer]) < exact, sublayer
            if step + 1 not in normed:
                assert torch.equal(at_write[0], gradients[step + 1])
        if step + 1 in normed:
            assert relative(gradients[step + 1], pulled.sum[0]) > 1e-3


# ---- all paths, one by one ------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """Four layers of a kind, of which no two have the same weights."""

    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        """Draw the weights, with norms that do something."""
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.ModuleList([layer() for _ in range(4)])
            for parameter in self.parameters():
                parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
        self.double().eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Run the layers in turn."""
        for layer in self.layers:
            x = layer(x)
        return x


Map = Callable[[Tensor], Tensor]
Step = tuple[list[Map], float, Map]
"""Branches, factor on the skip, norm after the addition."""


def same(x: Tensor) -> Tensor:
    return x


def steps_of(layer: Any) -> list[Step]:
    """The steps of a layer, written out."""
    if isinstance(layer, PostNormLayer | PreNormLayer):

        def mlp(x: Tensor) -> Tensor:
            hidden: Tensor = layer.linear2(layer.activation(layer.linear1(x)))
            return hidden

        if isinstance(layer, PostNormLayer):
            return [([lambda x: layer.attention(x, x, x)[0]], 1.0, layer.norm1), ([mlp], 1.0, layer.norm2)]

        def attend(x: Tensor) -> Tensor:
            h = layer.norm1(x)
            mask = nn.Transformer.generate_square_subsequent_mask(len(h))
            attended: Tensor = layer.attention(h, h, h, attn_mask=mask.double(), need_weights=False)[0]
            return attended

        return [([attend], 1.0, same), ([lambda x: mlp(layer.norm2(x))], 1.0, same)]
    if isinstance(layer, zoo_styles.ParallelChain):
        return [([lambda x: layer.attn(layer.ln1(x)), lambda x: layer.mlp(layer.ln1(x))], 1.0, same)]
    if isinstance(layer, zoo_styles.ScaledSkip):
        branches: list[Map] = [lambda x: layer.attn(layer.ln1(x)), lambda x: layer.mlp(layer.ln2(x))]
        return [([branch], factor, same) for branch, factor in zip(branches, (0.9, 1.2), strict=True)]
    assert isinstance(layer, zoo_styles.DeepNorm)
    return [([layer.attn], 1.5, layer.ln1), ([layer.mlp], 1.5, layer.ln2)]


def jacobian(function: Map, at: Tensor) -> Tensor:
    """The whole matrix, row by row."""
    point = at.detach().requires_grad_()
    outputs = function(point).flatten()
    return torch.stack([torch.autograd.grad(o, point, retain_graph=True)[0].flatten() for o in outputs])


def over_all_paths(steps: list[Step], x: Tensor, end: Tensor) -> tuple[Tensor, int]:
    """Gradient at x by the number of branches passed, (length, number), each path by itself; and how many there are."""
    factors, branches, norms = [], [], []
    for several, factor, norm in steps:
        total = factor * x + sum(branch(x) for branch in several)
        branches.append([jacobian(branch, x) for branch in several])
        norms.append(jacobian(norm, total))
        factors.append(factor)
        x = norm(total)
    found = torch.zeros(len(steps) + 1, len(end), dtype=DOUBLE)
    paths = list(itertools.product(*[range(len(several) + 1) for several, _, _ in steps]))
    for path in paths:
        vector = end
        for step in reversed(range(len(steps))):
            vector = norms[step].T @ vector
            way = path[step]
            vector = branches[step][way - 1].T @ vector if way else factors[step] * vector
        found[sum(way > 0 for way in path)] += vector
    return found, len(paths)


KINDS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "pre-norm": (PreNormLayer, 256),
    "post-norm": (PostNormLayer, 256),
    "parallel": (zoo_styles.ParallelChain, 81),
    "scaled skip": (partial(zoo_styles.ScaledSkip, learned=False), 256),
    "scaled skip, post-norm": (zoo_styles.DeepNorm, 256),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_spectrum_is_the_sum_over_all_paths_one_by_one(kind: str) -> None:
    layer, count = KINDS[kind]
    module = Stack(layer)
    shape = (3, 1, 32) if layer in (PreNormLayer, PostNormLayer) else (1, 3, 32)
    x = torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    anatomy = sl.discover(module, x)
    graph = open_graph(module, anatomy, anatomy.stream(), x, (1, 3), None)
    gradients = graph.gradients()
    last = module(x).reshape(3, 32)
    end = (last.mean(0) / 3).expand(3, -1).reshape(-1)  # of half the squared norm of the mean over positions
    assert relative(gradients[-1].flatten(), end) < 1e-12

    expected, paths = over_all_paths([step for one in module.layers for step in steps_of(one)], x, end)
    assert paths == count
    lengths = len(expected)
    found, moment = spectrum_of(graph, gradients, lengths - 1)
    for k in range(lengths):
        assert relative(found[k].flatten(), expected[k]) < 1e-11, k
    assert relative(expected.sum(0), gradients[0].flatten()) < 1e-11
    weighted = (torch.arange(lengths, dtype=DOUBLE)[:, None] * expected).sum(0)
    assert relative(moment.flatten(), weighted) < 1e-11


@pytest.mark.parametrize(
    "name", ["granite", "t5", "transformer_pre", "bert", "transformer_post", "scaled_skip_constant"]
)
def test_the_path_of_no_branch_is_pulled_back_step_by_step(name: str) -> None:
    found = case(name, DOUBLE)
    graph = graph_of(found)
    gradients = graph.gradients()
    alone = gradients[-1][None]
    for step in reversed(range(len(graph.stream.steps))):
        alone = graph.across(step, alone).skip
    shortest = spectrum_of(graph, gradients, 0)[0][0]
    assert torch.equal(shortest, alone[0])
    if name in ("granite", "t5", "transformer_pre"):
        assert torch.equal(shortest, gradients[-1])


def test_branches_and_lengths_of_a_parallel_model_add_up_to_the_gradient() -> None:
    """GPT-J, which does a part of its attention in float32 whatever it is given."""
    graph = graph_of(case("gptj", DOUBLE))
    gradients = graph.gradients()
    for step in range(2):
        pulled = graph.across(step, gradients[step + 1][None])
        assert len(pulled.writes) == 2
        whole = pulled.skip + sum(graph.through(s, at_write) for s, at_write in pulled.writes.items())
        assert relative(whole[0], gradients[step]) < 1e-6
    paths, _ = spectrum_of(graph, gradients, 2)
    assert relative(paths.sum(0), gradients[0]) < 1e-6


# ---- slopes of the cross-entropy -----------------------------------------------------------------------------------


def moved_loss(found: Case, targets: Tensor, index: int, change: Tensor) -> float:
    """The loss where state `index` was moved by (token, d_model)."""
    stream = found.anatomy.stream()

    def move(state: Tensor) -> Tensor:
        shift = change.reshape(*targets.shape, -1)
        shift = shift.transpose(0, 1) if stream.position_first else shift
        return state + shift.reshape(state.shape).to(state.dtype)

    with torch.no_grad(), sl.edit(found.module, found.anatomy, states={index: move}):
        return float(loss_of(found, targets))


@pytest.mark.parametrize(
    "name", ["gpt2", "gptj", "nanogpt", "bert", "user_post_norm", "llama", "granite", "gemma2", "t5", "bart"]
)
def test_the_gradient_is_the_slope_of_the_cross_entropy(name: str) -> None:
    found = case(name, DOUBLE)
    targets = next_tokens(found)
    gradients = graph_of(found, targets=targets).gradients()
    size, exact = (1e-2, 1e-3) if name in PARTLY_FLOAT32 else (1e-4, 1e-5)
    if name == "gptj":  # its attention scores are float32, and its states short
        size, exact = 1e-3, 1e-3
    for index in {0, 1, len(gradients) // 2, len(gradients) - 1}:
        g = gradients[index] / gradients[index].norm()
        up, down = (moved_loss(found, targets, index, sign * size * g) for sign in (1, -1))
        assert (up - down) / (2 * size) == pytest.approx(float(gradients[index].norm()), rel=exact), index


# ---- branches that write nothing -------------------------------------------------------------------------------------

PROJECTIONS = {
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gptj": ("attn.out_proj", "mlp.fc_out"),
    "granite": ("self_attn.o_proj", "mlp.down_proj"),
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "t5": ("SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo"),
}
IN_POST_NORM = {
    "bert": ("output.dense",),
    "bart": ("self_attn.out_proj", "encoder_attn.out_proj", "fc2"),
    "user_post_norm": ("attention.out_proj", "linear2"),
}


def silent(name: str, makers: tuple[str, ...]) -> nn.Module:
    """Copy a model in which no branch writes anything."""
    module = copy.deepcopy(case(name).module)
    for path, part in module.named_modules():
        if name == "gemma2" and path.endswith(("post_attention_layernorm", "post_feedforward_layernorm")):
            part.weight.data.fill_(-1)  # its norms scale by 1 + weight
        elif path.endswith(makers):
            for parameter in part.parameters():
                parameter.data.zero_()
    return module


@pytest.mark.parametrize("name", [*PROJECTIONS, "gemma2"])
def test_where_branches_write_nothing_all_of_the_gradient_takes_the_skip(name: str) -> None:
    module = silent(name, PROJECTIONS.get(name, ()))
    found = sl.gradient_flow(module, inputs=case(name).inputs, progress=False)
    for flow in (found.flow, found.flow_all):
        assert np.array_equal(flow.skip_share, np.ones_like(flow.skip_share))
        assert np.array_equal(flow.branch_share, np.zeros_like(flow.branch_share))
        assert np.array_equal(flow.relative_norm, np.ones_like(flow.relative_norm))
    assert found.closure == 0


@pytest.mark.parametrize("name", IN_POST_NORM)
def test_behind_norms_too_nothing_comes_through_branches_that_write_nothing(name: str) -> None:
    """The norms on the stream are still passed, so its size changes."""
    found = sl.gradient_flow(silent(name, IN_POST_NORM[name]), inputs=case(name).inputs, progress=False)
    assert np.array_equal(found.flow.branch_share, np.zeros_like(found.flow.branch_share))
    np.testing.assert_allclose(found.flow.skip_share, 1.0, atol=1e-6)
    assert np.abs(found.flow.relative_norm[:-1, 0] - 1).min() > 1e-3


def test_a_dead_layer_passes_the_gradient_on_as_it_is() -> None:
    found = sl.gradient_flow(planted.dead_layer(), tokens=planted.documents(), progress=False)
    assert np.array_equal(found.flow_all.skip_share[1], np.ones(3))
    assert found.flow_all.skip_share[0, 0] != 1


# ---- trained models --------------------------------------------------------------------------------------------------


def held_out(documents: int) -> Tensor:
    return train.split_text()[1][: documents * 64].view(documents, 64)


def test_training_with_layers_left_out_makes_each_of_them_cheaper() -> None:
    costs = {}
    for name in ("layer_drop", "pre_norm"):
        rows = sl.ablate(witnesses.model(name), units="layers", tokens=held_out(12), progress=False).rows()
        costs[name] = [row["delta_loss"] for row in rows if row["mode"] == "skip"][1:-1]
        assert len(costs[name]) == 6
    assert np.mean(costs["layer_drop"]) < np.mean(costs["pre_norm"]) / 2
    with pytest.raises(AnatomyError, match="no residual stream"):
        sl.ablate(witnesses.model("no_skip"), tokens=held_out(2), progress=False)


@pytest.mark.parametrize("make", [witnesses.untrained, witnesses.trained])
def test_the_skips_of_a_pre_norm_model_alone_leave_the_gradient_as_it_is(make: Callable[[str], nn.Module]) -> None:
    pre, post = (
        sl.gradient_flow(make(name), tokens=held_out(12), progress=False).flow.identity_gain
        for name in ("pre_norm", "post_norm")
    )
    assert np.array_equal(pre, np.ones_like(pre))
    assert np.abs(post[1:-1, 0] - 1).max() > 0.1
