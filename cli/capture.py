"""`streamlens capture`: run a model over a text and keep its residual stream."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from streamlens.cli.options import CorpusOptions, ModelOptions, Sectioned, corpus_options, model_options, output_options
from streamlens.cli.output import human, print_notes, print_record, print_rows, tell
from streamlens.errors import StorageError
from streamlens.wording import counted

if TYPE_CHECKING:
    from streamlens.reader.opening import Capture
    from streamlens.recorder.plan import Plan


class Numbers(click.ParamType[tuple[int, ...]]):
    """Whole numbers and ranges: ``0-3,7``."""

    name = "LIST"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Turn the text into the numbers that it names, in order."""
        if isinstance(value, tuple):
            return value
        found: set[int] = set()
        for piece in str(value).split(","):
            first, dash, last = piece.strip().partition("-")
            if not first.isdigit() or (dash and not last.isdigit()):
                self.fail(f"{piece!r} is neither a number nor a range such as 0-3", param, ctx)
            if dash and int(last) < int(first):
                self.fail(f"{piece!r} runs backwards: write {last}-{first}", param, ctx)
            found.update(range(int(first), int(last if dash else first) + 1))
        return tuple(sorted(found))


@click.command("capture", cls=Sectioned)
@model_options
@corpus_options
@click.option("--out", type=click.Path(path_type=Path), help="The file. [default: the model's name with .h5, here]")
@click.option("--compact", is_flag=True, help="Leave the reads out: they are served by exact replay. Half the bytes.")
@click.option("--layers", type=Numbers(), help="Store these layers only, such as 0-3,7.")
@click.option("--kinds", metavar="KINDS", help="Store these kinds only: attn, cross_attn, mixer, mlp, comma-separated.")
@click.option("--positions", type=Numbers(), help="Store these positions of each window only, such as 0,8-15.")
@click.option("--stream", "streams", multiple=True, help="Store this stream only: main, encoder, decoder.")
@click.option("--heads", is_flag=True, help="Also store what enters each attention's output projection.")
@click.option("--output/--no-output", default=True, help="Store a summary of the logits. [default: --output]")
@click.option("--top-k", type=click.IntRange(min=1), default=5, show_default=True, help="Logits kept for each token.")
@click.option("--allow-unproven", is_flag=True, help="Keep a capture that does not add up, and mark it.")
@click.option("--overwrite", is_flag=True, help="Replace another capture of that name.")
@click.option("--dry-run", is_flag=True, help="Say what would be written, to the byte, and write nothing.")
@output_options
def command(
    model: ModelOptions,
    corpus: CorpusOptions,
    out: Path | None,
    allow_unproven: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    **choice: Any,
) -> None:
    """Record what every attention and MLP sublayer of SOURCE reads from and writes into the residual stream.

    The proof that the writes add up runs with the capture. Interrupted, the same command goes on where it was.

    \b
    Example:
      streamlens capture model.pt
      streamlens capture model.pt --text book.txt --compact --out book.h5
      streamlens capture model.pt --layers 0-3 --kinds mlp --dry-run
      streamlens capture --model mypackage.models:build
    """  # noqa: D301 - click reads the \b
    from streamlens.recorder.capturing import DEFAULT_BATCH_TOKENS, default_path, prepare, run
    from streamlens.recorder.plan import Choice

    loaded = model.load()
    windows = corpus.windows(loaded, model.seed)
    print_notes(windows.notes)
    plan = prepare(
        loaded,
        Choice(**_tidy(choice)),
        windows=windows,
        batch_tokens=corpus.batch_tokens or DEFAULT_BATCH_TOKENS,
    )
    path = out or default_path(loaded)
    if dry_run:
        rows = _planned(plan)
        if not as_json:
            print_notes([f"nothing is written; without --dry-run it would be {path}"])
        total = f"total -> {path}" if as_json else "total"
        rows.append({"dataset": total, "shape": "", "dtype": "", "bytes": plan.n_bytes})
        print_rows("capture", rows, as_json=as_json)
        return
    signal.signal(signal.SIGTERM, _stop)
    command_line = " ".join(["streamlens", *sys.argv[1:]])
    with run(
        loaded,
        plan,
        path,
        seed=model.seed,
        allow_unproven=allow_unproven,
        overwrite=overwrite,
        command=command_line,
    ) as captured:
        row = _captured(captured, path)
    print_record("capture", row, as_json=as_json)
    if not as_json:
        tell(_verdict(row))


def _tidy(choice: dict[str, Any]) -> dict[str, Any]:
    kinds = choice.pop("kinds")
    choice["kinds"] = None if kinds is None else tuple(k.strip() for k in kinds.split(","))
    choice["streams"] = choice["streams"] or None
    return choice


def _stop(number: int, frame: FrameType | None) -> None:
    raise StorageError("stopped by a signal; what was committed is kept, and the same command resumes")


def _planned(plan: Plan) -> list[dict[str, Any]]:
    import math

    return [
        {
            "dataset": item.name,
            "shape": " x ".join(str(n) for n in item.shape(plan.n_tokens)),
            "dtype": str(item.dtype).removeprefix("torch."),
            "bytes": math.prod(item.shape(plan.n_tokens)) * item.dtype.itemsize,
        }
        for item in plan.layout.items
    ]


def _captured(captured: Capture, path: Path) -> dict[str, Any]:
    proof = captured.proof
    streams = captured.anatomy.streams
    return {
        "path": str(path),
        "tokens": captured.n_tokens,
        "sublayers": sum(len(s.sublayers) for s in streams),
        "d_model": streams[-1].d_model,
        "dtype": captured.attrs["dtype"],
        "bytes": path.stat().st_size,
        "blocks": proof.blocks,
        "exact_blocks": proof.exact_blocks,
        "worst_error": proof.worst,
        "head_exact": bool(captured.attrs["head_exact"]),
    }


def _verdict(row: dict[str, Any]) -> str:
    if row["exact_blocks"] == row["blocks"]:
        every = "the one block" if row["blocks"] == 1 else f"all {counted(row['blocks'], 'block')}"
        return f"proved: in {every} the writes add up to the model's own states, bit for bit"
    return (
        f"{human(row['exact_blocks'])} of {counted(row['blocks'], 'block')} add up bit for bit; the largest relative "
        f"error is {human(row['worst_error'])}"
    )
