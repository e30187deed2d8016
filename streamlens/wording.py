"""Words for people that several places need."""

from __future__ import annotations

from pathlib import Path


def counted(n: int, noun: str) -> str:
    """Return a number with its noun, in the plural where it is not one.

    >>> counted(1, "document"), counted(2048, "token"), counted(0, "window")
    ('1 document', '2,048 tokens', '0 windows')
    """
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def human_bytes(count: int) -> str:
    """Return a byte count as people read it.

    >>> human_bytes(1536), human_bytes(7)
    ('1.5 KiB', '7 bytes')
    """
    if count < 1024:
        return f"{count} bytes"
    size, units = count / 1024, ["KiB", "MiB", "GiB", "TiB", "PiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.1f} {units[0]}"


def model_name(source: str) -> str:
    """Return what a model is called in titles and file names: the last part of its path, or of the one above a folder
    that is called no more than ``model``.

    >>> model_name("there/gpt2.safetensors"), model_name("there/Qwen2.5-0.5B/model"), model_name("GPT2LMHeadModel")
    ('gpt2.safetensors', 'Qwen2.5-0.5B', 'GPT2LMHeadModel')
    """
    path = Path(source)
    if path.name in ("", ".."):  # a folder by where it lies from here
        path = path.resolve()
    if path.name == "model" and path.parent.name not in ("", ".."):
        path = path.parent
    return path.name or source
