"""What every command shares: lazy loading, errors and exit codes, option bundles, printing, progress."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from streamlens import errors
from streamlens.analyses.source import LIVE_BATCH_TOKENS
from streamlens.checkpoint.loading import load
from streamlens.checkpoint.model import Model
from streamlens.checkpoint.nanogpt import NanoGPT, NanoGPTConfig
from streamlens.checkpoint.tokenizers import ByteTokenizer
from streamlens.cli.app import COMMANDS, LazyCommand, main
from streamlens.cli.options import CorpusOptions, ModelOptions, corpus_options, model_options, output_options
from streamlens.cli.output import bold, human, human_count, print_notes, print_rows, table
from streamlens.corpus.windows import DEFAULT_WINDOW, Windows
from streamlens.progress import Progress
from streamlens.recorder.capturing import DEFAULT_BATCH_TOKENS

# ---- the group ----------------------------------------------------------------------------------------------------


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A command that raises what its argument names, registered like any other."""
    (tmp_path / "failing_command.py").write_text(
        "import click\n"
        "from streamlens import errors\n"
        "@click.command()\n"
        "@click.argument('name')\n"
        "def command(name):\n"
        "    if name == 'KeyboardInterrupt':\n"
        "        raise KeyboardInterrupt\n"
        "    error = getattr(errors, name)('what, where, what to do')\n"
        "    error.add_note('in /streams/main/write')\n"
        "    raise error\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "failing_command", raising=False)
    for name, resumes in (("fail", False), ("fail-resumable", True)):
        monkeypatch.setitem(COMMANDS, name, LazyCommand("failing_command:command", "Fails.", resumes))
    return "fail"


ERRORS = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_an_error_is_one_message_and_its_exit_code(failing: str, error: type[errors.StreamlensError]) -> None:
    result = CliRunner().invoke(main, [failing, error.__name__])
    assert result.exit_code == error.exit_code
    assert result.stderr == "Error: what, where, what to do\nin /streams/main/write\n"
    assert result.stdout == ""


def test_debug_shows_the_traceback_too(failing: str) -> None:
    result = CliRunner().invoke(main, ["--debug", failing, "ProofError"])
    assert result.exit_code == 4
    assert result.stderr.startswith("Traceback (most recent call last)")
    assert result.stderr.endswith("Error: what, where, what to do\nin /streams/main/write\n")


def test_an_interrupt_is_130_and_says_what_can_be_resumed(failing: str) -> None:
    plain = CliRunner().invoke(main, [failing, "KeyboardInterrupt"])
    assert (plain.exit_code, plain.stderr) == (130, "interrupted\n")
    resumable = CliRunner().invoke(main, ["fail-resumable", "KeyboardInterrupt"])
    assert (resumable.exit_code, resumable.stderr) == (130, "interrupted: the same command resumes\n")
    assert [name for name, command in COMMANDS.items() if command.resumes] == ["capture", "fail-resumable"]


def test_a_wrong_command_is_a_usage_error() -> None:
    result = CliRunner().invoke(main, ["captur"])
    assert result.exit_code == 2
    assert "no such command 'captur'; did you mean capture?" in result.stderr


def test_the_groups_help_lists_every_command_and_imports_none() -> None:
    script = (
        "import sys; from streamlens.cli import main; sys.argv = ['streamlens', '-h']\n"
        "try: main()\n"
        "except SystemExit as stop: assert stop.code == 0, stop.code\n"
        "heavy = {'torch', 'numpy', 'h5py', 'streamlens.cli.pack'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Usage: streamlens [OPTIONS] [COMMAND]")
    for name in COMMANDS:
        assert f"\n  {name} " in result.stdout
    assert "Example:\n    streamlens capture model.pt\n    streamlens inspect model.h5" in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_that_ends_in_an_example(name: str) -> None:
    command = COMMANDS[name].load()
    result = CliRunner().invoke(main, [name, "-h"])
    assert result.exit_code == 0
    assert f"Example:\n    streamlens {name} " in result.stdout
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, f"{name} {option.opts[0]} has no help"


def test_the_version_is_the_packages() -> None:
    result = CliRunner().invoke(main, ["--version"])
    assert result.output.startswith("streamlens, version 0.")


# ---- options ------------------------------------------------------------------------------------------------------


@click.command(context_settings={"help_option_names": ["-h"], "max_content_width": 200})
@model_options
@corpus_options
@output_options
def echo(model: ModelOptions, corpus: CorpusOptions, as_json: bool) -> None:
    """A command that takes every shared option and prints what it was given."""
    click.echo(repr((model, corpus, as_json)))


def test_without_options_a_command_gets_the_defaults() -> None:
    result = CliRunner().invoke(echo, ["model.pt"], catch_exceptions=False)
    model = ModelOptions("model.pt", None, None, False, None, "cpu", 0)
    corpus = CorpusOptions((), None, "text", None, None, False, None, None)
    assert result.output == repr((model, corpus, False)) + "\n"


def test_every_option_arrives_in_its_field(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    named = f"--config {file} --model a.b:c --unsafe-pickle --dtype bfloat16 --device cuda:1 --seed 7"
    shown = f"--jsonl {file} --text-key body --tokens {file} --window 9 --ragged --max-tokens 8 --batch-tokens 6"
    result = CliRunner().invoke(echo, f"{named} --text {file} --text - {shown} --json", catch_exceptions=False)
    model = ModelOptions(None, file, "a.b:c", True, "bfloat16", "cuda:1", 7)
    corpus = CorpusOptions((file, Path("-")), file, "body", file, 9, True, 8, 6)
    assert result.output == repr((model, corpus, True)) + "\n"


def test_the_defaults_in_the_help_are_the_librarys() -> None:
    shown = CliRunner().invoke(echo, ["-h"], terminal_width=200).output
    assert re.search(rf"--window .*\[default: {DEFAULT_WINDOW}, or the model's limit\]", shown)
    ours = f"{DEFAULT_BATCH_TOKENS} for a capture, {LIVE_BATCH_TOKENS} for an analysis"
    assert re.search(rf"--batch-tokens .*\[default: {ours}\]", " ".join(shown.split()))


@pytest.mark.parametrize(
    "wrong", ["--dtype int8", "--window 1", "--max-tokens 0", "--batch-tokens 0", "--text nowhere", "--config nowhere"]
)
def test_a_wrong_value_is_a_usage_error_that_names_the_option(wrong: str) -> None:
    result = CliRunner().invoke(echo, wrong)
    assert result.exit_code == 2
    assert f"Invalid value for '{wrong.split()[0]}'" in result.stderr


def read(*arguments: str) -> Windows:
    """The windows that a model of bytes is shown when these options are typed and `typed` comes in on stdin."""
    shown: list[Windows] = []

    @click.command()
    @corpus_options
    def show(corpus: CorpusOptions) -> None:
        model = Model(torch.nn.Identity(), "model.pt", "", {}, ByteTokenizer(), 256, None)
        shown.append(corpus.windows(model, seed=0))

    CliRunner().invoke(show, [*arguments, "--ragged"], input="typed", catch_exceptions=False)
    return shown[0]


def test_the_named_corpus_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.jsonl").write_text('{"body": "json"}')
    np.save(tmp_path / "c.npy", [1, 2, 3])
    texts = read("--text", str(tmp_path / "a.txt"), "--text", "-")
    assert (bytes(texts.ids.tolist()), texts.description) == (b"firsttyped", f"{tmp_path}/a.txt, -")
    lines = read("--jsonl", str(tmp_path / "b.jsonl"), "--text-key", "body")
    assert (bytes(lines.ids.tolist()), lines.description) == (b"json", f"{tmp_path}/b.jsonl")
    ids = read("--tokens", str(tmp_path / "c.npy"))
    assert (ids.ids.tolist(), ids.description) == ([1, 2, 3], f"{tmp_path}/c.npy")
    assert read("--max-tokens", "9999").description.startswith("built-in English text")
    with pytest.raises(errors.UsageError, match="--text, --jsonl and --tokens exclude each other"):
        read("--text", "-", "--tokens", str(tmp_path / "c.npy"))


def test_no_model_at_all_is_a_usage_error() -> None:
    with pytest.raises(errors.UsageError, match=r"no model is given: .* --model package\.module:factory"):
        ModelOptions(None, None, None, False, None, "cpu", 0).load()


# ---- pack ---------------------------------------------------------------------------------------------------------


def pack_command(*arguments: str) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(main, ["pack", *arguments, "--json"])
    return result.exit_code, json.loads(result.stdout)["rows"][0] if result.stdout else {"error": result.stderr}


def test_pack_writes_a_file_that_loads_as_the_same_model(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "block_size": 8,
        "vocab_size": 11,
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 4,
        "bias": True,
    }
    module = NanoGPT(NanoGPTConfig(**arguments))
    torch.save({"model": module.state_dict(), "model_args": arguments}, tmp_path / "ckpt.pt")
    code, row = pack_command(str(tmp_path / "ckpt.pt"), "--out", str(tmp_path / "model.pt"))
    assert code == 0, row
    packed = tmp_path / "model.pt"
    assert row == {
        "source": str(tmp_path / "ckpt.pt"),
        "out": str(packed),
        "bytes": packed.stat().st_size,
        "sha256": load(packed).sha256,
    }
    ids = torch.arange(8)[None]
    assert torch.equal(load(packed).module(ids), load(module).module(ids))


def test_a_factorys_weights_follow_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_factory.py").write_text(
        "from streamlens.checkpoint.nanogpt import NanoGPT, NanoGPTConfig\n"
        "def make():\n"
        "    return NanoGPT(NanoGPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=4))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows = [
        pack_command("--model", "my_factory:make", "--seed", seed, "--out", str(tmp_path / "model.pt"))[1]
        for seed in ("1", "1", "2")
    ]
    assert rows[0]["sha256"] == rows[1]["sha256"] != rows[2]["sha256"]


def test_a_pickled_module_is_refused_for_safety(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pt")
    code, row = pack_command(str(tmp_path / "whole.pt"), "--out", str(tmp_path / "model.pt"))
    assert code == 5
    assert row["error"].startswith("Error:")
    assert not (tmp_path / "model.pt").exists()


# ---- printing -----------------------------------------------------------------------------------------------------

ROWS = [
    {"label": "3_attn_out", "bytes": 12_288, "relative_write": 0.123456, "exact": True},
    {"label": "embed", "bytes": np.int64(7), "relative_write": np.float32(2.0), "exact": None},
]


def test_rows_become_an_aligned_table(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows("inspect", ROWS, as_json=False)
    assert capsys.readouterr().out == (
        "label        bytes  rel_write  exact\n"
        "3_attn_out  12,288     0.1235  yes\n"
        "embed            7          2  -\n"
    )  # fmt: skip


def test_rows_become_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    odd = {"nan": float("nan"), "inf": np.float64("inf"), "path": Path("a/b"), "array": np.array([1.5, np.nan])}
    print_rows("inspect", [*ROWS, odd], as_json=True)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == {
        "schema": 1,
        "command": "inspect",
        "rows": [
            {"label": "3_attn_out", "bytes": 12288, "relative_write": 0.123456, "exact": True},
            {"label": "embed", "bytes": 7, "relative_write": 2.0, "exact": None},
            {"nan": None, "inf": None, "path": "a/b", "array": [1.5, None]},
        ],
    }


def test_no_rows_are_an_empty_table_but_still_an_object(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows("inspect", [], as_json=False)
    print_rows("inspect", [], as_json=True)
    assert capsys.readouterr().out == '{"schema": 1, "command": "inspect", "rows": []}\n'


def test_rows_need_not_have_the_same_columns() -> None:
    assert table([{"a": 1}, {"b": "x"}]).splitlines()[1:] == ["1  -", "-  x"]


def test_labels_cannot_steer_the_terminal() -> None:
    assert human("a\x1b[2J\nπ\u202e") == "a\\x1b[2J\\nπ\\u202e"


def test_headings_are_bold_unless_no_color_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert bold("a") == "\x1b[1ma\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert bold("a") == "a"


@pytest.mark.parametrize(
    ("n", "count"),
    [(0, "0"), (999, "999"), (1000, "1.0 k"), (999_949, "999.9 k"), (999_950, "1.0 M"), (10**16, "10000.0 T")],
)
def test_counts_for_people(n: int, count: str) -> None:
    assert human_count(n) == count


def test_notes_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    print_notes(["left out 3 tokens"])
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "note: left out 3 tokens\n")


# ---- progress -----------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A stream that somebody watches."""

    def isatty(self) -> bool:
        return True


def ticking(*times: float) -> Callable[[], float]:
    """A clock that shows these times, one after another."""
    return iter(times).__next__


def test_where_nobody_watches_there_is_a_line_at_either_end() -> None:
    stream = io.StringIO()
    with Progress(2048, "capture", stream=stream, clock=ticking(10.0, 14.0)) as progress:
        progress.update(1024, 3 << 20)
        progress.update(1024, 5 << 20)
    assert stream.getvalue() == (
        "capture: 2,048 tokens\ncapture: done: 2,048 tokens, 8.0 MiB in 4.0 s (512 tokens/s, 2.0 MiB/s)\n"
    )


def test_a_run_that_stops_says_where_and_counts_only_its_own_tokens() -> None:
    stream = io.StringIO()
    progress = Progress(100, "capture", done_tokens=40, stream=stream, clock=ticking(0.0, 2.0))

    def run() -> None:
        with progress:
            progress.update(20, 1000)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert stream.getvalue() == (
        "capture: 100 tokens, 40 of them done before\n"
        "capture: stopped after 60 of 100 tokens: 20 tokens, 1000 bytes in 2.0 s (10 tokens/s, 500 bytes/s)\n"
    )


def test_whoever_has_enough_did_not_stop() -> None:
    """An analysis that was asked for some windows leaves the generator of blocks before its end."""
    stream = io.StringIO()

    def blocks() -> Iterator[int]:
        with Progress(100, "gradient", stream=stream, clock=ticking(0.0, 2.0)) as progress:
            for _ in range(5):
                yield 20
                progress.update(20)

    for number, _ in enumerate(blocks()):
        if number == 2:
            break
    assert stream.getvalue() == ("gradient: 100 tokens\ngradient: 40 of 100 tokens: 40 tokens in 2.0 s (20 tokens/s)\n")


def test_on_a_terminal_there_is_a_bar() -> None:
    stream = Terminal()
    with Progress(2000, "capture", done_tokens=500, stream=stream) as progress:
        progress.update(1500, 1_000_000)
    assert "capture:  25%" in stream.getvalue()
    assert "capture: 100%" in stream.getvalue()
    assert "2.00k/2.00k" in stream.getvalue()
    assert "iB/s" in stream.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["log", "terminal"])
def test_progress_that_is_switched_off_is_silent(stream: io.StringIO) -> None:
    with Progress(10, "capture", enabled=False, stream=stream) as progress:
        progress.update(10, 100)
    assert stream.getvalue() == ""
    assert progress.tokens == 10
