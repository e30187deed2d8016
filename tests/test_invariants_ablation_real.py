"""Laws of layer drop (METHODS.md, T-D2, T-D4 to T-D6, T-D8, T-D9) for real weights, against models cut by hand."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import streamlens as sl
from streamlens.analyses.ablation.runs import Runs, Setting, running
from streamlens.analyses.ablation.spans import chosen, every, one_sublayer, whole_layer
from streamlens.analyses.source import Source, source_of
from tests.conftest import minilm, smollm2

pytestmark = pytest.mark.real

OPTIONS: dict[str, Any] = {"window": 32, "max_tokens": 64}


@cache
def opened() -> tuple[Source, Runs, Tensor]:
    source = source_of(smollm2(), **OPTIONS)
    (block,) = source.blocks()
    return source, Runs(Setting.of(source), block, source.inputs(block)), block.ids.reshape(block.shape)


@contextmanager
def with_layers(order: list[int]) -> Iterator[Any]:
    """A shallow copy of SmolLM2 with these layers, in this order; it shares the weights, not the lists."""
    module: Any = copy.copy(smollm2().module)
    module._modules = dict(module._modules)
    inner = copy.copy(module.model)
    inner._modules = dict(inner._modules)
    inner._modules["layers"] = nn.ModuleList([module.model.layers[i] for i in order])
    inner.config = copy.deepcopy(inner.config)
    inner.config.num_hidden_layers = len(order)
    module._modules["model"] = inner
    yield module


def logits_of(module: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = module(ids, use_cache=False).logits
    return logits


@pytest.mark.parametrize("drop", ["20", "3,4,20"])
def test_smollm2_without_layers_equals_one_built_without_them(drop: str) -> None:
    """T-D6."""
    source, runs, ids = opened()
    gone = chosen(source.stream, drop)
    with with_layers([i for i in range(30) if i not in gone.layers]) as rebuilt, running():
        torch.testing.assert_close(runs.without(gone), logits_of(rebuilt, ids), rtol=1e-4, atol=1e-4)


def test_smollm2_with_two_layers_exchanged_equals_one_built_that_way() -> None:
    """T-D9."""
    _, runs, ids = opened()
    order = [*range(14), 15, 14, *range(16, 30)]
    with with_layers(order) as rebuilt, running():
        expected = logits_of(rebuilt, ids)
        torch.testing.assert_close(runs.ordered(order), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(expected, runs.baseline(), atol=0.1)


def test_skip_and_zero_are_the_same_bits() -> None:
    """T-D2."""
    source, runs, _ = opened()
    with running():
        for layer in (0, 12, 29):
            assert torch.equal(*(runs.without(whole_layer(source.stream, layer, m)) for m in ("skip", "zero")))
        for s in (1, 30):
            assert torch.equal(*(runs.without(one_sublayer(source.stream, s, m)) for m in ("skip", "zero")))


def test_without_any_layer_the_head_reads_the_embedding() -> None:
    """T-D5: the unembedding of the normalised rows of the table, and the loss of both doors."""
    _, _, ids = opened()
    module: Any = smollm2().module
    with torch.no_grad():
        logits = module.lm_head(module.model.norm(module.model.embed_tokens(ids)))
    expected = float(F.cross_entropy(logits[:, 1:-1].double().flatten(0, 1), ids[:, 2:].flatten()))
    found = sl.ablate(smollm2(), "0-29", progress=False, **OPTIONS)
    assert found.scores.base_loss + found.scores.mean("delta_loss")[0] == pytest.approx(expected, abs=1e-4)


def test_effects_of_layers_add_up_and_the_direct_one_is_the_write_on_the_unembedding() -> None:
    """T-D8: the total of three layers against a hook, and the direct effect of each from its writes, by hand."""
    source, runs, ids = opened()
    module: Any = smollm2().module
    found = sl.effects(source, units="layers", progress=False)
    full = logits_of(module, ids).double()
    final = runs.state(runs.last).double()
    rstd = (final.square().mean(-1, keepdim=True) + module.model.norm.variance_epsilon).rsqrt()
    directions = module.lm_head.weight[ids[:, 2:]].double() * module.model.norm.weight.double()
    for layer in (2, 12, 28):
        handle = module.model.layers[layer].register_forward_hook(lambda block, args, output: args[0])
        lost = full - logits_of(module, ids)
        handle.remove()
        picked = lost[:, 1:-1].gather(-1, ids[:, 2:, None])
        assert found.means["total"][layer] == pytest.approx(float(picked.mean()), abs=2e-4)
        sum_of = sum(found.means[name][layer] for name in ("direct", "indirect", "norm"))
        assert sum_of == pytest.approx(float(picked.mean()), abs=2e-4)
        writes = [runs.block.writes[s] for s in whole_layer(source.stream, layer).sublayers]
        write = torch.stack(writes).double().sum(0).reshape(*ids.shape, -1)
        direct = ((write * rstd)[:, 1:-1] * directions).sum(-1).mean()
        assert found.means["direct"][layer] == pytest.approx(float(direct), rel=1e-4, abs=1e-5)
    assert len(every(source.stream, "layers")) == len(found.units) == 30


@pytest.mark.parametrize("load", [smollm2, minilm])
def test_a_drop_leaves_real_models_as_they_were(load: Any) -> None:
    """T-D4."""
    model = load()
    module: Any = model.module
    ids = torch.arange(300, 332)[None]
    with torch.no_grad():
        before = module(ids)[0]
        # Other tests share the module, and transformers leaves hooks of its own where hidden states were asked for.
        kept = {path: (set(vars(m)), list(m._forward_hooks.values())) for path, m in module.named_modules()}
        sl.ablate(model, [1, 2], progress=False, **OPTIONS)
        assert torch.equal(module(ids)[0], before)
    for path, child in module.named_modules():
        assert (set(vars(child)), list(child._forward_hooks.values())) == kept[path], path
        assert not child._forward_pre_hooks
