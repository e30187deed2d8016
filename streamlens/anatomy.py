r"""The anatomy of a transformer: its residual streams, what writes into them, and where each tensor is seen.

One stream, drawn along its states (a *step* is all that happens between two of them):

    embed  pos_embed                      writes of step 0            writes of step 1
       \    /                                  |                           |
        (+) -----> x_0 --+--------------------(+)--> P_0 --> x_1 --+------(+)--> P_1 --> x_2 ... --> head
                         |                     |                   |       |
                         +--> N_0 --> branch --+                   +--> ---+

A serial step has one write; a parallel layer has two writes that read the same state. P is nothing in a pre-norm
model and a norm in a post-norm one.

Axis words used in every shape of the project: ``sublayer`` (row of a stream's writes), ``state`` (x_0 ... x_K),
``layer`` (0-based block), ``doc``, ``position``, ``token`` (doc and position flattened), ``d_model``, ``vocab``,
``head``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from streamlens.errors import FormatError, MissingDataError, UsageError
from streamlens.wording import counted

Kind = Literal["attn", "cross_attn", "mixer", "mlp"]
Placement = Literal["pre", "post", "sandwich", "output", "none"]

RESULT = "result"
"""The slot of a :class:`Point` that names what the call returned."""


@dataclass(frozen=True)
class Site:
    """One call of a torch function by the model's own Python code, found again in every forward pass."""

    module: str
    """Path of the module whose ``forward`` makes the call; empty for the model itself."""
    visit: int
    """Which execution of that module in the pass, from 0 (layers may share a module)."""
    function: str
    """Name of the torch function, such as ``add`` or ``layer_norm``."""
    ordinal: int
    """Which call of that function within this execution of the module, from 0."""

    def __str__(self) -> str:
        return f"{self.function}[{self.ordinal}] in {self.module or 'the model'}"


@dataclass(frozen=True)
class Point:
    """A tensor at a :class:`Site`: one of the call's arguments, or its result."""

    site: Site
    slot: str
    """An argument's position (``"0"``), its keyword (``"other"``), or ``"result"``."""


@dataclass(frozen=True)
class Instruction:
    """One recorded operation of a step: an ATen operator, its arguments (see `streamlens.replay`) and its output."""

    operator: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: str


@dataclass(frozen=True)
class Part:
    """One term of the embedding sum, as it is added."""

    label: str
    point: Point | None
    """Where it is seen; None when the part is x_0 itself."""


@dataclass(frozen=True)
class Sublayer:
    """One write into a stream, and the branch that made it."""

    index: int
    layer: int
    kind: Kind
    label: str
    """TransformerLens' name: ``3_attn_out``, ``3_mlp_out``."""
    module: str
    """Path of the innermost module in which the whole branch runs."""
    norm: Placement
    read: int
    """Index of the state that the branch reads."""
    write: Point
    sign: float = 1.0
    """Factor between the tensor seen at `write` and what is added (-1 for a subtraction)."""
    value_mix: Point | None = None
    """The heads' outputs side by side, as they enter the attention's output projection."""
    heads: int | None = None
    norm_module: str | None = None
    """Path of the norm in front of the branch."""
    mix_position_first: bool = False
    """True when the value mix is laid out as (position, doc), whatever the stream's own layout is."""


@dataclass(frozen=True)
class Norm:
    """A norm that the stream itself passes through, not a branch's: after the embedding or an addition, or final."""

    label: str
    """``embed``, the label of the sublayer whose sum it normalises, or ``final``."""
    form: Literal["layer_norm", "rms_norm"]
    epsilon: float
    state: int | None
    """Index of the state that the norm produces; None for the final norm, which reads the last state."""
    module: str
    input: str
    """Name of the value that it normalises, within the instructions of its step (``@state`` for the final norm)."""
    weight: str | None = None
    """Parameter name of the gain, where it is applied as it is stored."""
    bias: str | None = None


@dataclass(frozen=True)
class State:
    """x_k: where the stream is seen between two steps."""

    used: Point | None
    """The argument with which the model carries it over the branch; None for the last state."""
    made: Point | None
    """The call that returned it; None when it is an argument of the model's own forward."""
    argument: str | None = None
    """Name of that argument; empty when forward is called with a lone tensor."""


