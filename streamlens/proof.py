"""The proof that a stream adds up: each state is computed again from the one before it and the writes between them.

The replay uses the model's own order of additions, association, dtype and norms, so equality is asked for bit for
bit. Where a model's arithmetic makes that impossible (a fused addition, say), the relative L2 error of the state
decides, against `bound`; never a cosine, which cannot see a wrong factor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from streamlens.anatomy import Norm, Stream
from streamlens.errors import ProofError
from streamlens.replay import last, run, widest

_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def bound(dtype: torch.dtype) -> float:
    """Return the relative L2 error up to which a state that is not bit-equal still passes: two roundings.

    >>> bound(torch.float32)
    2.384185791015625e-07
    """
    return 2.0 * torch.finfo(dtype).eps


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Tell whether two tensors hold the same bits (a NaN equals itself, 0.0 does not equal -0.0)."""
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(*_bits(first, second))


def _bits(*tensors: Tensor) -> list[Tensor]:
    """View tensors of one shape and dtype as integers, flat.

    The widest integers that fit are taken: 64 bits are compared more than three times as fast as four times 16.
    """
    flat = [tensor.contiguous().view(-1) for tensor in tensors]
    itemsize = flat[0].dtype.itemsize
    # A slice of a larger buffer may begin, and an odd number of values end, where a wide integer cannot.
    edges = [edge * itemsize for t in flat for edge in (t.storage_offset(), t.numel())]
    return [t.view(next(kind for size, kind in _BITS.items() if not any(e % size for e in edges))) for t in flat]


@dataclass
class Verdict:
    """The outcome of the proof over some tokens.

    On an accelerator each comparison is only queued, and `resolve` waits for all of them at once: waiting for every
    single one would stop the device once for each sublayer.
    """

    exact: bool = True
    worst: float = 0.0
    """Largest relative L2 error of a replayed state; NaN in the stream counts as infinite where bits differ."""
    stream: str = ""
    state: int = -1
    """Where the largest error was: the state that was not reproduced."""
    defer: bool | None = None
    """Whether to queue comparisons; None queues those of tensors on an accelerator."""
    _queued: list[tuple[str, int, Tensor, Tensor]] = field(default_factory=list, repr=False)

    def note(self, stream: Stream, state: int, replayed: Tensor, seen: Tensor) -> None:
        """Take one more state into account."""
        # Where layers lie on several devices, a state is made on one and used on the next.
        replayed = replayed.reshape(seen.shape).to(seen.device)
        defer = seen.device.type != "cpu" if self.defer is None else self.defer
        if defer:
            different = torch.ne(*_bits(replayed, seen)).any()
            self._queued.append((stream.name, state, different, relative_error(replayed, seen)))
        elif not same_bits(replayed, seen):
            self._differs(stream.name, state, float(relative_error(replayed, seen)))

    def resolve(self) -> None:
        """Wait for the queued comparisons and take them into account."""
        for stream, state, different, error in self._queued:
            if bool(different):
                self._differs(stream, state, float(error))
        self._queued.clear()

    def _differs(self, stream: str, state: int, error: float) -> None:
        self.exact = False
        error = error if error == error else float("inf")
        if error >= self.worst:
            self.worst, self.stream, self.state = error, stream, state

    def fail(self, stream: Stream, state: int) -> None:
        """Record a state that could not be replayed at all, because something that goes into it was never seen."""
        self.exact, self.worst = False, float("inf")
        self.stream, self.state = stream.name, state

    def include(self, other: Verdict) -> None:
        """Take another outcome into account."""
        self.exact = self.exact and other.exact
        if other.worst > self.worst:
            self.worst, self.stream, self.state = other.worst, other.stream, other.state

    def demand(self, stream: Stream, dtype: torch.dtype) -> None:
        """Accept, or refuse with the place where it fails.

        Raises:
            ProofError: the error is above the bound of the dtype.
        """
        if self.worst <= bound(dtype):
            return
        raise ProofError(
            f"the writes do not add up: {place(stream, self.state)} differs from its replay by {self.worst:.3g} "
            f"(relative L2; {bound(dtype):.3g} is allowed in {str(dtype).removeprefix('torch.')}). Something "
            "between the additions changes the stream without being seen. allow_unproven=True (--allow-unproven) "
            "captures it all the same and marks the file."
        )


def place(stream: Stream, state: int) -> str:
    """Name a state by the writes before it."""
    if state == 0:
        return f"x_0 of stream {stream.name!r} (the sum of {', '.join(p.label for p in stream.parts)})"
    labels = [stream.sublayers[s].label for s in stream.steps[state - 1].sublayers]
    return f"x_{state} of stream {stream.name!r} (after {' and '.join(labels)})"


