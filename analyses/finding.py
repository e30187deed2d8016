"""The model behind a capture: where it is now, loaded as it was when the capture was made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from streamlens.checkpoint.loading import load
from streamlens.checkpoint.model import Model
from streamlens.errors import MissingDataError, StreamlensError
from streamlens.reader.opening import Capture

Loader = Callable[[Path | None, torch.dtype | None], Model]
"""Loads a model from a path (None: from its factory alone), cast to a dtype (None: as it is stored)."""


def find_model(
    capture: Capture,
    load_from: Loader = lambda path, dtype: load(path, dtype=dtype),
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
    places: list[Path | None] = [moved] if moved is not None else [*_places(capture)]
    if not places and builds:
        places = [None]
    if not places:
        source = str(capture.attrs["model_source"])
        # A factory is code: the name of one in a file is never run, only suggested.
        way = f"--model {source}" if ":" in source else "--model-file"
        raise MissingDataError(
            f"{capture.path} was made from {source}, which is not a file here or beside the capture: run this where "
            f"it is, or give the model itself ({way}; in Python model=)"
        )
    recorded: torch.dtype = getattr(torch, str(capture.attrs["dtype"]))
    others: list[Model] = []
    errors: list[StreamlensError] = []
    for place in places:
        try:
            model = load_from(place, None)
            if not _is_of(model, capture) and _casts(model, recorded):
                model = load_from(place, recorded)
        except StreamlensError as error:  # what else bears the name does not hide the right one
            errors.append(error)
            continue
        if _is_of(model, capture):
            return model
        others.append(model)
    if errors:
        raise errors[0]
    return made_sure(others[0], capture)


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


def _places(capture: Capture) -> list[Path]:
    """Where the model may be: what the file says, as seen from here and from its own folder; or its name there."""
    source = Path(str(capture.attrs["model_source"])).expanduser()
    places = [source, capture.folder / source, capture.folder / source.name]
    return [path for path in dict.fromkeys(places) if path.exists()]


def _is_of(model: Model, capture: Capture) -> bool:
    return model.sha256 == str(capture.attrs["model_sha256"])


def _casts(model: Model, dtype: torch.dtype) -> bool:
    """Whether a cast to this dtype would change the weights."""
    return any(p.is_floating_point() and p.dtype != dtype for p in model.module.parameters())
