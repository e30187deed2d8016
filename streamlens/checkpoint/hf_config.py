"""Hugging Face configs from strangers: what is let through, and what a config is reduced to before it is hashed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamlens.errors import CheckpointError, UnsafeFileError

_DROPPED = {
    # These name code or other files: `attn_implementation` may be a repository of kernels, which would be run.
    "attn_implementation",
    "experts_implementation",
    "fusion_config",
    "transformers_weights",
    "name_or_path",
    # These say who wrote the file and how, not which model it is; the dtype is that of the weights.
    "transformers_version",
    "dtype",
    "torch_dtype",
}


def read_config(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Read a config from a JSON file, a folder with a config.json, or a dict.

    Raises:
        CheckpointError: there is no JSON object in it.
    """
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source).expanduser()
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: a config must be a JSON file, and this cannot be read as one: {error}"
        ) from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: a config must be a JSON object, not a {type(config).__name__}")
    return config


def cleaned(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The part of a Hugging Face config that describes the model, at every depth.

    Keys with a leading underscore go (`_attn_implementation_internal` once ran code from a hub, CVE-2026-4372), and
    those that choose code or files.

    Raises:
        UnsafeFileError: the model needs Python code that lies beside it.
        CheckpointError: its weights are quantised.

    >>> cleaned({"model_type": "llama", "_x": 1, "text_config": {"dtype": "float16", "n": 2}}, "config.json")
    {'model_type': 'llama', 'text_config': {'n': 2}}
    """
    if config.get("auto_map"):
        raise UnsafeFileError(
            f"{where}: auto_map names Python code that comes with the model ({config['auto_map']}), which is not run; "
            "build the model in Python and give it as a live module, or take auto_map out if transformers' own class "
            "is meant"
        )
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{where}: the weights are quantised, which is not loaded: dequantise them, "
            "or build the model in Python and give it as a live module"
        )
    for value in config.values():
        if isinstance(value, Mapping):
            cleaned(value, where)
    return _kept(config)


def _kept(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _kept(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if not str(key).startswith("_") and key not in _DROPPED
    }


def canonical(module: Any) -> dict[str, Any]:
    """The config of a live transformers model, as JSON values, with the class that it belongs to."""
    plain: dict[str, Any] = json.loads(json.dumps(module.config.to_diff_dict(), default=str))
    return {**_kept(plain), "architectures": [type(module).__name__]}
