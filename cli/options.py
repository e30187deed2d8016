"""Options that several commands share. Each decorator hands its command one object, not a dozen arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import click
from click.shell_completion import CompletionItem

from streamlens.cli.output import detail, human_count, stage
from streamlens.errors import UsageError
from streamlens.wording import counted

if TYPE_CHECKING:
    import torch

    from streamlens.checkpoint.model import Model
    from streamlens.corpus.windows import Windows

Command = TypeVar("Command", bound=Callable[..., Any])
_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

SOURCE, TEXT, RESULT, EVERYWHERE = "Source", "Text, where SOURCE is a model", "Result", "Every command"
"""The parts of a command's help below its own options, in their order."""

_file = click.Path(exists=True, dir_okay=False, path_type=Path)


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is loaded."""

    source: str | None
    config: Path | None
    factory: str | None
    unsafe_pickle: bool
    dtype: str | None
    device: str
    seed: int

    def load(self, cast_to: torch.dtype | None = None) -> Model:
        """Load the model; a factory draws its random weights from the seed.

        Args:
            cast_to: the dtype of the weights, where --dtype names none.

        Raises:
            UsageError: neither a source nor a factory is given.
            CheckpointError: the file cannot be loaded.
            UnsafeFileError: the file would run code.
        """
        if self.source is None and self.factory is None:
            raise UsageError("no model is given: name a file or folder, or pass --model package.module:factory")

        import torch

        from streamlens.checkpoint.loading import load

        torch.manual_seed(self.seed)
        with stage(f"loaded {self.source or self.factory}"):
            model = load(
                self.source,
                config=self.config,
                factory=self.factory,
                unsafe_pickle=self.unsafe_pickle,
                dtype=self.dtype or cast_to,
                device=self.device,
            )
        size = sum(parameter.numel() for parameter in model.module.parameters())
        detail(f"it is a {type(model.module).__name__} of {human_count(size)} parameters, on {self.device}")
        return model


@dataclass(frozen=True)
class CorpusOptions:
    """What the model is shown, and in which windows."""

    text: tuple[Path, ...]
    jsonl: Path | None
    text_key: str
    tokens: Path | None
    window: int | None
    ragged: bool
    max_tokens: int | None
    batch_tokens: int | None
    """None for the default of the command: a capture keeps one tensor at a time, a live analysis all of a batch."""

    def windows(self, model: Model, seed: int) -> Windows:
        """Read what was named and cut it into windows for a model; the built-in text when nothing was named.

        Raises:
            UsageError: more than one of --text, --jsonl and --tokens.
            CorpusError: text or ids that cannot be used with this model.
        """
        from streamlens.corpus.documents import jsonl_documents
        from streamlens.corpus.windows import windows_for

        if sum(map(bool, (self.text, self.jsonl, self.tokens))) > 1:
            raise UsageError("--text, --jsonl and --tokens exclude each other: pass one of them")
        named = self.jsonl or self.tokens or ", ".join(map(str, self.text))
        documents = jsonl_documents(self.jsonl, text_key=self.text_key) if self.jsonl else self.text
        windows = windows_for(
            model,
            documents=documents or None,
            ids=self.tokens,
            description=str(named),
            window=self.window,
            max_tokens=self.max_tokens,
            ragged=self.ragged,
            seed=seed,
        )
        detail(f"read {counted(windows.n_tokens, 'token')} in {counted(len(windows), 'window')}: {windows.description}")
        return windows


class Shared(click.Option):
    """An option of several commands, which has its place in a section of their help."""

    def __init__(self, *names: Any, section: str, **settings: Any) -> None:
        """Take what click takes, and the section's heading."""
        super().__init__(*names, **settings)
        self.section = section


def shared(section: str, *names: str, **settings: Any) -> Callable[[Command], Command]:
    """Return the decorator that adds a `Shared` option to a command."""
    return click.option(*names, cls=Shared, section=section, **settings)


