"""Direct writes: the same bytes as any other way of writing, whatever the alignment and whatever the system refuses."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path

import pytest
import torch

from streamlens.store.direct import PAGE, DirectFile, byte_view

OFFSETS = [0, 1, 64, PAGE - 1, PAGE, PAGE + 8, 3 * PAGE - 2]
SIZES = [0, 1, 63, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 5 * PAGE + 17]
ROOM = 10 * PAGE


def memory(size: int, phase: int) -> torch.Tensor:
    """Return `size` bytes that begin `phase` bytes after the start of a page."""
    whole = torch.randint(1, 255, (size + 2 * PAGE,), dtype=torch.uint8)
    return whole[-whole.data_ptr() % PAGE + phase :][:size]


def supports_direct(folder: Path) -> bool:
    """Tell whether this file system opens a file for direct writes."""
    (folder / "probe").write_bytes(b"")
    with DirectFile(folder / "probe") as file:
        return file._direct >= 0


def written(path: Path, data: torch.Tensor, offset: int) -> tuple[bytes, bytes]:
    """Write into a file that holds other bytes already; return what is there and what should be."""
    before = bytes(itertools.islice(itertools.cycle(range(256)), ROOM))
    path.write_bytes(before)
    with DirectFile(path) as file:
        file.write(byte_view(data), offset)
        file.sync()
    expected = before[:offset] + data.numpy().tobytes() + before[offset + len(data) :]
    return path.read_bytes(), expected


@pytest.mark.parametrize("offset", OFFSETS)
def test_every_byte_arrives_and_no_other_changes(tmp_path: Path, offset: int) -> None:
    for size in SIZES:
        for phase in (offset % PAGE, (offset + 64) % PAGE, 0):
            found, expected = written(tmp_path / "a", memory(size, phase), offset)
            assert found == expected, (size, phase)


def test_whole_pages_go_past_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ends go through the cache, the pages between them do not, in one call each."""
    if not supports_direct(tmp_path):
        pytest.skip("this file system has no direct writes")
    calls: list[tuple[int, int]] = []
    pwrite = os.pwrite

    def noted(fd: int, data: memoryview, at: int) -> int:
        calls.append((at, len(data)))
        return pwrite(fd, data, at)

    monkeypatch.setattr(os, "pwrite", noted)
    found, expected = written(tmp_path / "a", memory(4 * PAGE, 100), 100)
    assert found == expected
    assert calls == [(100, PAGE - 100), (PAGE, 3 * PAGE), (4 * PAGE, 100)]


@pytest.mark.parametrize("step", [1000, PAGE, PAGE + 1000])
def test_short_writes_go_on_where_they_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:step], at))
    found, expected = written(tmp_path / "a", memory(5 * PAGE, 64), 64)
    assert found == expected


def test_a_system_that_refuses_direct_writes_gets_ordinary_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite

    def refusing(fd: int, data: memoryview, at: int) -> int:
        if _is_direct(fd):
            raise OSError(errno.EINVAL, "Invalid argument")
        return pwrite(fd, data, at)

    monkeypatch.setattr(os, "pwrite", refusing)
    found, expected = written(tmp_path / "a", memory(4 * PAGE, 64), 64)
    assert found == expected

    real = os.open

    def plain_only(path: Path, flags: int) -> int:
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags)

    monkeypatch.setattr(os, "open", plain_only)
    found, expected = written(tmp_path / "b", memory(4 * PAGE, 64), 64)
    assert found == expected


def test_other_errors_are_not_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(fd: int, data: memoryview, at: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwrite", broken)
    with pytest.raises(OSError, match="Input/output error"):
        written(tmp_path / "a", memory(4 * PAGE, 0), 0)
    with pytest.raises(FileNotFoundError):
        DirectFile(tmp_path / "nowhere")


def test_both_descriptors_are_closed(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    (tmp_path / "a").write_bytes(b"x")
    file = DirectFile(tmp_path / "a")
    file.close()
    file.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def _is_direct(fd: int) -> bool:
    fcntl = pytest.importorskip("fcntl")
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
