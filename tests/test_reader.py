"""Opening a capture: every tensor is the stored one under its own name, and what is not there is said to be missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fixtures.small_capture import flip, in_child, write_all_blocks
from streamlens.block import LazyRows
from streamlens.errors import FormatError, IntegrityError, MissingDataError, StreamlensError, UsageError
from streamlens.reader.opening import Capture, open_capture
from streamlens.recorder.capturing import capture

D_MODEL, LAYERS, DOCS, LENGTH = 16, 3, 10, 6
LABELS = ["0_attn_out", "0_mlp_out", "1_attn_out", "1_mlp_out", "2_attn_out", "2_mlp_out"]


def model(norm_first: bool, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a small encoder whose norms are not trivial."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D_MODEL, 2, 24, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False).eval()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    return encoder.to(dtype)


def record(path: Path, *, norm_first: bool = False, dtype: torch.dtype = torch.float32, **choice: Any) -> Capture:
    """Capture the model over two documents at a time."""
    inputs = torch.randn(DOCS, LENGTH, D_MODEL, generator=torch.Generator().manual_seed(1)).to(dtype)
    return capture(model(norm_first, dtype), inputs=inputs, out=path, batch_tokens=2 * LENGTH, progress=False, **choice)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captures of the post-norm model: full, compact and narrowed; and one in bfloat16."""
    found = tmp_path_factory.mktemp("captures")
    record(found / "full.h5").close()
    record(found / "compact.h5", compact=True).close()
    record(found / "narrow.h5", kinds=["mlp"], layers=[0, 2]).close()
    record(found / "half.h5", norm_first=True, dtype=torch.bfloat16).close()
    return found


@pytest.fixture
def full(folder: Path) -> Capture:
    """The full capture."""
    return open_capture(folder / "full.h5")


@pytest.fixture
def compact(folder: Path) -> Capture:
    """The same capture without its reads."""
    return open_capture(folder / "compact.h5")


@pytest.fixture
def narrow(folder: Path) -> Capture:
    """The same capture of two MLPs alone."""
    return open_capture(folder / "narrow.h5")


def stored(capture: Capture, name: str) -> Tensor:
    """Return a dataset as plain h5py reads it."""
    with h5py.File(capture.path) as file:
        return torch.from_numpy(file[name][()])


def test_names_lead_to_the_stored_tensors(full: Capture) -> None:
    writes, reads = stored(full, "/streams/main/write"), stored(full, "/streams/main/read")
    assert writes.shape == (2 * LAYERS, DOCS * LENGTH, D_MODEL)
    assert torch.equal(full.writes, writes)
    assert torch.equal(full.reads, reads)
    for index, label in enumerate(LABELS):
        assert torch.equal(full.write(label), writes[index])
        assert torch.equal(full.write(index), writes[index])
        assert torch.equal(full.read(label), reads[index])
    assert torch.equal(full.write(-1), writes[-1])
    for key in (slice(1, 4), slice(None, None, 2), slice(None, None, -1), slice(4, 2), slice(5, None)):
        order = list(range(2 * LAYERS))[key]
        assert torch.equal(full.write(key), writes[order])
        assert torch.equal(full.read(key), reads[order])
    assert {label: tensor.tolist() for label, tensor in full.layer(1).items()} == {
        "1_attn_out": writes[2].tolist(),
        "1_mlp_out": writes[3].tolist(),
    }
    assert torch.equal(full.embed(), stored(full, "/streams/main/embed/embed"))
    assert torch.equal(full.final, stored(full, "/streams/main/final"))
    assert torch.equal(full.stream("main").norm_rstd, stored(full, "/streams/main/norm/rstd"))
    assert torch.equal(full.tokens.doc, torch.arange(DOCS).int().repeat_interleave(LENGTH))
    assert torch.equal(full.tokens.position, torch.arange(LENGTH).int().repeat(DOCS))
    assert (len(full.tokens), full.n_tokens) == (DOCS * LENGTH, DOCS * LENGTH)
    assert full.stream().labels == tuple(LABELS)


