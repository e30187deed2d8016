"""What follows the last state: the final norm and the way to the logits."""

from __future__ import annotations

from collections.abc import Sequence

from streamlens.anatomy import Head, Norm
from streamlens.discovery.graph import Graph
from streamlens.discovery.norms import find_norms
from streamlens.discovery.recording import NotReplayable, record


def describe(graph: Graph, stream: str, final: int) -> Head:
    """Describe everything between the last state and the model's output."""
    after = graph.reachable_from(final) - {final}
    modules: dict[str, None] = {}
    for op in graph.trace.ops:
        if any(graph.canonical(o) in after for o in op.outputs) and op.frames:
            modules[op.frames[-1].module or "the model"] = None
    output, state = graph.nodes[graph.trace.output], graph.nodes[final]
    per_token = len(output.shape) >= 2 and _count(output.shape[:-1]) == _count(state.shape[:-1])
    has_logits = per_token and graph.canonical(graph.trace.output) in after and output.shape[-1] != state.shape[-1]
    return Head(stream, tuple(modules), output.shape[-1] if has_logits else None)


def final_norm(graph: Graph, final: int, cuts: Sequence[int]) -> tuple[Norm, ...]:
    """Return the norm that reads the last state, if the stream ends in one."""
    for cut in (c for c in cuts if c > final):
        try:
            instructions, names = record(graph, cut, {final: "@state"})
        except NotReplayable:
            return ()
        found = find_norms(graph, instructions, names, "final", None)
        if found:
            return found[:1]
    return ()


def _count(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
