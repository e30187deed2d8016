"""What the analyses cost, each against the least that the same job could: its matrix products, its bytes, its passes.

    python -m benchmarks.analyses --rounds 3

Every contestant and its yardstick take turns in the same process; ratios are of wall times within one round. README.md
says what each of them is.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import streamlens as sl
from benchmarks.memory import measure_here
from benchmarks.setting import BATCH_TOKENS, THREADS, Setting, make_setting
from streamlens.calling import invoke, without_cache
from streamlens.recorder import capturing
from streamlens.recorder.plan import Choice

_CHUNK = 1 << 22
_LENS_TOKENS, _SWEEP_TOKENS = 1024, 512


@dataclass
class Race:
    """One analysis against its yardstick."""

    name: str
    job: str
    run: Callable[[], object]
    yardstick: Callable[[], object]
    limit: float
    """The largest ratio that is good enough."""
    cold: Path | None = None
    """A file that is on the disk and not in the page cache when either begins."""
    ratios: list[float] = field(default_factory=list)
    seconds: list[tuple[float, float]] = field(default_factory=list)

    def turn(self, swapped: bool) -> None:
        """Time both once, in either order."""
        pair: dict[str, float] = {}
        for which in ("yardstick", "run") if swapped else ("run", "yardstick"):
            gc.collect()
            if self.cold is not None:
                forget(self.cold)
            start = time.perf_counter()
            getattr(self, which)()
            pair[which] = time.perf_counter() - start
        self.seconds.append((pair["run"], pair["yardstick"]))
        self.ratios.append(pair["run"] / pair["yardstick"])


def read_once(path: Path) -> int:
    """Read every byte of a file into one small buffer; return how many there were."""
    buffer, total = bytearray(_CHUNK), 0
    with path.open("rb", buffering=0) as raw:
        while count := raw.readinto(buffer):
            total += count
    return total


def forget(path: Path) -> None:
    """Drop a file from the system's page cache, so that the next to read it reads the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def bare_products(state: torch.Tensor, weight: torch.Tensor, times: int, rows: int) -> float:
    """Multiply chunks of a state with the unembedding as often as a lens has to, and do nothing with the logits."""
    out = torch.empty(rows, len(weight), dtype=state.dtype)
    for start in range(0, len(state), rows):
        chunk = state[start : start + rows]
        for _ in range(times):
            torch.mm(chunk, weight.T, out=out[: len(chunk)])
    return float(out[0, 0])


def plain_sweep(setting: Setting, tokens: int) -> None:
    """One whole forward pass for each layer, that layer left out by an edit."""
    ids = setting.windows.batch_ids(setting.windows.batches(tokens)[0])
    inputs = without_cache(setting.module, {"input_ids": ids})
    anatomy = sl.discover(setting.module, {"input_ids": ids[:2, :8]})
    stream = anatomy.stream()
    for layer in range(stream.layers):
        dropped = {s.index: torch.zeros_like for s in stream.sublayers if s.layer == layer}
        with torch.no_grad(), sl.edit(setting.module, anatomy, writes=dropped):
            invoke(setting.module, inputs)


def races(folder: Path, tokens: int) -> list[Race]:
    """Capture once, and make every race ready."""
    setting = make_setting("float32", tokens)
    file = folder / "full.h5"
    plan = capturing.prepare(
        setting.model, Choice(output=False), windows=setting.windows, batch_tokens=BATCH_TOKENS
    )  # fmt: skip
    capturing.run(setting.model, plan, file, progress=False).close()
    short = folder / "short.h5"
    sl.capture(setting.model, max_tokens=_SWEEP_TOKENS, out=short, progress=False, output=False).close()
    looked = folder / "lens.h5"
    sl.capture(setting.model, max_tokens=_LENS_TOKENS, out=looked, progress=False, output=False).close()
    weight = setting.module.lm_head.weight.detach()
    with sl.open(looked) as capture:
        state, states = capture.final.clone(), len(capture.stream().anatomy.steps) + 1
    lens = partial(sl.logit_lens, looked, model=setting.model, progress=False, grid=False)
    products = partial(bare_products, state, weight, states, 128)
    sweep = partial(sl.ablate, short, units="layers", model=setting.model, progress=False)
    rough = partial(lens, dtype="bfloat16")
    return [
        Race(
            "norms",
            f"{tokens} tokens from a file",
            partial(sl.contribution_norms, file, progress=False),
            partial(read_once, file),
            2.0,
            file,
        ),
        Race("lens", f"{states} states, {_LENS_TOKENS} tokens, float32", lens, products, 1.6),
        Race("lens bfloat16", "the same in bfloat16, over the float32 lens", rough, lens, 1 / 3),
        Race(
            "ablate",
            f"sweep over {states // 2} layers, {_SWEEP_TOKENS} tokens",
            sweep,
            partial(plain_sweep, setting, _SWEEP_TOKENS),
            0.65,
        ),
    ]


