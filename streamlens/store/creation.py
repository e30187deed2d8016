"""Laying out a capture file: all of its space, its attributes and its constants, or nothing at all."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import xxhash
from h5py import h5t
from torch import Tensor

from streamlens.errors import StorageError
from streamlens.store.direct import DirectFile, byte_view
from streamlens.store.hdf5 import ALIGNMENT, create_dataset, file_type, require_group
from streamlens.store.integrity import HEADER_DIGEST, header_digest
from streamlens.store.layout import FORMAT, FORMAT_VERSION, PROOF_COLUMNS, Layout, n_bytes
from streamlens.wording import human_bytes

Static = npt.NDArray[Any] | Tensor
Attributes = Mapping[str, str | int | float]

_NO_FALLOCATE = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_METADATA_PER_DATASET = 1024
_METADATA = 1 << 16


def create_file(
    path: Path,
    layout: Layout,
    *,
    attrs: Attributes,
    group_attrs: Mapping[str, Attributes],
    static: Mapping[str, Static],
    identity: Mapping[str, Any],
) -> None:
    """Create the file at `path` with room for everything, replacing what is there; on any failure leave nothing new.

    Raises:
        StorageError: there is not enough room; the message has both numbers.
        UsageError: a type that cannot be stored.
    """
    fixed = {name: _as_bytes(value) for name, value in {**static, **_proof_tables(layout)}.items()}
    # Hidden, and one name for all runs, so that a run killed right here leaves at most what the next one replaces.
    temporary = path.with_name("." + path.name)
    try:
        _probe(temporary, _estimate(layout, attrs, group_attrs, fixed))
        offsets = _describe(temporary, layout, attrs, group_attrs, fixed, identity)
        with DirectFile(temporary) as file:
            reserve(file.fd, temporary.stat().st_size, temporary)
            for name, (_, _, data) in fixed.items():
                file.write(data, offsets[name])
            file.sync()
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def reserve(fd: int, size: int, path: Path) -> None:
    """Give an open file `size` bytes on the disk, now.

    Raises:
        StorageError: the disk, the quota or the limit on file sizes does not allow it.
    """
    try:
        os.posix_fallocate(fd, 0, size)
        return
    except OSError as error:
        if error.errno not in _NO_FALLOCATE:
            os.ftruncate(fd, 0)  # what it did get would make the free space in the message too small
            raise _no_room(size, path, error) from error
    # A file system that cannot reserve: compare the numbers, which at least catches a disk too small from the start.
    if shutil.disk_usage(path.parent).free < size:
        raise _no_room(size, path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    os.ftruncate(fd, size)


def _no_room(size: int, path: Path, error: OSError) -> StorageError:
    free = shutil.disk_usage(path.parent).free
    return StorageError(
        f"this capture needs {human_bytes(size)} ({size} bytes) and {path.parent} has {human_bytes(free)} "
        f"({free} bytes) free ({error.strerror}); nothing was written: free some space, choose another --out, or "
        f"capture less (--compact, --layers, --max-tokens)"
    )


def _probe(path: Path, size: int) -> None:
    """Reserve `size` bytes for a moment: HDF5, once it has met a full disk, crashes the process when it exits."""
    with path.open("wb") as raw:
        reserve(raw.fileno(), size, path)


def _estimate(
    layout: Layout,
    attrs: Attributes,
    group_attrs: Mapping[str, Attributes],
    fixed: Mapping[str, tuple[tuple[int, ...], h5t.TypeID, memoryview]],
) -> int:
    sizes = [n_bytes(item.shape(layout.n_tokens), item.dtype.itemsize) for item in layout.items]
    sizes += [n_bytes(shape, np.dtype(PROOF_COLUMNS[key]).itemsize) for key, shape in layout.proof_shapes().items()]
    sizes += [len(data) for _, _, data in fixed.values()]
    texts = [str(value) for group in (attrs, *group_attrs.values()) for value in group.values()]
    return sum(sizes) + _METADATA_PER_DATASET * len(sizes) + _METADATA + 2 * sum(len(text.encode()) for text in texts)


def _describe(
    path: Path,
    layout: Layout,
    attrs: Attributes,
    group_attrs: Mapping[str, Attributes],
    fixed: Mapping[str, tuple[tuple[int, ...], h5t.TypeID, memoryview]],
    identity: Mapping[str, Any],
) -> dict[str, int]:
    """Write the HDF5 description and return the offset of each constant dataset."""
    with h5py.File(
        # v108 has checksummed metadata and, unlike later ones, no "open for writing" flag that a kill leaves set.
        path, "w", libver=("v108", "v108"), locking=False, alignment_threshold=1, alignment_interval=ALIGNMENT
    ) as file:  # fmt: skip
        file.attrs.update({"format": FORMAT, "format_version": FORMAT_VERSION, **attrs})
        made = {name: create_dataset(file, name, shape, kind) for name, (shape, kind, _) in fixed.items()}
        for item in layout.items:
            create_dataset(file, item.name, item.shape(layout.n_tokens), file_type(item.dtype))
        for name, shape in layout.proof_shapes().items():
            create_dataset(file, f"/proof/{name}", shape, h5t.py_create(np.dtype(PROOF_COLUMNS[name])))
        for name, values in group_attrs.items():
            require_group(file, name).attrs.update(values)
        hashes = {name: xxhash.xxh3_64_hexdigest(data) for name, (_, _, data) in fixed.items()}
        file["/proof"].attrs.update(
            {
                "identity": json.dumps(identity),
                "static_hash": json.dumps(hashes),
                "boot": boot_id(),
            }
        )
        file["/proof"].attrs[HEADER_DIGEST] = header_digest(file)
        return {name: int(dataset.id.get_offset() or 0) for name, dataset in made.items()}


def boot_id() -> str:
    """Return which start of this machine we are in; empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _proof_tables(layout: Layout) -> dict[str, Static]:
    names = [name.encode() for name in layout.row_names]
    longest = max(map(len, names), default=1)
    return {
        "/proof/items": np.array(names, dtype=h5py.string_dtype("utf-8", longest)),
        "/proof/block": np.array(layout.blocks, dtype=np.int64),
    }


def _as_bytes(value: Static) -> tuple[tuple[int, ...], h5t.TypeID, memoryview]:
    """Return (shape, file type, bytes) of a constant."""
    if isinstance(value, Tensor):
        tensor = value.detach().cpu().contiguous()
        return tuple(tensor.shape), file_type(tensor.dtype), byte_view(tensor)
    array = np.asarray(value, order="C")
    kind = file_type(array.dtype)
    data = array.reshape(-1).view(np.uint8).data if math.prod(array.shape) else memoryview(b"")
    return array.shape, kind, data
