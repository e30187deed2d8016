"""A stream as an `xarray.Dataset`: the same numbers with named axes and coordinates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from streamlens.errors import UsageError
from streamlens.reader.stream import StreamView

if TYPE_CHECKING:
    import xarray

    from streamlens.reader.opening import Capture


def to_xarray(capture: Capture, view: StreamView) -> xarray.Dataset:
    """Return write, read, final and the embedding parts of a stream, over (sublayer, token, d_model).

    float32 and float16 are mapped from the file without a copy. numpy has no bfloat16, so such a capture is read into
    memory as float32. The reads of a compact capture are left out: use `StreamView.read`.

    Raises:
        UsageError: xarray is not installed.
    """
    try:
        import xarray
    except ImportError as error:
        raise UsageError("to_xarray needs xarray: install it, for instance with `pip install xarray`") from error
    rows = [view.anatomy.sublayers[index] for index in view.stored]
    tokens, per_row = capture.tokens, ("sublayer", "token", "d_model")
    variables: dict[str, Any] = {"write": (per_row, _array(view.writes))}
    if not view.compact:
        variables["read"] = (per_row, _array(view.reads))
    variables["final"] = (per_row[1:], _array(view.final))
    for part in view.anatomy.parts:
        variables[part.label] = (per_row[1:], _array(view.embed(part.label)))
    coords = {
        "sublayer": [s.label for s in rows],
        "layer": ("sublayer", [s.layer for s in rows]),
        "kind": ("sublayer", [s.kind for s in rows]),
        "id": ("token", tokens.id.numpy()),
        "doc": ("token", tokens.doc.numpy()),
        "position": ("token", tokens.position.numpy()),
    }
    return xarray.Dataset(variables, coords, {**capture.attrs, "stream": view.name})


def _array(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()
    return array
