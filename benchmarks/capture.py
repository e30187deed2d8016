"""What a capture costs: streamlens, hooks by hand, and other libraries, against the forward pass alone.

    python -m benchmarks.capture --rounds 5

The contestants take turns, round after round, and each time is divided by the time of the forward pass in the same
round, so that a machine that is slower for a while slows both. README.md says what each of them does.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.agreement import compare
from benchmarks.contestants import Contestant, Factory, Forward, Hooks, Streamlens
from benchmarks.memory import Memory, measure_apart, measure_here
from benchmarks.peers import PACKAGES, NNsight, TransformerLens
from benchmarks.report import Row, table, to_json
from benchmarks.setting import BATCH_TOKENS, DTYPES, THREADS, Setting, make_setting
from streamlens.errors import StreamlensError
from streamlens.reader.opening import open_capture
from streamlens.recorder.plan import Choice

_YARDSTICK = "streamlens full"
"""What the others' numbers are compared with: it stores every write and every read."""

CONTESTANTS: Mapping[str, Factory] = {
    "body": partial(Forward, head=False),
    "body+head": partial(Forward, head=True),
    _YARDSTICK: partial(Streamlens, choice=Choice(output=False), reference="body"),
    "streamlens compact": partial(Streamlens, choice=Choice(compact=True, output=False), reference="body"),
    "streamlens full+output": partial(Streamlens, choice=Choice(), reference="body+head"),
    "hooks+h5py": Hooks,
    "TransformerLens": TransformerLens,
    "nnsight": NNsight,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, print."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(THREADS)
    dtypes = list(DTYPES) if options.dtype == "both" else [options.dtype]
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="streamlens-benchmark-") as made:
        folder = Path(made)
        if options.only is not None:
            setting = make_setting(dtypes[0], options.tokens)
            contestant = CONTESTANTS[options.only](setting)
            print(measure_here(contestant, folder / "x.h5", setting.windows.n_tokens).to_json())
            return
        names = [name for name in CONTESTANTS if options.peers or name not in PACKAGES]
        rows = [row for dtype in dtypes for row in _race(names, dtype, options.tokens, options.rounds, folder)]
        if options.memory:
            for row in rows:
                _add_memory(row, options.memory_tokens, folder)
    print(to_json(rows) if options.json else table(rows))


def _race(names: Sequence[str], dtype: str, tokens: int, rounds: int, folder: Path) -> list[Row]:
    """Let the contestants take turns; the first turn of each is not timed, but what it stored is compared."""
    setting = make_setting(dtype, tokens)
    rows = {name: Row(name, dtype, tokens=setting.windows.n_tokens) for name in names}
    ready: dict[str, Contestant] = {}
    for name, row in rows.items():
        contestant = _made(name, setting, row)
        if contestant is not None and _tried(contestant, row, folder):
            ready[name] = contestant
    (folder / _file(_YARDSTICK)).unlink()
    for turn in range(rounds):
        # Nobody always runs after the same neighbour.
        shift = turn % len(ready)
        order = [*ready][shift:] + [*ready][:shift]
        taken = {name: _timed(ready[name], folder / _file(name)) for name in order}
        for name, contestant in ready.items():
            rows[name].seconds.append(taken[name])
            rows[name].ratios.append(taken[name] / taken[contestant.reference])
        _say(f"{dtype}, round {turn + 1} of {rounds}: " + ", ".join(f"{n} {s:.2f} s" for n, s in taken.items()))
    return list(rows.values())


def _made(name: str, setting: Setting, row: Row) -> Contestant | None:
    try:
        contestant = CONTESTANTS[name](setting)
    except ImportError as error:
        if name not in PACKAGES:
            raise
        row.notes.append(f"{error}: pip install -c constraints.txt {PACKAGES[name]}")
        return None
    except Exception as error:
        _note_failure(error, row)
        return None
    row.reference = contestant.reference
    return contestant


def _tried(contestant: Contestant, row: Row, folder: Path) -> bool:
    """Run once to warm up, and compare what was stored with the yardstick, whose file stays for the others."""
    path = folder / _file(row.contestant)
    _say(f"{row.dtype}, {row.contestant}: first run, not timed")
    try:
        contestant.run(path)
        if not path.exists():
            return True
        row.written_bytes = path.stat().st_size
        if row.contestant == _YARDSTICK:
            return True
        with open_capture(folder / _file(_YARDSTICK)) as yardstick:
            row.agreement = compare(contestant.pieces(path), yardstick)
    except Exception as error:
        _note_failure(error, row)
        return False
    path.unlink()
    return True


def _note_failure(error: Exception, row: Row) -> None:
    """Put what went wrong in a peer's code, which may raise anything, into its row; our own errors go on."""
    if row.contestant not in PACKAGES:
        raise error
    row.notes.append(f"{type(error).__name__}: {error}")


def _timed(contestant: Contestant, path: Path) -> float:
    gc.collect()
    start = time.perf_counter()
    contestant.run(path)
    taken = time.perf_counter() - start
    # At once, so that the system does not write it back while the next one is timed.
    path.unlink(missing_ok=True)
    return taken


def _add_memory(row: Row, tokens: int, folder: Path) -> None:
    if not row.reference:
        return
    found = [_memory(row, tokens, folder)]
    if row.contestant.startswith("streamlens"):
        found.append(_memory(row, 10 * tokens, folder))
    row.memory, row.memory_of_more = (*found, None)[:2]


def _memory(row: Row, tokens: int, folder: Path) -> Memory | None:
    _say(f"{row.dtype}, {row.contestant}: memory, {tokens} tokens")
    found = measure_apart(row.contestant, row.dtype, tokens, folder)
    if isinstance(found, str):
        row.notes.append(f"memory with {tokens} tokens: {found}")
        return None
    return found


def _file(name: str) -> str:
    return f"{name.replace(' ', '-')}.h5"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.capture", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    whole = argparse.BooleanOptionalAction
    parser.add_argument("--tokens", type=int, default=4 * BATCH_TOKENS, help="tokens in each timed run (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each contestant is timed (%(default)s)")
    parser.add_argument("--dtype", choices=("both", *DTYPES), default="both", help="of the weights and the stream")
    parser.add_argument("--peers", action=whole, default=True, help="also TransformerLens and nnsight")
    parser.add_argument("--memory", action=whole, default=True, help="also measure peak memory, each in its process")
    parser.add_argument(
        "--memory-tokens",
        type=int,
        default=2 * BATCH_TOKENS,
        help="tokens for that (%(default)s), and ten times as many",
    )
    parser.add_argument("--folder", type=Path, help="where the files are written and removed (the system's own)")
    parser.add_argument("--only", choices=tuple(CONTESTANTS), help="run this one once and print its peak memory")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    return parser


if __name__ == "__main__":
    try:
        main()
    except StreamlensError as stopped:
        sys.exit(str(stopped))
