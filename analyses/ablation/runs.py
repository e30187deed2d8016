"""One block run again with something left out, from the stored state before it.

A run is cut at the steps that are dropped: between two of them the model itself runs, from one state to another, and a
dropped step is arithmetic on a state. So nothing that is dropped, and nothing before it, is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from streamlens.analyses.ablation.spans import Drop, Mode, layer_span, touched
from streamlens.analyses.source import Source
from streamlens.anatomy import Anatomy, Stream
from streamlens.block import Block
from streamlens.calling import Inputs, eager_math
from streamlens.edits import Change, edit, run_between, run_from
from streamlens.errors import UsageError
from streamlens.observation import tokens
from streamlens.recorder.pilot import first_weight, parameters_of
from streamlens.replay import advance


class Trial(Protocol):
    """One way of running a block differently."""

    @property
    def label(self) -> str:
        """What it is called."""

    def run(self, runs: Runs) -> Tensor:
        """Return the model's output."""


@dataclass(frozen=True)
class Dropped:
    """The model without some sublayers."""

    drop: Drop

    @property
    def label(self) -> str:
        """What is dropped."""
        return self.drop.label

    def run(self, runs: Runs) -> Tensor:
        """Return the model's output."""
        return runs.without(self.drop)


@dataclass(frozen=True)
class Ordered:
    """The layers in another order; one may be left out or come twice."""

    label: str
    order: tuple[int, ...]

    def run(self, runs: Runs) -> Tensor:
        """Return the model's output."""
        return runs.ordered(self.order)


@dataclass(frozen=True)
class Setting:
    """What is the same for all blocks of a source."""

    module: nn.Module
    anatomy: Anatomy
    stream: Stream
    parameters: Mapping[str, Tensor]
    device: torch.device
    causal: bool
    protect_first: bool = False
    means: Tensor | None = None
    """(sublayer, 1 or position, d_model): what takes the place of a write in mode mean."""
    seed: int = 0
    """Of the pairing of windows in mode resample."""
    needs_spare: bool = False
    """Whether mode resample may be used."""

    @classmethod
    def of(
        cls,
        source: Source,
        *,
        protect_first: bool = False,
        means: Tensor | None = None,
        seed: int = 0,
        needs_spare: bool = False,
    ) -> Setting:
        """Take from a source what runs need; this loads the model.

        Raises:
            MissingDataError: the model of a capture is not there, or is another one now.
        """
        module = source.model.module
        parameters = parameters_of(module)
        return cls(
            module,
            source.anatomy,
            source.stream,
            parameters,
            first_weight(parameters).device,
            source.causal,
            protect_first,
            means,
            seed,
            needs_spare,
        )


class Spare:
    """The last window of the block before, for a block that has no other window to take writes from."""

    def __init__(self) -> None:
        """Start with none."""
        self.writes: list[Tensor] | None = None

    def keep(self, block: Block) -> None:
        """Keep one window of this block."""
        docs, positions = block.shape
        self.writes = [w[(docs - 1) * positions :].clone() for w in block.writes]