class Sectioned(click.Command):
    """A command whose help shows its own options first, and those that it shares in sections below."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections."""
        found: dict[str, list[tuple[str, str]]] = {n: [] for n in ("Options", SOURCE, TEXT, RESULT, EVERYWHERE)}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                own = EVERYWHERE if "--help" in parameter.opts else "Options"
                names = record[0].replace("INTEGER RANGE", "N").replace("INTEGER", "N")
                found[getattr(parameter, "section", own)].append((names, record[1]))
        for name, records in found.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)


class Dtype(click.Choice[str]):
    """A dtype by its name, or by the short one that people type: bf16, fp16, fp32."""

    _SHORT: ClassVar = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the full name."""
        return super().convert(self._SHORT.get(value, value), param, ctx)


class OutFile(click.ParamType[Path]):
    """A file that a result is saved to, looked at before the work begins."""

    name = "FILE"

    def __init__(self, *suffixes: str) -> None:
        """Say which suffixes it may have."""
        self.suffixes = suffixes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path, if something can be written there."""
        from streamlens.analyses.result import checked_target

        try:
            return checked_target(value, self.suffixes)
        except UsageError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Let the shell complete the name of a file."""
        return [CompletionItem(incomplete, type="file")]


def _bundled(name: str, bundle: type[Any], *parameters: _Decorator) -> Callable[[Command], Command]:
    """A decorator that adds click parameters to a command and passes their values as one `bundle` called `name`."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def with_bundle(**values: Any) -> Any:
            own = {field.name: values.pop(field.name) for field in fields(bundle)}
            return command(**{name: bundle(**own)}, **values)

        decorated: Any = with_bundle
        for parameter in reversed(parameters):
            decorated = parameter(decorated)
        return decorated  # type: ignore[no-any-return]

    return decorate


def model_options(command: Command) -> Command:
    """Add SOURCE and the options that say how a model is loaded; the command gets `model: ModelOptions`."""
    return _bundled(
        "model",
        ModelOptions,
        click.argument("source", required=False, type=click.Path()),
        shared(SOURCE, "--config", type=_file, help="JSON config of a model whose file holds weights alone."),
        shared(
            SOURCE, "--model", "factory", metavar="MODULE:FUNCTION", help="Build the model by calling this function."
        ),
        shared(SOURCE, "--unsafe-pickle", is_flag=True, help="Unpickle a whole module: this runs code from the file."),
        shared(
            SOURCE,
            "--dtype",
            type=Dtype(["float32", "bfloat16", "float16"]),
            help="Convert the weights. [default: keep]",
        ),
        shared(
            SOURCE, "--device", default="cpu", show_default=True, help="Where the model runs: cpu, cuda, cuda:1, mps."
        ),
        shared(SOURCE, "--seed", type=int, default=0, show_default=True, help="Seeds whatever is drawn at random."),
    )(command)


def corpus_options(command: Command) -> Command:
    """Add the options that say what the model is shown; the command gets `corpus: CorpusOptions`."""
    text_path = click.Path(exists=True, allow_dash=True, path_type=Path)
    return _bundled(
        "corpus",
        CorpusOptions,
        shared(
            TEXT,
            "--text",
            type=text_path,
            multiple=True,
            help="Text file (one document), folder of *.txt, or - for standard input; may be repeated. "
            "[default: English text that comes with Python]",
        ),
        shared(TEXT, "--jsonl", type=_file, help="JSON lines, one document each."),
        shared(TEXT, "--text-key", default="text", show_default=True, help="The key of the text in --jsonl."),
        shared(TEXT, "--tokens", type=_file, help="Token ids: .npy (integers) or .bin (uint16)."),
        shared(
            TEXT,
            "--window",
            type=click.IntRange(min=2),
            help="Tokens in a window. [default: 256, or the model's limit]",
        ),
        shared(TEXT, "--ragged", is_flag=True, help="Keep every document whole instead of cutting equal windows."),
        shared(TEXT, "--max-tokens", type=click.IntRange(min=1), help="Take the first windows up to so many tokens."),
        shared(
            TEXT,
            "--batch-tokens",
            type=click.IntRange(min=1),
            help="Tokens run at once. [default: 2048 for a capture, 1024 for an analysis]",
        ),
    )(command)


def output_options(command: Command) -> Command:
    """Add --json; the command gets `as_json: bool`."""
    return shared(RESULT, "--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")(command)
