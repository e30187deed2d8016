"""Words for people that several places need."""

from __future__ import annotations


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
