"""Where results go: valid JSON, targets that are looked at before the work begins, a table before any file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from click.testing import Result as Ran
from matplotlib.axes import Axes

import streamlens as sl
from streamlens.analyses import source
from streamlens.analyses.figures import axes, finish
from streamlens.analyses.result import Result, plain
from streamlens.cli.app import main
from streamlens.errors import StorageError, UsageError
from tests.conftest import case

MODEL = str(Path(__file__).resolve().parent.parent / "fixtures" / "model.pt")
SMALL = ["--window", "32", "--max-tokens", "128"]
Run = Callable[..., Ran]


@dataclass(frozen=True)
class Odd(Result):
    """What JSON has no word for."""

    title: str = "odd"

    def rows(self) -> list[dict[str, Any]]:
        odd = np.array([1.5, np.nan])
        at = (0, {"x": np.int64(3)})
        return [{"nan": float("nan"), "low": np.float64("-inf"), "array": odd, "at": at, "p": Path("a")}]

    def plot(self, ax: Axes | None = None) -> Axes:
        return finish(axes(ax), x="x", y="y")


def strict(text: str) -> Any:
    def refuse(word: str) -> Any:
        raise ValueError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_json_is_valid_whatever_is_in_it(tmp_path: Path) -> None:
    wanted = [{"nan": None, "low": None, "array": [1.5, None], "at": [0, {"x": 3}], "p": "a"}]
    assert strict(Odd().save(tmp_path / "x.json").read_text()) == wanted
    assert plain(Odd().rows()) == wanted


def test_json_of_a_real_result(tmp_path: Path) -> None:
    found = sl.logit_lens(case("gpt2").module, inputs=case("gpt2").inputs, progress=False)
    rows = strict(found.save(tmp_path / "lens.json").read_text())
    assert len(rows) == len(found.rows())
    assert None in {value for row in rows for value in row.values()}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.jpg", r"x\.jpg: save to one of \.png, \.svg, \.pdf, \.csv, \.parquet, \.json"),
        ("x", "save to one of"),
        ("nowhere/x.csv", "there is no folder nowhere"),
    ],
)
def test_a_target_that_cannot_be_is_refused(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        Odd().save(name)


def test_what_the_disk_says_is_told(tmp_path: Path) -> None:
    full = tmp_path / "x.csv"
    full.symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"x\.csv .*No space left on device"):
        Odd().save(full)


# ---- as typed -------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(main, list(arguments))


@pytest.mark.parametrize(
    ("option", "target", "message"),
    [
        ("--plot", "x.csv", "save to one of .png, .svg, .pdf"),
        ("--plot", "x.jpg", "save to one of .png, .svg, .pdf"),
        ("--csv", "x.png", "save to one of .csv"),
        ("--parquet", "x.csv", "save to one of .parquet"),
        ("--plot", "no/x.png", "there is no folder no"),
        ("--csv", "sealed/x.csv", "may not be written"),
    ],
)
def test_a_wrong_target_stops_before_the_model_is_loaded(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, target: str, message: str
) -> None:
    (tmp_path / "sealed").mkdir()
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "sealed" not in str(path) and allowed(path, mode))
    monkeypatch.setattr(source, "live_source", None)
    done = run("norms", MODEL, *SMALL, option, target)
    assert done.exit_code == 2
    assert f"invalid value for '{option}'" in done.stderr
    assert message in " ".join(done.stderr.split())


def test_parquet_without_its_library_is_told_before_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    there = importlib.util.find_spec
    gone = ("pyarrow", "fastparquet")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in gone else there(name, *rest))
    done = run("norms", MODEL, *SMALL, "--parquet", "x.parquet")
    assert done.exit_code == 2
    assert "pip install pyarrow" in " ".join(done.stderr.split())


def test_the_table_is_printed_before_a_file_fails(run: Run, tmp_path: Path) -> None:
    (tmp_path / "full.csv").symlink_to("/dev/full")
    done = run("norms", MODEL, *SMALL, "--csv", "full.csv", "--plot", "x.png", "--json")
    assert done.exit_code == 3
    assert strict(done.stdout)["rows"]
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_all_targets_are_written(run: Run, tmp_path: Path) -> None:
    done = run("norms", MODEL, *SMALL, "--csv", "x.csv", "--plot", "x.svg", "--parquet", "x.parquet")
    assert done.exit_code == 0, done.stderr
    assert all((tmp_path / f"x.{suffix}").stat().st_size > 500 for suffix in ("csv", "svg", "parquet"))
    assert done.stderr.count("note: wrote x.") == 3
