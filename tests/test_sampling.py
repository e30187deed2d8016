"""Samples of windows: spread over text of any lengths, the same from a file as live, and run as they would be alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import streamlens as sl
from streamlens.analyses.sampling import sampled, spread, usual_length, window_documents, window_lengths
from streamlens.analyses.source import Source, source_of
from streamlens.block import Block
from streamlens.errors import MissingDataError, UsageError
from tests.conftest import case

RAGGED = [[i % 40 + 1] * 3 for i in range(12)] + [[i + 1, i + 2, 7, 8, 9] for i in range(12)] + [[5, 6]]


@pytest.mark.parametrize(("total", "count"), [(1, 1), (7, 7), (7, 3), (100, 8), (101, 64), (3, 5)])
def test_spread_takes_so_many_at_even_distances(total: int, count: int) -> None:
    found = spread(total, count)
    assert len(found) == min(total, count)
    assert found[0] >= 0
    assert found[-1] == total - 1
    gaps = np.diff(found, prepend=-1)
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


def both(tmp_path: Path, **corpus: object) -> list[Source]:
    module = case("gpt2").module
    stored = sl.capture(module, out=tmp_path / "run.h5", progress=False, **corpus)  # type: ignore[arg-type]
    return [source_of(module, **corpus), source_of(stored, model=sl.load(module))]  # type: ignore[arg-type]


def test_short_and_long_windows_count_alike(tmp_path: Path) -> None:
    for source in both(tmp_path, tokens=RAGGED, window=None, batch_tokens=12):
        assert window_lengths(source).tolist() == sorted(len(row) for row in RAGGED)  # equal lengths share a batch
        some = sampled(source, 8)
        assert window_lengths(some).tolist() == [3, 3, 3, 3, 5, 5, 5, 5]
        assert some.n_tokens == sum(window_lengths(some))
        assert "8 of 25 windows" in some.description
        assert usual_length(source, 128) == 3
        assert usual_length(source, 2) == 2
        assert window_lengths(sampled(source, None, least=5)).tolist() == [5] * 12
        assert sampled(source, 25) is source
        documents = window_documents(source)
        assert sorted(documents) == list(range(25))
        assert window_documents(some).tolist() == [int(b) for each in some.blocks() for b in each.doc[starts(each)]]


def test_states_and_inputs_are_those_of_the_windows(tmp_path: Path) -> None:
    """Against the states of the whole source, window by window, in both kinds of source."""
    for source in both(tmp_path, tokens=RAGGED, window=None, batch_tokens=12):
        whole = {tuple(b.ids.tolist()[i : i + b.shape[1]]): (b, i) for b in source.blocks() for i in starts(b)}
        some, seen = sampled(source, 9, least=3), 0
        for block in some.blocks():
            assert block.start == seen
            ids = some.inputs(block)
            given = ids if isinstance(ids, torch.Tensor) else ids["input_ids"]
            assert torch.equal(given.flatten(), block.ids)
            docs, length = block.shape
            for i in range(0, docs * length, length):
                own, j = whole[tuple(block.ids[i : i + length].tolist())]
                for k in (0, 3, len(block.states) - 1):
                    torch.testing.assert_close(block.states[k][i : i + length], own.states[k][j : j + length])
                torch.testing.assert_close(block.writes[2][i : i + length], own.writes[2][j : j + length])
                torch.testing.assert_close(block.parts[1][i : i + length], own.parts[1][j : j + length])
            seen = block.stop
        assert seen == some.n_tokens


def starts(block: Block) -> list[int]:
    return list(range(0, block.stop - block.start, block.shape[1]))


@pytest.mark.parametrize("name", ["encoder_post", "t5", "bart", "transformer_post", "user_post_norm"])
def test_every_layout_can_be_cut(name: str) -> None:
    found = case(name)
    stream = None if name in ("encoder_post", "user_post_norm") else "decoder"
    source = source_of(found.module, inputs=found.inputs, stream=stream, batch_tokens=1024)
    (whole,) = source.blocks()
    docs, length = whole.shape
    (cut,) = sampled(source, 1).blocks()
    assert cut.shape == (1, length)
    for k in range(len(cut.states)):
        expected = whole.states[k].view(docs, length, -1)[docs - 1]
        torch.testing.assert_close(cut.states[k], expected, rtol=1e-4, atol=1e-5)


def test_a_sample_of_a_sample(tmp_path: Path) -> None:
    for source in both(tmp_path, tokens=RAGGED, window=None, batch_tokens=12):
        once = sampled(source, None, least=3)
        assert window_lengths(sampled(once, 4)).tolist() == [3, 3, 5, 5]


def test_mistakes() -> None:
    source = source_of(case("gpt2").module, tokens=RAGGED, window=None)
    with pytest.raises(MissingDataError, match="has 9 positions: the longest has 5"):
        sampled(source, 4, least=9)
    with pytest.raises(UsageError, match="at least one"):
        sampled(source, 0)
