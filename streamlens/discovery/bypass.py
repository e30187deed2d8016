"""Which module executions a run can leave out when it starts at a later state of the stream."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from streamlens.anatomy import Bypass
from streamlens.discovery.graph import MATMULS, Graph, base_name
from streamlens.discovery.watch import Execution, Ref

_NOT_PLAIN = object()
STATE, FLAT = "@state", "@flat"
"""Stand-ins for what a bypassed execution returns: a state in the model's layout, or flattened to (token, d_model).

Where a model mixes dtypes the execution's own follows, as in ``@state:float16``: what still runs may insist on it.
"""


@dataclass(frozen=True)
class _Looks:
    """What the states of a stream look like."""

    size: tuple[int, int]
    """Number of elements, and width."""
    dtypes: set[torch.dtype]


def find(graph: Graph, states: Sequence[int]) -> tuple[Bypass, ...]:
    """Return every execution that becomes superfluous at some state, with the first such state.

    An execution is superfluous when nothing that the output still needs runs in it. What leaves it must look like a
    state, because a stand-in of that shape takes its place.
    """
    executions = graph.trace.executions
    heavy = [
        e for i, e in enumerate(executions) if e.parent is not None and _multiplies(graph, e) and _alone(executions, i)
    ]
    found: dict[tuple[str, int], Bypass] = {}
    shape = graph.nodes[states[0]].shape
    looks = _Looks((math.prod(shape), shape[-1]), {graph.nodes[state].dtype for state in states})
    for index, state in enumerate(states):
        needed = _needed(graph, state)
        for execution in heavy:
            key = (execution.frame.module, execution.frame.visit)
            if key in found or any(needed[execution.first : execution.last]):
                continue
            output = _stand_in(graph, execution, execution.output, looks)
            if output is not _NOT_PLAIN:
                found[key] = Bypass(*key, index, output)
    return tuple(found.values())


def _multiplies(graph: Graph, execution: Execution) -> bool:
    return any(base_name(op) in MATMULS for op in graph.trace.ops[execution.first : execution.last])


def _alone(executions: Sequence[Execution], index: int) -> bool:
    """Tell whether no module inside this execution also runs elsewhere: its later executions would lose count."""
    outer = executions[index]
    inside = {e.frame.module for e in executions[index + 1 :] if e.first >= outer.first and e.last <= outer.last}
    return not any(e.frame.visit > 0 and e.frame.module in inside for e in executions)


def _needed(graph: Graph, state: int) -> list[bool]:
    """For each operation, whether the output depends on it when `state` is given."""
    needed = [False] * len(graph.trace.ops)
    stack = [graph.trace.output]
    seen = set(stack)
    while stack:
        node = stack.pop()
        op = graph.nodes[node].op
        if op is None or graph.canonical(node) == state:
            continue
        needed[op.index] = True
        for source in op.inputs:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return needed


def _stand_in(graph: Graph, execution: Execution, output: Any, looks: _Looks) -> Any:
    """Return what may be handed out in place of `output`, given what a state looks like."""
    if isinstance(output, Ref):
        shape, dtype = graph.nodes[output.node].shape, graph.nodes[output.node].dtype
        if (math.prod(shape), shape[-1] if shape else 0) == looks.size:
            cast = "" if looks.dtypes == {dtype} else f":{str(dtype).removeprefix('torch.')}"
            return (FLAT if len(shape) == 2 else STATE) + cast
        return _NOT_PLAIN if _escapes(graph, execution, output.node) else None
    if isinstance(output, tuple):
        inner = tuple(_stand_in(graph, execution, o, looks) for o in output)
        return _NOT_PLAIN if any(o is _NOT_PLAIN for o in inner) else inner
    return None if output is None else _NOT_PLAIN


def _escapes(graph: Graph, execution: Execution, node: int) -> bool:
    return any(node in op.inputs for op in graph.trace.ops[execution.last :])
