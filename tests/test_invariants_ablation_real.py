"""Laws of layer drop (METHODS.md, T-D1 to T-D10) for real weights, against models cut and put together by hand."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import streamlens as sl
from streamlens.analyses.ablation.runs import Runs, Setting, running
from streamlens.analyses.ablation.spans import chosen, every, one_sublayer, together, whole_layer
from streamlens.analyses.source import Source, source_of
from tests.conftest import minilm, smollm2

pytestmark = pytest.mark.real

OPTIONS: dict[str, Any] = {"window": 32, "max_tokens": 64}


@cache
def opened() -> tuple[Source, Runs, Tensor]:
    source = source_of(smollm2(), **OPTIONS)
    (block,) = source.blocks()
    return source, Runs(Setting.of(source), block, source.inputs(block)), block.ids.reshape(block.shape)


@cache
def opened_minilm() -> tuple[Source, Runs, Tensor]:
    source = source_of(minilm(), **OPTIONS)
    (block,) = source.blocks()
    return source, Runs(Setting.of(source), block, source.inputs(block)), block.ids.reshape(block.shape)


def with_layers(layers: Iterable[nn.Module]) -> Any:
    """Return a shallow copy of SmolLM2 with other layers; it shares the weights, not the lists."""
    module: Any = copy.copy(smollm2().module)
    module._modules = dict(module._modules)
    inner = copy.copy(module.model)
    inner._modules = dict(inner._modules)
    inner._modules["layers"] = nn.ModuleList(layers)
    inner.config = copy.deepcopy(inner.config)
    inner.config.num_hidden_layers = len(inner._modules["layers"])
    module._modules["model"] = inner
    return module


def in_order(order: Iterable[int]) -> Any:
    layers: Any = smollm2().module.get_submodule("model.layers")
    return with_layers(layers[i] for i in order)


def muted_smollm2(layer: int) -> Any:
    """Return SmolLM2 with a layer that writes nothing."""
    layers: list[Any] = list(smollm2().module.get_submodule("model.layers").children())
    layers[layer] = copy.deepcopy(layers[layer])
    for maker in (layers[layer].self_attn.o_proj, layers[layer].mlp.down_proj):
        nn.init.zeros_(maker.weight)
    return with_layers(layers)


def muted_minilm(layer: int) -> Any:
    """Return MiniLM with a layer that writes nothing; its norms on the stream are still there."""
    module: Any = copy.deepcopy(minilm().module)
    silent = module.encoder.layer[layer]
    for maker in (silent.attention.output.dense, silent.output.dense):
        nn.init.zeros_(maker.weight)
        nn.init.zeros_(maker.bias)
    return module


def logits_of(module: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = module(ids, use_cache=False).logits
    return logits


@pytest.mark.parametrize(("load", "layer"), [(muted_smollm2, 12), (muted_minilm, 3)])
def test_a_layer_that_writes_nothing_is_not_missed(load: Any, layer: int) -> None:
    """T-D1, to the last bit; behind the norms of MiniLM only what is written is nothing."""
    _, _, ids = opened() if load is muted_smollm2 else opened_minilm()
    source = source_of(load(layer), tokens=ids)
    (block,) = source.blocks()
    runs = Runs(Setting.of(source), block, source.inputs(block))
    with running():
        plain = runs.baseline()
        assert torch.equal(runs.without(whole_layer(source.stream, layer, "zero")), plain)
        skipped = runs.without(whole_layer(source.stream, layer))
        assert torch.equal(skipped, plain) == (load is muted_smollm2)
        assert not torch.allclose(runs.without(whole_layer(source.stream, layer + 1)), plain, atol=1e-2)


@pytest.mark.parametrize("drop", ["20", "3,4,20"])
def test_smollm2_without_layers_equals_one_built_without_them(drop: str) -> None:
    """T-D6."""
    source, runs, ids = opened()
    gone = chosen(source.stream, drop)
    rebuilt = in_order(i for i in range(30) if i not in gone.layers)
    with running():
        torch.testing.assert_close(runs.without(gone), logits_of(rebuilt, ids), rtol=1e-4, atol=1e-4)


def test_smollm2_with_two_layers_exchanged_equals_one_built_that_way() -> None:
    """T-D9."""
    _, runs, ids = opened()
    order = [*range(14), 15, 14, *range(16, 30)]
    with running():
        expected = logits_of(in_order(order), ids)
        torch.testing.assert_close(runs.ordered(order), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(expected, runs.baseline(), atol=0.1)
        assert torch.equal(runs.ordered(range(30)), runs.baseline())


def test_skip_and_zero_are_the_same_bits() -> None:
    """T-D2."""
    source, runs, _ = opened()
    with running():
        for layer in (0, 12, 29):
            assert torch.equal(*(runs.without(whole_layer(source.stream, layer, m)) for m in ("skip", "zero")))
        for s in (1, 30):
            assert torch.equal(*(runs.without(one_sublayer(source.stream, s, m)) for m in ("skip", "zero")))


def test_skip_is_zero_in_minilm_behind_norms_that_do_nothing() -> None:
    """T-D3: without gain and bias (in float64) each norm finds its own output; as they are, the two differ."""
    _, own, ids = opened_minilm()
    module = copy.deepcopy(minilm().module).double()
    for child in module.modules():
        if isinstance(child, nn.LayerNorm):
            nn.init.ones_(child.weight)
            nn.init.zeros_(child.bias)
    source = source_of(module, tokens=ids)
    (block,) = source.blocks()
    runs = Runs(Setting.of(source), block, source.inputs(block))
    with running():
        for s in (0, 5, 11):
            skip, zero = (one_sublayer(source.stream, s, mode) for mode in ("skip", "zero"))
            torch.testing.assert_close(runs.without(skip), runs.without(zero), rtol=0, atol=1e-8)
            assert not torch.allclose(runs.without(skip), runs.baseline(), atol=1e-2)
            assert not torch.allclose(own.without(skip), own.without(zero), atol=1e-2)


def test_minilm_without_any_layer_is_its_embedding() -> None:
    """T-D5: skipped, all norms on the stream are gone with the layers."""
    source, runs, ids = opened_minilm()
    module: Any = minilm().module
    with running():
        gone = runs.without(together(every(source.stream, "layers")))
        torch.testing.assert_close(gone, module.embeddings(ids), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", [[0, 1, 3, 2, 4, 5], [5, 4, 3, 2, 1, 0], [0, 1, 4, 5], [0, 0, 1, 2, 3, 4, 5]])
def test_minilm_in_another_order_equals_one_built_that_way(order: list[int]) -> None:
    """T-D6, T-D9."""
    _, runs, ids = opened_minilm()
    module: Any = copy.deepcopy(minilm().module)
    module.encoder.layer = nn.ModuleList([module.encoder.layer[i] for i in order])
    with running():
        expected = module(ids).last_hidden_state
        torch.testing.assert_close(runs.ordered(order), expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(expected, runs.baseline(), atol=1e-2)
        assert torch.equal(runs.ordered(range(6)), runs.baseline())


def test_pairs_of_layers_of_minilm_equal_models_built_without_them() -> None:
    """T-D7: the interaction is what two cost together more than each alone, all four runs by hand."""
    _, _, ids = opened_minilm()
    found = sl.ablate_pairs(minilm(), progress=False, **OPTIONS)
    assert found.mode == "skip"
    module: Any = copy.deepcopy(minilm().module)
    layers = list(module.encoder.layer)

    def pooled(*gone: int) -> Tensor:
        module.encoder.layer = nn.ModuleList([layer for i, layer in enumerate(layers) if i not in gone])
        with torch.no_grad():
            vector: Tensor = module(ids).last_hidden_state.double().mean(1)
        return vector

    def cost(*gone: int) -> float:
        return float((1 - torch.cosine_similarity(pooled(*gone), pooled())).mean())

    for i, j in ((0, 1), (1, 4), (4, 5)):
        expected = cost(i, j) - cost(i) - cost(j)
        assert abs(expected) > 1e-3
        assert found.interaction[i, j] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("load", [smollm2, minilm])
def test_resample_among_equal_windows_is_the_model_itself(load: Any) -> None:
    """T-D10, to the last bit: four times the same 16 tokens of real text."""
    _, _, ids = opened() if load is smollm2 else opened_minilm()
    source = source_of(load(), tokens=ids[:1, :16].expand(4, -1).contiguous())
    (block,) = source.blocks()
    runs = Runs(Setting.of(source, needs_spare=True), block, source.inputs(block))
    last = len(source.stream.sublayers) - 1
    with running():
        plain = runs.baseline()
        for s in (0, last // 2, last):
            given = runs.instead("resample", s)
            assert torch.equal(given, given[:1].expand_as(given))
            assert torch.equal(runs.without(one_sublayer(source.stream, s, "resample")), plain)
        assert torch.equal(runs.without(whole_layer(source.stream, 2, "resample")), plain)


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
