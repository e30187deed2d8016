"""The model behind a capture: where it is now, loaded as it was when the capture was made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from streamlens.checkpoint.loading import load
from streamlens.checkpoint.model import Model
from streamlens.errors import MissingDataError, StreamlensError
from streamlens.reader.opening import Capture

Loader = Callable[[Path | None, torch.dtype | None, bool], Model]
"""Loads a model from a path (None: from its factory alone), cast to a dtype (None: as it is stored). The last says
whether the path was named, by the caller or by the capture; one that only bears the name must never run code."""


def find_model(
    capture: Capture,
    load_from: Loader = lambda path, dtype, named: load(path, dtype=dtype),
    *,
    moved: Path | None = None,
    builds: bool = False,
) -> Model:
    """Load the model that a capture was made from: from where it was, or by the same name beside the capture.

    What is loaded is compared with the hash in the file, first as it is stored and then, where that is another dtype,
    cast to the one that the capture was made in.

    Args:
        capture: the capture.
        load_from: loads what lies at a path; a caller who was told of a device or a config knows how.
        moved: where the model is now, if the caller knows.
        builds: `load_from` has a factory, so a model without a file is no obstacle.

    Raises:
        MissingDataError: it is not where it was, or it is another one now.

    >>> import tempfile
    >>> import streamlens as sl
    >>> from fixtures import zoo
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = sl.pack(sl.load(zoo.build("gpt2").module), f"{folder}/model.pt")
    ...     with sl.capture(path, out=f"{folder}/x.h5", max_tokens=16, progress=False) as capture:
    ...         find_model(capture).sha256 == capture.attrs["model_sha256"]
    True
    """
    places: list[tuple[Path | None, bool]] = [(moved, True)] if moved is not None else [*_places(capture)]
    if not places and builds:
        places = [(None, True)]
    recorded: torch.dtype = getattr(torch, str(capture.attrs["dtype"]))
    another: Model | None = None
    errors: list[StreamlensError] = []
    guesses: list[StreamlensError] = []
    for place, named in places:
        try:
            model = load_from(place, None, named)
            if not _is_of(model, capture) and _casts(model, recorded):
                model = load_from(place, recorded, named)
        except StreamlensError as error:  # what else bears the name does not hide the right one
            (errors if named else guesses).append(error)
            continue
        if _is_of(model, capture):
            return model
        another = another or model
    if errors:
        raise errors[0]
    if another is not None:
        return made_sure(another, capture)
    raise _nowhere(capture, guesses)


def _nowhere(capture: Capture, guesses: list[StreamlensError]) -> MissingDataError:
    source = str(capture.attrs["model_source"])
    # A factory is code: the name of one in a file is never run, only suggested.
    way = f"--model {source}" if ":" in source else "--model-file"
    missing = MissingDataError(
        f"{capture.path} was made from {source}, which is not a file here or beside the capture: run this where it is, "
        f"or give the model itself ({way}; in Python model=)"
    )
    for guess in guesses:
        missing.add_note(f"what bears its name is no model that can be loaded: {guess}")
    return missing


def made_sure(model: Model, capture: Capture) -> Model:
    """Return the model if it is the one of the capture.

    Raises:
        MissingDataError: it is another one.
    """
    if not _is_of(model, capture):
        raise MissingDataError(
            f"{capture.path} was made from a model with sha256 {str(capture.attrs['model_sha256'])[:16]}, and "
            f"{model.source} has {model.sha256[:16]}: give the model of the capture, or capture this one anew"
        )
    return model


def _places(capture: Capture) -> list[tuple[Path, bool]]:
    """Where the model may be: what the file says, seen from here and from its own folder; or, a guess, its name there.

    Each with whether it was named, and none twice.
    """
    source = Path(str(capture.attrs["model_source"])).expanduser()
    places: dict[Path, tuple[Path, bool]] = {}
    for path, named in ((source, True), (capture.folder / source, False), (capture.folder / source.name, False)):
        if path.exists():
            places.setdefault(path.resolve(), (path, named))
    return list(places.values())


def _is_of(model: Model, capture: Capture) -> bool:
    return model.sha256 == str(capture.attrs["model_sha256"])


def _casts(model: Model, dtype: torch.dtype) -> bool:
    """Whether a cast to this dtype would change the weights."""
    return any(p.is_floating_point() and p.dtype != dtype for p in model.module.parameters())
