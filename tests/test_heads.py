"""The writes of single heads: they and the bias add up to their attention's write, in every layout and from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import streamlens as sl
from streamlens.analyses.heads import projections
from streamlens.analyses.source import source_of
from streamlens.checkpoint.model import wrap
from streamlens.errors import MissingDataError
from tests.conftest import case

SHAPES = [
    "gpt2", "llama", "gptj", "granite", "bloom", "bert", "t5", "bart", "vit", "nanogpt", "user_post_norm",
    "encoder_pre", "transformer_pre", "scaled_skip_parameter", "layer_scale", "flat_tokens", "parallel_chain",
    "mistral", "qwen2", "qwen3", "opt", "roberta", "albert",
]  # fmt: skip
NORMED = ["gemma2", "olmo2"]
"""With a norm between the output projection and the stream."""


def relative(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


@pytest.mark.parametrize("name", SHAPES + NORMED)
def test_heads_add_up_to_the_write_of_their_attention(name: str) -> None:
    """A mix stored in another order of tokens than the writes, or heads cut across their widths, would not add up."""
    found = case(name)
    model = wrap(found.module, name, {})
    for stream in found.anatomy.streams:
        source = source_of(model, inputs=found.inputs, stream=stream.name, heads=True)
        learned = projections(source)
        assert set(learned) == {s.index for s in stream.sublayers if s.kind in ("attn", "cross_attn")}
        for block in source.blocks():
            for index, projection in learned.items():
                heads, rest = projection.split(block.mixes[index], block.writes[index])
                assert (projection.norm is not None) == (name in NORMED)
                assert heads.shape == (block.stop - block.start, stream.sublayers[index].heads, stream.d_model)
                assert relative(heads.sum(1) + rest, block.writes[index]) < 1e-6


def test_one_head_against_a_plain_loop() -> None:
    found = case("nanogpt")
    source = source_of(wrap(found.module, "nanogpt", {}), inputs=found.inputs, heads=True)
    index = found.anatomy.stream().find("1_attn_out").index
    projection, block = projections(source)[index], next(iter(source.blocks()))
    linear = found.module.get_submodule("transformer.h.1.attn.c_proj")
    size = found.anatomy.stream().d_model // 4
    for head in range(4):
        alone = torch.zeros_like(block.mixes[index])
        for place in range(head * size, (head + 1) * size):
            alone[:, place] = block.mixes[index][:, place]
        with torch.no_grad():
            truth = linear(alone) - linear(torch.zeros_like(alone))
        assert relative(projection.split(block.mixes[index], block.writes[index])[0][:, head], truth) < 1e-5


def test_a_capture_stores_mixes_in_the_order_of_its_writes(tmp_path: Path) -> None:
    """PyTorch's own attention computes position first, also in a model that is documents first."""
    found = case("encoder_post")
    with sl.capture(found.module, inputs=found.inputs, out=tmp_path / "x.h5", heads=True, progress=False) as capture:
        learned = projections(source_of(wrap(found.module, "x", {}), inputs=found.inputs))
        for block in capture.blocks():
            for index, projection in learned.items():
                heads, rest = projection.split(block.mixes[index], block.writes[index])
                assert relative(heads.sum(1) + rest, block.writes[index]) < 1e-6


LOOPED = {
    "llama": "model.layers.1.self_attn.o_proj",
    "mistral": "model.layers.1.self_attn.o_proj",
    "qwen2": "model.layers.1.self_attn.o_proj",
    "qwen3": "model.layers.1.self_attn.o_proj",
    "bloom": "transformer.h.1.self_attention.dense",
    "t5": "decoder.block.1.layer.0.SelfAttention.o",
    "bert": "bert.encoder.layer.1.attention.output.dense",
}


@pytest.mark.parametrize("name", list(LOOPED))
def test_each_head_against_the_models_own_matrix(name: str) -> None:
    """The model's weight, looked up by name here alone; fewer keys than queries must not cut heads elsewhere."""
    found = case(name)
    source = source_of(wrap(found.module, name, {}), inputs=found.inputs, heads=True)
    index = found.anatomy.stream().find("1_attn_out").index
    projection, block = projections(source)[index], next(iter(source.blocks()))
    weight: Any = found.module.get_submodule(LOOPED[name]).weight
    heads, _ = projection.split(block.mixes[index], block.writes[index])
    size = weight.shape[1] // heads.shape[1]
    for head in range(heads.shape[1]):
        for token in (0, 5, len(heads) - 1):
            truth = torch.zeros(weight.shape[0])
            for place in range(head * size, (head + 1) * size):
                truth += block.mixes[index][token, place] * weight.detach()[:, place]
            assert relative(heads[token, head], truth) < 1e-5


