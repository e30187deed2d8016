"""Walk back from x_0: the terms of the embedding sum, and what is done with the sum before it becomes x_0."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from streamlens.anatomy import Instruction, Part, Point
from streamlens.discovery.graph import Graph, base_name
from streamlens.discovery.recording import NotReplayable, record
from streamlens.discovery.watch import Op
from streamlens.errors import AnatomyError
from streamlens.replay import OPERATORS

_LABELS = ("embed", "pos_embed", "type_embed")


def describe(graph: Graph, source: int, first: int) -> tuple[tuple[Part, ...], tuple[Instruction, ...], dict[int, str]]:
    """Return the parts of x_0, the instructions from the parts to x_0, and the names of the values in them.

    Args:
        graph: the data flow.
        source: the tensor in which the stream's tokens enter.
        first: x_0.
    """
    walked, frontier = _walk(graph, first)
    lifted = sorted({_lift(graph, node, walked) for node in frontier})
    tokens = graph.reachable_from(source)
    named = sorted(
        ((_label(graph, n, n in tokens, first), n) for n in lifted), key=lambda p: (_LABELS.index(p[0]), p[1])
    )
    parts, given, seen = [], {}, dict.fromkeys(_LABELS, 0)
    for index, (label, node) in enumerate(named):
        seen[label] += 1
        name = label if seen[label] == 1 else f"{label}.{seen[label] - 1}"
        parts.append(Part(name, None if node == first else _point(graph, node, walked)))
        given[node] = f"@part:{index}"
    try:
        instructions, names = record(graph, first, given)
    except NotReplayable as error:
        raise AnatomyError(f"the embedding goes through {error}, which does not treat each token alone") from error
    return tuple(parts), instructions, names


def plain_additions(instructions: Sequence[Instruction]) -> tuple[Instruction, ...]:
    """Turn ``state - w`` and ``state + a * w`` into ``state + write``: the stored write already carries the factor."""
    result = []
    for step in instructions:
        second = step.args[1] if len(step.args) > 1 else None
        if step.operator in ("aten.add.Tensor", "aten.sub.Tensor") and str(second).startswith("@write:"):
            step = dataclasses.replace(step, operator="aten.add.Tensor", args=step.args[:2], kwargs={})
        result.append(step)
    return tuple(result)


def _walk(graph: Graph, first: int) -> tuple[set[int], set[int]]:
    """Return what is computed token by token on the way to x_0, and the tensors where that way begins."""
    walked, frontier, stack = set[int](), set[int](), [first]
    while stack:
        node = stack.pop()
        if node in walked or node in frontier:
            continue
        op = graph.op(node)
        if op is None or not _token_wise(op):
            if not _constant(graph, node, first):
                frontier.add(node)
            continue
        walked.add(node)
        stack += graph.inputs(node)
    return walked, frontier


def _token_wise(op: Op) -> bool:
    return f"aten.{base_name(op)}.{op.name.rpartition('.')[2]}" in OPERATORS


def _constant(graph: Graph, node: int, first: int) -> bool:
    """Tell whether the tensor is a scale, gain or bias, not a term of the embedding sum."""
    shape = graph.nodes[node].shape
    width = graph.nodes[first].shape[-1]
    return len(shape) < 2 or shape[-1] != width


def _lift(graph: Graph, node: int, walked: set[int]) -> int:
    """Follow a term through its own scale up to where it is added."""
    while True:
        after = [n for n in graph.successors.get(node, ()) if n in walked]
        op = graph.op(after[0]) if len(after) == 1 else None
        if op is None or base_name(op) not in ("mul", "div", "_to_copy"):
            return node
        node = after[0]


def _label(graph: Graph, node: int, token: bool, first: int) -> str:
    if token:
        return "embed"
    op = graph.op(node)
    if op is not None and base_name(op) == "embedding":
        rows = graph.nodes[op.inputs[0]].shape[0]
        positions = max(graph.nodes[first].shape[:-1])
        return "pos_embed" if rows >= positions else "type_embed"
    return "pos_embed"


def _point(graph: Graph, node: int, walked: set[int]) -> Point:
    for after in graph.successors.get(node, ()):
        op = graph.op(after)
        if after not in walked or op is None or op.call is None:
            continue
        slot = graph.argument_slot(op.call, node)
        if slot is not None:
            return Point(op.call.site, slot)
    made = graph.op(node)
    raise AnatomyError(
        f"the embedding term made by {made.name if made else 'a parameter'} is added inside compiled or fused code, "
        "where it cannot be seen again; use the uncompiled form of that module"
    )
