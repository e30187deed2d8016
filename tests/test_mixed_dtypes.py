"""Models whose states, writes and parts are not all of one dtype: the file holds each without loss, and says which."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from torch import Tensor, nn

import streamlens as sl
from streamlens.anatomy import Stream
from streamlens.calling import eager_math, invoke
from streamlens.discovery.streams import discover
from streamlens.errors import FormatError, ProofError
from streamlens.observation import Observation, observe, tokens
from streamlens.proof import same_bits
from streamlens.reader.opening import Capture
from streamlens.reader.verifying import verify
from streamlens.recorder.capturing import prepare
from streamlens.recorder.plan import Choice
from tests.conftest import Case, case

DOCS = 3
QUIET: dict[str, Any] = {"progress": False, "batch_tokens": 4096}  # one batch: a file's shapes are the model's own


class Promoting(nn.Module):
    """Two embeddings and three branches, of which each is in a dtype of its own; the skip is what torch makes of it."""

    def __init__(self, embeddings: tuple[torch.dtype, torch.dtype], branches: tuple[torch.dtype, ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.token, self.place = (nn.Embedding(30, 8).to(dtype) for dtype in embeddings)
        self.layers = nn.ModuleList(nn.Linear(8, 8).to(dtype) for dtype in branches)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.token(ids) + self.place(torch.arange(ids.shape[1]))
        for layer in self.layers:
            x = x + layer(x.to(next(layer.parameters()).dtype))
        return x


HALF, WIDE, BRAIN = torch.float16, torch.float32, torch.bfloat16
MIXTURES: dict[str, tuple[tuple[torch.dtype, torch.dtype], tuple[torch.dtype, ...]]] = {
    "later_write_is_wider": ((BRAIN, BRAIN), (BRAIN, BRAIN, WIDE)),
    "later_write_is_narrower": ((BRAIN, BRAIN), (WIDE, BRAIN, BRAIN)),
    "second_part_is_wider": ((BRAIN, WIDE), (BRAIN, BRAIN, BRAIN)),
    "two_halves": ((BRAIN, BRAIN), (BRAIN, HALF, BRAIN)),
    "last_write_is_double": ((WIDE, WIDE), (WIDE, WIDE, torch.float64)),
}
NAMES = ["mamba-bfloat16", "mamba-float16", "t5-wo", *MIXTURES]


def wide_t5() -> tuple[nn.Module, Any]:
    """T5 in half precision as transformers loads it: the last map of each MLP stays in float32."""
    found = case("t5")
    module: Any = copy.deepcopy(found.module).to(HALF)
    for path, part in module.named_modules():
        if path.endswith("DenseReluDense.wo"):
            part.float()
    return module, found.inputs


@contextmanager
def mixed(name: str) -> Iterator[Case]:
    """One model of `NAMES`; nobody else's module is changed."""
    if name in MIXTURES:
        module: nn.Module = Promoting(*MIXTURES[name]).eval()
        inputs: Any = torch.arange(DOCS * 5).reshape(DOCS, 5)
    elif name == "t5-wo":
        module, inputs = wide_t5()
    else:
        found = case("mamba")
        module, inputs = copy.deepcopy(found.module).to(getattr(torch, name.partition("-")[2])), found.inputs
    yield replace(case("mamba"), name=name, module=module, inputs=inputs, anatomy=discover(module, inputs))


def seen_of(found: Case) -> Observation:
    with torch.no_grad(), eager_math(), observe(found.module, found.anatomy) as seen:
        invoke(found.module, found.inputs)
    return seen


