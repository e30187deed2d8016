"""What is printed, as a stranger sees it in a terminal of 80 columns: widths, colours, progress, quiet and verbose."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

import streamlens as sl
from streamlens.cli.app import COMMANDS, main
from streamlens.cli.output import HEADINGS, WIDTH, human, table, wrapped
from tests.conftest import minilm, smollm2

ROOT = Path(__file__).resolve().parent.parent
PRE = ROOT / "fixtures" / "model.pt"
POST = "fixtures.witnesses:post_norm"
SMALL = ["--window", "32", "--max-tokens", "512"]

TABLES = {
    "inspect": ("", "--cite"),
    "verify": ("",),
    "norms": ("", "--heads", "--logits", "--heads --logits", "--layers-only", "--states", "--cosines"),
    "lens": ("", "--grid", "--writes", "--jsd", "--top-k 1,2,5,10,100", "--dtype bf16", "--states 0,3"),
    "ablate": (
        "--mode zero", "--mode mean --per-position", "--drop-layer 1", "--units sublayers", "--blocks", "--pairs",
        "--swap", "--greedy 2", "--effects", "--protect-first",
    ),
    "position": (
        "", "--origin", "--include-first", "--probes --documents 6", "--lesion --documents 6 --at 1_attn_out",
    ),
    "gradient": ("", "--paths", "--paths --max-length 2", "--sequences 2"),
}  # fmt: skip
"""Every command that prints a table, with every option that changes its columns."""

STATES = ["norms", "pre.h5", "--states"]
"""A command that shows progress and has a note to give."""

CASES = [(name, options) for name, all_options in TABLES.items() for options in all_options]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A capture of a pre-norm and one of a post-norm model, with heads."""
    made = tmp_path_factory.mktemp("captures")
    before = Path.cwd()
    os.chdir(made)
    shutil.copy(PRE, "model.pt")
    for source in (["model.pt", "--out", "pre.h5"], ["--model", POST, "--out", "post.h5"]):
        done = CliRunner().invoke(main, ["capture", *source, *SMALL, "--heads"])
        assert done.exit_code == 0, done.stderr
        assert_fits(done)
    yield made
    os.chdir(before)


def assert_fits(done: Result) -> None:
    """No line is longer than 80, but for a word that cannot be broken: a path, by itself or as a fact of a citation
    (`model  a/path`, which others read back), or the hash of one.
    """
    unbroken = re.compile(r" *\S+|model +\S*/\S*|.*\([0-9a-f]{64}\)")
    for line in [*done.stdout.splitlines(), *done.stderr.splitlines()]:
        assert len(line) <= 80 or unbroken.fullmatch(line), line


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("capture", ["pre", "post"])
def test_every_table_fits_80_columns(folder: Path, capture: str, name: str, options: str) -> None:
    model = ["--model", POST] if capture == "post" and name not in ("inspect", "verify") else []
    done = CliRunner().invoke(main, [name, f"{capture}.h5", *model, *options.split()])
    assert done.exit_code == 0, done.stderr
    assert len(done.stdout.splitlines()) > 1
    assert_fits(done)
    if name != "lens":  # where more is asked for than fits
        assert "for its width" not in done.stderr


@pytest.mark.real
@pytest.mark.parametrize("model", [smollm2, minilm])
def test_tables_of_real_models_fit_80_columns(tmp_path: Path, model: Callable[[], sl.Model]) -> None:
    """Their layers have two digits, and the sizes of some states five."""
    sl.capture(model(), out=tmp_path / "real.h5", window=64, max_tokens=192, progress=False).close()
    for line in ("inspect", "inspect --cite", "norms", "norms --states", "norms --cosines", "position --origin"):
        name, *options = line.split()
        done = CliRunner().invoke(main, [name, str(tmp_path / "real.h5"), *options])
        assert done.exit_code == 0, done.stderr
        assert_fits(done)


