"""Find the chain of residual additions between the cuts of a watched pass.

Between two neighbouring cuts lies either one operation (a norm, a scale), or a diamond: several paths that leave the
first and meet in the second. The diamond is residual when it closes with an addition of which one term is the first
cut itself, at most scaled, and every other term went through an operation with weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from streamlens.anatomy import Kind
from streamlens.discovery.graph import MATMULS, Graph, base_name
from streamlens.discovery.watch import Op

_ADDITIONS = frozenset({"add", "sub", "__iadd__", "__add__"})
_SCALES = frozenset({"mul", "div", "_to_copy"})


@dataclass(frozen=True)
class Term:
    """One write: the tensor that is added, by which addition, and with which factor."""

    node: int
    addition: Op
    factor: float


@dataclass(frozen=True)
class Diamond:
    """One residual step: the state it starts from, the sum it ends in, and the terms added on the way."""

    start: int
    end: int
    carrier: Op
    """The first operation on the skip: a scale, or the addition itself."""
    terms: tuple[Term, ...]
    region: frozenset[int]
    """All tensors between start and end."""


@dataclass(frozen=True)
class Puzzle:
    """An addition that looks residual and is not understood."""

    node: int
    reason: str


@dataclass(frozen=True)
class Segment:
    """Diamonds in a row, joined by nothing but operations that treat each token alone."""

    source: int
    diamonds: tuple[Diamond, ...]
    cuts: tuple[int, ...]
    """All cuts of this source, before, within and after the segment."""


def diamonds(graph: Graph, cuts: Sequence[int], between: set[int]) -> tuple[list[Diamond], list[Puzzle]]:
    """Return the residual diamonds among `cuts`, and the diamonds that close with an addition but are not residual."""
    order = sorted(between)
    positions = {n: i for i, n in enumerate(order)}
    found: list[Diamond] = []
    puzzles: list[Puzzle] = []
    for start, end in pairwise(cuts):
        region = frozenset(order[positions[start] + 1 : positions[end]])
        if not region:
            continue
        outcome = _residual(graph, start, end, region)
        if isinstance(outcome, Diamond):
            found.append(outcome)
        elif outcome is not None:
            puzzles.append(outcome)
    return found, puzzles


def _residual(graph: Graph, start: int, end: int, region: frozenset[int]) -> Diamond | Puzzle | None:
    op = graph.op(end)
    weighted = any(_has_weights(graph, n) for n in region)
    if op is None or base_name(op) not in _ADDITIONS:
        if op is not None and weighted:
            return Puzzle(end, f"paths around each other meet in {op.name}, not in an addition")
        return None
    within = set(region) | {start, end}
    terms: list[Term] = []
    carriers: list[Op] = []

    def visit(node: int, closing: Op | None, factor: float) -> None:
        carrier = _skip(graph, start, node, closing)
        if carrier is not None:
            carriers.append(carrier)
            return
        made = graph.op(node)
        if made is not None and _holds_skip(graph, start, node, within):
            left, right = _operands(graph, made)
            visit(left, made, factor)
            visit(right, made, factor * _factor(made))
        elif closing is not None:
            terms.append(Term(node, closing, factor))

    visit(end, None, 1.0)
    if len(carriers) != 1 or not terms:
        if not weighted:
            return None
        gated = any(_gated(graph, start, n) for n in region)
        reason = (
            "the state is multiplied by an activation on its way round the branch"
            if gated
            else ("none of its terms is an unchanged earlier state" if not carriers else "the state is added to itself")
        )
        return Puzzle(end, reason)
    if not all(_has_weights_on_path(graph, t.node, within, start) for t in terms):
        return None
    return Diamond(start, end, carriers[0], tuple(terms), region)


def split_parallel(graph: Graph, diamond: Diamond, kind_of: Callable[[int, set[int]], Kind]) -> Diamond:
    """Split a term that is itself the sum of an attention's and an MLP's output: a parallel layer.

    A sum within one sublayer (experts, a low-rank adapter) has two terms of the same kind and stays whole.
    """
    within = set(diamond.region) | {diamond.start, diamond.end}
    terms: list[Term] = []
    for term in diamond.terms:
        made = graph.op(term.node)
        halves: tuple[int, ...] = ()
        if made is not None and base_name(made) in _ADDITIONS and _same_shape(graph, made):
            halves = _operands(graph, made)
        if len(halves) == 2 and all(
            h in within and _has_weights_on_path(graph, h, within, diamond.start) for h in halves
        ):
            kinds = [kind_of(h, within) for h in halves]
            if kinds[0] != kinds[1] and "mlp" in kinds and not _nested(graph, halves, within):
                assert made is not None
                terms.append(Term(halves[0], made, term.factor))
                terms.append(Term(halves[1], made, term.factor * _factor(made)))
                continue
        terms.append(term)
    return Diamond(diamond.start, diamond.end, diamond.carrier, tuple(terms), diamond.region)


def _nested(graph: Graph, halves: tuple[int, ...], within: set[int]) -> bool:
    first, second = halves
    return first in graph.ancestors(second, within) or second in graph.ancestors(first, within)


def _skip(graph: Graph, start: int, node: int, closing: Op | None) -> Op | None:
    """Return the first operation that carries `start` towards `node`, if nothing but a scale or cast lies between."""
    if node == start:
        return closing
    op = graph.op(node)
    if op is None or base_name(op) not in _SCALES:
        return None
    activations = [i for i in graph.inputs(node) if _depends(graph, start, i)]
    if len(activations) != 1:
        return None
    return _skip(graph, start, activations[0], op)


def _depends(graph: Graph, start: int, node: int) -> bool:
    return node in graph.reachable_from(start)


def _holds_skip(graph: Graph, start: int, node: int, within: set[int]) -> bool:
    op = graph.op(node)
    if node not in within or op is None or base_name(op) not in _ADDITIONS or not _same_shape(graph, op):
        return False
    return any(
        _skip(graph, start, side, op) is not None or _holds_skip(graph, start, side, within)
        for side in _operands(graph, op)
    )


def _operands(graph: Graph, op: Op) -> tuple[int, int]:
    return graph.canonical(op.inputs[0]), graph.canonical(op.inputs[1])


def _same_shape(graph: Graph, op: Op) -> bool:
    return len(op.inputs) == 2 and graph.nodes[op.inputs[0]].shape == graph.nodes[op.inputs[1]].shape


def _factor(op: Op) -> float:
    """Return the factor that the addition gives to its second operand."""
    alpha = op.kwargs.get("alpha", op.args[2] if len(op.args) > 2 else 1)
    return float(alpha) * (-1.0 if base_name(op) == "sub" else 1.0)


def _gated(graph: Graph, start: int, node: int) -> bool:
    op = graph.op(node)
    return (
        op is not None
        and base_name(op) == "mul"
        and start in graph.inputs(node)
        and all(_depends(graph, start, i) for i in graph.inputs(node))
    )


def _has_weights(graph: Graph, node: int) -> bool:
    op = graph.op(node)
    return op is not None and base_name(op) in MATMULS


def _has_weights_on_path(graph: Graph, node: int, within: set[int], start: int) -> bool:
    return any(_has_weights(graph, n) for n in graph.ancestors(node, within) if n != start)
