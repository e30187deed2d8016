"""Laws of layer drop (METHODS.md, T-D1 to T-D6, T-D9, T-D10) against models that were rebuilt or written by hand."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import streamlens as sl
from streamlens.analyses.ablation.runs import Runs, Setting, running
from streamlens.analyses.ablation.spans import chosen, every, together, whole_layer
from streamlens.analyses.source import Source, source_of
from streamlens.calling import invoke
from tests.conftest import Case, case

LISTS = {
    "gpt2": "transformer.h",
    "nanogpt": "transformer.h",
    "llama": "model.layers",
    "gemma2": "model.layers",
    "gemma3": "model.layers",
    "granite": "model.layers",
    "gptj": "transformer.h",
    "bert": "bert.encoder.layer",
    "user_post_norm": "layers",
    "deepnorm": "layers",
    "t5": "decoder.block",
    "bart": "model.decoder.layers",
    "transformer_pre": "decoder.layers",
    "transformer_post": "decoder.layers",
}
"""Where each model keeps the layers of the stream that its head reads."""

OUTPUTS = {
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "nanogpt": ("attn.c_proj", "mlp.c_proj"),
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "granite": ("self_attn.o_proj", "mlp.down_proj"),
    "gptj": ("attn.out_proj", "mlp.fc_out"),
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "user_post_norm": ("attention.out_proj", "linear2"),
    "bert": ("attention.output.dense", "output.dense"),
    "bart": ("self_attn.out_proj", "encoder_attn.out_proj", "fc2"),
    "t5": ("layer.0.SelfAttention.o", "layer.1.EncDecAttention.o", "layer.2.DenseReluDense.wo"),
}
"""The modules of a layer that make its writes."""

POST_NORM = ("user_post_norm", "bert", "bart")


def opened(module: nn.Module, found: Case, stream: str | None = None, inputs: Any = None) -> tuple[Source, Runs]:
    """Make the first block of a model ready, with the inputs of a case or others."""
    name = stream or found.anatomy.stream().name
    source = source_of(module, inputs=found.inputs if inputs is None else inputs, stream=name)
    block = next(iter(source.blocks()))
    return source, Runs(Setting.of(source), block, source.inputs(block))


def own_output(module: nn.Module, found: Case) -> Tensor:
    """Run a model by itself; (doc, position, width)."""
    with running():
        output = invoke(module, found.inputs)
    return output.transpose(0, 1) if found.anatomy.stream().position_first else output


def rebuilt(found: Case, order: list[int], path: str | None = None) -> Any:
    """Copy a model with its layers in another order, some left out or there twice."""
    module: Any = copy.deepcopy(found.module)
    blocks: Any = module.get_submodule(path or LISTS[found.name])
    layers, kinds = list(blocks), getattr(getattr(module, "config", None), "layer_types", None)
    if found.name == "t5":  # whichever layer comes first makes the position bias of all, from the one table there is
        attention = [layer.layer[0].SelfAttention for layer in layers]
        for one in attention:
            one.has_relative_attention_bias, one.relative_attention_bias = True, attention[0].relative_attention_bias
    kept = nn.ModuleList([layers[i] for i in order])
    parent, _, leaf = (path or LISTS[found.name]).rpartition(".")
    setattr(module.get_submodule(parent), leaf, kept)
    if kinds is not None:  # local and global attention alternate, and each layer keeps its own
        module.config.layer_types = [kinds[i] for i in order]
    for owner in module.modules():
        for count in ("num_layers", "num_hidden_layers"):
            if isinstance(getattr(owner, count, None), int):
                setattr(owner, count, len(order))
    if hasattr(module, "config") and not hasattr(module.config, "decoder_layers"):
        module.config.num_hidden_layers = len(order)
    return module


# ---- T-D1: a layer that writes nothing -------------------------------------------------------------------------------


def muted(found: Case, layer: int = 1) -> nn.Module:
    """Copy a model in which all writes of a layer are zero."""
    module = copy.deepcopy(found.module)
    blocks: Any = module.get_submodule(LISTS[found.name])
    for path in OUTPUTS[found.name]:
        maker = blocks[layer].get_submodule(path)
        for name, parameter in maker.named_parameters():
            # The norms of Gemma multiply by 1 + weight.
            nn.init.constant_(parameter, -1.0 if found.name == "gemma2" and name == "weight" else 0.0)
    return module


@pytest.mark.parametrize("mode", ["skip", "zero"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_a_layer_that_writes_nothing_is_not_missed(name: str, mode: Any) -> None:
    """T-D1, to the last bit; behind a norm on the stream only what is written is nothing, the norm still is there."""
    found = case(name)
    module = muted(found)
    result = sl.ablate(module, [1], mode, inputs=found.inputs, progress=False)
    # Where the two differ both are reported.
    for row, drop in zip(result.rows(), result.drops, strict=True):
        scores = {score: sums[result.drops.index(drop)] for score, sums in result.scores.sums.items()}
        if name in POST_NORM and drop.mode == "skip":
            assert row["kl"] > 1e-2
            continue
        assert not scores["delta_loss"].any()
        assert not scores["kl"].any()
        assert row["top1_agreement"] == 1.0
    others = sl.ablate(module, [0], mode, inputs=found.inputs, progress=False).rows()
    assert all(row["kl"] > 1e-4 for row in others)


# ---- T-D2, T-D3: two ways to leave out -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["olmo2", "bloom", "mamba", "parallel_chain", "nanogpt", "transformer_pre", "vit"])
def test_skip_and_zero_are_the_same_bits_where_only_sums_stand_on_the_stream(name: str) -> None:
    """T-D2, for one and for several."""
    found = case(name)
    source, runs = opened(found.module, found, "decoder" if name == "transformer_pre" else None)
    modes = [every(source.stream, mode=mode) for mode in ("skip", "zero")]
    modes = [[*drops, together([drops[0], drops[-1]])] for drops in modes]
    with running():
        plain = runs.baseline()
        for skip, zero in zip(*modes, strict=True):
            assert torch.equal(runs.without(skip), runs.without(zero)), skip.label
            assert not torch.equal(runs.without(skip), plain)


@pytest.mark.parametrize("name", ["user_post_norm", "bert", "deepnorm", "encoder_post", "bart", "transformer_post"])
def test_skip_is_zero_behind_a_norm_that_does_nothing(name: str) -> None:
    """T-D3: gain 1, bias 0 and no epsilon to speak of: what a norm gave stays as it is under the next one."""
    found = case(name, torch.float64)
    module = copy.deepcopy(found.module)
    for child in module.modules():
        if isinstance(child, nn.LayerNorm):
            nn.init.ones_(child.weight)
            nn.init.zeros_(child.bias)
            child.eps = 1e-14
    source, runs = opened(module, found)
    drops = list(zip(every(source.stream), every(source.stream, mode="zero"), strict=True))
    with running():
        for skip, zero in drops:
            if 0 in skip.sublayers and name not in ("bert", "bart"):
                continue  # only these have a norm before x_0 as well
            assert float((runs.without(skip) - runs.without(zero)).abs().max()) < 1e-9, skip.label
            assert not torch.equal(runs.without(skip), runs.baseline())


# ---- T-D4: nothing is left behind ------------------------------------------------------------------------------------


class _Stop(Exception):
    pass


@pytest.mark.parametrize("name", ["gpt2", "bert", "gemma2", "gptj", "t5", "user_post_norm"])
def test_a_sweep_leaves_the_model_as_it_was(name: str) -> None:
    """T-D4: hooks, forwards put on an instance, and bits of the output; also when a run breaks off in the middle."""
    found = case(name)
    kept = {path: set(vars(m)) for path, m in found.module.named_modules()}
    before = own_output(found.module, found)
    sl.ablate(found.module, inputs=found.inputs, progress=False)
    source, runs = opened(found.module, found)
    layers: Any = found.module.get_submodule(LISTS[name])

    def stop(*_: Any) -> None:
        raise _Stop

    handle = layers[-1].register_forward_pre_hook(stop)
    with running(), pytest.raises(_Stop):
        runs.without(whole_layer(source.stream, 0))
    handle.remove()
    for path, module in found.module.named_modules():
        assert set(vars(module)) == kept[path], path
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert torch.equal(own_output(found.module, found), before)
    assert torch.backends.mha.get_fastpath_enabled()


# ---- T-D5: the head alone --------------------------------------------------------------------------------------------


def head_on_embedding(found: Case) -> Tensor:
    """Write down a model without layers."""
    m: Any = found.module
    given: Any = found.inputs
    if found.name == "t5":
        scale = m.config.d_model**-0.5 if m.config.tie_word_embeddings else 1.0
        return m.lm_head(m.decoder.final_layer_norm(m.shared(given["decoder_input_ids"])) * scale)  # type: ignore[no-any-return]
    ids = given if isinstance(given, Tensor) else given["input_ids"]
    if found.name == "user_post_norm":
        return m.unembed(m.token(ids) + m.position(torch.arange(len(ids)))[:, None]).transpose(0, 1)  # type: ignore[no-any-return]
    if found.name == "bert":
        return m.cls(m.bert.embeddings(ids))  # type: ignore[no-any-return]
    if found.name == "bart":
        decoder, ids = m.model.decoder, given["decoder_input_ids"]
        x = torch.nn.functional.embedding(ids, decoder.embed_tokens.weight) * decoder.embed_tokens.embed_scale
        x = decoder.layernorm_embedding(x + decoder.embed_positions.weight[2 : 2 + ids.shape[1]])
        return m.lm_head(x) + m.final_logits_bias  # type: ignore[no-any-return]
    if found.name in ("gpt2", "nanogpt", "gptj"):
        x = m.transformer.wte(ids)
        if found.name != "gptj":
            x = x + m.transformer.wpe(torch.arange(ids.shape[1]))
        return m.lm_head(m.transformer.ln_f(x))  # type: ignore[no-any-return]
    x = torch.nn.functional.embedding(ids, m.model.embed_tokens.weight)
    if found.name == "granite":
        return m.lm_head(m.model.norm(3.0 * x)) / 2.5  # type: ignore[no-any-return]
    if found.name == "gemma2":
        logits = m.lm_head(m.model.norm(x * x.shape[-1] ** 0.5))
        return m.config.final_logit_softcapping * torch.tanh(logits / m.config.final_logit_softcapping)  # type: ignore[no-any-return]
    return m.lm_head(m.model.norm(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["gpt2", "nanogpt", "llama", "gptj", "granite", "gemma2", "t5", *POST_NORM])
def test_without_any_layer_the_head_reads_the_embedding(name: str) -> None:
    """T-D5: tables, final norm and unembedding, multiplied by hand; skipped, norms on the stream are gone as well."""
    found = case(name)
    source, runs = opened(found.module, found)
    with running():
        gone = runs.without(together(every(source.stream, "layers")))
        torch.testing.assert_close(gone, head_on_embedding(found), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "granite", "gemma2"])
def test_what_is_left_without_any_layer_is_the_lens_of_the_embedding(name: str) -> None:
    """T-D5: two analyses that share no code of their own give the same loss."""
    found = case(name)
    options: dict[str, Any] = {"inputs": found.inputs, "progress": False}
    layers = list(range(found.anatomy.stream().layers))
    gone = sl.ablate(found.module, layers, **options)
    lens = sl.logit_lens(found.module, states=[0], **options)
    expected = gone.scores.base_loss + float(gone.scores.mean("delta_loss")[0])
    assert lens.rows()[0]["cross_entropy"] == pytest.approx(expected, rel=1e-5)


# ---- T-D6: a model without the layer ---------------------------------------------------------------------------------

LEFT = [
    *((name, drop) for name in ("gpt2", "gemma3", "llama", "nanogpt") for drop in ("0-1", "1-2", "0,2")),
    *((name, "0-1") for name in ("bert", "user_post_norm", "gptj", "granite")),
    *((name, drop) for name in ("bart", "t5", "transformer_pre", "transformer_post") for drop in ("0", "1")),
]


@pytest.mark.parametrize(("name", "drop"), LEFT)
def test_layers_left_out_equal_a_model_built_without_them(name: str, drop: str) -> None:
    """T-D6, for several at once and for the decoders of models with two streams."""
    found = case(name)
    source, runs = opened(found.module, found)
    gone = chosen(source.stream, drop)
    order = [layer for layer in range(source.stream.layers) if layer not in gone.layers]
    expected = own_output(rebuilt(found, order), found)
    with running():
        torch.testing.assert_close(runs.without(gone), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["transformer_pre", "transformer_post", "bart", "t5"])
def test_layers_of_an_encoder_left_out_equal_a_model_built_without_them(name: str) -> None:
    """T-D6: what the decoder reads of the other stream changes with it."""
    found = case(name)
    path = {"bart": "model.encoder.layers", "t5": "encoder.block"}.get(name, "encoder.layers")
    source, runs = opened(found.module, found, "encoder")
    for layer in (0, 1):
        expected = own_output(rebuilt(found, [1 - layer], path), found)
        with running():
            found_here = runs.without(whole_layer(source.stream, layer))
        torch.testing.assert_close(found_here, expected, rtol=1e-5, atol=1e-5)


# ---- T-D9: another order ---------------------------------------------------------------------------------------------

ORDERED = ["gpt2", "gemma3", "gemma2", "gptj", "granite", "llama", "nanogpt", "bert", "user_post_norm", "deepnorm"]
ORDERED += ["bart", "t5"]


@pytest.mark.parametrize("name", ORDERED)
def test_swapping_in_a_model_built_the_other_way_round_gives_the_model(name: str) -> None:
    """T-D9: the layers of a copy are exchanged by hand, and the library's exchange of the copy brings them back."""
    found = case(name)
    layers = found.anatomy.stream().layers
    plain = own_output(found.module, found)
    for first in range(layers - 1):
        order = list(range(layers))
        order[first], order[first + 1] = order[first + 1], order[first]
        other = rebuilt(found, order)
        assert not torch.allclose(own_output(other, found), plain, atol=1e-3)
        _, runs = opened(other, found)
        with running():
            torch.testing.assert_close(runs.ordered(order), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in ORDERED if n not in ("gemma2", "gemma3")])
