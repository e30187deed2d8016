"""How many token ids and how many positions a model knows: read off its tables, not off a list of architectures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

_LIMIT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "block_size", "max_seq_len")
"""Where configs say for how many positions a model was made; only a table with that many rows makes it a limit."""


def vocabulary_rows(module: nn.Module) -> int | None:
    """Rows of the input embedding, or None if the model takes no token ids.

    >>> vocabulary_rows(nn.Sequential(nn.Embedding(50, 4), nn.Linear(4, 50)))
    50
    """
    table = _token_table(module)
    return None if table is None else table.num_embeddings


def _token_table(module: nn.Module) -> nn.Embedding | None:
    named = getattr(module, "get_input_embeddings", None)
    if callable(named):
        try:
            table = named()
        except (AttributeError, NotImplementedError):
            return None
        return table if isinstance(table, nn.Embedding) else None
    tables = [
        found
        for name, found in module.named_modules()
        if isinstance(found, nn.Embedding) and not _says_position(name) and not _says_segment(name)
    ]
    linears = [found.out_features for found in module.modules() if isinstance(found, nn.Linear)]
    # In a language model the last linear has one output per token id, so that is the table to prefer.
    as_wide_as_output = [found for found in tables if linears and found.num_embeddings == linears[-1]]
    return next(iter(as_wide_as_output + tables), None)


def position_limit(module: nn.Module, config: Mapping[str, Any]) -> int | None:
    """Longest input that the model's table of positions can serve, or None if it has no such table.

    A table is one of positions when its usable rows are as many as the config says; a module without a config that
    says so is searched for a table whose name says it. Rows that no position can reach (RoBERTa begins after its
    padding row, OPT after two) are not usable.

    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.tokens, self.positions = nn.Embedding(50, 4), nn.Embedding(16, 4)
    >>> position_limit(Net(), {"block_size": 16}), position_limit(nn.Embedding(50, 4), {})
    (16, None)
    """
    limits = _stated_limits(module, config)
    by_name = not limits and not hasattr(getattr(module, "config", None), "to_dict")
    usable = [
        rows - unreachable
        for name, rows, unreachable in _tables(module)
        if (rows in limits or rows - unreachable in limits) or (by_name and _says_position(name))
    ]
    return min(usable, default=None)


def _stated_limits(module: nn.Module, config: Mapping[str, Any]) -> set[int]:
    own: Any = getattr(module, "config", None)
    if hasattr(own, "get_text_config"):
        own = own.get_text_config()
    stated = {config.get(key) for key in _LIMIT_KEYS} | {getattr(own, key, None) for key in _LIMIT_KEYS}
    return {value for value in stated if isinstance(value, int) and value > 0}


def _tables(module: nn.Module) -> Iterator[tuple[str, int, int]]:
    """Name, rows and unreachable rows of everything that may be a table of positions."""
    tokens = _token_table(module)
    for prefix, owner in module.named_modules():
        if isinstance(owner, nn.Embedding):
            if owner is not tokens:
                padding = 0 if owner.padding_idx is None else owner.padding_idx + 1
                yield prefix, owner.num_embeddings, padding + int(getattr(owner, "offset", 0))
            continue
        for name, tensor in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
            if _says_position(name) and (rows := _rows(tensor)):
                yield f"{prefix}.{name}", rows, 0


def _rows(tensor: Tensor) -> int | None:
    """Rows of a float table (position, d_model), which may carry one axis of length 1 for the documents."""
    leading = [length for length in tensor.shape[:-1] if length != 1]
    if not tensor.is_floating_point() or tensor.ndim not in (2, 3) or len(leading) != 1:
        return None
    return leading[0]


def _says_position(name: str) -> bool:
    leaf = name.rpartition(".")[2].lower()
    return "pos" in leaf or leaf in ("wpe", "pe")


def _says_segment(name: str) -> bool:
    leaf = name.rpartition(".")[2].lower()
    return "type" in leaf or "segment" in leaf
