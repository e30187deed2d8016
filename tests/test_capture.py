"""The whole way from a model to a file and back: every stored number against the model's own, and planted faults."""

from __future__ import annotations

from collections.abc import Callable
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
from streamlens.errors import CorpusError, IntegrityError, MissingDataError, ProofError, UsageError
from streamlens.observe import observe, tokens
from streamlens.proof import same_bits
from streamlens.reader.opening import Capture
from streamlens.reader.verifying import verify
from tests.conftest import Case, case

SHAPES = ["gpt2", "gptj", "gemma2", "bert", "user_post_norm", "transformer_pre", "vit", "inplace_into_branch", "mamba"]


def taken(found: Case, path: Path, **options: Any) -> Capture:
    if found.name == "transformer_pre":  # its two sides differ in length
        options.setdefault("streams", ["decoder"])
    return sl.capture(found.module, inputs=found.inputs, out=path, progress=False, batch_tokens=11, **options)


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


class TestPlantedFaults:
    """Each fault is a way in which other tools went wrong; each must be caught by the proof."""

    def test_a_hook_one_module_too_deep(self, tmp_path: Path) -> None:
        """OLMo-2: the branch's module output is not yet what is added; a norm follows."""
        found = case("olmo2")
        inside: list[Tensor] = []
        branch: Any = found.module.get_submodule("model.layers.0.mlp")
        handle = branch.register_forward_hook(lambda module, args, output: inside.append(output.clone()))
        try:
            self._refused(found, "write", lambda i, t: inside[-1] if i == 1 else t, tmp_path)
        finally:
            handle.remove()

    def test_a_forgotten_multiplier(self, tmp_path: Path) -> None:
        self._refused(case("granite"), "write", lambda i, t: t / 0.22 if i == 2 else t, tmp_path)

    def test_a_missing_embedding_part(self, tmp_path: Path) -> None:
        self._refused(case("gpt2"), "part", lambda i, t: torch.zeros_like(t) if i == 1 else t, tmp_path)

    def test_a_write_that_is_swapped_with_its_neighbour(self, tmp_path: Path) -> None:
        kept: list[Tensor] = []

        def swap(index: int, tensor: Tensor) -> Tensor:
            kept.append(tensor.clone())
            return kept[-2] if index == 3 else tensor

        self._refused(case("llama"), "write", swap, tmp_path)

    def test_one_flipped_bit_in_one_write(self, tmp_path: Path) -> None:
        def flip(index: int, tensor: Tensor) -> Tensor:
            wrong = tensor.clone()
            if index == 1:
                wrong.view(torch.int32).view(-1)[5] ^= 1 << 22
            return wrong

        self._refused(case("gpt2"), "write", flip, tmp_path)

    @staticmethod
    def _refused(found: Case, what: str, fault: Callable[[int, Tensor], Tensor], tmp_path: Path) -> None:
        """Corrupt what the proof is given, as a wrong hook would."""
        from streamlens import proof

        original: Any = getattr(proof.Replay, what)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(proof.Replay, what, lambda self, index, t: original(self, index, fault(index, t)))
            with pytest.raises(ProofError, match="the writes do not add up: x_"):
                taken(found, tmp_path / "x.h5")
            assert not (tmp_path / "x.h5").exists()
            with taken(found, tmp_path / "x.h5", allow_unproven=True) as capture:
                assert not capture.proof.exact
                assert capture.proof.worst > 0

    def test_a_stream_that_is_scaled_only_after_the_pilot(self, tmp_path: Path) -> None:
        """A model whose skip changes between the pilot and the capture: caught on the block, and nothing is kept."""
        model = _Drifting()
        with pytest.raises(ProofError, match=r"x_2 of stream 'main' \(after 1_mlp_out\)"):
            sl.capture(model, inputs=torch.randn(20, 5, 8), out=tmp_path / "x.h5", batch_tokens=10, progress=False)
        assert not (tmp_path / "x.h5").exists()

    def test_an_addition_in_place_that_overwrites_a_read(self, tmp_path: Path) -> None:
        """A recorder that kept references, not copies, would store the sum under the name of the read."""
        found = case("inplace_add")
        with taken(found, tmp_path / "x.h5") as capture:
            first, second = capture.read(0), capture.read(1)
            assert not same_bits(first, second)
            assert same_bits(first + capture.write(0), second)

    def test_a_flipped_byte_in_the_file(self, tmp_path: Path) -> None:
        found = case("gpt2")
        path = tmp_path / "x.h5"
        taken(found, path).close()
        with h5py.File(path) as file:
            offset = file["/streams/main/write"].id.get_offset()
        raw = bytearray(path.read_bytes())
        raw[offset + 4 * 33 * 32 * 2 + 3] ^= 1
        path.write_bytes(raw)
        verified = verify(path)
        assert not verified.ok
        assert "/streams/main/write[2]" in str(verified.problems[0])
        with pytest.raises(IntegrityError, match=r"write\[2\], block 0"):
            verified.demand()


class _Drifting(nn.Module):
    """Scales its stream by a hair once it has run often enough for the pilot to be over."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        for index, layer in enumerate(self.layers):
            x = x + layer(x)
            if index == 1 and self.runs > 9:
                x = torch.mul(x, 1.001)
        return x


class TestErrorsBeforeTheFirstForward:
    def test_ids_beyond_the_vocabulary(self, tmp_path: Path) -> None:
        with pytest.raises(CorpusError, match=r"97"):
            sl.capture(case("gpt2").module, tokens=[1, 2, 97], out=tmp_path / "x.h5", progress=False)

    def test_a_window_beyond_the_learned_positions(self, tmp_path: Path) -> None:
        with pytest.raises(CorpusError, match="position"):
            sl.capture(case("gpt2").module, tokens=list(range(90)), window=64, out=tmp_path / "x.h5", progress=False)

    def test_no_tokens(self, tmp_path: Path) -> None:
        with pytest.raises(CorpusError):
            sl.capture(case("gpt2").module, tokens=[], out=tmp_path / "x.h5", progress=False)

    def test_text_and_inputs_together(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="either inputs or a text"):
            sl.capture(case("gpt2").module, inputs=torch.zeros(1, 2), tokens=[1], out=tmp_path / "x.h5", progress=False)

    def test_random_model_outputs_are_refused(self, tmp_path: Path) -> None:
        class Noisy(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(8, 8)

            def forward(self, x: Tensor) -> Tensor:
                written: Tensor = self.layer(x) + torch.randn_like(x)
                return x + written

        with pytest.raises((ProofError, sl.errors.AnatomyError)):
            sl.capture(wrap(Noisy(), "noisy", {}), inputs=torch.randn(2, 3, 8), out=tmp_path / "x.h5", progress=False)


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
