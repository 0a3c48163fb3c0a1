"""What the benchmarks share: whose turn it is, how long a call takes, and how a result is laid out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch

T = TypeVar("T")


class Table(NamedTuple):
    """What a command prints: a title, the names of the columns, and lines of as many cells."""

    title: str
    columns: list[str]
    lines: list[list[str]]


def turns(everyone: Iterable[T], rounds: int, seconds: float) -> Iterator[T]:
    """Who is measured next: everyone in turn, so that whatever else the machine does meets all alike.

    Whoever had `rounds` turns, or turns that took `seconds` together, has no more of them; a slow one still has its first.
    """
    spent = dict.fromkeys(everyone, 0.0)
    for _ in range(rounds):
        for one in spent:
            if spent[one] < seconds:
                start = time.perf_counter()
                yield one
                spent[one] += time.perf_counter() - start


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """How long `call` takes. On CUDA by the device's own clock: from when the work enqueued before it is done."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


@contextmanager
def threads(number: int | None) -> Iterator[int]:
    """Let torch compute with `number` threads meanwhile (None: as many as it does anyway), and say how many these are."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield number or before
    finally:
        torch.set_num_threads(before)
