"""Everything that a page tells people to type works, and prints what the page shows.

``python -m tests.test_docs [PAGE ...]`` runs the pages again and writes what their commands print now, and their
pictures, in the place of what they show; without a page, those in docs/.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import torch

import streamlens as sl
from streamlens.analyses.source import source_of
from streamlens.cli.app import COMMANDS
from streamlens.cli.options import ModelOptions
from streamlens.corpus.documents import builtin_documents
from tests.conftest import smollm2
from tests.pages import NODE_MODULES, ROOT, TEXT, Block, Command, Page, Place, pages

NOT_RUN = {
    r"make ": "sets up a virtual environment and runs everything; the whole check does both",
    r"pip install ": "downloads packages",
    r"npm install ": "downloads a package; the whole check does it",
    r"jupyter ": "a server, which does not end",
    r"python -m benchmarks\.": "minutes, on a machine that does nothing else",
    r"python -m fixtures\.train": "trains models for minutes",
    r"python -m tests\.test_(examples|docs)": "this very test, and the one of the notebooks",
    r"(ruff|mypy|pytest)\b": "what a contributor does while working; the whole check does it",
    r"(source|\.) \.venv/bin/activate": "a virtual environment that the reader has made",
    r"git clone ": "downloads the repository",
}
"""Commands that are left alone, and why."""

MAY_COME = {r"git clone ", r"(source|\.) \.venv/bin/activate"}
"""Of them, ways to set up that no page tells yet."""

MANUAL = "70e9b1a8a5bf926f"
"""Hash of the first 2,048 tokens of the built-in text with which the pages were made: that of Python 3.11.7. With the
manual of another Python the words are compared, and the numbers are not."""

PRELUDE = """
import h5py, numpy as np, torch, streamlens as sl
_model = sl.load("fixtures/model.pt")
module = _model.module
module.tokenizer = _model.tokenizer
inputs = ids = torch.arange(64).reshape(2, 32)
k, state = 16, torch.ones(2, 32, 80)
"""
"""What a page takes for granted in its Python."""

CONTESTANTS = {"full", "compact"}
"""What benchmarks/README.md calls the two kinds of captures: no commands."""

PICTURE_BYTES = 200_000
_PROGRESS = re.compile(r"^\w+: (done: |resumed: )?[\d,]+ (of [\d,]+ )?tokens\b.*\n?", re.MULTILINE)
_TIMING = re.compile(r"[\d.,]+ (s|ms|min|tokens/s|[KMGT]?i?B/s)(?=\W|$)|[\d.,]+ [KMGT]iB free")
_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?![\w.]*[a-z_])")


@cache
def small() -> Path:
    """A small capture with everything in it, for commands of which no output is shown."""
    path = Path(tempfile.mkdtemp(prefix="docs-")) / "small.h5"
    text = [document[:130] for document in builtin_documents()[:12]]
    options: Any = {"window": 64, "heads": True, "batch_tokens": 256, "progress": False}
    sl.capture(ROOT / "fixtures" / "model.pt", text=text, out=path, **options)
    return path


@cache
def same_manual() -> bool:
    """Whether this Python carries the text with which the pages were made."""
    return str(sl.capture(ROOT / "fixtures/model.pt", out=small().with_name("m.h5"), max_tokens=2048, progress=False)
               .attrs["text_sha256"]).startswith(MANUAL)  # fmt: skip


def skeleton(text: str) -> tuple[str, list[float]]:
    """The words of an output, however its lines are broken, and its numbers; without what differs from run to run."""
    stable = _TIMING.sub("T", _PROGRESS.sub("", text))
    numbers = [float(found.replace(",", "")) for found in _NUMBER.findall(stable)]
    return " ".join(_NUMBER.sub("#", stable).split()), numbers


def compare(shown: str, printed: str, where: str) -> None:
    """Demand that a page shows what is printed."""
    words, numbers = skeleton(shown)
    own_words, own_numbers = skeleton(printed)
    advice = f"{where} prints something else now: python -m tests.test_docs {where.split(':')[0]}\n{printed}"
    if not same_manual():
        words, own_words = (re.sub(r"3\.\d+'s|\b[0-9a-f]{16,}\b|T|#|-", "", text) for text in (words, own_words))
        assert words.split() == own_words.split(), advice
        return
    assert words == own_words, advice
    np.testing.assert_allclose(own_numbers, numbers, rtol=0.02, atol=0.002, err_msg=advice)


def not_run(command: str) -> bool:
    return any(re.match(pattern, command) for pattern in NOT_RUN)


def needs_node(command: str) -> bool:
    return command.startswith("node ")


def has_node() -> bool:
    """Whether the reader in JavaScript can be tried; the whole check demands it where it could be installed."""
    there = shutil.which("node") is not None and (NODE_MODULES / "h5wasm").exists()
    assert there or os.environ.get("STREAMLENS_NODE") != "required", "node or h5wasm is missing"
    return there


def is_real(command: str) -> bool:
    return re.search(r"SmolLM2|MiniLM", command) is not None


def run_commands(block: Block, place: Place, where: str) -> None:
    """Run the commands of a block of which no output is shown."""
    for command in block.commands():
        for part in command.parts:
            if not not_run(part) and not is_real(part) and (not needs_node(part) or has_node()):
                code, printed = place.run(part)
                assert code == command.code, f"{where}: {part}\n{printed}"


def run_shown(command: Command, place: Place, where: str) -> str:
    """Run a command and return what it prints."""
    printed = ""
    for part in command.parts:
        assert not not_run(part), f"{where}: {part}: output is shown of a command that is not run"
        code, text = place.run(part)
        assert code == command.code, f"{where}: {part}\n{text}"
        printed += text
    return printed


def run_page(page: Page, folder: Path) -> dict[int, str]:
    """Run everything on a page; return what each shown command prints, by the index of its line."""
    shown = Place(folder / "shown", small(), supplies=False)
    python = Place(folder / "python", small())
    names: dict[str, Any] = {"__name__": "page"}
    printed: dict[int, str] = {}
    with contextlib.chdir(python.folder):
        if any(block.kind == "python" for block in page.blocks):
            exec(PRELUDE, names)
    for number, block in enumerate(page.blocks):
        where = f"{page.name}:{block.first + 1}"
        if block.kind == "commands":
            run_commands(block, Place(folder / str(number), small()), where)
        elif block.kind == "shown":
            for command, first, _ in block.outputs():
                if not needs_node(command.text) or has_node():
                    printed[first] = run_shown(command, shown, where)
        elif block.kind == "python":
            for name in re.findall(r'"([\w./-]+\.(?:h5|pt|txt|npy))"', block.code):
                if (shown.folder / name).exists() and not (python.folder / name).exists():
                    shutil.copyfile(shown.folder / name, python.folder / name)
                elif f'out="{name}"' not in block.code:
                    python.supply(name)
            with contextlib.chdir(python.folder), contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(block.code.replace('"..."', repr(TEXT)), where, "exec", dont_inherit=True), names)
            printed[-block.first] = out.getvalue()
    return printed


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_a_page_does_what_it_says(page: Page, tmp_path: Path) -> None:
    printed = run_page(page, tmp_path)
    for block in page.blocks:
        for command, first, end in block.outputs() if block.kind == "shown" else ():
            if first in printed:
                compare("\n".join(page.lines[first:end]), printed[first], f"{page.name}:{first}: {command.text}")
    for name in re.findall(r"\]\(pictures/(\w+\.svg)\)", page.prose):
        drawn = next(tmp_path.glob(f"*/{name}"), None)
        assert drawn is not None, f"{page.name} shows {name}, and no command on it draws that"
        check_picture(drawn, ROOT / "docs" / "pictures" / name)


def check_picture(drawn: Path, kept: Path) -> None:
    """Demand that a picture is drawn, and is the one that the page shows: made of as many things of each kind."""
    new, old = (Counter(element.tag for element in ElementTree.parse(path).iter()) for path in (drawn, kept))
    paths = sum(count for tag, count in new.items() if tag.endswith("path"))
    assert paths > 20, "an empty picture"
    assert kept.stat().st_size < PICTURE_BYTES
    # Another version of matplotlib may draw the same with other elements.
    if same_manual() and f"Matplotlib v{matplotlib.__version__}," in kept.read_text():
        assert new == old, f"{kept.name} is an old one: python -m tests.test_docs"


@pytest.mark.real
def test_commands_on_real_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the model that all tests of a process share: others see it loaded from its file."""
    monkeypatch.setattr(ModelOptions, "load", lambda options: smollm2() if is_real(str(options.source)) else None)
    blocks = [block for page in pages() for block in page.blocks if block.kind == "commands"]
    parts = {part for block in blocks for command in block.commands() for part in command.parts if is_real(part)}
    place = Place(tmp_path / "real", small())
    for part in sorted(parts):
        code, printed = place.run(part)
        assert code == 0, f"{part}\n{printed}"


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_commands_in_the_text_are_there(page: Page) -> None:
    """Such as `streamlens lens --grid` in a sentence: the command exists and has these options."""
    for name, rest in re.findall(r"`streamlens (\w+)([^`]*)`", page.prose):
        if name in CONTESTANTS:
            continue
        assert name in COMMANDS, f"{page.name}: streamlens {name}"
        known = {option for parameter in COMMANDS[name].load().params for option in parameter.opts}
        known |= {option for parameter in COMMANDS[name].load().params for option in parameter.secondary_opts}
        assert set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", rest)) <= known | {"--help"}, f"{page.name}: {name}{rest}"


