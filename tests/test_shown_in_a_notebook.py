"""What is shown of the things that people hold in a notebook: one line, or the tree; and silence on request."""

from __future__ import annotations

import contextvars
import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import streamlens as sl
from fixtures import zoo
from streamlens.cli.app import main
from streamlens.errors import AnatomyError, ProofError, UsageError
from streamlens.progress import silent
from streamlens.proof import Verdict
from tests.conftest import case

MODEL = Path(__file__).parent.parent / "fixtures" / "model.pt"


@pytest.fixture(scope="module")
def capture_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = case("gpt2")
    path = tmp_path_factory.mktemp("shown") / "x.h5"
    sl.capture(found.module, inputs=found.inputs, out=path, progress=False).close()
    return path


# ---- one line, or the tree ----------------------------------------------------------------------------------------


def test_an_anatomy_prints_as_the_tree_of_inspect() -> None:
    anatomy = sl.discover(sl.load(MODEL), torch.arange(8)[None])
    inspected = CliRunner().invoke(main, ["inspect", str(MODEL)]).stdout
    assert str(anatomy).count("\n") == 5
    assert f"\n{anatomy}\n" in inspected
    assert repr(anatomy) == "<anatomy: main: d_model 80, 8 layers, 16 sublayers>"
    assert repr(anatomy.stream()) == "<stream 'main': d_model 80, 8 layers, 16 sublayers>"
    assert repr(case("t5").anatomy).count("sublayers") == 2
    assert "\n" not in repr(case("t5").anatomy)


def test_a_notebook_shows_the_tree() -> None:
    formatters = pytest.importorskip("IPython.core.formatters")
    anatomy = case("t5").anatomy
    assert formatters.PlainTextFormatter()(anatomy) == str(anatomy)
    assert str(anatomy).startswith("encoder: d_model 32, ")


def test_a_model_is_one_line() -> None:
    model = sl.load(MODEL)
    count = sum(tensor.numel() for tensor in dict(model.module.named_parameters()).values())
    line = f"<model NanoGPT: {count:,} parameters, float32, from {MODEL}, sha256 {model.sha256[:16]}>"
    assert repr(model) == line
    mixed = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1).to(torch.bfloat16))
    assert "Sequential: 13 parameters, bfloat16 and float32, from" in repr(sl.load(mixed))
    assert "ReLU: 0 parameters, from" in repr(sl.load(nn.ReLU()))


def test_a_verification_is_one_line(capture_file: Path, tmp_path: Path) -> None:
    found = sl.verify(capture_file)
    assert str(found) == f"{capture_file}: every hash matches and all blocks add up bit for bit (1)"
    assert repr(found) == f"<verification of {found}>"
    inexact = dataclasses.replace(found, blocks=8, exact_blocks=7, worst=1.5e-07, where="x_2")
    assert str(inexact).endswith(
        "7 of 8 blocks add up bit for bit; worst relative error 1.5e-07 at x_2, which the dtype allows"
    )
    wrong = dataclasses.replace(inexact, worst=0.25, within_bound=False)
    assert str(wrong) == f"{capture_file}: the writes do not add up: x_2 is off by 0.25 (relative L2)"

    damaged = tmp_path / "damaged.h5"
    damaged.write_bytes(capture_file.read_bytes())
    with sl.open(capture_file) as capture:
        place = capture._file.extents["/streams/main/write"].offset
        row = capture.n_tokens * capture.stream().anatomy.d_model * 4
        tokens = capture.n_tokens
    with damaged.open("r+b") as file:
        file.seek(place + 5 * row)
        byte = file.read(1)[0]
        file.seek(place + 5 * row)
        file.write(bytes([byte ^ 1]))
    found = sl.verify(damaged)
    assert str(found) == f"{damaged} is damaged in 1 place, first in /streams/main/write[5], block 0"
    message = f"the stored values of write[5] at tokens 0 to {tokens} are not those that were written"
    assert found.problems[0].message == message
    assert str(found.problems[0]) == f"{damaged}: /streams/main/write[5], block 0: {message}"


# ---- messages -----------------------------------------------------------------------------------------------------


