"""Models of the transformers library: from a folder, from a config and weights, and from GGUF; never from a hub.

transformers is given a config object and tensors, and never a folder: whatever else a folder holds (an adapter that
points elsewhere, a generation config with code, weights in pickles) is not looked at.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from streamlens.checkpoint.hf_config import canonical
from streamlens.checkpoint.model import Tokenizer
from streamlens.checkpoint.tokenizers import JsonTokenizer, from_hf
from streamlens.checkpoint.weights import disagreement, stored_dtype, strip_prefixes
from streamlens.errors import CheckpointError, UnsafeFileError

_INDEX = "model.safetensors.index.json"
_UNUSED_HEADS = {"cls", "pooler", "lm_head"}
"""Weights of heads that a file may hold beside the model that its config names: BERT's own come with a second head."""

_ALLOWED_IMPLEMENTATIONS = {"attn": {"eager", "sdpa"}, "experts": {"eager", "batched_mm", "grouped_mm"}}
"""The arithmetic that a packed model may ask for: transformers takes any other word for the name of a hub kernel."""

_VOCABULARIES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", "vocab.json")
"""Files that transformers makes a tokenizer from where there is no tokenizer.json."""

_log = logging.getLogger(__name__)


def build_pretrained(
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    where: str,
    *,
    dtype: torch.dtype | None = None,
    implementations: Mapping[str, str] | None = None,
) -> nn.Module:
    """Make the transformers model that a config names and give it its weights.

    Args:
        config: a config.json, already `cleaned`; `architectures[0]` is the class.
        state: weights by name, prefixes of training wrappers still on.
        where: the file, for messages.
        dtype: of the weights; None for the one that most of them are stored in.
        implementations: which of several equivalent forms of attention and experts to run, as `implementations_of`.

    Raises:
        CheckpointError: transformers does not know the class, or config and weights disagree.
    """
    with quiet_and_offline():
        model_class = _model_class(config, where)
        try:
            settings = model_class.config_class.from_dict(dict(config))
            with torch.device("meta"):
                expected = set(model_class(settings).state_dict())
        except Exception as error:  # transformers raises whatever its model code raises
            raise CheckpointError(
                f"{where}: {_named(model_class)} cannot be built from this config: {error}"
            ) from error
        for kind, name in (implementations or {}).items():
            if name in _ALLOWED_IMPLEMENTATIONS.get(kind, ()):
                setattr(settings, f"_{kind}_implementation", name)
        base = f"{model_class.base_model_prefix}."
        weights = strip_prefixes(state, expected | {name.removeprefix(base) for name in expected})
        try:
            model, info = model_class.from_pretrained(
                None,
                config=settings,
                state_dict=weights,
                dtype=dtype or stored_dtype(weights),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in `info`, and refused below with both shapes
                **_without_pooler(model_class, weights),
            )
        except Exception as error:
            raise CheckpointError(f"{where}: the weights do not fit {_named(model_class)}: {error}") from error
    _check_loaded(info, where)
    return cast(nn.Module, model)


def _model_class(config: Mapping[str, Any], where: str) -> Any:
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError(f'{where}: the config names no class: add "architectures", such as ["LlamaForCausalLM"]')
    transformers = _transformers()
    try:
        found: Any = getattr(transformers, names[0], None)
    except (ImportError, RuntimeError) as error:  # the class exists, and needs a package that is missing
        raise CheckpointError(f"{where}: {names[0]} cannot be imported: {error}") from error
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    if not is_model or not found.config_class:
        raise CheckpointError(
            f"{where}: transformers {transformers.__version__} has no model class {names[0]}: "
            "install a newer one, or build the model with --model package.module:factory"
        )
    wanted, given = found.config_class.model_type, config.get("model_type", found.config_class.model_type)
    if wanted != given:
        raise CheckpointError(f"{where}: the config has model_type {given!r}, but {names[0]} needs {wanted!r}")
    return found


def _without_pooler(model_class: Any, weights: Mapping[str, Tensor]) -> dict[str, bool]:
    """A bare encoder stored without its pooler is built without it: a random one would be another model every time."""
    has_choice = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    stored = any("pooler" in name.split(".") for name in weights)
    return {"add_pooling_layer": False} if has_choice and not stored else {}


def _check_loaded(info: Mapping[str, Any], where: str) -> None:
    unexpected = {name for name in info["unexpected_keys"] if not _UNUSED_HEADS & set(name.split("."))}
    if info["missing_keys"] or unexpected or info["mismatched_keys"]:
        raise disagreement(where, info["missing_keys"], unexpected, info["mismatched_keys"])
    if info["error_msgs"]:
        raise CheckpointError(f"{where}: {'; '.join(info['error_msgs'])}")


