"""The shape of the repository: who may import whom, how long a file may be, what a wheel and a clone will hold."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import streamlens

ROOT = Path(__file__).resolve().parent.parent
CODE_FOLDERS = ("streamlens", "analyses", "cli", "fixtures", "benchmarks", "examples")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
CACHES = {"__pycache__", ".git", ".venv", "build", "dist"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def own_files(*folders: str, suffix: str = ".py") -> list[Path]:
    """Files that are somebody's work, each once: the links streamlens/cli and streamlens/analyses are not followed."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob(f"*{suffix}") if not linked(path))


def linked(path: Path) -> bool:
    return any((ROOT / part).is_symlink() for part in [path, *path.relative_to(ROOT).parents])


def imported_names(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Full names of everything that the import statements among the nodes import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_import_time(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported: not those in functions, nor those for type checkers."""
    for node in ast.iter_child_nodes(tree):
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not isinstance(node, Function) and not for_types:
            yield node
            yield from at_import_time(node)


def code_lines(function: Function) -> int:
    """Lines of a function from its `def` to its end, without the docstring."""
    assert function.end_lineno is not None
    total = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None and first.end_lineno is not None:
        total -= first.end_lineno - first.lineno + 1
    return total


def run_python(script: str) -> None:
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def committed_files() -> list[Path]:
    """What is, or would be, committed; in a tree without git, everything outside the caches."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        found = [path for path in ROOT.rglob("*") if not CACHES & set(path.relative_to(ROOT).parts)]
    else:
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        found = [ROOT / name for name in listed.split("\0") if name]
    return [path for path in found if path.is_file() and not linked(path)]


# ---- packaging ----------------------------------------------------------------------------------------------------


def test_the_wheel_holds_every_package() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    homes = {"streamlens": ROOT / "streamlens", **{k: ROOT / v for k, v in setuptools["package-dir"].items()}}
    found = {
        ".".join([name, *init.parent.relative_to(home).parts])
        for name, home in homes.items()
        for init in home.rglob("__init__.py")
        if not linked(init)
    }
    assert set(setuptools["packages"]) == found


def test_links_are_relative_and_stay_inside() -> None:
    links = [path for path in (ROOT / "streamlens").iterdir() if path.is_symlink()]
    assert {link.name: str(link.readlink()) for link in links} == {"analyses": "../analyses", "cli": "../cli"}


def test_git_ignores_nothing_of_the_fixtures() -> None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    present = [p for p in (ROOT / "fixtures").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    expected = ["model.pt", "stores/v1/tiny.h5", "text.txt", "folder/model.safetensors", "ids.bin", "ids.npy"]
    names = [str(p.relative_to(ROOT)) for p in present] + [f"fixtures/{name}" for name in expected]
    command = ["git", "check-ignore", "--no-index", "--stdin"]
    ignored = subprocess.run(command, cwd=ROOT, input="\n".join(names), capture_output=True, text=True)
    assert ignored.stdout == ""
    assert ignored.returncode == 1, ignored.stderr


# ---- imports ------------------------------------------------------------------------------------------------------


def test_no_module_bears_the_name_of_a_public_function() -> None:
    """Importing such a module would put it in the place of the function: `sl.observe` would no longer be callable."""
    names = {path.stem for path in (ROOT / "streamlens").iterdir()}
    assert not names & set(streamlens.__all__)
    run_python(
        "import pkgutil, importlib, streamlens\n"
        "for found in pkgutil.walk_packages(streamlens.__path__, 'streamlens.'):\n"
        "    if not found.name.endswith('__main__'): importlib.import_module(found.name)\n"
        "assert all(callable(getattr(streamlens, name)) for name in streamlens.__all__)"
    )


def test_core_imports_neither_analyses_nor_the_command_line() -> None:
    forbidden = re.compile(r"(streamlens\.(analyses|cli)|analyses|cli|click|sklearn|seaborn|matplotlib)(\.|$)")
    door = ROOT / "streamlens" / "__init__.py"  # names the functions of the analyses; imports them when asked
    offenders = [
        f"{path.name}: {name}"
        for path in own_files("streamlens")
        for name in imported_names(ast.walk(ast.parse(path.read_text())))
        if forbidden.match(name) and path != door
    ]
    assert not offenders


def test_optional_packages_are_imported_where_they_are_used() -> None:
    optional = re.compile(r"(transformers|safetensors|gguf|tokenizers|accelerate|xarray|pyarrow)(\.|$)")
    offenders = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in own_files("streamlens", "analyses", "cli")
        for name in imported_names(at_import_time(ast.parse(path.read_text())))
        if optional.match(name)
    ]
    assert not offenders


def test_no_module_exists_twice() -> None:
    run_python(
        "import sys, streamlens.analyses, streamlens.cli.app as app\n"
        "for command in app.COMMANDS.values(): command.load()\n"
        "twice = {'analyses', 'cli'} & {name.split('.')[0] for name in sys.modules}\n"
        "assert not twice, twice"
    )


@pytest.mark.parametrize("module", ["streamlens", "streamlens.cli", "streamlens.cli.app", "streamlens.errors"])
def test_importing_the_door_imports_no_torch(module: str) -> None:
    run_python(
        f"import sys, {module}\nheavy = {{'torch', 'h5py', 'sklearn'}} & set(sys.modules)\nassert not heavy, heavy"
    )


# ---- the text of the files ----------------------------------------------------------------------------------------


def test_files_and_functions_are_short() -> None:
    offenders = []
    for path in own_files(*CODE_FOLDERS):
        source = path.read_text()
        lines = len(source.splitlines())
        if lines > MAX_FILE_LINES:
            offenders.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, Function) and code_lines(node) > MAX_FUNCTION_LINES:
                offenders.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {code_lines(node)} lines")
    assert not offenders


def undocumented(body: list[ast.stmt], where: str) -> Iterator[str]:
    for node in body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            overload = any("overload" in ast.unparse(decorator) for decorator in node.decorator_list)
            if ast.get_docstring(node) is None and not overload:
                yield f"{where}:{node.lineno} {node.name}"
            if isinstance(node, ast.ClassDef):
                yield from undocumented(node.body, where)


def test_everything_public_has_a_docstring() -> None:
    offenders: list[str] = []
    for path in own_files("streamlens", "analyses", "cli"):
        tree = ast.parse(path.read_text())
        name = str(path.relative_to(ROOT))
        if ast.get_docstring(tree) is None:
            offenders.append(name)
        offenders += undocumented(tree.body, name)
    assert not offenders


@pytest.mark.parametrize(
    "banned",
    [
        pytest.param(r"pip3? install\s+(?:-\S+\s+)*[\"']?streamlens\b", id="the name of somebody else's package"),
        pytest.param(r"(?<![\w.~}/])/(?:root|work|home/\w+|Users/\w+|tmp/venv)/", id="a path of one machine"),
    ],
)
def test_no_file_mentions(banned: str) -> None:
    offenders = []
    for path in committed_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for match in re.finditer(banned, text):
            line = text.count("\n", 0, match.start()) + 1
            offenders.append(f"{path.relative_to(ROOT)}:{line}: {match.group()}")
    assert not offenders


def test_every_public_name_is_there() -> None:
    assert set(streamlens._HOMES) == set(streamlens.__all__) == set(dir(streamlens))
    assert all(getattr(streamlens, name) is not None for name in streamlens.__all__)
