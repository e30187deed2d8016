"""Where documents come from: text files, JSON lines, arrays of token ids, the built-in text, random tokens.

Readers of text are generators: a corpus of any size costs only what is taken from it.
"""

from __future__ import annotations

import codecs
import json
import os
import pydoc_data.topics
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from streamlens.errors import CorpusError

IntArray = NDArray[np.int64]

BUILTIN_TEXT = f"built-in English text (the topics of Python {sys.version_info[0]}.{sys.version_info[1]}'s manual)"
"""Names the Python version, because the text is that of the interpreter and changes a little from one to the next."""

STDIN = Path("-")

Text = str | Path | Iterable[str | Path]
"""Documents: a string is one as it stands, a `Path` stands for what lies there."""

_OTHER_READERS = {".jsonl": "--jsonl", ".npy": "--tokens", ".bin": "--tokens"}


def builtin_documents() -> list[str]:
    """English text that every Python carries: the topics of its manual, one document each, in order of their names.

    >>> len(builtin_documents()) > 50
    True
    """
    topics: dict[str, str] = pydoc_data.topics.topics
    return [topics[name] for name in sorted(topics)]


def read_documents(text: Text) -> Iterator[str]:
    """Documents in any form: strings as they are, paths read as `text_documents` reads them.

    Raises:
        CorpusError: as `text_documents`; also a lone string that names a file, which is surely meant to be read.

    >>> list(read_documents(["one", "two"]))
    ['one', 'two']
    """
    if isinstance(text, str) and os.path.isfile(text):  # noqa: PTH113 - Path.is_file raises on a text's length
        raise CorpusError(f"the text {text!r} is the name of a file: pass pathlib.Path({text!r}) to read it")
    for item in [text] if isinstance(text, (str, Path)) else text:
        if isinstance(item, Path):
            yield from text_documents(item)
        else:
            yield item


def text_documents(paths: Path | str | Iterable[Path | str], *, encoding: str = "utf-8") -> Iterator[str]:
    """Read text files, one document each; a folder stands for all its *.txt files, `-` for standard input.

    Line ends become a plain newline and a byte order mark is dropped, so that a file gives the same tokens on every
    system; nothing else is changed.

    Raises:
        CorpusError: a path that does not exist or is of another kind, or bytes that are not `encoding`.
    """
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        for file in _text_files(Path(path)):
            name = "standard input" if file == STDIN else str(file)
            data = sys.stdin.buffer.read() if file == STDIN else file.read_bytes()
            yield _decode(data, name, encoding).replace("\r\n", "\n")


def jsonl_documents(path: Path | str, *, text_key: str = "text") -> Iterator[str]:
    """Read a file of JSON lines: each object is a document, its text under `text_key`. Empty lines are skipped.

    Raises:
        CorpusError: names file and line of what is not JSON, is no object, or has no text under the key.
    """
    path = Path(path)
    _require_file(path)
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _json_text(line, f"{path}:{number}", text_key)


def load_ids(path: Path | str) -> list[NDArray[Any]]:
    """Map a file of token ids into memory: .npy (1-d: one document, 2-d: each row one) or .bin (uint16, one document).

    Raises:
        CorpusError: a file that does not exist, is of another kind, or does not hold integers.
    """
    path = Path(path)
    _require_file(path)
    if path.suffix == ".bin":
        return [_map_uint16(path)]
    if path.suffix != ".npy":
        raise CorpusError(f"{path}: token ids are read from .npy (integers) or .bin (uint16) files")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise CorpusError(f"{path}: not a .npy file of integers ({error})") from error
    return _rows(array, str(path))


def id_documents(ids: Any) -> list[NDArray[Any]]:
    """Token ids in any form -> documents, each an integer array (token,).

    Takes a tensor or array (1-d: one document, 2-d: each row one), a list of ids, a list of documents, or the `Path`
    of a file that `load_ids` reads.

    Raises:
        CorpusError: what is not integers, or has another number of axes.

    >>> [document.tolist() for document in id_documents([[1, 2], [3]])]
    [[1, 2], [3]]
    """
    if isinstance(ids, Path):
        return load_ids(ids)
    if isinstance(ids, (torch.Tensor, np.ndarray)):
        return _rows(_as_array(ids), "token ids")
    if not isinstance(ids, Sequence) or isinstance(ids, str):
        raise CorpusError(f"token ids are a tensor, an array, a list or the Path of a file, not {type(ids).__name__}")
    if not any(isinstance(item, (Sequence, np.ndarray, torch.Tensor)) for item in ids):
        return _rows(_as_array(ids), "token ids")
    documents: list[NDArray[Any]] = []
    for number, item in enumerate(ids):
        array = _as_array(item)
        if array.ndim != 1:
            raise CorpusError(f"document {number} of the token ids has {array.ndim} axes: a document is a list of ids")
        documents += _rows(array, f"document {number} of the token ids")
    return documents