def implementations_of(module: nn.Module) -> dict[str, str]:
    """Which equivalent forms of attention and experts a live model runs: they differ in the last bits."""
    found = {
        kind: getattr(getattr(module, "config", None), f"_{kind}_implementation", None)
        for kind in _ALLOWED_IMPLEMENTATIONS
    }
    return {kind: name for kind, name in found.items() if name in _ALLOWED_IMPLEMENTATIONS[kind]}


def is_pretrained(module: nn.Module) -> bool:
    """Whether a module is of a class that the installed transformers brings, and not of a subclass of one."""
    if not type(module).__module__.startswith("transformers."):
        return False
    transformers = _transformers()
    return isinstance(module, transformers.PreTrainedModel) and (
        getattr(transformers, type(module).__name__, None) is type(module)
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, in the order of its index.

    Raises:
        CheckpointError: there are none, or one is missing.
        UnsafeFileError: the index names a file outside the folder.
    """
    index = folder / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} is damaged: {error}") from error
    else:
        names = ["model.safetensors"]
    for name in names:
        if Path(name).name != name:
            raise UnsafeFileError(f"{index} names a file outside its folder: {name}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing and (folder / "pytorch_model.bin").is_file():
        raise CheckpointError(
            f"{folder} holds no safetensors: give {folder / 'pytorch_model.bin'} instead of the folder"
        )
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}: fetch the rest of the model")
    return [folder / name for name in names]


def load_gguf(path: Path, dtype: torch.dtype | None) -> tuple[nn.Module, dict[str, Any], Tokenizer | None]:
    """Read a GGUF file: the weights unpacked to float32 (or `dtype`), and the tokenizer in it.

    Raises:
        CheckpointError: the file is damaged, or transformers cannot read its architecture.
    """
    with quiet_and_offline(), tempfile.TemporaryDirectory() as folder:
        # Alone in a folder, so that nothing beside the file has a say in what is loaded.
        Path(folder, "model.gguf").symlink_to(path.resolve())
        transformers = _transformers()
        source: dict[str, Any] = {"gguf_file": "model.gguf", "local_files_only": True, "trust_remote_code": False}
        unpack = transformers.GgufConfig(dequantize=True) if hasattr(transformers, "GgufConfig") else None
        try:
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                folder, **source, dtype=dtype or torch.float32, output_loading_info=True, quantization_config=unpack
            )
        except Exception as error:  # a damaged file can raise anything
            raise CheckpointError(f"{path} cannot be read as GGUF: {error}") from error
        try:
            tokenizer = from_hf(transformers.AutoTokenizer.from_pretrained(folder, **source), path.stem)
        except Exception as error:
            _log.warning("%s: the tokenizer in it cannot be read: %s", path, error)
            tokenizer = None
    _check_loaded(info, str(path))
    if hasattr(model.config, "quantization_config"):  # a note about the file: the weights are not quantised any more
        del model.config.quantization_config
    return model, canonical(model), tokenizer


def tokenizer_in(folder: Path) -> Tokenizer | None:
    """The tokenizer whose files lie in a folder, or None.

    Raises:
        CheckpointError: the files are there, but make no tokenizer, or one that needs the code that lies beside them.
    """
    name, file = folder.resolve().name, folder / "tokenizer.json"
    if file.is_file():
        try:
            return JsonTokenizer(file.read_text(encoding="utf-8"), name)
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
    is_model_folder = (folder / "config.json").is_file()
    if not is_model_folder or not any((folder / vocabulary).is_file() for vocabulary in _VOCABULARIES):
        return None
    with quiet_and_offline():
        auto = _transformers().AutoTokenizer
        try:
            found = auto.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises whatever its tokenizer code raises
            raise CheckpointError(f"{folder}: the tokenizer cannot be read: {error}") from error
    return from_hf(found, name)


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise CheckpointError(f"{error}: this model needs the extra 'hf' of residual-streamlens") from None


def _named(model_class: Any) -> str:
    return str(model_class.__name__)


@contextlib.contextmanager
def quiet_and_offline() -> Iterator[None]:
    """Nothing is fetched and nothing is printed while a model loads; before and after, the settings are the user's."""
    chatter: Any = _transformers().logging
    hub: Any = importlib.import_module("huggingface_hub.constants")
    offline, verbosity = hub.HF_HUB_OFFLINE, chatter.get_verbosity()
    variable = os.environ.get("HF_HUB_OFFLINE")
    hub.HF_HUB_OFFLINE = True  # read at import, so the variable alone would come too late
    os.environ["HF_HUB_OFFLINE"] = "1"
    chatter.set_verbosity_error()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # the bars write to stderr
            warnings.simplefilter("ignore")
            yield
    finally:
        hub.HF_HUB_OFFLINE = offline
        chatter.set_verbosity(verbosity)
        if variable is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = variable
