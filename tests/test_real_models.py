"""Real weights and real text: captures against hooks written by hand for these two models alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import streamlens as sl
from streamlens.corpus.documents import builtin_documents
from streamlens.proof import same_bits
from streamlens.reader.verifying import verify
from tests.conftest import minilm, smollm2

pytestmark = pytest.mark.real

TOKENS, WINDOW = 512, 64


class _Hooks:
    """Plain hooks: the outputs of some modules and the inputs of others, in a list for each name."""

    def __init__(self, outputs: dict[str, nn.Module], inputs: dict[str, nn.Module]) -> None:
        self.seen: dict[str, Tensor] = {}
        self._handles = []
        for name, module in outputs.items():
            self._handles.append(module.register_forward_hook(self._output(name)))
        for name, module in inputs.items():
            self._handles.append(module.register_forward_pre_hook(self._input(name)))

    def _output(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.seen[name] = (output[0] if isinstance(output, tuple) else output).clone()

        return hook

    def _input(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            self.seen[name] = args[0].clone()

        return hook

    def __enter__(self) -> _Hooks:
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()


def batches(capture: sl.Capture) -> Iterator[tuple[int, int, Tensor]]:
    for block in capture.blocks():
        yield block.start, block.stop, block.ids.reshape(-1, WINDOW)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_smollm2_equals_hooks_written_by_hand(dtype: torch.dtype, tmp_path: Path) -> None:
    given = smollm2()
    module: Any = given.module if dtype == torch.float32 else copy.deepcopy(given.module).to(dtype)
    outputs, inputs = {}, {}
    for index, block in enumerate(module.model.layers):
        outputs[f"{index}_attn_out"], outputs[f"{index}_mlp_out"] = block.self_attn, block.mlp
        inputs[f"{index}_attn_out"], inputs[f"{index}_mlp_out"] = block.input_layernorm, block.post_attention_layernorm
    model = sl.load(module) if dtype != torch.float32 else given
    options: dict[str, Any] = {"window": WINDOW, "max_tokens": TOKENS, "batch_tokens": 256, "progress": False}
    path = tmp_path / "full.h5"
    text = builtin_documents()
    ids = [given.tokenizer.encode(text[0])] if given.tokenizer else []
    with (
        sl.capture(model, tokens=ids, out=path, **options) as capture,
        sl.capture(model, tokens=ids, out=tmp_path / "compact.h5", compact=True, **options) as compact,
    ):
        assert capture.proof.exact
        assert bool(capture.attrs["head_exact"])
        assert capture.stream().labels == tuple(outputs)
        for start, stop, batch in batches(capture):
            with torch.no_grad(), _Hooks(outputs, {}) as writes:
                logits = module(batch, use_cache=False).logits
            with torch.no_grad(), _Hooks({}, inputs) as reads:
                module(batch, use_cache=False)
            for label in outputs:
                assert same_bits(capture.write(label)[start:stop], writes.seen[label].flatten(0, 1))
                assert same_bits(capture.read(label)[start:stop], reads.seen[label].flatten(0, 1))
            final = capture.final[start:stop].reshape(*batch.shape, -1)
            with torch.no_grad():
                assert same_bits(module.lm_head(module.model.norm(final)), logits)
        assert same_bits(compact.reads, capture.reads)
    assert verify(path).ok


def test_minilm_equals_hooks_written_by_hand(tmp_path: Path) -> None:
    """Post-norm: the write is the output of the dense layer, not of the module called attention."""
    model = minilm()
    module: Any = model.module
    outputs, inputs = {}, {}
    for index, block in enumerate(module.encoder.layer):
        outputs[f"{index}_attn_out"], outputs[f"{index}_mlp_out"] = block.attention.output.dense, block.output.dense
        inputs[f"{index}_attn_out"], inputs[f"{index}_mlp_out"] = block.attention, block.intermediate
    path = tmp_path / "full.h5"
    with sl.capture(model, window=WINDOW, max_tokens=TOKENS, batch_tokens=256, out=path, progress=False) as capture:
        assert capture.proof.exact
        assert [p.label for p in capture.anatomy.stream().parts] == ["embed", "pos_embed", "type_embed"]
        assert {s.norm for s in capture.anatomy.stream().sublayers} == {"post"}
        for start, stop, batch in batches(capture):
            with torch.no_grad(), _Hooks({}, inputs) as reads:
                last = module(batch).last_hidden_state
            with torch.no_grad(), _Hooks(outputs, {}) as writes:
                module(batch)
            for label in outputs:
                assert same_bits(capture.write(label)[start:stop], writes.seen[label].flatten(0, 1))
                assert same_bits(capture.read(label)[start:stop], reads.seen[label].flatten(0, 1))
            assert same_bits(capture.final[start:stop], last.flatten(0, 1))
    assert verify(path).ok
