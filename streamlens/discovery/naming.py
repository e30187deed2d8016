"""Which block each sublayer belongs to, and what it is called: read off the order and place of execution."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from streamlens.anatomy import Kind
from streamlens.discovery.watch import Frame

_INDEX = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
_OPENERS = frozenset({"attn", "mixer"})


@dataclass(frozen=True)
class Place:
    """Where one sublayer runs."""

    step: int
    kind: Kind
    addition: tuple[Frame, ...]
    """Modules around the addition, outermost first."""
    branch: tuple[str, ...]
    """Paths of the modules and parameters that the branch uses."""


def layer_indices(places: Sequence[Place]) -> list[int]:
    """Return the 0-based block of each sublayer.

    Blocks are told apart by the numbered module in which the addition runs; where models nest numbered modules
    (stages of blocks), by the first number that gives no block two attentions in a row; where the additions all run
    in one forward, by the numbers of the modules or parameters that the branches use; and without any numbers, a new
    block begins at each attention.
    """
    for depth in range(3):
        keys = [_addition_key(p, depth) for p in places]
        if None not in keys and _plausible(places, keys):
            return _ordinals(keys)
    keys = [_branch_key(p) for p in places]
    if None not in keys and _plausible(places, keys):
        return _ordinals(keys)
    return _by_pattern(places)


def labels(layers: Sequence[int], kinds: Sequence[Kind]) -> list[str]:
    """Return TransformerLens' name for each write: ``3_attn_out``; a second one of a kind gets ``3_attn_out.1``."""
    seen: Counter[str] = Counter()
    result = []
    for layer, kind in zip(layers, kinds, strict=True):
        name = f"{layer}_{kind}_out"
        result.append(name if not seen[name] else f"{name}.{seen[name]}")
        seen[name] += 1
    return result


def _addition_key(place: Place, depth: int) -> Hashable:
    """Return the path up to its number at `depth`, with the execution of the module it leads to."""
    path = place.addition[-1].module if place.addition else ""
    numbers = list(_INDEX.finditer(path))
    if len(numbers) <= depth:
        # A block that is a module of its own, told apart by its name.
        return (path, place.addition[-1].visit) if place.addition and path and depth == 0 else None
    prefix = path[: numbers[depth].end()]
    inside = [f for f in place.addition if f.module == prefix or f.module.startswith(prefix + ".")]
    return (prefix, inside[0].visit)


def _branch_key(place: Place) -> Hashable:
    found = [m.group(1) for path in place.branch if (m := _INDEX.search(path))]
    return found[0] if found and len(set(found)) == 1 else None


def _plausible(places: Sequence[Place], keys: Sequence[Hashable]) -> bool:
    """Reject a grouping in which one block has two attentions, or mixers, one after the other."""
    openers: dict[Hashable, set[int]] = {}
    for place, key in zip(places, keys, strict=True):
        if place.kind in _OPENERS:
            openers.setdefault(key, set()).add(place.step)
    return all(len(steps) <= 1 for steps in openers.values())


def _ordinals(keys: Sequence[Hashable]) -> list[int]:
    order: dict[Hashable, int] = {}
    return [order.setdefault(key, len(order)) for key in keys]


def _by_pattern(places: Sequence[Place]) -> list[int]:
    result: list[int] = []
    layer, seen = -1, set[str]()
    previous = -1
    for place in places:
        repeated = place.kind in seen and place.step != previous
        if layer < 0 or repeated:
            layer, seen = layer + 1, set()
        seen.add(place.kind)
        previous = place.step
        result.append(layer)
    return result


def stream_names(count: int, crossed: Callable[[int], bool], places: Sequence[str]) -> list[str]:
    """Name the streams: ``main`` when alone, ``encoder`` and ``decoder`` when the second reads the first, else places.

    Args:
        count: number of streams, in order of execution.
        crossed: whether the stream with that index has cross-attention.
        places: a module path for each stream.
    """
    if count == 1:
        return ["main"]
    if count == 2 and crossed(1) and not crossed(0):
        return ["encoder", "decoder"]
    return [place.replace(".", "_").replace("/", "_") or f"stream_{i}" for i, place in enumerate(places)]