def relative_error(replayed: Float[Tensor, "*shape"], seen: Float[Tensor, "*shape"]) -> Float64[Tensor, ""]:
    """Return ||replayed - seen|| / ||seen||, a float64 scalar on the tensors' device."""
    truth = seen.double()
    error: Tensor = (replayed.double() - truth).norm()
    scale: Tensor = truth.norm().clamp_min(torch.finfo(torch.float64).tiny)
    return error / scale


OnNorm = Callable[[int, Tensor], None]
"""Called with the index of a norm on the stream and what it normalises, while that is intact."""


class Replay:
    """Follows one stream through one forward pass and predicts each state just before the model computes it.

    Predictions are made while the tensors that go into them are still intact, so that additions in place are proved
    like any other. Nothing but one predicted state is kept.
    """

    def __init__(
        self, stream: Stream, parameters: Mapping[str, Tensor], verdict: Verdict, on_norm: OnNorm | None = None
    ) -> None:
        self.stream = stream
        self._on_norm = on_norm
        self._parameters = parameters
        self._verdict = verdict
        self._parts: dict[int, Tensor] = {}
        self._writes: dict[int, Tensor] = {}
        self._state: Tensor | None = None
        self._step = 0 if stream.parts[0].point is None else -1  # -1 while the embedding parts are awaited
        self._predicted: Tensor | None = None

    def part(self, index: int, tensor: Tensor) -> None:
        """Take an embedding part."""
        self._parts[index] = tensor

    def write(self, index: int, tensor: Tensor) -> None:
        """Take a write."""
        self._writes[index] = tensor

    def state(self, index: int, tensor: Tensor) -> None:
        """Take a state as the model uses it, and compare it with what was predicted."""
        if index > 0 or self.stream.parts[0].point is not None:
            if self._predicted is None:
                self._verdict.fail(self.stream, index)
            else:
                self._verdict.note(self.stream, index, self._predicted, tensor)
        self._predicted = None
        self._state, self._step = tensor, index
        if index == len(self.stream.steps):
            self._tell_norms(None, {"@state": tensor})
            self._state = None

    def settled(self) -> None:
        """Predict the next state if all that goes into it has come; else keep copies of what has come so far."""
        if self._predicted is None and self._step < 0 and len(self._parts) == len(self.stream.parts):
            self._predict_first()
        elif self._predicted is None and self._state is not None and self._whole():
            self._predict_next(self._state)
        else:
            self._parts = {i: p.clone() for i, p in self._parts.items()}
            self._writes = {s: w.clone() for s, w in self._writes.items()}
            self._state = None if self._state is None else self._state.clone()

    def _whole(self) -> bool:
        if self._step >= len(self.stream.steps):
            return False
        return all(s in self._writes for s in self.stream.steps[self._step].sublayers)

    def _predict_next(self, state: Tensor) -> None:
        step = self.stream.steps[self._step]
        values = {"@state": state, **{f"@write:{s}": self._writes[s] for s in step.sublayers}}
        known = run(step.instructions, values, self._parameters)
        self._predicted = known[last(step.instructions, "@state")]
        self._tell_norms(self._step + 1, known)
        self._writes.clear()
        self._state = None

    def _predict_first(self) -> None:
        values = {f"@part:{i}": part for i, part in self._parts.items()}
        known = run(self.stream.embedding, values, self._parameters)
        self._predicted = known[last(self.stream.embedding, "@part:0")]
        self._tell_norms(0, known)
        self._parts.clear()

    def _tell_norms(self, state: int | None, known: Mapping[str, Tensor]) -> None:
        if self._on_norm is None:
            return
        for index, norm in enumerate(self.stream.norms):
            if norm.state == state:
                self._on_norm(index, known[norm.input])


def norm_statistics(
    norm: Norm, tensor: Float[Tensor, "*token d_model"]
) -> tuple[Float[Tensor, "*token"], Float[Tensor, "*token"]]:
    """Return the mean and the reciprocal standard deviation with which a norm treats each token.

    Args:
        norm: which norm.
        tensor: (..., d_model) what it normalises.

    Returns:
        mean and rstd, each (...) float32, or float64 for a float64 tensor; the mean of an RMS norm is 0. The variance
        is the biased one, and epsilon stands inside the root, as in the models.
    """
    wide = tensor.to(widest((tensor.dtype, torch.float32)))
    if norm.form == "rms_norm":
        rstd = torch.rsqrt(wide.square().mean(-1) + norm.epsilon)
        return torch.zeros_like(rstd), rstd
    variance, mean = torch.var_mean(wide, dim=-1, correction=0)
    return mean, torch.rsqrt(variance + norm.epsilon)
