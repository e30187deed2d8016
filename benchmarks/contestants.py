"""The forward pass alone, hooks written by hand, and streamlens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from benchmarks.plain_file import Piece, PlainFile, plain_pieces
from benchmarks.setting import BATCH_TOKENS, Setting
from streamlens.reader.opening import open_capture
from streamlens.recorder import capturing
from streamlens.recorder.plan import Choice


class Contestant(Protocol):
    """One way to do the job; made ready outside the timing."""

    reference: str
    """The name of the forward pass that its time is compared with."""

    def run(self, path: Path) -> None:
        """Do the whole job once: this is what is timed."""

    def pieces(self, path: Path) -> Iterator[Piece]:
        """What it stored, in any order."""


Factory = Callable[[Setting], Contestant]


class Forward:
    """The forward pass alone: no hook, no file."""

    reference = "body"

    def __init__(self, setting: Setting, *, head: bool) -> None:
        """Say whether to run the head too."""
        self._setting = setting
        self._callable = setting.module if head else setting.module.model

    def run(self, path: Path) -> None:
        """Run all batches; `path` is not used."""
        with torch.inference_mode():
            for _, ids in self._setting.batches():
                self._callable(input_ids=ids, use_cache=False)

    def pieces(self, path: Path) -> Iterator[Piece]:
        """Nothing is stored."""
        return iter(())


class Hooks:
    """What a careful person writes by hand for this one architecture, with its module names."""

    reference = "body"

    def __init__(self, setting: Setting) -> None:
        """Use the model as it is."""
        self._setting = setting

    def run(self, path: Path) -> None:
        """Hook both sublayers of every layer and both norms that read the stream, and write as the model runs."""
        with PlainFile(path, self._setting) as file:
            handles = list(self._attach(file))
            try:
                with torch.inference_mode():
                    for start, ids in self._setting.batches():
                        file.begin(start)
                        self._setting.module.model(input_ids=ids, use_cache=False)
            finally:
                for handle in handles:
                    handle.remove()

    def _attach(self, file: PlainFile) -> Iterator[RemovableHandle]:
        def keep_output(row: int, module: nn.Module, args: Any, output: Any) -> None:
            file.put("write", row, output[0] if isinstance(output, tuple) else output)

        def keep_input(row: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
            file.put("read", row, args[0])

        for index, layer in enumerate(self._setting.module.model.layers):
            yield layer.input_layernorm.register_forward_pre_hook(partial(keep_input, 2 * index))
            yield layer.self_attn.register_forward_hook(partial(keep_output, 2 * index))
            yield layer.post_attention_layernorm.register_forward_pre_hook(partial(keep_input, 2 * index + 1))
            yield layer.mlp.register_forward_hook(partial(keep_output, 2 * index + 1))

    def pieces(self, path: Path) -> Iterator[Piece]:
        """The two datasets."""
        return plain_pieces(path, self._setting)


class Streamlens:
    """The library: creation of the file, hashes, proof and the final fsync included."""

    def __init__(self, setting: Setting, *, choice: Choice, reference: str) -> None:
        """Make the plan, which tries the model on a handful of tokens."""
        self.reference = reference
        self._model = setting.model
        self._plan = capturing.prepare(setting.model, choice, windows=setting.windows, batch_tokens=BATCH_TOKENS)

    def run(self, path: Path) -> None:
        """Carry out the plan."""
        capturing.run(self._model, self._plan, path, progress=False).close()

    def pieces(self, path: Path) -> Iterator[Piece]:
        """Writes and reads block by block; in a compact capture the reads are replayed."""
        with open_capture(path) as capture:
            sublayers = capture.stream().anatomy.sublayers
            for block in capture.blocks():
                for row, sublayer in enumerate(sublayers):
                    yield Piece("write", row, block.start, block.writes[row])
                    yield Piece("read", row, block.start, block.states[sublayer.read])
