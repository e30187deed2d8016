"""Words for people that several places need."""

from __future__ import annotations


def counted(n: int, noun: str) -> str:
    """Return a number with its noun, in the plural where it is not one.

    >>> counted(1, "document"), counted(2048, "token"), counted(0, "window")
    ('1 document', '2,048 tokens', '0 windows')
    """
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
