"""The blocks of a capture without a file: run a batch, hand over what was seen, forget it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from streamlens.anatomy import Stream
from streamlens.block import Block, NormStatistics
from streamlens.calling import eager_math, invoke, without_cache
from streamlens.observation import Observer, StopForward, observing, tokens
from streamlens.proof import OnNorm, Replay, Verdict, norm_statistics
from streamlens.recorder.feed import Load
from streamlens.recorder.pilot import parameters_of
from streamlens.recorder.plan import Plan
from streamlens.rest import at_rest


class _Gatherer(Observer):
    """Keeps copies of one stream of one batch as (token, d_model), and follows its proof."""

    def __init__(self, stream: Stream, parameters: Mapping[str, Tensor], load: Load) -> None:
        self.stream = stream
        self.parts: dict[int, Tensor] = {}
        self.states: dict[int, Tensor] = {}
        self.writes: dict[int, Tensor] = {}
        self.mixes: dict[int, Tensor] = {}
        self.norms: dict[int, NormStatistics] = {}
        self.verdict = Verdict()
        self._shape = load.docs, load.positions
        self._replay = Replay(stream, parameters, self.verdict, _keeping(self.norms, stream, self._shape))

    def part(self, stream: Stream, index: int, tensor: Tensor) -> None:
        self._replay.part(index, tensor)
        self.parts[index] = self._kept(tensor)

    def state(self, stream: Stream, index: int, tensor: Tensor) -> None:
        self._replay.state(index, tensor)
        self.states[index] = self._kept(tensor)
        if index == 0 and stream.parts[0].point is None:
            self.parts[0] = self.states[0]
        if index == len(stream.steps):
            raise StopForward  # neither the head nor what another stream does later is needed

    def write(self, stream: Stream, index: int, tensor: Tensor) -> None:
        self._replay.write(index, tensor)
        self.writes[index] = self._kept(tensor)

    def value_mix(self, stream: Stream, index: int, tensor: Tensor) -> None:
        laid_out = tokens(tensor, stream, *self._shape, mix_of=stream.sublayers[index])
        self.mixes[index] = laid_out.flatten(0, 1).clone()

    def settled(self) -> None:
        self._replay.settled()

    def _kept(self, tensor: Tensor) -> Tensor:
        return tokens(tensor, self.stream, *self._shape).flatten(0, 1).clone()


def _keeping(norms: dict[int, NormStatistics], stream: Stream, shape: tuple[int, int]) -> OnNorm:
    """Return what keeps norm statistics; not a method, which would be a cycle that keeps a whole batch alive."""

    def keep(index: int, tensor: Tensor) -> None:
        mean, rstd = norm_statistics(stream.norms[index], tokens(tensor, stream, *shape))
        norms[index] = mean.flatten(), rstd.flatten()

    return keep


def live_blocks(module: nn.Module, plan: Plan, stream: Stream) -> Iterator[Block]:
    """Yield one stream of every batch of a plan, proved; nothing of a batch outlives it.

    Args:
        module: the model.
        plan: what to run, and whether value mixes are wanted.
        stream: which stream.

    Raises:
        ProofError: a batch does not add up.
    """
    parameters = parameters_of(module)
    for planned in plan.blocks:
        seen = _Gatherer(stream, parameters, planned.load)
        with at_rest(module), torch.no_grad(), eager_math():
            try:
                anatomy, names = plan.pilot.anatomy, (stream.name,)
                with observing(module, anatomy, seen, mixes=plan.choice.heads, streams=names):
                    invoke(module, without_cache(module, planned.load.inputs()))
            except StopForward:
                pass
        seen.verdict.resolve()
        seen.verdict.demand(stream, plan.pilot.dtypes[f"{stream.name}/read"])
        start, stop, feed = planned.start, planned.stop, plan.feed
        yield Block(
            start,
            stop,
            ids=torch.from_numpy(feed.ids[start:stop]),
            doc=torch.from_numpy(feed.doc[start:stop]),
            position=torch.from_numpy(feed.position[start:stop]),
            parts=[seen.parts[i] for i in range(len(stream.parts))],
            states=[seen.states[i] for i in range(len(stream.states))],
            writes=[seen.writes[i] for i in range(len(stream.sublayers))],
            norms=[seen.norms[i] for i in range(len(stream.norms))],
            mixes=seen.mixes,
        )
