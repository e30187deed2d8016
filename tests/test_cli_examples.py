"""Every example in every help text, run as typed in a folder that holds what it names."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from streamlens.checkpoint.nanogpt import NanoGPT, NanoGPTConfig
from streamlens.cli.app import COMMANDS, main

MODEL = Path(__file__).resolve().parent.parent / "fixtures" / "model.pt"


def examples() -> list[str]:
    """The lines below `Example:` in the help of the group and of each command, without their comments."""
    found: list[str] = []
    for name in ("", *COMMANDS):
        text = CliRunner().invoke(main, [*name.split(), "--help"]).stdout
        block = re.search(r"Example:\n((?:    .*\n)+)", text)
        assert block is not None, f"{name or 'the group'} has no example"
        found += [shlex.join(shlex.split(line, comments=True)) for line in block.group(1).splitlines()]
    return list(dict.fromkeys(found))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples name: models, captures, a text, a package with a factory, a tuned lens."""
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copy(MODEL, folder / "model.pt")
    sizes: dict[str, Any] = {"block_size": 64, "vocab_size": 256, "n_layer": 2, "n_head": 2, "n_embd": 16, "bias": True}
    module = NanoGPT(NanoGPTConfig(**sizes))
    torch.save({"model": module.state_dict(), "model_args": sizes}, folder / "ckpt.pt")
    (folder / "book.txt").write_text("It was a bright cold day in April. " * 60)
    (folder / "mypackage").mkdir()
    (folder / "mypackage" / "models.py").write_text("from streamlens.cli.tiny import model as build\n")
    small = ["--window", "32", "--max-tokens", "2048", "--quiet"]
    for name in ("model", "base", "tuned"):
        heads = ["--heads"] if name == "model" else []
        made = CliRunner().invoke(
            main, ["capture", str(folder / "model.pt"), *small, *heads, "--out", f"{folder}/{name}.h5"]
        )
        assert made.exit_code == 0, made.stderr
    return folder


@pytest.fixture
def folder(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for each example."""
    for path in inputs.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("mypackage")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


@pytest.mark.parametrize("line", examples())
def test_an_example_works_as_typed(folder: Path, line: str) -> None:
    program, name, *arguments = shlex.split(line)
    assert program == "streamlens"
    if name in ("capture", "pack"):
        (folder / "model.h5").unlink()
    if name == "pack":
        (folder / "model.pt").unlink()
    if "lens.pt" in arguments and "--tuned" in arguments:
        trained = CliRunner().invoke(main, ["lens", "model.pt", "--train", "ridge", "--save", "lens.pt", "--quiet"])
        assert trained.exit_code == 0, trained.stderr
    before = {path.name for path in folder.iterdir()}
    done = CliRunner().invoke(main, [name, *arguments])
    assert done.exit_code == 0, done.stderr
    written = {path.name for path in folder.iterdir()} - before
    named = {a for a in arguments if Path(a).suffix in (".png", ".pdf", ".html", ".csv")} - before
    assert named <= written
    assert done.stdout or written