def test_states_by_index_and_by_name(full: Capture) -> None:
    for layer in range(LAYERS):
        assert torch.equal(full.state(f"resid_pre.{layer}"), full.read(f"{layer}_attn_out"))
        assert torch.equal(full.state(f"resid_mid.{layer}"), full.read(f"{layer}_mlp_out"))
        assert torch.equal(full.state(f"resid_post.{layer}"), full.state(2 * layer + 2))
    assert torch.equal(full.state(0), full.embed())
    assert torch.equal(full.state(-1), full.final)
    assert not torch.equal(full.state(1), full.state(2))


def test_a_compact_capture_rebuilds_the_same_reads(full: Capture, compact: Capture) -> None:
    assert (full.stream().compact, compact.stream().compact) == (False, True)
    assert "/streams/main/read" not in compact._recorded.extents
    assert torch.equal(compact.reads, full.reads)
    assert torch.equal(compact.read("1_mlp_out"), full.read("1_mlp_out"))
    assert torch.equal(compact.read(slice(1, 6, 2)), full.read(slice(1, 6, 2)))
    for index in range(2 * LAYERS + 1):
        assert torch.equal(compact.state(index), full.state(index))


@pytest.mark.parametrize("name", ["full", "compact", "half"])
def test_blocks_are_slices_of_the_whole(folder: Path, name: str) -> None:
    capture, seen = open_capture(folder / f"{name}.h5"), 0
    for block in capture.blocks():
        span = slice(block.start, block.stop)
        assert block.start == seen
        assert torch.equal(block.ids, capture.tokens.id[span])
        assert torch.equal(block.doc, capture.tokens.doc[span])
        assert torch.equal(block.position, capture.tokens.position[span])
        assert len(block.writes) == 2 * LAYERS
        assert len(block.states) == 2 * LAYERS + 1
        for index, write in enumerate(block.writes):
            assert torch.equal(write, capture.write(index)[span])
        for index, state in enumerate(block.states):
            assert torch.equal(state, capture.state(index)[span])
        assert [torch.equal(part, capture.embed()[span]) for part in block.parts] == [True]
        assert block.writes[1] is block.writes[1]
        seen = block.stop
    assert seen == capture.n_tokens


def test_bfloat16_is_bit_equal_and_plain_h5py_agrees(folder: Path) -> None:
    capture = open_capture(folder / "half.h5")
    assert capture.writes.dtype is torch.bfloat16
    assert torch.equal(capture.writes.float(), stored(capture, "/streams/main/write"))
    assert torch.equal(capture.state(1), capture.embed() + capture.write(0))


def test_a_narrowed_capture_says_what_it_holds(full: Capture, narrow: Capture) -> None:
    assert narrow.stream().labels == ("0_mlp_out", "2_mlp_out")
    assert torch.equal(narrow.writes, full.writes[[1, 5]])
    assert torch.equal(narrow.write("2_mlp_out"), full.write("2_mlp_out"))
    assert torch.equal(narrow.write(5), full.write(5))
    assert torch.equal(narrow.read("2_mlp_out"), full.read("2_mlp_out"))
    assert torch.equal(narrow.state(5), full.state(5))
    block = next(narrow.blocks())
    assert torch.equal(block.writes[5], full.write(5)[: block.stop])
    assert torch.equal(block.states[1], full.state(1)[: block.stop])
    calls: list[Any] = [
        lambda: narrow.write("1_mlp_out"),
        lambda: narrow.write(slice(0, 6)),
        lambda: narrow.layer(0),
        lambda: narrow.state(2),
        lambda: block.writes[0],
        lambda: block.states[2],
    ]
    for call in calls:
        with pytest.raises(MissingDataError, match=r"does not hold .* it holds 0_mlp_out, 2_mlp_out"):
            call()


def test_what_is_not_there_is_named_with_what_is_near(full: Capture) -> None:
    calls: list[tuple[Any, str]] = [
        (lambda: full.write("1_mlp"), "1_mlp_out"),
        (lambda: full.read("3_mlp_out"), "2_mlp_out"),
        (lambda: full.write(6), "sublayers 0 to 5, not 6"),
        (lambda: full.layer(3), "layers 0 to 2, not 3"),
        (lambda: full.state(7), "states 0 to 6, not 7"),
        (lambda: full.state("resid_pre.7"), "resid_pre.0"),
        (lambda: full.embed("pos_embed"), "embedding parts embed, not 'pos_embed'"),
        (lambda: full.stream("encoder"), "streams main, not 'encoder'"),
        (lambda: full.stream().value_mix("0_attn_out"), "does not hold /streams/main/value_mix/0_attn_out"),
    ]
    for call, message in calls:
        with pytest.raises(MissingDataError, match=message):
            call()


