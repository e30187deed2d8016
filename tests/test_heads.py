"""The writes of single heads: they and the bias add up to their attention's write, in every layout and from a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import streamlens as sl
from streamlens.analyses.heads import projections
from streamlens.analyses.source import source_of
from streamlens.checkpoint.model import wrap
from streamlens.errors import MissingDataError
from tests.conftest import case

SHAPES = [
    "gpt2", "llama", "gptj", "granite", "bloom", "bert", "t5", "bart", "vit", "nanogpt", "user_post_norm",
    "encoder_pre", "transformer_pre", "scaled_skip_parameter", "layer_scale", "flat_tokens", "parallel_chain",
]  # fmt: skip


def relative(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


@pytest.mark.parametrize("name", SHAPES)
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
                heads = projection.heads(block.mixes[index])
                assert heads.shape == (block.stop - block.start, stream.sublayers[index].heads, stream.d_model)
                assert relative(heads.sum(1) + projection.bias, block.writes[index]) < 1e-6


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
        assert relative(projection.heads(block.mixes[index])[:, head], truth) < 1e-5


def test_a_capture_stores_mixes_in_the_order_of_its_writes(tmp_path: Path) -> None:
    """PyTorch's own attention computes position first, also in a model that is documents first."""
    found = case("encoder_post")
    with sl.capture(found.module, inputs=found.inputs, out=tmp_path / "x.h5", heads=True, progress=False) as capture:
        learned = projections(source_of(wrap(found.module, "x", {}), inputs=found.inputs))
        for block in capture.blocks():
            for index, projection in learned.items():
                total = projection.heads(block.mixes[index]).sum(1) + projection.bias
                assert relative(total, block.writes[index]) < 1e-6


def test_a_norm_after_the_projection_is_refused() -> None:
    found = case("olmo2")
    with pytest.raises(MissingDataError, match="0_attn_out is not a sum over its heads"):
        projections(source_of(wrap(found.module, "olmo2", {}), inputs=found.inputs))
    found = case("mamba")
    with pytest.raises(MissingDataError, match="no attention in stream 'main'"):
        projections(source_of(wrap(found.module, "mamba", {}), inputs=found.inputs))
