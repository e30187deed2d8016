"""From the device to the file without holding up the model: a few reusable slots and one thread that writes.

The caller copies a tensor into a free slot and goes on; the writer thread puts the slot's bytes into the file and frees
the slot. When all slots are in use the caller waits, so memory never grows. On CUDA the copy itself is left to a side
stream into pinned memory, and the thread waits for it before it touches the slot.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType

import torch
from torch import Tensor

from streamlens.errors import UsageError
from streamlens.store.direct import PAGE
from streamlens.store.writer import CaptureWriter
from streamlens.wording import human_bytes


class SlotPool:
    """A fixed number of equal buffers of bytes; `take` waits for a free one, or raises what made waiting pointless."""

    def __init__(self, slots: int, slot_bytes: int, *, pinned: bool = False) -> None:
        """Allocate all slots at once, each with its first byte at the start of a page."""
        room = slot_bytes + PAGE
        whole = [torch.empty(room, dtype=torch.uint8, pin_memory=pinned) for _ in range(slots)]
        self._free = [t[-t.data_ptr() % PAGE :][:slot_bytes] for t in whole]
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self.size = slots
        self.slot_bytes = slot_bytes

    @property
    def free(self) -> int:
        """Number of slots that nobody holds."""
        with self._changed:
            return len(self._free)

    def take(self) -> Tensor:
        """Return a free slot, (slot_bytes,) uint8, waiting for one if need be.

        Raises:
            BaseException: whatever `fail` was given.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._error)
            if self._error is not None:
                raise self._error
            return self._free.pop()

    def give(self, slot: Tensor) -> None:
        """Return a slot that `take` gave."""
        with self._changed:
            self._free.append(slot)
            self._changed.notify()

    def fail(self, error: BaseException) -> None:
        """Make every `take` and `check`, also one that waits now, raise `error`. The first error stays."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def check(self) -> None:
        """Raise what `fail` was given, if anything."""
        with self._changed:
            if self._error is not None:
                raise self._error


@dataclass(frozen=True)
class _Row:
    name: str
    row: int | None
    block: int
    slot: Tensor
    data: Tensor
    """The used part of the slot, with the item's dtype and shape."""
    copied: torch.cuda.Event | None
    """Recorded after the copy into the slot; None when the copy is over already."""


@dataclass(frozen=True)
class _Commit:
    block: int
    exact: bool
    worst: float
    where: int