@dataclass(frozen=True)
class Bypass:
    """A module execution that a run starting at a late enough state does not need."""

    module: str
    visit: int
    state: int
    """Not needed when the run starts at this state or a later one."""
    output: Any
    """What stands in for its output: ``"@state"`` or ``"@flat"`` (see the module `bypass`), None, or a tuple of
    these."""


@dataclass(frozen=True)
class Step:
    """What turns one state and the writes that read it into the next state, operation by operation."""

    sublayers: tuple[int, ...]
    instructions: tuple[Instruction, ...]
    scale: float | str | None = None
    """Factor on the skip where it is not 1: a number, or the name of a parameter."""


@dataclass(frozen=True)
class Stream:
    """One residual stream, from its embedding parts to its last state."""

    name: str
    d_model: int
    position_first: bool
    """True when the model lays tokens out as (position, doc, d_model)."""
    parts: tuple[Part, ...]
    embedding: tuple[Instruction, ...]
    sublayers: tuple[Sublayer, ...]
    steps: tuple[Step, ...]
    states: tuple[State, ...]
    norms: tuple[Norm, ...] = ()
    bypasses: tuple[Bypass, ...] = ()

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return 1 + max((s.layer for s in self.sublayers), default=-1)

    @property
    def labels(self) -> tuple[str, ...]:
        """(sublayer,) the name of each write."""
        return tuple(s.label for s in self.sublayers)

    @property
    def state_labels(self) -> tuple[str, ...]:
        """(state,) ``x_0``, then the labels of the sublayers whose writes made the state."""
        made = (" + ".join(self.sublayers[s].label for s in step.sublayers) for step in self.steps)
        return ("x_0", *made)

    @property
    def layer_states(self) -> tuple[int, ...]:
        """(layer + 1,) the state before each layer, and the last state."""
        first = [min(s.read for s in self.sublayers if s.layer == layer) for layer in range(self.layers)]
        return (*first, len(self.steps))

    def __repr__(self) -> str:
        """Return one line: name and sizes."""
        return f"<stream {self.name!r}: {self.size}>"

    @property
    def size(self) -> str:
        """The sizes in words."""
        return f"d_model {self.d_model}, {counted(self.layers, 'layer')}, {counted(len(self.sublayers), 'sublayer')}"

    def find(self, key: str | int) -> Sublayer:
        """Return a sublayer by its label, such as ``3_mlp_out``, or by its index (-1 is the last).

        Raises:
            MissingDataError: there is none; the message lists near names.
        """
        if isinstance(key, str):
            return self.sublayers[self._named("sublayer", key, {s.label: s.index for s in self.sublayers})]
        return self.sublayers[self._counted("sublayer", key, len(self.sublayers))]

    def find_state(self, key: str | int) -> int:
        """Return the index of a state, 0 to K, by that index (-1 is the last) or by TransformerLens' name.

        Args:
            key: the index, or ``resid_pre.3`` for what block 3 begins with, ``resid_post.3`` for what it ends with
                and ``resid_mid.3`` for the state after its first step, where it has another.

        Raises:
            MissingDataError: there is none; the message lists near names.
        """
        if not isinstance(key, str):
            return self._counted("state", key, len(self.steps) + 1)
        names: dict[str, int] = {}
        for sublayer in self.sublayers:
            first = names.setdefault(f"resid_pre.{sublayer.layer}", sublayer.read)
            if sublayer.read != first:
                names.setdefault(f"resid_mid.{sublayer.layer}", sublayer.read)
            names[f"resid_post.{sublayer.layer}"] = sublayer.read + 1
        return self._named("state", key, names)

    def find_part(self, label: str | None = None) -> int:
        """Return the index of an embedding part by its label; without one, of the only part.

        Raises:
            MissingDataError: there is none, or several and no label.
        """
        labels = [p.label for p in self.parts]
        chosen = labels[0] if label is None and len(labels) == 1 else label
        if chosen not in labels:
            raise MissingDataError(f"stream {self.name!r} has the embedding parts {', '.join(labels)}, not {label!r}")
        return labels.index(chosen)

    def _counted(self, what: str, index: int, count: int) -> int:
        if isinstance(index, bool) or not hasattr(index, "__index__"):
            raise UsageError(f"a {what} is named by its label or its index, not by {index!r}")
        if not -count <= index < count:
            raise MissingDataError(f"stream {self.name!r} has {what}s 0 to {count - 1}, not {index}")
        return range(count)[index]

    def _named(self, what: str, name: str, names: Mapping[str, int]) -> int:
        import difflib

        if name in names:
            return names[name]
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or list(names)[:3]
        raise MissingDataError(f"stream {self.name!r} has no {what} {name!r}; near names: {', '.join(near)}")


