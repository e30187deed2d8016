"""Observe a forward pass: every embedding part, state, write and value mix, as the model itself handles them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from streamlens.anatomy import Anatomy, Point, Stream, Sublayer
from streamlens.checkpoint.model import Model, module_of
from streamlens.errors import MissingDataError
from streamlens.interception import Interception, Reaction
from streamlens.rest import refuse_dropout
from streamlens.wording import counted


class StopForward(Exception):
    """Raised inside a forward pass to end it once everything wanted has been seen; caught by whoever started it."""


class Observer:
    """Receives tensors in the order in which the model comes to them. Override what is wanted.

    Each tensor is the model's own and may be overwritten as soon as the method returns: copy what is kept.
    Its layout is the model's own, too; see `tokens`.
    """

    def part(self, stream: Stream, index: int, tensor: Tensor) -> None:
        """An embedding part, about to be added."""

    def state(self, stream: Stream, index: int, tensor: Tensor) -> None:
        """State x_index, about to be carried over a branch (the last one: just made)."""

    def write(self, stream: Stream, index: int, tensor: Tensor) -> None:
        """What sublayer `index` adds, about to be added."""

    def value_mix(self, stream: Stream, index: int, tensor: Tensor) -> None:
        """The heads' outputs of sublayer `index` side by side, about to be projected: (..., heads * d_head)."""

    def settled(self) -> None:
        """All tensors of one call have been received; the call itself, which may overwrite them, comes next."""


def tokens(
    tensor: Float[Tensor, "*layout width"],
    stream: Stream,
    docs: int,
    positions: int,
    *,
    mix_of: Sublayer | None = None,
) -> Float[Tensor, "{docs} {positions} width"]:
    """Bring a tensor of the stream into the layout (doc, position, width), whatever the model's own is.

    Args:
        tensor: (doc, position, width), (position, doc, width), flattened to (token, width), or something that
            broadcasts to one of these, such as learned positions.
        stream: tells which layout the model uses.
        docs: number of documents in the batch.
        positions: number of positions.
        mix_of: the sublayer, where the tensor is its value mix, which may have a layout of its own.
    """
    position_first = stream.position_first if mix_of is None else mix_of.mix_position_first
    width = tensor.shape[-1]
    if tensor.numel() == docs * positions * width:
        if position_first:
            return rearrange(tensor.reshape(positions, docs, width), "position doc width -> doc position width")
        return tensor.reshape(docs, positions, width)
    if position_first:
        whole = tensor.broadcast_to(positions, docs, width)
        return rearrange(whole, "position doc width -> doc position width")
    return tensor.broadcast_to(docs, positions, width)


