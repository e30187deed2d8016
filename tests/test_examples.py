"""The notebooks run from top to bottom, and come to the verdict that they were committed with.

``python -m tests.test_examples`` runs them (or those that are named) and stores what they print and draw.
"""

from __future__ import annotations

import copy
import os
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from torch import Tensor

import streamlens as sl

FOLDER = Path(__file__).resolve().parent.parent / "examples"
GUIDES = ("quick_start", "is_my_capture_right")
QUESTIONS = ("position", "gradient", "layer_drop")
NOTEBOOKS = (*GUIDES, *QUESTIONS)
MAX_BYTES = 1_000_000
MAX_BYTES_TOGETHER = 2_200_000
SECONDS_PER_CELL = 300

VERDICT = re.compile(r"^Verdict: ([A-Z][A-Z, ]*)\. ")
ROUNDED = re.compile(r"[-+]?\d+(\.\d+)?(e[-+]\d+)?%|[-+]?\d+\.\d+(e[-+]\d+)?|[-+]?\d+e[-+]\d+")
"""Numbers that another kind of processor may round otherwise; whole numbers, such as counts of states, are none."""


def read(name: str) -> NotebookNode:
    notebook: NotebookNode = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)  # type: ignore[no-untyped-call]
    return notebook


def printed(cell: NotebookNode) -> str:
    return "".join(out.text for out in cell.outputs if out.output_type == "stream" and out.name == "stdout")


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def figures(notebook: NotebookNode) -> int:
    return sum("image/png" in out.get("data", {}) for cell in code(notebook) for out in cell.outputs)


def conclusion(notebook: NotebookNode) -> str:
    """The capitals that the last cell begins to print with."""
    text = printed(notebook.cells[-1])
    found = VERDICT.match(text)
    assert found, f"no verdict: {text!r}"
    return found[1]


def all_printed(notebook: NotebookNode) -> list[str]:
    """Each line that the cells print, without what rounding or the width of a column may change."""
    lines = "".join(printed(cell) for cell in code(notebook)).splitlines()
    return [" ".join(ROUNDED.sub("#", line).split()) for line in lines]


def warned(notebook: NotebookNode) -> bool:
    return any(out.get("name") == "stderr" for cell in code(notebook) for out in cell.outputs)


def run(name: str, where: str = "examples") -> NotebookNode:
    """Run a notebook in a fresh kernel; nothing of the run but its output is kept, so that two of them compare."""
    return run_through(read(name), where)


def run_through(notebook: NotebookNode, where: str = "examples") -> NotebookNode:
    metadata = copy.deepcopy(notebook.metadata)
    for cell in code(notebook):
        cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        notebook,
        timeout=SECONDS_PER_CELL,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(FOLDER.parent / where)}},
    )
    client.execute(env={**os.environ, "OMP_NUM_THREADS": "1"})
    notebook.metadata = metadata
    return notebook


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the user's own set-up has a say, or is written to."""
    for variable in ("JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    ("name", "where"),  # both places from which people start a kernel
    [("position", "examples"), ("gradient", "."), ("layer_drop", "examples")],
)
def test_a_notebook_comes_to_its_verdict_again(name: str, where: str) -> None:
    committed, fresh = read(name), run(name, where)
    assert conclusion(fresh) == conclusion(committed)
    assert figures(fresh) == figures(committed) >= 3
    text = printed(fresh.cells[-1])
    assert len(re.findall(r"\d\.\d|\d%", text)) >= 10, text
    assert "Caveats: " in text
    assert not re.search(r"[{}]|\bnan\b|\binf\b", text), text


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_committed_notebook_was_run_in_order_and_is_small(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    assert len(notebook.cells) <= (32 if name in GUIDES else 12)
    assert not any(out.output_type == "error" for cell in code(notebook) for out in cell.outputs)
    assert not warned(notebook)
    assert (FOLDER / f"{name}.ipynb").stat().st_size < MAX_BYTES


def test_the_notebooks_are_small_together() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*.ipynb")) < MAX_BYTES_TOGETHER


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_committed_notebook_does_not_tell_where_it_was_run(name: str) -> None:
    notebook = read(name)
    for out in (out for cell in code(notebook) for out in cell.outputs):
        out.get("data", {}).pop("image/png", None)  # base64 has slashes of its own
    text = nbformat.writes(notebook)  # type: ignore[no-untyped-call]
    places = ["/tmp", "/home", "/root", "/Users", str(Path.home()), str(FOLDER.parent)]
    assert not [place for place in places if f"{place}/" in text]
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", text)


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_readme_says_what_the_notebook_found(name: str) -> None:
    text = (FOLDER / "README.md").read_text()
    section = text.partition(f"({name}.ipynb)")[2].partition("\n## ")[0]
    found = read(name)
    assert f"**{conclusion(found).capitalize()}.**" in section
    numbers = set(re.findall(r"-?\d+\.\d+%?|-?\d+%", section.replace(" %", "%")))
    assert len(numbers) >= 3
    assert numbers <= set(re.findall(r"-?\d+\.\d+%?|-?\d+%", printed(found.cells[-1])))


# ---- the two guides -----------------------------------------------------------------------------------------------


def test_the_readme_lists_the_guides_first() -> None:
    text = (FOLDER / "README.md").read_text()
    places = [text.index(f"({name}.ipynb)") for name in NOTEBOOKS]
    assert places == sorted(places)


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    ("name", "where", "drawn", "said"),
    [
        (
            "quick_start",
            "examples",
            8,
            [
                "all blocks add up bit for bit (1)",
                "all shares together: #",
                "Answer: 4_mlp_out is the MLP that matters",
            ],
        ),
        (
            "is_my_capture_right",
            ".",
            1,
            [
                "pre-norm: 17 of 17 states are those of the hooks, bit for bit",
                "16 of 16 writes are what the module returned, 16 of 16 reads are the states",
                "head on the sum: True sl.run_from the last state: True",
                "one after the other # of the numbers differ, relative error #",
                "post-norm: 17 of 17 states are those of the hooks, bit for bit",
                "the residual stream of this model is not one chain of additions.",
                "the writes do not add up: x_2 of stream 'main' (after 1_mlp_out)",
                "the capture itself: ok=True",
                "the damaged copy: ok=False",
                "damaged.h5: /streams/main/write[5], block 0:",
            ],
        ),
    ],
)
def test_a_guide_runs_as_it_was_committed(name: str, where: str, drawn: int, said: list[str]) -> None:
    committed, fresh = read(name), run(name, where)
    lines = all_printed(fresh)
    assert lines == all_printed(committed)
    assert figures(fresh) == figures(committed) == drawn
    assert not warned(fresh)
    assert all(any(line.startswith(start) for line in lines) for start in said)


