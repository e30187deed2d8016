"""Opening a capture: nothing but its description is read until a tensor is looked at."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from streamlens.anatomy import Anatomy, Stream
from streamlens.block import Block
from streamlens.errors import FormatError, MissingDataError, UsageError
from streamlens.reader.mapped import MappedFile
from streamlens.reader.stream import Key, OwnDtypes, StreamView
from streamlens.replay import dtype_named
from streamlens.store.hdf5 import open_description
from streamlens.store.integrity import Recorded, read_recorded
from streamlens.store.layout import PARTIAL_SUFFIX
from streamlens.wording import human_bytes

if TYPE_CHECKING:
    import xarray


@dataclass(frozen=True)
class Tokens:
    """What was fed to the model; each (token,)."""

    id: Tensor
    """int64 vocabulary index."""
    doc: Tensor
    """int32 number of the document or window."""
    position: Tensor
    """int32 place within it."""

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.id)


@dataclass(frozen=True)
class Proof:
    """Whether the writes, added up as the model adds them, gave the model's own states."""

    blocks: int
    """Number of blocks in the file."""
    done: int
    """How many of them are captured; all, unless the capture is under way."""
    exact_blocks: int
    """How many were equal bit for bit."""
    worst: float
    """Largest relative L2 error of a state."""
    where: int | None
    """The state with that error; None when all are exact."""
    worst_block: int | None
    """The block with that error; None when all are exact."""

    @property
    def exact(self) -> bool:
        """Whether every block is there and equal bit for bit."""
        return self.exact_blocks == self.blocks

    def __str__(self) -> str:
        """Return the verdict in one line."""
        missing = "" if self.done == self.blocks else f"; {self.blocks - self.done} of {self.blocks} blocks are missing"
        if self.exact_blocks == self.done:
            return f"all blocks add up bit for bit ({self.done}){missing}"
        return (
            f"{self.exact_blocks} of {self.done} blocks add up bit for bit; worst relative error {self.worst:.1e} at "
            f"state {self.where}, block {self.worst_block}{missing}"
        )


