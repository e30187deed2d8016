"""Laws of a capture (METHODS.md, T-C1 to T-C4) for real weights and text, with the models' own modules alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import streamlens as sl
from streamlens.observation import observe
from streamlens.proof import same_bits
from streamlens.reader.opening import Capture
from tests.conftest import minilm, smollm2
from tests.test_invariants_capture import quietly, worst_of_orders

pytestmark = pytest.mark.real

WINDOW, TOKENS = 64, 128
OPTIONS: dict[str, Any] = {"window": WINDOW, "max_tokens": TOKENS, "batch_tokens": TOKENS, "progress": False}


@pytest.fixture(scope="module")
def smollm2_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Capture]:
    with sl.capture(smollm2(), out=tmp_path_factory.mktemp("s") / "x.h5", **OPTIONS) as capture:
        yield capture


@pytest.fixture(scope="module")
def minilm_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Capture]:
    with sl.capture(minilm(), out=tmp_path_factory.mktemp("m") / "x.h5", **OPTIONS) as capture:
        yield capture


def laid_out(rows: Tensor) -> Tensor:
    return rows.clone().reshape(-1, WINDOW, rows.shape[-1])


def test_reads_of_smollm2_through_its_own_modules_are_its_writes(smollm2_file: Capture) -> None:
    """T-C4: all 60 branches; the rotation of the attention comes from the model's own module."""
    module: Any = smollm2().module.model
    with quietly():
        x = laid_out(smollm2_file.read(0))
        places = torch.arange(WINDOW)[None]
        rotation = module.rotary_emb(x, places)
        for layer, block in enumerate(module.layers):
            read = block.input_layernorm(laid_out(smollm2_file.read(f"{layer}_attn_out")))
            written = block.self_attn(read, position_embeddings=rotation, attention_mask=None)[0]
            assert same_bits(written.flatten(0, 1), smollm2_file.write(f"{layer}_attn_out")), layer
            read = block.post_attention_layernorm(laid_out(smollm2_file.read(f"{layer}_mlp_out")))
            assert same_bits(block.mlp(read).flatten(0, 1), smollm2_file.write(f"{layer}_mlp_out")), layer


def test_states_of_smollm2_are_a_plain_loop(smollm2_file: Capture) -> None:
    """T-C1: x = x + w over the file, from the rows of the embedding table to the last state."""
    table = smollm2().module.get_parameter("model.embed_tokens.weight")
    x = table[smollm2_file.tokens.id]
    count = len(smollm2_file.anatomy.stream().sublayers)
    for s in range(count):
        assert same_bits(x, smollm2_file.read(s)), s
        x = x + smollm2_file.write(s)
    assert same_bits(x, smollm2_file.final)


def test_states_of_smollm2_in_bfloat16_are_a_plain_loop(tmp_path: Path) -> None:
    module = copy.deepcopy(smollm2().module).bfloat16()
    ids = torch.arange(100, 132)[None]
    with sl.capture(module, tokens=ids, window=32, out=tmp_path / "x.h5", progress=False) as capture:
        x = module.get_parameter("model.embed_tokens.weight")[capture.tokens.id]
        for s in range(len(capture.anatomy.stream().sublayers)):
            assert same_bits(x, capture.read(s)), s
            x = x + capture.write(s)
        assert same_bits(x, capture.final)


def test_the_order_of_the_sum_does_not_matter(smollm2_file: Capture) -> None:
    """T-C2: at some states of the 61, and the last."""
    count = len(smollm2_file.anatomy.stream().sublayers)
    for k in (1, 7, 30, 47, count):
        terms = [smollm2_file.read(0), *(smollm2_file.write(s) for s in range(k))]
        assert worst_of_orders(terms, smollm2_file.stream().state(k)) < 1e-5, k


def test_minilm_between_two_reads(minilm_file: Capture) -> None:
    """T-C1 and T-C4: the own norm of what was read and written is read next, the own dense layers of it are written."""
    module: Any = minilm().module
    with quietly():
        for layer, block in enumerate(module.encoder.layer):
            read, written = (laid_out(f(f"{layer}_attn_out")) for f in (minilm_file.read, minilm_file.write))
            attended = block.attention.self(read)[0]
            assert same_bits(block.attention.output.dense(attended), written), layer
            middle = block.attention.output.LayerNorm(written + read)
            read, written = (laid_out(f(f"{layer}_mlp_out")) for f in (minilm_file.read, minilm_file.write))
            assert same_bits(middle, read), layer
            assert same_bits(block.output.dense(block.intermediate(read)), written), layer
            after = block.output.LayerNorm(written + read)
            following = minilm_file.final if layer == 5 else minilm_file.read(f"{layer + 1}_attn_out")
            assert same_bits(after, laid_out(following)), layer


@pytest.mark.parametrize("load", [smollm2, minilm])
def test_looking_at_heads_changes_no_bit_of_the_output(load: Any) -> None:
    """T-C3."""
    model = load()
    module: Any = model.module
    ids = torch.arange(200, 232)[None]
    with torch.no_grad():
        before = module(ids)[0]
        with observe(module, sl.discover(module, {"input_ids": ids}), mixes=True) as seen:
            during = module(ids)[0]
        assert same_bits(before, during)
        assert same_bits(module(ids)[0], before)
    assert len(seen.value_mixes["main"]) == len(seen.writes["main"]) / 2
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
