"""Kill a real capture again and again: run as a program by `test_crashes.py`.

The model is loaded once; each attempt is a fork of this process, killed without warning at a random moment, so that
fifty kills cost seconds. Prints the number of kills, of attempts, and whether the outcome equals an undisturbed run.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import torch

import streamlens as sl

ROOT = Path(__file__).resolve().parent.parent


def attempt(model: sl.Model, path: Path) -> int:
    """Fork a capture and return the child's process id."""
    child = os.fork()
    if child:
        return child
    try:
        sl.capture(model, out=path, window=64, max_tokens=16_384, batch_tokens=512, progress=False).close()
    except BaseException as error:  # the child must not go on as if it were the parent
        print(f"child failed: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def ended(child: int, patience: float) -> int | None:
    """Wait for a child; return its exit status, or None if it is still running when patience ends."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(0.001)
    return None


def hashes(path: Path) -> dict[str, np.ndarray]:
    """Return the record of every block."""
    with h5py.File(path) as file:
        return {name: file[f"/proof/{name}"][:] for name in ("done", "hash", "exact", "worst", "where", "seal")}


def main(folder: Path, kills_wanted: int) -> None:
    """Loop until so many kills have hit."""
    torch.set_num_threads(1)
    chance = random.Random(0)
    model = sl.load(ROOT / "fixtures" / "model.pt")
    undisturbed = folder / "undisturbed.h5"
    started = time.monotonic()
    assert os.waitpid(attempt(model, undisturbed), 0)[1] == 0
    whole = time.monotonic() - started
    kills = attempts = finished = 0
    path = folder / "killed.h5"
    while kills < kills_wanted:
        attempts += 1
        child = attempt(model, path)
        status = ended(child, chance.uniform(0.0, whole * 0.6))
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
            continue
        assert status == 0, "an attempt after a kill failed"
        finished += compare(path, undisturbed)
        path.unlink()
    status = os.waitpid(attempt(model, path), 0)[1]
    assert status == 0, "the last attempt failed"
    finished += compare(path, undisturbed)
    print(f"{kills} kills, {attempts + 1} attempts, {finished} captures finished, all equal to the undisturbed one")


def compare(path: Path, undisturbed: Path) -> int:
    """Make sure that both files hold the same, and return 1."""
    ours, theirs = hashes(path), hashes(undisturbed)
    assert all(np.array_equal(ours[name], theirs[name], equal_nan=name == "worst") for name in theirs)
    assert sl.verify(path).ok
    return 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
