"""Padding (METHODS.md, T-C6): at the tokens of a document a padded batch gives what the document alone gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import streamlens as sl
from streamlens.calling import invoke
from streamlens.errors import UsageError
from streamlens.observation import Observation, tokens
from tests.conftest import Case, case, minilm, smollm2

LENGTHS = [5, 8, 11]
PADDED = ["gpt2", "llama", "gemma2", "gptj", "granite", "opt", "bert", "t5", "bart"]
PLACED = {"gpt2", "llama", "gemma2", "gptj", "granite", "bert"}
"""Models that are told the position of each token; the others count from the mask, or measure distances."""
TWO_SIDED = {"t5", "bart"}


def padded(rows: list[Tensor], side: str, *, positions: bool) -> dict[str, Any]:
    """Put documents of different lengths into one batch: ids (doc, position), a mask, and positions where wanted."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[number, place], mask[number, place] = row, 1
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if positions:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    return inputs


def for_model(found: Case, inputs: dict[str, Any]) -> dict[str, Any]:
    """Add what this model wants besides; a decoder reads the same target for every document."""
    given: Any = found.inputs
    if "use_cache" in given:
        inputs["use_cache"] = False
    if found.name in TWO_SIDED:
        inputs["decoder_input_ids"] = given["decoder_input_ids"][:1].expand(len(inputs["input_ids"]), -1)
    return inputs


def watched(found: Case, inputs: dict[str, Any]) -> Observation:
    # Some models make their mask, or their positions, in other calls for other inputs: each batch has its own anatomy.
    with torch.no_grad(), sl.observe(found.module, sl.discover(found.module, inputs)) as seen:
        invoke(found.module, inputs)
    return seen


# BART counts positions from the left whatever the mask says, so padding on the left is another text to it.
SIDES = [(name, side) for name in PADDED for side in ("left", "right") if (name, side) != ("bart", "left")]


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_padding_leaves_the_tokens_as_they_are(name: str, side: str) -> None:
    """T-C6: parts, states and writes of every stream, against each document by itself without any mask."""
    found = case(name)
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(5, 40, (length,), generator=generator) for length in LENGTHS]
    if name in TWO_SIDED:
        assert {s.name for s in found.anatomy.streams} == {"encoder", "decoder"}
    whole = for_model(found, padded(rows, side, positions=name in PLACED))
    mask = whole["attention_mask"].bool()
    together = watched(found, whole)
    for number, row in enumerate(rows):
        alone = watched(found, for_model(found, {"input_ids": row[None]}))
        for stream in found.anatomy.streams:
            width = mask.shape[1] if stream.name != "decoder" else whole["decoder_input_ids"].shape[1]
            valid = mask[number] if stream.name != "decoder" else torch.ones(width, dtype=torch.bool)
            for kind in ("parts", "states", "writes"):
                ours, theirs = (getattr(seen, kind)[stream.name] for seen in (together, alone))
                assert ours.keys() == theirs.keys()
                assert ours
                for index in ours:
                    own = tokens(ours[index], stream, len(rows), width)[number, valid]
                    other = tokens(theirs[index], stream, 1, int(valid.sum()))[0]
                    torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PADDED)
def test_a_capture_of_padded_inputs_is_refused(name: str, tmp_path: Path) -> None:
    """A file has no mask: its rows would count padding as text, at positions that are not the model's."""
    found = case(name)
    rows = [torch.arange(5, 5 + length) for length in LENGTHS]
    for side in ("left", "right"):
        inputs = for_model(found, padded(rows, side, positions=name in PLACED))
        streams = ["encoder"] if name in TWO_SIDED else None
        with pytest.raises(UsageError, match=r"attention_mask marks .* as padding"):
            sl.capture(found.module, inputs=inputs, out=tmp_path / "x.h5", streams=streams, progress=False)
        assert list(tmp_path.iterdir()) == []


def test_a_mask_without_zeros_is_no_padding(tmp_path: Path) -> None:
    found = case("gpt2")
    given: Any = found.inputs
    inputs = {**given, "attention_mask": torch.ones_like(given["input_ids"])}
    with (
        sl.capture(found.module, inputs=inputs, out=tmp_path / "mask.h5", progress=False) as masked,
        sl.capture(found.module, inputs=given, out=tmp_path / "none.h5", progress=False) as plain,
    ):
        torch.testing.assert_close(masked.writes, plain.writes, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gptj", "granite", "bert"])
def test_documents_of_any_length_need_no_padding(name: str, tmp_path: Path) -> None:
    """Each document in a ragged capture, against itself alone."""
    found = case(name)
    documents = [[5, 9, 12, 7, 11], [13, 13], [8, 11, 14, 14, 30, 11, 12], [6, 15]]
    stream = found.anatomy.stream()
    with sl.capture(found.module, tokens=documents, ragged=True, out=tmp_path / "x.h5", progress=False) as capture:
        for number, ids in enumerate(documents):
            rows = capture.tokens.doc == number
            assert capture.tokens.id[rows].tolist() == ids
            alone = watched(found, for_model(found, {"input_ids": torch.tensor([ids])}))
            for s in stream.sublayers:
                write = tokens(alone.writes[stream.name][s.index], stream, 1, len(ids))[0]
                torch.testing.assert_close(capture.write(s.label)[rows], write, rtol=1e-5, atol=1e-5)
                read = tokens(alone.states[stream.name][s.read], stream, 1, len(ids))[0]
                torch.testing.assert_close(capture.read(s.label)[rows], read, rtol=1e-5, atol=1e-5)


@pytest.mark.real
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("load", [smollm2, minilm])
def test_padding_leaves_the_tokens_of_real_models_as_they_are(load: Any, side: str) -> None:
    model = load()
    module: Any = model.module
    rows = [torch.arange(1000, 1000 + 7 * length, 7) for length in LENGTHS]
    whole = padded(rows, side, positions=True)
    anatomy = sl.discover(module, whole)
    stream = anatomy.stream()
    found = Case("real", module, {}, None, anatomy)  # type: ignore[arg-type]
    together = watched(found, whole)
    for number, row in enumerate(rows):
        alone = watched(found, {"input_ids": row[None]})
        valid = whole["attention_mask"][number].bool()
        for kind in ("states", "writes"):
            ours, theirs = (getattr(seen, kind)[stream.name] for seen in (together, alone))
            for index in ours:
                own, other = ours[index][number, valid].double(), theirs[index][0].double()
                # The sizes of SmolLM2's first state and of its sink differ by a factor of a thousand.
                assert float(((own - other).norm(dim=-1) / other.norm(dim=-1)).max()) < 1e-4, (kind, index)
