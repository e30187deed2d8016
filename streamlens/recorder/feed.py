"""What a capture runs: batches of model inputs, and which document and position each row of the file stands for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from streamlens.calling import Inputs, token_inputs
from streamlens.corpus.windows import Windows
from streamlens.discovery.layout import main_input
from streamlens.errors import UsageError

PROBE_DOCS, PROBE_POSITIONS = 2, 8
"""Size of the small batch on which a model is understood before it is captured."""


@dataclass(frozen=True)
class Load:
    """One batch: rows `start` to `start + docs * positions` of the token axis."""

    start: int
    docs: int
    positions: int
    inputs: Callable[[], Inputs]
    """Builds forward's arguments."""


@dataclass(frozen=True)
class Feed:
    """All batches of a capture, in order."""

    loads: tuple[Load, ...]
    ids: NDArray[np.int64]
    """(token,) token ids, -1 where the model takes none."""
    doc: NDArray[np.int32]
    """(token,) number of the document."""
    position: NDArray[np.int32]
    """(token,) position that the model sees."""
    sha256: str
    description: str
    notes: tuple[str, ...] = ()


def probe_of_windows(module: nn.Module, windows: Windows, position_first: bool, device: torch.device) -> Inputs:
    """Return a small batch of real tokens on which to watch the model."""
    first = windows.batches(1)[0]
    row = windows.batch_ids(first)[0, :PROBE_POSITIONS]
    ids = torch.stack([row, row.flip(0)][:PROBE_DOCS])
    return token_inputs(module, (ids.T if position_first else ids).contiguous().to(device))


def probe_of_inputs(inputs: Inputs, position_first: bool) -> Inputs:
    """Return the first two documents of `inputs` (the first one twice if it is alone)."""
    axis = 1 if position_first else 0
    docs = main_input(inputs)[1].shape[axis]
    return select_docs(inputs, [0, min(1, docs - 1)], axis, docs)


def feed_windows(
    module: nn.Module, windows: Windows, batch_tokens: int, position_first: bool, device: torch.device
) -> Feed:
    """Return the feed of a corpus: windows of equal length share a batch."""

    def build(batch: Any) -> Callable[[], Inputs]:
        def inputs() -> Inputs:
            ids = windows.batch_ids(batch)
            return token_inputs(module, (ids.T if position_first else ids).contiguous().to(device))

        return inputs

    loads = tuple(Load(b.start, b.count, b.length, build(b)) for b in windows.batches(batch_tokens))
    return Feed(loads, windows.ids, windows.doc, windows.position, windows.sha256, windows.description, windows.notes)


def feed_inputs(inputs: Inputs, docs: int, positions: int, batch_tokens: int, position_first: bool) -> Feed:
    """Return the feed of given forward arguments, cut along the document axis.

    Args:
        inputs: forward's arguments.
        docs: number of documents in them.
        positions: length of the stream for each document (a ViT has one more than it has patches).
        batch_tokens: how many tokens to run at once.
        position_first: whether documents are counted along the second axis.
    """
    axis = 1 if position_first else 0
    count = max(1, batch_tokens // positions)

    def build(first: int, last: int) -> Callable[[], Inputs]:
        return lambda: select_docs(inputs, list(range(first, last)), axis, docs)

    loads = []
    for first in range(0, docs, count):
        last = min(docs, first + count)
        loads.append(Load(first * positions, last - first, positions, build(first, last)))
    ids = np.full(docs * positions, -1, np.int64)
    name, tokens = main_input(inputs)
    if not tokens.is_floating_point() and tokens.ndim == 2 and tokens.numel() == docs * positions:
        ids = (tokens.T if position_first else tokens).reshape(-1).cpu().numpy().astype(np.int64)
    return Feed(
        tuple(loads),
        ids,
        np.repeat(np.arange(docs, dtype=np.int32), positions),
        np.tile(np.arange(positions, dtype=np.int32), docs),
        _digest(inputs),
        f"given inputs ({name or 'one tensor'}, {docs} documents)",
    )


def select_docs(inputs: Inputs, docs: list[int], axis: int, total: int) -> Inputs:
    """Return the arguments of forward for some of the documents only.

    Args:
        inputs: forward's arguments for `total` documents.
        docs: which documents, by number.
        axis: the axis along which documents are counted.
        total: how many documents there are.

    Raises:
        UsageError: a tensor among the inputs has another number of documents.
    """

    def pick(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        if value.ndim <= axis or value.shape[axis] != total:
            raise UsageError(
                f"an input of shape {tuple(value.shape)} has no axis {axis} of {total} documents: give every tensor "
                "the same number of documents"
            )
        return value.index_select(axis, torch.tensor(docs, device=value.device))

    if isinstance(inputs, Mapping):
        return {name: pick(value) for name, value in inputs.items()}
    picked: Tensor = pick(inputs)
    return picked


def _digest(inputs: Inputs) -> str:
    digest = hashlib.sha256()
    named = inputs if isinstance(inputs, Mapping) else {"": inputs}
    for name in sorted(named):
        value = named[name]
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(f"{name} {value!r}".encode())
    return digest.hexdigest()
