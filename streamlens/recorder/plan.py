"""What a capture will store, decided in full before the first forward pass."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from streamlens.anatomy import Stream, Sublayer
from streamlens.errors import UsageError
from streamlens.recorder.feed import Feed, Load
from streamlens.recorder.pilot import Pilot
from streamlens.replay import parameter_names, widest
from streamlens.store.layout import Item, Layout, dtype_name

KINDS = ("attn", "cross_attn", "mixer", "mlp")


@dataclass(frozen=True)
class Choice:
    """What the user wants stored."""

    compact: bool = False
    """Leave the reads out: they are served by exact replay."""
    layers: tuple[int, ...] | None = None
    kinds: tuple[str, ...] | None = None
    positions: tuple[int, ...] | None = None
    streams: tuple[str, ...] | None = None
    """None for all of them, nothing for the one that the head reads."""
    heads: bool = False
    """Also store what enters each attention's output projection."""
    output: bool = True
    """Also store a summary of the logits."""
    top_k: int = 5

    def identity(self) -> dict[str, Any]:
        """Return the choice as JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}


@dataclass(frozen=True)
class Block:
    """One batch as it is stored: which of its positions, and which rows of the file they fill."""

    load: Load
    kept: tuple[int, ...] | None
    """Positions that are stored; None for all."""
    start: int
    stop: int


class Plan:
    """Items, blocks and attributes of one capture.

    Raises:
        UsageError: a choice that contradicts itself, or names layers, kinds or positions that are not there.
    """

    def __init__(self, pilot: Pilot, feed: Feed, choice: Choice) -> None:
        self.pilot = pilot
        self.choice = choice
        self.streams = self._streams(pilot, choice)
        self.rows = {s.name: self._rows(s, choice) for s in self.streams}
        head = pilot.anatomy.head
        self.has_output = choice.output and head.vocab is not None and head.stream in self.rows
        self.feed = feed
        self.keep = self._kept_tokens(feed, choice)
        self.blocks = self._blocks(feed, choice)
        if not self.blocks:
            raise UsageError(f"none of the positions {list(choice.positions or ())} occurs in this corpus")
        if choice.compact and (choice.layers is not None or choice.kinds is not None):
            raise UsageError(
                "--compact rebuilds the reads from all writes, so it cannot be combined with --layers or --kinds: "
                "leave out one of them"
            )
        self.n_tokens = self.blocks[-1].stop
        self.layout = Layout(self._items(), self.n_tokens, tuple((b.start, b.stop) for b in self.blocks))

    @property
    def n_bytes(self) -> int:
        """Exact number of bytes of all captured tensors."""
        return sum(int(np.prod(i.shape(self.n_tokens), dtype=np.int64)) * i.dtype.itemsize for i in self.layout.items)

    def _streams(self, pilot: Pilot, choice: Choice) -> tuple[Stream, ...]:
        every = tuple(s.name for s in pilot.anatomy.streams)
        names = every if choice.streams is None else choice.streams or (pilot.anatomy.head.stream,)
        chosen = tuple(pilot.anatomy.stream(name) for name in names)
        lengths = {s.name: pilot.positions[s.name] for s in chosen}
        if len(set(lengths.values())) > 1:
            raise UsageError(
                f"the streams have different lengths ({lengths}) and one file has one token axis: capture them one "
                f"at a time with streams=({chosen[0].name!r},)"
            )
        return chosen

    def _rows(self, stream: Stream, choice: Choice) -> tuple[Sublayer, ...]:
        for layer in choice.layers or ():
            if not 0 <= layer < stream.layers:
                raise UsageError(f"stream {stream.name!r} has layers 0 to {stream.layers - 1}, not {layer}")
        present = {s.kind for s in stream.sublayers}
        for kind in choice.kinds or ():
            if kind not in KINDS:
                raise UsageError(f"no kind {kind!r}; choose from {', '.join(KINDS)}")
        rows = tuple(
            s
            for s in stream.sublayers
            if (choice.layers is None or s.layer in choice.layers) and (choice.kinds is None or s.kind in choice.kinds)
        )
        if not rows:
            raise UsageError(f"stream {stream.name!r} has no sublayer of that layer and kind; it has {sorted(present)}")
        return rows

    def _kept_tokens(self, feed: Feed, choice: Choice) -> NDArray[np.bool_]:
        if choice.positions is None:
            return np.ones(len(feed.position), np.bool_)
        return np.isin(feed.position, np.asarray(choice.positions))

    def _blocks(self, feed: Feed, choice: Choice) -> tuple[Block, ...]:
        blocks: list[Block] = []
        start = 0
        for load in feed.loads:
            kept = None
            if choice.positions is not None:
                kept = tuple(p for p in sorted(set(choice.positions)) if p < load.positions)
            count = load.docs * (load.positions if kept is None else len(kept))
            if count:
                blocks.append(Block(load, kept, start, start + count))
                start += count
        return tuple(blocks)

    def _items(self) -> tuple[Item, ...]:
        items: list[Item] = []
        for stream in self.streams:
            base, dtypes = f"/streams/{stream.name}", self.pilot.dtypes
            rows, width = len(self.rows[stream.name]), stream.d_model
            for part in stream.parts:
                items.append(Item(f"{base}/embed/{part.label}", None, width, dtypes[f"{stream.name}/embed"]))
            items.append(Item(f"{base}/write", rows, width, dtypes[f"{stream.name}/write"]))
            if not self.choice.compact:
                items.append(Item(f"{base}/read", rows, width, dtypes[f"{stream.name}/read"]))
            items.append(Item(f"{base}/final", None, width, dtypes[f"{stream.name}/final"]))
            if stream.norms:
                kinds = (dtypes[f"{stream.name}/{kind}"] for kind in ("embed", "write", "read", "final"))
                kept = widest((torch.float32, *kinds))
                items += [Item(f"{base}/norm/{name}", len(stream.norms), None, kept) for name in ("mean", "rstd")]
            items += self._mixes(stream)
        if self.has_output:
            k = self.choice.top_k
            items.append(Item("/output/lse", None, None, torch.float32))
            items.append(Item("/output/target_logit", None, None, torch.float32))
            items.append(Item("/output/topk_id", None, k, torch.int32))
            items.append(Item("/output/topk_logit", None, k, torch.float32))
        return tuple(items)

    def _mixes(self, stream: Stream) -> list[Item]:
        if not self.choice.heads:
            return []
        widths = self.pilot.mix_widths[stream.name]
        dtype = self.pilot.dtypes.get(f"{stream.name}/value_mix", torch.float32)
        return [
            Item(f"/streams/{stream.name}/value_mix/{s.label}", None, widths[s.index], dtype)
            for s in self.rows[stream.name]
            if s.index in widths
        ]

    def static(self, parameters: Mapping[str, torch.Tensor]) -> dict[str, NDArray[Any] | torch.Tensor]:
        """Return the constant datasets: the rows' tokens, the table of sublayers, the norms' own parameters."""
        result: dict[str, NDArray[Any] | torch.Tensor] = {
            "/tokens/id": self.feed.ids[self.keep],
            "/tokens/doc": self.feed.doc[self.keep],
            "/tokens/position": self.feed.position[self.keep],
        }
        for stream in self.streams:
            result[f"/streams/{stream.name}/sublayers"] = sublayer_table(self.rows[stream.name])
            for name in _constants(stream):
                result[f"/streams/{stream.name}/constants/{name}"] = parameters[name]
        return result

    def group_attrs(self) -> dict[str, dict[str, str]]:
        """Return which sublayers each stream's rows are, and in which dtype the model itself has each tensor."""
        return {
            f"/streams/{stream.name}": {
                "stored": json.dumps([s.index for s in self.rows[stream.name]]),
                "dtype": dtype_name(self.pilot.dtypes[f"{stream.name}/write"]),
                "own_dtypes": json.dumps(
                    {k: [dtype_name(d) for d in found] for k, found in self.pilot.own_dtypes[stream.name].items()}
                ),
            }
            for stream in self.streams
        }


def sublayer_table(rows: Sequence[Sublayer]) -> NDArray[Any]:
    """Return the table of stored sublayers: index, layer, kind, label, module path."""
    width = max(len(s.module) for s in rows) + 1
    kind = np.dtype([("index", "<i4"), ("layer", "<i4"), ("kind", "S16"), ("label", "S32"), ("module", f"S{width}")])
    return np.array([(s.index, s.layer, s.kind.encode(), s.label.encode(), s.module.encode()) for s in rows], kind)


def _constants(stream: Stream) -> tuple[str, ...]:
    used = dict.fromkeys(parameter_names(stream))
    for norm in stream.norms:
        used.update(dict.fromkeys(n for n in (norm.weight, norm.bias) if n is not None))
    return tuple(used)
