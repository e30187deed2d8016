"""How the command line speaks: --quiet, --verbose and --debug on every command, notes, and errors in one voice."""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from streamlens.cli.options import EVERYWHERE, Shared
from streamlens.cli.output import LOGGER, print_notes, tell, wrapped
from streamlens.progress import quiet

_DEBUG = "streamlens.cli.debug"


class Complaint(click.ClickException):
    """An error as the user reads it: `Error: what, where, what to do`, then its notes, one to a line."""

    def __init__(self, message: str, exit_code: int, notes: Iterable[str] = (), label: str = "Error: ") -> None:
        """Say what went wrong, how the program ends, what is told below the message, and what stands before it."""
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # click has one for each class, streamlens for each error
        self.notes = tuple(notes)
        self.label = label

    def show(self, file: Any = None) -> None:
        """Print it to stderr."""
        click.echo(
            "\n".join(wrapped(line) for line in (f"{self.label}{self.message}", *self.notes)), file=file, err=True
        )


def complaint(error: BaseException) -> Complaint:
    """Put an error of streamlens, or one of click about what was typed, into the one voice.

    >>> complaint(click.UsageError("Missing argument 'CAPTURE'.")).message
    "missing argument 'CAPTURE'"
    """
    if not isinstance(error, click.ClickException):
        return Complaint(str(error), getattr(error, "exit_code", 1), getattr(error, "__notes__", ()))
    near = getattr(error, "possibilities", None)
    message = (error.message if near else error.format_message()).removesuffix(".")
    message += f"; did you mean {' or '.join(near)}?" if near else ""
    context = getattr(error, "ctx", None)
    notes = [] if context is None else [f"`{context.command_path} --help` says what can be given."]
    return Complaint(message[:1].lower() + message[1:], error.exit_code, notes)


class _Handler(logging.Handler):
    """What the library logs: warnings are notes, the rest is shown with --verbose."""

    def emit(self, record: logging.LogRecord) -> None:
        tell(f"{'note' if record.levelno >= logging.WARNING else 'info'}: {record.getMessage()}")


@contextmanager
def heard() -> Iterator[None]:
    """While a command runs, print what the library logs and warns of in the voice of the notes."""

    def show(message: Warning | str, *where: Any, **more: Any) -> None:
        print_notes([str(message)])

    handler = _Handler()
    with warnings.catch_warnings():
        warnings.showwarning = show
        LOGGER.addHandler(handler)
        try:
            yield
        finally:
            LOGGER.removeHandler(handler)


def show_traceback(ctx: click.Context) -> None:
    """With --debug, print the traceback of the error that is being handled."""
    if ctx.meta.get(_DEBUG):
        click.echo(traceback.format_exc(), err=True, nl=False)


def _switch(ctx: click.Context, option: click.Parameter, on: bool) -> bool:
    """Switch until the program ends; the same before the command's name and after it."""
    if not on or ctx.resilient_parsing:
        return on
    ctx.meta[f"streamlens.cli.{option.name}"] = True
    if ctx.meta.get("streamlens.cli.quiet") and ctx.meta.get("streamlens.cli.verbose"):
        raise click.UsageError("--quiet and --verbose contradict each other: pass one of them", ctx)
    if option.name == "quiet":
        ctx.find_root().with_resource(quiet())
    if option.name == "verbose":
        before = LOGGER.level
        LOGGER.setLevel(logging.INFO)
        ctx.find_root().call_on_close(lambda: LOGGER.setLevel(before))
    return on


def switches() -> list[click.Option]:
    """Return the options that the group and each of its commands take."""
    texts = {
        "quiet": "No progress and no notes: only results and errors.",
        "verbose": "Say what is loaded and found, and how long each stage takes.",
        "debug": "Show the traceback of an error.",
    }
    return [
        Shared([f"--{name}"], section=EVERYWHERE, is_flag=True, help=text, callback=_switch, expose_value=False)
        for name, text in texts.items()
    ]
