"""The door for models: whatever a person has (a file, a folder, a class, a live module) becomes a `Model`.

No network, and no code from a file: only a factory that the user names, and pickles that the user allows by name.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamlens.checkpoint.hf_config import canonical, cleaned, read_config
from streamlens.checkpoint.model import Model, Tokenizer, config_of, fingerprint, unwrapped, wrap
from streamlens.checkpoint.nanogpt import NanoGPT, NanoGPTConfig, build_nanogpt
from streamlens.checkpoint.packing import is_packed, unpack
from streamlens.checkpoint.pickles import read_torch
from streamlens.checkpoint.pretrained import build_pretrained, load_gguf, tokenizer_in, weight_files
from streamlens.checkpoint.sniff import FileKind, sniff
from streamlens.checkpoint.weights import assign_state, private_copies, read_safetensors, state_dict_of, strip_prefixes
from streamlens.errors import CheckpointError, UsageError

__all__ = ["Model", "Tokenizer", "fingerprint", "load"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHARD = re.compile(r"-\d+-of-\d+$")

Config = str | os.PathLike[str] | Mapping[str, Any]
Factory = str | Callable[[], nn.Module]
Parts = tuple[nn.Module, dict[str, Any], Tokenizer | None]
"""A module, its config and its tokenizer: what every way of loading ends in."""


def load(
    source: str | os.PathLike[str] | nn.Module | Model | None = None,
    *,
    config: Config | None = None,
    factory: Factory | None = None,
    unsafe_pickle: bool = False,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Model:
    """Load a model and put it in order: eval mode, frozen parameters, a hash over config and weights.

    A live module is not touched: it is in eval mode and frozen only while something runs on it.

    Args:
        source: what `streamlens pack` wrote, a nanoGPT `ckpt.pt`, a state dict (bare, or in the wrapper of a training
            loop), a safetensors or GGUF file, a Hugging Face folder, or a live module, whose attribute `tokenizer` is
            used if it has a `Tokenizer` there. None if the factory is enough.
        config: for weights that bring none: a Hugging Face config or nanoGPT's `model_args`, as a dict or a JSON file.
            A config.json beside the weights is found by itself.
        factory: a function that makes the module, or its name as `package.module:function`; the weights of `source`
            are then loaded into it.
        unsafe_pickle: let a file run its own code, which a pickled module needs. Never for a file from a stranger.
        dtype: cast the weights; by default they keep the dtype they are stored in (float32 for GGUF).
        device: where the model is to be; by default the CPU.

    Raises:
        CheckpointError: no model in there, or config and weights disagree; the message says what to do.
        UnsafeFileError: the file would run code.
        UsageError: the arguments contradict each other.

    >>> model = load(nn.Embedding(50, 4))
    >>> model.vocab_size, model.source, len(model.sha256)
    (50, 'Embedding', 64)
    """
    if isinstance(source, Model | nn.Module):
        if config is not None or factory is not None:
            raise UsageError("a live module needs neither a config nor a factory")
        if dtype is not None or device is not None:
            raise UsageError("a live module is taken as it is: convert it yourself, module.to(...), before you load it")
        return source if isinstance(source, Model) else _live(source)
    cast_to, device = _dtype(dtype), _device(device)
    if factory is not None:
        if config is not None:
            raise UsageError("a factory makes the model by itself: give a config or a factory, not both")
        return _from_factory(factory, source, unsafe_pickle, cast_to, device)
    if source is None:
        raise UsageError("nothing to load: give a model file, a live module or a factory")
    path = Path(source).expanduser()
    module, description, tokenizer = _read(path, config, unsafe_pickle, cast_to)
    return wrap(module, str(source), description, tokenizer, device=device)


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise UsageError(f"dtype {dtype!r} is unknown: choose from {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def _device(device: str | torch.device | None) -> torch.device:
    """The device, if there is one of that name here."""
    try:
        found = torch.device("cpu" if device is None else device)
        there = torch.empty(0, device=found).device.type != "meta"  # which has no values
    except (
        RuntimeError,
        AssertionError,
        NotImplementedError,
    ) as error:  # it differs between builds
        raise UsageError(_no_device(device)) from error
    if not there:
        raise UsageError(_no_device(device))
    return found


def _no_device(device: object) -> str:
    graphics = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    found = ["cpu", *graphics, *["mps"] * torch.backends.mps.is_available()]
    return f"device {str(device)!r} cannot be used: PyTorch {torch.__version__} finds {', '.join(found)} here"


def _live(module: nn.Module) -> Model:
    inner = unwrapped(module)
    return wrap(inner, type(inner).__name__, _description(inner), _tokenizer_on(inner), ours=False)


def _tokenizer_on(module: nn.Module) -> Tokenizer | None:
    own = getattr(module, "tokenizer", None)
    return own if isinstance(own, Tokenizer) else None


def _description(module: nn.Module) -> dict[str, Any]:
    if isinstance(module, NanoGPT):
        return dataclasses.asdict(module.config)
    if hasattr(getattr(module, "config", None), "to_diff_dict"):
        return canonical(module)
    return config_of(module)


def _read(path: Path, config: Config | None, unsafe_pickle: bool, dtype: torch.dtype | None) -> Parts:
    kind = sniff(path)
    if kind is FileKind.GGUF:
        if config is not None:
            raise UsageError(f"{path} brings its own config: leave --config out")
        return load_gguf(path, dtype)
    if kind is FileKind.TORCH:
        return _read_torch_file(path, config, unsafe_pickle, dtype)
    if kind is FileKind.FOLDER:
        return _built(path, path, read_safetensors(weight_files(path)), config, dtype)
    if _SHARD.search(path.stem):
        raise CheckpointError(f"{path} is one part of several: give the folder {path.parent} that holds them all")
    return _built(path, path.parent, read_safetensors([path]), config, dtype)


def _read_torch_file(path: Path, config: Config | None, unsafe_pickle: bool, dtype: torch.dtype | None) -> Parts:
    loaded = read_torch(path, unsafe_pickle=unsafe_pickle)
    where = str(path)
    if is_packed(loaded):
        return unpack(loaded, where, dtype)
    if isinstance(loaded, nn.Module):
        module = unwrapped(loaded) if dtype is None else unwrapped(loaded).to(dtype)
        return module, _description(module), tokenizer_in(path.parent)
    state = state_dict_of(loaded, where)
    if config is None and isinstance(loaded, Mapping) and isinstance(loaded.get("model_args"), Mapping):
        config = loaded["model_args"]
    return _built(path, path.parent, private_copies(state), config, dtype)


def _built(
    path: Path, folder: Path, state: Mapping[str, Tensor], config: Config | None, dtype: torch.dtype | None
) -> Parts:
    """Make the model that a config describes, given or found in `folder`, and look there for the tokenizer."""
    if config is None:
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{path} holds weights without a config: give one with --config config.json, "
                "or make the model with --model package.module:factory"
            )
        config = folder / "config.json"
    elif not isinstance(config, Mapping):
        given = Path(config).expanduser()
        folder = given if given.is_dir() else given.parent
    settings = read_config(config)
    where = str(path)
    if NanoGPTConfig.describes(settings):
        module = build_nanogpt(settings, state, where, dtype=dtype)
        return module, _description(module), tokenizer_in(folder)
    settings = cleaned(settings, where)
    return build_pretrained(settings, state, where, dtype=dtype), settings, tokenizer_in(folder)


def _from_factory(
    factory: Factory,
    source: str | os.PathLike[str] | None,
    unsafe_pickle: bool,
    dtype: torch.dtype | None,
    device: torch.device,
) -> Model:
    module = _made(factory)
    name = factory if isinstance(factory, str) else f"{factory.__module__}:{factory.__qualname__}"
    if source is None:
        return _built_by(module, name, _tokenizer_on(module), dtype, device)
    path = Path(source).expanduser()
    kind = sniff(path)
    if kind is FileKind.TORCH:
        state = private_copies(state_dict_of(read_torch(path, unsafe_pickle=unsafe_pickle), str(path)))
    elif kind is FileKind.GGUF:
        raise UsageError(f"{path} brings its own architecture: leave --model out")
    else:
        state = read_safetensors(weight_files(path) if kind is FileKind.FOLDER else [path])
    assign_state(module, strip_prefixes(state, module.state_dict()), f"{path} and {name}")
    tokenizer = tokenizer_in(path if kind is FileKind.FOLDER else path.parent) or _tokenizer_on(module)
    return _built_by(module, str(source), tokenizer, dtype, device)


def _built_by(
    module: nn.Module, source: str, tokenizer: Tokenizer | None, dtype: torch.dtype | None, device: torch.device
) -> Model:
    if dtype is not None:
        module.to(dtype)
    return wrap(module, source, _description(module), tokenizer, device=device)


def _made(factory: Factory) -> nn.Module:
    """Call the factory, which is the user's own code and may live in the folder that the command runs in."""
    function = _imported(factory) if isinstance(factory, str) else factory
    with _importable_here():
        made = function()
    if not isinstance(made, nn.Module):
        raise CheckpointError(f"{factory} returned a {type(made).__name__}: a factory must return an nn.Module")
    return unwrapped(made)


def _imported(name: str) -> Callable[[], Any]:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise UsageError(f"{name!r} names no factory: write package.module:function")
    with _importable_here():
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise CheckpointError(f"{name}: {module_name} cannot be imported: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise CheckpointError(f"{name}: {module_name} has no function {attribute}")
    return function  # type: ignore[no-any-return]


@contextmanager
def _importable_here() -> Iterator[None]:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