class NormBehind(nn.Module):
    """A transformer whose attention ends in a norm with a gain and a bias, as in Swin v2, or in something else."""

    def __init__(self, behind: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.token = nn.Embedding(17, 12)
        self.attn = nn.ModuleList(nn.MultiheadAttention(12, 3, batch_first=True) for _ in range(2))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12)) for _ in range(2))
        self.behind = behind
        for p in self.parameters():
            nn.init.normal_(p, 0.3, 0.7)

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.token(ids)
        for attn, mlp in zip(self.attn, self.mlp, strict=True):
            x = x + self.behind(attn(x, x, x, need_weights=False)[0])
            x = x + self.behind(mlp(x))
        return x


def _epsilon(norm: Any) -> float:
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def by_hand(mixed: Tensor, linear: Any, norm: Any, heads: int, centred: bool, one: float) -> list[Tensor]:
    """One token: (head,) writes and last what is left, with the statistics of the whole held fixed."""
    weight, size = linear.weight.detach(), len(mixed) // heads
    bias = torch.zeros(len(weight)) if linear.bias is None else linear.bias.detach()
    whole = weight @ mixed + bias
    mean = whole.mean() if centred else torch.zeros(())
    sigma = ((whole - mean).square().mean() + _epsilon(norm)).sqrt()
    pieces = [weight[:, h * size : (h + 1) * size] @ mixed[h * size : (h + 1) * size] for h in range(heads)]
    gain = norm.weight.detach() + one
    through = [(p - (p.mean() if centred else 0.0)) / sigma * gain for p in (*pieces, bias)]
    own = getattr(norm, "bias", None)
    return [*through[:-1], through[-1] + (0.0 if own is None else own.detach())]


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "layer_norm"])
def test_heads_behind_a_norm_against_a_plain_loop(name: str) -> None:
    """Frozen: (p - mean(p)) / sigma * gain for each head, sigma that of all heads together."""
    if name == "layer_norm":
        module: Any = NormBehind(nn.LayerNorm(12, eps=1e-2)).eval()
        source = source_of(module, inputs=torch.arange(22).reshape(2, 11) % 17, heads=True)
        linear, norm, one = module.attn[1].out_proj, module.behind, 0.0
    else:
        found = case(name)
        source = source_of(wrap(found.module, name, {}), inputs=found.inputs, heads=True)
        layer: Any = found.module.get_submodule("model.layers.1")
        linear, norm = layer.self_attn.o_proj, layer.post_attention_layernorm
        one = 1.0 if name == "gemma2" else 0.0
    index = source.stream.find("1_attn_out").index
    projection, block = projections(source)[index], next(iter(source.blocks()))
    heads, rest = projection.split(block.mixes[index], block.writes[index])
    for token in range(0, len(heads), 4):
        mix = block.mixes[index][token]
        truth = by_hand(mix, linear, norm, heads.shape[1], name == "layer_norm", one)
        for piece, expected in zip((*heads[token], rest[token]), truth, strict=True):
            assert torch.allclose(piece, expected, atol=1e-5 * float(block.writes[index][token].norm()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "gemma2", "olmo2", "bloom"])
def test_heads_in_other_precisions(name: str, dtype: torch.dtype) -> None:
    """Weights are the model's own to the last bit, biases or not; the sum is the write as far as it was rounded."""
    found = case(name, dtype)
    source = source_of(wrap(found.module, name, {}), inputs=found.inputs, heads=True)
    learned, block = projections(source), next(iter(source.blocks()))
    for index, projection in learned.items():
        heads, rest = projection.split(block.mixes[index], block.writes[index])
        exact = dtype == torch.float64 and name not in NORMED  # these norms compute in float32
        allowed = 1e-12 if exact else 1e-6 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
        assert relative(heads.sum(1) + rest, block.writes[index].to(heads)) < allowed
    if name in ("gpt2", "bert"):
        place = {"gpt2": "transformer.h.1.attn.c_proj", "bert": "bert.encoder.layer.1.attention.output.dense"}
        weight: Any = found.module.get_submodule(place[name]).weight
        own = weight.T if name == "bert" else weight
        index = found.anatomy.stream().find("1_attn_out").index
        rows = learned[index].weight.flatten(0, 1)
        torch.testing.assert_close(rows, own.detach().to(rows), rtol=0.5 * torch.finfo(dtype).eps, atol=1e-5)


def test_what_is_no_norm_is_refused() -> None:
    module = NormBehind(nn.Tanh()).eval()
    with pytest.raises(MissingDataError, match="0_attn_out is not a sum over its heads"):
        projections(source_of(module, inputs=torch.arange(22).reshape(2, 11) % 17))
    found = case("mamba")
    with pytest.raises(MissingDataError, match="no attention in stream 'main'"):
        projections(source_of(wrap(found.module, "mamba", {}), inputs=found.inputs))
