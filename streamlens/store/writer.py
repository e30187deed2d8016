"""The writer of a capture file: laid out whole before the first number, filled block by block, renamed when complete.

h5py only describes the file, once. From then on every byte goes by `DirectFile` to a known place, and a block
counts from the moment its one-byte done flag is written, after everything else of it. So a process that is killed
leaves nothing, or a ``NAME.h5.partial`` that opens and whose flags tell the truth, or the finished file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from torch import Tensor

from streamlens.errors import FormatError, IntegrityError, StorageError, StreamlensError, UsageError
from streamlens.store.creation import Attributes, Static, boot_id, create_file
from streamlens.store.direct import DirectFile, byte_view
from streamlens.store.hdf5 import open_description
from streamlens.store.integrity import Recorded, damage, read_recorded
from streamlens.store.layout import PARTIAL_SUFFIX, PROOF_COLUMNS, Item, Layout, seal
from streamlens.store.lock import WriterLock


class CaptureWriter:
    """Writes one capture file; made by `open`, used as a context manager.

        with CaptureWriter.open("run.h5", items=..., n_tokens=..., blocks=..., ...) as writer:
            for block in np.flatnonzero(~writer.done):
                writer.put("/streams/main/write", 0, block, tensor)     # for every item and row
                writer.commit(block, exact=True, worst=0.0, where=0)
            writer.finish()

    Leaving the body early, by an exception or a kill, keeps what was committed in ``run.h5.partial``; opening the same
    path with the same identity goes on from there. All methods but `done` belong to one thread at a time.
    """

    def __init__(self, path: Path, layout: Layout, recorded: Recorded, lock: WriterLock, *, overwrite: bool) -> None:
        """Use `open`."""
        self.path = path
        self.layout = layout
        self._extents = recorded.extents
        self._lock = lock
        self._overwrite = overwrite
        self._done: npt.NDArray[np.bool_] = recorded.proof["done"] == 1
        self._complete = False
        self._file: DirectFile | None = None
        self._pending: dict[int, tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]] = {}

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        items: Sequence[Item],
        n_tokens: int,
        blocks: Sequence[tuple[int, int]],
        attrs: Attributes,
        static: Mapping[str, Static],
        identity: Mapping[str, Any],
        group_attrs: Mapping[str, Attributes] | None = None,
        overwrite: bool = False,
    ) -> CaptureWriter:
        """Lay the file out, or go on with one that was begun under the same identity.

        Args:
            path: the finished file's name; until then ``PATH.partial`` stands beside it.
            items: the datasets to fill, each (rows?, token, width?).
            n_tokens: length of the token axis.
            blocks: (start, stop) of each block of tokens, in order, covering all of them.
            attrs: attributes of the file.
            static: constant datasets by full path, written at once.
            identity: JSON of what has to be equal for one run to go on with another's file.
            group_attrs: attributes of groups or datasets, by full path.
            overwrite: replace a capture of another identity. A finished file stays until the new one is finished, and
                a run that was begun with the same identity is still resumed.

        Returns:
            A writer. Where the finished file is there already, with this identity, its `complete` is True.

        Raises:
            UsageError: the path is taken by something else; the message says which keys differ.
            StorageError: not enough room, no such folder or no right to write there, or another process is writing.
        """
        path, layout = Path(path), Layout(tuple(items), n_tokens, tuple((int(a), int(b)) for a, b in blocks))
        wanted = json.loads(json.dumps({**identity, "layout": layout.signature()}))
        partial = path.with_name(path.name + PARTIAL_SUFFIX)
        lock = _claim(path)
        try:
            finished = _found(path, wanted, replace=overwrite)
            if finished and not overwrite:
                writer = cls(path, layout, finished, lock, overwrite=False)
                writer._complete = writer._require_all(partial.name)
                return writer
            begun = _found(partial, wanted, replace=overwrite)
            if begun is None:
                create_file(
                    partial, layout, attrs=attrs, group_attrs=group_attrs or {}, static=static, identity=wanted
                )  # fmt: skip
                begun = _read(partial)
            writer = cls(path, layout, begun, lock, overwrite=overwrite)
            writer._file = DirectFile(partial)
            writer._distrust(begun, writer._file.fd)
            return writer
        except OSError as error:
            lock.release()
            if isinstance(error, StreamlensError):
                raise
            raise _cannot_write(path, error) from error
        except BaseException:
            lock.release()
            raise

    @property
    def done(self) -> npt.NDArray[np.bool_]:
        """(block,) which blocks are committed."""
        return self._done.copy()

    @property
    def complete(self) -> bool:
        """True when the finished file is there: nothing is left to do."""
        return self._complete

    def offset(self, name: str, row: int | None, block: int) -> int:
        """Return where in the file one row of one item begins for one block.

        `put` is fastest with a tensor whose address is congruent to this modulo `streamlens.store.direct.PAGE`.
        """
        return self._extents[name].offset + self.layout.span(self.layout.columns[name, row], block)[1]

    def put(self, name: str, row: int | None, block: int, tensor: Tensor) -> None:
        """Write one row of one item for one block.

        Args:
            name: the item.
            row: which row of its leading axis; None when it has none.
            block: which block.
            tensor: (token, width?) contiguous, on the CPU, of the item's dtype.

        Raises:
            UsageError: a tensor that does not fit, a block that is committed already, or a closed writer.
            StorageError: the disk refused; the same command resumes.
        """
        item = self.layout.item(name, row)
        self._open_block(block)
        start, stop = self.layout.blocks[block]
        wanted = item.part_shape(stop - start)
        if tensor.dtype != item.dtype or tuple(tensor.shape) != wanted or tensor.is_cuda or not tensor.is_contiguous():
            raise UsageError(
                f"{name}, block {block}, takes a contiguous CPU tensor {item.dtype} {list(wanted)}, "
                f"not {tensor.device} {tensor.dtype} {list(tensor.shape)}"
            )
        column, data = self.layout.columns[name, row], byte_view(tensor.detach())
        self._write(name, self.layout.span(column, block)[1], data)
        hashes, seen = self._pending.setdefault(block, self._blank())
        hashes[column], seen[column] = xxhash.xxh3_64_intdigest(data), True

    def commit(self, block: int, *, exact: bool, worst: float, where: int) -> None:
        """Declare a block whole: write its hashes and the outcome of its proof, then its done flag.

        Args:
            block: which block.
            exact: whether its states were replayed bit for bit.
            worst: the largest relative L2 error of a replayed state.
            where: the sublayer of that error.

        Raises:
            UsageError: some row of the block was never put.
            StorageError: the disk refused; the same command resumes.
        """
        self._open_block(block)
        hashes, seen = self._pending.get(block) or self._blank()
        if not seen.all():
            missing = [name for name, there in zip(self.layout.row_names, seen, strict=True) if not there]
            raise UsageError(f"block {block} cannot be committed: {len(missing)} rows are missing, first {missing[0]}")
        outcome = {"exact": exact, "worst": worst, "where": where}
        for key, value in {"hash": hashes, **outcome, "seal": seal(hashes, exact, worst, where)}.items():
            self._write_proof(key, block, value)
        # Last: until this byte is there, a resumed run does the block again.
        self._write_proof("done", block, True)
        self._pending.pop(block, None)
        self._done[block] = True

    def finish(self) -> Path:
        """Make the file permanent, give it its name, and return that.

        Raises:
            UsageError: blocks are missing.
            StorageError: the disk refused, or something else has taken the name.
        """
        if self._complete:
            return self.path
        if not self._done.all():
            missing = np.flatnonzero(~self._done)
            raise UsageError(f"{self.path} is not complete: {len(missing)} blocks are missing, first {missing[0]}")
        file = self._opened()
        if self.path.exists() and not self._overwrite:
            raise StorageError(
                f"{self.path} has appeared meanwhile: move it away, and the same command ends the capture"
            )
        try:
            file.sync()
            self.path.with_name(self.path.name + PARTIAL_SUFFIX).replace(self.path)
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise self._stopped(error) from error
        self._complete = True
        self.close()
        return self.path

    def close(self) -> None:
        """Let go of the file; what is committed stays, to be resumed. A second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._lock.release()

    def __enter__(self) -> CaptureWriter:
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _blank(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
        n = len(self.layout.columns)
        return np.zeros(n, np.uint64), np.zeros(n, np.bool_)

    def _opened(self) -> DirectFile:
        if self._file is None:
            raise UsageError(f"{self.path}: this writer is closed")
        return self._file

    def _open_block(self, block: int) -> None:
        self._opened()
        if not 0 <= block < len(self._done) or self._done[block]:
            raise UsageError(f"{self.path}: block {block} is done already, or is none of {len(self._done)} blocks")

    def _write_proof(self, key: str, block: int, value: Any) -> None:
        data = np.atleast_1d(np.asarray(value)).astype(PROOF_COLUMNS[key])
        self._write(f"/proof/{key}", block * data.nbytes, data.view(np.uint8).data)

    def _write(self, name: str, first: int, data: memoryview) -> None:
        try:
            self._opened().write(data, self._extents[name].offset + first)
        except OSError as error:
            raise self._stopped(error) from error

    def _stopped(self, error: OSError) -> StorageError:
        return StorageError(
            f"writing {self.path} stopped: {error.strerror}. {int(self._done.sum())} of {len(self._done)} blocks are "
            f"kept; free some space or mend the disk, and the same command resumes"
        )

    def _require_all(self, partial: str) -> bool:
        if not self._done.all():
            raise UsageError(f"{self.path} lacks blocks although it has a finished name; rename it to {partial}")
        return True

    def _distrust(self, begun: Recorded, fd: int) -> None:
        """After a restart of the machine, take back the done flags of blocks whose bytes did not reach the disk.

        A killed process loses nothing that it wrote; a power cut may lose any page, the flags' own page last of all.
        """
        if begun.boot and begun.boot == boot_id():
            return
        for block in np.flatnonzero(self._done):
            if any(damage(fd, begun, int(block))):
                self._write_proof("done", int(block), False)
                self._done[block] = False


def _claim(path: Path) -> WriterLock:
    if path.is_dir():
        raise StorageError(f"{path} is a folder; --out takes the name of a file, such as {path / 'capture.h5'}")
    if not path.parent.is_dir():
        raise StorageError(f"{path.parent} is not a folder; make it first, or choose another --out")
    try:
        return WriterLock(path)
    except StorageError:
        raise
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> StorageError:
    return StorageError(f"{path} cannot be written: {error.strerror or error}; choose another --out")


def _read(path: Path) -> Recorded:
    with open_description(path) as file:
        return read_recorded(file)


def _found(path: Path, wanted: Mapping[str, Any], *, replace: bool) -> Recorded | None:
    """Return what lies at `path` when it has the identity that is `wanted`, None when it may be written anew."""
    if not os.path.lexists(path):
        return None
    try:
        recorded = _read(path)
    except (FormatError, IntegrityError) as error:
        raise UsageError(
            f"{path} is in the way and is not a capture to go on with ({error}); remove it first"
        ) from error
    changes = [f"  {key}: {old} in the file, {new} now" for key, old, new in differences(recorded.identity, wanted)]
    if not changes:
        return recorded
    if replace:
        return None
    raise UsageError(
        "\n".join([f"{path} is another capture:", *changes[:8], "use --overwrite to replace it, or another --out"])
    )


def differences(old: Any, new: Any, key: str = "") -> list[tuple[str, str, str]]:
    """Return (dotted key, old value, new value) for each leaf in which two JSON values differ.

    >>> differences({"model": {"sha256": "ab"}, "window": 8}, {"model": {"sha256": "cd"}, "window": 8})
    [('model.sha256', '"ab"', '"cd"')]
    """
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(k for k in new if k not in old)]
        parts = [differences(old.get(k, "nothing"), new.get(k, "nothing"), f"{key}.{k}".lstrip(".")) for k in keys]
        return [leaf for part in parts for leaf in part]
    return [] if old == new else [(key, _shown(old), _shown(new))]


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