class Capture:
    """A capture file: tokens, streams and the proof; see `StreamView` for what a stream offers.

    Where a capture has one stream, or the head reads one of several, the stream's own methods work here as well:
    ``capture.write("3_mlp_out")`` is ``capture.stream().write("3_mlp_out")``.
    """

    def __init__(
        self,
        path: Path,
        recorded: Recorded,
        attrs: Mapping[str, Any],
        anatomy: Anatomy,
        stored: Mapping[str, Sequence[int]],
        own_dtypes: Mapping[str, OwnDtypes],
    ) -> None:
        """Use `open_capture`."""
        self.path = path
        self.folder = path.absolute().parent  # stays right when the working directory changes
        self.attrs = attrs
        self.anatomy = anatomy
        self._recorded = recorded
        self._file = MappedFile(path, recorded.extents)
        blocks = [b for b, done in zip(recorded.layout.blocks, recorded.proof["done"], strict=True) if done == 1]
        self.streams: dict[str, StreamView] = {
            name: StreamView(self._file, anatomy.stream(name), rows, blocks, own_dtypes[name])
            for name, rows in stored.items()
        }

    @property
    def complete(self) -> bool:
        """False for a capture under way, whose missing tokens read as zeros."""
        return self.proof.done == self.proof.blocks

    @property
    def n_tokens(self) -> int:
        """Number of tokens."""
        return self._recorded.layout.n_tokens

    @property
    def n_bytes(self) -> int:
        """Size of all datasets."""
        return sum(found.n_bytes for found in self._recorded.extents.values())

    @property
    def tokens(self) -> Tokens:
        """What was fed to the model."""
        return Tokens(*(self._file.view(f"/tokens/{name}") for name in ("id", "doc", "position")))

    @property
    def output(self) -> Mapping[str, Tensor]:
        """The summary of the logits: lse and target_logit (token,), topk_id and topk_logit (token, k); may be empty."""
        return self._file.under("/output/")

    @property
    def proof(self) -> Proof:
        """The outcome of the proof that ran with the capture."""
        columns = self._recorded.proof
        done = columns["done"] == 1
        exact = done & (columns["exact"] == 1)
        # NaN, from a state that is not finite, counts as the worst there is.
        errors = np.where(done, np.nan_to_num(columns["worst"], nan=np.inf), -1.0)
        block = None if (exact == done).all() else int(errors.argmax())
        worst = 0.0 if block is None else float(columns["worst"][block])
        where = None if block is None else int(columns["where"][block])
        return Proof(len(done), int(done.sum()), int(exact.sum()), worst, where, block)

    def stream(self, name: str | None = None) -> StreamView:
        """Return a stream by name; without one, the stream that the head reads, or the only one stored.

        Raises:
            MissingDataError: it is not in this file.
        """
        wanted = name or self.anatomy.head.stream
        if name is None and len(self.streams) == 1:
            (wanted,) = self.streams
        if wanted not in self.streams:
            raise MissingDataError(f"{self.path} holds the streams {', '.join(self.streams)}, not {wanted!r}")
        return self.streams[wanted]

    @property
    def writes(self) -> Tensor:
        """See `StreamView.writes`."""
        return self.stream().writes

    @property
    def reads(self) -> Tensor:
        """See `StreamView.reads`."""
        return self.stream().reads

    @property
    def final(self) -> Tensor:
        """See `StreamView.final`."""
        return self.stream().final

    def write(self, key: Key) -> Tensor:
        """See `StreamView.write`."""
        return self.stream().write(key)

    def read(self, key: Key) -> Tensor:
        """See `StreamView.read`."""
        return self.stream().read(key)

    def layer(self, layer: int) -> dict[str, Tensor]:
        """See `StreamView.layer`."""
        return self.stream().layer(layer)

    def embed(self, part: str | None = None) -> Tensor:
        """See `StreamView.embed`."""
        return self.stream().embed(part)

    def state(self, key: str | int) -> Tensor:
        """See `StreamView.state`."""
        return self.stream().state(key)

    def blocks(self) -> Iterator[Block]:
        """See `StreamView.blocks`."""
        return self.stream().blocks()

    def to_xarray(self, stream: str | None = None) -> xarray.Dataset:
        """Return one stream as an `xarray.Dataset` with named axes; see `streamlens.reader.labelled`.

        Raises:
            UsageError: xarray is not installed.
        """
        from streamlens.reader.labelled import to_xarray

        return to_xarray(self, self.stream(stream))

    def close(self) -> None:
        """Close the file; tensors taken from it stay valid. A second call does nothing."""
        self._file.close()

    def __enter__(self) -> Capture:
        """Return the capture."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def __repr__(self) -> str:
        """Return a few lines: size, streams, proof."""
        head = f"<Capture {str(self.path)!r}: {self.n_tokens} tokens, {human_bytes(self.n_bytes)}"
        return "\n  ".join([head, *map(repr, self.streams.values()), f"proof: {self.proof}>"])

    def _repr_html_(self) -> str:
        from streamlens.reader.page import to_html

        return to_html(self)


def open_capture(path: str | Path, *, allow_partial: bool = False) -> Capture:
    """Open a capture for reading. Tensors are mapped, not read: opening a terabyte costs nothing.

    Args:
        path: the ``.h5`` file.
        allow_partial: also open a capture under way; tokens that are not captured yet read as zeros.

    Raises:
        UsageError: there is no such file.
        FormatError: not a capture, of a newer version, or not finished.
        IntegrityError: truncated or damaged.
        UnsafeFileError: it reaches outside itself.
    """
    path = Path(path)
    _check_path(path, allow_partial)
    with open_description(path) as file:
        recorded = read_recorded(file)
        attrs = {key: value.item() if isinstance(value, np.generic) else value for key, value in file.attrs.items()}
        groups = file.get("streams", {})
        texts = {str(name): str(groups[name].attrs["stored"]) for name in groups}
        kinds = {str(name): groups[name].attrs.get("own_dtypes") for name in groups}
    if "anatomy" not in attrs or not texts:
        raise FormatError(f"{path} is a capture file without a stream; it was not written by `streamlens capture`")
    if not allow_partial and not (recorded.proof["done"] == 1).all():
        raise FormatError(f"{path} lacks blocks although it has a finished name; rename it to {path}{PARTIAL_SUFFIX}")
    anatomy = Anatomy.from_json(str(attrs["anatomy"]))
    stored = {name: _stored_rows(path, anatomy, name, text, recorded) for name, text in texts.items()}
    own_dtypes = {name: _own_dtypes(path, anatomy.stream(name), text) for name, text in kinds.items()}
    return Capture(path, recorded, attrs, anatomy, stored, own_dtypes)


def _stored_rows(path: Path, anatomy: Anatomy, name: str, text: str, recorded: Recorded) -> list[int]:
    """Return which sublayers the rows of a stream are, made sure against its anatomy and its dataset."""
    try:
        rows = [int(index) for index in json.loads(text)]
        sublayers, writes = anatomy.stream(name).sublayers, recorded.extents[f"/streams/{name}/write"]
        if len(rows) == writes.shape[0] and sorted(set(rows) & set(range(len(sublayers)))) == rows:
            return rows
    except (ValueError, TypeError, KeyError):
        pass  # told below, like rows that do not fit
    raise FormatError(
        f"{path}: the attribute `stored` of stream {name!r} does not fit its writes: the file was altered"
    )


def _own_dtypes(path: Path, stream: Stream, text: object) -> OwnDtypes:
    """Return the model's own dtype of each embedding part, write and state; nothing for a file that does not tell."""
    if text is None:
        return {}
    counts = {"embed": len(stream.parts), "write": len(stream.sublayers), "state": len(stream.states)}
    try:
        found = {kind: tuple(dtype_named(name) for name in names) for kind, names in json.loads(str(text)).items()}
        floating = all(dtype.is_floating_point for dtypes in found.values() for dtype in dtypes)
        if floating and {kind: len(dtypes) for kind, dtypes in found.items()} == counts:
            return found
    except (ValueError, TypeError, AttributeError, FormatError):
        pass  # told below, like dtypes that do not fit
    raise FormatError(
        f"{path}: the attribute `own_dtypes` of stream {stream.name!r} does not fit its anatomy: the file was altered"
    )


def _check_path(path: Path, allow_partial: bool) -> None:
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give a .h5 file in it")
    if not path.exists():
        partial = path.with_name(path.name + PARTIAL_SUFFIX)
        hint = f", but {partial.name} is: run the same capture command again to finish it" if partial.exists() else ""
        raise UsageError(f"{path} is not there{hint}")
    if path.suffix == PARTIAL_SUFFIX and not allow_partial:
        raise FormatError(
            f"{path} is not finished: run the same capture command again to finish it, or open it as it is with "
            f"allow_partial=True"
        )
