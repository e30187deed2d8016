"""A model in one file that torch reads without running code: architecture, weights and tokenizer."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamlens.checkpoint.hf_config import cleaned
from streamlens.checkpoint.model import Model, Tokenizer
from streamlens.checkpoint.nanogpt import NanoGPT, build_nanogpt
from streamlens.checkpoint.pretrained import build_pretrained, implementations_of, is_pretrained
from streamlens.checkpoint.tokenizers import ByteTokenizer, JsonTokenizer
from streamlens.checkpoint.weights import check_plain, memory_of, private_copies, state_dict_of
from streamlens.errors import CheckpointError, StorageError, UsageError

FORMAT = "streamlens-model"
FORMAT_VERSION = 1


def pack(model: Model, out: str | os.PathLike[str]) -> Path:
    """Write a model to one self-contained file, which `load` turns into the same model, bit for bit.

    The file appears when it is complete, in place of one that was there. Tied weights are stored once.

    Args:
        model: a nanoGPT or a transformers model.
        out: the file to write.

    Returns:
        The path of the file.

    Raises:
        CheckpointError: the model is of another class, which a config cannot describe, or its weights are quantised.
        UsageError: `out` is the file that the model was loaded from.
        StorageError: the file could not be written.
    """
    path = Path(out).expanduser()
    if path.exists() and Path(model.source).exists() and path.samefile(model.source):
        raise UsageError(f"{path} is the file that the model was loaded from: pack it under another name")
    state = _compact(model.module.state_dict())
    buffers = _compact({name: value for name, value in model.module.named_buffers() if name not in state})
    check_plain({**state, **buffers}, model.source)
    packed = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "architecture": _architecture(model),
        "state_dict": state,
        "buffers": buffers,
        "tokenizer": _tokenizer_entry(model.tokenizer),
    }
    _write(packed, path)
    return path


def _architecture(model: Model) -> dict[str, Any]:
    if isinstance(model.module, NanoGPT):
        return {"kind": "nanogpt", "args": dataclasses.asdict(model.module.config)}
    if is_pretrained(model.module):
        return {
            "kind": "transformers",
            "class": type(model.module).__name__,
            "config": cleaned(model.config, model.source),
            "implementations": implementations_of(model.module),
        }
    raise CheckpointError(
        f"{model.source}: a {type(model.module).__name__} cannot be rebuilt from a config: save its state_dict and "
        "load it with --model package.module:factory"
    )


def _tokenizer_entry(tokenizer: Tokenizer | None) -> dict[str, str] | None:
    if tokenizer is None:
        return None
    if isinstance(tokenizer, ByteTokenizer):
        return {"kind": "byte"}
    if isinstance(tokenizer, JsonTokenizer):
        return {"kind": "tokenizer.json", "json": tokenizer.json, "name": tokenizer.name}
    raise CheckpointError(
        f"the tokenizer {tokenizer.name} has no tokenizer.json and cannot be packed: set model.tokenizer = None"
    )


def _compact(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """On the CPU, each tensor with no more storage than it needs, tied ones still one tensor."""
    compact: dict[object, Tensor] = {}
    for tensor in state.values():
        if isinstance(tensor, Tensor) and memory_of(tensor) not in compact:
            host = tensor.detach().cpu().contiguous()
            is_part = host.layout is torch.strided and host.untyped_storage().nbytes() > host.nbytes
            compact[memory_of(tensor)] = host.clone() if is_part else host
    return {name: compact[memory_of(tensor)] for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _write(packed: Mapping[str, Any], path: Path) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        try:
            with partial.open("wb") as file:
                torch.save(packed, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        raise StorageError(f"{path} could not be written: {error}") from error


def is_packed(loaded: Any) -> bool:
    """Whether a file's content is what `pack` writes."""
    return isinstance(loaded, Mapping) and loaded.get("format") == FORMAT


def unpack(
    loaded: Mapping[str, Any], where: str, dtype: torch.dtype | None = None
) -> tuple[nn.Module, dict[str, Any], Tokenizer | None]:
    """Rebuild the module, config and tokenizer of a packed file.

    Args:
        loaded: what torch read from the file.
        where: the file, for messages.
        dtype: of the weights; None for each tensor's own.

    Raises:
        CheckpointError: a newer format, a damaged one, or config and weights disagree.
    """
    version = loaded.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"{where} has format version {version}, this streamlens reads up to {FORMAT_VERSION}: update it"
        )
    try:
        architecture, kind = loaded["architecture"], loaded["architecture"]["kind"]
        state = private_copies(state_dict_of(loaded["state_dict"], where))
        buffers = private_copies(loaded["buffers"])
        check_plain(buffers, where)
        tokenizer = _read_tokenizer(loaded["tokenizer"])
        if kind == "nanogpt":
            config = dict(architecture["args"])
            module: nn.Module = build_nanogpt(config, state, where, dtype=dtype)
        elif kind == "transformers":
            config = cleaned(architecture["config"], where)
            named = {**config, "architectures": [architecture["class"]]}
            forms = architecture.get("implementations", {})
            module = build_pretrained(named, state, where, dtype=dtype, implementations=forms)
        else:
            raise CheckpointError(f"{where}: unknown architecture {kind!r}: update streamlens")
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where} is a damaged packed model ({type(error).__name__}: {error})") from error
    if dtype is None:
        _restore(module, state, buffers)
    return module, config, tokenizer


def _restore(module: nn.Module, state: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    """Give back what is not as it was after building.

    transformers casts all weights to one dtype, and computes buffers that no state dict holds anew, in float32: the
    rotary frequencies of a model that was cast as a whole would come back unrounded, and give other logits.
    """
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        stored = buffers.get(name, state.get(name, tensor))
        if stored.shape == tensor.shape and (name in buffers or stored.dtype != tensor.dtype):
            tensor.data = stored


def _read_tokenizer(entry: Any) -> Tokenizer | None:
    if entry is None:
        return None
    if entry["kind"] == "byte":
        return ByteTokenizer()
    if entry["kind"] == "tokenizer.json":
        return JsonTokenizer(entry["json"], entry["name"])
    raise CheckpointError(f"unknown tokenizer {entry['kind']!r}: update streamlens")
