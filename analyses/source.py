"""Where an analysis gets its blocks from: a capture file or a live model, the same code for both."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, TypedDict, Unpack

import torch
from torch import Tensor, nn

from streamlens.analyses.finding import find_model, made_sure
from streamlens.anatomy import Anatomy, Stream
from streamlens.block import Block
from streamlens.calling import Inputs, token_inputs
from streamlens.checkpoint.loading import load
from streamlens.checkpoint.model import Model
from streamlens.checkpoint.sniff import is_hdf5
from streamlens.corpus.documents import Text
from streamlens.errors import MissingDataError, UsageError
from streamlens.progress import Progress
from streamlens.reader.opening import Capture, open_capture
from streamlens.recorder.capturing import prepare
from streamlens.recorder.live import live_blocks
from streamlens.recorder.pilot import first_weight, parameters_of
from streamlens.recorder.plan import Choice, Plan
from streamlens.wording import model_name

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
        """Whether the stream is blind to later positions, so that the target of a token is the next one.

        In a stream that sees both sides it is the token itself.
        """

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
    ragged: bool
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
    find: Callable[[Capture], Model] = find_model
    """Loads the model of the capture when it is first asked for."""

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
        """As the pilot run found it in the output: that says nothing of a stream that the head does not read."""
        return bool(self.capture.attrs["causal"]) and self.stream.name == self.anatomy.head.stream

    @property
    def description(self) -> str:
        """Model and text in one line."""
        attrs = self.capture.attrs
        return f"{model_name(str(attrs['model_source']))}, {attrs['text']}, {self.n_tokens:,} tokens"

    @cached_property
    def model(self) -> Model:
        """The model that the capture was made from.

        Raises:
            MissingDataError: it is not where it was, or it is another one now.
        """
        return self.find(self.capture)

    def blocks(self) -> Iterator[Block]:
        """Yield all tokens, block by block."""
        return self.capture.stream(self.name).blocks()

    def inputs(self, block: Block) -> Inputs:
        """Return the arguments of forward that give this block.

        Raises:
            MissingDataError: from what the file holds, the model would not compute these states again: it was made from
                more than token ids, or positions are missing on which they depend.
        """
        attrs, path = self.capture.attrs, self.capture.path
        advice = "run this on the live model with the same inputs"
        if bool((block.ids < 0).any()):
            raise MissingDataError(
                f"{path} was made from inputs that are not token ids, which it does not keep: {advice}"
            )
        if further := json.loads(str(attrs.get("further_inputs", "[]"))):
            raise MissingDataError(
                f"{path} was made from inputs that token ids alone do not give ({', '.join(further)}): {advice}"
            )
        # The first positions of a window are enough where nothing looks ahead; an encoder beside the decoder does.
        looks_ahead = not attrs["causal"] or len(self.anatomy.streams) > 1
        if int(block.position[0]) != 0:
            lacks = "does not begin at position 0"
        elif looks_ahead and not attrs.get("whole_windows", True):
            lacks = "lacks later positions, which this model looks at"
        else:
            return _token_inputs(self, block)
        raise MissingDataError(f"{path} {lacks}, so the model cannot run on it: capture without --positions")


@dataclass
class LiveSource:
    """The tokens that a live model is shown; nothing is stored."""

    model: Model
    plan: Plan
    name: str | None = None

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
        """As the pilot run found it in the output: that says nothing of a stream that the head does not read."""
        return self.plan.pilot.causal and self.stream.name == self.anatomy.head.stream

    @property
    def description(self) -> str:
        """Model and text in one line."""
        return f"{model_name(self.model.source)}, {self.plan.feed.description}, {self.n_tokens:,} tokens"

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
    model: Model | nn.Module | Callable[[Capture], Model] | None = None,
    heads: bool = False,
    **corpus: Unpack[Corpus],
) -> Source:
    """Return the source that an analysis runs on.

    Args:
        origin: a capture (or the path of one), a model, module or model file, or a source, which is returned as it is.
        stream: which stream; by default the one that the head reads.
        model: for a capture: its model or module, where it is at hand, or what finds it.
        heads: for a live model: also look at the value mixes.
        **corpus: for a live model: what it is shown, as in `streamlens.capture`.

    Raises:
        UsageError: what the origin has already, or cannot use, is given as well.
    """
    given = [key for key, value in corpus.items() if value is not None and value is not False]
    if isinstance(origin, (str, os.PathLike)) and is_hdf5(Path(origin)):
        origin = open_capture(origin)
    if isinstance(origin, Capture):
        if given:
            raise UsageError(f"{origin.path} has its own tokens; {', '.join(given)} can only be given with a model")
        origin.stream(stream)
        if isinstance(model, Model | nn.Module):  # a module can be called, too, but finds nothing
            return CaptureSource(origin, stream, partial(made_sure, load(model)))
        if isinstance(model, (str, os.PathLike)):
            raise UsageError(f'model= is a loaded model or a module: load("{model}") makes one of a path')
        return CaptureSource(origin, stream, find_model if model is None else model)
    if isinstance(origin, (str, os.PathLike, Model, nn.Module)):
        if model is not None:
            raise UsageError("model= is the model of a capture, and this is a model already: leave it out")
        return live_source(load(origin), stream=stream, heads=heads, **corpus)
    if not all(hasattr(type(origin), method) for method in ("blocks", "inputs")):
        raise UsageError(f"{type(origin).__name__} is neither a capture, a model, a path of one, nor a Source")
    given += [name for name, value in (("stream", stream), ("model", model)) if value is not None]
    if given:
        raise UsageError(f"a source has its own model, stream and tokens: {', '.join(given)} cannot be given with it")
    return origin


def live_source(
    model: Model, *, stream: str | None = None, heads: bool = False, batch_tokens: int | None = None, **shown: Any
) -> LiveSource:
    """Return a source that runs a model.

    Args:
        model: the model.
        stream: which stream; by default the one that the head reads.
        heads: also look at the value mixes.
        batch_tokens: tokens run at once, LIVE_BATCH_TOKENS by default.
        **shown: what the model is shown, as in `streamlens.recorder.capturing.prepare`.
    """
    choice = Choice(output=False, heads=heads, streams=() if stream is None else (stream,))
    size = LIVE_BATCH_TOKENS if batch_tokens is None else batch_tokens
    return LiveSource(model, prepare(model, choice, batch_tokens=size, **shown), stream)


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
