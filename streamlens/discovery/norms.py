"""Recognise the norms among recorded instructions: fused ones by name, written-out ones by their reciprocal root."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from streamlens.anatomy import Instruction, Norm
from streamlens.discovery.graph import Graph

Form = Literal["layer_norm", "rms_norm"]
_Described = tuple[Form, float, str, str | None, str | None]
"""Form, epsilon, what is normalised, gain, bias."""


def find_norms(
    graph: Graph, instructions: Sequence[Instruction], names: Mapping[int, str], label: str, state: int | None
) -> tuple[Norm, ...]:
    """Return the norms in the order in which the stream passes them.

    Args:
        graph: the data flow, for the modules in which they run.
        instructions: a recorded step.
        names: value names by tensor, as `record` returned them.
        label: what the norms are called.
        state: index of the state they lead to; None for the final norm.
    """
    nodes = {name: node for node, name in names.items()}
    made = {i.output: i for i in instructions}
    found = []
    for step in instructions:
        described = _fused(step) or _written_out(step, made)
        if described is None:
            continue
        form, epsilon, source, weight, bias = described
        while source in made and made[source].operator == "aten._to_copy.default":
            source = made[source].args[0]  # a cast up for the norm's own arithmetic: the stream is what comes before it
        op = graph.op(nodes[step.output])
        module = op.frames[-1].module if op is not None and op.frames else ""
        found.append(Norm(label, form, epsilon, state, module, source, weight, bias))
    return tuple(found)


def _fused(step: Instruction) -> _Described | None:
    if step.operator == "aten.native_layer_norm.default":
        source, _, weight, bias, epsilon = step.args
        return "layer_norm", float(epsilon), source, _parameter(weight), _parameter(bias)
    if step.operator == "aten._fused_rms_norm.default":
        source, _, weight, epsilon = step.args
        return "rms_norm", float(epsilon or 0.0), source, _parameter(weight), None
    return None


def _written_out(step: Instruction, made: Mapping[str, Instruction]) -> _Described | None:
    """Match rsqrt(mean(x ** 2) + eps), with x as it is or minus its mean, and rsqrt(var(x) + eps)."""
    if step.operator != "aten.rsqrt.default":
        return None
    inner = made.get(step.args[0])
    epsilon = 0.0
    if inner is not None and inner.operator in ("aten.add.Tensor", "aten.add.Scalar"):
        numbers = [a for a in inner.args if isinstance(a, (int, float))]
        epsilon = float(numbers[0]) if numbers else _constant(inner.args[1])
        inner = made.get(inner.args[0])
    if inner is None:
        return None
    if inner.operator.startswith("aten.var"):
        return "layer_norm", epsilon, inner.args[0], None, None
    square = made.get(inner.args[0]) if inner.operator == "aten.mean.dim" else None
    if square is None:
        return None
    centred = made.get(square.args[0])
    if centred is not None and centred.operator == "aten.sub.Tensor":
        mean = made.get(centred.args[1])
        if mean is not None and mean.operator == "aten.mean.dim" and mean.args[0] == centred.args[0]:
            return "layer_norm", epsilon, centred.args[0], None, None
    return "rms_norm", epsilon, square.args[0], None, None


def _constant(value: object) -> float:
    return float(str(value).rpartition(":")[2]) if str(value).startswith("@const:") else 0.0


def _parameter(value: object) -> str | None:
    text = str(value)
    return text.removeprefix("@param:") if text.startswith("@param:") else None
