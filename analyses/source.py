"""Where an analysis gets its blocks from: a capture file or a live model, the same code for both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypedDict, Unpack

import torch
from torch import Tensor, nn

from streamlens.anatomy import Anatomy, Stream
from streamlens.block import Block
from streamlens.calling import Inputs, token_inputs
from streamlens.checkpoint.loading import load
from streamlens.checkpoint.model import Model
from streamlens.corpus.documents import Text
from streamlens.errors import MissingDataError, UsageError
from streamlens.progress import Progress
from streamlens.reader.opening import Capture, open_capture
from streamlens.recorder.capturing import prepare
from streamlens.recorder.live import live_blocks
from streamlens.recorder.pilot import first_weight, parameters_of
from streamlens.recorder.plan import Choice, Plan

HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"

LIVE_BATCH_TOKENS = 1024
"""A live run holds all states and writes of a batch in memory, where a capture holds one at a time."""


class Source(Protocol):
    """One residual stream and the tokens behind it."""

    @property
    def anatomy(self) -> Anatomy:
        """The whole anatomy."""

    @property
    def stream(self) -> Stream:
        """The stream that is analysed."""

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """At least the parameters of the norms that the stream passes, by name."""

    @property
    def n_tokens(self) -> int:
        """Number of tokens."""

    @property
    def causal(self) -> bool:
        """Whether the target of a token is the next one (else it is the token itself)."""

    @property
    def description(self) -> str:
        """Model and text in one line, for titles and files."""

    @property
    def model(self) -> Model:
        """The model itself, loaded when it is first asked for."""

    def blocks(self) -> Iterator[Block]:
        """Yield all tokens, block by block."""

    def inputs(self, block: Block) -> Inputs:
        """Return the arguments of forward that give this block."""


class Corpus(TypedDict, total=False):
    """What a live model is shown; the same names as in `streamlens.capture`."""

    text: Text | None
    tokens: Any
    inputs: Any
    window: int | None
    max_tokens: int | None
    batch_tokens: int
    seed: int


Origin = Source | Capture | Model | nn.Module | str | Path
"""What every analysis takes: a capture or its path, a model or its path, or a source made beforehand."""


@dataclass
class CaptureSource:
    """The tokens of a capture file."""

    capture: Capture
    name: str | None = None
    given: Model | None = None
    """The model, where the caller has it at hand; otherwise the capture names it."""

    @property
    def anatomy(self) -> Anatomy:
        """The anatomy that the file records."""
        return self.capture.anatomy

    @cached_property
    def stream(self) -> Stream:
        """The stream that is analysed."""
        return self.capture.stream(self.name).anatomy

    @cached_property
    def parameters(self) -> Mapping[str, Tensor]:
        """The constants in the file."""
        return self.capture.stream(self.name).constants

    @property
    def n_tokens(self) -> int:
        """Number of tokens."""
        return self.capture.n_tokens

    @property
    def causal(self) -> bool:
        """As the pilot run found it."""
        return bool(self.capture.attrs["causal"])

    @property
    def description(self) -> str:
        """Model and text in one line."""
        attrs = self.capture.attrs
        return f"{Path(str(attrs['model_source'])).name}, {attrs['text']}, {self.n_tokens:,} tokens"

    @cached_property
    def model(self) -> Model:
        """The model that the capture was made from.

        Raises:
            MissingDataError: it is not where it was, or it is another one now.
        """
        attrs = self.capture.attrs
        wanted, source = str(attrs["model_sha256"]), str(attrs["model_source"])
        model = self.given or self._load(source)
        if model.sha256 != wanted:
            raise MissingDataError(
                f"{self.capture.path} was made from a model with sha256 {wanted[:16]}, and {model.source} has "
                f"{model.sha256[:16]}: give the model of the capture, or capture this one anew"
            )
        return model

    def _load(self, source: str) -> Model:
        if not Path(source).exists():
            # A factory is code: the name of one in a file is never run, only suggested.
            way = f"--model {source}" if ":" in source else "--model-file"
            raise MissingDataError(
                f"{self.capture.path} was made from {source}, which is not a file here: run this where it is, or give "
                f"the model itself ({way}; in Python model=)"
            )
        return load(source, dtype=str(self.capture.attrs["dtype"]))

    def blocks(self) -> Iterator[Block]:
        """Yield all tokens, block by block."""
        return self.capture.stream(self.name).blocks()

    def inputs(self, block: Block) -> Inputs:
        """Return the arguments of forward that give this block.

        Raises:
            MissingDataError: the capture was not made from token ids, or not from whole windows.
        """
        if bool((block.ids < 0).any()):
            raise MissingDataError(
                f"{self.capture.path} was made from inputs that are not token ids, which it does not keep: run this "
                f"on the live model with the same inputs"
            )
        return _token_inputs(self, block)


@dataclass
class LiveSource:
    """The tokens that a live model is shown; nothing is stored."""

    model: Model
    plan: Plan
    name: str | None = None
    _own: dict[int, Inputs] = field(default_factory=dict, repr=False)

    @property
    def anatomy(self) -> Anatomy:
        """The anatomy as discovered."""
        return self.plan.pilot.anatomy

    @cached_property
    def stream(self) -> Stream:
        """The stream that is analysed."""
        return self.anatomy.stream(self.name)

    @cached_property
    def parameters(self) -> Mapping[str, Tensor]:
        """All of the model's."""
        return parameters_of(self.model.module)

    @property
    def n_tokens(self) -> int:
        """Number of tokens."""
        return self.plan.n_tokens

    @property
    def causal(self) -> bool:
        """As the pilot run found it."""
        return self.plan.pilot.causal

    @property
    def description(self) -> str:
        """Model and text in one line."""
        return f"{Path(self.model.source).name}, {self.plan.feed.description}, {self.n_tokens:,} tokens"

    def blocks(self) -> Iterator[Block]:
        """Run the model batch by batch."""
        return live_blocks(self.model.module, self.plan, self.stream)

    def inputs(self, block: Block) -> Inputs:
        """Return the arguments of forward that give this block."""
        return next(b.load.inputs() for b in self.plan.blocks if b.start == block.start)


