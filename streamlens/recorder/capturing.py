"""`streamlens.capture`: from a model and a text to a proved file."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from streamlens.calling import check_inputs
from streamlens.checkpoint.loading import load
from streamlens.checkpoint.model import Model
from streamlens.corpus.documents import Text
from streamlens.corpus.windows import Windows, windows_for
from streamlens.discovery.layout import main_input
from streamlens.errors import UsageError
from streamlens.progress import Progress
from streamlens.recorder.blocks import record
from streamlens.recorder.feed import (
    Feed,
    feed_inputs,
    feed_windows,
    probe_of_inputs,
    probe_of_windows,
    refuse_padding,
)
from streamlens.recorder.pilot import Pilot, first_weight, fly, parameters_of
from streamlens.recorder.plan import Choice, Plan
from streamlens.rest import resting
from streamlens.store.layout import dtype_name
from streamlens.store.writer import CaptureWriter
from streamlens.wording import model_name

if TYPE_CHECKING:
    from streamlens.reader.opening import Capture

_log = logging.getLogger("streamlens")

DEFAULT_BATCH_TOKENS = 2048


@resting
def capture(
    source: Model | nn.Module | str | Path,
    *,
    text: Text | None = None,
    tokens: Any = None,
    inputs: Any = None,
    out: str | Path | None = None,
    window: int | None = None,
    ragged: bool = False,
    max_tokens: int | None = None,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    compact: bool = False,
    layers: Sequence[int] | None = None,
    kinds: Sequence[str] | None = None,
    positions: Sequence[int] | None = None,
    streams: Sequence[str] | None = None,
    heads: bool = False,
    output: bool = True,
    top_k: int = 5,
    seed: int = 0,
    allow_unproven: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Capture:
    """Run a model over a text and store what each sublayer reads from and writes into the residual stream.

    The proof that the writes add up runs with the capture. A capture that was interrupted goes on when it is called
    again in the same way.

    Args:
        source: a loaded `Model`, any live module, or a path that `streamlens.load` understands.
        text: one document or several (a `Path` is read); without `text`, `tokens` and `inputs`, English text that
            comes with Python.
        tokens: token ids: one sequence, or one for each document.
        inputs: forward's own arguments instead, a tensor or a dict: embeddings, images, two sides of a translation.
        out: the file; by default the source's name (of a live module: its class) with ``.h5``, in the current folder.
        window: tokens in each window (256, or the model's limit).
        ragged: keep documents whole instead of cutting equal windows.
        max_tokens: stop after so many tokens.
        batch_tokens: tokens run at once; one batch is one block of the file.
        compact: leave the reads out; they are served by exact replay.
        layers: store only the sublayers of these blocks.
        kinds: store only these kinds of sublayer: attn, cross_attn, mixer, mlp.
        positions: store only these positions of each window.
        streams: store only these streams.
        heads: also store the value mix that enters each attention's output projection.
        output: also store a summary of the logits (log-sum-exp, target logit, top-k).
        top_k: how many logits of each token to keep.
        seed: for random tokens, where the model has no tokenizer.
        allow_unproven: keep a capture that does not add up, and mark it.
        overwrite: replace another capture of that name.
        progress: show a progress bar.

    Returns:
        The finished capture, opened.

    Raises:
        AnatomyError: the residual stream was not found.
        CorpusError, UsageError: before the first forward pass.
        ProofError: the writes do not add up.
        StorageError: writing stopped; the same call resumes.

    Example:
        >>> import tempfile
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = capture(model, inputs=torch.randn(4, 5, 8), out=f"{folder}/x.h5", progress=False)
        ...     found.proof.exact, tuple(found.writes.shape)
        (True, (4, 20, 8))
    """
    choice = Choice(
        compact, _ints(layers), _texts(kinds), _ints(positions), _texts(streams), heads, output, top_k
    )  # fmt: skip
    model = load(source)
    plan = prepare(
        model,
        choice,
        text=text,
        tokens=tokens,
        inputs=inputs,
        window=window,
        ragged=ragged,
        max_tokens=max_tokens,
        batch_tokens=batch_tokens,
        seed=seed,
    )
    path = Path(out) if out is not None else default_path(model)
    return run(model, plan, path, seed=seed, allow_unproven=allow_unproven, overwrite=overwrite, progress=progress)


def prepare(
    model: Model,
    choice: Choice,
    *,
    text: Text | None = None,
    tokens: Any = None,
    inputs: Any = None,
    windows: Windows | None = None,
    window: int | None = None,
    ragged: bool = False,
    max_tokens: int | None = None,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    seed: int = 0,
) -> Plan:
    """Decide everything about a capture, and try the model on a handful of tokens; nothing is written yet.

    Raises:
        UsageError: both `inputs` and a text, or a choice that does not fit the model.
    """
    device = first_weight(parameters_of(model.module)).device
    if inputs is not None:
        if text is not None or tokens is not None or windows is not None:
            raise UsageError("give either inputs or a text or tokens: inputs are all of forward's arguments")
        pilot, feed = _with_inputs(model.module, check_inputs(inputs), batch_tokens, choice)
    else:
        corpus = windows or windows_for(
            model, documents=text, ids=tokens, window=window, max_tokens=max_tokens, ragged=ragged, seed=seed
        )
        if windows is None:  # whoever makes windows tells what was assumed; here nobody else can
            for note in corpus.notes:
                _log.warning("%s", note)
        pilot, feed = _with_windows(model.module, corpus, batch_tokens, device)
    return Plan(pilot, feed, choice)


def _with_windows(module: nn.Module, corpus: Windows, batch_tokens: int, device: torch.device) -> tuple[Pilot, Feed]:
    pilot = fly(module, probe_of_windows(module, corpus, False, device))
    position_first = pilot.anatomy.stream().position_first
    if position_first:
        pilot = fly(module, probe_of_windows(module, corpus, True, device))
    return pilot, feed_windows(module, corpus, batch_tokens, position_first, device)


def _with_inputs(module: nn.Module, inputs: Any, batch_tokens: int, choice: Choice) -> tuple[Pilot, Feed]:
    pilot = fly(module, probe_of_inputs(inputs, False))
    position_first = pilot.anatomy.stream().position_first
    if position_first:
        pilot = fly(module, probe_of_inputs(inputs, True))
    anatomy = pilot.anatomy
    every = [s.name for s in anatomy.streams]
    refuse_padding(inputs, anatomy, every if choice.streams is None else choice.streams or [anatomy.head.stream])
    docs = main_input(inputs)[1].shape[1 if position_first else 0]
    positions = pilot.positions[anatomy.stream((choice.streams or (None,))[0]).name]
    return pilot, feed_inputs(module, inputs, docs, positions, batch_tokens, position_first)


def run(
    model: Model,
    plan: Plan,
    path: Path,
    *,
    seed: int = 0,
    allow_unproven: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    command: str = "",
) -> Capture:
    """Carry out a plan: write, prove, finish, and open what was written.

    Raises:
        ProofError, StorageError: as `capture`.
    """
    from streamlens.reader.opening import open_capture

    parameters = parameters_of(model.module)
    if not allow_unproven:
        stream = plan.pilot.anatomy.stream(plan.pilot.verdict.stream or None)
        plan.pilot.verdict.demand(stream, plan.pilot.dtypes[f"{stream.name}/read"])
    writer = CaptureWriter.open(
        path,
        items=plan.layout.items,
        n_tokens=plan.n_tokens,
        blocks=plan.layout.blocks,
        attrs=_attributes(model, plan, seed, command),
        static=plan.static(parameters),
        group_attrs=plan.group_attrs(),
        identity=_identity(model, plan),
        overwrite=overwrite,
    )
    with writer:
        if not writer.complete:
            done = int(sum(b.stop - b.start for b, d in zip(plan.blocks, writer.done, strict=True) if d))
            with Progress(plan.n_tokens, "capture", done_tokens=done, enabled=progress) as bar:
                record(
                    model.module, plan, writer, parameters, allow_unproven=allow_unproven, on_block=bar.update
                )  # fmt: skip
                writer.finish()
    return open_capture(path)


def default_path(model: Model) -> Path:
    """Return the name of the file for a model: its own name with ``.h5``, in the current folder."""
    name = model_name(model.source)
    # What stands behind the point in the name of a folder is no suffix: Qwen2.5-0.5B.
    stem = name if Path(model.source).expanduser().is_dir() else Path(name).stem
    return Path(f"{stem or 'capture'}.h5")


def _identity(model: Model, plan: Plan) -> dict[str, Any]:
    return {
        "model": model.sha256,
        "tokens": plan.feed.sha256,
        "store": plan.choice.identity(),
        "dtypes": {k: dtype_name(v) for k, v in plan.pilot.dtypes.items()},
    }


def _attributes(model: Model, plan: Plan, seed: int, command: str) -> dict[str, str | int]:
    import streamlens

    weight = first_weight(parameters_of(model.module))
    tokenizer = model.tokenizer
    return {
        "streamlens_version": streamlens.__version__,
        "torch_version": str(torch.__version__),
        "model_source": model.source,
        "model_sha256": model.sha256,
        "model_config": json.dumps(model.config),
        "tokenizer": "" if tokenizer is None else tokenizer.name,
        "tokenizer_sha256": "" if tokenizer is None else tokenizer.fingerprint,
        "text": plan.feed.description,
        "text_sha256": plan.feed.sha256,
        "further_inputs": json.dumps(plan.feed.further),
        "whole_windows": int(plan.keep.all()),
        "dtype": dtype_name(weight.dtype),
        "device": str(weight.device.type),
        "seed": seed,
        "causal": int(plan.pilot.causal),
        "head_exact": int(plan.pilot.head_exact),
        "compact": int(plan.choice.compact),
        "anatomy": plan.pilot.anatomy.to_json(),
        "command": command,
    }


def _ints(values: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if values is None else tuple(sorted({int(v) for v in np.asarray(values).reshape(-1)}))


def _texts(values: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if values is None else tuple(values)
