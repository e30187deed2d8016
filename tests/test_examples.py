"""The notebooks run from top to bottom, and come to the verdict that they were committed with.

``python -m tests.test_examples`` runs them and stores what they print and draw.
"""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parent.parent / "examples"
NOTEBOOKS = ("position", "gradient", "layer_drop")
MAX_BYTES = 1_500_000
SECONDS_PER_CELL = 300

VERDICT = re.compile(r"^Verdict: ([A-Z][A-Z, ]*)\. ")


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


def run(name: str, where: str = "examples") -> NotebookNode:
    """Run a notebook in a fresh kernel; nothing of the run but its output is kept, so that two of them compare."""
    notebook = read(name)
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


@pytest.mark.parametrize(
    ("name", "where"),  # both places from which people start a kernel
    [("position", "examples"), ("gradient", "."), ("layer_drop", "examples")],
)
def test_a_notebook_comes_to_its_verdict_again(
    name: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(variable, str(tmp_path))  # nothing of the user's own set-up has a say, or is written to
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
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
    assert len(notebook.cells) <= 12
    assert not any(out.output_type == "error" for cell in code(notebook) for out in cell.outputs)
    assert not any(out.get("name") == "stderr" for cell in code(notebook) for out in cell.outputs)


def test_the_notebooks_are_small_together() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < MAX_BYTES


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_readme_says_what_the_notebook_found(name: str) -> None:
    text = (FOLDER / "README.md").read_text()
    section = text.partition(f"({name}.ipynb)")[2].partition("\n## ")[0]
    found = read(name)
    assert f"**{conclusion(found).capitalize()}.**" in section
    numbers = set(re.findall(r"-?\d+\.\d+%?|-?\d+%", section.replace(" %", "%")))
    assert len(numbers) >= 3
    assert numbers <= set(re.findall(r"-?\d+\.\d+%?|-?\d+%", printed(found.cells[-1])))


if __name__ == "__main__":
    for each in NOTEBOOKS:
        nbformat.write(run(each), FOLDER / f"{each}.ipynb")  # type: ignore[no-untyped-call]
