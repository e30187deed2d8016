"""Planted faults are caught by the proof or the hashes, and impossible requests before the first forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from torch import Tensor, nn

import streamlens as sl
from streamlens.checkpoint.model import wrap
from streamlens.errors import CorpusError, IntegrityError, ProofError, UsageError
from streamlens.proof import same_bits
from streamlens.reader.verifying import verify
from tests.conftest import Case, case, taken


class TestPlantedFaults:
    """Each fault is a way in which other tools went wrong; each must be caught by the proof."""

    def test_a_hook_one_module_too_deep(self, tmp_path: Path) -> None:
        """OLMo-2: the branch's module output is not yet what is added; a norm follows."""
        found = case("olmo2")
        inside: list[Tensor] = []
        branch: Any = found.module.get_submodule("model.layers.0.mlp")
        handle = branch.register_forward_hook(lambda module, args, output: inside.append(output.clone()))
        try:
            self._refused(found, "write", lambda i, t: inside[-1] if i == 1 else t, tmp_path)
        finally:
            handle.remove()

    def test_a_forgotten_multiplier(self, tmp_path: Path) -> None:
        self._refused(case("granite"), "write", lambda i, t: t / 0.22 if i == 2 else t, tmp_path)

    def test_a_missing_embedding_part(self, tmp_path: Path) -> None:
        self._refused(case("gpt2"), "part", lambda i, t: torch.zeros_like(t) if i == 1 else t, tmp_path)

    def test_a_write_that_is_swapped_with_its_neighbour(self, tmp_path: Path) -> None:
        kept: list[Tensor] = []

        def swap(index: int, tensor: Tensor) -> Tensor:
            kept.append(tensor.clone())
            return kept[-2] if index == 3 else tensor

        self._refused(case("llama"), "write", swap, tmp_path)

    def test_one_flipped_bit_in_one_write(self, tmp_path: Path) -> None:
        def flip(index: int, tensor: Tensor) -> Tensor:
            wrong = tensor.clone()
            if index == 1:
                wrong.view(torch.int32).view(-1)[5] ^= 1 << 22
            return wrong

        self._refused(case("gpt2"), "write", flip, tmp_path)

    @staticmethod
    def _refused(found: Case, what: str, fault: Callable[[int, Tensor], Tensor], tmp_path: Path) -> None:
        """Corrupt what the proof is given, as a wrong hook would."""
        from streamlens import proof

        original: Any = getattr(proof.Replay, what)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(proof.Replay, what, lambda self, index, t: original(self, index, fault(index, t)))
            with pytest.raises(ProofError, match="the writes do not add up: x_"):
                taken(found, tmp_path / "x.h5")
            assert not (tmp_path / "x.h5").exists()
            with taken(found, tmp_path / "x.h5", allow_unproven=True) as capture:
                assert not capture.proof.exact
                assert capture.proof.worst > 0

    def test_a_stream_that_is_scaled_only_after_the_pilot(self, tmp_path: Path) -> None:
        """A model whose skip changes between the pilot and the capture: caught on the block, and nothing is kept."""
        model = _Drifting()
        with pytest.raises(ProofError, match=r"x_2 of stream 'main' \(after 1_mlp_out\)"):
            sl.capture(model, inputs=torch.randn(20, 5, 8), out=tmp_path / "x.h5", batch_tokens=10, progress=False)
        assert not (tmp_path / "x.h5").exists()

    def test_an_addition_in_place_that_overwrites_a_read(self, tmp_path: Path) -> None:
        """A recorder that kept references, not copies, would store the sum under the name of the read."""
        found = case("inplace_add")
        with taken(found, tmp_path / "x.h5") as capture:
            first, second = capture.read(0), capture.read(1)
            assert not same_bits(first, second)
            assert same_bits(first + capture.write(0), second)

    def test_a_flipped_byte_in_the_file(self, tmp_path: Path) -> None:
        found = case("gpt2")
        path = tmp_path / "x.h5"
        taken(found, path).close()
        with h5py.File(path) as file:
            offset = file["/streams/main/write"].id.get_offset()
        raw = bytearray(path.read_bytes())
        raw[offset + 4 * 33 * 32 * 2 + 3] ^= 1
        path.write_bytes(raw)
        verified = verify(path)
        assert not verified.ok
        assert "/streams/main/write[2]" in str(verified.problems[0])
        with pytest.raises(IntegrityError, match=r"write\[2\], block 0"):
            verified.demand()


class _Drifting(nn.Module):
    """Scales its stream by a hair once it has run often enough for the pilot to be over."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        for index, layer in enumerate(self.layers):
            x = x + layer(x)
            if index == 1 and self.runs > 9:
                x = torch.mul(x, 1.001)
        return x


class TestErrorsBeforeTheFirstForward:
    def test_ids_beyond_the_vocabulary(self, tmp_path: Path) -> None:
        with pytest.raises(CorpusError, match=r"97"):
            sl.capture(case("gpt2").module, tokens=[1, 2, 97], out=tmp_path / "x.h5", progress=False)

    def test_a_window_beyond_the_learned_positions(self, tmp_path: Path) -> None:
        with pytest.raises(CorpusError, match="position"):
            sl.capture(case("gpt2").module, tokens=list(range(90)), window=64, out=tmp_path / "x.h5", progress=False)

    def test_no_tokens(self, tmp_path: Path) -> None:
        with pytest.raises(CorpusError):
            sl.capture(case("gpt2").module, tokens=[], out=tmp_path / "x.h5", progress=False)

    def test_text_and_inputs_together(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="either inputs or a text"):
            sl.capture(case("gpt2").module, inputs=torch.zeros(1, 2), tokens=[1], out=tmp_path / "x.h5", progress=False)

    def test_random_model_outputs_are_refused(self, tmp_path: Path) -> None:
        class Noisy(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(8, 8)

            def forward(self, x: Tensor) -> Tensor:
                written: Tensor = self.layer(x) + torch.randn_like(x)
                return x + written

        with pytest.raises((ProofError, sl.errors.AnatomyError)):
            sl.capture(wrap(Noisy(), "noisy", {}), inputs=torch.randn(2, 3, 8), out=tmp_path / "x.h5", progress=False)
