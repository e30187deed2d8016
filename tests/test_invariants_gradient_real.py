"""Laws of the gradient (METHODS.md, T-G1 to T-G6) for real weights, from hooks on the models' own modules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import streamlens as sl
from streamlens.analyses.gradient.graph import Graph, graphs
from streamlens.analyses.gradient.paths import spectrum_of
from streamlens.analyses.source import Source, source_of
from tests.conftest import minilm, smollm2
from tests.test_gradient import relative
from tests.test_invariants_ablation_real import muted_minilm, muted_smollm2

pytestmark = pytest.mark.real

OPTIONS: dict[str, Any] = {"window": 8, "max_tokens": 16}
Wide = Callable[[str], tuple[Graph, Any]]
BOTH = pytest.mark.parametrize("name", ["smollm2", "minilm"])


@cache
def opened(name: str) -> tuple[Source, Graph, list[Tensor], Tensor]:
    """Two windows of real text: source, graph, gradients at all states, ids (doc, position)."""
    source = source_of((smollm2 if name == "smollm2" else minilm)(), **OPTIONS)
    (block,) = source.blocks()
    (graph,) = graphs(source, block, 2)
    return source, graph, graph.gradients(), block.ids.reshape(block.shape)


@pytest.fixture(scope="module")
def wide() -> Wide:
    """Both models in float64 with their graphs, on the same windows; they are gone after these tests."""

    @cache
    def made(name: str) -> tuple[Graph, Any]:
        source, _, _, ids = opened(name)
        module = copy.deepcopy(source.model.module).double()
        for path, norm in list(module.named_modules()):
            if name == "smollm2" and path.endswith("norm"):  # its own norms compute in float32 whatever they are given
                parent, _, leaf = path.rpartition(".")
                own: Any = norm
                new = nn.RMSNorm(len(own.weight), own.variance_epsilon, dtype=torch.float64)
                new.weight = own.weight
                setattr(module.get_submodule(parent), leaf, new)
        again = source_of(module, tokens=ids)
        (block,) = again.blocks()
        (graph,) = graphs(again, block, len(ids))
        return graph, module

    return made


def makers(module: Any) -> list[nn.Module]:
    """The modules whose outputs are the writes, in order."""
    if hasattr(module, "encoder"):
        return [part for one in module.encoder.layer for part in (one.attention.output.dense, one.output.dense)]
    return [part for one in module.model.layers for part in (one.self_attn.o_proj, one.mlp.down_proj)]


def starts(module: Any) -> list[nn.Module]:
    """The modules that are given the states before each layer, and what comes last."""
    if hasattr(module, "encoder"):
        return list(module.encoder.layer)
    return [*module.model.layers, module.model.norm]


def objective(module: Any, ids: Tensor) -> Tensor:
    """Sum over windows: the mean cross-entropy of SmolLM2, half the squared norm of the mean state of MiniLM."""
    if hasattr(module, "encoder"):
        return module(ids).last_hidden_state.mean(1).square().sum() / 2  # type: ignore[no-any-return]
    logits = module(ids, use_cache=False).logits[:, :-1]
    each = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").double()
    return each.reshape(len(ids), -1).mean(-1).sum()


@contextmanager
def added(changes: dict[nn.Module, Tensor], *, before: bool = False) -> Iterator[None]:
    """Add tensors to what modules return, or to what they are given."""

    def after(own: Tensor) -> Callable[..., Tensor]:
        return lambda module, args, output: output + own

    def given(own: Tensor) -> Callable[..., Any]:
        return lambda module, args: (args[0] + own, *args[1:])

    with ExitStack() as stack:
        for module, own in changes.items():
            hooked = (
                module.register_forward_pre_hook(given(own)) if before else module.register_forward_hook(after(own))
            )
            stack.callback(hooked.remove)
        yield


@BOTH
def test_the_gradient_at_a_write_is_that_of_a_zero_added_to_it(name: str) -> None:
    """T-G2: by plain hooks; in a stream without norms it is the gradient at the next state, to the last bit."""
    source, graph, gradients, ids = opened(name)
    module: Any = source.model.module
    found = makers(module)
    chosen = [0, len(found) // 2, len(found) - 1]
    zeros = {s: torch.zeros(*ids.shape, source.stream.d_model, requires_grad=True) for s in chosen}
    with added({found[s]: zero for s, zero in zeros.items()}):
        expected = torch.autograd.grad(objective(module, ids), list(zeros.values()))
    for s, hand in zip(chosen, expected, strict=True):
        pulled = graph.across(s, gradients[s + 1][None])
        assert relative(pulled.writes[s][0], hand.flatten(0, 1)) < 1e-4, s
        assert torch.equal(pulled.writes[s][0], gradients[s + 1]) == (name == "smollm2")


@BOTH
def test_skip_and_branch_add_up_to_the_gradient(name: str) -> None:
    """T-G1, at every step."""
    _, graph, gradients, _ = opened(name)
    for step, gradient in enumerate(gradients[:-1]):
        pulled = graph.across(step, gradients[step + 1][None])
        branch = graph.through(step, pulled.writes[step])
        assert relative((pulled.skip + branch)[0], gradient) < 1e-5, step
        assert branch.norm() > 1e-4 * gradient.norm()


@BOTH
def test_all_lengths_of_paths_add_up_to_the_gradient(name: str, wide: Wide) -> None:
    """T-G3: all of the 2^60 paths of SmolLM2, and of the 2^12 of MiniLM, in float64.

    Those of SmolLM2 all but cancel: at a length of 17 they are 7000 times as large as the gradient, so in float32 their
    sum is good to a percent of it, though each length by itself is good to five digits.
    """
    graph, _ = wide(name)
    gradients, steps = graph.gradients(), len(graph.stream.steps)
    paths, moment = spectrum_of(graph, gradients, steps)
    assert len(paths) == steps + 1
    assert relative(paths.sum(0), gradients[0]) < 1e-9
    lengths = torch.arange(steps + 1, dtype=torch.float64)[:, None, None]
    assert relative(moment, (lengths * paths).sum(0)) < 1e-9
    alone = gradients[-1][None]
    for step in reversed(range(steps)):
        alone = graph.across(step, alone).skip
    assert relative(paths[0], alone[0]) < 1e-12
    assert torch.equal(paths[0], gradients[-1]) == (name == "smollm2")

    _, narrow, own, _ = opened(name)
    rounded, _ = spectrum_of(narrow, own, steps)
    assert torch.equal(rounded[0], own[-1]) == (name == "smollm2")
    for length in range(13):
        assert relative(rounded[length].double(), paths[length]) < 1e-4, length
    sizes = rounded.double().flatten(1).norm(dim=1)
    assert float((rounded.double().sum(0) - own[0]).norm() / sizes.sum()) < 1e-6


@BOTH
def test_shares_of_the_spectrum_add_up_to_one(name: str) -> None:
    """T-G3 through the door: what is told apart and the remainder, by a plain loop."""
    source, graph, gradients, _ = opened(name)
    found = sl.path_spectrum(source, 3, progress=False)
    for part in (found.paths, found.paths_all):
        assert part.share[:, 0].sum() + part.remainder_share[0] == pytest.approx(1.0, abs=1e-5)
    paths, _ = spectrum_of(graph, gradients, 3)
    own, terms = gradients[0].double().reshape(2, -1), paths.double().reshape(4, 2, -1)
    expected = ((terms * own).sum(-1) / own.square().sum(-1)).mean(-1)
    np.testing.assert_allclose(found.paths_all.share[:, 0], expected.numpy(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("load", "layer"), [(muted_smollm2, 12), (muted_minilm, 3)])
def test_a_layer_that_writes_nothing_leaves_all_of_the_gradient_to_the_skip(load: Any, layer: int) -> None:
    """T-G5, to the last bit; in MiniLM its norms are still there, and change it."""
    source = source_of(load(layer), tokens=opened("smollm2" if load is muted_smollm2 else "minilm")[3])
    (block,) = source.blocks()
    (graph,) = graphs(source, block, 2)
    gradients = graph.gradients()
    for step in (2 * layer, 2 * layer + 1):
        pulled = graph.across(step, gradients[step + 1][None])
        assert not graph.through(step, pulled.writes[step]).any()
        if load is muted_smollm2:
            assert torch.equal(gradients[step], gradients[step + 1])
        else:
            assert relative(pulled.skip[0], gradients[step]) < 1e-6
            assert relative(gradients[step], gradients[step + 1]) > 1e-2
    if load is muted_smollm2:
        assert not torch.equal(gradients[2 * layer - 1], gradients[2 * layer])


@BOTH
def test_the_gradient_is_the_slope_of_the_objective(name: str, wide: Wide) -> None:
    """T-G6: of the cross-entropy of SmolLM2, and of the pooled norm of MiniLM, by central differences in float64."""
    graph, module = wide(name)
    ids, gradients = opened(name)[3], graph.gradients()
    assert float(graph.losses.detach().sum()) == pytest.approx(float(objective(module, ids)), rel=1e-12)
    places = starts(module)
    for layer in (0, len(places) // 2, len(places) - 1):
        gradient = gradients[2 * layer]
        change = (1e-4 * gradient / gradient.norm()).reshape(*ids.shape, -1)
        found = []
        for sign in (1, -1):
            with torch.no_grad(), added({places[layer]: sign * change}, before=True):
                found.append(float(objective(module, ids)))
        assert (found[0] - found[1]) / 2e-4 == pytest.approx(float(gradient.norm()), rel=1e-5), layer
