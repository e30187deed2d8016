"""What all analysis commands share: where their numbers come from, and where their results go."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from streamlens.analyses.result import FIGURES
from streamlens.cli.options import (
    RESULT,
    SOURCE,
    CorpusOptions,
    ModelOptions,
    OutFile,
    corpus_options,
    model_options,
    output_options,
    shared,
)
from streamlens.cli.output import detail, print_notes, print_rows, stage
from streamlens.errors import UsageError

if TYPE_CHECKING:
    import torch

    from streamlens.analyses.result import Result
    from streamlens.analyses.source import Source
    from streamlens.checkpoint.model import Model

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class OriginOptions:
    """A capture, or a model and a text."""

    model: ModelOptions
    corpus: CorpusOptions
    stream: str | None
    model_file: Path | None

    def open(self, *, heads: bool = False, takes_dtype: bool = False) -> Source:
        """Open what SOURCE names: a capture, a model, or nothing, which is the newest capture in this folder.

        Args:
            heads: for a live model: also look at what enters each attention's output projection.
            takes_dtype: whether --dtype means something for a capture, too.

        Raises:
            UsageError: nothing is named and there is no capture here.
        """
        from streamlens.checkpoint.sniff import is_hdf5

        named = self.model.source
        if named is None and self.model.factory is None:
            found = newest_capture(Path())
            print_notes([f"no SOURCE was given: {found.name}, the newest capture here"])
            return self._capture(found, takes_dtype)
        if named is not None and is_hdf5(Path(named)):
            return self._capture(Path(named), takes_dtype)
        return self._live(heads)

    def _capture(self, path: Path, takes_dtype: bool) -> Source:
        from streamlens.analyses.finding import find_model
        from streamlens.analyses.source import source_of

        given = {
            "--text": self.corpus.text,
            "--jsonl": self.corpus.jsonl,
            "--tokens": self.corpus.tokens,
            "--window": self.corpus.window,
            "--ragged": self.corpus.ragged,
            "--max-tokens": self.corpus.max_tokens,
            "--batch-tokens": self.corpus.batch_tokens,
            "--dtype": None if takes_dtype else self.model.dtype,
        }
        if named := [option for option, value in given.items() if value]:
            raise UsageError(f"{path} has its own tokens and dtype: {', '.join(named)} can only be given with a model")

        def load_from(place: Path | None, dtype: torch.dtype | None, named: bool) -> Model:
            unsafe = self.model.unsafe_pickle and named
            source = None if place is None else str(place)
            return replace(self.model, source=source, dtype=None, unsafe_pickle=unsafe).load(dtype)

        find = functools.partial(
            find_model, load_from=load_from, moved=self.model_file, builds=self.model.factory is not None
        )
        with stage(f"opened the capture {path}"):
            source = source_of(path, stream=self.stream, model=find)
        detail(f"it holds {source.description}")
        return source

    def _live(self, heads: bool) -> Source:
        from streamlens.analyses.source import live_source

        loaded = self.model.load()
        windows = self.corpus.windows(loaded, self.model.seed)
        print_notes(windows.notes)
        return live_source(
            loaded, stream=self.stream, heads=heads, batch_tokens=self.corpus.batch_tokens, windows=windows
        )


@dataclass(frozen=True)
class ShowOptions:
    """Where a result goes besides the terminal."""

    as_json: bool
    saves: tuple[Path, ...]

    def show(
        self,
        command: str,
        result: Result,
        rows: list[dict[str, Any]] | None = None,
        more: Mapping[str, list[dict[str, Any]]] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Print the table, or as JSON all rows, and save what was asked for.

        Args:
            command: name of the command.
            result: what was found.
            rows: a shorter table for the terminal; by default all rows.
            more: further tables, see `print_rows`.
            about: what is true of all rows, see `print_rows`.

        Raises:
            StorageError: a file could not be written.
        """
        shown = result.rows() if self.as_json or rows is None else rows
        print_rows(command, shown, as_json=self.as_json, more=more, about=about)
        for path in self.saves:
            with stage("saved"):
                written = result.save(path)
            print_notes([f"wrote {written}"])


def captures(folder: Path) -> list[Path]:
    """Return the captures in a folder, the newest first; other files, and those that may not be read, are none."""
    made: dict[Path, float] = {}
    for path in folder.glob("*.h5"):
        with suppress(OSError):  # it may be gone again by now
            if _is_capture(path):
                made[path] = path.stat().st_mtime
    return sorted(made, key=lambda path: made[path], reverse=True)


def _is_capture(path: Path) -> bool:
    from streamlens.checkpoint.sniff import is_hdf5

    if not is_hdf5(path):
        return False
    import h5py

    try:
        with h5py.File(path) as file:
            return "format" in file.attrs and str(file.attrs["format"]) == "streamlens-capture"
    except OSError:
        return True  # a damaged file: whoever opens it says what is wrong with it


def newest_capture(folder: Path) -> Path:
    """Return the newest capture file in a folder.

    Raises:
        UsageError: there is none.
    """
    if not (found := captures(folder)):
        raise UsageError("no capture is here: run `streamlens capture MODEL` first, or name a capture or a model")
    return found[0]


def origin_options(command: Command) -> Command:
    """Add SOURCE and what a live model is shown; the command gets `origin: OriginOptions`."""

    @functools.wraps(command)
    def wrapped(
        model: ModelOptions, corpus: CorpusOptions, stream: str | None, model_file: Path | None, **values: Any
    ) -> Any:
        return command(origin=OriginOptions(model, corpus, stream, model_file), **values)

    existing = click.Path(exists=True, path_type=Path)
    decorated: Any = wrapped
    for option in (
        shared(SOURCE, "--model-file", type=existing, help="The model of a capture, where it has moved."),
        shared(SOURCE, "--stream", help="Which stream: main, encoder, decoder. [default: the one that the head reads]"),
        corpus_options,
        model_options,
    ):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return]


def show_options(command: Command) -> Command:
    """Add where results go; the command gets `show: ShowOptions`."""

    @functools.wraps(command)
    def wrapped(as_json: bool, **values: Any) -> Any:
        saves = tuple(path for name in ("plot", "csv", "parquet") if (path := values.pop(name)) is not None)
        return command(show=ShowOptions(as_json, saves), **values)

    decorated: Any = wrapped
    for option in (
        shared(RESULT, "--parquet", type=OutFile(".parquet"), help="Also write the table to this .parquet file."),
        shared(RESULT, "--csv", type=OutFile(".csv"), help="Also write the table to this .csv file."),
        shared(RESULT, "--plot", type=OutFile(*FIGURES), help="Also draw the figure: .png, .svg or .pdf."),
        output_options,
    ):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return]


def analysis_options(command: Command) -> Command:
    """Add SOURCE, what a live model is shown, and where results go.

    The command gets `origin: OriginOptions` and `show: ShowOptions`.
    """
    return origin_options(show_options(command))
