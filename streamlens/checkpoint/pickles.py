"""torch.save files: read without running any code in them, unless the user typed that it may run."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import torch

from streamlens.checkpoint.sniff import check_crc
from streamlens.errors import CheckpointError, UnsafeFileError

_MIN_TORCH = (2, 10)
_SHOWN = 8

_log = logging.getLogger(__name__)


def read_torch(path: Path, *, unsafe_pickle: bool = False) -> Any:
    """Read what `torch.save` wrote.

    Tensors, numbers, strings and containers are read. For anything else the file asks to run code: that is refused,
    unless `unsafe_pickle` allows it. A refused file is never tried again without the check.

    Raises:
        UnsafeFileError: the file wants to run code; the message names what.
        CheckpointError: the file is damaged, or this torch is too old to read it safely.
    """
    require_safe_torch(torch.__version__)
    check_crc(path)
    try:
        # Mapped: the optimizer's state beside the weights, twice their size, is then never read.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        wanted = unsafe_globals(path)
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{path} is damaged ({_first_line(error)}): copy or save it again") from error
    if not unsafe_pickle:
        raise UnsafeFileError(
            f"{path} holds more than tensors and would run code when opened: it wants {wanted}; save "
            "model.state_dict() instead, or, if you trust whoever made it, pass --unsafe-pickle (unsafe_pickle=True)"
        )
    _log.warning("%s: running the code that it asks for, as --unsafe-pickle says: %s", path, wanted)
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # the file's own code runs here
        raise CheckpointError(
            f"{path} could not be unpickled ({_first_line(error)}): the classes it names must be importable"
        ) from error


def unsafe_globals(path: Path) -> str:
    """Name the functions and classes that a file would call, without calling them; torch's own come last.

    Raises:
        CheckpointError: the pickle in it is damaged.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{path} is damaged ({_first_line(error)}): copy or save it again") from error
    names = sorted(set(names), key=lambda name: (name.startswith("torch."), name))
    if not names:
        return "something that cannot be named"
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def require_safe_torch(version: str) -> None:
    """Refuse a torch whose safe unpickler has known holes.

    Raises:
        CheckpointError: older than 2.10.

    >>> require_safe_torch("2.10.0+cpu")
    """
    major, minor = version.split(".")[:2]
    if (int(major), int(minor)) < _MIN_TORCH:
        raise CheckpointError(
            f"torch {version} cannot read .pt files safely (CVE-2025-32434, CVE-2026-24747): "
            "install torch 2.10 or newer, or give the weights as safetensors"
        )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
