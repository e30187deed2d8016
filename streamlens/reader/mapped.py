"""The numbers of a capture on disk as torch tensors: mapped without being read, or read block by block."""

from __future__ import annotations

import difflib
import mmap
import os
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from streamlens.errors import MissingDataError, StorageError, UsageError
from streamlens.store.direct import byte_view
from streamlens.store.hdf5 import Extent

# Python names this flag only from 3.13 on. Without it Linux refuses a private map that is larger than the memory.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class MappedFile:
    """An open file and where its datasets lie; every tensor it gives is a view of the file or a copy of one block.

    Views are copy-on-write: editing one in place changes neither the file nor anybody else's view of it in another
    process, but it does change later views from this object, so clone before you edit. h5py plays no part, so a view
    may be used after a fork, and in any thread.
    """

    def __init__(self, path: Path, extents: Mapping[str, Extent]) -> None:
        """Open and map, which costs the same for a kilobyte and a terabyte."""
        self.path = path
        self.extents = extents
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._close_fd = weakref.finalize(self, os.close, self._fd)
        flags, access = mmap.MAP_PRIVATE | _NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        self._map = mmap.mmap(self._fd, 0, flags=flags, prot=access)

    def __contains__(self, name: str) -> bool:
        """Tell whether the file has a dataset of that full path."""
        return name in self.extents

    def under(self, folder: str) -> dict[str, Tensor]:
        """Return a view of every dataset in a group, by name."""
        return {name[len(folder) :]: self.view(name) for name in self.extents if name.startswith(folder)}

    def view(self, name: str) -> Tensor:
        """Return a whole dataset, mapped.

        Raises:
            MissingDataError: there is no such dataset, or it is a table.
        """
        found, dtype = self._numbers(name)
        if not found.n_bytes:
            return torch.empty(found.shape, dtype=dtype)
        count = found.n_bytes // dtype.itemsize
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=found.offset).reshape(found.shape)

    def part(self, name: str, row: int | None, start: int, stop: int) -> Tensor:
        """Return tokens `start` to `stop` of one row, (token, width?), read into memory of its own.

        Unlike a view it leaves no pages behind that count as this process' memory, and an error of the disk is an
        exception instead of a crash.

        Raises:
            StorageError: the disk could not be read.
        """
        found, dtype = self._numbers(name)
        n_tokens, *width = found.shape if row is None else found.shape[1:]
        data = torch.empty((stop - start, *width), dtype=dtype)
        per_token = dtype.itemsize * (width[0] if width else 1)
        offset, left = found.offset + ((row or 0) * n_tokens + start) * per_token, byte_view(data)
        while len(left):
            try:
                read = os.preadv(self._fd, [left], offset)
            except OSError as error:
                raise StorageError(f"{self.path}: {name} cannot be read: {error.strerror}") from error
            if not read:
                raise StorageError(f"{self.path} has become shorter while it was read; copy or capture it again")
            left, offset = left[read:], offset + read
        if row is not None and row + 1 < found.shape[0] and hasattr(os, "posix_fadvise"):
            # Whoever reads a row of a block goes on to the next one: the disk begins while this one is worked on.
            after = offset + (n_tokens - (stop - start)) * per_token
            os.posix_fadvise(self._fd, after, data.nbytes, os.POSIX_FADV_WILLNEED)
        return data

    def close(self) -> None:
        """Close the file; views that are still in use stay valid. A second call does nothing."""
        if self._close_fd.alive:
            self._close_fd()
            # Not `mmap.close`: torch keeps the map alive, but not locked, so that would pull it from under the views.
            del self._map

    def _numbers(self, name: str) -> tuple[Extent, torch.dtype]:
        if not self._close_fd.alive:
            raise UsageError(f"{self.path} is closed; open it again")
        found = self.extents.get(name)
        if found is None or found.dtype is None:
            near = difflib.get_close_matches(name, self.extents, n=3, cutoff=0.3)
            raise MissingDataError(f"{self.path} does not hold {name}; near names: {', '.join(near) or 'none'}")
        return found, found.dtype
