"""What a model was shown, taken at its word: padding is no text, a rerun is of the same run, a stream is as it sees."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import streamlens as sl
from streamlens.analyses.ablation.runs import Runs, Setting
from streamlens.analyses.ablation.spans import Drop
from streamlens.analyses.source import Source, source_of, target_ids
from streamlens.calling import eager_math, invoke
from streamlens.checkpoint.model import wrap
from streamlens.edits import run_between
from streamlens.errors import MissingDataError, UsageError
from tests.conftest import case

IDS = torch.arange(22).reshape(2, 11) % 30 + 1
MASK = torch.ones_like(IDS)
PADDED = MASK.clone()
PADDED[1, 8:] = 0


def model_of(name: str) -> sl.Model:
    return wrap(case(name).module, name, {})


def both(name: str, tmp_path: Path, **shown: Any) -> tuple[Source, Source]:
    """The same tokens live and from a file."""
    model = model_of(name)
    path = sl.capture(model, out=tmp_path / "x.h5", progress=False, **shown).path
    return source_of(model, **shown), source_of(path, model=model)


class TestPadding:
    @pytest.mark.parametrize("mask", [PADDED, PADDED.bool(), PADDED.flip(1)])
    def test_a_mask_with_zeros_is_refused_at_both_doors(self, mask: torch.Tensor, tmp_path: Path) -> None:
        inputs = {"input_ids": IDS, "attention_mask": mask}
        with pytest.raises(UsageError, match=r"attention_mask .* 3 of 22 .*tokens=.*ragged=True"):
            sl.capture(model_of("gpt2"), inputs=inputs, out=tmp_path / "x.h5", progress=False)
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(UsageError, match=r"tokens=.*ragged=True"):
            sl.logit_lens(model_of("gpt2"), inputs=inputs, progress=False)

    def test_what_is_advised_gives_the_loss_of_each_document_alone(self) -> None:
        model = model_of("gpt2")
        documents = [row[keep.bool()].tolist() for row, keep in zip(IDS, PADDED, strict=True)]
        found = sl.logit_lens(model, tokens=documents, ragged=True, progress=False)
        losses = []
        for ids in documents:
            with torch.no_grad():
                logits = invoke(model.module, {"input_ids": torch.tensor([ids])})[0].double()
            losses.append(torch.nn.functional.cross_entropy(logits[1:-1], torch.tensor(ids[2:]), reduction="none"))
        rows = found.rows()
        assert rows[-1]["cross_entropy"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)

    def test_a_mask_of_ones_is_fine(self, tmp_path: Path) -> None:
        inputs = {"input_ids": IDS, "attention_mask": MASK}
        for source in both("gpt2", tmp_path, inputs=inputs):
            assert source.n_tokens == 22
            assert source.inputs(next(source.blocks()))

    def test_padding_on_the_encoders_side_is_no_text_of_the_decoder(self) -> None:
        inputs = {"input_ids": IDS, "attention_mask": PADDED, "decoder_input_ids": IDS.flip(1)}
        assert source_of(model_of("t5"), inputs=inputs).n_tokens == 22
        assert source_of(model_of("t5"), inputs=inputs, stream="decoder").n_tokens == 22
        with pytest.raises(UsageError, match="attention_mask"):
            source_of(model_of("t5"), inputs=inputs, stream="encoder")
        with pytest.raises(UsageError, match="decoder_attention_mask"):
            source_of(model_of("t5"), inputs={**inputs, "decoder_attention_mask": PADDED})

    def test_padding_marked_with_true_as_torch_does(self) -> None:
        layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        module = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        inputs = {"src": torch.randn(2, 11, 8), "src_key_padding_mask": ~PADDED.bool()}
        with pytest.raises(UsageError, match="src_key_padding_mask"):
            source_of(module, inputs=inputs)
        inputs["src_key_padding_mask"] = ~MASK.bool()
        assert source_of(module, inputs=inputs).n_tokens == 22


RERUNS: list[tuple[str, dict[str, Any], str | None]] = [
    ("gpt2", {"input_ids": IDS}, None),
    ("gpt2", {"input_ids": IDS, "attention_mask": MASK, "use_cache": False}, None),
    ("gpt2", {"input_ids": IDS, "position_ids": torch.arange(11).flip(0).expand(2, 11)}, "position_ids"),
    ("bert", {"input_ids": IDS, "token_type_ids": MASK}, "token_type_ids"),
    ("t5", {"input_ids": IDS, "decoder_input_ids": IDS}, None),
    ("t5", {"input_ids": IDS.flip(1), "decoder_input_ids": IDS}, "input_ids"),
    ("nanogpt", {"": IDS}, None),
    ("nanogpt", {"idx": IDS}, None),
]


@pytest.mark.parametrize(("name", "inputs", "further"), RERUNS)
def test_a_rerun_is_of_the_run_in_the_file_or_is_refused(
    name: str, inputs: dict[str, Any], further: str | None, tmp_path: Path
) -> None:
    """What is rebuilt from the file is fed to the model again: the output is that of the inputs that were given."""
    if name == "nanogpt" and "idx" in inputs:
        inputs = {next(iter(inspect.signature(case(name).module.forward).parameters)): IDS}
    given: Any = inputs.get("", inputs)
    live, stored = both(name, tmp_path, inputs=given)
    block = next(stored.blocks())
    if further is not None:
        with pytest.raises(MissingDataError, match=rf"alone do not give \({further}\).* live model"):
            stored.inputs(block)
        with pytest.raises(MissingDataError, match=further):
            sl.gradient_flow(stored, progress=False)
        return
    with torch.no_grad(), eager_math():
        wanted = invoke(live.model.module, given)
        torch.testing.assert_close(invoke(stored.model.module, stored.inputs(block)), wanted, rtol=1e-5, atol=1e-5)


class TestPositions:
    """A capture of some positions can be run again where the model, on those alone, computes what is in the file."""

    @pytest.mark.parametrize(
        ("name", "positions", "fine"),
        [
            ("gpt2", range(6), True),
            ("gpt2", range(3, 9), False),
            ("bert", range(6), False),
            ("bert", range(11), True),
            ("t5", range(6), False),
        ],
    )
    def test_only_what_the_model_would_compute_again(
        self, name: str, positions: range, fine: bool, tmp_path: Path
    ) -> None:
        model = model_of(name)
        options: dict[str, Any] = {"tokens": IDS, "window": 11, "positions": list(positions), "progress": False}
        with sl.capture(model, out=tmp_path / "x.h5", **options) as capture:
            source = source_of(capture, model=model)
            block = next(source.blocks())
            if not fine:
                for refused in (source.inputs, lambda b: sl.gradient_flow(source, progress=False)):
                    with pytest.raises(MissingDataError, match="capture without --positions"):
                        refused(block)
                return
            runs = Runs(Setting.of(source), block, source.inputs(block))
            with torch.no_grad(), eager_math():
                again = runs.between(0, runs.state(0), runs.last)
            torch.testing.assert_close(again, runs.state(runs.last), rtol=1e-5, atol=1e-5)


class TestCausality:
    @pytest.mark.parametrize("stored", [False, True])
    def test_it_belongs_to_a_stream(self, stored: bool, tmp_path: Path) -> None:
        model = model_of("t5")
        shown: dict[str, Any] = {"tokens": IDS, "window": 11}
        origin = sl.capture(model, out=tmp_path / "x.h5", progress=False, **shown) if stored else model
        options: dict[str, Any] = {"model": model} if stored else shown
        encoder, decoder = (source_of(origin, stream=name, **options) for name in ("encoder", "decoder"))
        assert (encoder.causal, decoder.causal) == (False, True)
        block = next(encoder.blocks())
        assert target_ids(encoder, block).tolist() == block.ids.tolist()
        assert target_ids(decoder, block)[:10].tolist() == block.ids[1:11].tolist()

    def test_position_0_of_an_encoder_feels_what_was_dropped_after_it(self) -> None:
        """Two writes left out everywhere but at position 0, by a plain loop over the steps of the encoder."""
        source = source_of(model_of("t5"), tokens=IDS, window=11, stream="encoder")
        block = next(source.blocks())
        inputs = source.inputs(block)
        runs = Runs(Setting.of(source, protect_first=True), block, inputs)
        with torch.no_grad(), eager_math():
            at, ours, _ = runs.after(Drop("two", "several", (0, 1), (0, 2), "zero"))
            state = block.states[0].reshape(2, 11, -1)
            for step in range(at):
                module, anatomy = source.model.module, source.anatomy
                whole = run_between(module, anatomy, step, state, step + 1, inputs, stream="encoder")
                state = torch.cat([whole[:, :1], state[:, 1:]], 1) if step in (0, 2) else whole
        assert at == 3
        torch.testing.assert_close(ours, state, rtol=1e-5, atol=1e-5)
