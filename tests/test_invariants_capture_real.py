"""Laws of a capture (METHODS.md, T-C1 to T-C4) for real weights and text, with the models' own modules alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import streamlens as sl
from streamlens.errors import UsageError
from streamlens.observation import observe
from streamlens.proof import same_bits
from streamlens.reader.opening import Capture
from tests.conftest import REAL, minilm, smollm2
from tests.test_invariants_capture import quietly, worst_of_orders

pytestmark = pytest.mark.real

WINDOW = REAL["window"]


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


@pytest.mark.parametrize(("fixture", "load"), [("smollm2_file", smollm2), ("minilm_file", minilm)])
def test_however_the_text_is_cut_and_whatever_is_stored(
    fixture: str, load: Any, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """T-C5: document by document and without reads, against both at once with them."""
    whole: Capture = request.getfixturevalue(fixture)
    cut_up: dict[str, Any] = {**REAL, "batch_tokens": WINDOW, "heads": False, "compact": True}
    with sl.capture(load(), out=tmp_path / "x.h5", **cut_up) as cut:
        assert [b.stop for b in cut.stream().blocks()] == [WINDOW, 2 * WINDOW]
        for column in ("id", "doc", "position"):
            assert torch.equal(getattr(cut.tokens, column), getattr(whole.tokens, column))
        stream = whole.anatomy.stream()
        for s in stream.labels:
            close(cut.write(s), whole.write(s))
            close(cut.read(s), whole.read(s))
        close(cut.final, whole.final)
        for row in range(len(stream.norms)):
            torch.testing.assert_close(cut.stream().norm_rstd[row], whole.stream().norm_rstd[row], rtol=1e-4, atol=0)


def close(ours: Tensor, theirs: Tensor) -> None:
    """Each token by itself: SmolLM2's sink is a thousand times as large as the other tokens."""
    off = (ours.double() - theirs.double()).norm(dim=-1) / theirs.double().norm(dim=-1)
    assert float(off.max()) < 1e-4


@pytest.mark.parametrize("load", [smollm2, minilm])
def test_ragged_documents_and_padded_ones(load: Any, tmp_path: Path) -> None:
    """T-C6: documents of any length are each as if alone; padded into one batch they are refused."""
    model = load()
    documents = [list(range(1000, 1000 + 7 * n, 7)) for n in (5, 9)]
    with sl.capture(model, tokens=documents, ragged=True, out=tmp_path / "x.h5", progress=False) as capture:
        anatomy, stream = capture.anatomy, capture.anatomy.stream()
        for number, ids in enumerate(documents):
            rows = capture.tokens.doc == number
            assert capture.tokens.id[rows].tolist() == ids
            assert capture.tokens.position[rows].tolist() == list(range(len(ids)))
            with quietly(), observe(model.module, anatomy) as alone:
                model.module(torch.tensor([ids]))
            for s in stream.sublayers:
                close(capture.write(s.label)[rows], alone.writes[stream.name][s.index][0])
                close(capture.read(s.label)[rows], alone.states[stream.name][s.read][0])
    width = max(map(len, documents))
    padded = torch.tensor([[0] * (width - len(row)) + row for row in documents])
    inputs = {"input_ids": padded, "attention_mask": (padded > 0).long()}
    for given in (inputs, {name: tensor.flip(1) for name, tensor in inputs.items()}):
        with pytest.raises(UsageError, match=r"attention_mask marks 4 of 18 .*ragged=True"):
            sl.capture(model, inputs=given, out=tmp_path / "padded.h5", progress=False)
    assert not (tmp_path / "padded.h5").exists()