def source_of(
    origin: Origin,
    *,
    stream: str | None = None,
    model: Model | None = None,
    heads: bool = False,
    **corpus: Unpack[Corpus],
) -> Source:
    """Return the source that an analysis runs on.

    Args:
        origin: a capture (or the path of one), a model, module or model file, or a source, which is returned as it is.
        stream: which stream; by default the one that the head reads.
        model: for a capture: its model, where it is loaded already.
        heads: for a live model: also look at the value mixes.
        **corpus: for a live model: what it is shown, as in `streamlens.capture`.

    Raises:
        UsageError: a corpus for a capture, which has its own.
    """
    if isinstance(origin, (CaptureSource, LiveSource)):
        return origin
    if isinstance(origin, (str, Path)) and is_capture(Path(origin)):
        origin = open_capture(origin)
    if isinstance(origin, Capture):
        named = [key for key, value in corpus.items() if value is not None]
        if named:
            raise UsageError(f"{origin.path} has its own tokens; {', '.join(named)} can only be given with a model")
        origin.stream(stream)
        return CaptureSource(origin, stream, model)
    loaded = origin if isinstance(origin, Model) else load(origin)  # type: ignore[arg-type]
    corpus.setdefault("batch_tokens", LIVE_BATCH_TOKENS)
    wanted = () if stream is None else (stream,)
    return LiveSource(loaded, prepare(loaded, Choice(output=False, heads=heads, streams=wanted), **corpus), stream)


def is_capture(path: Path) -> bool:
    """Tell by its first bytes whether a path is an HDF5 file."""
    if not path.is_file():
        return False
    with path.open("rb") as raw:
        return raw.read(len(HDF5_MAGIC)) == HDF5_MAGIC


def watched(source: Source, what: str, *, progress: bool) -> Iterator[Block]:
    """Yield the blocks of a source behind a progress bar."""
    with Progress(source.n_tokens, what, enabled=progress) as bar:
        for block in source.blocks():
            yield block
            bar.update(block.stop - block.start)


def _token_inputs(source: Source, block: Block) -> Inputs:
    module = source.model.module
    ids = block.ids.reshape(block.shape)
    laid_out = ids.T if source.anatomy.stream().position_first else ids
    return token_inputs(module, laid_out.contiguous().to(first_weight(parameters_of(module)).device))


def target_ids(source: Source, block: Block) -> Tensor:
    """Return the token that each position should predict, (token,) int64, -1 where there is none."""
    if not source.causal:
        return block.ids
    targets = torch.full_like(block.ids, -1)
    # The next window of the same document goes on with its text, but this one's last logits were not asked for it.
    follows = (block.doc[1:] == block.doc[:-1]) & (block.position[1:] == block.position[:-1] + 1)
    targets[:-1] = torch.where(follows, block.ids[1:], -1)
    return targets
