"""Turn the operations between two states into instructions that `streamlens.replay` can run again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from streamlens.anatomy import Instruction
from streamlens.discovery.graph import Graph, base_name
from streamlens.discovery.watch import Op, Ref
from streamlens.replay import OPERATORS

_DIMENSIONS = frozenset({"dim", "dims"})


class NotReplayable(Exception):
    """An operation on the stream that treats more than one token, or mixes in something unknown."""


def record(graph: Graph, target: int, given: Mapping[int, str]) -> tuple[tuple[Instruction, ...], dict[int, str]]:
    """Return the instructions that compute `target` from the `given` tensors, and every tensor's name.

    Args:
        graph: the data flow.
        target: canonical tensor to compute.
        given: names (``@state``, ``@write:0``) of the canonical tensors to start from.

    Raises:
        NotReplayable: with the operation that stands in the way.
    """
    names = dict(given)
    found: list[Instruction] = []

    def visit(node: int) -> str:
        node = graph.canonical(node)
        if node in names:
            return names[node]
        names[node] = _leaf(graph, node) or compute(node)
        return names[node]

    def compute(node: int) -> str:
        op = graph.op(node)
        assert op is not None
        if graph.canonical(op.outputs[0]) != node:
            raise NotReplayable(f"a second output of {op.name}")
        operator = _functional(op)
        args = _encode(op.args, visit)
        kwargs = {k: _encode(v, visit) for k, v in op.kwargs.items() if v is not None and k != "memory_format"}
        rank = len(graph.nodes[op.inputs[0]].shape)
        args, kwargs = along_last_axis(op.overload._schema, args, kwargs, rank, NotReplayable)
        found.append(Instruction(operator, args, _portable(kwargs), f"@v{node}"))
        return f"@v{node}"

    visit(target)
    return tuple(found), names


def _leaf(graph: Graph, node: int) -> str | None:
    record = graph.nodes[node]
    if record.name is not None:
        return f"@param:{record.name}"
    if record.value is not None and record.value.numel() == 1:
        return f"@const:{str(record.dtype).removeprefix('torch.')}:{record.value.item()!r}"
    if record.op is None:
        raise NotReplayable(f"a tensor of shape {record.shape} that no watched operation made")
    return None


def _functional(op: Op) -> str:
    """Return the name of the operator's out-of-place form, if it may be replayed."""
    overload = op.name.rpartition(".")[2]
    name = f"aten.{base_name(op)}.{overload}"
    if name not in OPERATORS:
        raise NotReplayable(op.name)
    return name


def _encode(value: Any, visit: Any) -> Any:
    if isinstance(value, Ref):
        return visit(value.node)
    if isinstance(value, (tuple, list)):
        return tuple(_encode(v, visit) for v in value)
    if isinstance(value, torch.dtype):
        return f"dtype:{str(value).removeprefix('torch.')}"
    if isinstance(value, (torch.device, torch.layout, torch.memory_format)):
        return None
    return value


def _portable(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Drop what ties a step to one device."""
    return {k: v for k, v in kwargs.items() if k not in ("device", "layout", "pin_memory", "non_blocking")}


def along_last_axis(
    schema: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], rank: int, refusal: type[Exception]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Count axes from the end, so that what was done to (doc, position, d_model) can be done to (token, d_model).

    Args:
        schema: of the operator.
        args: its arguments.
        kwargs: its named arguments.
        rank: number of axes of the tensor that it was applied to.
        refusal: what is raised where another axis than the last is meant.

    Returns:
        The arguments with -1 for that axis.
    """

    def negative(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(negative(v) for v in value)
        if value % rank != rank - 1:
            raise refusal(f"{schema.name} over another axis than the last")
        return -1

    positional, named = list(args), dict(kwargs)
    for position, argument in enumerate(schema.arguments):
        if argument.name not in _DIMENSIONS:
            continue
        if position < len(positional) and positional[position] is not None:
            positional[position] = negative(positional[position])
        elif named.get(argument.name) is not None:
            named[argument.name] = negative(named[argument.name])
    return tuple(positional), named
