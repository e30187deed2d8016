"""Where blocks come from: a file and a live run give the same, and what cannot be had is said before anything runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import streamlens as sl
from streamlens.analyses.source import CaptureSource, source_of, target_ids
from streamlens.calling import invoke
from streamlens.checkpoint.model import wrap
from streamlens.checkpoint.sniff import is_hdf5
from streamlens.errors import MissingDataError, ProofError, UsageError
from streamlens.observation import observe
from streamlens.proof import same_bits
from tests.conftest import case

ROOT = Path(__file__).resolve().parent.parent
SHAPES = [
    "gpt2",
    "llama",
    "gemma2",
    "gptj",
    "granite",
    "bert",
    "user_post_norm",
    "vit",
    "mamba",
    "user_post_norm_embeddings",
]


@pytest.mark.parametrize("name", SHAPES)
def test_a_live_block_is_the_block_of_a_file_bit_for_bit(name: str, tmp_path: Path) -> None:
    found = case(name)
    model = wrap(found.module, name, {})
    with sl.capture(model, inputs=found.inputs, out=tmp_path / "x.h5", heads=True, progress=False) as capture:
        live = source_of(model, inputs=found.inputs, heads=True, batch_tokens=2048)
        for stored, seen in zip(source_of(capture).blocks(), live.blocks(), strict=True):
            for name_of in ("ids", "doc", "position"):
                assert torch.equal(getattr(stored, name_of), getattr(seen, name_of))
            for rows in ("parts", "states", "writes"):
                pairs = zip(getattr(stored, rows), getattr(seen, rows), strict=True)
                assert all(same_bits(a.contiguous(), b.contiguous()) for a, b in pairs)
            for first, second in zip(stored.norms, seen.norms, strict=True):
                assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))
            assert set(stored.mixes) == set(seen.mixes)
            assert all(same_bits(stored.mixes[i], seen.mixes[i]) for i in stored.mixes)


@pytest.mark.parametrize("name", ["gpt2", "user_post_norm"])
def test_the_inputs_of_a_block_give_its_states(name: str, tmp_path: Path) -> None:
    found = case(name)
    ids = torch.arange(40).reshape(4, 10) % 30
    model = wrap(found.module, name, {})
    with sl.capture(model, tokens=ids, out=tmp_path / "x.h5", batch_tokens=20, progress=False) as capture:
        source = source_of(capture, model=model)
        for block in source.blocks():
            with torch.no_grad(), observe(found.module, source.anatomy) as seen:
                invoke(found.module, source.inputs(block))
            last = seen.states["main"][len(source.stream.steps)]
            laid_out = last.transpose(0, 1) if source.stream.position_first else last
            assert same_bits(laid_out.flatten(0, 1).contiguous(), block.states[-1])


def test_targets_against_a_plain_loop(tmp_path: Path) -> None:
    """The last token of a window has none, also where the next window goes on with the same document."""
    found = case("gpt2")
    documents = [list(range(1, 30)), list(range(5, 17))]
    with sl.capture(found.module, tokens=documents, window=6, out=tmp_path / "x.h5", progress=False) as capture:
        source = source_of(capture)
        (block,) = source.blocks()
        wanted = []
        for token in range(block.stop):
            last = token + 1 == block.stop or int(block.position[token + 1]) == 0
            wanted.append(-1 if last else int(block.ids[token + 1]))
        assert target_ids(source, block).tolist() == wanted
        known = torch.tensor(wanted) >= 0
        np.testing.assert_array_equal(~torch.isnan(capture.output["target_logit"]).numpy(), known.numpy())


def test_the_model_of_a_capture_is_found_and_made_sure_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    packed = ROOT / "fixtures" / "model.pt"
    with sl.capture(packed, out="x.h5", max_tokens=512, progress=False) as capture:
        assert source_of(capture).model.sha256 == capture.attrs["model_sha256"]
        with pytest.raises(MissingDataError, match="give the model of the capture, or capture this one anew"):
            _ = source_of(capture, model=sl.load(case("gpt2").module)).model
    monkeypatch.chdir("/")
    Path(tmp_path / "model.pt").write_bytes(packed.read_bytes())
    monkeypatch.chdir(tmp_path)
    sl.capture("model.pt", out="y.h5", max_tokens=512, progress=False).close()
    Path("model.pt").unlink()
    with (
        sl.open("y.h5") as capture,
        pytest.raises(MissingDataError, match=r"made from model\.pt, which is not a file here"),
    ):
        _ = source_of(capture).model


def test_a_factory_named_in_a_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sl.load(factory="fixtures.witnesses:rope")
    with sl.capture(model, out=tmp_path / "x.h5", max_tokens=512, progress=False) as capture:
        with pytest.raises(MissingDataError, match=r"--model fixtures\.witnesses:rope"):
            _ = source_of(capture).model
        assert source_of(capture, model=model).model is model


def test_what_contradicts_itself_is_refused(tmp_path: Path) -> None:
    found = case("vit")
    with sl.capture(found.module, inputs=found.inputs, out=tmp_path / "x.h5", progress=False) as capture:
        assert is_hdf5(capture.path)
        with pytest.raises(UsageError, match="has its own tokens; window can only be given with a model"):
            source_of(capture, window=8)
        source = CaptureSource(capture)
        block = next(source.blocks())
        with pytest.raises(MissingDataError, match="not token ids"):
            source.inputs(block)
        with pytest.raises(MissingDataError, match="holds the streams main, not 'decoder'"):
            source_of(capture, stream="decoder")
    assert not is_hdf5(ROOT / "README.md")
    assert not is_hdf5(tmp_path)


def test_windows_with_positions_left_out_are_no_rectangle(tmp_path: Path) -> None:
    found = case("gpt2")
    options = {"inputs": found.inputs, "positions": [0, 3, 4], "out": tmp_path / "x.h5", "progress": False}
    with sl.capture(found.module, **options) as capture:  # type: ignore[arg-type]
        block = next(source_of(capture).blocks())
        with pytest.raises(MissingDataError, match="capture without --positions"):
            _ = block.shape


def test_a_live_run_is_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    from streamlens import proof

    found = case("gpt2")
    source = source_of(wrap(found.module, "gpt2", {}), inputs=found.inputs)
    original = proof.Replay.write
    monkeypatch.setattr(proof.Replay, "write", lambda self, index, tensor: original(self, index, tensor * 1.001))
    with pytest.raises(ProofError, match="the writes do not add up"):
        next(source.blocks())
