"""What a capture runs: batches of model inputs, and which document and position each row of the file stands for."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from streamlens.anatomy import Anatomy
from streamlens.calling import Inputs, token_inputs
from streamlens.corpus.windows import Windows
from streamlens.discovery.layout import main_input
from streamlens.errors import UsageError
from streamlens.wording import counted

PROBE_DOCS, PROBE_POSITIONS = 2, 8
"""Size of the small batch on which a model is understood before it is captured."""

_WITHOUT_EFFECT = {"use_cache", "return_dict", "output_attentions", "output_hidden_states"}
"""Arguments of forward that change no state."""


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
    further: tuple[str, ...] = ()
    """Arguments of forward that the ids alone do not give, and without which it is another run."""


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


def feed_inputs(
    module: nn.Module, inputs: Inputs, docs: int, positions: int, batch_tokens: int, position_first: bool
) -> Feed:
    """Return the feed of given forward arguments, cut along the document axis.

    Args:
        module: the model.
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
        f"given inputs ({name or 'one tensor'}, {counted(docs, 'document')})",
        further=_further(module, inputs),
    )


def refuse_padding(inputs: Inputs, anatomy: Anatomy, streams: Collection[str]) -> None:
    """Make sure that every token of the streams that are looked at is text.

    A mask hides padding from the other tokens, but padding has states of its own, at positions that the model may
    count otherwise: it would enter every mean, and the loss would be asked to predict it.

    Args:
        inputs: forward's arguments; of them, two-dimensional padding masks are looked at.
        anatomy: the model's streams; with several, a mask belongs to the decoder if its name says so.
        streams: names of those that are looked at.

    Raises:
        UsageError: a mask marks padding in one of them.
    """
    head = anatomy.head.stream
    for name, mask in _masks(inputs):
        is_heads = name.startswith(("decoder_", "tgt_"))
        concerned = [s for s in streams if len(anatomy.streams) == 1 or (s == head) == is_heads]
        hidden = int(_hidden(name, mask).sum())
        if hidden and concerned:
            raise UsageError(
                f"{name} marks {hidden:,} of {mask.numel():,} tokens as padding, which would be counted as text: pass "
                "each document without padding, as tokens=[[...], [...]] with ragged=True (or, where inputs are no "
                "token ids, documents of one length at a time)"
            )


def _masks(inputs: Inputs) -> list[tuple[str, Tensor]]:
    if not isinstance(inputs, Mapping):
        return []
    named = [(n, v) for n, v in inputs.items() if n.endswith(("attention_mask", "key_padding_mask"))]
    return [(name, value) for name, value in named if isinstance(value, Tensor) and value.ndim == 2]


def _hidden(name: str, mask: Tensor) -> Tensor:
    """Where a mask marks padding: with 0 as transformers does, with True as PyTorch does, or with a negative number."""
    if mask.is_floating_point() and bool((mask < 0).any()):
        return mask < 0
    return mask != 0 if name.endswith("key_padding_mask") and not mask.is_floating_point() else mask == 0


def _further(module: nn.Module, inputs: Inputs) -> tuple[str, ...]:
    """Name what is not as `token_inputs` would make it from the main input alone."""
    if not isinstance(inputs, Mapping):
        return ()
    ids = main_input(inputs)[1]
    made = token_inputs(module, ids)
    if isinstance(made, Tensor):
        made = {next(iter(inspect.signature(module.forward).parameters)): made}
    empty = {name for name, mask in _masks(inputs) if not bool(_hidden(name, mask).any())}
    given = {name: value for name, value in inputs.items() if value is not None and name not in empty}

    def same(name: str) -> bool:
        ours, theirs = made.get(name), given.get(name)
        return isinstance(ours, Tensor) and isinstance(theirs, Tensor) and torch.equal(ours, theirs)

    names = dict.fromkeys([*given, *made])
    return tuple(name for name in names if name not in _WITHOUT_EFFECT and not same(name))


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