def random_tokens(vocab_size: int, n: int, seed: int) -> IntArray:
    """Draw `n` token ids, (token,), uniformly from the vocabulary; the same seed draws the same ids.

    Raises:
        CorpusError: an empty vocabulary or no tokens.

    >>> random_tokens(10, 4, seed=0).tolist() == random_tokens(10, 4, seed=0).tolist()
    True
    """
    if vocab_size < 1 or n < 1:
        raise CorpusError(f"cannot draw {n} tokens from a vocabulary of {vocab_size}: both must be at least 1")
    return np.random.default_rng(seed).integers(0, vocab_size, size=n, dtype=np.int64)


def checked_text(text: str, number: int) -> str:
    """Return the text of document `number` if it is valid Unicode.

    Raises:
        CorpusError: a lone surrogate (JSON can carry one), which no tokenizer can encode; or something else than text.
    """
    if not isinstance(text, str):
        raise CorpusError(f"document {number} is {type(text).__name__}, not text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"document {number} holds half of a surrogate pair ({text[error.start]!r}) at character {error.start:,}: "
            "remove it or leave the document out"
        ) from error
    return text


def _text_files(path: Path) -> list[Path]:
    if path == STDIN:
        return [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*.txt") if file.is_file())
        if not files:
            raise CorpusError(f"{path}: no *.txt file in this folder")
        return files
    _require_file(path)
    if path.suffix in _OTHER_READERS:
        raise CorpusError(f"{path} is not plain text: pass it with {_OTHER_READERS[path.suffix]}")
    return [path]


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise CorpusError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    if not os.access(path, os.R_OK):
        raise CorpusError(f"{path}: may not be read (permission denied)")


def _decode(data: bytes, name: str, encoding: str) -> str:
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        guess = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "cp1252"
        raise CorpusError(
            f"{name}: byte 0x{data[error.start]:02x} at offset {error.start:,} is not {encoding}; if the text is "
            f"{guess}, convert it with: iconv -f {guess} -t utf-8"
        ) from error


def _json_text(line: bytes, where: str, text_key: str) -> str:
    try:
        record = json.loads(_decode(line, where, "utf-8"))
    except json.JSONDecodeError as error:
        raise CorpusError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(record, dict):
        raise CorpusError(f'{where}: an object like {{"{text_key}": "..."}} is expected, not {type(record).__name__}')
    if text_key not in record:
        found = ", ".join(map(repr, record)) or "none"
        raise CorpusError(f"{where}: no key {text_key!r}; keys found: {found} (choose one with --text-key)")
    text = record[text_key]
    if not isinstance(text, str):
        raise CorpusError(f"{where}: the value of {text_key!r} is {type(text).__name__}, not text")
    return text


def _map_uint16(path: Path) -> NDArray[np.uint16]:
    size = path.stat().st_size
    if size % 2:
        raise CorpusError(f"{path}: {size:,} bytes are no whole number of uint16 token ids")
    return np.memmap(path, dtype="<u2", mode="r") if size else np.zeros(0, dtype=np.uint16)


def _as_array(ids: Any) -> NDArray[Any]:
    if isinstance(ids, torch.Tensor):
        ids = ids.detach().cpu()
    try:
        return np.asarray(ids)
    except (TypeError, ValueError, OverflowError) as error:
        raise CorpusError(f"token ids that are no array of integers ({error})") from error


def _rows(array: NDArray[Any], name: str) -> list[NDArray[Any]]:
    """The documents of an array, after checking that it holds integers on one or two axes."""
    if array.ndim not in (1, 2):
        raise CorpusError(f"{name}: {array.ndim} axes {array.shape}; 1 (one document) or 2 (one per row) are expected")
    if array.size and array.dtype.kind not in "iu":
        raise CorpusError(f"{name}: {array.dtype} values; token ids are integers")
    return [array] if array.ndim == 1 else list(array)
