"""The pilot run: understand and test a model on a handful of tokens before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from streamlens.anatomy import Anatomy, Stream
from streamlens.calling import Inputs, eager_math, invoke, without_cache
from streamlens.discovery.layout import changed_at, main_input
from streamlens.discovery.streams import discover
from streamlens.edits import run_from
from streamlens.errors import ProofError
from streamlens.observation import Keeper, Observation, observing, tokens
from streamlens.proof import Replay, Verdict, same_bits
from streamlens.replay import widest
from streamlens.rest import at_rest


@dataclass(frozen=True)
class Pilot:
    """What is known about a model before its capture begins."""

    anatomy: Anatomy
    dtypes: Mapping[str, torch.dtype]
    """Storage dtype of each kind of tensor, by ``stream/what``: it holds every one of that kind without loss."""
    own_dtypes: Mapping[str, Mapping[str, tuple[torch.dtype, ...]]]
    """The model's own dtype of each embedding part, write and state, by stream and kind: replay needs to know."""
    mix_widths: Mapping[str, Mapping[int, int]]
    """Width of each value mix, by stream and sublayer."""
    positions: Mapping[str, int]
    """Tokens per document of each stream, on the pilot's own inputs."""
    causal: bool
    """Whether outputs are blind to later positions, so that the target of a token is the next one."""
    head_exact: bool
    """Whether the head applied to the last state gives the model's output bit for bit."""
    verdict: Verdict


class _Trial(Keeper):
    """Keeps what it sees and runs the proof."""

    def __init__(self, anatomy: Anatomy, parameters: Mapping[str, Tensor]) -> None:
        super().__init__(anatomy)
        self.verdict = Verdict()
        self.replays = {s.name: Replay(s, parameters, self.verdict) for s in anatomy.streams}

    def part(self, stream: Stream, index: int, tensor: Tensor) -> None:
        super().part(stream, index, tensor)
        self.replays[stream.name].part(index, tensor)

    def state(self, stream: Stream, index: int, tensor: Tensor) -> None:
        super().state(stream, index, tensor)
        self.replays[stream.name].state(index, tensor)

    def write(self, stream: Stream, index: int, tensor: Tensor) -> None:
        super().write(stream, index, tensor)
        self.replays[stream.name].write(index, tensor)

    def settled(self) -> None:
        for replay in self.replays.values():
            replay.settled()


def fly(module: nn.Module, inputs: Inputs, anatomy: Anatomy | None = None) -> Pilot:
    """Find the anatomy on a small batch, prove it, and check that looking changes nothing.

    Args:
        module: the model.
        inputs: a small batch, in the model's own layout.
        anatomy: the anatomy, if it is known already.

    Raises:
        AnatomyError: the streams could not be found.
        ProofError: observing changed the model's output.
    """
    prepared = without_cache(module, inputs)
    found = anatomy or discover(module, prepared)
    trial = _Trial(found, parameters_of(module))
    with at_rest(module), torch.no_grad(), eager_math():
        plain = invoke(module, prepared)
        with observing(module, found, trial, mixes=True):
            watched = invoke(module, prepared)
        trial.verdict.resolve()
        if not same_bits(plain, watched):
            raise ProofError(
                "the model gives other outputs while it is watched: it looks at its own hooks, or draws random "
                "numbers in eval mode. Fix its seed, or switch off what is random in it"
            )
        return _report(module, prepared, found, trial, plain)


def _report(module: nn.Module, inputs: Inputs, anatomy: Anatomy, trial: _Trial, output: Tensor) -> Pilot:
    dtypes: dict[str, torch.dtype] = {}
    own: dict[str, dict[str, tuple[torch.dtype, ...]]] = {}
    widths: dict[str, dict[int, int]] = {}
    positions: dict[str, int] = {}
    docs = main_input(inputs)[1].shape[1 if anatomy.stream().position_first else 0]
    for stream in anatomy.streams:
        name = stream.name
        first, mixes = trial.seen.states[name][0], trial.seen.value_mixes.get(name, {})
        own[name] = _own_dtypes(stream, trial.seen)
        dtypes[f"{name}/read"] = widest(own[name]["state"][s.read] for s in stream.sublayers)
        dtypes[f"{name}/final"] = own[name]["state"][-1]
        dtypes[f"{name}/write"] = widest(own[name]["write"])
        dtypes[f"{name}/embed"] = widest(own[name]["embed"])
        positions[name] = first.numel() // (docs * stream.d_model)
        widths[name] = {s: t.shape[-1] for s, t in mixes.items()}
        if mixes:
            dtypes[f"{name}/value_mix"] = widest(t.dtype for t in mixes.values())
    main = anatomy.stream()
    final = tokens(trial.seen.states[main.name][len(main.steps)], main, docs, positions[main.name])
    headed = run_from(module, anatomy, len(main.steps), final, inputs)
    causal = _is_causal(module, inputs, output, main.position_first)
    return Pilot(anatomy, dtypes, own, widths, positions, causal, same_bits(headed, output), trial.verdict)


def _own_dtypes(stream: Stream, seen: Observation) -> dict[str, tuple[torch.dtype, ...]]:
    """Models mix them: float32 states over bfloat16 writes (Mamba), or MLPs that are kept in float32 (T5)."""
    usual = seen.states[stream.name][0].dtype  # of what was never seen, in a capture that is let through unproven
    kinds = {
        "embed": (seen.parts, len(stream.parts)),
        "write": (seen.writes, len(stream.sublayers)),
        "state": (seen.states, len(stream.states)),
    }

    def listed(found: Mapping[int, Tensor], count: int) -> tuple[torch.dtype, ...]:
        return tuple(found[i].dtype if i in found else usual for i in range(count))

    return {kind: listed(found.get(stream.name, {}), count) for kind, (found, count) in kinds.items()}


def _is_causal(module: nn.Module, inputs: Inputs, output: Tensor, position_first: bool) -> bool:
    """Change the last token and see whether the outputs before it stay as they were."""
    given, axis = main_input(inputs)[1], 0 if position_first else 1
    if given.ndim not in (2, 3) or output.ndim != 3 or output.shape[axis] != given.shape[axis] or given.shape[axis] < 2:
        return False
    after = invoke(module, changed_at(inputs, axis, -1))
    length = output.shape[axis] - 1
    return torch.equal(output.narrow(axis, 0, length), after.narrow(axis, 0, length))


def first_weight(parameters: Mapping[str, Tensor]) -> Tensor:
    """Return a tensor that tells the dtype and device of a model: its first floating-point one.

    A parameter, where there is one (they come first in `parameters_of`): a buffer may well be wider than all weights.
    """
    return next((t for t in parameters.values() if t.is_floating_point()), next(iter(parameters.values())))


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """Return all parameters, then all buffers, by name, for the replay of norms."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
