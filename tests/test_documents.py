"""Documents and token ids from text, JSON lines and arrays; what is neither is refused with its place."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from streamlens.corpus.documents import (
    id_documents,
    jsonl_documents,
    load_ids,
    random_tokens,
    read_documents,
    text_documents,
)
from streamlens.corpus.windows import (
    windows_from_ids,
)
from streamlens.errors import CorpusError


def test_text_files_are_one_document_each(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\nstill one")
    (tmp_path / "sub" / "a.txt").write_text("two")
    (tmp_path / "ignored.md").write_text("three")
    assert list(text_documents(tmp_path)) == ["one\n\nstill one", "two"]
    assert list(text_documents([tmp_path / "sub" / "a.txt", tmp_path / "b.txt"])) == ["two", "one\n\nstill one"]


def test_documents_are_strings_or_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes.txt").write_text("from the file")
    monkeypatch.chdir(tmp_path)
    assert list(read_documents(Path("notes.txt"))) == ["from the file"]
    assert list(read_documents(["notes.txt", Path("notes.txt")])) == ["notes.txt", "from the file"]
    for plain in ("x" * 5000, "a\0b", ""):
        assert list(read_documents(plain)) == [plain]
    with pytest.raises(CorpusError, match=r"name of a file: pass pathlib\.Path\('notes\.txt'\) to read it"):
        list(read_documents("notes.txt"))


def test_a_dash_is_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("π\r\n".encode()), encoding="ascii"))
    assert list(text_documents("-")) == ["π\n"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", "caf\xe9s".encode("latin-1"), r"latin\.txt: byte 0xe9 at offset 3 is not utf-8.* cp1252"),
        ("wide.txt", "a".encode("utf-16"), r"offset 0 is not utf-8.* iconv -f utf-16"),
        ("data.jsonl", b"{}", r"data\.jsonl is not plain text: pass it with --jsonl"),
        ("ids.npy", b"", r"ids\.npy is not plain text: pass it with --tokens"),
    ],
)
def test_text_that_is_not_text_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        list(text_documents(tmp_path / name))


def test_another_encoding_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert list(text_documents(tmp_path / "latin.txt", encoding="cp1252")) == ["café"]


def test_missing_places_are_named(tmp_path: Path) -> None:
    for read in (lambda p: list(text_documents(p)), lambda p: list(jsonl_documents(p)), load_ids):
        with pytest.raises(CorpusError, match=r"nowhere\.txt: no such file"):
            read(tmp_path / "nowhere.txt")
    with pytest.raises(CorpusError, match=r"no \*\.txt file in this folder"):
        list(text_documents(tmp_path))


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    records = [{"text": "a\r\n\u2028b", "id": 1}, {"text": ""}, {"body": "x", "text": "\N{GRINNING FACE}"}]
    path.write_text("\n\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")
    assert list(jsonl_documents(path)) == ["a\r\n\u2028b", "", "\N{GRINNING FACE}"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{'text': 1}", r"data\.jsonl:2: not JSON \(.* at column 2\)"),
        (b'{"body": "x", "id": 3}', r"data\.jsonl:2: no key 'text'; keys found: 'body', 'id' \(choose .*--text-key\)"),
        (b'["x"]', r"data\.jsonl:2: an object .* is expected, not list"),
        (b'{"text": 3}', r"data\.jsonl:2: the value of 'text' is int"),
        (b'{"text": "\xff"}', r"data\.jsonl:2: byte 0xff at offset 10"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(CorpusError, match=message):
        list(jsonl_documents(path))


def test_ids_from_files(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.arange(5, dtype=np.uint16))
    np.save(tmp_path / "rows.npy", np.arange(6).reshape(2, 3))
    (tmp_path / "train.bin").write_bytes(b"\x01\x00\x00\x80")
    (tmp_path / "empty.bin").write_bytes(b"")
    found = {name: [d.tolist() for d in load_ids(tmp_path / name)] for name in ("one.npy", "rows.npy", "train.bin")}
    assert found == {"one.npy": [[0, 1, 2, 3, 4]], "rows.npy": [[0, 1, 2], [3, 4, 5]], "train.bin": [[1, 32768]]}
    with pytest.raises(CorpusError, match="holds no tokens"):
        windows_from_ids(load_ids(tmp_path / "empty.bin"))


def test_a_file_of_ids_is_mapped_not_read(tmp_path: Path) -> None:
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "big.bin")
    np.save(tmp_path / "big.npy", np.arange(1000))
    for name in ("big.bin", "big.npy"):
        (document,) = load_ids(tmp_path / name)
        assert isinstance(document, np.memmap)
        assert windows_from_ids([document], window=4, max_tokens=8).ids.tolist() == list(range(8))


def test_a_pickle_that_poses_as_ids_is_not_run(tmp_path: Path) -> None:
    class Planted:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "ran",)

    (tmp_path / "ids.npy").write_bytes(pickle.dumps(Planted()))
    with pytest.raises(CorpusError, match=r"ids\.npy: not a \.npy file"):
        load_ids(tmp_path / "ids.npy")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(3), r"bad\.npy: float64 values; token ids are integers"),
        (np.zeros((1, 2, 3), dtype=int), r"bad\.npy: 3 axes \(1, 2, 3\)"),
        (np.array([{}], dtype=object), r"bad\.npy: not a \.npy file of integers"),
    ],
)
def test_arrays_that_are_not_ids_are_refused(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "bad.npy", array, allow_pickle=True)
    with pytest.raises(CorpusError, match=message):
        load_ids(tmp_path / "bad.npy")


def test_files_that_are_no_arrays_are_refused(tmp_path: Path) -> None:
    (tmp_path / "odd.bin").write_bytes(b"123")
    (tmp_path / "ids.npz").write_bytes(b"")
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(CorpusError, match="3 bytes are no whole number"):
        load_ids(tmp_path / "odd.bin")
    with pytest.raises(CorpusError, match=r"are read from \.npy \(integers\) or \.bin"):
        load_ids(tmp_path / "ids.npz")
    with pytest.raises(CorpusError, match=r"cut\.npy: not a \.npy file"):
        load_ids(tmp_path / "cut.npy")


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([1, 2], [[1, 2]]),
        ([[1], [], [2, 3]], [[1], [], [2, 3]]),
        (torch.tensor([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        ([torch.tensor([1]), np.array([2], dtype=np.uint8)], [[1], [2]]),
    ],
)
def test_ids_in_every_form(ids: object, expected: list[list[int]]) -> None:
    assert [document.tolist() for document in id_documents(ids)] == expected


@pytest.mark.parametrize("ids", [[1.5], "12", 7, [[1, "a"]], [[[1]]], torch.tensor([True]), torch.zeros(2), [1, [2]]])
def test_what_is_no_ids_is_refused(ids: object) -> None:
    with pytest.raises(CorpusError, match=r"token ids"):
        id_documents(ids)


def test_random_tokens_depend_on_the_seed_alone() -> None:
    drawn = random_tokens(1000, 500, seed=3)
    assert drawn.tolist() == random_tokens(1000, 500, seed=3).tolist()
    assert drawn.tolist() != random_tokens(1000, 500, seed=4).tolist()
    assert drawn.min() >= 0
    assert drawn.max() < 1000
    with pytest.raises(CorpusError, match="at least 1"):
        random_tokens(0, 5, seed=0)
