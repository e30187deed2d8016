"""Text and ids become the windows that a slow cutter in plain loops makes, and bad input is refused with its place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from streamlens.checkpoint.model import Model
from streamlens.checkpoint.tokenizers import ByteTokenizer
from streamlens.corpus.documents import (
    builtin_documents,
    random_tokens,
)
from streamlens.corpus.windows import (
    DEFAULT_MAX_TOKENS,
    DEFAULT_WINDOW,
    Windows,
    windows_for,
    windows_from_ids,
    windows_from_text,
)
from streamlens.errors import CorpusError, UsageError


def model(tokenizer: ByteTokenizer | None, vocab_size: int | None, max_positions: int | None) -> Model:
    return Model(nn.Identity(), "model.pt", "", {}, tokenizer, vocab_size, max_positions)


def slow_windows(
    documents: list[list[int]], size: int | None, keep_tails: bool, max_tokens: int | None
) -> list[tuple[int, list[int]]]:
    """(document, ids) of each window in the order of the token axis, token by token."""
    windows: list[tuple[int, list[int]]] = []
    for number, document in enumerate(documents):
        current: list[int] = []
        for token in document:
            current.append(token)
            if size is not None and len(current) == size:
                windows.append((number, current))
                current = []
        if current and keep_tails:
            windows.append((number, current))
    if max_tokens is not None:
        taken: list[tuple[int, list[int]]] = []
        for window in windows:
            if taken and sum(len(ids) for _, ids in taken) + len(window[1]) > max_tokens:
                break
            taken.append(window)
        windows = taken
    by_length: list[tuple[int, list[int]]] = []
    for length in range(1, max((len(ids) for _, ids in windows), default=0) + 1):
        by_length += [window for window in windows if len(window[1]) == length]
    return by_length


def as_list(windows: Windows) -> list[tuple[int, list[int]]]:
    """The windows read back from the arrays, checking the document and position columns on the way."""
    found = []
    row = 0
    for length in windows.lengths.tolist():
        rows = slice(row, row + length)
        assert windows.position[rows].tolist() == list(range(length))
        assert len(set(windows.doc[rows].tolist())) == 1
        found.append((int(windows.doc[row]), windows.ids[rows].tolist()))
        row += length
    assert row == windows.n_tokens
    return found


corpora = st.lists(st.lists(st.integers(0, 99), max_size=23), min_size=1, max_size=8).filter(any)


@given(corpora, st.integers(2, 9), st.none() | st.integers(1, 60))
@settings(max_examples=150, deadline=None)
def test_windows_of_one_length_are_the_slow_cutters(documents: list[list[int]], size: int, cap: int | None) -> None:
    expected = slow_windows(documents, size, keep_tails=False, max_tokens=cap)
    if not expected:
        with pytest.raises(CorpusError, match=r"no document .* fills a window .* \(the longest has \d+\)"):
            windows_from_ids(documents, window=size, max_tokens=cap)
        # Without a window of his own, the user gets the documents whole.
        fallback = windows_from_ids(documents, limit=size, max_tokens=cap)
        assert as_list(fallback) == slow_windows(documents, None, keep_tails=True, max_tokens=cap)
        assert any("documents are kept whole" in note for note in fallback.notes)
        return
    assert as_list(windows_from_ids(documents, window=size, max_tokens=cap)) == expected
    assert as_list(windows_from_ids(documents, limit=size, max_tokens=cap)) == expected


@given(corpora, st.none() | st.integers(2, 9), st.none() | st.integers(2, 9), st.none() | st.integers(1, 60))
@settings(max_examples=150, deadline=None)
def test_ragged_windows_are_the_slow_cutters(
    documents: list[list[int]], size: int | None, limit: int | None, cap: int | None
) -> None:
    if size is not None and limit is not None:
        limit = max(size, limit)
    windows = windows_from_ids(documents, window=size, limit=limit, max_tokens=cap, ragged=True)
    assert as_list(windows) == slow_windows(documents, size or limit, keep_tails=True, max_tokens=cap)
    if cap is None:
        assert windows.n_tokens == sum(map(len, documents)), "ragged leaves nothing out"


@given(corpora, st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_batches_partition_the_rows_and_never_mix_lengths(documents: list[list[int]], batch_tokens: int) -> None:
    windows = windows_from_ids(documents, ragged=True)
    first = row = 0
    for index, batch in enumerate(windows.batches(batch_tokens)):
        assert (batch.index, batch.start) == (index, row)
        assert set(windows.lengths[first : first + batch.count].tolist()) == {batch.length}
        assert batch.count * batch.length <= max(batch_tokens, batch.length)
        ids = windows.batch_ids(batch)
        assert ids.shape == (batch.count, batch.length)
        assert ids.dtype == torch.int64
        assert ids.flatten().tolist() == windows.ids[row : batch.stop].tolist()
        first, row = first + batch.count, batch.stop
    assert (first, row) == (len(windows), windows.n_tokens)


def test_batches_are_as_full_as_they_can_be() -> None:
    windows = windows_from_ids(np.arange(7 * 4), window=4)
    assert [batch.count for batch in windows.batches(15)] == [3, 3, 1]
    assert [batch.count for batch in windows.batches(1)] == [1] * 7
    with pytest.raises(UsageError, match="at least 1 token"):
        windows.batches(0)


def test_batch_ids_are_a_copy() -> None:
    windows = windows_from_ids([1, 2, 3, 4], window=2)
    windows.batch_ids(windows.batches(4)[0]).zero_()
    assert windows.ids.tolist() == [1, 2, 3, 4]


def test_what_was_left_out_is_said() -> None:
    windows = windows_from_ids([[1] * 9, [], [2] * 3], window=4)
    assert as_list(windows) == [(0, [1] * 4), (0, [1] * 4)]
    assert windows.notes == (
        "left out 4 tokens (33 %) in tails shorter than the window: --ragged keeps them",
        "empty documents skipped: 1",
    )
    ragged = windows_from_ids([[1] * 9, [2] * 3], limit=4, ragged=True)
    assert ragged.notes == ("documents longer than 4 tokens (the model's limit), cut into several windows: 1",)
    capped = windows_from_ids([1] * 9, window=4, max_tokens=3)
    assert capped.notes == ("took one whole window of 4 tokens, more than the 3 asked for",)


def test_documents_too_short_for_any_window_are_kept_whole_and_it_is_said() -> None:
    windows = windows_from_ids([[1] * 5, [2] * 3, [3] * 4], max_tokens=8)
    assert as_list(windows) == [(1, [2] * 3), (0, [1] * 5)]
    assert windows.notes == (
        "no document fills a window of 256 tokens (the longest has 5): documents are kept whole",
    )  # fmt: skip


def test_max_tokens_reads_no_more_documents_than_it_needs() -> None:
    read = []

    def texts() -> Iterator[str]:
        for number in range(1000):
            read.append(number)
            yield "x" * 10

    windows = windows_from_text(texts(), ByteTokenizer(), window=5, max_tokens=20)
    assert windows.n_tokens == 20
    assert read == [0, 1]


def test_the_default_window_shrinks_to_the_models_limit() -> None:
    text = "y" * 1000
    assert set(windows_from_text(text, ByteTokenizer()).lengths.tolist()) == {DEFAULT_WINDOW}
    assert set(windows_from_text(text, ByteTokenizer(), limit=100).lengths.tolist()) == {100}
    with pytest.raises(CorpusError, match=r"window of 101 .* longer than the 100 positions .* 100 or less"):
        windows_from_text(text, ByteTokenizer(), window=101, limit=100)


def test_any_character_goes_through_but_half_a_surrogate() -> None:
    text = "a\0b\r\n\N{GRINNING FACE}\u2028"
    assert bytes(windows_from_text(text, ByteTokenizer(), ragged=True).ids.tolist()).decode() == text
    with pytest.raises(CorpusError, match=r"document 1 holds half of a surrogate pair .* at character 2"):
        windows_from_text(["fine", "no\ud83d"], ByteTokenizer(), ragged=True)


@pytest.mark.parametrize("documents", [[], [[]], [[], []]])
def test_an_empty_corpus_is_refused(documents: list[list[int]]) -> None:
    with pytest.raises(CorpusError, match=r"notes\.txt holds no (documents|tokens)"):
        windows_from_ids(documents, description="notes.txt")


def test_ids_outside_the_vocabulary_are_refused() -> None:
    assert windows_from_ids([0, 9], vocab_size=10).n_tokens == 2
    with pytest.raises(CorpusError, match=r"id 50,256, .* vocabulary has 10 entries: .* belongs to another model"):
        windows_from_ids([0, 50256], vocab_size=10)
    with pytest.raises(CorpusError, match=r"id 10, .* vocabulary has 10 entries"):
        windows_from_ids([0, 10], vocab_size=10)
    with pytest.raises(CorpusError, match=r"id -100: ids start at 0"):
        windows_from_ids([0, -100])


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(CorpusError, match=r"window of 1 is too short: choose a window of 2"):
        windows_from_ids([1, 2, 3], window=1)
    with pytest.raises(UsageError, match=r"max_tokens is 0: a corpus needs at least 1 token"):
        windows_from_ids([1, 2, 3], max_tokens=0)


def test_the_hash_covers_every_column() -> None:
    windows = windows_from_ids([[1, 2, 3, 4], [5, 6]], window=2)
    assert windows.sha256 == windows_from_ids([[1, 2, 3, 4], [5, 6]], window=2, description="other").sha256
    changed = [
        replace(windows, ids=windows.ids[::-1]),
        replace(windows, doc=windows.doc[::-1]),
        replace(windows, position=windows.position[::-1]),
        replace(windows, lengths=np.array([4, 2])),
    ]
    assert len({windows.sha256, *(other.sha256 for other in changed)}) == 5
    with pytest.raises(ValueError, match="must describe the same tokens"):
        replace(windows, lengths=np.array([4]))


# ---- the door -----------------------------------------------------------------------------------------------------


def test_a_model_gets_built_in_text_when_none_is_given() -> None:
    windows = windows_for(model(ByteTokenizer(), 256, 64))
    assert bytes(windows.ids[:64].tolist()).decode() == builtin_documents()[0][:64]
    assert DEFAULT_MAX_TOKENS - 64 < windows.n_tokens <= DEFAULT_MAX_TOKENS
    assert "no text was given: built-in English text" in windows.notes[0]


def test_files_are_read_where_paths_are_given(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab" * 4)
    np.save(tmp_path / "ids.npy", np.arange(8))
    read = windows_for(model(ByteTokenizer(), 256, 8), documents=tmp_path / "a.txt")
    assert bytes(read.ids.tolist()) == b"abababab"
    assert windows_for(model(None, 256, 8), ids=tmp_path / "ids.npy").ids.tolist() == list(range(8))


def test_a_model_without_a_tokenizer_gets_random_tokens() -> None:
    windows = windows_for(model(None, 11, None), max_tokens=512, seed=5)
    assert windows.ids.tolist() == random_tokens(11, 512, seed=5).tolist()
    assert windows.description == "random tokens (seed 5)"


def test_a_model_is_shown_what_it_can_take() -> None:
    tiny = model(ByteTokenizer(), 256, 8)
    assert set(windows_for(tiny, documents="z" * 20).lengths.tolist()) == {8}
    with pytest.raises(CorpusError, match="vocabulary has 256 entries"):
        windows_for(tiny, ids=[1, 300])
    with pytest.raises(UsageError, match="choose one"):
        windows_for(tiny, documents="a", ids=[1])
    with pytest.raises(UsageError, match=r"model\.pt has no tokenizer"):
        windows_for(model(None, 256, 8), documents="a")
    with pytest.raises(UsageError, match=r"model\.pt takes no token ids"):
        windows_for(model(None, None, None))


def test_one_empty_document_is_no_several() -> None:
    with pytest.raises(CorpusError, match="holds no tokens, not one in 1 document: give it some text"):
        windows_from_ids([[]])
    with pytest.raises(CorpusError, match="not one in 2 documents"):
        windows_from_ids([[], []])
