"""A loaded model: the module, what it was made from, and the hash that says which model it is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from streamlens.checkpoint.limits import position_limit, vocabulary_rows
from streamlens.errors import CheckpointError, UsageError
from streamlens.wording import counted

_CHUNK_BYTES = 1 << 26
"""Bytes hashed at a time: the copy from a device, or of a strided tensor's piece, stays this small."""


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back; `fingerprint` is equal for two tokenizers exactly when they cut text alike."""

    @property
    def name(self) -> str:
        """What people call it."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that it gives."""

    @property
    def fingerprint(self) -> str:
        """sha256 hex over all that decides how text is cut."""

    def encode(self, text: str) -> list[int]:
        """Token ids of one document, with the special tokens that the tokenizer puts around a document by itself."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; special tokens are shown."""


@dataclass(eq=False)
class Model:
    """A module and what is known about it.

    One that was loaded from a file is in eval mode and frozen; a caller's own is left as it is, and is both only while
    something runs on it.
    """

    module: nn.Module
    source: str
    """The path, factory or class that it came from."""
    sha256: str
    """`fingerprint(module, config)`: equal for two models with the same config and the same weights."""
    config: dict[str, Any]
    """Hyperparameters, as JSON values."""
    tokenizer: Tokenizer | None
    vocab_size: int | None
    """Rows of the input embedding; None for a model that takes no token ids."""
    max_positions: int | None
    """Longest input that the model has positions for; None where there is no hard limit."""

    def __repr__(self) -> str:
        """Return one line: class, parameters, dtype, source and hash."""
        own = list(self.module.parameters())
        dtypes = " and ".join(sorted({str(p.dtype).removeprefix("torch.") for p in own}))
        size = f"{counted(sum(p.numel() for p in own), 'parameter')}{', ' * bool(dtypes)}{dtypes}"
        return f"<model {type(self.module).__name__}: {size}, from {self.source}, sha256 {self.sha256[:16]}>"


def module_of(model: Model | nn.Module) -> nn.Module:
    """Return the module of a loaded model; a module is its own.

    Raises:
        UsageError: it is neither.
    """
    found = model.module if isinstance(model, Model) else model
    if not isinstance(found, nn.Module):
        raise UsageError(f"give a module or a loaded model (sl.load), not {type(found).__name__} {found!r:.60}")
    return found


def wrap(
    module: nn.Module,
    source: str,
    config: dict[str, Any],
    tokenizer: Tokenizer | None = None,
    device: str | torch.device | None = None,
    *,
    ours: bool = True,
) -> Model:
    """Freeze a module, hash it, move it to its device and note its limits.

    Args:
        module: any module.
        source: where it came from.
        config: its hyperparameters as JSON values; part of the hash.
        tokenizer: the one that belongs to it.
        device: move there; None leaves it where it is.
        ours: nobody else uses it, so it is put into eval mode and its parameters no longer require gradients. A
            caller's own module is not touched.
    """
    if ours:
        module.eval().requires_grad_(False)
    sha256 = fingerprint(module, config)
    if device is not None:
        module.to(device)
    return Model(
        module=module,
        source=source,
        sha256=sha256,
        config=config,
        tokenizer=tokenizer,
        vocab_size=vocabulary_rows(module),
        max_positions=position_limit(module, config),
    )


def fingerprint(module: nn.Module, config: Mapping[str, Any]) -> str:
    """Hash a config and every tensor of a module's state: name, dtype, shape and bytes, in name order.

    Bytes are hashed as they lie in memory, in pieces, so no dtype is converted and nothing large is copied.

    Raises:
        CheckpointError: the module holds no data yet (it lies on the meta device).

    >>> a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> _ = b.load_state_dict(a.state_dict())
    >>> fingerprint(a, {}) == fingerprint(b, {}), fingerprint(a, {}) == fingerprint(a, {"n_layer": 1})
    (True, False)
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode())
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, Tensor):  # a module's extra state, which takes no part in its arithmetic
            continue
        if tensor.is_meta:
            raise CheckpointError(f"'{name}' is on the meta device and has no values: load the weights first")
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for piece in _pieces(tensor.detach()):
            digest.update(piece.view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    if tensor.is_contiguous():
        yield from torch.split(tensor.reshape(-1), _CHUNK_BYTES // tensor.itemsize)
    else:  # row by row, because making a strided tensor contiguous copies it
        for block in torch.split(tensor, max(1, _CHUNK_BYTES // tensor[0].nbytes)):
            yield block.contiguous().reshape(-1)


def config_of(module: nn.Module) -> dict[str, Any]:
    """Describe a module that came without a config: its class, and its own `config` where that is plain data.

    >>> config_of(nn.Linear(1, 1))
    {'class': 'Linear'}
    """
    own = getattr(module, "config", None)
    if dataclasses.is_dataclass(own) and not isinstance(own, type):
        own = {field.name: getattr(own, field.name) for field in dataclasses.fields(own)}
    plain = _plain(own) if isinstance(own, Mapping) else {}
    return {"class": type(module).__qualname__, **plain}


def _plain(values: Mapping[Any, Any]) -> dict[str, Any]:
    """The entries that JSON can hold; the text of any other object may contain an address, which changes every run."""
    kept = {}
    for key, value in values.items():
        try:
            kept[str(key)] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            continue
    return kept


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, `DataParallel` and `DistributedDataParallel`, however nested."""
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module
