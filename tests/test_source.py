"""Where blocks come from: a file and a live run give the same, and what cannot be had is said before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import streamlens as sl
from streamlens.analyses.result import plain
from streamlens.analyses.source import LIVE_BATCH_TOKENS, CaptureSource, Source, source_of, target_ids
from streamlens.block import Block
from streamlens.calling import Inputs, invoke
from streamlens.checkpoint.model import wrap
from streamlens.checkpoint.sniff import is_hdf5
from streamlens.cli.app import main
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


class Own:
    """A source that somebody else wrote: the two methods and whatever else the protocol asks for, from elsewhere."""

    def __init__(self, behind: Source) -> None:
        self._behind = behind

    def __getattr__(self, name: str) -> Any:
        return getattr(self._behind, name)

    def blocks(self) -> Iterator[Block]:
        """Yield the blocks of the other one."""
        return self._behind.blocks()

    def inputs(self, block: Block) -> Inputs:
        """Return the inputs of the other one."""
        return self._behind.inputs(block)


def own(name: str) -> tuple[Source, Source]:
    found = case(name)
    behind = source_of(wrap(found.module, name, {}), inputs=found.inputs)
    return behind, cast(Source, Own(behind))


@pytest.mark.parametrize("analysis", [sl.contribution_norms, sl.logit_lens, sl.ablate])
def test_a_source_of_ones_own_works_like_any_other(analysis: Callable[..., Any]) -> None:
    behind, mine = own("gpt2")
    assert source_of(mine) is mine
    assert plain(analysis(mine, progress=False).rows()) == plain(analysis(behind, progress=False).rows())


def test_a_source_has_its_own_stream_model_and_tokens() -> None:
    for source in own("gpt2"):
        for given in (
            {"stream": "main"},
            {"model": sl.load(case("gpt2").module)},
            {"tokens": [[1, 2]]},
            {"ragged": True},
        ):
            with pytest.raises(UsageError, match=f"{next(iter(given))} cannot be given with it"):
                source_of(source, **given)
            with pytest.raises(UsageError, match="cannot be given with it"):
                sl.logit_lens(source, progress=False, **given)


def test_a_model_needs_no_other_model() -> None:
    model = sl.load(case("gpt2").module)
    with pytest.raises(UsageError, match="this is a model already"):
        source_of(model, model=model, inputs=case("gpt2").inputs)


@pytest.mark.parametrize("origin", [None, 7, {"input_ids": [1]}, object()])
def test_what_is_no_origin_is_told(origin: Any) -> None:
    with pytest.raises(UsageError, match="neither a capture, a model, a path of one, nor a Source"):
        source_of(origin)


def test_both_doors_run_a_live_model_in_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """As typed and as called: the blocks are the same."""
    model = str(ROOT / "fixtures" / "model.pt")
    seen: list[list[int]] = []

    def look(source: Source, *rest: Any, **options: Any) -> Any:
        seen.append([block.stop - block.start for block in source.blocks()])
        raise UsageError("enough")

    from streamlens.analyses.norms import door

    monkeypatch.setattr(door, "watched", look)
    with pytest.raises(UsageError, match="enough"):
        sl.contribution_norms(model, max_tokens=3000, progress=False)
    assert CliRunner().invoke(main, ["norms", model, "--max-tokens", "3000"]).exit_code == 2
    assert seen[0] == seen[1]
    assert max(seen[0]) == LIVE_BATCH_TOKENS
