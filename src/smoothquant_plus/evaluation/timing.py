"""What the benchmarks share: whose turn it is, how long a call takes when no cache holds its weight, and how a result is laid out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

T = TypeVar("T")

# Calls take turns on copies of their weight, so many times what the caches hold together: weights come from memory as they do in a model, whose
# other layers were multiplied with meanwhile, and the code that multiplies them is as near as a model has it.
CACHES, COPIES = 3, 32
CPU_CACHE = 32 << 20  # where the system does not say
# Calls in a CUDA graph at least, so that starting it does not count.
GRAPH_CALLS = 20


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


def copies_for(nbytes: int, device: torch.device) -> int:
    """How many copies of what a call reads, `nbytes`, have to take turns for `sampler`, so that no cache holds the next one; COPIES at most."""
    return min(COPIES, -(-CACHES * _cache_bytes(device) // nbytes))


def _cache_bytes(device: torch.device) -> int:
    """What the largest cache holds."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = (path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    return max((int(size.removesuffix("K")) << 10 for size in sizes), default=CPU_CACHE)


def sampler(calls: Sequence[Callable[[], Any]], device: torch.device) -> Callable[[], float]:
    """A function that measures once: the seconds of a call on what is in no cache. `calls` do the same on a copy each (`copies_for`)."""
    return replayed(calls, device) if device.type == "cuda" else in_turn(calls, device)


def in_turn(calls: Sequence[Callable[[], Any]], device: torch.device) -> Callable[[], float]:
    """One of `calls` after the other: the mean. Each is called before, which sets things up."""

    def all_of_them() -> None:
        for call in calls:
            call()

    all_of_them()
    return lambda: seconds_of(all_of_them, device) / len(calls)


def replayed(calls: Sequence[Callable[[], Any]], device: torch.device) -> Callable[[], float]:
    """All of `calls` in turn as a CUDA graph, which costs no Python and no launches: the mean of a replay. Raises as `captured` does."""
    times = -(-GRAPH_CALLS // len(calls))
    graph = captured(calls, device, times)

    def sample() -> float:
        graph.replay()  # the device is busy with this one while the next is enqueued
        return seconds_of(graph.replay, device) / (len(calls) * times)

    return sample


def captured(calls: Sequence[Callable[[], Any]], device: torch.device, times: int = 1) -> torch.cuda.CUDAGraph:
    """`calls` in turn, so many `times`, as a CUDA graph. Each is called before, the first of them twice. Raises what the library raises whose
    call cannot be captured, such as one that waits for the device."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # as CUDA graphs want it: whatever sets itself up does so before, and on another stream
        for call in calls:
            call()
        # A capture that fails leaves PyTorch's allocator unable to begin another one, so what waits for the device is found before.
        torch.cuda.set_sync_debug_mode("error")
        try:
            calls[0]()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in list(calls) * times:
            call()
    return graph


def on(device: torch.device) -> AbstractContextManager[Any]:
    """While it lasts, CUDA's streams, events and graphs are those of `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def microseconds(number: float) -> str:
    return f"{number:.0f} us" if number >= 100 else f"{number:.1f} us"


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Let torch compute with `number` threads meanwhile. They are started here, not in what is measured."""
    before = torch.get_num_threads()
    if number != before:
        torch.set_num_threads(number)
        torch.zeros(1 << 20).add_(1)  # enough for all of them
    try:
        yield
    finally:
        torch.set_num_threads(before)