def test_plans_models_and_mistakes_fit_too(folder: Path) -> None:
    for arguments in (
        ["capture", "model.pt", *SMALL, "--dry-run"],
        ["inspect", "model.pt"],
        ["lens", "pre.h5", "--affine-match"],
        ["lens", "pre.h5", "--tuned", "nowhere.pt"],
        ["norms", "pre.h5", "--states", "--heads"],
        ["norms", "pre.h5", "--window", "7", "--max-tokens", "9"],
        ["nrms"],
        ["capture", "--windw", "3"],
    ):
        assert_fits(CliRunner().invoke(main, arguments))


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_every_help_fits_80_columns_of_a_wide_terminal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without click's runner, which pretends that every terminal has 80 columns."""
    monkeypatch.setenv("COLUMNS", "200")
    context = click.Context(main, info_name="streamlens", **main.context_settings)
    if name:
        context = click.Context(COMMANDS[name].load(), info_name=name, parent=context)
    lines = context.get_help().splitlines()
    assert 60 < max(map(len, lines)) <= 80


def test_a_column_that_was_asked_for_is_shown(folder: Path) -> None:
    heading = CliRunner().invoke(main, ["lens", "pre.h5", "--jsd", "--quiet"]).stdout.split("\n")[0].split()
    assert "jsd" in heading
    heading = CliRunner().invoke(main, ["lens", "pre.h5", "--top-k", "2,7", "--quiet"]).stdout.split("\n")[0].split()
    assert {"overlap_2", "overlap_7"} <= set(heading)
    for capture, model in (("pre.h5", []), ("post.h5", ["--model", POST])):
        done = CliRunner().invoke(main, ["norms", capture, *model, "--heads", "--logits"])
        assert "logit_attr" in done.stdout.split("\n")[0]
        assert "for its width" not in done.stderr


# ---- tables -------------------------------------------------------------------------------------------------------


def test_a_wide_table_loses_digits_first_and_then_columns_from_the_right() -> None:
    names = [f"column_{i}" for i in range(8)]
    shown = table([{"label": "10_attn_out"} | dict.fromkeys(names, -0.000123456)]).splitlines()
    assert max(map(len, shown)) <= WIDTH
    assert shown[0].split() == ["label", *names[:6]]
    assert shown[1].split()[1] == "-0.000123"
    assert table([{"a": -0.000123456}]).split()[-1] == "-0.0001235"


def test_columns_that_are_left_out_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    from streamlens.cli.output import print_rows

    rows = [dict.fromkeys([f"a_long_heading_{i}" for i in range(6)], 1.5)]
    print_rows("norms", rows, as_json=False)
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()[0].split()) == 4
    assert "a_long_heading_4, a_long_heading_5" in captured.err
    assert "--json has all columns" in captured.err


def test_short_headings_are_shorter_and_clash_with_no_other() -> None:
    assert all(len(short) < len(name) for name, short in HEADINGS.items())
    assert len(set(HEADINGS.values())) == len(HEADINGS)


def test_what_is_no_number_is_a_dash() -> None:
    assert (human(float("nan")), human(float("inf"))) == ("-", "inf")


def test_lines_break_at_blanks_and_paths_stay_whole() -> None:
    path = "/a" * 60
    assert wrapped(f"note: wrote {path}") == f"note: wrote\n  {path}"
    assert wrapped("Error: " + "word " * 20 + "\nits note").split("\n")[-1] == "its note"
    assert all(len(line) <= 80 for line in wrapped("word " * 99).split("\n"))


# ---- a real terminal ----------------------------------------------------------------------------------------------


