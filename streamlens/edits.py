"""Edit a forward pass: put another tensor in place of a write or a state, or start the pass at a given state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from streamlens.anatomy import Anatomy, Point
from streamlens.calling import check_inputs, invoke, without_cache
from streamlens.checkpoint.model import Model, module_of
from streamlens.errors import UsageError
from streamlens.interception import Interception, Reaction
from streamlens.observation import StopForward, tokens
from streamlens.passing import passing_over
from streamlens.rest import refuse_dropout

Change = Callable[[Tensor], Tensor]
"""From the tensor at a point, (doc, position, d_model) in the model's own layout, to what takes its place."""

Changes = Mapping[Any, Change]
"""What to do with each of several, by label or index (a Mapping of one kind of key is none of either kind: so Any)."""


def edit(
    model: Model | nn.Module,
    anatomy: Anatomy,
    *,
    writes: Changes | None = None,
    states: Changes | None = None,
    stream: str | None = None,
) -> Interception:
    """Return a context in which writes and states of a stream are changed. Edits compose by nesting.

    A changed state is what all later sublayers read and what is carried on; a changed write is what is added. Every
    forward pass in the context must come to each of them: one that takes another way through the model than the
    inputs of `discover` is refused at its end.

    Args:
        model: the model, loaded or as a module.
        anatomy: its anatomy.
        writes: what to do with the write of a sublayer, by its label or index: ``{"3_mlp_out": torch.zeros_like}``.
        states: what to do with a state, by index or as ``resid_mid.3``.
        stream: name of the stream, where there are several; by default the one that the head reads. Labels and
            indices are those of this stream: to change two streams, nest two edits.

    Raises:
        MissingDataError: no such sublayer, state or stream; the message lists near names.
        UsageError: one named twice, x_0 where it is the model's own input, a change that is no function, or `model` is
            no module, or one in train mode with a dropout above 0; in a pass: a change returned another shape.
        AnatomyError: in a pass: something to change was not met.

    Example:
        >>> import torch
        >>> from streamlens.discovery.streams import discover
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        >>> model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        >>> x = torch.randn(2, 5, 8)
        >>> anatomy = discover(model, x)
        >>> nothing = {label: torch.zeros_like for label in anatomy.stream().labels}
        >>> with torch.no_grad(), edit(model, anatomy, writes=nothing):
        ...     torch.equal(model(x), x)
        True
    """
    found = anatomy.stream(stream)
    reactions: dict[Point, Reaction] = {}
    for index, change in _by_index(writes, lambda key: found.find(key).index):
        sublayer = found.sublayers[index]
        reactions[sublayer.write] = _signed(change, sublayer.sign)
    for index, change in _by_index(states, found.find_state):
        made = found.states[index].made
        if made is None:
            raise UsageError(f"state {index} of stream {found.name!r} is the model's own input: change it there")
        reactions[made] = change
    module = module_of(model)
    refuse_dropout(module)
    return Interception(module, anatomy, reactions)


def run_from(
    model: Model | nn.Module,
    anatomy: Anatomy,
    start: str | int,
    state: Float[Tensor, "doc position d_model"],
    inputs: Any,
    *,
    stream: str | None = None,
) -> Tensor:
    """Run the model from a state onwards; what came before it is passed over and costs nothing.

    From the last state this is the head, exactly as the model applies it.

    Args:
        model: the model, loaded or as a module.
        anatomy: its anatomy.
        start: which state is given: 0 ... K, or as ``resid_mid.3``.
        state: (doc, position, d_model).
        inputs: the arguments of forward, which still say what masks and positions to use.
        stream: name of the stream; by default the one that the head reads.

    Returns:
        The model's main output: (doc, position, vocab) logits where it has them, in the model's own layout.

    Raises:
        MissingDataError: no such state or stream; the message lists near names.
        UsageError: `model` is no module, or one in train mode with a dropout above 0.
        AnatomyError: with these inputs the model does not come to the state.
    """
    module, found = module_of(model), anatomy.stream(stream)
    refuse_dropout(module)
    index = found.find_state(start)
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
    model: Model | nn.Module,
    anatomy: Anatomy,
    start: str | int,
    state: Float[Tensor, "doc position d_model"],
    stop: str | int,
    inputs: Any,
    *,
    stream: str | None = None,
) -> Float[Tensor, "doc position d_model"]:
    """Run the model from state x_start to state x_stop; what comes before and after costs nothing.

    Two of these put layers in another order, or leave some out: ``x_stop`` need not be given back to the same place.

    Args:
        model: the model, loaded or as a module.
        anatomy: its anatomy.
        start: which state is given: 0 ... stop, or as ``resid_mid.3``.
        state: (doc, position, d_model).
        stop: which state is wanted: start ... K, or as ``resid_mid.3``.
        inputs: the arguments of forward, which still say what masks and positions to use.
        stream: name of the stream; by default the one that the head reads.

    Returns:
        (doc, position, d_model) x_stop, in the dtype of the stream.

    Raises:
        MissingDataError: no such state or stream; the message lists near names.
        UsageError: `stop` comes before `start`, or `model` is no module, or one in train mode with a dropout above 0.
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
    module, found = module_of(model), anatomy.stream(stream)
    first, last = found.find_state(start), found.find_state(stop)
    if last < first:
        raise UsageError(f"a run from state {start} does not come to state {stop}: give a later one")
    made = found.states[last].made
    if made is None or first == last:
        return state
    reached: list[Tensor] = []

    def end(tensor: Tensor) -> None:
        reached.append(tensor)
        raise StopForward

    with suppress(StopForward), Interception(module, anatomy, {made: end}):
        run_from(module, anatomy, first, state, inputs, stream=found.name)
    docs, positions = state.shape[:2]
    return tokens(reached[0], found, docs, positions)


def _signed(change: Change, sign: float) -> Change:
    return change if sign == 1.0 else lambda tensor: change(tensor * sign) / sign


def _by_index(changes: Changes | None, find: Callable[[str | int], int]) -> Iterator[tuple[int, Change]]:
    """Yield what to do with each, by index; two names of one would leave open which change it gets."""
    named: dict[int, str | int] = {}
    for key, change in (changes or {}).items():
        index = find(key)
        if index in named:
            raise UsageError(f"{named[index]!r} and {key!r} are the same one: give it one change, or nest two edits")
        if not callable(change):
            raise UsageError(
                f"{key!r} is changed by a function of its tensor, such as torch.zeros_like, not by {change!r}"
            )
        named[index] = key
        yield index, _whole(key, change)


def _whole(key: str | int, change: Change) -> Change:
    """A change whose outcome has the shape of what it replaces: a smaller one would be broadcast in silence."""

    def changed(tensor: Tensor) -> Tensor:
        found: object = change(tensor)
        if not isinstance(found, Tensor) or found.shape != tensor.shape:
            what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UsageError(
                f"the change of {key!r} was given {tuple(tensor.shape)} and returned {what}: keep the shape"
            )
        return found

    return changed
