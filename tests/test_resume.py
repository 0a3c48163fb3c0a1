"""Runs that are killed, interrupted or started twice: nothing half-done is ever seen, and the same call again gives the same bytes.

The runs are real processes, forked from a server that has everything imported and no threads yet: one starts in milliseconds.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from smoothquant_plus.cli import app
from smoothquant_plus.errors import InputError
from smoothquant_plus.models.blocks import Decoder
from smoothquant_plus.pipeline import Calibration, calibrate, quantize
from smoothquant_plus.verification import verify

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "pytest",
        "typer.testing",
        "numpy.ctypeslib",
        "compressed_tensors.quantization",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.encoder_decoder",
        "transformers.models.mistral.modeling_mistral",
        "smoothquant_plus.cli",
        "smoothquant_plus.pipeline",
    ]
)

# The operations that change what is on disk, and which argument of their audit events is the directory that a relative path starts from.
CHANGES = {"os.mkdir": 2, "os.rename": 2, "os.remove": 1, "os.rmdir": 1}

PARTIAL = ".OUT.partial"
# The first block is done, and all of the second but its record.
SECOND_BLOCK = f"open {PARTIAL}/blocks/00001.json.tmp"


def perform(job: Callable[[], Any], home: Path, log: Path, stop: str | None, number: int) -> None:
    """In a child: do `job`, with stderr in `log`, and a line there before each operation that changes what is on disk in `home`. At the
    line in which `stop` occurs, send this process the signal `number`."""
    torch.set_num_threads(1)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    count = 0

    def operation(name: str, path: Path) -> None:
        nonlocal count
        if path.is_relative_to(home):
            count += 1
            line = f"operation {count}: {name} {path.relative_to(home)}\n"
            os.write(2, line.encode())
            if stop is not None and stop in line:
                os.kill(os.getpid(), number)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, int) and flags & (os.O_ACCMODE | os.O_CREAT):  # for writing
                operation(event, Path(os.fsdecode(path)))
        elif event in CHANGES:
            descriptor = arguments[CHANGES[event]]
            folder = Path(f"/proc/self/fd/{descriptor}").readlink() if descriptor >= 0 else Path()
            operation(event, folder / os.fsdecode(arguments[0]))

    measure = Decoder.measure

    def recorded(decoder: Decoder, block: Any, index: int, *rest: Any) -> Any:
        os.write(2, f"measured {index}\n".encode())
        return measure(decoder, block, index, *rest)

    Decoder.measure = recorded
    # No audit event tells of fsync, nor of what safetensors writes: what it wrote is synced next. A killed process, unlike a machine, loses
    # nothing that it wrote, so that the fsync itself, the slowest of all, can be left out.
    os.fsync = lambda descriptor: operation("fsync", Path(f"/proc/self/fd/{descriptor}").readlink())
    sys.addaudithook(audit)
    job()


@dataclass(frozen=True)
class Ended:
    """How a child ended: `code` is negative for a signal."""

    code: int | None
    log: str

    @property
    def operations(self) -> list[str]:
        return [line for line in self.log.splitlines() if line.startswith("operation ")]

    @property
    def measured(self) -> list[int]:
        return [int(line.split()[1]) for line in self.log.splitlines() if line.startswith("measured ")]


@contextmanager
def started(job: Callable[[], Any], home: Path, stop: str | None = None, number: int = signal.SIGKILL) -> Iterator[Any]:
    """A child at work, and dead at the end."""
    log = home.with_name(f"{home.name}.log")
    log.unlink(missing_ok=True)
    process = PROCESSES.Process(target=perform, args=(job, home, log, stop, number))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def run(job: Callable[[], Any], home: Path, stop: str | None = None) -> Ended:
    """Do `job` in a child, killed at the operation in whose line `stop` occurs. What it changes in `home` is watched."""
    with started(job, home, stop) as process:
        process.join(120)
        assert process.exitcode is not None, "the child hangs"
        return Ended(process.exitcode, home.with_name(f"{home.name}.log").read_text())


def contents(home: Path) -> dict[str, str]:
    """{path: sha256} of every file in `home`."""
    return {str(p.relative_to(home)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(home.rglob("*")) if p.is_file()}


def call(what: str, model: Path, home: Path, calibration: Calibration) -> Callable[[], Any]:
    """The call that is made again and again: its output is OUT in `home`."""
    if what == "calibrate":
        return partial(calibrate, model, home / "OUT.safetensors", calibration=calibration)
    return partial(quantize, model, home / "OUT", smooth="all", calibration=calibration)


@dataclass(frozen=True)
class Whole:
    """An uninterrupted run: what it leaves in its home, and how many operations it takes."""

    contents: dict[str, str]
    operations: int


@pytest.fixture(scope="module")
def whole(tiny: Callable[..., Path], calibration: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Whole]:
    """whole('quantize') or whole('calibrate'), run once."""
    known: dict[str, Whole] = {}

    def get(what: str) -> Whole:
        if what not in known:
            home = tmp_path_factory.mktemp("whole")
            ended = run(call(what, tiny(), home, calibration), home)
            assert ended.code == 0, ended.log
            assert ended.measured == [0, 1, 2]
            known[what] = Whole(contents(home), len(ended.operations))
        return known[what]

    return get


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The directory in which an output is made; a child's log lies beside it."""
    path = tmp_path / "home"
    path.mkdir()
    return path


@pytest.mark.slow
@pytest.mark.parametrize("what", ["quantize", "calibrate"])
def test_killed_at_every_operation(
    what: str, whole: Callable[[str], Whole], tiny: Callable[..., Path], calibration: Calibration, home: Path
) -> None:
    expected = whole(what)
    job = call(what, tiny(), home, calibration)
    output = next(iter(expected.contents)).partition("/")[0]
    continued = set()
    for n in range(1, expected.operations + 1):
        shutil.rmtree(home)
        home.mkdir()
        killed = run(job, home, f"operation {n}: ")
        assert killed.code == -signal.SIGKILL, killed.log
        found = contents(home)
        if (home / output).exists():
            assert {path: found[path] for path in found if not path.startswith(".")} == expected.contents, killed.operations[-1]
        # An fsync changes nothing: it is the state on disk that a run continues from, and each state is continued from once.
        state = (*found.items(), *sorted(path for path in home.rglob("*") if path.is_dir()))
        if state in continued:
            continue
        continued.add(state)
        again = run(job, home)
        assert again.code == 0, f"{killed.operations[-1]}\n{again.log}"
        assert contents(home) == expected.contents, killed.operations[-1]
        assert [path.name for path in home.iterdir()] == [output], killed.operations[-1]
        # A block is done when its record is: it is never measured again.
        done = sum(path.startswith(f".{output}.partial/blocks/") and path.endswith(".json") for path in found)
        published = (home / output).exists() and output in {path.partition("/")[0] for path in found}
        assert again.measured == ([] if published else list(range(done, 3))), killed.operations[-1]
    assert len(continued) > expected.operations / 3
