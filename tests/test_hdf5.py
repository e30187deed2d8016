"""Files from elsewhere: what reaches outside itself is refused before it is read, what is broken is called broken."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from fixtures.small_capture import write_all_blocks
from streamlens.errors import FormatError, IntegrityError, UnsafeFileError
from streamlens.reader.mapped import MappedFile
from streamlens.store.hdf5 import Extent, create_dataset, extent, file_type, open_description, torch_dtype
from streamlens.store.integrity import verify


def external_link(file: h5py.File, secret: Path) -> None:
    """A dataset that is another file's."""
    file["/tokens/more"] = h5py.ExternalLink(secret, "/x")


def soft_link(file: h5py.File, secret: Path) -> None:
    """A name for another name, which may lead anywhere."""
    file["/tokens/more"] = h5py.SoftLink("/streams/../tokens/id")


def external_storage(file: h5py.File, secret: Path) -> None:
    """A dataset whose bytes are those of any file the reader may read."""
    file.create_dataset("/tokens/more", (4,), "u1", external=[(secret, 0, 4)])


def virtual(file: h5py.File, secret: Path) -> None:
    """A dataset made of another file's."""
    layout = h5py.VirtualLayout((4,), "u1")
    layout[:] = h5py.VirtualSource(secret, "/x", (4,))
    file.create_virtual_dataset("/tokens/more", layout)


def foreign_filter(file: h5py.File, secret: Path) -> None:
    """A filter for which HDF5 would look for a plug-in; optional, so that it can be written without."""
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_chunk((4,))
    plan.set_filter(32000, h5py.h5z.FLAG_OPTIONAL)
    space = h5py.h5s.create_simple((4,))
    h5py.h5d.create(file["/tokens"].id, b"more", h5py.h5t.STD_U8LE, space, plan)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A finished capture."""
    return write_all_blocks(tmp_path / "whole.h5")


@pytest.mark.parametrize("plant", [external_link, soft_link, external_storage, virtual, foreign_filter])
def test_a_file_that_reaches_outside_itself_is_refused(
    whole: Path, plant: Callable[[h5py.File, Path], None], tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    with h5py.File(whole, "r+", libver="v108") as file:
        plant(file, secret)
    with pytest.raises(UnsafeFileError, match="more"):
        list(verify(whole))


def test_a_circle_of_groups_ends(whole: Path) -> None:
    with h5py.File(whole, "r+", libver="v108") as file:
        file["/tokens/circle"] = file["/"]
    with open_description(whole) as file:
        assert "circle" in file["/tokens"]


def test_too_many_objects_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamlens.store.hdf5._MAX_OBJECTS", 20)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for i in range(21):
            file.create_group(f"g{i}")
    with pytest.raises(UnsafeFileError, match="more than 20 objects"), open_description(tmp_path / "a.h5"):
        pass


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x89HDF\r\n\x1a\n", b"<html>not found</html>"])
def test_what_is_not_hdf5_is_said_to_be_so(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.h5"
    path.write_bytes(content)
    with pytest.raises((FormatError, IntegrityError), match=r"not an HDF5 file|truncated or damaged"):
        list(verify(path))


def test_a_dataset_beyond_the_end_of_the_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w", libver=("v108", "v108")) as file:
        create_dataset(file, "/x", (1 << 30,), file_type(torch.float32))
    with h5py.File(path) as file:
        assert extent(file["x"]).n_bytes == 1 << 32
        os.truncate(path, 4096)
        with pytest.raises(IntegrityError, match="beyond the end"):
            extent(file["x"])


def test_a_rewritten_file_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=np.zeros((8, 8)), compression="gzip")
        with pytest.raises(FormatError, match="h5repack"):
            extent(file["x"])


def test_every_type_goes_there_and_back() -> None:
    names = "bfloat16 float16 float32 float64 uint8 int8 int16 int32 int64"
    for name in names.split():
        dtype: torch.dtype = getattr(torch, name)
        assert torch_dtype(file_type(dtype)) is dtype
        assert file_type(dtype).get_size() == dtype.itemsize
    assert torch_dtype(h5py.h5t.C_S1) is None


def test_a_file_larger_than_the_memory_is_mapped(tmp_path: Path) -> None:
    size, path = 1 << 42, tmp_path / "huge"
    with path.open("wb") as raw:
        try:
            raw.truncate(size)
        except OSError as error:
            pytest.skip(f"no sparse file of 4 TiB here: {error}")
        raw.seek(size - 8)
        raw.write(np.array([1.5, 2.5], np.float32).tobytes())
    file = MappedFile(path, {"/x": Extent(0, (size // 16, 4), torch.float32, size)})
    assert file.view("/x")[-1].tolist() == [0, 0, 1.5, 2.5]
    assert file.part("/x", None, size // 16 - 1, size // 16).tolist() == [[0, 0, 1.5, 2.5]]
    file.close()
