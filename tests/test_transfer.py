"""Slots and the writer thread: the bytes of a direct write, bounded memory, no error that stays in the thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

from streamlens.errors import StorageError, UsageError
from streamlens.store.integrity import verify
from streamlens.store.layout import Item
from streamlens.store.transfer import SlotPool, Transfer
from streamlens.store.writer import CaptureWriter

ROWS, TOKENS, WIDTH, BLOCKS = 4, 96, 24, 6
ITEM = Item("/streams/main/write", ROWS, WIDTH, torch.float32)
HALF = Item("/streams/main/final", None, WIDTH, torch.bfloat16)
STEP = TOKENS // BLOCKS
SLOT = STEP * WIDTH * 4


def begin(path: Path) -> CaptureWriter:
    """Open a capture of two items."""
    blocks = [(start, start + STEP) for start in range(0, TOKENS, STEP)]
    return CaptureWriter.open(
        path, items=[ITEM, HALF], n_tokens=TOKENS, blocks=blocks, attrs={}, static={}, identity={}
    )


def rows(device: str = "cpu") -> Iterator[tuple[str, int | None, int, Tensor]]:
    """Yield every row of every block, with numbers that differ everywhere."""
    generator = torch.Generator().manual_seed(0)
    for block in range(BLOCKS):
        for row in range(ROWS):
            yield ITEM.name, row, block, torch.randn(STEP, WIDTH, generator=generator).to(device)
        yield HALF.name, None, block, torch.randn(STEP, WIDTH, generator=generator).to(device)


def directly(path: Path) -> bytes:
    """Write all without slots or threads, and return the file."""
    with begin(path) as writer:
        for name, row, block, tensor in rows():
            writer.put(name, row, block, tensor.to(writer.layout.item(name, row).dtype))
        for block in range(BLOCKS):
            writer.commit(block, exact=True, worst=0.0, where=0)
        return writer.finish().read_bytes()


def through(path: Path, *, device: str = "cpu", slots: int = 2) -> bytes:
    """Write all through a transfer that poisons each tensor after sending it."""
    with begin(path) as writer:
        with Transfer(writer, slot_bytes=SLOT, slots=slots, device=device) as transfer:
            for name, row, block, tensor in rows(device):
                transfer.send(name, row, block, tensor)
                tensor.fill_(float("nan"))
                if name == HALF.name:
                    transfer.commit(block, exact=True, worst=0.0, where=0)
        assert transfer.free_slots == slots
        return writer.finish().read_bytes()


class Gate:
    """Holds a writer's `put` until it is opened, or makes it fail."""

    def __init__(self, writer: CaptureWriter) -> None:
        """Wrap the writer's `put`."""
        self.opened, self.error = threading.Event(), None
        self._put = writer.put
        writer.put = self._gated  # type: ignore[method-assign]

    error: BaseException | None

    def _gated(self, name: str, row: int | None, block: int, tensor: Tensor) -> None:
        assert self.opened.wait(20)
        if self.error:
            raise self.error
        self._put(name, row, block, tensor)


@pytest.mark.parametrize("slots", [1, 2, 7])
def test_same_bytes_as_writing_directly(tmp_path: Path, slots: int) -> None:
    assert through(tmp_path / "a.h5", slots=slots) == directly(tmp_path / "b.h5")


def test_slots_are_not_reused_before_they_are_written(tmp_path: Path) -> None:
    """With a writer that lags behind, a slot given back early would hold the next tensor's bytes."""
    expected = directly(tmp_path / "b.h5")
    with begin(tmp_path / "a.h5") as writer:
        put = writer.put

        def late(name: str, row: int | None, block: int, tensor: Tensor) -> None:
            time.sleep(0.002)
            put(name, row, block, tensor)
            tensor.view(torch.uint8).fill_(0xAB)

        writer.put = late  # type: ignore[method-assign]
        with Transfer(writer, slot_bytes=SLOT, slots=3) as transfer:
            for name, row, block, tensor in rows():
                transfer.send(name, row, block, tensor)
            for block in range(BLOCKS):
                transfer.commit(block, exact=True, worst=0.0, where=0)
        assert writer.finish().read_bytes() == expected


