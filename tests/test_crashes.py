"""Stopped in the middle, in every way: nothing is lost, and the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from streamlens.reader.verifying import verify

ROOT = Path(__file__).resolve().parent.parent
KILLS = 50
# One thread each: several processes of two threads on two cores wait for each other most of the time.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_fifty_kills_change_nothing(tmp_path: Path) -> None:
    """SIGKILL at random moments, the same call after each: hashes equal those of an undisturbed run."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "kill_loop.py", tmp_path, str(KILLS)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{KILLS} kills"), done.stdout


def command(out: Path) -> list[str]:
    model = ROOT / "fixtures" / "model.pt"
    return [
        sys.executable, "-m", "streamlens.cli", "capture", str(model), "--out", str(out), "--window", "64",
        "--batch-tokens", "64", "--max-tokens", "40000",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGTERM, 3, "the same command resumes"), (signal.SIGINT, 130, "the same command resumes")],
)
def test_a_polite_stop_exits_as_documented_and_resumes(
    number: signal.Signals, code: int, said: str, tmp_path: Path
) -> None:
    out = tmp_path / "x.h5"
    partial = tmp_path / "x.h5.partial"
    started = subprocess.Popen(
        command(out),
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        # Tests that a shell runs in the background are started with the interrupt ignored, and a child inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not partial.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    started.send_signal(number)
    _, errors = started.communicate(timeout=60)
    assert started.returncode == code, errors
    assert said in " ".join(errors.split())
    assert "Traceback" not in errors
    assert partial.exists()
    assert not out.exists()
    again = subprocess.run(command(out), env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr
    assert "done before" in again.stderr
    assert verify(out).ok


def test_two_captures_into_one_file(tmp_path: Path) -> None:
    out = tmp_path / "x.h5"
    first = subprocess.Popen(
        command(out),
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        # Tests that a shell runs in the background are started with the interrupt ignored, and a child inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "x.h5.partial").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGSTOP)  # holds the file for as long as the second one tries
    try:
        second = subprocess.run(command(out), env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    finally:
        first.send_signal(signal.SIGCONT)
    assert second.returncode == 3, second.stderr
    assert "another capture is writing" in second.stderr
    _, errors = first.communicate(timeout=300)
    assert first.returncode == 0, errors
    assert verify(out).ok


def test_a_file_that_may_not_grow_stops_before_the_first_forward(tmp_path: Path) -> None:
    """The limit on file sizes stands in for a full disk: one clear line, exit code 3, nothing half-written."""
    limited = ["bash", "-c", 'ulimit -f 1024; trap "" XFSZ; exec "$@"', "limited", *command(tmp_path / "x.h5")]
    done = subprocess.run(limited, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 3, done.stderr
    assert "nothing was written" in done.stderr
    assert list(tmp_path.iterdir()) == []
