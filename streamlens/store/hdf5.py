"""The HDF5 of a capture: exact types (a true two-byte bfloat16), datasets at fixed places, distrust of foreign files.

h5py is used to lay a file out and to read its description; the numbers themselves never pass through it. Every dataset
is contiguous and allocated at once, so its bytes lie at one offset, where they are written and mapped directly.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from h5py import h5d, h5g, h5l, h5o, h5p, h5s, h5t, h5z

from streamlens.errors import FormatError, IntegrityError, StreamlensError, UnsafeFileError, UsageError
from streamlens.store.layout import n_bytes

ALIGNMENT = 64
"""Every dataset starts at a multiple of this, so that a mapped view is aligned for its type and for vector loads."""

_MAX_OBJECTS = 100_000
_SAFE_FILTERS = {h5z.FILTER_DEFLATE, h5z.FILTER_SHUFFLE, h5z.FILTER_FLETCHER32}


def bfloat16_type() -> h5t.TypeFloatID:
    """Return bfloat16 as an HDF5 float of two bytes: sign 15, exponent 7-14, mantissa 0-6.

    Equal, bit for bit, to the H5T_FLOAT_BFLOAT16LE of HDF5 2.0. Plain h5py reads it as float32 with the right values.
    """
    kind = h5t.IEEE_F16LE.copy()
    # Fields before size: HDF5 refuses a type whose fields, even in passing, do not fit.
    kind.set_fields(15, 7, 8, 0, 7)
    kind.set_size(2)
    kind.set_ebias(127)
    return kind


_TYPES: dict[torch.dtype, h5t.TypeID] = {
    torch.bfloat16: bfloat16_type(),
    torch.float16: h5t.IEEE_F16LE,
    torch.float32: h5t.IEEE_F32LE,
    torch.float64: h5t.IEEE_F64LE,
    torch.uint8: h5t.STD_U8LE,
    torch.int8: h5t.STD_I8LE,
    torch.int16: h5t.STD_I16LE,
    torch.int32: h5t.STD_I32LE,
    torch.int64: h5t.STD_I64LE,
}


def file_type(dtype: torch.dtype | np.dtype[np.void]) -> h5t.TypeID:
    """Return the HDF5 type in which a tensor or array is stored.

    Raises:
        UsageError: a type without a fixed meaning in a file (bool, complex, fp8, Python objects).
    """
    if isinstance(dtype, torch.dtype):
        if dtype in _TYPES:
            return _TYPES[dtype]
        raise UsageError(f"{dtype} cannot be stored; use one of {', '.join(str(d) for d in _TYPES)}")
    if dtype.hasobject:
        raise UsageError(f"an array of {dtype} cannot be stored: give numbers or strings of fixed length")
    return h5t.py_create(dtype, logical=True)


def torch_dtype(kind: h5t.TypeID) -> torch.dtype | None:
    """Return the torch type of an HDF5 type, or None for a table, text or anything else that is not a plain number."""
    return next((dtype for dtype, known in _TYPES.items() if known.equal(kind)), None)


def create_dataset(file: h5py.File, name: str, shape: Sequence[int], kind: h5t.TypeID) -> h5py.Dataset:
    """Create a contiguous dataset at `name`: placed now, never filled.

    Early allocation gives it an offset before the file is closed; without a fill the file stays sparse until
    `posix_fallocate`, and a terabyte is laid out in milliseconds.
    """
    group = require_group(file, name.rpartition("/")[0])
    plan = h5p.create(h5p.DATASET_CREATE)
    plan.set_layout(h5d.CONTIGUOUS)
    plan.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    plan.set_fill_time(h5d.FILL_TIME_NEVER)
    plan.set_obj_track_times(False)
    space = h5s.create_simple(tuple(shape)) if len(shape) else h5s.create(h5s.SCALAR)
    created = h5py.Dataset(h5d.create(group.id, name.rpartition("/")[2].encode(), kind, space, plan))
    if torch_dtype(kind) is torch.bfloat16:
        created.attrs["dtype"] = "bfloat16"
    return created


def require_group(file: h5py.File, name: str) -> h5py.Group:
    """Return the group at the full path `name`, made without a time stamp, so that equal captures are equal files."""
    group: h5py.Group = file["/"]
    plan = h5p.create(h5p.GROUP_CREATE)
    plan.set_obj_track_times(False)
    for part in name.strip("/").split("/") if name.strip("/") else []:
        if part not in group:
            h5g.create(group.id, part.encode(), gcpl=plan)
        group = group[part]
    return group


@dataclass(frozen=True)
class Extent:
    """Where the bytes of one dataset lie in its file."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    """None for a table or text."""
    n_bytes: int


def extent(dataset: h5py.Dataset) -> Extent:
    """Return where the bytes of `dataset` lie.

    Raises:
        FormatError: the dataset is chunked or compressed: some other tool has rewritten the file.
        IntegrityError: it claims bytes beyond the end of the file.
    """
    kind = dataset.id.get_type()
    shape = tuple(int(axis) for axis in dataset.shape)
    size, offset = n_bytes(shape, int(kind.get_size())), dataset.id.get_offset()
    if size and offset is None:
        raise FormatError(
            f"{dataset.file.filename}: {dataset.name} is not contiguous, so another tool has rewritten this file; "
            f"`h5repack -l CONTI OLD NEW` gives one that can be read"
        )
    if size and offset + size > Path(dataset.file.filename).stat().st_size:
        raise IntegrityError(
            f"{dataset.file.filename}: {dataset.name} claims {size} bytes at {offset}, beyond the end of the file; "
            f"it is truncated or damaged: copy it again, or capture again"
        )
    return Extent(int(offset or 0), shape, torch_dtype(kind), size)


@contextmanager
def open_description(path: Path) -> Iterator[h5py.File]:
    """Open a file for reading its names, shapes and attributes, after making sure that it keeps to itself.

    Only h5py calls belong in the body: what they raise there is taken for damage.

    Raises:
        FormatError: not an HDF5 file.
        IntegrityError: truncated or damaged.
        UnsafeFileError: it reaches outside itself; see `check_self_contained`.
    """
    if not h5py.is_hdf5(os.fspath(path)):
        raise FormatError(f"{path} is not an HDF5 file; give a .h5 file that `streamlens capture` wrote")
    try:
        with h5py.File(path, "r", locking="best-effort") as file:
            check_self_contained(file)
            yield file
    except StreamlensError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        # h5py has no error class for a broken file: these are what flipped bits and cut ends turn into.
        raise IntegrityError(
            f"{path} cannot be read ({error}): it is truncated or damaged; copy it again, or capture again"
        ) from error


def check_self_contained(file: h5py.File) -> None:
    """Refuse a file that would read other files, or run plug-in code, when its datasets are read.

    Raises:
        UnsafeFileError: a link that is not a hard link, a dataset kept in another file or made of others, a filter that
            HDF5 would load as a plug-in, or more objects than any capture has.
    """
    seen: set[int] = set()
    pending: list[h5g.GroupID] = [h5g.open(file.id, b"/")]
    while pending:
        group = pending.pop()
        links = group.links
        for name in group:
            where = f"{file.filename}: {name.decode(errors='replace')!r}"
            # Decided on the link alone: opening an external link would already open the other file.
            if links.get_info(name).type != h5l.TYPE_HARD:
                raise UnsafeFileError(
                    f"{where} is a link, possibly to another file; no capture has one: do not trust it"
                )
            node = h5o.open(group, name)
            address = int(h5o.get_info(node).addr)
            if address in seen:
                continue
            seen.add(address)
            if len(seen) > _MAX_OBJECTS:
                raise UnsafeFileError(f"{file.filename} has more than {_MAX_OBJECTS} objects; this is not a capture")
            if isinstance(node, h5g.GroupID):
                pending.append(node)
            elif isinstance(node, h5d.DatasetID):
                _check_dataset(node, where)


def _check_dataset(node: h5d.DatasetID, where: str) -> None:
    plan = node.get_create_plist()
    if plan.get_layout() == h5d.VIRTUAL:
        raise UnsafeFileError(f"{where} is made of datasets in other files (virtual); open those files themselves")
    if plan.get_external_count():
        raise UnsafeFileError(
            f"{where} keeps its bytes in another file (external storage); no capture does: do not trust it"
        )
    filters = {int(plan.get_filter(i)[0]) for i in range(plan.get_nfilters())}
    if filters - _SAFE_FILTERS:
        raise UnsafeFileError(
            f"{where} needs filters {sorted(filters - _SAFE_FILTERS)}, for which HDF5 would load plug-ins"
        )
