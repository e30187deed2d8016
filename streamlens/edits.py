"""Edit a forward pass: put another tensor in place of a write or a state, or start the pass at a given state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from streamlens.anatomy import Anatomy, Point, Stream
from streamlens.calling import check_inputs, invoke, without_cache
from streamlens.errors import UsageError
from streamlens.interception import Interception, Reaction
from streamlens.observation import StopForward, tokens
from streamlens.passing import passing_over

Change = Callable[[Tensor], Tensor]
"""From the tensor at a point, (doc, position, d_model) in the model's own layout, to what takes its place."""


def edit(
    module: nn.Module,
    anatomy: Anatomy,
    *,
    writes: Mapping[int, Change] | None = None,
    states: Mapping[int, Change] | None = None,
    stream: str | None = None,
) -> Interception:
    """Return a context in which writes and states of a stream are changed. Edits compose by nesting.

    A changed state is what all later sublayers read and what is carried on; a changed write is what is added. Every
    forward pass in the context must come to each of them: one that takes another way through the model than the
    inputs of `discover` is refused at its end.

    Args:
        module: the model.
        anatomy: its anatomy.
        writes: what to do with the write of a sublayer, by index.
        states: what to do with state x_k, by k.
        stream: name of the stream; by default the one that the head reads.

    Raises:
        UsageError: an index out of range, or x_0 where it is the model's own input.
        AnatomyError: in a pass: something to change was not met.

    Example:
        >>> import torch
        >>> from streamlens.discovery.streams import discover
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        >>> model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        >>> x = torch.randn(2, 5, 8)
        >>> nothing = {s: torch.zeros_like for s in range(4)}
        >>> with torch.no_grad(), edit(model, discover(model, x), writes=nothing):
        ...     torch.equal(model(x), x)
        True
    """
    found = anatomy.stream(stream)
    reactions: dict[Point, Reaction] = {}
    for index, change in (writes or {}).items():
        _check(index, len(found.sublayers), "sublayer", found)
        sublayer = found.sublayers[index]
        reactions[sublayer.write] = _signed(change, sublayer.sign)
    for index, change in (states or {}).items():
        _check(index, len(found.states), "state", found)
        made = found.states[index].made
        if made is None:
            raise UsageError(f"state {index} of stream {found.name!r} is the model's own input: change it there")
        reactions[made] = change
    return Interception(module, anatomy, reactions)


def run_from(
    module: nn.Module,
    anatomy: Anatomy,
    index: int,
    state: Float[Tensor, "doc position d_model"],
    inputs: Any,
    *,
    stream: str | None = None,
) -> Tensor:
    """Run the model from state x_index onwards; what came before it is passed over and costs nothing.

    From the last state this is the head, exactly as the model applies it.

    Args:
        module: the model.
        anatomy: its anatomy.
        index: which state is given, 0 ... K.
        state: (doc, position, d_model).
        inputs: the arguments of forward, which still say what masks and positions to use.
        stream: name of the stream; by default the one that the head reads.

    Returns:
        The model's main output: (doc, position, vocab) logits where it has them, in the model's own layout.

    Raises:
        UsageError: an index out of range.
        AnatomyError: with these inputs the model does not come to the state.
    """
    found = anatomy.stream(stream)
    _check(index, len(found.states), "state", found)
    prepared = without_cache(module, check_inputs(inputs))
    # In memory as the model itself lays it out: a product over a strided tensor can round differently.
    own = state.transpose(0, 1).contiguous() if found.position_first else state
    target = found.states[index]
    if target.made is None:
        given = {**prepared, str(target.argument): own} if isinstance(prepared, Mapping) else own
        return invoke(module, given)
    # Copies, because a model that adds in place would write into the caller's tensor. The state is put both where it
    # is made and in place of what the bypassed modules return, since it may be made inside one of them.
    change = {index: lambda old: own.reshape(old.shape).clone()}
    with passing_over(module, found, index, own.clone()), edit(module, anatomy, states=change, stream=found.name):
        return invoke(module, prepared)


def run_between(
    module: nn.Module,
    anatomy: Anatomy,
    start: int,
    state: Float[Tensor, "doc position d_model"],
    stop: int,
    inputs: Any,
    *,
    stream: str | None = None,
) -> Float[Tensor, "doc position d_model"]:
    """Run the model from state x_start to state x_stop; what comes before and after costs nothing.

    Two of these put layers in another order, or leave some out: ``x_stop`` need not be given back to the same place.

    Args:
        module: the model.
        anatomy: its anatomy.
        start: which state is given, 0 ... stop.
        state: (doc, position, d_model).
        stop: which state is wanted, start ... K.
        inputs: the arguments of forward, which still say what masks and positions to use.
        stream: name of the stream; by default the one that the head reads.

    Returns:
        (doc, position, d_model) x_stop, in the dtype of the stream.

    Raises:
        UsageError: an index out of range, or `stop` before `start`.
        AnatomyError: with these inputs the model does not come to the states.

    Example:
        >>> import torch
        >>> from streamlens.discovery.streams import discover
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        >>> model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        >>> x = torch.randn(2, 5, 8)
        >>> anatomy = discover(model, x)
        >>> with torch.no_grad():
        ...     middle = run_between(model, anatomy, 0, x, 2, x)
        ...     torch.allclose(run_between(model, anatomy, 2, middle, 4, x), model(x), atol=1e-6)
        True
    """
    found = anatomy.stream(stream)
    _check(start, len(found.states), "state", found)
    _check(stop, len(found.states), "state", found)
    if stop < start:
        raise UsageError(f"a run from state {start} does not come to state {stop}: give a later one")
    made = found.states[stop].made
    if made is None or start == stop:
        return state
    reached: list[Tensor] = []

    def end(tensor: Tensor) -> None:
        reached.append(tensor)
        raise StopForward

    with suppress(StopForward), Interception(module, anatomy, {made: end}):
        run_from(module, anatomy, start, state, inputs, stream=found.name)
    docs, positions = state.shape[:2]
    return tokens(reached[0], found, docs, positions)


def _signed(change: Change, sign: float) -> Change:
    return change if sign == 1.0 else lambda tensor: change(tensor * sign) / sign


def _check(index: int, count: int, what: str, stream: Stream) -> None:
    if not 0 <= index < count:
        raise UsageError(f"stream {stream.name!r} has {what}s 0 to {count - 1}, not {index}")
