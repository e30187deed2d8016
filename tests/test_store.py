"""The writer: what is written is there bit for bit, an interrupted run resumes, and what does not fit is refused."""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from fixtures.small_capture import BLOCKS, IDENTITY, ITEMS, begin, fill, in_child, numbers, write_all_blocks
from streamlens.errors import StorageError, UsageError
from streamlens.store.hdf5 import bfloat16_type, extent
from streamlens.store.integrity import verify
from streamlens.store.layout import Item, Layout


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A finished capture."""
    return write_all_blocks(tmp_path / "whole.h5")


def test_every_byte_is_where_plain_h5py_finds_it(whole: Path) -> None:
    with h5py.File(whole) as file:
        for item in ITEMS:
            dataset = file[item.name]
            raw = np.empty(dataset.shape, f"V{item.dtype.itemsize}")
            dataset.id.read(h5py.h5s.ALL, h5py.h5s.ALL, raw, mtype=dataset.id.get_type())
            for row in [None] if item.rows is None else range(item.rows):
                parts = [numbers(item, row, block).view(torch.uint8).numpy().tobytes() for block in range(3)]
                assert (raw if row is None else raw[row]).tobytes() == b"".join(parts)
        assert file["/tokens/id"][()].tolist() == list(range(20))
        assert file["/streams/main/constants/g"][()] == 3.5
        assert file["/proof/done"][()].tolist() == [1, 1, 1]
        assert file["/proof/exact"][()].tolist() == [1, 0, 1]
        assert file["/proof/where"][()].tolist() == [0, 1, 2]
        np.testing.assert_array_equal(file["/proof/worst"][()], [0, 1e-3, 2e-3])
        np.testing.assert_array_equal(file["/proof/block"][()], BLOCKS)
        assert file["/proof/items"][1].decode() == "/streams/main/write[1]"
        assert file["/proof/hash"].shape == (3, 8)
        assert (file.attrs["format"], file.attrs["format_version"], file.attrs["seed"]) == ("streamlens-capture", 1, 3)
        assert file["/streams/main"].attrs["stored"] == "[0, 1, 2]"
    assert list(verify(whole)) == []
    assert sorted(p.name for p in whole.parent.iterdir()) == ["whole.h5"]


def test_layout_on_disk_can_be_mapped(whole: Path) -> None:
    assert whole.read_bytes()[8] == 2  # superblock version: v3 has a crash flag, v0 no checksums
    with h5py.File(whole) as file:
        for name in (*(item.name for item in ITEMS), "/tokens/id"):
            assert file[name].id.get_offset() % 64 == 0
            assert extent(file[name]).n_bytes == file[name].id.get_storage_size()


def test_plain_h5py_reads_bfloat16_as_the_same_numbers(tmp_path: Path) -> None:
    values = torch.tensor(
        [0.0, -0.0, 1.0, -2.5, 3.3895e38, 1.2e-38, 9.2e-41, float("inf"), -float("inf"), float("nan")]
    )
    item = Item("/x", None, None, torch.bfloat16)
    with begin(tmp_path / "a.h5", items=[item], n_tokens=10, blocks=[(0, 10)]) as writer:
        writer.put("/x", None, 0, values.bfloat16())
        writer.commit(0, exact=True, worst=0.0, where=0)
        path = writer.finish()
    with h5py.File(path) as file:
        assert file["x"].dtype == np.float32
        assert file["x"].id.get_type().equal(bfloat16_type())
        np.testing.assert_array_equal(file["x"][()], values.bfloat16().float().numpy())
        assert file["x"].attrs["dtype"] == "bfloat16"


def test_put_refuses_what_does_not_fit(tmp_path: Path) -> None:
    with begin(tmp_path / "a.h5") as writer:
        good = torch.zeros(8, 16)
        for tensor in (good.double(), good[:7], torch.zeros(16, 8).T, torch.zeros(8, 16, 1)):
            with pytest.raises(UsageError, match="takes a contiguous CPU tensor"):
                writer.put("/streams/main/final", None, 0, tensor)
        with pytest.raises(UsageError, match="number of its rows: 3"):
            writer.put("/streams/main/write", 3, 0, good.bfloat16())
        with pytest.raises(UsageError, match="known datasets"):
            writer.put("/streams/main/red", 0, 0, good)
        with pytest.raises(UsageError, match="none of 3 blocks"):
            writer.put("/streams/main/final", None, 3, good)


def test_commit_and_finish_refuse_what_is_missing(tmp_path: Path) -> None:
    with begin(tmp_path / "a.h5") as writer:
        writer.put("/streams/main/write", 0, 0, numbers(ITEMS[0], 0, 0))
        with pytest.raises(UsageError, match=r"7 rows are missing, first /streams/main/write\[1\]"):
            writer.commit(0, exact=True, worst=0.0, where=0)
        fill(writer, 1)
        with pytest.raises(UsageError, match="block 1 is done already"):
            fill(writer, 1)
        with pytest.raises(UsageError, match="2 blocks are missing, first 0"):
            writer.finish()
    with pytest.raises(UsageError, match="closed"):
        fill(writer, 0)


@pytest.mark.parametrize("blocks", [((0, 8), (9, 20)), ((0, 8), (7, 20)), ((0, 8), (8, 8), (8, 20)), ((0, 19),), ()])
def test_blocks_must_cover_the_tokens(blocks: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(UsageError):
        Layout(ITEMS, 20, blocks)


def test_an_interrupted_run_resumes_to_the_same_bytes(tmp_path: Path, whole: Path) -> None:
    path = tmp_path / "a.h5"

    def interrupted() -> None:
        with begin(path) as writer:
            fill(writer, 2)
            writer.put("/output/lse", None, 0, torch.full((8,), 9.0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not path.exists()
    assert list(verify(tmp_path / "a.h5.partial")) == []
    with begin(path) as writer:
        assert writer.done.tolist() == [False, False, True]
        assert not writer.complete
    write_all_blocks(path)
    assert path.read_bytes() == whole.read_bytes()


def test_another_identity_is_named_key_by_key(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with begin(path) as writer:
        fill(writer, 0)
    other = {"model": {"sha256": "cd"}, "window": 8, "layers": [0]}
    with pytest.raises(UsageError) as caught:
        begin(path, identity=other, blocks=[(0, 20)])
    for line in (
        'model.sha256: "ab" in the file, "cd" now',
        "layers: [0, 1] in the file, [0] now",
        "layout.blocks: 3 in the file, 1 now",
        "--overwrite",
    ):
        assert line in str(caught.value)
    assert "window" not in str(caught.value)
    with begin(path) as writer:
        assert writer.done.tolist() == [True, False, False]
    with begin(path, identity=other, overwrite=True) as writer:
        assert not writer.done.any()


def test_a_finished_file_is_complete_or_in_the_way(whole: Path) -> None:
    before = whole.read_bytes()
    with begin(whole) as writer:
        assert writer.complete
        assert writer.done.all()
        assert writer.finish() == whole
        with pytest.raises(UsageError):
            fill(writer, 0)
    with pytest.raises(UsageError, match="window"):
        begin(whole, identity={**IDENTITY, "window": 16})
    assert whole.read_bytes() == before


def test_a_file_under_way_that_was_given_a_finished_name(tmp_path: Path) -> None:
    with begin(tmp_path / "a.h5") as writer:
        fill(writer, 0)
    (tmp_path / "a.h5.partial").rename(tmp_path / "a.h5")
    with pytest.raises(UsageError, match=r"rename it to a\.h5\.partial"):
        begin(tmp_path / "a.h5")


def test_overwrite_keeps_the_old_file_until_the_new_one_is_finished(whole: Path) -> None:
    before, changed = whole.read_bytes(), {**IDENTITY, "window": 16}
    with begin(whole, identity=changed, overwrite=True) as writer:
        fill(writer, 0)
    assert whole.read_bytes() == before
    with begin(whole, identity=changed, overwrite=True) as writer:
        assert writer.done.tolist() == [True, False, False]
    write_all_blocks(whole, identity=changed, overwrite=True)
    assert begin(whole, identity=changed).complete


def test_a_file_that_is_no_capture_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "notes.h5"
    path.write_text("my notes")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="not a capture to go on with"):
            begin(path, overwrite=overwrite)
    assert path.read_text() == "my notes"
    with begin(tmp_path / "b.h5") as writer:
        for block in range(3):
            fill(writer, block)
        (tmp_path / "b.h5").write_text("appeared meanwhile")
        with pytest.raises(StorageError, match="appeared meanwhile"):
            writer.finish()
    assert (tmp_path / "b.h5").read_text() == "appeared meanwhile"


def test_a_second_writer_is_refused_and_a_dead_one_is_not_in_the_way(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with begin(path):
        with pytest.raises(StorageError, match=rf"another capture is writing .*a\.h5 \(pid {os.getpid()}\)"):
            begin(path)
        assert in_child(lambda: begin(path).close()) == 1
    assert not (tmp_path / "a.h5.lock").exists()
    (tmp_path / "a.h5.lock").write_text("4711\n")
    begin(path).close()
    with pytest.raises(UsageError):
        begin(path, identity={})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5.partial"]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="is a folder"):
        begin(tmp_path)
    with pytest.raises(StorageError, match="make it first"):
        begin(tmp_path / "no" / "a.h5")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)

    def attempt() -> None:
        if os.getuid() == 0:
            tmp_path.chmod(0o755)
            for parent in tmp_path.parents[:3]:
                parent.chmod(parent.stat().st_mode | 0o011)
            os.seteuid(65534)
        with pytest.raises(StorageError, match="Permission denied; choose another --out"):
            begin(closed / "a.h5")

    assert in_child(attempt) == 0
    assert list(closed.iterdir()) == []


def test_types_without_meaning_in_a_file_are_refused(tmp_path: Path) -> None:
    for value in (torch.zeros(2, dtype=torch.complex64), np.array(["a", None], dtype=object)):
        with pytest.raises(UsageError, match="cannot be stored"):
            begin(tmp_path / "a.h5", static={"/x": value})
    assert list(tmp_path.iterdir()) == []
