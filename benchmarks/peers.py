"""Other libraries doing the same job: the same 60 writes and 60 reads, saved with h5py after each batch.

Both are imported only when they are wanted, and given the model that is loaded already: nothing is downloaded. Each
gets a second module over the same weights, because both rebuild or wrap what they are given.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import torch

from benchmarks.plain_file import Piece, PlainFile, plain_pieces
from benchmarks.setting import Setting

PACKAGES = {"TransformerLens": "transformer-lens", "nnsight": "nnsight"}
"""Each peer's name in the tables, and the package that it comes in."""


class TransformerLens:
    """`run_with_cache` of its bridge, which computes attention step by step in place of the model's fused one."""

    reference = "body"

    def __init__(self, setting: Setting) -> None:
        """Build the bridge around the loaded model.

        Raises:
            ImportError: it is not installed.
        """
        sources = import_module("transformer_lens.model_bridge.sources")
        module = setting.twin()
        self._setting = setting
        self._bridge = sources.build_bridge_from_module(module, type(module).__name__, hf_config=module.config)
        layers = range(module.config.num_hidden_layers)
        self._rows = {
            f"blocks.{layer}.{hook}": (what, 2 * layer + place)
            for layer in layers
            for hook, what, place in (
                ("hook_resid_pre", "read", 0),
                ("hook_attn_out", "write", 0),
                ("hook_resid_mid", "read", 1),
                ("hook_mlp_out", "write", 1),
            )
        }

    def run(self, path: Path) -> None:
        """Cache what is wanted of each batch, then save it.

        `stop_at_layer` cannot stop after the last layer, so the unembedding is asked for one position only; and the
        attention weights, which it returns unless told otherwise, are left out.
        """
        with PlainFile(path, self._setting) as file, torch.inference_mode():
            for start, ids in self._setting.batches():
                file.begin(start)
                _, cache = self._bridge.run_with_cache(
                    ids,
                    return_type=None,
                    return_cache_object=False,
                    names_filter=self._rows.__contains__,
                    logits_to_keep=1,
                    output_attentions=False,
                    use_cache=False,
                )
                for name, (what, row) in self._rows.items():
                    file.put(what, row, cache[name])

    def pieces(self, path: Path) -> Iterator[Piece]:
        """The two datasets."""
        return plain_pieces(path, self._setting)


class NNsight:
    """A trace of the body that saves the outputs of both sublayers and the inputs of both norms."""

    reference = "body"

    def __init__(self, setting: Setting) -> None:
        """Wrap the body.

        Raises:
            ImportError: it is not installed.
        """
        self._nnsight = import_module("nnsight")
        self._setting = setting
        self._body = self._nnsight.NNsight(setting.twin().model)

    def run(self, path: Path) -> None:
        """Trace each batch, then save what the trace kept."""
        nnsight, body = self._nnsight, self._body
        with PlainFile(path, self._setting) as file, torch.inference_mode():
            for start, ids in self._setting.batches():
                file.begin(start)
                with body.trace(input_ids=ids, use_cache=False):
                    found = nnsight.save([])
                    for layer in body.layers:
                        found.append(("read", layer.input_layernorm.input))
                        found.append(("write", layer.self_attn.output[0]))
                        found.append(("read", layer.post_attention_layernorm.input))
                        found.append(("write", layer.mlp.output))
                for place, (what, tensor) in enumerate(found):
                    file.put(what, place // 2, tensor)

    def pieces(self, path: Path) -> Iterator[Piece]:
        """The two datasets."""
        return plain_pieces(path, self._setting)
