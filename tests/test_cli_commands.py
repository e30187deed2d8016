"""The commands as typed: what they print, where, and how they end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from click.testing import CliRunner, Result

import streamlens as sl
from streamlens.cli.app import main

MODEL = str(Path(__file__).resolve().parent.parent / "fixtures" / "model.pt")
SMALL = ["--window", "32", "--max-tokens", "256"]
Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(main, list(arguments))

    return invoke


def rows(result: Result) -> list[dict[str, Any]]:
    payload = json.loads(result.stdout)
    assert payload["schema"] == 1
    found: list[dict[str, Any]] = payload["rows"]
    return found


class TestCapture:
    def test_as_typed_in_the_readme(self, run: Run, tmp_path: Path) -> None:
        done = run("capture", MODEL)
        assert done.exit_code == 0, done.stderr
        assert (tmp_path / "model.h5").exists()
        assert "no text was given: built-in English text" in done.stderr
        assert "bit for bit" in done.stderr

    def test_json_says_what_was_proved(self, run: Run) -> None:
        (row,) = rows(run("capture", MODEL, *SMALL, "--json"))
        assert row["tokens"] == 256
        assert row["exact_blocks"] == row["blocks"] == 1
        assert row["sublayers"] == 16
        assert row["head_exact"] is True

    def test_dry_run_writes_nothing_and_counts_to_the_byte(self, run: Run, tmp_path: Path) -> None:
        planned = rows(run("capture", MODEL, *SMALL, "--dry-run", "--json"))
        assert list(tmp_path.iterdir()) == []
        assert run("capture", MODEL, *SMALL).exit_code == 0
        with h5py.File(tmp_path / "model.h5") as file:
            sizes = {p["dataset"]: file[p["dataset"]].id.get_storage_size() for p in planned[:-1]}
        assert {p["dataset"]: p["bytes"] for p in planned[:-1]} == sizes
        assert planned[-1]["bytes"] == sum(sizes.values())

    def test_narrowed(self, run: Run, tmp_path: Path) -> None:
        done = run(
            "capture", MODEL, *SMALL, "--layers", "0-1,3", "--kinds", "mlp", "--positions", "0,5-6", "--no-output"
        )
        assert done.exit_code == 0, done.stderr
        with h5py.File(tmp_path / "model.h5") as file:
            assert file["/streams/main/write"].shape == (3, 8 * 3, 80)
            assert "output" not in file
            assert [row["label"] for row in file["/streams/main/sublayers"][:]] == [
                b"0_mlp_out",
                b"1_mlp_out",
                b"3_mlp_out",
            ]

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (["--layers", "9"], 2, "has layers 0 to 7, not 9"),
            (["--layers", "a"], 2, "neither a number nor a range"),
            (["--layers", "0,5-3"], 2, "'5-3' runs backwards: write 3-5"),
            (["--positions", "5-3"], 2, "'5-3' runs backwards: write 3-5"),
            (["--compact", "--kinds", "mlp"], 2, "cannot be combined"),
            (["--window", "9999"], 1, "256"),
            (["--text", "missing.txt"], 2, "does not exist"),
            (["--out", "no/such/folder.h5"], 3, "is not a folder"),
        ],
    )
    def test_mistakes_get_one_clear_line(self, run: Run, arguments: list[str], code: int, message: str) -> None:
        done = run("capture", MODEL, *SMALL, *arguments)
        assert done.exit_code == code, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr

    def test_an_empty_text(self, run: Run, tmp_path: Path) -> None:
        (tmp_path / "empty.txt").write_text("")
        done = run("capture", MODEL, "--text", "empty.txt")
        assert done.exit_code == 1
        assert "empty" in done.stderr

    def test_an_evil_pickle_runs_nothing(self, run: Run, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> tuple[Any, ...]:
                return (Path.touch, (tmp_path / "sentinel",))

        torch.save({"model": Evil()}, tmp_path / "evil.pt")
        done = run("capture", "evil.pt")
        assert done.exit_code == 5, done.stderr
        assert not (tmp_path / "sentinel").exists()

    def test_a_model_without_tokenizer_gets_random_tokens_and_is_told(self, run: Run) -> None:
        done = run("capture", "--model", "tests.test_cli_commands:tiny", "--window", "8", "--max-tokens", "64")
        assert done.exit_code == 0, done.stderr
        assert "random tokens (seed 0)" in done.stderr


def tiny() -> torch.nn.Module:
    """Build a model for `--model`."""
    from fixtures import zoo

    return zoo.build("nanogpt").module


class TestInspect:
    def test_a_model_is_drawn(self, run: Run) -> None:
        shown = run("inspect", MODEL).stdout
        assert "main: d_model 80, 8 layers, 16 sublayers" in shown
        assert "├─ x_0 = embed + pos_embed" in shown
        assert "layers 0 to 7: norm before the branch" in shown
        assert "the writes add up bit for bit" in shown

    def test_a_model_in_json(self, run: Run) -> None:
        found = rows(run("inspect", MODEL, "--json"))
        assert [r["label"] for r in found][:2] == ["0_attn_out", "0_mlp_out"]
        assert found[0]["heads"] == 4

    def test_a_capture_with_its_health(self, run: Run) -> None:
        run("capture", MODEL, *SMALL)
        shown = run("inspect", "model.h5")
        assert shown.exit_code == 0, shown.stderr
        assert "256 tokens" in shown.stdout
        assert "all blocks add up bit for bit" in shown.stdout
        found = rows(run("inspect", "model.h5", "--json"))
        assert found[-1]["label"] == "final"
        assert all(r["not_finite"] == 0 and r["largest"] > 0 for r in found)


def about(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.stdout)["about"]
    return found


def test_json_of_inspect_says_what_the_drawing_says(run: Run) -> None:
    """Of a model and of its capture: size, streams, head and the proof; known from how the model was made."""
    assert run("capture", MODEL, *SMALL).exit_code == 0
    model, capture = about(run("inspect", MODEL, "--json")), about(run("inspect", "model.h5", "--json"))
    module = sl.load(MODEL).module
    assert model["parameters"] == sum(p.numel() for p in module.parameters())
    assert (model["dtype"], model["max_positions"], model["proof"]["exact"], model["head_exact"]) == (
        "float32",
        256,
        True,
        True,
    )
    (stream,) = model["streams"]
    assert stream == {
        "name": "main",
        "d_model": 80,
        "layers": 8,
        "sublayers": 16,
        "kinds": {"attn": 8, "mlp": 8},
        "norms": {"pre": 16},
        "embedding": ["embed", "pos_embed"],
    }
    assert (capture["streams"], capture["head"]) == (model["streams"], model["head"])
    assert (capture["tokens"], capture["model_sha256"]) == (256, model["sha256"])
    assert capture["stored"] == {"main": 16}
    wanted = {"exact": True, "worst_error": 0.0, "blocks": 1, "exact_blocks": 1, "state": None, "block": None}
    assert capture["proof"] == wanted


def test_the_dtype_is_that_of_the_weights_not_of_some_index_buffer(run: Run) -> None:
    done = run("inspect", "--model", "tests.test_cli_commands:encoder", "--json")
    assert done.exit_code == 0, done.stderr
    (row,) = rows(run("capture", "--model", "tests.test_cli_commands:encoder", "--window", "8", "--json"))
    assert row["dtype"] == "float32"


def encoder() -> torch.nn.Module:
    """Build a model whose first named tensor is a buffer of integers."""
    from fixtures import zoo

    return zoo.build("bert").module


class TestVerify:
    def test_a_good_file(self, run: Run) -> None:
        run("capture", MODEL, *SMALL)
        (row,) = rows(run("verify", "model.h5", "--json"))
        assert row["damaged"] == 0
        assert row["exact_blocks"] == row["blocks"]

    def test_a_flipped_byte(self, run: Run, tmp_path: Path) -> None:
        run("capture", MODEL, *SMALL)
        with h5py.File(tmp_path / "model.h5") as file:
            offset = file["/streams/main/read"].id.get_offset()
        with (tmp_path / "model.h5").open("r+b") as raw:
            raw.seek(offset + 17)
            raw.write(b"\xff")
        done = run("verify", "model.h5")
        assert done.exit_code == 4
        assert "/streams/main/read[0], block 0" in done.stderr

    def test_not_a_capture(self, run: Run, tmp_path: Path) -> None:
        with h5py.File(tmp_path / "other.h5", "w") as file:
            file["x"] = [1]
        done = run("verify", "other.h5")
        assert done.exit_code == 1
        assert "not a capture" in done.stderr
