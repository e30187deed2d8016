"""Threads that work side by side: order, errors, and one core for each."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from streamlens.analyses.team import Team


@pytest.mark.parametrize("size", [1, 2, 3])
def test_results_come_in_the_order_of_items_however_long_each_takes(size: int) -> None:
    def slow_at_first(i: int) -> int:
        time.sleep(0.02 if i == 0 else 0)
        return i * i

    assert list(Team(size).map(slow_at_first, range(7))) == [i * i for i in range(7)]


@pytest.mark.parametrize("size", [1, 2])
def test_an_error_comes_where_its_result_would_have(size: int) -> None:
    found = Team(size).map(lambda i: 1 // (2 - i), range(5))
    assert next(found) == 0
    assert next(found) == 1
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_items_are_made_no_more_than_a_few_ahead() -> None:
    made: list[int] = []
    done: list[int] = []

    def items() -> Iterator[int]:
        for i in range(20):
            made.append(i)
            assert len(made) - len(done) <= 4
            yield i

    for found in Team(2).map(lambda i: i, items()):
        done.append(found)


def test_cores_are_shared_and_those_of_the_caller_left_alone() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        meet = threading.Barrier(2)

        def count(_: int) -> int:
            meet.wait(10)
            torch.ones(3).exp()  # the first operation of a thread settles its number
            return torch.get_num_threads()

        assert list(Team(2).map(count, range(2))) == [2, 2]
        assert torch.get_num_threads() == 4
        assert len(set(Team(2).map(lambda _: (meet.wait(10), threading.get_ident())[1], range(2)))) == 2
    finally:
        torch.set_num_threads(before)