def in_terminal(arguments: list[str], folder: Path, **environment: str) -> str:
    """What a program shows on a terminal: stdout and stderr together."""
    import fcntl
    import pty
    import termios

    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-m", "streamlens.cli", *arguments]
    kept = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    running = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, cwd=folder, env=kept | environment)
    os.close(child)
    shown = b""
    while True:
        try:
            piece = os.read(parent, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(parent)
    assert running.wait() == 0, shown.decode()
    return shown.decode()


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_on_a_terminal_there_are_a_bar_and_a_bold_heading_unless_no_color(folder: Path) -> None:
    shown = in_terminal(["norms", "pre.h5", "--states"], folder)
    assert re.search(r"norms: 100%\|.*\| 512/512", shown)
    assert "\x1b[1mlabel" in shown
    for piece in re.split(r"[\r\n]+", click.unstyle(shown)):
        assert len(piece) <= 80
    plain = in_terminal(["norms", "pre.h5", "--states", "--quiet"], folder, NO_COLOR="yes")
    assert "\x1b" not in plain
    assert plain.startswith("label")
    assert "\x1b[1mlabel" in in_terminal(["norms", "pre.h5", "--states", "--quiet"], folder, NO_COLOR="")


def test_piped_there_is_neither_bar_nor_colour(folder: Path) -> None:
    command = [sys.executable, "-m", "streamlens.cli", "norms", "pre.h5", "--states"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert "\x1b" not in done.stdout + done.stderr
    assert "%|" not in done.stderr
    assert done.stderr.startswith("norms: 512 tokens\nnorms: done: 512 tokens in ")


# ---- --quiet, --verbose, --debug ----------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--quiet", *STATES], [*STATES, "--quiet"]])
def test_quiet_leaves_the_result_alone(folder: Path, arguments: list[str]) -> None:
    loud = CliRunner().invoke(main, STATES)
    quiet = CliRunner().invoke(main, arguments)
    assert (quiet.exit_code, quiet.stderr, quiet.stdout) == (0, "", loud.stdout)
    assert "norms: done" in loud.stderr
    assert "note: " in loud.stderr
    assert CliRunner().invoke(main, STATES).stderr.count("note: ") == 1, "the switch outlives its command"


def test_quiet_still_says_what_went_wrong(folder: Path) -> None:
    done = CliRunner().invoke(main, ["--quiet", "norms", "pre.h5", "--states", "--cosines"])
    assert (done.exit_code, done.stderr) == (2, "Error: --states and --cosines are two tables: ask for one\n")


@pytest.mark.parametrize("before", [True, False])
def test_verbose_says_what_is_loaded_and_how_long_it_took(folder: Path, before: bool) -> None:
    arguments = ["norms", "pre.h5", "--logits"]
    done = CliRunner().invoke(main, ["--verbose", *arguments] if before else [*arguments, "--verbose"])
    assert done.exit_code == 0, done.stderr
    said = " ".join(done.stderr.split())
    for told in (
        r"info: opened the capture pre\.h5, in \d+\.\d\d s",
        r"info: it holds model\.pt, built-in English text",
        r"info: loaded \S*model\.pt, in \d+\.\d\d s",
        r"info: it is a NanoGPT of 663\.8 k parameters, on cpu",
        r"info: norms: \d+\.\d\d s in all",
    ):
        assert re.search(told, said), told
    assert "info:" not in CliRunner().invoke(main, arguments).stderr, "the switch outlives its command"


@pytest.mark.parametrize("arguments", [["--quiet", "norms", "--verbose"], ["norms", "--verbose", "--quiet"]])
def test_quiet_and_verbose_contradict_each_other(folder: Path, arguments: list[str]) -> None:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith("Error: --quiet and --verbose contradict each other: pass one of them\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_each_switch_once(name: str) -> None:
    names = [parameter.name for parameter in COMMANDS[name].load().params]
    assert [names.count(switch) for switch in ("quiet", "verbose", "debug")] == [1, 1, 1]


def test_warnings_of_the_library_are_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    import logging
    import warnings

    from streamlens.cli import welcome

    def warn() -> None:
        warnings.simplefilter("always")
        warnings.warn("no file locks here", stacklevel=2)
        logging.getLogger("streamlens.checkpoint").warning("the tokenizer %s", "cannot be read")

    monkeypatch.setattr(welcome, "welcome", warn)
    assert CliRunner().invoke(main, []).stderr == "note: no file locks here\nnote: the tokenizer cannot be read\n"
    assert CliRunner().invoke(main, ["--quiet"]).stderr == ""