class _Observing(Interception):
    """An interception that an observer may end early, once it has everything: so it must have everything."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, StopForward):
                self.demand()
        finally:
            super().__exit__(kind, error, trace)


def observing(
    module: nn.Module,
    anatomy: Anatomy,
    observer: Observer,
    *,
    mixes: bool = False,
    streams: Collection[str] | None = None,
) -> Interception:
    """Return a context in which `observer` receives what each forward pass of `module` does.

    Args:
        module: the model.
        anatomy: its anatomy.
        observer: who receives the tensors. If it ends a pass early, it must have received everything.
        mixes: whether to look at the value mixes, too.
        streams: names of the streams to look at; by default all.

    Raises:
        AnatomyError: in a pass: something to look at was not met (see `Interception`).
    """
    reactions: dict[Point, list[Reaction]] = {}

    def look(point: Point | None, receive: Callable[[Tensor], None]) -> None:
        if point is not None:
            reactions.setdefault(point, []).append(_looking(receive))

    for stream in anatomy.streams:
        if streams is None or stream.name in streams:
            _look_at(stream, observer, look, mixes)
    joined = {point: _in_turn(several) for point, several in reactions.items()}
    return _Observing(module, anatomy, joined, observer.settled)


def _look_at(
    stream: Stream, observer: Observer, look: Callable[[Point | None, Callable[[Tensor], None]], None], mixes: bool
) -> None:
    for index, part in enumerate(stream.parts):
        look(part.point, lambda t, i=index: observer.part(stream, i, t))  # type: ignore[misc]
    for index, state in enumerate(stream.states):
        last = index == len(stream.states) - 1
        look(state.made if last else state.used, lambda t, i=index: observer.state(stream, i, t))  # type: ignore[misc]
    for sublayer in stream.sublayers:
        look(sublayer.write, lambda t, s=sublayer: observer.write(stream, s.index, _signed(t, s.sign)))  # type: ignore[misc]
        if mixes:
            look(sublayer.value_mix, lambda t, s=sublayer: observer.value_mix(stream, s.index, t))  # type: ignore[misc]


def _signed(tensor: Tensor, sign: float) -> Tensor:
    return tensor if sign == 1.0 else tensor * sign


def _looking(receive: Callable[[Tensor], None]) -> Reaction:
    def react(tensor: Tensor) -> None:
        receive(tensor)

    return react


def _in_turn(reactions: list[Reaction]) -> Reaction:
    if len(reactions) == 1:
        return reactions[0]

    def react(tensor: Tensor) -> None:
        for reaction in reactions:
            reaction(tensor)

    return react


@dataclass(repr=False)
class Observation:
    """Copies of all that was seen in the last forward pass, each in the model's own layout: see `tokens`.

    Names are those of a capture. Where there are several streams, `stream` says which; by default the one that the
    head reads.
    """

    anatomy: Anatomy
    parts: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    """By stream and index, like the others."""
    states: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    writes: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    value_mixes: dict[str, dict[int, Tensor]] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Return one line: how many writes and states were seen of each stream."""
        sizes = (
            f"{name}: {counted(len(self.writes.get(name, {})), 'write')}, {counted(len(states), 'state')}"
            for name, states in self.states.items()
        )
        return f"<observation of {'; '.join(sizes) or 'nothing yet'}>"

    def write(self, key: str | int, stream: str | None = None) -> Float[Tensor, "doc position d_model"]:
        """Return what a sublayer wrote, by label or index.

        Raises:
            MissingDataError: no such sublayer, or no pass has come to it.
        """
        found = self.anatomy.stream(stream)
        return _seen(self.writes, found, found.find(key).index)

    def read(self, key: str | int, stream: str | None = None) -> Float[Tensor, "doc position d_model"]:
        """Return the state that a sublayer read, before its norm, by label or index.

        Raises:
            MissingDataError: no such sublayer, or no pass has come to it.
        """
        found = self.anatomy.stream(stream)
        return _seen(self.states, found, found.find(key).read)

    def state(self, key: str | int, stream: str | None = None) -> Float[Tensor, "doc position d_model"]:
        """Return a state, by index or as ``resid_pre.3``, ``resid_mid.3``, ``resid_post.3``.

        Raises:
            MissingDataError: no such state, or no pass has come to it.
        """
        found = self.anatomy.stream(stream)
        return _seen(self.states, found, found.find_state(key))

    def embed(self, part: str | None = None, stream: str | None = None) -> Float[Tensor, "*layout d_model"]:
        """Return one part of the embedding as it was added; without a name, the only one.

        Raises:
            MissingDataError: no such part, or no pass has come to it.
        """
        found = self.anatomy.stream(stream)
        return _seen(self.parts, found, found.find_part(part))

    def value_mix(self, key: str | int, stream: str | None = None) -> Float[Tensor, "*layout width"]:
        """Return the heads' outputs of an attention side by side, by label or index.

        Raises:
            MissingDataError: no such sublayer, or no mix of it was seen: `observe` looks at them with ``mixes=True``.
        """
        found = self.anatomy.stream(stream)
        index, seen = found.find(key).index, self.value_mixes.get(found.name, {})
        if index not in seen:
            raise MissingDataError(f"no value mix of {found.labels[index]!r} was seen: observe attention, mixes=True")
        return seen[index]


def _seen(kept: Mapping[str, Mapping[int, Tensor]], stream: Stream, index: int) -> Tensor:
    found = kept.get(stream.name, {})
    if index not in found:
        raise MissingDataError(f"no forward pass was seen in stream {stream.name!r}: run the model in the `with` block")
    return found[index]


class Keeper(Observer):
    """Keeps copies of all that it sees in `seen`."""

    def __init__(self, anatomy: Anatomy) -> None:
        """Begin with nothing."""
        self.seen = Observation(anatomy)

    def part(self, stream: Stream, index: int, tensor: Tensor) -> None:
        """Keep a copy."""
        self.seen.parts.setdefault(stream.name, {})[index] = tensor.clone()

    def state(self, stream: Stream, index: int, tensor: Tensor) -> None:
        """Keep a copy."""
        kept = tensor.clone()
        self.seen.states.setdefault(stream.name, {})[index] = kept
        if index == 0 and stream.parts[0].point is None:
            self.seen.parts.setdefault(stream.name, {})[0] = kept

    def write(self, stream: Stream, index: int, tensor: Tensor) -> None:
        """Keep a copy."""
        self.seen.writes.setdefault(stream.name, {})[index] = tensor.clone()

    def value_mix(self, stream: Stream, index: int, tensor: Tensor) -> None:
        """Keep a copy."""
        self.seen.value_mixes.setdefault(stream.name, {})[index] = tensor.clone()


@contextmanager
def observe(model: Model | nn.Module, anatomy: Anatomy, *, mixes: bool = False) -> Iterator[Observation]:
    """Keep what a forward pass reads from and writes into its streams.

    Args:
        model: the model, loaded or as a module.
        anatomy: its anatomy.
        mixes: whether to keep the value mixes of attention, too.

    Raises:
        UsageError: `model` is no module, or one in train mode with a dropout above 0.
        AnatomyError: in a pass: something to look at was not met, as when these inputs take another way through the
            model than those it was discovered on.

    Example:
        >>> import torch
        >>> from streamlens.discovery.streams import discover
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        >>> model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        >>> x = torch.randn(2, 5, 8)
        >>> with torch.no_grad(), observe(model, discover(model, x)) as seen:
        ...     _ = model(x)
        >>> torch.equal(seen.read("0_mlp_out") + seen.write("0_mlp_out"), seen.state("resid_post.0"))
        True
    """
    keeper, module = Keeper(anatomy), module_of(model)
    refuse_dropout(module)
    with observing(module, anatomy, keeper, mixes=mixes):
        yield keeper.seen