def test_a_refused_proof_says_the_way_out_in_python_and_on_the_command_line() -> None:
    stream = case("gpt2").anatomy.stream()
    with pytest.raises(ProofError, match=r"allow_unproven=True \(--allow-unproven\) captures it all the same"):
        Verdict(exact=False, worst=1.0, stream="main", state=2).demand(stream, torch.float32)


def test_a_puzzle_is_listed_once() -> None:
    specimen = zoo.build_negative("highway")
    with pytest.raises(AnatomyError) as refused:
        sl.discover(specimen.module, specimen.inputs.get("", dict(specimen.inputs)))
    puzzles = [line for line in str(refused.value).splitlines() if line.startswith("  ")]
    assert puzzles
    assert len(set(puzzles)) == len(puzzles)
    assert len({re.search(r"layers\.\d", line)[0] for line in puzzles}) == len(puzzles)  # type: ignore[index]


def test_tracks_are_drawn_at_a_position(capture_file: Path) -> None:
    """Each position, drawn from a look at it alone, which has no other to confuse it with."""
    found = case("gpt2")
    every = sl.token_tracks(found.module, inputs=found.inputs, positions=range(2, 6))
    for position in range(2, 6):
        alone = sl.token_tracks(found.module, inputs=found.inputs, positions=[position]).plot(most=99)
        drawn = every.plot(at=position, most=99)
        assert drawn.get_title("left") == alone.get_title("left")
        assert f"position {position} " in drawn.get_title("left")
        assert sum(str(line.get_label()).endswith(" (came)") for line in drawn.lines) == 1
        for line, expected in zip(drawn.lines, alone.lines, strict=True):
            assert line.get_label() == expected.get_label()
            assert line.get_ydata() == pytest.approx(expected.get_ydata(), rel=1e-4)
    assert every.plot().get_title("left") == every.plot(at=5).get_title("left")
    for wrong in (0, 6, -1):
        with pytest.raises(UsageError, match=rf"position {wrong} was not looked at: .* takes one of 2, 3, 4, 5"):
            every.plot(at=wrong)


# ---- silence ------------------------------------------------------------------------------------------------------


def norms(**options: Any) -> None:
    found = case("gpt2")
    sl.contribution_norms(found.module, inputs=found.inputs, **options)


def test_quiet_is_a_context(capsys: pytest.CaptureFixture[str]) -> None:
    note = logging.getLogger("streamlens.checkpoint.pretrained").warning
    norms()
    assert "tokens" in capsys.readouterr().err
    with sl.quiet(), sl.quiet():
        norms(progress=True)
        with sl.quiet():
            norms()
        norms()
        note("a note")
        assert not logging.getLogger("streamlens.checkpoint.pretrained").isEnabledFor(logging.WARNING)
    assert capsys.readouterr().err == ""
    assert not silent()
    norms()
    assert "tokens" in capsys.readouterr().err
    assert logging.getLogger("streamlens.checkpoint.pretrained").isEnabledFor(logging.WARNING)


def test_quiet_alone_holds_in_every_later_cell(capsys: pytest.CaptureFixture[str]) -> None:
    """A notebook may run each of its cells in a context of its own."""
    calls: list[sl.quiet] = []
    contextvars.copy_context().run(lambda: calls.append(sl.quiet()))
    try:
        with sl.quiet():
            pass
        contextvars.Context().run(norms)
        assert capsys.readouterr().err == ""
        assert "\n" not in repr(calls[0])
    finally:
        calls[0].__exit__(None, None, None)
    norms()
    assert capsys.readouterr().err != ""


def test_quiet_gives_back_the_level_of_the_log_in_any_order() -> None:
    log = logging.getLogger("streamlens")
    before = log.level
    log.setLevel(logging.INFO)
    try:
        first, second = sl.quiet(), sl.quiet()
        first.__exit__(None, None, None)
        assert (silent(), log.level) == (True, logging.ERROR)
        second.__exit__(None, None, None)
        second.__exit__(None, None, None)
        assert (silent(), log.level) == (False, logging.INFO)
    finally:
        log.setLevel(before)


def test_quiet_ends_when_the_body_raises() -> None:
    with pytest.raises(ValueError, match="mine"), sl.quiet():
        raise ValueError("mine")
    assert not silent()
