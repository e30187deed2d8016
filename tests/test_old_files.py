"""Files written by earlier releases are read for ever: one folder for each format version, never rewritten."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import streamlens as sl
from streamlens.reader.verifying import verify

STORES = Path(__file__).resolve().parent.parent / "fixtures" / "stores"


@pytest.mark.parametrize("path", sorted(STORES.rglob("*.h5")), ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_old_file_still_verifies(path: Path) -> None:
    verified = verify(path)
    assert verified.ok
    assert verified.exact_blocks == verified.blocks == 2


def test_a_full_float32_file_of_version_1_has_the_values_it_was_written_with() -> None:
    with sl.open(STORES / "v1" / "encoder_post.h5") as capture:
        assert capture.stream().labels == ("0_attn_out", "0_mlp_out", "1_attn_out", "1_mlp_out")
        assert capture.tokens.position.tolist() == [0, 3, 10] * 3
        assert capture.write("1_mlp_out")[0, :3].tolist() == [
            1.1537588834762573,
            -0.14237575232982635,
            -0.9915140867233276,
        ]
        assert capture.read("0_mlp_out")[-1, :2].tolist() == [-0.5082374811172485, -1.3046016693115234]
        assert capture.final[0, :2].tolist() == [0.15063869953155518, -1.6086442470550537]


def test_a_compact_bfloat16_file_of_version_1_serves_its_reads() -> None:
    with sl.open(STORES / "v1" / "nanogpt.h5") as capture:
        assert capture.writes.dtype == torch.bfloat16
        assert capture.write(-1)[0, :3].tolist() == [0.255859375, 1.03125, -0.6015625]
        assert capture.read(1)[-1, :3].tolist() == [-0.77734375, -1.25, 0.345703125]
        assert capture.final[0, :3].tolist() == [5.65625, 0.015625, 2.875]
