"""Run a recorded step again: from a state and the writes that read it to the next state, in the model's own arithmetic.

A step is a short list of ATen operations: the additions in the order and association in which the model made them, a
factor on the skip, the norm after the addition. Only the element-wise and row-wise operations of the table below can
be recorded or run, so a capture file from elsewhere cannot make anything else run. Shapes are left out on purpose:
every operation treats tokens alone, and so the same recording serves any number of them.

References inside arguments are strings: ``@state``, ``@write:3``, ``@part:0``, ``@v12`` (an earlier output),
``@param:model.norm.weight`` and ``@const:float32:0.5``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from streamlens.anatomy import Instruction, Stream
from streamlens.errors import FormatError

_aten = torch.ops.aten

OPERATORS: Mapping[str, Any] = {
    str(overload): overload
    for overload in (
        _aten.add.Tensor,
        _aten.add.Scalar,
        _aten.sub.Tensor,
        _aten.sub.Scalar,
        _aten.mul.Tensor,
        _aten.mul.Scalar,
        _aten.div.Tensor,
        _aten.div.Scalar,
        _aten.neg.default,
        _aten.reciprocal.default,
        _aten.pow.Tensor_Scalar,
        _aten.square.default,
        _aten.sqrt.default,
        _aten.rsqrt.default,
        _aten.rsub.Scalar,
        _aten.rsub.Tensor,
        _aten.mean.dim,
        _aten.sum.dim_IntList,
        _aten.var.dim,
        _aten.var.correction,
        _aten.std.dim,
        _aten.std.correction,
        _aten.linalg_vector_norm.default,
        _aten.clamp.default,
        _aten.clamp_min.default,
        _aten.native_layer_norm.default,
        _aten._fused_rms_norm.default,
        _aten._to_copy.default,
        _aten.relu.default,
        _aten.tanh.default,
        _aten.sigmoid.default,
        _aten.exp.default,
    )
}
"""The operations that may stand between a sum and the next state."""


def run(
    instructions: Sequence[Instruction], values: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Run `instructions` and return every value by name.

    Args:
        instructions: what to run, in order.
        values: the tensors the first instructions refer to, each (..., d_model).
        parameters: tensors by parameter name, on the same device.

    Raises:
        FormatError: an operation that is not in `OPERATORS`, or a name that is not there.
    """
    known = dict(values)
    for step in instructions:
        operator = OPERATORS.get(step.operator)
        if operator is None:
            raise FormatError(
                f"the recorded step uses {step.operator!r}, which may not be replayed: the file was altered"
            )
        args = [_argument(v, known, parameters) for v in step.args]
        keywords = {k: _argument(v, known, parameters) for k, v in step.kwargs.items()}
        result = operator(*args, **keywords)
        known[step.output] = result[0] if isinstance(result, tuple) else result
    return known


def last(instructions: Sequence[Instruction], start: str) -> str:
    """Return the name under which `run` leaves the outcome: the last output, or `start` when nothing is run."""
    return instructions[-1].output if instructions else start


def embed(
    stream: Stream, parts: Sequence[Float[Tensor, "*token d_model"]], parameters: Mapping[str, Tensor]
) -> Float[Tensor, "*any d_model"]:
    """Return x_0 from its parts, each (..., d_model)."""
    values = {f"@part:{i}": part for i, part in enumerate(parts)}
    return run(stream.embedding, values, parameters)[last(stream.embedding, "@part:0")]


def advance(
    stream: Stream,
    step: int,
    state: Float[Tensor, "*token d_model"],
    writes: Mapping[int, Float[Tensor, "*token d_model"]],
    parameters: Mapping[str, Tensor],
) -> Float[Tensor, "*any d_model"]:
    """Return the state after `step` from the one before it.

    Args:
        stream: the stream.
        step: index of the step.
        state: (..., d_model) x_step.
        writes: (..., d_model) by sublayer index; at least those of this step.
        parameters: tensors by name.
    """
    recorded = stream.steps[step]
    values = {"@state": state, **{f"@write:{s}": writes[s] for s in recorded.sublayers}}
    return run(recorded.instructions, values, parameters)[last(recorded.instructions, "@state")]


def replay_states(
    stream: Stream,
    parts: Sequence[Float[Tensor, "token d_model"]],
    writes: Sequence[Float[Tensor, "token d_model"]],
    parameters: Mapping[str, Tensor],
) -> list[Float[Tensor, "token d_model"]]:
    """Rebuild all states from the embedding parts and the writes.

    Args:
        stream: the stream.
        parts: each (token, d_model).
        writes: one (token, d_model) for each sublayer, in order.
        parameters: tensors by name, for the norms on the stream.

    Returns:
        The states x_0 ... x_K, each (token, d_model).
    """
    by_index = dict(enumerate(writes))
    states = [embed(stream, parts, parameters).reshape(parts[0].shape)]
    for step in range(len(stream.steps)):
        state = advance(stream, step, states[-1], by_index, parameters)
        states.append(state.reshape(states[-1].shape))
    return states


def parameter_names(stream: Stream) -> tuple[str, ...]:
    """Return the names of all parameters that the stream's own steps use."""
    found: dict[str, None] = {}

    def visit(value: Any) -> None:
        if isinstance(value, str) and value.startswith("@param:"):
            found[value.removeprefix("@param:")] = None
        elif isinstance(value, (tuple, list)):
            for item in value:
                visit(item)

    for instructions in (stream.embedding, *(s.instructions for s in stream.steps)):
        for instruction in instructions:
            visit(instruction.args)
            visit(tuple(instruction.kwargs.values()))
    return tuple(found)


def _argument(value: Any, known: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Any:
    # Not a function inside `run`: one that calls itself would be a cycle that keeps every tensor alive until the
    # garbage collector comes by, which costs more memory and time than the capture itself.
    if isinstance(value, str):
        return _resolve(value, known, parameters)
    if isinstance(value, (tuple, list)):
        return [_argument(v, known, parameters) for v in value]
    return value


def _resolve(text: str, known: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Any:
    kind, _, rest = text.partition(":")
    if kind == "@param":
        found = parameters.get(rest)
    elif kind == "@const":
        dtype, _, number = rest.partition(":")
        return torch.tensor(float(number), dtype=dtype_named(dtype))
    elif kind == "dtype":
        return dtype_named(rest)
    else:
        found = known.get(text)
    if found is None:
        raise FormatError(f"the recorded step refers to {text!r}, which is not there: the file is incomplete")
    return found


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the narrowest dtype that holds numbers of all of these dtypes without loss; there is at least one.

    >>> widest([torch.float16, torch.float16]), widest([torch.bfloat16, torch.float16])
    (torch.float16, torch.float32)
    """
    return reduce(torch.promote_types, set(dtypes))


def dtype_named(name: str) -> torch.dtype:
    """Return the torch dtype of that name.

    Raises:
        FormatError: there is none.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise FormatError(f"unknown dtype {name!r}")
    return dtype
