"""Text to token ids: bytes, a `tokenizer.json`, or a Hugging Face tokenizer that has none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any, cast

from streamlens.checkpoint.model import Tokenizer
from streamlens.errors import CheckpointError


class ByteTokenizer:
    """One token per byte of UTF-8.

    >>> ByteTokenizer().encode("né"), ByteTokenizer().decode([110, 195, 169])
    ([110, 195, 169], 'né')
    """

    name = "byte"
    vocab_size = 256
    fingerprint = hashlib.sha256(b"byte").hexdigest()

    def encode(self, text: str) -> list[int]:
        """The bytes of the text."""
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the bytes; a broken sequence, or an id that is no byte, shows as U+FFFD."""
        no_byte = b"\xff"  # never part of UTF-8
        return b"".join(bytes([i]) if 0 <= i < self.vocab_size else no_byte for i in ids).decode(errors="replace")


class JsonTokenizer:
    """A tokenizer rebuilt from the text of a `tokenizer.json`.

    Truncation and padding settings are taken out of it, or some tokenizers would cut every document at 128 tokens.
    """

    def __init__(self, text: str, name: str) -> None:
        """Parse the text.

        Raises:
            CheckpointError: the text is no tokenizer, or the package that reads it is missing.
        """
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError as error:
            raise CheckpointError(f"{error}: tokenizers need the extra 'hf' of residual-streamlens") from None
        try:
            settings = json.loads(text) | {"truncation": None, "padding": None}
            self.json = json.dumps(settings, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
            self._backend: Any = Backend.from_str(self.json)
        except Exception as error:  # the Rust parser raises plain Exception
            raise CheckpointError(f"{name}: not a tokenizer.json ({error})") from error
        self.name = name
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.fingerprint = hashlib.sha256(self.json.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the tokenizer's own template adds."""
        return cast(list[int], self._backend.encode(text).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text, special tokens included."""
        return cast(str, self._backend.decode(list(ids), skip_special_tokens=False))


class HFTokenizer:
    """A Hugging Face tokenizer that is written in Python, and so has no `tokenizer.json`."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        """Wrap it; its vocabulary and class are its fingerprint."""
        self._tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        self.name = name
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.fingerprint = hashlib.sha256(
            json.dumps([type(tokenizer).__name__, vocabulary], sort_keys=True).encode()
        ).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the tokenizer adds."""
        return cast(list[int], self._tokenizer.encode(text))

    def decode(self, ids: Iterable[int]) -> str:
        """The text, special tokens included."""
        return cast(str, self._tokenizer.decode(list(ids), skip_special_tokens=False))


def from_hf(tokenizer: Any, name: str) -> Tokenizer:
    """Adapt a Hugging Face tokenizer: as its `tokenizer.json` where it has one, else as it is."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if hasattr(backend, "to_str"):
        return JsonTokenizer(backend.to_str(), name)
    return HFTokenizer(tokenizer, name)