def test_any_strides_and_grad_are_sent_as_numbers(tmp_path: Path) -> None:
    with begin(tmp_path / "a.h5") as writer, Transfer(writer, slot_bytes=SLOT) as transfer:
        wide = torch.randn(WIDTH, 2 * STEP, requires_grad=True)
        transfer.send(ITEM.name, 0, 0, wide.T[::2])
        with torch.inference_mode():
            transfer.send(ITEM.name, 1, 0, torch.ones(STEP, 1).expand(STEP, WIDTH))
        transfer.send(HALF.name, None, 0, wide.T[::2] * 3)
        transfer.close()
    with h5py.File(tmp_path / "a.h5.partial") as file:
        np.testing.assert_array_equal(file[ITEM.name][0, :STEP], wide.T[::2].detach().numpy())
        assert (file[ITEM.name][1, :STEP] == 1).all()
        expected = (wide.T[::2] * 3).bfloat16().float().detach().numpy()
        np.testing.assert_array_equal(file[HALF.name][:STEP], expected)


def test_a_full_pool_holds_the_caller_back(tmp_path: Path) -> None:
    with begin(tmp_path / "a.h5") as writer:
        gate = Gate(writer)
        sent = []
        with Transfer(writer, slot_bytes=SLOT, slots=2) as transfer:

            def send_all() -> None:
                for name, row, block, tensor in rows():
                    transfer.send(name, row, block, tensor)
                    sent.append(row)

            caller = threading.Thread(target=send_all)
            caller.start()
            time.sleep(0.1)
            assert (len(sent), transfer.free_slots) == (2, 0)
            gate.opened.set()
            caller.join(20)
        assert len(sent) == BLOCKS * (ROWS + 1)
        assert transfer.free_slots == 2


@pytest.mark.parametrize("error", [StorageError("the disk is full"), MemoryError("thread"), SystemExit(3)])
def test_an_error_in_the_thread_reaches_a_waiting_caller(tmp_path: Path, error: BaseException) -> None:
    with begin(tmp_path / "a.h5") as writer:
        gate = Gate(writer)
        gate.error = error
        threading.Timer(0.05, gate.opened.set).start()
        before = time.monotonic()
        transfer = Transfer(writer, slot_bytes=SLOT, slots=2)

        def send_all() -> None:
            with transfer:
                for name, row, block, tensor in rows():
                    transfer.send(name, row, block, tensor)

        with pytest.raises(type(error)) as caught:
            send_all()
        assert caught.value is error
        assert time.monotonic() - before < 5
        assert transfer.free_slots == 2
        assert not writer.done.any()


def test_nothing_behind_an_error_is_written(tmp_path: Path) -> None:
    with begin(tmp_path / "a.h5") as writer:
        asked: list[int] = []
        gate, put = threading.Event(), writer.put

        def full_once(name: str, row: int | None, block: int, tensor: Tensor) -> None:
            assert gate.wait(20)
            asked.append(block)
            if len(asked) == 1:
                raise StorageError("the disk is full")
            put(name, row, block, tensor)

        writer.put = full_once  # type: ignore[method-assign]
        transfer = Transfer(writer, slot_bytes=SLOT, slots=2 * ROWS + 2)
        for name, row, block, tensor in list(rows())[: 2 * ROWS + 2]:
            transfer.send(name, row, block, tensor)
        for block in (0, 1):
            transfer.commit(block, exact=True, worst=0.0, where=0)
        gate.set()
        with pytest.raises(StorageError, match="the disk is full"):
            transfer.close()
        with pytest.raises(StorageError, match="the disk is full"):
            transfer.commit(2, exact=True, worst=0.0, where=0)
        assert asked == [0]
        assert not writer.done.any()


