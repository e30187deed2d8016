"""Bytes to their place in a file, past the system's page cache wherever alignment allows.

Through the cache every byte is copied once more, by the core that the model computes on; into space that was reserved
beforehand this costs several times the copy itself. A direct write leaves all of that to the device. It takes whole
pages from memory that begins on a page, so what is left over at either end of a span goes through the cache; the two
never touch the same page.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

PAGE = 4096
"""What a direct write is aligned to: a multiple of the block size of every common device."""

_REFUSALS = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP}


class DirectFile:
    """An existing file, open for writing at any place.

        with DirectFile(path) as file:
            file.write(byte_view(tensor), offset)

    A system, or a file system, without direct writes gets all bytes through the cache.
    """

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            OSError: it cannot be opened for writing.
        """
        self._fd = os.open(path, os.O_RDWR)
        self._direct = _open_direct(path)

    @property
    def fd(self) -> int:
        """The descriptor, through the cache; -1 when the file is closed."""
        return self._fd

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of `data` (bytes) at `offset`; fast where its address is congruent to `offset` modulo `PAGE`.

        Raises:
            OSError: the disk refused; part of it may be written.
        """
        address = np.frombuffer(data, np.uint8).ctypes.data if len(data) else 0
        aligned = self._direct >= 0 and (address - offset) % PAGE == 0
        while len(data):
            # A write may take less than it is given, so each turn looks anew at where it stands.
            written = self._write_pages(data, offset) if aligned else 0
            if not written:
                head = -offset % PAGE
                written = os.pwrite(self._fd, data[:head] if aligned and head else data, offset)
            data, offset = data[written:], offset + written

    def sync(self) -> None:
        """Have everything reach the disk."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Close; a second call does nothing."""
        for descriptor in (self._fd, self._direct):
            if descriptor >= 0:
                os.close(descriptor)
        self._fd = self._direct = -1

    def __enter__(self) -> DirectFile:
        """Return the file."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _write_pages(self, data: memoryview, offset: int) -> int:
        """Write the whole pages at the start of `data`, if it begins with some, and return how many bytes that was."""
        whole = len(data) // PAGE * PAGE
        if offset % PAGE or not whole or self._direct < 0:
            return 0
        try:
            return os.pwrite(self._direct, data[:whole], offset)
        except OSError as error:
            if error.errno not in _REFUSALS:
                raise
            # It opened the file so and then would not write so, or not with this alignment: no more of it.
            os.close(self._direct)
            self._direct = -1
            return 0


def byte_view(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _open_direct(path: Path) -> int:
    flag = getattr(os, "O_DIRECT", 0)  # macOS has none
    if not flag:
        return -1
    try:
        return os.open(path, os.O_RDWR | flag)
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        return -1
