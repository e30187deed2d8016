"""Several threads, each of which keeps one core busy: for work that is made of many small operations.

PyTorch splits every single operation over the cores. That pays for a large matrix product; a reduction over a few rows
is over before the second core has woken up. Here whole pieces of work run side by side instead, and every operation in
them stays on its own core.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

MOST = 4
"""Threads at most: each has its own buffers, and Python itself takes turns among them."""

Item = TypeVar("Item")
Found = TypeVar("Found")


class Team:
    """Threads that share the cores of this process evenly, for as long as the team is held.

    Args:
        size: how many; by default one for each core that PyTorch may use, and no more than `MOST`. A team of one
            runs everything in the caller's thread.

    >>> list(Team(2).map(lambda x: (x * x, torch.is_grad_enabled()), range(4)))
    [(0, False), (1, False), (4, False), (9, False)]
    """

    def __init__(self, size: int | None = None) -> None:
        cores = torch.get_num_threads()
        self.size = min(cores, MOST) if size is None else size
        self._pool: ThreadPoolExecutor | None = None
        if self.size > 1:
            self._pool = ThreadPoolExecutor(self.size, initializer=_settle, initargs=(max(1, cores // self.size),))

    def map(self, function: Callable[[Item], Found], items: Iterable[Item]) -> Iterator[Found]:
        """Yield the function of each item in order, without gradients.

        Items are made in the caller's thread, one ahead of the threads that work; the first exception of the function
        is raised where its result would have come.
        """
        if self._pool is None:
            yield from (_without_gradients(function, item) for item in items)
            return
        pending: deque[Future[Found]] = deque()
        for item in items:
            pending.append(self._pool.submit(_without_gradients, function, item))
            if len(pending) > self.size:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _settle(threads: int) -> None:
    torch.get_num_threads()  # or the first operation of this thread would set the number back to that of the process
    torch.set_num_threads(threads)


def _without_gradients(function: Callable[[Item], Found], item: Item) -> Found:
    # Whether gradients are on is a matter of each thread.
    with torch.no_grad():
        return function(item)
