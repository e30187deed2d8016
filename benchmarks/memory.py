"""Peak memory of one contestant, measured in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.contestants import Contestant

_ROOT = Path(__file__).parents[1]
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Memory:
    """What one run took."""

    tokens: int
    peak_bytes: int
    """The largest resident set during the run, less what the loaded model and the made-ready contestant held."""

    def to_json(self) -> str:
        """Return one line for the parent."""
        return json.dumps(asdict(self))


def measure_here(contestant: Contestant, path: Path, tokens: int) -> Memory:
    """Run a contestant once in this process, which must have done nothing but load the model.

    Raises:
        OSError: not on Linux.
    """
    gc.collect()
    # What loading freed goes back to the system; otherwise the run could use it without being seen.
    ctypes.CDLL(None).malloc_trim(0)
    # The peak so far is that of loading: begin anew (proc_pid_clear_refs(5)).
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    contestant.run(path)
    return Memory(tokens, _resident("VmHWM") - before)


def measure_apart(name: str, dtype: str, tokens: int, folder: Path) -> Memory | str:
    """Run a contestant once in a fresh process; a text instead says why it could not be."""
    options = ["--only", name, "--dtype", dtype, "--tokens", str(tokens), "--folder", str(folder)]
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.capture", *options], cwd=_ROOT, capture_output=True, text=True, check=False
    )
    if child.returncode:
        return (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
    return Memory(**json.loads(child.stdout.strip().splitlines()[-1]))


def _resident(field: str) -> int:
    found = re.search(rf"^{field}:\s*(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{_STATUS} has no {field}: memory is measured on Linux only, use --no-memory")
    return int(found[1]) * 1024
