"""One residual stream of a capture: its writes, reads and states by name, whole or block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from streamlens.anatomy import Stream
from streamlens.block import Block, LazyRows, LazyTable, NormStatistics
from streamlens.errors import MissingDataError
from streamlens.reader.mapped import MappedFile
from streamlens.replay import replay_states, widest

Key = str | int | slice
"""How to name sublayers: a label such as ``3_attn_out``, an index, or a slice of indices."""

OwnDtypes = Mapping[str, Sequence[torch.dtype]]
"""The model's own dtypes of the parts (``embed``), of the writes (``write``) and of the states (``state``)."""


class StreamView:
    """The stored tensors of one stream. Each is a mapped view unless it says that it is computed.

    A narrowed capture (``--layers``, ``--kinds``) holds the sublayers in `stored` alone; asking for another raises
    `MissingDataError`. In a compact capture reads and states are computed by exact replay, block by block.

    A model may mix dtypes. One tensor comes in the model's own dtype, several in one that holds each without loss; a
    tensor that is stored in a wider dtype than its own is copied.
    """

    def __init__(
        self,
        file: MappedFile,
        anatomy: Stream,
        stored: Sequence[int],
        blocks: Sequence[tuple[int, int]],
        own_dtypes: OwnDtypes,
    ) -> None:
        """Use `Capture.stream`."""
        self._own_dtypes = own_dtypes
        self.anatomy = anatomy
        self.stored = tuple(stored)
        self._file = file
        self._base = f"/streams/{anatomy.name}"
        self._row = {index: row for row, index in enumerate(self.stored)}
        self._blocks = tuple(blocks)
        self._mixed = [i for i in self.stored if f"{self._base}/value_mix/{anatomy.sublayers[i].label}" in file]
        self._reader = {anatomy.sublayers[i].read: row for i, row in self._row.items()}

    def __repr__(self) -> str:
        """Return one line: name, sizes and what is stored."""
        stream, held = self.anatomy, len(self.stored)
        some = "" if held == len(stream.sublayers) else f" ({held} stored)"
        return (
            f"<stream {self.name!r}: {len(stream.sublayers)} sublayers{some}, d_model {stream.d_model}, {self.dtype}>"
        )

    @property
    def name(self) -> str:
        """The stream's name: main, encoder or decoder."""
        return self.anatomy.name

    @property
    def dtype(self) -> torch.dtype:
        """The type of the writes."""
        return self.writes.dtype

    @property
    def state_dtype(self) -> torch.dtype:
        """The narrowest type that holds every state."""
        return widest(self._own_dtypes.get("state", [self.final.dtype]))

    @property
    def labels(self) -> tuple[str, ...]:
        """(stored sublayer,) the names of the rows of `writes` and `reads`."""
        return tuple(self.anatomy.sublayers[i].label for i in self.stored)

    @property
    def compact(self) -> bool:
        """Whether reads are computed by replay instead of stored."""
        return f"{self._base}/read" not in self._file

    @property
    def writes(self) -> Tensor:
        """(stored sublayer, token, d_model) what each sublayer adds."""
        return self._file.view(f"{self._base}/write")

    @property
    def reads(self) -> Tensor:
        """(stored sublayer, token, d_model) the state that each sublayer reads; computed in a compact capture."""
        if self.compact:
            return self._replayed([self.anatomy.sublayers[i].read for i in self.stored])
        return self._file.view(f"{self._base}/read")

    @property
    def final(self) -> Tensor:
        """(token, d_model) the last state."""
        return self._file.view(f"{self._base}/final")

    @property
    def norm_mean(self) -> Tensor:
        """(norm, token) mean that each norm on the stream subtracts, float32 (float64 of a float64 model)."""
        return self._file.view(f"{self._base}/norm/mean")

    @property
    def norm_rstd(self) -> Tensor:
        """(norm, token) factor by which each norm on the stream scales, float32 (float64 of a float64 model)."""
        return self._file.view(f"{self._base}/norm/rstd")

    @property
    def constants(self) -> Mapping[str, Tensor]:
        """The model's own parameters that replay needs, by name."""
        return self._file.under(f"{self._base}/constants/")

    def write(self, key: Key) -> Tensor:
        """Return what sublayers write.

        Args:
            key: a label or index, for (token, d_model); a slice of indices, for (sublayer, token, d_model).

        Raises:
            MissingDataError: no such sublayer, or it is not stored.
        """
        rows = self._rows(key)
        found = _pick(self.writes, rows)
        return self._own("write", self.stored[rows], found) if isinstance(rows, int) else found

    def read(self, key: Key) -> Tensor:
        """Return the states that sublayers read, before their norm; like `write`. Computed in a compact capture.

        Raises:
            MissingDataError: no such sublayer, or it is not stored.
        """
        rows = self._rows(key)
        if isinstance(rows, int):
            return self.state(self.anatomy.sublayers[self.stored[rows]].read)
        if not self.compact:
            return _pick(self.reads, rows)
        return self._replayed([self.anatomy.sublayers[self.stored[row]].read for row in rows])

    def layer(self, layer: int) -> dict[str, Tensor]:
        """Return the writes of one layer by label, each (token, d_model).

        Raises:
            MissingDataError: no such layer, or not all of it is stored.
        """
        found = [s for s in self.anatomy.sublayers if s.layer == layer]
        if not found:
            raise MissingDataError(f"stream {self.name!r} has layers 0 to {self.anatomy.layers - 1}, not {layer}")
        return {s.label: self.write(s.index) for s in found}

    def embed(self, part: str | None = None) -> Tensor:
        """Return one part of the embedding, (token, d_model); without a name, the only one.

        Raises:
            MissingDataError: no such part, or several and no name.
        """
        index = self.anatomy.find_part(part)
        return self._own("embed", index, self._file.view(f"{self._base}/embed/{self.anatomy.parts[index].label}"))

    def value_mix(self, key: str | int) -> Tensor:
        """Return the heads' outputs side by side as they enter an attention's output projection, (token, width).

        Raises:
            MissingDataError: they were not stored (``--heads``), or no such sublayer.
        """
        return self._file.view(f"{self._base}/value_mix/{self.anatomy.find(key).label}")

    def state(self, key: str | int) -> Tensor:
        """Return a state, (token, d_model); computed where it is not stored.

        Args:
            key: its index, 0 to K; or ``resid_pre.3``, ``resid_mid.3``, ``resid_post.3``.

        Raises:
            MissingDataError: no such state, or it is not stored and some writes before it are not either.
        """
        index = self.anatomy.find_state(key)
        place = self._stored_state(index)
        if place is None:
            return self._own("state", index, self._replayed([index])[0])
        name, row = place
        whole = self._file.view(name)
        return self._own("state", index, whole if row is None else whole[row])

    def holds_state(self, index: int) -> bool:
        """Tell whether state x_index is stored as such, not computed from the writes."""
        return self._stored_state(index) is not None

    def blocks(self) -> Iterator[Block]:
        """Yield the stream block by block, as it was captured; memory does not grow with the number of tokens.

        Nothing is read before it is asked for: an analysis of the writes never reads a state.
        """
        for start, stop in self._blocks:
            yield self._block(start, stop)

    def _block(self, start: int, stop: int) -> Block:
        file, base = self._file, self._base
        names = [f"{base}/embed/{part.label}" for part in self.anatomy.parts]
        parts = LazyRows(len(names), lambda i: self._own("embed", i, file.part(names[i], None, start, stop)))

        def write(index: int) -> Tensor:
            return self._own("write", index, file.part(f"{base}/write", self._held(index), start, stop))

        writes = LazyRows(len(self.anatomy.sublayers), write)
        replayed: list[Tensor] = []

        def state(index: int) -> Tensor:
            place = self._stored_state(index)
            if place is not None:
                return self._own("state", index, file.part(*place, start, stop))
            if not replayed:
                replayed.extend(self._replay(parts, writes))
            return replayed[index]

        ids, doc, position = (file.part(f"/tokens/{name}", None, start, stop) for name in ("id", "doc", "position"))
        states = LazyRows(len(self.anatomy.steps) + 1, state)

        def norm(index: int) -> NormStatistics:
            mean, rstd = (file.part(f"{base}/norm/{name}", index, start, stop) for name in ("mean", "rstd"))
            return mean, rstd

        def mix(index: int) -> Tensor:
            return file.part(f"{base}/value_mix/{self.anatomy.sublayers[index].label}", None, start, stop)

        norms, mixes = LazyRows(len(self.anatomy.norms), norm), LazyTable(self._mixed, mix)
        return Block(start, stop, ids, doc, position, parts, states, writes, norms, mixes)

    def _own(self, kind: str, index: int, tensor: Tensor) -> Tensor:
        """Return a tensor in the model's own dtype: what is replayed or run from another one rounds otherwise."""
        dtypes = self._own_dtypes.get(kind)
        return tensor if dtypes is None else tensor.to(dtypes[index])

    def _replay(self, parts: Sequence[Tensor], writes: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            # Fetched here, so that a narrowed capture says what it lacks before anything is computed.
            return replay_states(self.anatomy, list(parts), list(writes), self.constants)

    def _replayed(self, states: Sequence[int]) -> Tensor:
        """Return (state, token, d_model), rebuilt block by block, in the dtype in which reads are stored or wider."""
        found = torch.zeros(0)
        for block in self.blocks():
            rebuilt = self._replay(block.parts, block.writes)
            if not found.numel():
                n_tokens = self.final.shape[0]
                dtype = widest(rebuilt[k].dtype for k in [*states, *(s.read for s in self.anatomy.sublayers)])
                found = torch.zeros(len(states), n_tokens, self.anatomy.d_model, dtype=dtype)
            for row, index in enumerate(states):
                found[row, block.start : block.stop] = rebuilt[index]
        return found

    def _stored_state(self, index: int) -> tuple[str, int | None] | None:
        """Return the dataset and row that hold a state, or None where it has to be computed."""
        if index == len(self.anatomy.steps):
            return f"{self._base}/final", None
        if not self.compact and index in self._reader:
            return f"{self._base}/read", self._reader[index]
        return None

    def _held(self, index: int) -> int:
        """Return the row that holds a sublayer."""
        if index not in self._row:
            label = self.anatomy.sublayers[index].label
            raise MissingDataError(
                f"{self._file.path} was narrowed and does not hold {label!r}; it holds {', '.join(self.labels)}"
            )
        return self._row[index]

    def _rows(self, key: Key) -> int | list[int]:
        if isinstance(key, slice):
            return [self._held(s.index) for s in self.anatomy.sublayers[key]]
        return self._held(self.anatomy.find(key).index)


def _pick(whole: Tensor, rows: int | list[int]) -> Tensor:
    """Return rows of a mapped tensor, still mapped unless they are not evenly spaced."""
    if isinstance(rows, int):
        return whole[rows]
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    if step > 0 and rows == list(range(rows[0] if rows else 0, (rows[-1] if rows else -1) + 1, step)):
        return whole[rows[0] : rows[-1] + 1 : step] if rows else whole[:0]
    return whole[rows]
