"""The zoo keeps its promises: every specimen builds, is the same each time, is finite, and has no idle parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures import zoo
from fixtures.expected import layers
from fixtures.train import evaluate, split_text
from streamlens.checkpoint.loading import load
from streamlens.checkpoint.nanogpt import NanoGPT

ALL = (*zoo.names(), *zoo.NEGATIVE)
KINDS = ("attn", "mlp", "cross_attn", "mixer")


@pytest.fixture(scope="module")
def specimens() -> dict[str, zoo.Specimen]:
    """Every specimen, built once."""
    return {name: zoo.build(name) for name in zoo.names()} | {name: zoo.build_negative(name) for name in zoo.NEGATIVE}


def tensors(output: Any) -> list[Tensor]:
    """The tensors of a model's output, whatever its container."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if hasattr(output, "values") else output
    return [value for value in values if isinstance(value, Tensor)]


def test_every_specimen_has_an_expectation() -> None:
    assert set(zoo.names()) == set(zoo.EXPECTED)
    assert not set(zoo.names()) & set(zoo.NEGATIVE)


@pytest.mark.parametrize("name", ALL)
def test_specimen_is_frozen_float32_in_eval_mode(specimens: dict[str, zoo.Specimen], name: str) -> None:
    module = specimens[name].module
    assert not any(part.training for part in module.modules())
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("name", ALL)
def test_outputs_are_finite_and_of_moderate_size(specimens: dict[str, zoo.Specimen], name: str) -> None:
    outputs = tensors(specimens[name].run())
    assert outputs
    assert all(torch.isfinite(output).all() for output in outputs)
    assert 0.05 < outputs[0].std() < 50


@pytest.mark.parametrize("name", ALL)
def test_no_parameter_is_idle(specimens: dict[str, zoo.Specimen], name: str) -> None:
    """Zero biases, norm weights of one and closed gates would hide mistakes."""
    for path, parameter in specimens[name].module.named_parameters():
        assert parameter.abs().max() > 0.01, path
        assert parameter.numel() == 1 or parameter.std() > 0.01, path


@pytest.mark.parametrize("name", ["gpt2", "mamba", "t5", "transformer_pre", "rezero", "highway"])
def test_the_same_name_gives_the_same_bits(specimens: dict[str, zoo.Specimen], name: str) -> None:
    before = torch.random.get_rng_state()
    again = (zoo.build_negative if name in zoo.NEGATIVE else zoo.build)(name)
    assert torch.equal(before, torch.random.get_rng_state()), "building must leave the global generator alone"
    first = specimens[name]
    assert first.module.state_dict().keys() == again.module.state_dict().keys()
    for path, value in first.module.state_dict().items():
        assert torch.equal(value, again.module.state_dict()[path]), path
    assert all(torch.equal(a, b) for a, b in zip(tensors(first.run()), tensors(again.run()), strict=True))


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_reaches_the_output(specimens: dict[str, zoo.Specimen], name: str) -> None:
    """A bias, norm or gate without any effect could be misread by every tool and nobody would see it."""
    specimen = specimens[name]
    original = tensors(specimen.run())[0]
    for path, parameter in specimen.module.named_parameters():
        kept = parameter.clone()
        parameter.mul_(1.5)
        changed = tensors(specimen.run())[0]
        parameter.copy_(kept)
        assert not torch.equal(original, changed) or "pooler" in path, path


def test_tied_embeddings_stay_tied(specimens: dict[str, zoo.Specimen]) -> None:
    gpt2, nano = specimens["gpt2"].module, specimens["nanogpt"].module
    assert gpt2.get_parameter("lm_head.weight") is gpt2.get_parameter("transformer.wte.weight")
    assert nano.get_parameter("lm_head.weight") is nano.get_parameter("transformer.wte.weight")


@pytest.mark.parametrize("name", zoo.names())
def test_expectation_is_well_formed(name: str) -> None:
    answer = zoo.EXPECTED[name]
    assert set(answer.streams) in ({"main"}, {"encoder", "decoder"})
    assert set(answer.streams) == set(answer.norm) == set(answer.parts)
    for sublayers in answer.streams.values():
        assert all(kind in KINDS and label == f"{layer}_{kind}_out" for kind, label, layer in sublayers)
        assert len({label for _, label, _ in sublayers}) == len(sublayers)


def test_layers_writes_out_serial_labels() -> None:
    assert layers(2) == (
        ("attn", "0_attn_out", 0),
        ("mlp", "0_mlp_out", 0),
        ("attn", "1_attn_out", 1),
        ("mlp", "1_mlp_out", 1),
    )


def test_in_place_style_equals_the_plain_one(specimens: dict[str, zoo.Specimen]) -> None:
    specimen = specimens["inplace_add"]
    model: Any = specimen.module
    with torch.no_grad():
        x = model.embed(specimen.inputs[""])
        for layer in model.layers:
            x = x + layer.attn(layer.ln1(x))
            x = x + layer.mlp(layer.ln2(x))
        assert torch.equal(model.unembed(model.norm(x)), specimen.run())


def test_trained_model_has_learned_english() -> None:
    """The bound is loose because the text differs from one Python version to the next; an untrained model has 5.5."""
    model = load(Path(zoo.__file__).with_name("model.pt"))
    assert isinstance(model.module, NanoGPT)
    assert model.tokenizer is not None
    assert (model.max_positions, model.vocab_size, model.tokenizer.name) == (256, 256, "byte")
    _, held_out = split_text()
    assert evaluate(model.module, held_out[: 8 * 257]) < 1.6
