"""`streamlens` alone says what is here and what to do next; `streamlens completion` lets a shell complete."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest
from click.shell_completion import CompletionItem, ShellComplete
from click.testing import CliRunner, Result

from streamlens.cli.app import COMMANDS, main
from streamlens.cli.welcome import QUESTIONS

MODEL = str(Path(__file__).resolve().parent.parent / "fixtures" / "model.pt")
Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(main, list(arguments))


def capture(run: Run, out: str) -> None:
    done = run("capture", MODEL, "--window", "16", "--max-tokens", "64", "--out", out)
    assert done.exit_code == 0, done.stderr


def assert_fits(done: Result) -> None:
    assert done.exit_code == 0
    assert done.stderr == ""
    assert max(map(len, done.stdout.splitlines())) <= 80


# ---- nothing asked ------------------------------------------------------------------------------------------------


def test_in_an_empty_folder_what_it_says_to_type_works(run: Run, tmp_path: Path) -> None:
    shown = run()
    assert_fits(shown)
    assert "There is no capture in this folder" in shown.stdout
    typed = [line.strip() for line in shown.stdout.splitlines() if line.startswith("  streamlens ")]
    for line in typed[-2:]:
        done = run(*shlex.split(line, comments=True)[1:])
        assert done.exit_code == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt", "model.h5"}
    assert "model.h5: " in run().stdout


def test_a_model_that_is_here_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "weights.gguf").touch()
    shown = run().stdout
    assert "  streamlens capture weights.gguf\n" in shown
    assert "random weights" not in shown


def test_the_newest_capture_and_what_can_be_asked_of_it(run: Run, tmp_path: Path) -> None:
    capture(run, "old.h5")
    os.utime(tmp_path / "old.h5", (1, 1))
    capture(run, "new.h5")
    os.utime(tmp_path / "new.h5", (10**9, 10**9))
    with h5py.File(tmp_path / "others.h5", "w") as file:
        file["x"] = [1]
    (tmp_path / "going.h5.partial").touch()
    shown = run()
    assert_fits(shown)
    first, second = shown.stdout.splitlines()[:2]
    assert first.startswith("new.h5: ")
    assert first.endswith("; 1 older capture here")
    assert " days ago" in first
    assert second == "  model.pt on 64 tokens: d_model 80, 16 sublayers, float32"
    assert "not finished: going.h5.partial" in shown.stdout
    for name in QUESTIONS:
        assert f"\n  streamlens {name} " in shown.stdout
    note = run("norms").stderr
    assert "new.h5, the newest capture here" in note


def test_a_damaged_capture_is_said_to_be_one(run: Run, tmp_path: Path) -> None:
    (tmp_path / "model.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + b"\0" * 99)
    shown = run()
    assert shown.exit_code == 0
    assert "cannot be read" in shown.stdout


def test_every_question_has_its_command() -> None:
    assert set(QUESTIONS) <= set(COMMANDS)


@pytest.mark.parametrize("holds", ["nothing", "a capture"])
def test_it_answers_without_torch(run: Run, tmp_path: Path, holds: str) -> None:
    if holds == "a capture":
        capture(run, "model.h5")
    script = (
        "import sys; from streamlens.cli import main; sys.argv = ['streamlens']\n"
        "try: main()\n"
        "except SystemExit as stop: assert stop.code in (0, None), stop.code\n"
        "heavy = {'torch', 'pandas', 'tqdm', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("model.h5: " in done.stdout) == (holds == "a capture")


# ---- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "message", "helps"),
    [
        ("nroms", "no such command 'nroms'; did you mean norms?", "streamlens"),
        ("xyzzy", "no such command 'xyzzy'", "streamlens"),
        ("--bogus", "no such option '--bogus'", "streamlens"),
        ("norms --statse", "no such option '--statse'; did you mean --states", "streamlens norms"),
        ("norms a b", "got unexpected extra argument (b)", "streamlens norms"),
        ("capture --window 1", "invalid value for '--window': 1 is not in the range x>=2", "streamlens capture"),
        ("verify", "missing argument 'CAPTURE'", "streamlens verify"),
    ],
)
def test_what_was_typed_wrong_is_said_in_one_voice(run: Run, typed: str, message: str, helps: str) -> None:
    done = run(*typed.split())
    assert done.exit_code == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0].startswith(f"Error: {message}")
    assert lines[-1] == f"`{helps} --help` says what can be given."
    assert "Usage:" not in done.stderr


# ---- completion ---------------------------------------------------------------------------------------------------


def completed(*words: str) -> list[CompletionItem]:
    """What is offered for the last word."""
    shell = ShellComplete(main, {}, "streamlens", "_STREAMLENS_COMPLETE")
    return shell.get_completions(list(words[:-1]), words[-1])


def values(*words: str) -> set[str]:
    return {item.value for item in completed(*words)}


def test_commands_options_and_choices_complete() -> None:
    assert values("") == set(COMMANDS)
    assert values("p") == {"position", "pack"}
    assert values("--") >= {"--quiet", "--verbose", "--debug", "--help"}
    assert values("norms", "--s") == {"--states", "--stream", "--seed"}
    assert values("--quiet", "norms", "--verb") == {"--verbose"}
    assert values("ablate", "--mode", "") == {"skip", "zero", "mean", "resample"}
    assert values("completion", "") == {"bash", "zsh", "fish"}


@pytest.mark.parametrize(
    "words",
    [("norms", "mod"), ("capture", "--text", ""), ("norms", "--plot", "x"), ("verify", ""), ("pack", "--out", "")],
    ids=" ".join,
)
def test_files_complete(words: tuple[str, ...]) -> None:
    assert {item.type for item in completed(*words)} == {"file"}


def test_names_of_commands_complete_without_importing_one() -> None:
    script = (
        "import sys; from streamlens.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "loaded = {n for n in sys.modules if n == 'torch' or n == 'streamlens.cli.norms'}\n"
        "assert not loaded, loaded"
    )
    environment = {"_STREAMLENS_COMPLETE": "bash_complete", "COMP_WORDS": "streamlens no", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | environment)
    assert (done.returncode, done.stdout) == (0, "plain,norms\n"), done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_each_shell(run: Run, shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    named = run("completion", shell)
    assert named.exit_code == 0, named.stderr
    assert f"_STREAMLENS_COMPLETE={shell}_complete" in named.stdout
    monkeypatch.setenv("SHELL", f"/usr/bin/{shell}")
    assert run("completion").stdout == named.stdout


@pytest.mark.parametrize("damage", ["anatomy", "tokens"])
def test_a_damaged_capture_is_told_and_no_traceback(run: Run, tmp_path: Path, damage: str) -> None:
    capture(run, "new.h5")
    with h5py.File(tmp_path / "new.h5", "r+") as file:
        if damage == "anatomy":
            file.attrs["anatomy"] = '{"streams": ["a"]}'
        else:
            del file["tokens/id"]
            file.create_group("tokens/id")
    shown = run()
    assert shown.exit_code == 0
    assert "cannot be read" in shown.stdout


def test_names_of_files_are_quoted_and_command_no_terminal(run: Run, tmp_path: Path) -> None:
    (tmp_path / "my evil\x1b[31mred.pt").touch()
    shown = run().stdout
    assert "\x1b" not in shown
    assert "  streamlens capture 'my evil\\x1b[31mred.pt'\n" in shown


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_passed_over(run: Run, tmp_path: Path) -> None:
    (tmp_path / "locked.h5").touch(mode=0o000)
    assert "There is no capture in this folder" in run().stdout


def test_an_unknown_shell_is_a_usage_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    done = run("completion")
    assert done.exit_code == 2
    assert "name one of bash, zsh, fish" in " ".join(done.stderr.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_a_real_bash_completes(run: Run, tmp_path: Path) -> None:
    script = run("completion", "bash")
    (tmp_path / "streamlens.bash").write_text(script.stdout)
    program = tmp_path / "bin" / "streamlens"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m streamlens.cli "$@"\n')
    program.chmod(0o755)
    typed = [["streamlens", "gra"], ["streamlens", "norms", "--lay"], ["streamlens", "gradient", "--path"]]
    asks = "\n".join(
        f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; COMPREPLY=()\n"
        f'_streamlens_completion streamlens; echo "${{COMPREPLY[*]}}"'
        for words in typed
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", f"source ./streamlens.bash\n{asks}\ncomplete -p streamlens"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"},
    )
    lines = done.stdout.splitlines()
    assert lines[:3] == ["gradient", "--layers-only", "--paths"], done.stderr
    assert "-F _streamlens_completion streamlens" in lines[3]