def test_leaving_by_an_exception_drops_what_is_queued(tmp_path: Path) -> None:
    class Stopped(Exception):
        """The caller's own trouble."""

    with begin(tmp_path / "a.h5") as writer:
        gate = Gate(writer)
        transfer = Transfer(writer, slot_bytes=SLOT, slots=3 * ROWS)

        def stopped() -> None:
            with transfer:
                for name, row, block, tensor in list(rows())[: ROWS + 1]:
                    transfer.send(name, row, block, tensor)
                transfer.commit(0, exact=True, worst=0.0, where=0)
                threading.Timer(0.05, gate.opened.set).start()
                raise Stopped

        with pytest.raises(Stopped):
            stopped()
        assert not writer.done.any()
        assert transfer.free_slots == 3 * ROWS
    assert list(verify(tmp_path / "a.h5.partial")) == []
    assert not [thread for thread in threading.enumerate() if thread.name == "streamlens-writer"]


def test_what_does_not_fit_is_refused_at_once(tmp_path: Path) -> None:
    with begin(tmp_path / "a.h5") as writer, Transfer(writer, slot_bytes=SLOT // 2, slots=1) as transfer:
        with pytest.raises(UsageError, match=r"1\.5 KiB do not fit a slot of 768 bytes"):
            transfer.send(ITEM.name, 0, 0, torch.zeros(STEP, WIDTH))
        with pytest.raises(UsageError, match="takes \\[16, 24\\], not \\[24, 16\\]"):
            transfer.send(ITEM.name, 0, 0, torch.zeros(WIDTH, STEP))
        with pytest.raises(UsageError, match="no dataset"):
            transfer.send("/x", 0, 0, torch.zeros(STEP, WIDTH))
        transfer.send(HALF.name, None, 0, torch.zeros(STEP, WIDTH))
        with pytest.raises(UsageError, match="at least one slot"):
            Transfer(writer, slot_bytes=SLOT, slots=0)


def test_a_failed_copy_gives_its_slot_back(tmp_path: Path) -> None:
    with begin(tmp_path / "a.h5") as writer, Transfer(writer, slot_bytes=SLOT, slots=1) as transfer:
        for _ in range(2):
            with pytest.raises(NotImplementedError):
                transfer.send(ITEM.name, 0, 0, torch.empty(STEP, WIDTH, device="meta"))
        assert transfer.free_slots == 1


def test_a_failure_wakes_who_waits_for_a_slot() -> None:
    pool, caught = SlotPool(1, 8), list[BaseException]()
    pool.take()

    def wait() -> None:
        try:
            pool.take()
        except StorageError as error:
            caught.append(error)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    time.sleep(0.05)
    pool.fail(StorageError("the disk is full"))
    waiting.join(5)
    assert [str(error) for error in caught] == ["the disk is full"]


def test_a_pool_keeps_its_first_error() -> None:
    pool = SlotPool(1, 8)
    slot = pool.take()
    pool.fail(StorageError("first"))
    pool.fail(StorageError("second"))
    pool.give(slot)
    for call in (pool.take, pool.check):
        with pytest.raises(StorageError, match="first"):
            call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("slots", [1, 2, 7])
def test_cuda_gives_the_same_bytes(tmp_path: Path, slots: int) -> None:
    """The poison that follows each send, as a model's in-place addition would, must not reach the file."""
    assert through(tmp_path / "a.h5", device="cuda", slots=slots) == directly(tmp_path / "b.h5")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_copies_wait_for_the_computation(tmp_path: Path) -> None:
    """A tensor that is still being computed when it is sent arrives as its final value."""
    n, width = 4096, 4096
    item = Item("/x", 8, width, torch.float32)
    with CaptureWriter.open(
        tmp_path / "a.h5", items=[item], n_tokens=n, blocks=[(0, n)], attrs={}, static={}, identity={}
    ) as writer:
        with Transfer(writer, slot_bytes=n * width * 4, slots=2, device="cuda") as transfer:
            expected, x = [], torch.randn(n, width, device="cuda")
            for row in range(8):
                for _ in range(5):
                    x = torch.nn.functional.normalize(x @ x.T)
                expected.append(x.double().sum())
                transfer.send("/x", row, 0, x)
            transfer.commit(0, exact=True, worst=0.0, where=0)
        path = writer.finish()
    with h5py.File(path) as file:
        stored = file["x"][()].astype(np.float64).sum((1, 2))
    np.testing.assert_allclose(stored, torch.stack(expected).cpu().numpy(), rtol=1e-9)