@dataclass(frozen=True)
class Kept:
    """An analysis whose peak memory is measured at two sizes, the larger ten times the smaller."""

    run: Callable[..., object]
    tokens: int = 4096
    """The smaller size; less where every token costs many passes."""


MEMORY: Mapping[str, Kept] = {
    "norms": Kept(sl.contribution_norms),
    "lens": Kept(partial(sl.logit_lens, grid=False)),
    "write lens": Kept(sl.write_lens),
    "ablate": Kept(lambda path, **options: sl.ablate(path, 3, **options)),
    "pairs": Kept(sl.ablate_pairs, 2048),
    "effects": Kept(partial(sl.effects, units="layers"), 2048),
    "position": Kept(sl.positional_persistence),
    "probes": Kept(sl.position_probes),
    "lesion": Kept(partial(sl.position_lesion, alphas=(1.0, 0.0))),
    "gradient": Kept(partial(sl.gradient_flow, sequences=None), 2048),
    "compare": Kept(lambda path, **options: sl.compare(path, path, **options)),
    "paths": Kept(partial(sl.path_spectrum, max_length=4, sequences=None), 2048),
}
"""What is measured, on the small trained model. Both analyses of the gradient run all windows here."""


class _Job:
    """One analysis of a capture, as `measure_here` wants it."""

    reference = ""

    def __init__(self, name: str, path: Path) -> None:
        self._run = partial(MEMORY[name].run, path, progress=False)

    def run(self, path: Path) -> None:
        """Run it."""
        self._run()

    def pieces(self, path: Path) -> Any:
        """Nothing is stored."""
        return iter(())


def memory_of(name: str, folder: Path, tokens: int) -> int:
    """Return the peak memory in bytes of one analysis in a process of its own."""
    options = ["--only", name, "--tokens", str(tokens), "--folder", str(folder)]
    command = [sys.executable, "-m", "benchmarks.analyses", *options]
    child = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    return int(json.loads(child.stdout.splitlines()[-1])["peak_bytes"])


def measure_memory(name: str, folder: Path, tokens: int) -> None:
    """Print the peak memory of one analysis in this process, above what a run on a few tokens needs."""
    small, path = folder / "tiny.h5", folder / f"{tokens}.h5"
    model = Path(__file__).parents[1] / "fixtures" / "model.pt"
    for out, count in ((small, min(2048, tokens // 2)), (path, tokens)):
        sl.capture(model, out=out, max_tokens=count, progress=False).close()
    _Job(name, small).run(small)  # loads what is imported once
    print(measure_here(_Job(name, path), path, tokens).to_json())


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.analyses", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--tokens", type=int, default=BATCH_TOKENS * 2, help="in the file that norms reads (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often each pair is timed (%(default)s)")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="also peak memory")
    parser.add_argument("--folder", type=Path, help="where files are written and removed (the system's own)")
    parser.add_argument("--only", choices=tuple(MEMORY), help="print the peak memory of this one")
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="streamlens-benchmark-") as made:
        folder = Path(made)
        if options.only:
            measure_memory(options.only, folder, options.tokens)
            return
        for race in races(folder, options.tokens):
            race.run()
            race.yardstick()
            for turn in range(options.rounds):
                race.turn(swapped=bool(turn % 2))
            middle, (ours, theirs) = statistics.median(race.ratios), race.seconds[-1]
            print(
                f"{race.name:14s} {middle:.3f} ({min(race.ratios):.3f} to {max(race.ratios):.3f}), at most "
                f"{race.limit:.3f}; {ours:.2f} s against {theirs:.2f} s; {race.job}",
                flush=True,
            )
        for name in MEMORY if options.memory else ():
            counts = MEMORY[name].tokens, 10 * MEMORY[name].tokens
            few, many = (memory_of(name, folder, count) / 2**20 for count in counts)
            print(
                f"memory {name:10s} {few:.1f} MiB with {counts[0]:,} tokens, {many:.1f} with {counts[1]:,}", flush=True
            )


if __name__ == "__main__":
    main()
