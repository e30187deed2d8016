"""`streamlens position` as typed, its figures, and its answers on real weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import streamlens as sl
from streamlens.cli.app import main
from tests.conftest import case, minilm, smollm2

MODEL = str(Path(__file__).resolve().parent.parent / "fixtures" / "model.pt")
SMALL = ["--window", "16", "--max-tokens", "512"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def rows(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.stderr
    payload = json.loads(result.stdout)
    assert (payload["schema"], payload["command"]) == (1, "position")
    found: list[dict[str, Any]] = payload["rows"]
    return found


def test_a_stream_without_positions_has_a_figure_too() -> None:
    found = case("gptj")
    result = sl.positional_persistence(found.module, inputs=found.inputs, progress=False)
    assert np.isnan(result.origin).all()
    assert [text.get_text() for text in result.plot_origin().texts] == ["every state is within its null band"]


class TestCommand:
    def test_after_a_capture_in_an_empty_folder(self, folder: Path) -> None:
        assert run("capture", MODEL, *SMALL).exit_code == 0
        done = run("position", "--plot", "position.png", "--csv", "position.csv")
        assert done.exit_code == 0, done.stderr
        assert "position enters with pos_embed" in done.stderr
        lines = done.stdout.splitlines()
        assert lines[0].split()[:3] == ["label", "share", "null_high"]
        assert max(map(len, lines)) <= 80
        assert len(lines) == 1 + 17
        assert (folder / "position.png").stat().st_size > 10_000
        assert len((folder / "position.csv").read_text().splitlines()) == 18

    def test_file_and_model_give_the_same_rows(self, folder: Path) -> None:
        assert run("capture", MODEL, *SMALL).exit_code == 0
        stored, live = rows(run("position", "model.h5", "--json")), rows(run("position", MODEL, *SMALL, "--json"))
        for one, two in zip(stored, live, strict=True):
            assert one.pop("label") == two.pop("label")
            assert one == pytest.approx(two, rel=1e-4, abs=1e-5)

    def test_origin_is_a_long_table(self, folder: Path) -> None:
        done = run("position", MODEL, *SMALL, "--origin", "--csv", "origin.csv", "--plot", "origin.png")
        assert done.exit_code == 0, done.stderr
        assert "measured on positions 1 to 15 of 32 documents or windows" in done.stderr
        lines = done.stdout.splitlines()
        assert lines[0].split()[:2] == ["term", "kind"]
        assert len(lines) == 1 + 2 + 16
        assert max(map(len, lines)) <= 80
        heading, *table = (folder / "origin.csv").read_text().splitlines()
        assert heading == "state,label,term,kind,share"
        assert len(table) == sum(2 + k for k in range(17))
        found = rows(run("position", MODEL, *SMALL, "--origin", "--json"))
        last = [row["share"] for row in found if row["state"] == 16 and row["share"] is not None]
        assert sum(last) == pytest.approx(1, abs=1e-3)

    def test_probes(self, folder: Path) -> None:
        found = rows(run("position", MODEL, *SMALL, "--probes", "--json", "--plot", "probes.svg"))
        assert [row["state"] for row in found] == list(range(0, 17, 2))
        assert found[0]["r_squared"] > 0.7
        assert (folder / "probes.svg").exists()

    def test_lesion(self, folder: Path) -> None:
        done = run(
            "position", MODEL, *SMALL, "--lesion", "--at", "2_attn_out", "--alpha", "1", "--alpha", "0", "--json"
        )
        found = rows(done)
        assert [row["mode"] for row in found] == ["scale", "scale", "position", "random"]
        assert found[0]["delta_loss"] == 0.0
        assert found[1]["delta_loss"] > 0.1
        assert found[0]["position_left_last"] == 1.0
        assert found[2]["position_left_last_over_control"] < 1
        assert found[2]["delta_loss_control"] == found[3]["delta_loss"]
        table = run("position", MODEL, *SMALL, "--lesion", "--at", "2_attn_out").stdout.splitlines()
        assert max(map(len, table)) <= 80

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (["--probes", "--lesion"], 2, "exclude each other"),
            (["--at", "2_attn_out"], 2, "--at: only with --lesion"),
            (["--origin", "--lesion"], 2, "--origin and --lesion exclude each other"),
            (["--documents", "9"], 2, "only with --probes or --lesion"),
            (["--positions", "99"], 1, "has 99 positions: ask for fewer"),
            (["--lesion", "--at", "99_attn_out"], 1, "no sublayer '99_attn_out'"),
            (["--stream", "encoder"], 1, "no stream 'encoder'"),
        ],
    )
    def test_mistakes_get_one_clear_line(self, folder: Path, arguments: list[str], code: int, message: str) -> None:
        done = run("position", MODEL, *SMALL, *arguments)
        assert done.exit_code == code, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.real
def test_position_fades_in_minilm_which_brings_it_along_the_skip() -> None:
    """Post-norm with learned positions: Song & Zhong found the same in BERT (.36 to .12), by their measure."""
    model = minilm()
    found = sl.positional_persistence(model, window=64, max_tokens=64 * 96, progress=False)
    assert found.position_embedding == "pos_embed"
    np.testing.assert_allclose(np.nansum(found.origin, axis=1), 1.0, atol=1e-4)
    assert (found.position_share > found.null_high).all()
    assert found.position_share[-1] < found.position_share[0] / 2
    assert found.relative_norm[-1] < found.relative_norm[0]
    assert found.carried[0] == pytest.approx(1.0, abs=1e-4)


@pytest.mark.real
def test_position_emerges_in_smollm2_which_has_no_position_embedding() -> None:
    """RoPE: x_0 holds tokens alone. Position 0 must not count: its vector alone would make the share almost 1."""
    model = smollm2()
    found = sl.positional_persistence(model, window=24, max_tokens=24 * 28, progress=False)
    assert found.position_embedding is None
    assert found.position_share[0] < 0.01
    later = slice(28, 58)
    assert (found.position_share[later] > 2 * found.null_high[later]).all()
    assert (found.position_share_all[later] > 0.9).all()
    assert (np.abs(found.carried[later]) < 0.05).all()
    known = found.position_share > found.null_high
    np.testing.assert_allclose(np.nansum(found.origin[known], axis=1), 1.0, atol=1e-4)
    assert np.isnan(found.origin[~known]).all()
