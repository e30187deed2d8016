"""State dicts: out of their wrappers, without their prefixes, checked against a module, and into it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamlens.errors import CheckpointError

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which training loops and Lightning, DeepSpeed and nanoGPT keep the state dict."""

_INNER_PREFIXES = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Put by torch itself around any module, at any depth: never part of a name that a person chose."""

_OUTER_PREFIXES = ("module.", "model.")
"""Put in front by DistributedDataParallel and Lightning, but also common first names of real modules."""

_SHOWN = 3

Shape = tuple[int, ...]


def state_dict_of(loaded: Any, where: str) -> dict[str, Tensor]:
    """Find the state dict in what a file held, and check that its tensors are ordinary ones.

    Args:
        loaded: a state dict, or a dict that holds one under one of the usual keys.
        where: the file, for messages.

    Raises:
        CheckpointError: there is none in it, or it has sparse, quantised or empty (meta) tensors.

    >>> list(state_dict_of({"epoch": 3, "state_dict": {"_orig_mod.weight": torch.zeros(2)}}, "x.pt"))
    ['weight']
    """
    for _ in _WRAPPERS:  # a bound, because a hostile file can hold a dict that contains itself
        loaded = loaded.state_dict() if isinstance(loaded, nn.Module) else loaded
        if not isinstance(loaded, Mapping):
            raise CheckpointError(f"{where} holds a {type(loaded).__name__}, no state_dict: save model.state_dict()")
        wrapped = (loaded[key] for key in _WRAPPERS if isinstance(loaded.get(key), Mapping | nn.Module))
        loaded = next(wrapped, loaded)
    state = {str(key): value for key, value in loaded.items() if not str(key).endswith("_extra_state")}
    strangers = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if strangers or not state:
        raise CheckpointError(
            f"{where}: no state_dict found ({_listed(strangers) or 'it is empty'}); "
            f"expected tensors by name, or a dict that has them under {' or '.join(map(repr, _WRAPPERS))}"
        )
    check_plain(state, where)
    return {_without_inner(key): value for key, value in state.items()}


def check_plain(state: Mapping[str, Tensor], where: str) -> None:
    """Refuse tensors that are not dense arrays of ordinary numbers.

    Raises:
        CheckpointError: a sparse tensor (whose indices nobody has checked), a quantised one, or one without values.
    """
    for name, tensor in state.items():
        if tensor.layout is not torch.strided or tensor.is_nested:
            raise CheckpointError(f"{where}: '{name}' is a sparse tensor, which is not loaded: save it dense")
        if tensor.is_quantized or (tensor.is_floating_point() and tensor.itemsize < 2):
            raise CheckpointError(
                f"{where}: '{name}' is quantised ({tensor.dtype}), which is not loaded: save it in bfloat16 or float32"
            )
        if tensor.is_meta:
            raise CheckpointError(f"{where}: '{name}' has a shape but no values (meta device): save real weights")


def _without_inner(name: str) -> str:
    for prefix in _INNER_PREFIXES:
        name = name.replace(prefix, "")
    return name


def strip_prefixes(state: Mapping[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """Take `module.` and `model.` off the names as often as makes most of them names that are expected.

    >>> weight = torch.zeros(1)
    >>> list(strip_prefixes({"module.model.head.weight": weight}, {"head.weight"}))
    ['head.weight']
    >>> list(strip_prefixes({"model.norm.weight": weight}, {"model.norm.weight"}))
    ['model.norm.weight']
    """
    candidates = [dict(state)]
    while prefix := next((p for p in _OUTER_PREFIXES if any(name.startswith(p) for name in candidates[-1])), None):
        candidates.append({name.removeprefix(prefix): tensor for name, tensor in candidates[-1].items()})
    return max(candidates, key=lambda candidate: len(candidate.keys() & set(expected)))


def assign_state(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Put the tensors of a state dict into a module: all of them, in the dtype they have, tied ones tied.

    A tied parameter may be stored under one of its names only.

    Raises:
        CheckpointError: names or shapes differ, or the weights of tied parameters do.
    """
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    complete = dict(state)
    groups = _tied_names(module)
    for group in groups:
        stored = [name for name in group if name in state]
        for name in stored[1:]:
            if not torch.equal(state[name], state[stored[0]]):
                raise CheckpointError(
                    f"{where}: '{stored[0]}' and '{name}' are one parameter in the model, but differ in the weights: "
                    "the weights belong to a model that does not tie them; build it with --model package.module:factory"
                )
        complete.update({name: state[stored[0]] for name in group if stored})
    shapes = {name: (tuple(complete[name].shape), shape) for name, shape in expected.items() if name in complete}
    wrong_shapes = [(name, stored, wanted) for name, (stored, wanted) in shapes.items() if stored != wanted]
    if complete.keys() != expected.keys() or wrong_shapes:
        raise disagreement(where, expected.keys() - complete.keys(), complete.keys() - expected.keys(), wrong_shapes)
    # strict=False: an extra state, which some modules keep beside their tensors, is not in `complete`.
    module.load_state_dict(complete, strict=False, assign=True)
    for group in groups:
        _tie(module, group)


