"""`streamlens ablate` as typed: what it prints, and how it ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import streamlens as sl
from streamlens.cli.ablate import COLUMNS
from streamlens.cli.app import main

MODEL = Path(__file__).resolve().parent.parent / "fixtures" / "model.pt"
SMALL = ["--window", "32", "--max-tokens", "512"]
Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in a folder that holds nothing but model.pt."""
    shutil.copy(MODEL, tmp_path)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(main, list(arguments))


def rows(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.stderr
    found: list[dict[str, Any]] = json.loads(result.stdout)["rows"]
    return found


def test_capture_and_drop_layer_7_as_typed(run: Run) -> None:
    assert run("capture", "model.pt").exit_code == 0
    done = run("ablate", "--drop-layer", "7")
    assert done.exit_code == 0, done.stderr
    assert "layer 7  skip" in done.stdout
    assert "model.h5, the newest capture here" in done.stderr
    assert "loss of the whole model" in done.stderr
    assert "95 % interval over" in done.stderr
    assert "correlations" not in done.stdout  # one drop has no order
    assert all(len(line) <= 80 for line in done.stdout.splitlines())


def test_the_sweep_is_the_librarys(run: Run, tmp_path: Path) -> None:
    run("capture", "model.pt", *SMALL)
    found = rows(run("ablate", "--json", "--plot", "x.png", "--csv", "x.csv"))
    assert found == sl.ablate(tmp_path / "model.h5", progress=False).rows()
    assert len(found) == 8 * 3
    assert (tmp_path / "x.png").stat().st_size > 10_000
    assert len((tmp_path / "x.csv").read_text().splitlines()) == 25
    live = rows(run("ablate", "model.pt", *SMALL, "--json"))
    assert [r["delta_loss"] for r in live] == pytest.approx([r["delta_loss"] for r in found], abs=1e-6)


def test_all_that_is_named_is_dropped_together(run: Run) -> None:
    run("capture", "model.pt", *SMALL)
    (row,) = rows(run("ablate", "--drop-layer", "1-2,4", "--drop-layer", "5", "--drop", "6.mlp", "--json"))
    assert row["drop"] == "layers 1-2,4-5 + 6_mlp_out"
    (row,) = rows(run("ablate", "--drop-layer", "1-2,4", "--mode", "mean", "--per-position", "--json"))
    assert (row["drop"], row["mode"]) == ("layers 1-2,4", "mean")
    (plain,) = rows(run("ablate", "--drop-layer", "1-2,4", "--json"))
    (kept,) = rows(run("ablate", "--drop-layer", "1-2,4", "--protect-first", "--json"))
    # Position 0 of a causal model is untouched then, so what is left is what the others lose.
    assert kept["kl_with_first"] == pytest.approx(kept["kl"] * 31 / 32, rel=1e-5)
    assert plain["kl_with_first"] != pytest.approx(plain["kl"] * 31 / 32, rel=1e-5)


def tables(shown: str) -> dict[str, list[str]]:
    """The tables of the terminal by name, the first one under nothing."""
    found = {}
    for part in shown.strip("\n").split("\n\n"):
        first, *rest = part.splitlines()
        name, lines = (first[:-1], rest) if first.endswith(":") else ("", [first, *rest])
        found[name] = lines
    return found


@pytest.mark.parametrize(
    ("arguments", "count", "columns", "below"),
    [
        (["--units", "layers"], 8, {"drop", "delta_loss"}, {"correlations": 3}),
        (["--units", "sublayers"], 16, {"drop", "delta_loss"}, {"correlations": 3}),
        (["--units", "both"], 24, {"drop", "delta_loss"}, {"correlations": 6}),
        (["--blocks"], 8 * 9 // 2 - 1, {"start", "length", "delta_loss"}, {"best": 7}),
        (["--pairs"], 8 * 7 // 2, {"first", "second", "interaction"}, {}),
        (["--pairs", "--units", "sublayers"], 16 * 15 // 2, {"first", "second", "interaction"}, {}),
        (["--swap"], 7, {"swap", "delta_loss"}, {}),
        (["--greedy", "2"], 5 * 2, {"order", "dropped", "delta_loss"}, {}),
        (["--effects"], 16, {"direct", "indirect", "norm_effect", "total"}, {"slope": 1, "response": 8}),
        (["--effects", "--units", "layers"], 8, {"direct", "total"}, {"slope": 1, "response": 8}),
    ],
)
def test_studies(run: Run, arguments: list[str], count: int, columns: set[str], below: dict[str, int]) -> None:
    run("capture", "model.pt", *SMALL)
    done = run("ablate", *arguments, "--json")
    found = rows(done)
    assert len(found) == count
    assert columns | {"interval_over"} <= set(found[0])
    assert found[0]["interval_over"] == "window"
    assert "95 % interval over 16 windows: there are too few documents" in done.stderr
    others = {name: len(more) for name, more in json.loads(done.stdout).items() if name in COLUMNS}
    assert others.keys() == below.keys()
    shown = tables(run("ablate", *arguments).stdout)
    assert {name: len(lines) - 1 for name, lines in shown.items()} == {"": count} | below
    assert max(len(line) for lines in shown.values() for line in lines) <= 80


def test_ranks_of_the_proxies_slope_and_response_are_the_librarys(run: Run, tmp_path: Path) -> None:
    run("capture", "model.pt", *SMALL)
    found = sl.ablate(tmp_path / "model.h5", units="layers", progress=False)
    printed = json.loads(run("ablate", "--units", "layers", "--json").stdout)["correlations"]
    assert printed == found.correlations()
    for row in printed:
        score, proxy = ([r[name] for r in found.rows()] for name in ("delta_loss", row["proxy"]))
        # Without ties, Spearman: 1 - 6 sum d^2 / (n (n^2 - 1)).
        squares = sum((sorted(score).index(a) - sorted(proxy).index(b)) ** 2 for a, b in zip(score, proxy, strict=True))
        assert row["spearman"] == pytest.approx(1 - 6 * squares / (8 * 63))
        assert -1 <= row["low"] <= row["high"] <= 1
    answered = sl.effects(tmp_path / "model.h5", progress=False)
    printed = json.loads(run("ablate", "--effects", "--json").stdout)
    assert printed["slope"][0]["slope_total_on_direct"] == pytest.approx(answered.slope)
    assert printed["slope"][0]["low"] < answered.slope < printed["slope"][0]["high"]
    assert len(printed["response"]) == 16 * 15 // 2
    first = printed["response"][0]
    unit = [u.label for u in answered.units].index(first["drop"])
    assert first["response"] == answered.response[unit, answered.labels.index(first["answered_by"])]
    assert abs(first["response"]) == abs(answered.response).max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--drop-layer", "8"], "has layers 0 to 7, not 8"),
        (["--drop-layer", "x"], "neither a number nor a range"),
        (["--drop", "7.mixer"], "that layer has 7.attn, 7.mlp"),
        (["--drop", "attention"], "names nothing to drop"),
        (["--pairs", "--drop-layer", "1"], "cannot be combined with --drop-layer"),
        (["--swap", "--mode", "zero"], "--swap cannot be combined with --mode"),
        (["--pairs", "--greedy", "2"], "--pairs and --greedy are different studies"),
        (["--blocks", "--pairs"], "--blocks and --pairs are different studies"),
        (["--blocks", "--units", "layers"], "--blocks cannot be combined with --units"),
        (["--drop-layer", "1", "--units", "layers"], "--units says what a sweep goes over"),
        (["--pairs", "--units", "both"], "units of pairs are layers or sublayers, not 'both'"),
        (["--per-position"], "pass --mode mean with it"),
        (["--effects", "--mode", "zero"], "--effects cannot be combined with --mode"),
        (["--greedy", "9"], "drop 1 to 8, not 9"),
        (["--mode", "nothing"], "is not one of"),
    ],
)
def test_mistakes(run: Run, arguments: list[str], message: str) -> None:
    run("capture", "model.pt", *SMALL)
    done = run("ablate", *arguments)
    assert done.exit_code == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_capture_or_with_one_that_lacks_something(run: Run, tmp_path: Path) -> None:
    done = run("ablate", "--drop-layer", "7")
    assert done.exit_code == 2
    assert "no capture is here" in done.stderr
    run("capture", "model.pt", *SMALL, "--kinds", "mlp")
    done = run("ablate", "--drop-layer", "7")
    assert done.exit_code == 1
    assert "was narrowed" in done.stderr
    assert "capture the whole stream" in done.stderr
    run("capture", "model.pt", *SMALL, "--overwrite")
    (tmp_path / "model.pt").unlink()
    done = run("ablate", "--drop-layer", "7")
    assert done.exit_code == 1
    assert "--model-file" in done.stderr
    assert rows(run("ablate", "--drop-layer", "7", "--model-file", str(MODEL), "--json"))[0]["delta_loss"] > 0