@pytest.mark.parametrize("page", [*pages(), Page("CHANGELOG.md"), Page("SECURITY.md")], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Page) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.prose):
        assert (page.path.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize(
    "page", [page for page in pages() if page.name.startswith("docs/")], ids=lambda page: page.name
)
def test_a_page_is_short(page: Page) -> None:
    assert len(page.lines) <= 150


def test_every_exception_is_still_needed() -> None:
    used = [c.text for p in pages() for b in p.blocks if b.kind == "commands" for c in b.commands()]
    idle = [pattern for pattern in NOT_RUN if not any(re.match(pattern, text) for text in used)]
    assert set(idle) <= MAY_COME


def test_commands_in_a_block_of_text_are_not_passed_over(tmp_path: Path) -> None:
    """Of the conventions; a block that breaks them is told, and not left out."""
    fence = "`" * 3
    for block in (f"{fence}text\nstreamlens lens\n{fence}", f"{fence}rust\nfn main() {{}}\n{fence}"):
        page = Page(str(tmp_path / "page.md"))
        page.path.write_text(block)
        with pytest.raises(AssertionError, match=r"not run|nobody here knows"):
            page.blocks  # noqa: B018
    commands = "    streamlens a && make b  # exit code 3\n    pip \\\n    c"
    text = f"Words:\n\n{commands}\n\n{fence}text\n$ d\ne\n\n$ f\n{fence}\n"
    (tmp_path / "good.md").write_text(text)
    indented, shown = Page(str(tmp_path / "good.md")).blocks
    assert [(c.parts, c.code) for c in indented.commands()] == [(["streamlens a", "make b"], 3), (["pip  c"], 0)]
    assert [(c.text, first, end) for c, first, end in shown.outputs()] == [("d", 8, 10), ("f", 11, 11)]


# ---- the reader in JavaScript -------------------------------------------------------------------------------------


def test_a_reader_in_another_language_finds_the_same(tmp_path: Path) -> None:
    """float32 and bfloat16; and a file in which one bit is wrong."""
    if not has_node():
        pytest.skip("needs node and build/node/node_modules/h5wasm")
    page = Page("docs/file-format.md")
    printed = run_page(page, tmp_path / "page")
    by_h5py = next(text for first, text in printed.items() if first < 0)
    by_node = next(text for text in printed.values() if "writes of 80" in text)
    assert by_node.splitlines()[2:] == by_h5py.splitlines()
    assert by_h5py.count("80 of 80 equal to final") == 3

    model = sl.load(ROOT / "fixtures" / "model.pt", dtype="bfloat16")
    with sl.capture(model, out=tmp_path / "half.h5", max_tokens=256, progress=False) as half:
        first = half.final[200, :2].float().tolist()
    place = Place(tmp_path / "node", small(), supplies=False)
    shutil.copyfile(tmp_path / "half.h5", place.folder / "half.h5")
    code, text = place.run("node read.mjs half.h5 0 200")
    assert code == 0, text
    assert f"token 200: x = {first[0]}, {first[1]}, ...; 80 of 80 equal to final" in text

    import h5py

    with h5py.File(place.folder / "half.h5") as file:
        at = file["/streams/main/write"].id.get_offset() + ((5 * 256 + 200) * 80 + 3) * 2 + 1
    with (place.folder / "half.h5").open("r+b") as raw:
        raw.seek(at)
        byte = raw.read(1)[0]
        raw.seek(at)
        raw.write(bytes([byte ^ 1]))
    code, text = place.run("node read.mjs half.h5 0 200")
    assert code == 1
    assert "token 200: " in text
    assert "79 of 80 equal" in text


# ---- the example of an analysis -----------------------------------------------------------------------------------


def test_the_example_of_an_analysis_against_a_plain_loop(tmp_path: Path) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    block = next(b for b in Page("docs/adding-an-analysis.md").blocks if b.kind == "python")
    exec(compile(block.code, "adding-an-analysis", "exec", dont_inherit=True), names)
    with sl.open(small()) as capture:
        found = names["span_share"](capture, count=7, progress=False)
        weight = (
            sl.load(ROOT / "fixtures" / "model.pt").module.get_parameter("lm_head.weight").detach().double().numpy()
        )
        _, vectors = np.linalg.eigh(weight.T @ weight)
        top, rest = vectors[:, -7:], vectors[:, :-7]
        shares = []
        for token in range(capture.n_tokens):
            if int(capture.tokens.position[token]):
                w = capture.writes[:, token].double().numpy()
                inside, outside = ((w @ part) ** 2 for part in (top, rest))
                shares.append(inside.sum(1) / (inside.sum(1) + outside.sum(1)))
        np.testing.assert_allclose(found.share, np.mean(shares, 0), rtol=1e-9)
        assert np.all(found.low < found.share)
        assert np.all(found.share < found.high)
        whole = names["span_share"](capture, count=80, progress=False)
        np.testing.assert_allclose(whole.share, 1, rtol=1e-12)

        source = source_of(capture)
        basis = torch.from_numpy(np.ascontiguousarray(top.T))
        blocks = list(source.blocks())
        assert len(blocks) > 3
        halves = [names["SpanShare"](source, basis) for _ in range(2)]
        for number, one in enumerate(blocks):
            halves[number % 2].update(one)
        halves[0].merge(halves[1])
        np.testing.assert_allclose(halves[0].result().share, found.share, rtol=1e-9)


# ---- rewriting ----------------------------------------------------------------------------------------------------


def rewrite(page: Page, folder: Path) -> None:
    """Put what the commands of a page print now into the page, and its pictures into their folder."""
    printed = run_page(page, folder)
    lines = list(page.lines)
    for block in reversed([block for block in page.blocks if block.kind == "shown"]):
        for _, first, end in reversed(block.outputs()):
            if first in printed:
                kept = [] if end == block.first + len(block.lines) else [""]
                indent = re.match(r" *", page.lines[first - 1])
                assert indent is not None
                new = _PROGRESS.sub("", printed[first]).rstrip().splitlines()
                lines[first:end] = [f"{indent[0]}{line}".rstrip() for line in new] + kept
    page.path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name in re.findall(r"\]\(pictures/(\w+\.svg)\)", page.prose):
        shutil.copyfile(next(folder.glob(f"*/{name}")), ROOT / "docs" / "pictures" / name)


def main() -> None:
    """Rewrite the pages that are named, or those in docs/."""
    for page in pages():
        if page.name in sys.argv[1:] or (len(sys.argv) == 1 and page.name.startswith("docs/")):
            with tempfile.TemporaryDirectory() as folder:
                rewrite(page, Path(folder))
            subprocess.run(["git", "diff", "--stat", "--", page.name], cwd=ROOT, check=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