class Transfer:
    """Sends tensors to a `CaptureWriter` through slots and a thread of its own, in the order of the calls.

        with Transfer(writer, slot_bytes=..., device="cuda") as transfer:
            transfer.send("/streams/main/write", 0, block, tensor)
            transfer.commit(block, exact=True, worst=0.0, where=0)

    An error in the thread is raised by the next call here, or by the one that is waiting. Leaving the body by an
    exception drops what is still queued; otherwise all of it is written first.
    """

    def __init__(
        self, writer: CaptureWriter, *, slot_bytes: int, slots: int = 3, device: torch.device | str = "cpu"
    ) -> None:
        """Allocate the slots and start the thread.

        Args:
            writer: where everything goes; nobody else may use it until `close`.
            slot_bytes: the largest tensor that will be sent, in the dtype of its item.
            slots: how many tensors may be under way at once.
            device: where the tensors live; on CUDA the slots are pinned.

        Raises:
            UsageError: fewer than one slot.
        """
        if slots < 1 or slot_bytes < 1:
            raise UsageError(f"a transfer needs at least one slot of one byte, not {slots} of {slot_bytes}")
        self._writer = writer
        self._slot_bytes = slot_bytes
        # A page more, so that a tensor can lie in its slot as it will lie in the pages of the file.
        self._pool = SlotPool(slots, slot_bytes + PAGE, pinned=torch.device(device).type == "cuda")
        self._side: dict[torch.device, torch.cuda.Stream] = {}
        self._queue: SimpleQueue[_Row | _Commit | None] = SimpleQueue()
        self._aborted = threading.Event()
        self._thread = threading.Thread(target=self._work, name="streamlens-writer", daemon=True)
        self._thread.start()

    @property
    def free_slots(self) -> int:
        """Number of slots that are neither being filled nor waiting to be written."""
        return self._pool.free

    def send(self, name: str, row: int | None, block: int, tensor: Tensor) -> None:
        """Copy a tensor, cast to the item's dtype, and queue it; the caller may change the tensor afterwards.

        Args:
            name: the item, see `CaptureWriter.put`.
            row: which row of its leading axis; None when it has none.
            block: which block.
            tensor: (token, width?) of any strides, on any device.

        Raises:
            UsageError: a tensor of another shape, or larger than a slot.
            StorageError: the thread could not write an earlier one.
        """
        item = self._writer.layout.item(name, row)
        start, stop = self._writer.layout.blocks[block]
        wanted = item.part_shape(stop - start)
        size = tensor.numel() * item.dtype.itemsize
        if tuple(tensor.shape) != wanted:
            raise UsageError(f"{name}, block {block}, takes {list(wanted)}, not {list(tensor.shape)}")
        if size > self._slot_bytes:
            room = human_bytes(self._slot_bytes)
            raise UsageError(f"{name}, block {block}: {human_bytes(size)} do not fit a slot of {room}")
        slot, phase = self._pool.take(), self._writer.offset(name, row, block) % PAGE
        try:
            with torch.no_grad():
                data = slot[phase : phase + size].view(item.dtype).view(wanted)
                copied = self._copy(data, tensor.detach())
        except BaseException:
            self._pool.give(slot)
            raise
        self._queue.put(_Row(name, row, block, slot, data, copied))

    def commit(self, block: int, *, exact: bool, worst: float, where: int) -> None:
        """Queue the commit of a block, after all that was sent before; see `CaptureWriter.commit`."""
        self._pool.check()
        self._queue.put(_Commit(block, exact, worst, where))

    def close(self) -> None:
        """Wait until all that was sent is written.

        Raises:
            StorageError: some of it could not be.
        """
        self._queue.put(None)
        self._thread.join()
        self._pool.check()

    def abort(self) -> None:
        """Drop what is still queued, and wait for the write under way."""
        self._aborted.set()
        self._queue.put(None)
        self._thread.join()

    def __enter__(self) -> Transfer:
        """Return the transfer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close after success, abort after an exception."""
        if error is None:
            self.close()
        else:
            self.abort()

    def _copy(self, data: Tensor, source: Tensor) -> torch.cuda.Event | None:
        """Fill `data` from `source`; on CUDA only begin to, and return the event that tells the end."""
        if not source.is_cuda:
            data.copy_(source)
            return None
        compute = torch.cuda.current_stream(source.device)
        if source.device not in self._side:
            self._side[source.device] = torch.cuda.Stream(source.device)  # type: ignore[no-untyped-call]  # torch's own
        side = self._side[source.device]
        ready, copied = torch.cuda.Event(), torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's own
        # A copy on the device, in the order of the computation: the model may add to this very tensor in place before
        # the slow copy off the device has read it. The cast is done here too, so that only what is stored crosses over.
        staged = source.to(data.dtype, copy=True, memory_format=torch.contiguous_format)
        ready.record(compute)
        side.wait_event(ready)
        with torch.cuda.stream(side):
            data.copy_(staged, non_blocking=True)
            copied.record(side)
        # Otherwise the allocator could give the memory of `staged` to the next operation while it is still being read.
        staged.record_stream(side)
        return copied

    def _work(self) -> None:
        while (task := self._queue.get()) is not None:
            try:
                self._do(task)
            except BaseException as error:
                self._pool.fail(error)
                # What is queued behind an error is dropped: a disk that refused once is not asked a hundred times.
                self._aborted.set()
            finally:
                if isinstance(task, _Row):
                    self._pool.give(task.slot)

    def _do(self, task: _Row | _Commit) -> None:
        if isinstance(task, _Row) and task.copied is not None:
            # Also when dropping: a slot may be filled anew only after the last copy into it is over.
            task.copied.synchronize()
        if self._aborted.is_set():
            return
        if isinstance(task, _Row):
            self._writer.put(task.name, task.row, task.block, task.data)
        else:
            self._writer.commit(task.block, exact=task.exact, worst=task.worst, where=task.where)
