"""Progress on stderr: a live bar on a terminal, plain lines elsewhere; with time left and peak memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False, markup=False, emoji=False)

# Plain lines are for logs: the first and the last step, and no more than one every so often between them.
SECONDS_BETWEEN_LINES = 2.0


def peak_rss_mb() -> float:
    """The process's peak resident size in MB (10**6 bytes).

    From /proc where there is one: unlike getrusage it does not start at the size of the process that launched this one.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def note(message: str) -> None:
    """One line to the user, on stderr."""
    console.print(message, soft_wrap=True)


class Steps:
    """Progress over `total` steps, each made of smaller parts."""

    def __init__(self, title: str, total: int, done: int, bar: Progress | None, task: TaskID | None) -> None:
        self.title, self.total, self.done, self.first = title, total, done, done
        self.bar, self.task = bar, task
        self.start = self.spoke = time.monotonic()

    def part(self, fraction: float) -> None:
        """`fraction` (0..1) of the present step is done."""
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=self.done + fraction, memory=f"{peak_rss_mb() / 1e3:.2f} GB peak")

    def step(self, detail: str = "") -> None:
        """One more step is done."""
        self.done += 1
        self.part(0.0)
        now = time.monotonic()
        if self.bar is None and (self.done in (self.first + 1, self.total) or now - self.spoke > SECONDS_BETWEEN_LINES):
            self.spoke = now
            elapsed = now - self.start
            left = elapsed / (self.done - self.first) * (self.total - self.done)
            note(
                f"{self.title} {self.done}/{self.total}{': ' + detail if detail else ''} "
                f"({elapsed:.0f} s, {left:.0f} s left, {peak_rss_mb() / 1e3:.2f} GB peak)"
            )


@contextmanager
def steps(title: str, total: int, done: int = 0) -> Iterator[Steps]:
    """Show progress over `total` steps, `done` of which were done by an earlier run."""
    if not console.is_terminal:
        yield Steps(title, total, done, None, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.1f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[memory]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield Steps(title, total, done, bar, bar.add_task(title, total=total, completed=done, memory=""))