@pytest.mark.parametrize(("kind", "words"), [("mlp", "MLP that matters most"), ("attn", "attentions it is")])
def test_the_answer_of_the_quick_start_by_hooks_alone(kind: str, words: str) -> None:
    """The experiment again with plain forward hooks: a branch's output at the last byte is that of the other text."""
    model = sl.load(FOLDER.parent / "fixtures" / "model.pt")
    assert model.tokenizer is not None
    first, second = (torch.tensor([model.tokenizer.encode(text)]) for text in ("is a sequen", "the argumen"))
    c, t = model.tokenizer.encode("ct")
    blocks: Any = model.module.get_submodule("transformer.h")

    def preference(ids: Tensor, branch: Any = None, hook: Callable[..., Any] | None = None) -> float:
        handle = None if hook is None else branch.register_forward_hook(hook)
        with torch.no_grad():
            logits = model.module(ids)[0, -1]
        if handle is not None:
            handle.remove()
        return float(logits[c] - logits[t])

    def recovered(branch: Any) -> float:
        kept: list[Tensor] = []
        high = preference(first, branch, lambda *seen: kept.append(seen[-1].clone()))
        low = preference(second)
        patched = preference(second, branch, lambda *seen: torch.cat([seen[-1][:, :-1], kept[0][:, -1:]], dim=1))
        return (patched - low) / (high - low)

    shares = [recovered(getattr(block, kind)) for block in blocks]
    best = max(range(len(shares)), key=shares.__getitem__)
    line = next(line for cell in code(read("quick_start")) for line in printed(cell).splitlines() if words in line)
    assert f"{best}_{kind}_out" in line
    found = re.search(r"(\d+)%", line)
    assert found
    assert abs(int(found[1]) - 100 * shares[best]) <= 1


@pytest.mark.usefixtures("bare")
def test_the_guide_finds_writes_that_were_exchanged() -> None:
    notebook = read("is_my_capture_right")
    ids = [cell.id for cell in notebook.cells]
    notebook.cells = notebook.cells[: ids.index("add") + 1]
    notebook.cells[ids.index("capture")].source += """
with h5py.File("pre_norm.h5", "r+") as file:
    write = file["/streams/main/write"]
    write[3], write[5] = write[5], write[3]
"""
    with pytest.raises(CellExecutionError, match="AssertionError"):
        run_through(notebook)
    assert "pre-norm: 4 of 17 states are those of the hooks" in printed(notebook.cells[-1])  # x_0 to x_3


if __name__ == "__main__":
    for each in sys.argv[1:] or NOTEBOOKS:
        nbformat.write(run(each), FOLDER / f"{each}.ipynb")  # type: ignore[no-untyped-call]