@dataclass
class Runs:
    """One block, ready to be run again."""

    setting: Setting
    block: Block
    inputs: Inputs
    spare: Spare = field(default_factory=Spare)

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Documents and positions of the block."""
        return self.block.shape

    @property
    def last(self) -> int:
        """Index of the last state."""
        return len(self.setting.stream.steps)

    def state(self, index: int) -> Tensor:
        """Return the unchanged x_index, (doc, position, d_model)."""
        return self._laid_out(self.block.states[index])

    def between(self, start: int, state: Tensor, stop: int, changes: Mapping[int, Change] | None = None) -> Tensor:
        """Run from x_start to x_stop; `changes` are edits of writes on the way."""
        if start == stop:
            return state
        s = self.setting
        with self._changing(changes):
            return run_between(s.module, s.anatomy, start, state, stop, self.inputs, stream=s.stream.name)

    def finish(self, start: int, state: Tensor, changes: Mapping[int, Change] | None = None) -> Tensor:
        """Run from x_start to the output, (doc, position, width) or what the model returns for each document."""
        s = self.setting
        with self._changing(changes):
            output = run_from(s.module, s.anatomy, start, state, self.inputs, stream=s.stream.name)
        if output.ndim < 2 or output.shape[-1] == 0:
            return output
        docs, positions = self.shape
        if output.numel() % (docs * output.shape[-1]) == 0 and output.ndim == 3:
            positions = output.numel() // (docs * output.shape[-1])
            return tokens(output, s.anatomy.stream(), docs, positions)
        if output.shape[0] == docs * positions:
            return tokens(output, s.anatomy.stream(), docs, positions)
        return output

    def baseline(self) -> Tensor:
        """Return the output of the model as it is: the head applied to the stored last state."""
        return self.finish(self.last, self.state(self.last))

    def without(self, drop: Drop, start: int | None = None, state: Tensor | None = None) -> Tensor:
        """Return the output with some sublayers left out.

        Args:
            drop: what is left out.
            start: run from this state on, given in `state`; by default from the stored one before the first dropped.
            state: (doc, position, d_model).
        """
        return self.finish(*self.after(drop, start, state))

    def after(
        self, drop: Drop, start: int | None = None, state: Tensor | None = None
    ) -> tuple[int, Tensor, Mapping[int, Change]]:
        """Run until the last step that is dropped whole is passed, and say what is left to do.

        Returns:
            The index of the state that was reached, the state, and edits of writes that are still to come.
        """
        steps = touched(self.setting.stream, drop)
        at, clean = (min(steps, default=self.last), True) if start is None else (start, False)
        x = self.state(at) if state is None else state
        changes: dict[int, Change] = {}
        for step, gone in steps.items():
            if step < at:
                continue
            whole = len(gone) == len(self.setting.stream.steps[step].sublayers)
            if not whole and not (clean and step == at):
                # One of two parallel writes, after something else has changed: edited while the model runs.
                changes |= {s: self._change(drop.mode, s) for s in gone}
                continue
            x = self.between(at, x, step, changes)
            x = self._replaced(drop.mode, step, x, gone, clean=clean and step == at)
            at, clean = step + 1, False
        return at, x, changes

    def ordered(self, order: Sequence[int]) -> Tensor:
        """Return the output with the layers in this order; the first ones, if they are in place, are not run again."""
        stream = self.setting.stream
        placed = 0
        while placed < len(order) and order[placed] == placed:
            placed += 1
        at = layer_span(stream, placed - 1)[1] if placed else 0
        x = self.state(at)
        rest = list(order[placed:])
        while rest:
            run = 1
            while run < len(rest) and rest[run] == rest[run - 1] + 1:
                run += 1
            x = self.between(layer_span(stream, rest[0])[0], x, layer_span(stream, rest[run - 1])[1])
            rest = rest[run:]
        return self.finish(self.last, x)

    def instead(self, mode: Mode, index: int) -> Tensor:
        """Return what takes the place of a write, (doc, position, d_model).

        Raises:
            UsageError: mode resample without a second window of the same length.
        """
        own = self._laid_out(self.block.writes[index])
        if mode == "mean":
            assert self.setting.means is not None, "mode mean without means"
            return self.setting.means[index].to(own)[None, : own.shape[1]].expand_as(own)
        if mode != "resample":
            return torch.zeros_like(own)
        if len(own) > 1:
            return own[self._partners]
        spare = self.spare.writes
        if spare is None or spare[index].shape != own[0].shape:
            raise UsageError(
                f"mode resample takes the writes of another window of the same length, and tokens {self.block.start} "
                f"to {self.block.stop} are one window of {self.shape[1]} tokens without another before it: cut the "
                f"text into windows of equal length, two or more to a batch (--window and --batch-tokens, not "
                f"--ragged; for a capture, when it is made), or use mode mean"
            )
        return spare[index][None].to(own)

    @cached_property
    def _partners(self) -> Tensor:
        """(window,) whose writes each window gets: each one's once, of another document wherever that is possible."""
        docs = self.block.doc.reshape(self.shape)[:, 0]
        generator = torch.Generator().manual_seed(hash((self.setting.seed, self.block.start)) % 2**63)
        order = torch.randperm(len(docs), generator=generator)
        _, place, size = torch.unique(docs, return_inverse=True, return_counts=True)
        # In random order but document by document, a step as long as the largest document leads out of each of them.
        order = order[torch.argsort(torch.randperm(len(size), generator=generator)[place[order]], stable=True)]
        largest = int(size.max())
        partners = torch.empty_like(order)
        partners[order] = order.roll(largest if largest < len(docs) else 1)
        return partners.to(self.setting.device)

    def _replaced(self, mode: Mode, step: int, x: Tensor, gone: Sequence[int], *, clean: bool) -> Tensor:
        """Return the state after a step of which some writes are dropped."""
        stream = self.setting.stream
        sublayers = stream.steps[step].sublayers
        if mode == "skip" and len(gone) == len(sublayers):
            y = x
        else:
            kept: Mode = "zero" if mode == "skip" else mode
            writes = {
                s: self.instead(kept, s) if s in gone else self._laid_out(self.block.writes[s]) for s in sublayers
            }
            y = advance(stream, step, x, writes, self.setting.parameters).reshape(x.shape)
        if not self.setting.protect_first:
            return y
        # In a causal stream nothing that comes later can change position 0, so the stored state still holds there.
        whole = self.state(step + 1) if clean or self.setting.causal else self.between(step, x, step + 1)
        return torch.cat([whole[:, :1], y[:, 1:]], dim=1)

    def _change(self, mode: Mode, index: int) -> Change:
        def change(old: Tensor) -> Tensor:
            docs, positions = self.shape
            new = self.instead("zero" if mode == "skip" else mode, index)
            if self.setting.protect_first:
                own = tokens(old, self.setting.stream, docs, positions)
                new = torch.cat([own[:, :1], new[:, 1:]], dim=1)
            own = new.transpose(0, 1) if self.setting.stream.position_first else new
            return own.contiguous().reshape(old.shape)

        return change

    @contextmanager
    def _changing(self, changes: Mapping[int, Change] | None) -> Iterator[None]:
        if not changes:
            yield
            return
        s = self.setting
        with edit(s.module, s.anatomy, writes=changes, stream=s.stream.name):
            yield

    def _laid_out(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.setting.device).reshape(*self.shape, -1)


@contextmanager
def running() -> Iterator[None]:
    """What every run happens in: no gradients, no fused shortcuts."""
    with torch.no_grad(), eager_math():
        yield