@dataclass(frozen=True)
class Head:
    """Everything from the last state to the logits."""

    stream: str
    modules: tuple[str, ...]
    """Paths of the modules that run in it, in order."""
    vocab: int | None
    """Width of the output when it has one logit per entry of a vocabulary; None when there is no such head."""


@dataclass(frozen=True)
class Anatomy:
    """What `streamlens.discover` found: every stream of a model and the head that reads the last one."""

    streams: tuple[Stream, ...]
    head: Head
    calls: tuple[str, ...]
    """Modules whose execution has to be followed to find each `Site` again."""

    def __repr__(self) -> str:
        """Return one line: each stream and its sizes."""
        return f"<anatomy: {'; '.join(f'{stream.name}: {stream.size}' for stream in self.streams)}>"

    def __str__(self) -> str:
        """Return the tree that `streamlens inspect` draws; a notebook shows it, too."""
        from streamlens.tree import draw

        return draw(self)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def stream(self, name: str | None = None) -> Stream:
        """Return the stream called `name`; without a name, the one that the head reads.

        Raises:
            MissingDataError: there is none of that name.
        """
        wanted = name or self.head.stream
        for stream in self.streams:
            if stream.name == wanted:
                return stream
        raise MissingDataError(f"no stream {wanted!r}; this model has {', '.join(s.name for s in self.streams)}")

    @cached_property
    def widths(self) -> Mapping[Point, int]:
        """Width of the tensor at each part, state and write: d_model of its stream."""
        found: dict[Point, int] = {}
        for stream in self.streams:
            points = [p.point for p in stream.parts] + [s.write for s in stream.sublayers]
            points += [point for state in stream.states for point in (state.used, state.made)]
            found |= {point: stream.d_model for point in points if point is not None}
        return found

    def to_json(self) -> str:
        """Serialise; `from_json` gives back an equal anatomy."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Anatomy:
        """Rebuild from `to_json`.

        Raises:
            FormatError: the text is not an anatomy.
        """
        try:
            return _build(json.loads(text))
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"the stored anatomy cannot be read ({error}); the file was damaged or edited") from error


def _build(raw: Mapping[str, Any]) -> Anatomy:
    head = raw["head"]
    return Anatomy(
        streams=tuple(_stream(s) for s in raw["streams"]),
        head=Head(head["stream"], tuple(head["modules"]), head["vocab"]),
        calls=tuple(raw["calls"]),
    )


def _stream(raw: Mapping[str, Any]) -> Stream:
    return Stream(
        name=raw["name"],
        d_model=raw["d_model"],
        position_first=raw["position_first"],
        parts=tuple(Part(p["label"], _point(p["point"])) for p in raw["parts"]),
        embedding=_instructions(raw["embedding"]),
        sublayers=tuple(
            Sublayer(**{**s, "write": _point(s["write"]), "value_mix": _point(s["value_mix"])})
            for s in raw["sublayers"]
        ),
        steps=tuple(Step(tuple(s["sublayers"]), _instructions(s["instructions"]), s["scale"]) for s in raw["steps"]),
        states=tuple(State(_point(s["used"]), _point(s["made"]), s["argument"]) for s in raw["states"]),
        norms=tuple(Norm(**n) for n in raw["norms"]),
        bypasses=tuple(Bypass(b["module"], b["visit"], b["state"], _freeze(b["output"])) for b in raw["bypasses"]),
    )


def _point(raw: Mapping[str, Any] | None) -> Point | None:
    return None if raw is None else Point(Site(**raw["site"]), raw["slot"])


def _instructions(raw: Sequence[Mapping[str, Any]]) -> tuple[Instruction, ...]:
    return tuple(Instruction(i["operator"], _freeze(i["args"]), dict(i["kwargs"]), i["output"]) for i in raw)


def _freeze(value: Any) -> Any:
    return tuple(_freeze(v) for v in value) if isinstance(value, list) else value