def _tied_names(module: nn.Module) -> list[list[str]]:
    by_parameter: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        by_parameter.setdefault(id(parameter), []).append(name)
    return [names for names in by_parameter.values() if len(names) > 1]


def _tie(module: nn.Module, names: list[str]) -> None:
    parameter = module.get_parameter(names[0])
    for name in names[1:]:
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, parameter)


def disagreement(
    where: str,
    missing: Collection[str],
    unexpected: Collection[str],
    shapes: Collection[tuple[str, Shape, Shape]],
) -> CheckpointError:
    """The error for weights that do not fit: the first few names of each sort, and both shapes.

    Args:
        where: the file.
        missing: names that the model has and the weights lack.
        unexpected: names that the weights have and the model lacks.
        shapes: name, shape in the weights, shape in the model.

    >>> print(disagreement("x.pt", [], [], [("b", (3, 2), (4, 2))]))
    x.pt: config and weights disagree: 'b' is (3, 2) in the weights, (4, 2) in the model
    """
    facts = [
        f"{len(names)} {text} ({_listed(names)})"
        for names, text in ((missing, "missing from the weights"), (unexpected, "unknown to the model"))
        if names
    ]
    for name, stored, wanted in sorted(shapes)[:_SHOWN]:
        facts.append(f"'{name}' is {tuple(stored)} in the weights, {tuple(wanted)} in the model")
    if len(shapes) > _SHOWN:
        facts.append(f"and {len(shapes) - _SHOWN} more shapes")
    return CheckpointError(f"{where}: config and weights disagree: {'; '.join(facts)}")


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    shown = ", ".join(map(repr, names[:_SHOWN]))
    return shown + (", ..." if len(names) > _SHOWN else "")


def stored_dtype(state: Mapping[str, Tensor]) -> torch.dtype:
    """The floating dtype that most values of a state dict have."""
    values: dict[torch.dtype, int] = {}
    for tensor in state.values():
        if tensor.is_floating_point():
            values[tensor.dtype] = values.get(tensor.dtype, 0) + tensor.numel()
    return max(values, key=lambda dtype: values[dtype], default=torch.float32)


def private_copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors out of a mapped file, which may be replaced or cut while the model is in use; ties are kept."""
    copies: dict[object, Tensor] = {}
    for tensor in state.values():
        place = memory_of(tensor)
        if place not in copies:
            copies[place] = tensor.clone()
    return {name: copies[memory_of(tensor)] for name, tensor in state.items()}


def memory_of(tensor: Tensor) -> object:
    """A key that two tensors share exactly when they are the same values in the same memory."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def read_safetensors(paths: Iterable[Path]) -> dict[str, Tensor]:
    """Read safetensors files into one state dict.

    Raises:
        CheckpointError: the package is missing, or a file is damaged or holds quantised weights.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(f"{error}: safetensors files need the extra 'hf' of residual-streamlens") from None
    state: dict[str, Tensor] = {}
    for path in paths:
        try:
            part = load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged or cut short ({error}): fetch it again") from None
        check_plain(part, str(path))
        state.update(private_copies(part))
    return state