def rows(tensors: Mapping[int, Tensor], stream: Stream, n_tokens: int) -> list[Tensor]:
    return [tokens(t, stream, DOCS, n_tokens // DOCS).flatten(0, 1) for _, t in sorted(tensors.items())]


def stored(found: Case, path: Path, **options: Any) -> Capture:
    stream = found.anatomy.stream().name
    return sl.capture(found.module, inputs=found.inputs, out=path, streams=[stream], **QUIET, **options)


@pytest.mark.parametrize("compact", [False, True], ids=["full", "compact"])
@pytest.mark.parametrize("name", NAMES)
def test_the_file_gives_back_what_was_observed_bit_for_bit(name: str, compact: bool, tmp_path: Path) -> None:
    with mixed(name) as found, stored(found, tmp_path / "x.h5", compact=compact) as capture:
        stream, view = found.anatomy.stream(), capture.stream()
        seen, main = seen_of(found), found.anatomy.stream().name
        kinds = (seen.parts[main], seen.states[main], seen.writes[main])
        parts, states, writes = (rows(kind, stream, capture.n_tokens) for kind in kinds)
        assert len({t.dtype for t in (*parts, *states, *writes)}) > 1
        assert capture.proof.exact

        for k, state in enumerate(states):
            assert same_bits(view.state(k), state), k
        for s, write in zip(stream.sublayers, writes, strict=True):
            assert same_bits(view.write(s.label), write), s.label
            assert same_bits(view.read(s.label), states[s.read]), s.label
            # Several at once come in one dtype, which changes no value.
            assert torch.equal(view.writes[s.index].double(), write.double()), s.label
            assert torch.equal(view.reads[s.index].double(), states[s.read].double()), s.label
            assert torch.equal(view.read(slice(s.index, None))[0].double(), states[s.read].double()), s.label
        for part, whole in zip(stream.parts, parts, strict=True):
            assert same_bits(view.embed(part.label), whole)
        assert same_bits(view.final, states[-1])

        (block,) = view.blocks()
        for ours, theirs in ((block.parts, parts), (block.states, states), (block.writes, writes)):
            assert all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_full_and_a_compact_file_of_mixed_dtypes_agree_and_verify(name: str, tmp_path: Path) -> None:
    with mixed(name) as found:
        paths = [tmp_path / "full.h5", tmp_path / "compact.h5"]
        with stored(found, paths[0]) as full, stored(found, paths[1], compact=True) as compact:
            assert same_bits(full.reads, compact.reads)
            assert same_bits(full.read(slice(1, None)), compact.read(slice(1, None)))
    for path in paths:
        verified = verify(path)
        assert verified.ok
        assert verified.exact_blocks == verified.blocks == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_run_from_any_state_of_mixed_dtypes_is_the_model_itself(name: str) -> None:
    """What stands in for the modules that are passed over has the dtype of what they return."""
    with mixed(name) as found, torch.no_grad(), eager_math():
        stream = found.anatomy.stream()
        states = seen_of(found).states[stream.name]
        plain = invoke(found.module, found.inputs)
        for k, state in states.items():
            laid_out = tokens(state, stream, DOCS, state.numel() // (DOCS * stream.d_model))
            assert same_bits(sl.run_from(found.module, found.anatomy, k, laid_out, found.inputs), plain), k


@pytest.mark.parametrize("name", ["mamba-bfloat16", "two_halves"])
def test_the_planned_bytes_of_mixed_dtypes_are_those_of_the_file(name: str, tmp_path: Path) -> None:
    with mixed(name) as found, stored(found, tmp_path / "x.h5") as capture, h5py.File(capture.path) as file:
        plan = prepare(sl.load(found.module), Choice(), inputs=found.inputs)
        base = file[f"/streams/{plan.streams[0].name}"]
        for item in plan.layout.items:
            held = file[item.name]
            assert (
                held.size * held.id.get_type().get_size() == math.prod(item.shape(plan.n_tokens)) * item.dtype.itemsize
            )
        assert [base[what].id.get_type().get_size() for what in ("read", "final")] == [4, 4]


class Switching(Promoting):
    """Computes in another dtype as soon as there are more documents than in the pilot."""

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.token(ids) + self.place(torch.arange(ids.shape[1]))
        if len(ids) > 2:
            x = x.float()
        for layer in self.layers:
            x = x + layer(x.to(next(layer.parameters()).dtype))
        return x


def test_a_dtype_that_the_pilot_did_not_see_is_refused(tmp_path: Path) -> None:
    """Stored in the pilot's dtype it would be rounded, while the proof looks at what was not."""
    module = Switching((BRAIN, BRAIN), (BRAIN, BRAIN, BRAIN)).eval()
    ids = torch.arange(DOCS * 5).reshape(DOCS, 5)
    with pytest.raises(ProofError, match=r"float32 in block 0 .*bfloat16"):
        sl.capture(module, inputs=ids, out=tmp_path / "x.h5", allow_unproven=True, **QUIET)


@pytest.mark.parametrize("text", ["[]", "{", '{"embed": [], "write": [], "state": []}', "int64", "nonsense"])
def test_own_dtypes_that_do_not_fit_the_anatomy_are_refused(text: str, tmp_path: Path) -> None:
    with mixed("later_write_is_wider") as found, stored(found, tmp_path / "x.h5") as capture:
        path, name = capture.path, capture.stream().name
    with h5py.File(path, "r+") as file:
        attributes = file[f"/streams/{name}"].attrs
        kinds = json.loads(attributes["own_dtypes"])
        broken = text if text[0] in "[{" else json.dumps({**kinds, "write": [text] * len(kinds["write"])})
        attributes["own_dtypes"] = broken
    with pytest.raises(FormatError, match="own_dtypes"):
        sl.open(path)
