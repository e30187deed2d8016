"""The file under attack: full disks, killed processes, cut and flipped bits. Nothing lost, nothing unnoticed."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from fixtures.small_capture import IDENTITY, ITEMS, begin, fill, flip, in_child, write_all_blocks
from streamlens.errors import FormatError, IntegrityError, StorageError, StreamlensError
from streamlens.store import writer as store
from streamlens.store.integrity import verify
from streamlens.store.layout import Item


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A finished capture."""
    return write_all_blocks(tmp_path / "whole.h5")


def limit_file_size(size: int) -> None:
    """Make writing beyond `size` bytes fail with EFBIG, as Python ignores the signal."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_no_room_is_found_out_before_anything_is_written(tmp_path: Path, whole: Path) -> None:
    changed = {**IDENTITY, "window": 16}
    before = whole.read_bytes()

    def attempt() -> None:
        limit_file_size(1 << 16)
        big = [*ITEMS, Item("/big", 8, 4096, torch.float32)]
        with pytest.raises(StorageError, match=r"needs 2\.\d MiB .* free .*nothing was written"):
            begin(whole, items=big, identity=changed, overwrite=True)

    assert in_child(attempt) == 0
    assert whole.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["whole.h5"]


def test_a_full_disk_says_how_much_is_needed(tmp_path: Path) -> None:
    if os.getuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("mounting a small tmpfs needs root and unshare")
    body = f"""import torch