def test_the_proof_and_its_words(full: Capture, tmp_path: Path) -> None:
    assert (full.proof.exact, full.proof.blocks, full.proof.exact_blocks, full.proof.where) == (True, 5, 5, None)
    assert str(full.proof) == "all blocks add up bit for bit (5)"
    path = tmp_path / "inexact.h5"
    shutil.copy(full.path, path)
    places = full._recorded.extents
    with path.open("r+b") as raw:
        for block, worst, where in ((1, 1e-7, 2), (3, 2.5e-4, 4)):
            for name, value in (("exact", np.uint8(0)), ("worst", np.float64(worst)), ("where", np.int32(where))):
                raw.seek(places[f"/proof/{name}"].offset + block * value.nbytes)
                raw.write(value.tobytes())
    proof = open_capture(path).proof
    assert (proof.exact, proof.exact_blocks, proof.worst, proof.where, proof.worst_block) == (False, 3, 2.5e-4, 4, 3)
    assert str(proof) == "3 of 5 blocks add up bit for bit; worst relative error 2.5e-04 at state 4, block 3"


def test_a_capture_under_way_is_refused_unless_asked_for(full: Capture, tmp_path: Path) -> None:
    partial = tmp_path / "a.h5.partial"
    shutil.copy(full.path, partial)
    flip(partial, full._recorded.extents["/proof/done"].offset + 1)
    with pytest.raises(UsageError, match=r"a\.h5 is not there, but a\.h5\.partial is: run the same capture command"):
        open_capture(tmp_path / "a.h5")
    with pytest.raises(FormatError, match="not finished: run the same capture command"):
        open_capture(partial)
    capture = open_capture(partial, allow_partial=True)
    assert not capture.complete
    assert [block.start for block in capture.blocks()] == [0, 24, 36, 48]
    assert str(capture.proof) == "all blocks add up bit for bit (4); 1 of 5 blocks are missing"
    partial.rename(tmp_path / "a.h5")
    with pytest.raises(FormatError, match="lacks blocks"):
        open_capture(tmp_path / "a.h5")


