"""Are the stored bytes the bytes that were written? Every hash of a capture, computed again."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import xxhash

from streamlens.errors import FormatError
from streamlens.store.hdf5 import Extent, extent, open_description
from streamlens.store.layout import FORMAT, FORMAT_VERSION, PARTIAL_SUFFIX, PROOF_COLUMNS, Item, Layout, seal

HEADER_DIGEST = "attributes_hash"
"""The attribute of /proof that keeps `header_digest`."""

_CHUNK = 1 << 22


@dataclass(frozen=True)
class Problem:
    """One place where a file does not hold what was written."""

    path: Path
    dataset: str
    """Dataset and row, such as ``/streams/main/write[3]``; ``attributes`` for those of the whole file."""
    block: int | None
    """Which block of tokens; None when the whole dataset is meant."""
    message: str

    @property
    def place(self) -> str:
        """The dataset, its row and the block, as people name them."""
        return self.dataset if self.block is None else f"{self.dataset}, block {self.block}"

    def __str__(self) -> str:
        return f"{self.path}: {self.place}: {self.message}"


@dataclass(frozen=True)
class Recorded:
    """The description of a capture on disk, whole or under way."""

    layout: Layout
    extents: Mapping[str, Extent]
    """Of every dataset in the file, by full path."""
    proof: Mapping[str, npt.NDArray[Any]]
    """What commits have left so far: ``done``, ``hash``, ``exact``, ``worst``, ``where``, ``seal``."""
    identity: Mapping[str, Any]
    boot: str
    """Which start of which machine laid the file out; empty where that cannot be told."""


def check_format(file: h5py.File) -> None:
    """Make sure that `file` is a capture of a version that can be read.

    Raises:
        FormatError: it is something else, or newer.
    """
    kind, version = file.attrs.get("format"), file.attrs.get("format_version")
    if kind != FORMAT or not isinstance(version, int | np.integer):
        raise FormatError(f"{file.filename} is HDF5, but not a capture: its attribute `format` is not {FORMAT!r}")
    if version > FORMAT_VERSION:
        raise FormatError(
            f"{file.filename} has format version {version}; this streamlens reads up to {FORMAT_VERSION}: upgrade "
            f"residual-streamlens to read it"
        )


def read_recorded(file: h5py.File) -> Recorded:
    """Read the description of an open capture.

    Raises:
        FormatError: it is not a capture, or not laid out as one.
        IntegrityError: a dataset reaches beyond the end of the file.
    """
    check_format(file)
    extents: dict[str, Extent] = {}

    def visit(name: str, node: h5py.Dataset | h5py.Group) -> None:
        if isinstance(node, h5py.Dataset):
            extents["/" + name] = extent(node)

    file.visititems(visit)
    names = [name.decode() for name in file["/proof/items"][()]]
    blocks = tuple((int(start), int(stop)) for start, stop in file["/proof/block"][()])
    layout = Layout(tuple(_items(names, extents, file.filename)), blocks[-1][1], blocks)
    proof = {name: file[f"/proof/{name}"][()] for name in PROOF_COLUMNS}
    attrs = file["/proof"].attrs
    return Recorded(layout, extents, proof, json.loads(attrs["identity"]), str(attrs["boot"]))


def _items(names: Iterable[str], extents: Mapping[str, Extent], filename: str) -> Iterator[Item]:
    with_rows: dict[str, bool] = {}
    for name in names:
        base = re.sub(r"\[\d+\]$", "", name)
        with_rows[base] = base != name
    for name, has_rows in with_rows.items():
        found = extents.get(name)
        if found is None or found.dtype is None or len(found.shape) - has_rows not in (1, 2):
            raise FormatError(f"{filename}: {name} is listed in /proof/items but is not there as numbers per token")
        rows, (_, *width) = (found.shape[0], found.shape[1:]) if has_rows else (None, found.shape)
        yield Item(name, rows, width[0] if width else None, found.dtype)


def header_digest(file: h5py.File) -> str:
    """Return the hash of all attributes but the one that keeps it: HDF5's own checksums do not cover long text."""
    found: list[tuple[str, str, str]] = []

    def visit(name: str, node: h5py.Dataset | h5py.Group) -> None:
        found.extend((name, key, str(value)) for key, value in node.attrs.items() if key != HEADER_DIGEST)

    visit("", file)
    file.visititems(visit)
    return xxhash.xxh3_64_hexdigest(json.dumps(sorted(found)).encode())


def digest(fd: int, offset: int, size: int) -> int | None:
    """Return the xxh3_64 of a range of an open file, or None when the file ends before it does."""
    state, buffer = xxhash.xxh3_64(), bytearray(min(size, _CHUNK))
    while size:
        read = os.preadv(fd, [memoryview(buffer)[: min(size, _CHUNK)]], offset)
        if not read:
            return None
        state.update(memoryview(buffer)[:read])
        offset, size = offset + read, size - read
    return state.intdigest()


def damage(fd: int, recorded: Recorded, block: int) -> Iterator[str]:
    """Yield the name of each row of `block` that does not have its hash; ``/proof/seal`` for the proof itself."""
    proof = recorded.proof
    if seal(*(proof[key][block] for key in ("hash", "exact", "worst", "where"))) != int(proof["seal"][block]):
        yield "/proof/seal"
    for column, row_name in enumerate(recorded.layout.row_names):
        name, first, size = recorded.layout.span(column, block)
        if digest(fd, recorded.extents[name].offset + first, size) != int(proof["hash"][block, column]):
            yield row_name


def verify(path: str | Path) -> Iterator[Problem]:
    """Compute every hash of a capture again and yield each place that does not match.

    Of a capture under way (``.h5.partial``) only the blocks that are done are looked at.

    Args:
        path: the file.

    Raises:
        FormatError: it is not a capture.
        IntegrityError: it is truncated, or so damaged that its description cannot be read.
        UnsafeFileError: it reaches outside itself.
    """
    path = Path(path)
    with open_description(path) as file:
        recorded = read_recorded(file)
        attributes_match = header_digest(file) == str(file["/proof"].attrs[HEADER_DIGEST])
        fixed: dict[str, str] = json.loads(file["/proof"].attrs["static_hash"])
    if not attributes_match:
        yield Problem(path, "attributes", None, "the attributes are not those that were written")
    with path.open("rb", buffering=0) as raw:
        for name, expected in fixed.items():
            place = recorded.extents.get(name)
            if place is None or f"{digest(raw.fileno(), place.offset, place.n_bytes) or 0:016x}" != expected:
                yield Problem(path, name, None, "its bytes are not those that were written")
        for block, (start, stop) in enumerate(recorded.layout.blocks):
            if recorded.proof["done"][block] == 1:
                for name in damage(raw.fileno(), recorded, block):
                    values = f"the stored values of {name.rpartition('/')[2]} at tokens {start} to {stop}"
                    yield Problem(path, name, block, f"{values} are not those that were written")
            elif path.suffix != PARTIAL_SUFFIX:
                yield Problem(path, "/proof/done", block, f"tokens {start} to {stop} were never captured")
