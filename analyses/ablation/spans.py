"""What is dropped: whole layers, single sublayers, or several of them together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from streamlens.anatomy import Stream
from streamlens.errors import UsageError
from streamlens.replay import advance

Mode = Literal["skip", "zero", "mean", "resample"]
MODES: tuple[Mode, ...] = ("skip", "zero", "mean", "resample")
"""skip: the next state is the state before, without addition and norm. The others put something in place of what is
written, and keep what follows: nothing (zero), the mean over the text, what was written in another window."""

KINDS = ("attn", "cross_attn", "mixer", "mlp")


@dataclass(frozen=True)
class Drop:
    """Sublayers that are left out together."""

    label: str
    kind: str
    """``layer``, the kind of the one sublayer, or ``several``."""
    layers: tuple[int, ...]
    """The layers that it touches."""
    sublayers: tuple[int, ...]
    mode: Mode = "skip"

    @property
    def layer(self) -> int | None:
        """The layer, where it is one."""
        return self.layers[0] if len(self.layers) == 1 else None


def whole_layer(stream: Stream, layer: int, mode: Mode = "skip") -> Drop:
    """Return the drop of all sublayers of a layer.

    Raises:
        UsageError: there is no such layer.
    """
    found = tuple(s.index for s in stream.sublayers if s.layer == layer)
    if not found:
        raise UsageError(f"stream {stream.name!r} has layers 0 to {stream.layers - 1}, not {layer}")
    return Drop(f"layer {layer}", "layer", (layer,), found, mode)


def one_sublayer(stream: Stream, index: int, mode: Mode = "skip") -> Drop:
    """Return the drop of one sublayer."""
    sublayer = stream.sublayers[index]
    return Drop(sublayer.label, sublayer.kind, (sublayer.layer,), (index,), mode)


def together(drops: Sequence[Drop]) -> Drop:
    """Return the drop of everything that these drop, in the mode of the first."""
    if len(drops) == 1:
        return drops[0]
    layers = tuple(sorted({layer for d in drops for layer in d.layers}))
    sublayers = tuple(sorted({s for d in drops for s in d.sublayers}))
    whole = sorted({d.layers[0] for d in drops if d.kind == "layer"})
    named = [f"layer{'s' if len(whole) > 1 else ''} {ranges(whole)}"] if whole else []
    label = " + ".join([*named, *dict.fromkeys(d.label for d in drops if d.kind != "layer")])
    return Drop(label, "several", layers, sublayers, drops[0].mode)


def ranges(numbers: Iterable[int]) -> str:
    """Write numbers as one writes them by hand.

    >>> ranges([3, 4, 5, 7])
    '3-5,7'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def named(stream: Stream, what: str | int, mode: Mode = "skip") -> list[Drop]:
    """Return what a name stands for: ``7`` or ``3-5`` (layers), ``7.attn``, ``7_attn_out``.

    Raises:
        UsageError: there is no such layer or sublayer.
    """
    text = str(what).strip()
    if match := re.fullmatch(r"(\d+)(?:-(\d+))?", text):
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UsageError(f"{text!r} is an empty range: write {last}-{first}")
        return [whole_layer(stream, layer, mode) for layer in range(first, last + 1)]
    if match := re.fullmatch(rf"(\d+)\.({'|'.join(KINDS)})", text):
        whole_layer(stream, int(match[1]))
        found = [s for s in stream.sublayers if s.layer == int(match[1]) and s.kind == match[2]]
        if not found:
            there = sorted({f"{s.layer}.{s.kind}" for s in stream.sublayers if s.layer == int(match[1])})
            raise UsageError(f"stream {stream.name!r} has no {text!r}; that layer has {', '.join(there)}")
        return [one_sublayer(stream, s.index, mode) for s in found]
    if text in stream.labels:
        return [one_sublayer(stream, stream.find(text).index, mode)]
    raise UsageError(
        f"{text!r} names nothing to drop: write a layer (7), a range (3-5), a sublayer (7.attn, 7.mlp) or a label "
        f"({stream.labels[0]}); stream {stream.name!r} has layers 0 to {stream.layers - 1}"
    )


def chosen(stream: Stream, drop: Sequence[str | int] | str | int, mode: Mode = "skip") -> Drop:
    """Return one drop of all that is named.

    Raises:
        UsageError: nothing is named, or it does not exist.
    """
    names = [drop] if isinstance(drop, (str, int)) else list(drop)
    pieces = [piece for name in names for part in str(name).split(",") for piece in named(stream, part, mode)]
    if not pieces:
        raise UsageError("nothing is named to drop: name a layer, or leave the argument out to sweep over all")
    return together(pieces)


def every(stream: Stream, units: str = "both", mode: Mode = "skip") -> list[Drop]:
    """Return each layer, each sublayer, or both (``layers``, ``sublayers``, ``both``) as a drop of its own.

    A layer of one sublayer is listed once.
    """
    layers = [whole_layer(stream, layer, mode) for layer in range(stream.layers)]
    sublayers = [one_sublayer(stream, s.index, mode) for s in stream.sublayers]
    if units == "layers":
        return layers
    if units == "sublayers":
        return sublayers
    found: list[Drop] = []
    for layer in layers:
        found.append(layer)
        if len(layer.sublayers) > 1:
            found += [s for s in sublayers if s.layers == layer.layers]
    return found


def layer_span(stream: Stream, layer: int) -> tuple[int, int]:
    """Return the states before and after a layer.

    Raises:
        UsageError: there is no such layer.
    """
    inside = set(whole_layer(stream, layer).sublayers)
    steps = [k for k, step in enumerate(stream.steps) if inside & set(step.sublayers)]
    return steps[0], steps[-1] + 1


def touched(stream: Stream, drop: Drop) -> dict[int, tuple[int, ...]]:
    """Return which sublayers are dropped in each step that is touched, in order."""
    gone = set(drop.sublayers)
    found = {k: tuple(s for s in step.sublayers if s in gone) for k, step in enumerate(stream.steps)}
    return {k: sublayers for k, sublayers in found.items() if sublayers}


def extent(stream: Stream, drop: Drop) -> tuple[int, int]:
    """Return the state before the first and the state after the last sublayer that is dropped."""
    steps = touched(stream, drop)
    return min(steps), max(steps) + 1


def is_plain(stream: Stream, step: int, parameters: Mapping[str, Tensor]) -> bool:
    """Tell whether a step that writes nothing leaves the state as it is: no factor on the skip, no norm after it.

    Then skipping the step and writing zero are the same.
    """
    like = next((p for p in parameters.values() if p.is_floating_point()), torch.zeros(1))
    probe = torch.linspace(-1.0, 2.0, stream.d_model, device=like.device, dtype=like.dtype)[None]
    nothing = dict.fromkeys(stream.steps[step].sublayers, torch.zeros_like(probe))
    with torch.no_grad():
        after = advance(stream, step, probe, nothing, parameters)
    return torch.equal(after.reshape(probe.shape), probe)


def in_modes(stream: Stream, drops: Iterable[Drop], parameters: Mapping[str, Tensor]) -> list[Drop]:
    """Return the drops; where skip and zero differ, each is followed by itself in the other of the two modes."""
    plain = {k: is_plain(stream, k, parameters) for k in range(len(stream.steps))}
    found: list[Drop] = []
    for drop in drops:
        found.append(drop)
        steps = touched(stream, drop)
        differs = any(not plain[k] and len(gone) == len(stream.steps[k].sublayers) for k, gone in steps.items())
        if drop.mode in ("skip", "zero") and differs:
            found.append(replace(drop, mode="zero" if drop.mode == "skip" else "skip"))
    return found