from streamlens.store.layout import Item
from streamlens.store.writer import CaptureWriter
items = [Item("/x", 4, 1 << 18, torch.float32)]
CaptureWriter.open("{tmp_path}/a.h5", items=items, n_tokens=4, blocks=[(0, 4)], attrs={{}}, static={{}}, identity={{}})
"""
    mount = f'mount -t tmpfs -o size=4m none {tmp_path} || exit 77; {sys.executable} -c "$BODY"; e=$?; ls -A {tmp_path}'
    root = str(Path(__file__).parents[1])
    ran = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"{mount}; exit $e"],
        env={**os.environ, "BODY": body, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode == 77 or "unshare failed" in ran.stderr:
        pytest.skip(f"a tmpfs cannot be mounted here: {ran.stderr.strip()}")
    assert "StorageError: this capture needs 16.1 MiB" in ran.stderr
    assert "has 4.0 MiB" in ran.stderr
    assert "No space left" in ran.stderr
    assert (ran.returncode, ran.stdout) == (1, "")


def test_a_write_that_fails_keeps_what_was_committed(tmp_path: Path, whole: Path) -> None:
    path = tmp_path / "a.h5"

    def attempt() -> None:
        with begin(path) as writer:
            fill(writer, 0)
            limit_file_size(4096)
            with pytest.raises(StorageError, match=r"File too large\. 1 of 3 blocks are kept; .*same command resumes"):
                fill(writer, 1)

    assert in_child(attempt) == 0
    with begin(path) as writer:
        assert writer.done.tolist() == [True, False, False]
    write_all_blocks(path)
    assert path.read_bytes() == whole.read_bytes()


def test_short_writes_are_completed(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:7], offset))
    assert write_all_blocks(tmp_path / "a.h5").read_bytes() == whole.read_bytes()


def test_file_systems_that_cannot_reserve(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(fd: int, offset: int, size: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    assert write_all_blocks(tmp_path / "a.h5").read_bytes() == whole.read_bytes()
    huge = [Item("/x", None, 1 << 40, torch.float32)]
    with pytest.raises(StorageError, match=r"needs 80\.0 TiB"):
        begin(tmp_path / "b.h5", items=huge)


def test_after_a_restart_of_the_machine_blocks_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.h5"
    with begin(path) as writer:
        fill(writer, 0)
        fill(writer, 2)
    partial = tmp_path / "a.h5.partial"
    with h5py.File(partial) as file:
        flip(partial, file["/streams/main/write"].id.get_offset())
    with begin(path) as writer:
        assert writer.done.tolist() == [True, False, True]
    monkeypatch.setattr(store, "boot_id", lambda: "another start")
    with begin(path) as writer:
        assert writer.done.tolist() == [False, False, True]
    with begin(path) as writer:
        assert writer.done.tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("dataset", "offset", "named"),
    [
        ("/streams/main/write", (1 * 20 + 9) * 16 * 2, "/streams/main/write[1], block 1"),
        ("/output/lse", 19 * 4, "/output/lse, block 2"),
        ("/proof/worst", 0, "/proof/seal, block 0"),
        ("/proof/hash", 8 * 8, "block 1"),
        ("/proof/done", 2, "/proof/done, block 2: tokens 13 to 20 were never captured"),
        ("/tokens/id", 5, "/tokens/id: its bytes"),
    ],
)
def test_verify_names_the_flipped_place(whole: Path, dataset: str, offset: int, named: str) -> None:
    with h5py.File(whole) as file:
        where = file[dataset].id.get_offset() + offset
    flip(whole, where)
    problems = [str(problem) for problem in verify(whole)]
    assert problems
    assert all(named in problem for problem in problems), problems
    assert str(whole) in problems[0]


def test_verify_sees_a_changed_attribute(whole: Path) -> None:
    flip(whole, whole.read_bytes().index(b"model.pt"))
    assert [p.dataset for p in verify(whole)] == ["attributes"]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99, 0.9999])
def test_a_truncated_file_is_an_error(whole: Path, share: float) -> None:
    os.truncate(whole, int(whole.stat().st_size * share))
    with pytest.raises((IntegrityError, FormatError)):
        list(verify(whole))


def everything(path: Path) -> dict[str, Any]:
    """Return all that h5py reads in a file, attributes included."""
    found: dict[str, Any] = {}

    def visit(name: str, node: Any) -> None:
        found.update({f"{name}@{key}": value for key, value in node.attrs.items()})
        if isinstance(node, h5py.Dataset):
            found[name] = node[()].tobytes()

    with h5py.File(path) as file:
        visit("", file)
        file.visititems(visit)
    return found


def test_no_flipped_bit_goes_unnoticed(whole: Path) -> None:
    """A bit flipped anywhere is an error, or a problem with a name, or lies where nothing is stored."""
    original, contents = whole.read_bytes(), everything(whole)
    generator, noticed = np.random.default_rng(0), 0
    for _ in range(250):
        offset, bit = int(generator.integers(len(original))), int(generator.integers(8))
        flip(whole, offset, bit)
        try:
            found = list(verify(whole))
        except StreamlensError:
            noticed += 1
        else:
            noticed += bool(found)
            assert found or everything(whole) == contents, f"bit {bit} of byte {offset}"
        whole.write_bytes(original)
    assert noticed > 100


CALLS = ("pwrite", "posix_fallocate", "fsync", "replace", "ftruncate")


def killed_at(path: Path, call: int) -> bool:
    """Capture in a child that SIGKILLs itself in its `call`-th change to the disk; return whether it got that far.

    A write is cut in half by the kill; any other call does not happen.
    """

    def capture() -> None:
        count = 0

        def dying(name: str, real: Any) -> Any:
            def wrapped(*args: Any, **keywords: Any) -> Any:
                nonlocal count
                count += 1
                if count == call:
                    if name == "pwrite":
                        real(args[0], args[1][: len(args[1]) // 2], args[2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **keywords)

            return wrapped

        for name in CALLS:
            setattr(os, name, dying(name, getattr(os, name)))
        write_all_blocks(path)

    code = in_child(capture)
    assert code in (0, -signal.SIGKILL)
    return code != 0


def check_remains(path: Path) -> None:
    """Whatever a kill left must be nothing, or a file under way whose flags tell the truth, or the finished file."""
    partial = path.with_name(path.name + ".partial")
    assert not (path.exists() and partial.exists())
    for remains in (path, partial):
        if remains.exists():
            assert list(verify(remains)) == []


def test_killed_at_every_single_change_to_the_disk(tmp_path: Path, whole: Path) -> None:
    call, complete = 1, whole.read_bytes()
    while killed_at(tmp_path / f"{call}.h5", call):
        path = tmp_path / f"{call}.h5"
        check_remains(path)
        assert write_all_blocks(path).read_bytes() == complete
        call += 1
    assert call > 40
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["whole.h5", *(f"{i}.h5" for i in range(1, call + 1))])


def test_killed_at_random_moments(tmp_path: Path, whole: Path) -> None:
    generator, midway = np.random.default_rng(1), 0
    path, complete = tmp_path / "a.h5", whole.read_bytes()
    for _ in range(25):
        heard, said = os.pipe()

        def capture(said: int = said) -> None:
            with begin(path) as writer:
                for block in np.flatnonzero(~writer.done):
                    os.write(said, b".")
                    time.sleep(0.002)
                    fill(writer, int(block))
                writer.finish()

        pid = os.fork()
        if pid == 0:
            try:
                capture()
            finally:
                os._exit(0)
        os.close(said)
        # Kill while it lays the file out, or shortly after it has begun a block.
        for _ in range(int(generator.integers(0, 3))):
            os.read(heard, 1)
        time.sleep(float(generator.uniform(0, 0.003)))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(heard)
        check_remains(path)
        if path.exists():
            assert path.read_bytes() == complete
            path.unlink()
        elif (tmp_path / "a.h5.partial").exists():
            with begin(path) as writer:
                midway += 0 < writer.done.sum() < 3
    assert midway > 0
    assert write_all_blocks(path).read_bytes() == complete
