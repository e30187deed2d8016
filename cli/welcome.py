"""What `streamlens` says when nothing is asked: what is here, and what to do next. It imports no torch."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from streamlens.cli.analysis import captures
from streamlens.cli.output import human, wrapped
from streamlens.wording import counted, human_bytes

QUESTIONS = {
    "norms": "how large is each write, and where does it point?",
    "lens": "what would the model say at each state?",
    "ablate": "what does the model lose without a layer?",
    "position": "how much of each state is position, and who carries it?",
    "gradient": "what of the gradient came over the skip?",
    "report": "all of it, on one HTML page",
}

MODELS = (".pt", ".pth", ".ckpt", ".safetensors", ".gguf")
"""Suffixes of files that are taken for a model when one is looked for; `capture` itself looks into the file."""


def welcome() -> None:
    """Print the newest capture of this folder and what can be asked of it, or how to make one."""
    here = Path()
    found = captures(here)
    for line in _with_capture(found) if found else _without_capture(here):
        click.echo(line)
    partial = sorted(here.glob("*.h5.partial"))
    for path in partial:
        click.echo(wrapped(f"\nnot finished: {human(path)}; the command that began it, typed again, goes on"))
    click.echo("\nstreamlens --help lists all commands; streamlens norms --help explains one.")


def _with_capture(found: list[Path]) -> Iterator[str]:
    newest, *others = found
    status = newest.stat()
    more = f"; {counted(len(others), 'older capture')} here" if others else ""
    yield f"{human(newest.name)}: {human_bytes(status.st_size)}, made {ago(time.time() - status.st_mtime)}{more}"
    yield wrapped(f"  {described(newest)}", "  ")
    yield "\nAsk it (the newest capture here is taken where none is named):"
    width = max(map(len, QUESTIONS))
    for name, question in QUESTIONS.items():
        yield f"  streamlens {name:<{width}}  {question}"
    yield "\nWhat it is made of, and whether it is sound:"
    yield f"  streamlens inspect {typed(newest)}"
    yield f"  streamlens verify {typed(newest)}"


def _without_capture(here: Path) -> Iterator[str]:
    models: list[Path] = []
    with suppress(OSError):  # a folder that may not be listed
        models = sorted(path for path in here.iterdir() if path.suffix in MODELS and path.is_file())
    yield "There is no capture in this folder. To make one:"
    if models:
        yield f"  streamlens capture {typed(models[0])}"
    else:
        yield "  streamlens capture model.pt   # or .gguf, .safetensors, a Hugging Face folder"
        yield "\nNo model at hand? This makes a tiny one, with random weights, to try it on:"
        yield "  streamlens pack --model streamlens.cli.tiny:model --out model.pt"
        yield "  streamlens capture model.pt"
    yield "\nThen `streamlens` alone says what can be asked of it."


def described(path: Path) -> str:
    """Say in one line what a capture holds, from its attributes; nothing large is read."""
    import h5py

    try:
        with h5py.File(path) as file:
            attributes: dict[str, Any] = dict(file.attrs)
            tokens = file["tokens/id"].shape[0]
        streams = json.loads(attributes["anatomy"])["streams"]
        sizes = [
            f"{'' if len(streams) == 1 else stream['name'] + ' '}d_model {stream['d_model']}, "
            f"{counted(len(stream['sublayers']), 'sublayer')}"
            for stream in streams
        ]
        model = Path(str(attributes["model_source"])).name
        return f"{model} on {counted(tokens, 'token')}: {'; '.join(sizes)}, {human(attributes['dtype'])}"
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        return f"cannot be read ({human(error)}): `streamlens verify {typed(path)}` says more"


def typed(path: Path) -> str:
    """Return a file name as one types it: quoted where the shell needs it, and with nothing that a terminal obeys.

    >>> typed(Path("my model.pt"))
    "'my model.pt'"
    """
    return human(shlex.quote(path.name))


def ago(seconds: float) -> str:
    """Return how long ago something was, in the largest whole unit.

    >>> ago(5), ago(90), ago(7300), ago(200_000)
    ('just now', '1 minute ago', '2 hours ago', '2 days ago')
    """
    for unit, size in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds >= size:
            return f"{counted(int(seconds // size), unit)} ago"
    return "just now"