def test_what_is_not_a_capture_is_refused(full: Capture, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        open_capture(tmp_path)
    with pytest.raises(UsageError, match="is not there"):
        open_capture(tmp_path / "no.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(FormatError, match="not a capture"):
        open_capture(tmp_path / "other.h5")
    with pytest.raises(FormatError, match="without a stream"):
        open_capture(write_all_blocks(tmp_path / "bare.h5", group_attrs={"/streams/main": {"stored": "[]"}}))
    edits: list[tuple[str, str, Any, str]] = [
        ("/", "format_version", 2, "format version 2; this streamlens reads up to 1: upgrade"),
        ("/streams/main", "stored", "[0, 1, 9, 3, 4, 5]", "does not fit its writes"),
        ("/streams/main", "stored", "[0, 1]", "does not fit its writes"),
        ("/streams/main", "stored", "{", "does not fit its writes"),
        ("/", "anatomy", json.dumps({"streams": []}), "anatomy cannot be read"),
    ]
    for group, key, value, message in edits:
        shutil.copy(full.path, tmp_path / "edited.h5")
        with h5py.File(tmp_path / "edited.h5", "r+", libver="v108") as file:
            file[group].attrs[key] = value
        with pytest.raises(FormatError, match=message):
            open_capture(tmp_path / "edited.h5")
    shutil.copy(full.path, tmp_path / "short.h5")
    os.truncate(tmp_path / "short.h5", full.path.stat().st_size - 1)
    with pytest.raises(IntegrityError, match="truncated or damaged"):
        open_capture(tmp_path / "short.h5")


def test_views_cost_nothing_and_never_change_the_file(full: Capture) -> None:
    before = full.path.read_bytes()
    view = full.write("0_attn_out")
    assert view.untyped_storage().data_ptr() == full.writes.untyped_storage().data_ptr()
    view.fill_(0.0)
    assert full.path.read_bytes() == before
    assert open_capture(full.path).write("0_attn_out").any()


def test_tensors_outlive_the_capture(folder: Path) -> None:
    with open_capture(folder / "full.h5") as capture:
        view, expected = capture.writes, capture.writes.clone()
    assert torch.equal(view, expected)
    capture.close()
    with pytest.raises(UsageError, match="closed; open it again"):
        capture.write(0)


def test_a_capture_works_after_a_fork(full: Capture, compact: Capture) -> None:
    view, expected = full.writes, full.writes.clone()

    def child() -> None:
        assert torch.equal(view, expected)
        assert torch.equal(full.write(1), expected[1])
        assert torch.equal(next(compact.blocks()).writes[2], expected[2, : 2 * LENGTH])

    assert in_child(child) == 0
    assert torch.equal(full.writes, expected)


def test_xarray_has_named_axes(full: Capture, compact: Capture, folder: Path) -> None:
    found = full.to_xarray()
    picked = found["write"].sel(sublayer="1_mlp_out")
    assert picked.dims == ("token", "d_model")
    np.testing.assert_array_equal(picked, full.write("1_mlp_out").numpy())
    np.testing.assert_array_equal(found["position"], full.tokens.position.numpy())
    assert "read" not in compact.to_xarray()
    half = open_capture(folder / "half.h5")
    np.testing.assert_array_equal(half.to_xarray("main")["read"], half.reads.float().numpy())


def test_without_xarray_the_way_out_is_named(full: Capture) -> None:
    body = (
        "import sys; sys.modules['xarray'] = None\n"
        "from streamlens.reader.opening import open_capture\n"
        f"open_capture({str(full.path)!r}).to_xarray()"
    )
    root = str(Path(__file__).parents[1])
    ran = subprocess.run([sys.executable, "-c", body], cwd=root, capture_output=True, text=True, check=False)
    assert "UsageError: to_xarray needs xarray" in ran.stderr


def test_how_a_capture_shows_itself(full: Capture, narrow: Capture, tmp_path: Path) -> None:
    text = repr(full)
    assert "60 tokens" in text
    assert "6 sublayers, d_model 16, torch.float32" in text
    assert "all blocks add up bit for bit" in text
    assert "(2 stored)" in repr(narrow)
    shutil.copy(full.path, tmp_path / "<b>.h5")
    html = open_capture(tmp_path / "<b>.h5")._repr_html_()
    assert all(label in html for label in LABELS)
    assert "&lt;b&gt;.h5" in html
    assert "<b>.h5" not in html
    assert "<script" not in html
    assert "http" not in html


def test_a_damaged_description_is_never_served(full: Capture, tmp_path: Path) -> None:
    """A flipped bit in the first kilobytes is an error, or leaves every tensor as it was."""
    original, path = full.path.read_bytes(), tmp_path / "a.h5"
    expected = (full.writes.shape, full.n_tokens, [view.stored for view in full.streams.values()])
    generator, refused = np.random.default_rng(0), 0
    for _ in range(60):
        path.write_bytes(original)
        flip(path, int(generator.integers(4096)), int(generator.integers(8)))
        try:
            capture = open_capture(path)
        except StreamlensError:
            refused += 1
        else:
            found = (capture.writes.shape, capture.n_tokens, [view.stored for view in capture.streams.values()])
            assert found == expected
    assert refused > 10


def test_lazy_rows_fetch_once_and_only_what_is_asked() -> None:
    fetched: list[int] = []

    def fetch(index: int) -> Tensor:
        fetched.append(index)
        return torch.tensor(index)

    rows = LazyRows(5, fetch)
    assert [int(rows[-1]), int(rows[1]), int(rows[1])] == [4, 1, 1]
    assert [int(row) for row in rows[3:]] == [3, 4]
    assert fetched == [4, 1, 3]
    with pytest.raises(IndexError):
        rows[5]