def test_any_order_equals_a_model_built_in_that_order(name: str) -> None:
    """T-D9: backwards, one layer twice, and both ends alone."""
    found = case(name)
    _, runs = opened(found.module, found)
    layers = found.anatomy.stream().layers
    for order in ([*range(layers)][::-1], [0, *range(layers)], [0, layers - 1, layers - 1], [layers - 1]):
        expected = own_output(rebuilt(found, order), found)
        with running():
            torch.testing.assert_close(runs.ordered(order), expected, rtol=1e-5, atol=1e-5)


# ---- T-D10: among equals ---------------------------------------------------------------------------------------------


def alike(found: Case, docs: int = 4, positions: int = 16) -> Any:
    """Inputs of a case in which all documents are the same one."""
    row = torch.randint(0, 40, (2, positions), generator=torch.Generator().manual_seed(0))

    def same(number: int) -> Tensor:
        ids = row[number : number + 1].expand(docs, -1)
        return (ids.T if found.anatomy.stream().position_first else ids).contiguous()

    if isinstance(found.inputs, Tensor):
        return same(0)
    tensors = [key for key, value in found.inputs.items() if isinstance(value, Tensor)]
    return {**found.inputs, **{key: same(number) for number, key in enumerate(tensors)}}


RESAMPLED = ["gpt2", "llama", "bert", "user_post_norm", "gemma2", "gptj", "granite", "olmo2", "t5", "bart", "deepnorm"]


@pytest.mark.parametrize("name", RESAMPLED)
def test_resample_among_equal_documents_is_the_model_itself(name: str) -> None:
    """T-D10, to the last bit.

    It takes documents that the model itself computes alike. Of three documents of 11 tokens it does not: 33 rows leave
    one over when a product takes 32 at a time, and that one is added up in another order. 64 rows leave none.
    """
    found = case(name)
    same = alike(found)
    (block,) = source_of(found.module, inputs=same).blocks()
    for write in block.writes:
        rows = write.reshape(*block.shape, -1)
        assert torch.equal(rows, rows[:1].expand_as(rows))
    source, runs = opened(found.module, found, inputs=same)
    with running():
        plain = runs.baseline()
        for drop in every(source.stream, "both", "resample"):
            assert torch.equal(runs.without(drop), plain), drop.label
    result = sl.ablate(found.module, mode="resample", inputs=same, progress=False)
    for score in ("delta_loss", "kl"):
        assert not np.nan_to_num(result.scores.sums[score]).any()
    assert all(row["top1_agreement"] == 1.0 for row in result.rows())
    different = sl.ablate(found.module, mode="resample", inputs=found.inputs, progress=False)
    assert all(row["kl"] > 1e-4 for row in different.rows())
