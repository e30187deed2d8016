"""Which axis counts positions, and whether tokens see later ones: for any probe, also one that repeats a token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import streamlens as sl
from streamlens.calling import Inputs
from streamlens.discovery.layout import changed_at, is_position_first, main_input
from streamlens.recorder.pilot import fly
from tests.conftest import case

VOCAB = 64
"""Of the zoo's own stacks over ids (position, doc)."""
CAUSAL = {"gpt2": True, "llama": True, "mamba": True, "bert": False}


def repeated(name: str, token: int) -> Inputs:
    """The specimen's inputs with one id everywhere."""
    given = case(name).inputs
    ids = torch.full_like(main_input(given)[1], token)
    return ids if isinstance(given, Tensor) else {**given, str(main_input(given)[0]): ids}


@pytest.mark.parametrize("token", [0, 1, 7, VOCAB - 1])
@pytest.mark.parametrize("name", ["user_post_norm", "user_pre_norm"])
def test_positions_come_first_whatever_is_repeated(name: str, token: int) -> None:
    """Also the first and the last id of the vocabulary."""
    found = case(name)
    assert found.anatomy.stream().position_first
    assert is_position_first(found.module, repeated(name, token))
    assert not is_position_first(case("gpt2").module, repeated("gpt2", min(token, 30)))


@pytest.mark.parametrize("token", [0, 1, 7])
@pytest.mark.parametrize("name", CAUSAL)
def test_causality_is_found_on_a_repeated_token(name: str, token: int) -> None:
    found = case(name)
    assert fly(found.module, repeated(name, token), found.anatomy).causal is CAUSAL[name]
    assert fly(found.module, found.inputs, found.anatomy).causal is CAUSAL[name]


class _Blind(nn.Module):
    """Attention to both sides over centred embeddings: one number added to all of a token changes nothing at all."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))
        self.head = nn.Linear(8, 20)

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        for layer in self.layers:
            x = x + layer(x, x, x)[0]
        logits: Tensor = self.head(x)
        return logits


def test_an_encoder_of_centred_embeddings_is_not_taken_for_causal() -> None:
    torch.manual_seed(0)
    exact = torch.randint(-8, 8, (3, 5, 8)).float()  # no rounding that would tell the two apart
    assert not fly(_Blind().eval(), exact).causal


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("index", [0, -1])
@pytest.mark.parametrize("fill", [None, 0, 5])
def test_every_token_of_one_slice_changes_and_no_other(axis: int, index: int, fill: int | None) -> None:
    ids = torch.arange(12).reshape(3, 4) % 5 if fill is None else torch.full((3, 4), fill)
    for given in (ids, ids[..., None].float().expand(3, 4, 6)):
        new: Any = changed_at({"input_ids": given}, axis, index)
        new = new["input_ids"]
        differs = new != given if given.ndim == 2 else (new != given).all(-1)
        expected = torch.zeros(3, 4, dtype=torch.bool)
        expected.select(axis, index).fill_(True)
        assert torch.equal(differs, expected)
    fresh: Any = changed_at(ids, axis, index)
    assert int(fresh.min()) >= 0
    assert int(fresh.max()) <= max(int(ids.max()), 1)


def test_targets_of_a_text_that_begins_with_one_repeated_token_are_the_next_ones(tmp_path: Path) -> None:
    found = case("gpt2")
    ids = torch.cat([torch.full((8,), 3), torch.arange(8) % 30])
    with sl.capture(found.module, tokens=[ids], window=16, out=tmp_path / "x.h5", progress=False) as capture:
        assert capture.attrs["causal"] == 1
        with torch.no_grad():
            logits = found.module(input_ids=ids[None]).logits[0]
        ours = capture.output["target_logit"]
    torch.testing.assert_close(ours[:-1], logits[:-1].gather(-1, ids[1:, None])[:, 0], rtol=1e-4, atol=1e-4)


def test_a_stack_with_positions_first_is_captured_from_a_probe_of_one_token(tmp_path: Path) -> None:
    """The first two documents are one repeated token: the file is of the documents all the same."""
    found = case("user_pre_norm")
    ids: Any = found.inputs
    assert isinstance(ids, Tensor)
    ids = ids.clone()
    ids[:, :2] = 4
    with sl.capture(found.module, inputs=ids, out=tmp_path / "x.h5", progress=False) as capture:
        assert torch.equal(capture.tokens.id.reshape(ids.shape[1], -1), ids.T)
