"""The whole way from a model to a file and back: every stored number against the model's own, and planted faults."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import streamlens as sl
from streamlens.calling import eager_math, invoke
from streamlens.checkpoint.model import wrap
from streamlens.errors import MissingDataError, UsageError
from streamlens.observation import observe, tokens
from streamlens.proof import same_bits
from streamlens.reader.verifying import verify
from tests.conftest import Case, case, taken

SHAPES = ["gpt2", "gptj", "gemma2", "bert", "user_post_norm", "transformer_pre", "vit", "inplace_into_branch", "mamba"]


@pytest.mark.parametrize("name", SHAPES)
class TestAgainstTheModel:
    """Captured in several blocks, compared with one observed pass over all documents at once, block by block."""

    def test_full(self, name: str, tmp_path: Path) -> None:
        found = case(name)
        with taken(found, tmp_path / "full.h5", heads=True) as capture:
            assert capture.proof.exact
            assert bool(capture.attrs["head_exact"])
            for view in capture.streams.values():
                stream = view.anatomy
                for block in view.blocks():
                    seen = self._one_block(found, block.start, block.stop, stream.name)
                    for sublayer in stream.sublayers:
                        assert same_bits(block.writes[sublayer.index], seen["write", sublayer.index])
                        stored = view.read(sublayer.index)[block.start : block.stop]
                        assert same_bits(stored, seen["state", sublayer.read])
                    for index in range(len(stream.parts)):
                        assert same_bits(block.parts[index], seen["part", index])
                    assert same_bits(view.final[block.start : block.stop], seen["state", len(stream.steps)])

    def test_compact_serves_the_same_reads(self, name: str, tmp_path: Path) -> None:
        found = case(name)
        with taken(found, tmp_path / "full.h5") as full, taken(found, tmp_path / "compact.h5", compact=True) as compact:
            assert compact.n_bytes < full.n_bytes
            for name, view in compact.streams.items():
                assert same_bits(view.reads.contiguous(), full.stream(name).reads.contiguous())
                assert same_bits(view.writes.contiguous(), full.stream(name).writes.contiguous())

    def test_verify_accepts_it(self, name: str, tmp_path: Path) -> None:
        found = case(name)
        for compact in (False, True):
            path = tmp_path / f"{compact}.h5"
            taken(found, path, compact=compact).close()
            verified = verify(path)
            assert verified.ok
            assert verified.exact_blocks == verified.blocks

    @staticmethod
    def _one_block(found: Case, start: int, stop: int, name: str) -> dict[tuple[str, int], Tensor]:
        """Run one document by itself under `observe`: the blocks here hold one document each."""
        stream = found.anatomy.stream(name)
        positions = stop - start
        doc = start // positions
        axis = 1 if stream.position_first else 0
        inputs: Any = found.inputs
        if isinstance(inputs, Tensor):
            inputs = inputs.narrow(axis, doc, 1)
        else:
            inputs = {k: v.narrow(axis, doc, 1) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        with torch.no_grad(), observe(found.module, found.anatomy) as seen:
            invoke(found.module, inputs)
        kept = {"part": seen.parts, "state": seen.states, "write": seen.writes}
        return {
            (kind, index): tokens(tensor, stream, 1, positions).flatten(0, 1)
            for kind, streams in kept.items()
            for index, tensor in streams[name].items()
        }


def test_both_streams_of_an_encoder_decoder_are_kept_when_they_are_equally_long(tmp_path: Path) -> None:
    found = case("t5")
    ids = found.inputs["input_ids"]  # type: ignore[index]
    with sl.capture(found.module, tokens=ids, window=11, out=tmp_path / "t5.h5", progress=False) as capture:
        assert capture.proof.exact
        assert set(capture.streams) == {"encoder", "decoder"}
        assert capture.stream("decoder").write("0_cross_attn_out").shape == (33, 32)


def test_streams_of_different_length_are_captured_one_at_a_time(tmp_path: Path) -> None:
    found = case("t5")
    with pytest.raises(UsageError, match=r"different lengths .*streams=\('encoder',\)"):
        taken(found, tmp_path / "both.h5")
    for name, length in (("encoder", 33), ("decoder", 21)):
        with taken(found, tmp_path / f"{name}.h5", streams=[name]) as capture:
            assert capture.proof.exact
            assert capture.n_tokens == length


def test_output_summary_against_a_plain_loop(tmp_path: Path) -> None:
    found = case("gpt2")
    ids = found.inputs["input_ids"]  # type: ignore[index]
    with torch.no_grad():
        logits = invoke(found.module, found.inputs).double()
    with sl.capture(
        found.module, tokens=ids, window=11, batch_tokens=33, out=tmp_path / "x.h5", top_k=3, progress=False
    ) as capture:
        row = 0
        for doc in range(ids.shape[0]):
            for position in range(ids.shape[1]):
                z = logits[doc, position]
                expected = float(z.exp().sum().log())
                assert float(capture.output["lse"][row]) == pytest.approx(expected, rel=1e-5)
                best = sorted(range(len(z)), key=lambda v: -float(z[v]))[:3]
                assert capture.output["topk_id"][row].tolist() == best
                target = capture.output["target_logit"][row]
                if position + 1 < ids.shape[1]:
                    assert float(target) == pytest.approx(float(z[ids[doc, position + 1]]), rel=1e-5)
                else:
                    assert torch.isnan(target)
                row += 1


def test_the_target_of_an_encoder_is_the_token_itself(tmp_path: Path) -> None:
    found = case("bert")
    ids = found.inputs["input_ids"]  # type: ignore[index]
    with torch.no_grad():
        logits = invoke(found.module, found.inputs)
    with sl.capture(found.module, tokens=ids, window=11, out=tmp_path / "x.h5", progress=False) as capture:
        own = logits.flatten(0, 1).gather(-1, ids.reshape(-1, 1))[:, 0]
        assert torch.allclose(capture.output["target_logit"], own, atol=1e-5)


def test_norm_statistics_give_the_states_of_a_post_norm_model(tmp_path: Path) -> None:
    """x_{s+1} = gain * (x_s + w_s - mean) * rstd + bias, in float64, from the stored statistics."""
    found = case("bert")
    with taken(found, tmp_path / "x.h5") as capture:
        view = capture.stream()
        norms = view.anatomy.norms
        assert [n.label for n in norms][:2] == ["embed", "0_attn_out"]
        for index, norm in enumerate(norms):
            if norm.state == 0:
                total = sum(view.embed(p.label).double() for p in view.anatomy.parts)
            else:
                assert norm.state is not None
                total = view.state(norm.state - 1).double() + view.write(norm.state - 1).double()
            mean, rstd = view.norm_mean[index].double(), view.norm_rstd[index].double()
            assert norm.weight is not None
            assert norm.bias is not None
            gain, bias = view.constants[norm.weight].double(), view.constants[norm.bias].double()
            rebuilt = gain * (total - mean[:, None]) * rstd[:, None] + bias
            assert norm.state is not None
            assert torch.allclose(rebuilt, view.state(norm.state).double(), atol=1e-4)


def test_value_mixes_give_the_attention_writes(tmp_path: Path) -> None:
    found = case("nanogpt")
    with taken(found, tmp_path / "x.h5", heads=True) as capture:
        view = capture.stream()
        for layer, block in enumerate(found.module.transformer.h):  # type: ignore[union-attr,arg-type]
            label = f"{layer}_attn_out"
            projected = block.attn.c_proj(view.value_mix(label))
            assert torch.allclose(projected, view.write(label), atol=1e-5)
            assert view.anatomy.find(label).heads == 4


class TestNarrowed:
    def test_layers_and_kinds(self, tmp_path: Path) -> None:
        found = case("gpt2")
        with (
            taken(found, tmp_path / "all.h5") as whole,
            taken(found, tmp_path / "some.h5", layers=[1, 2], kinds=["mlp"]) as some,
        ):
            assert some.stream().labels == ("1_mlp_out", "2_mlp_out")
            for label in some.stream().labels:
                assert same_bits(some.write(label), whole.write(label))
                assert same_bits(some.read(label), whole.read(label))
            with pytest.raises(MissingDataError, match="does not hold '0_attn_out'"):
                some.write("0_attn_out")

    def test_positions(self, tmp_path: Path) -> None:
        found = case("gpt2")
        with (
            taken(found, tmp_path / "all.h5") as whole,
            taken(found, tmp_path / "some.h5", positions=[0, 4], compact=True) as some,
        ):
            rows = np.isin(whole.tokens.position.numpy(), [0, 4])
            assert some.tokens.position.tolist() == [0, 4] * 3
            assert same_bits(some.writes.contiguous(), whole.writes[:, rows])
            assert same_bits(some.reads.contiguous(), whole.reads[:, rows])

    @pytest.mark.parametrize(
        ("choice", "message"),
        [
            ({"layers": [7]}, "has layers 0 to 2, not 7"),
            ({"kinds": ["ffn"]}, "no kind 'ffn'; choose from attn"),
            ({"kinds": ["mixer"]}, r"no sublayer of that layer and kind; it has \['attn', 'mlp'\]"),
            ({"positions": [99]}, r"none of the positions \[99\] occurs"),
            ({"streams": ["encoder"]}, "no stream 'encoder'; this model has main"),
            ({"compact": True, "layers": [1]}, "cannot be combined with --layers"),
        ],
    )
    def test_impossible_choices_are_refused_before_anything_is_written(
        self, choice: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        with pytest.raises((UsageError, MissingDataError), match=message):
            taken(case("gpt2"), tmp_path / "x.h5", **choice)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_stored_as_it_is(dtype: torch.dtype, tmp_path: Path) -> None:
    found = case("llama", dtype)
    path = tmp_path / "x.h5"
    with taken(found, path) as capture:
        assert capture.proof.exact
        assert capture.writes.dtype == dtype
        ours = capture.writes.float().numpy()
    with h5py.File(path) as plain:
        assert np.array_equal(plain["/streams/main/write"][:].astype(np.float32), ours)


def test_ragged_documents_equal_each_document_alone(tmp_path: Path) -> None:
    """No padding: what is stored for a short document is what the model computes for it by itself."""
    found = case("llama")
    documents = [[5, 9, 2, 7, 1], [3, 3], [8, 1, 4, 4, 90, 11, 12], [6, 5]]
    with sl.capture(found.module, tokens=documents, ragged=True, out=tmp_path / "x.h5", progress=False) as capture:
        stream = found.anatomy.stream()
        for number, ids in enumerate(documents):
            rows = capture.tokens.doc == number
            assert capture.tokens.id[rows].tolist() == ids
            with torch.no_grad(), observe(found.module, found.anatomy) as seen:
                invoke(found.module, {"input_ids": torch.tensor([ids]), "use_cache": False})
            for index in range(len(stream.sublayers)):
                alone = tokens(seen.writes["main"][index], stream, 1, len(ids))[0]
                assert torch.allclose(capture.write(index)[rows], alone, atol=1e-5)


def test_capturing_twice_is_idempotent_and_another_choice_is_refused(tmp_path: Path) -> None:
    found = case("gpt2")
    path = tmp_path / "x.h5"
    taken(found, path).close()
    before = path.read_bytes()
    taken(found, path).close()
    assert path.read_bytes() == before
    with pytest.raises(UsageError, match=r"is another capture(.|\n)*store\.compact"):
        taken(found, path, compact=True)
    taken(found, path, compact=True, overwrite=True).close()
    assert path.stat().st_size < len(before)


def test_the_head_is_not_computed_when_nothing_needs_it(tmp_path: Path) -> None:
    found = case("gpt2")
    calls: list[int] = []
    handle = found.module.lm_head.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    try:
        from streamlens.recorder.capturing import prepare, run
        from streamlens.recorder.plan import Choice

        model = wrap(found.module, "gpt2", {})
        plan = prepare(model, Choice(output=False), inputs=found.inputs)
        calls.clear()
        run(model, plan, tmp_path / "x.h5", progress=False).close()
        assert calls == []
    finally:
        handle.remove()


def test_a_live_module_keeps_its_mode_and_its_gradients(tmp_path: Path) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train()
    model.layers[0].eval()
    next(model.parameters()).requires_grad_(False)
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    sl.capture(model, inputs=torch.randn(2, 5, 8), out=tmp_path / "x.h5", progress=False).close()
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags


def test_planned_bytes_are_exact(tmp_path: Path) -> None:
    from streamlens.recorder.capturing import prepare, run
    from streamlens.recorder.plan import Choice

    found = case("bert")
    model = wrap(found.module, "bert", {})
    plan = prepare(model, Choice(heads=True), inputs=found.inputs)
    run(model, plan, tmp_path / "x.h5", progress=False).close()
    with h5py.File(tmp_path / "x.h5") as file:
        stored = sum(file[i.name].id.get_storage_size() for i in plan.layout.items)
    assert plan.n_bytes == stored


def test_eager_math_is_restored() -> None:
    with eager_math():
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_model_that_was_dispatched_to_devices_is_captured_as_it_is(name: str, tmp_path: Path) -> None:
    """`device_map` wraps every forward in hooks that move what goes in and out; here all of them say cpu."""
    accelerate = pytest.importorskip("accelerate")
    found = case(name)
    with taken(found, tmp_path / "plain.h5") as plain:
        module = copy.deepcopy(found.module)
        places = {
            path: "cpu" for path, child in module.named_modules() if path and (child._parameters or not child._modules)
        }
        accelerate.dispatch_model(module, places, main_device="cpu", force_hooks=True)
        with taken(replace(found, module=module), tmp_path / "placed.h5") as placed:
            assert placed.proof.exact
            assert same_bits(placed.writes, plain.writes)
            assert same_bits(placed.final, plain.final)


def test_what_was_assumed_is_told_in_python_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without text and tokenizer the tokens are random, which nobody should find out from a title."""
    found = case("gpt2")
    sl.capture(found.module, out=tmp_path / "random.h5", max_tokens=32, window=8, progress=False)
    assert any("random" in record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    caplog.clear()
    with sl.quiet():
        sl.capture(found.module, out=tmp_path / "again.h5", max_tokens=32, window=8, progress=False)
    assert not caplog.records
