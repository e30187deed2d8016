"""`streamlens lens` as it is typed, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from streamlens.cli.app import main


class TestCommand:
    MODEL = str(Path(__file__).resolve().parent.parent / "fixtures" / "model.pt")
    SMALL = ("--window", "32", "--max-tokens", "256")

    @pytest.fixture(autouse=True)
    def _here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)

    def run(self, *arguments: str, code: int = 0) -> Any:
        done = CliRunner().invoke(main, list(arguments))
        assert done.exit_code == code, done.output
        return done

    def rows(self, *arguments: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.run("lens", *arguments, "--json").stdout)["rows"]
        return found

    def test_after_a_capture_as_typed(self) -> None:
        self.run("capture", self.MODEL, *self.SMALL)
        shown = self.run("lens")
        assert "the newest capture here" in shown.stderr
        assert max(map(len, shown.stdout.splitlines())) <= 80
        rows = self.rows()
        assert len(rows) == 17
        assert rows[-1]["kl"] == 0
        live = self.rows(self.MODEL, *self.SMALL)
        assert [r["kl"] for r in live] == pytest.approx([r["kl"] for r in rows], abs=1e-5)

    def test_grid(self) -> None:
        shown = self.run("lens", self.MODEL, *self.SMALL, "--grid", "--at", "3-5", "--plot", "grid.png").stdout
        assert "5:" in shown.splitlines()[0]
        assert Path("grid.png").exists()
        assert len(self.rows(self.MODEL, *self.SMALL, "--grid", "--at", "3-5")) == 17 * 3

    @pytest.mark.parametrize("how", ["--grid", "--writes"])
    def test_positions_and_documents_that_are_not_there(self, how: str) -> None:
        self.run("capture", self.MODEL, *self.SMALL, "--positions", "2-4,9")
        found = self.run("lens", how, "--at", "500,502", code=2)
        assert "document 0 has none of the positions 500, 502: it has positions 2 to 4, 9" in found.stderr
        assert found.stdout == ""
        missing = self.run("lens", how, "--doc", "99", "--at", "2", code=2).stderr
        assert "there is no document 99: there are documents 0 to " in missing
        if how == "--grid":
            assert {row["position"] for row in self.rows("--grid")} == {2, 3, 4, 9}

    def test_a_tuned_lens_is_made_and_used(self) -> None:
        self.run("capture", self.MODEL, "--max-tokens", "4096")
        self.run("lens", "model.h5", "--train", "bias", "--save", "lens.pt")
        tuned, bare = self.rows("--tuned", "lens.pt"), self.rows()
        assert tuned[0]["kl"] < bare[0]["kl"]
        assert [r["on_training_text"] for r in tuned] == [True] * len(tuned)
        assert "text that the tuned lens was trained on" in self.run("lens", "--tuned", "lens.pt").stderr
        other = self.run("lens", self.MODEL, *self.SMALL, "--tuned", "lens.pt")
        assert "trained on" not in other.stderr

    def test_lower_precision_says_by_how_much(self) -> None:
        self.run("capture", self.MODEL, *self.SMALL)
        assert "kl differs by" in self.run("lens", "--products", "bfloat16").stderr

    def test_writes(self) -> None:
        rows = self.rows(self.MODEL, *self.SMALL, "--writes", "--at", "1-3")
        assert {r["label"] for r in rows} >= {"embed", "pos_embed", "0_attn_out"}

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("--save x.pt", "--save names the .pt file"),
            ("--train bias --save x.txt", "--save names the .pt file"),
            ("--train bias --grid", "--grid would have no effect in --train bias"),
            (
                "--train bias --states 0-3 --top-k 1 --jsd",
                "--jsd, --states, --top-k would have no",
            ),
            ("--train ridge --steps 5", "--steps would have no effect in --train ridge"),
            ("--writes --tuned l.pt --jsd --grid", "--grid, --jsd, --tuned would have no effect in --writes"),
            ("--writes --products bfloat16", "--products would have no effect in --writes"),
            ("--steps 5", "--steps would have no effect in a look at the states"),
            ("--at 1-3", "--at would have no effect in a look at the states"),
            ("--top-k 0", "1 or more, not 0"),
            ("--affine-match", "affine_match is for post-norm streams"),
        ],
    )
    def test_what_does_not_go_together(self, arguments: str, message: str) -> None:
        assert message in self.run("lens", self.MODEL, *self.SMALL, *arguments.split(), code=2).stderr
