"""A run that can be killed at any moment and continued: what is done so far, beside the output, until it is complete.

.OUT.partial/lock                  held by the process at work
.OUT.partial/recipe.json           what was asked for; another recipe is refused
.OUT.partial/samples.json          the hash of the calibration tokens
.OUT.partial/output/               what will become OUT by one rename
.OUT.partial/head.json             the output head is quantized: its shard is safely on disk
.OUT.partial/search/               the search for alpha over the whole model, a pass of its own, laid out as the next
.OUT.partial/search.json           what it found
.OUT.partial/blocks/00003.json     written last: block 3 is done, its files are safely on disk
.OUT.partial/blocks/00003.safetensors   its statistics
.OUT.partial/blocks/stream-00004-full.safetensors   the hidden states that go into block 4
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from smoothquant_plus.errors import InputError, VerificationError
from smoothquant_plus.files import TEMPORARY_SUFFIX, sync, write_json
from smoothquant_plus.models.checkpoint import write_shard

RECIPE = "recipe.json"
LOCK = "lock"
PLAN = "plan.json"


class Workspace:
    """The working directory beside `output`, held by one process at a time.

    `recipe` is everything that decides the result; `stamps` are what else would betray a changed input while a run is unfinished (times
    of modification). After entering, `complete` says that the output is there already, made by the same recipe: there is nothing to do.
    Raises InputError when something else is at `output`, when an unfinished run there had another recipe (naming what differs), or when
    another process is at work.
    """

    def __init__(self, output: Path, recipe: Mapping[str, Any], stamps: Mapping[str, Any]) -> None:
        self.output = output
        self.root = output.parent / f".{output.name}.partial"
        self.recipe = json.loads(json.dumps(recipe))
        self.stamps = json.loads(json.dumps(stamps))
        self.directory = self.root / "output"
        self.search = Journal(self.root / "search")
        self.blocks = Journal(self.root / "blocks")
        self.complete = False
        self._lock: int | None = None

    def __enter__(self) -> Workspace:
        self._check_output()
        if self.complete and not self.root.exists():
            return self
        existing = next(parent for parent in self.output.absolute().parents if parent.exists())
        if not existing.is_dir():
            raise InputError(f"{self.output} cannot be made, because {existing} is a file: choose another output.")
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()
        try:
            self._check_output()
            if self.complete:
                self._clear()  # what a run that was killed after publishing left behind
                return self
            self._check_recipe()
        except BaseException:
            os.close(self._lock)
            raise
        for leftover in self.root.rglob(f"*{TEMPORARY_SUFFIX}"):
            leftover.unlink()
        self.directory.mkdir(exist_ok=True)
        self.search.directory.mkdir(exist_ok=True)
        self.blocks.directory.mkdir(exist_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, (InputError, VerificationError)) and not self.complete and not self.started:
            self._clear()  # there is nothing to continue, and the next try will have other options or inputs
        if self._lock is not None:
            os.close(self._lock)

    def _take_lock(self) -> int:
        """The lock of the directory, which is made if it is not there. Raises InputError while another process holds it."""
        while True:
            try:
                self.root.mkdir(exist_ok=True)
                # A file, open for writing: a network file system locks nothing else.
                lock = os.open(self.root / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            except (FileNotFoundError, FileExistsError):
                if (self.root.exists() or self.root.is_symlink()) and not self.root.is_dir():
                    raise InputError(f"{self.root}, where the work of this run would be kept, is not a directory: remove it.") from None
                if not self.output.parent.is_dir():
                    raise
                continue  # another process removed the directory in between
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(lock)
                raise InputError(f"another process is writing {self.output} (it holds {self.root}): wait for it or stop it.") from error
            try:
                if (self.root / LOCK).stat().st_ino == os.fstat(lock).st_ino:
                    return lock
            except FileNotFoundError:
                pass
            os.close(lock)  # of a file that another process has removed since

    def _check_output(self) -> None:
        if self.output.exists() or self.output.is_symlink():  # a link to nothing is in the way, too
            self.complete = recorded_recipe(self.output) == self.recipe
            if not self.complete:
                raise InputError(
                    f"{self.output} exists already and is not the result of this command: choose another output, or remove it."
                )

    def _check_recipe(self) -> None:
        path = self.root / RECIPE
        asked = {**self.recipe, **self.stamps}
        differs = list(differences(json.loads(path.read_text()), asked)) if path.is_file() else []
        if not path.is_file() or (differs and not self.started and not self.head_result.is_file()):
            # Nothing has been done yet: what lies here is left from a directory that was being removed, or from a run that was ended early.
            self._empty()
            write_json(path, asked)
            return
        if differs:
            raise InputError(
                f"{self.root} holds an unfinished run with other options or inputs: {'; '.join(differs)}. Run the original command to continue "
                "it, or remove that directory to start over."
            )

    def check_samples(self, batches: list[Tensor]) -> None:
        """Raises InputError when an unfinished run was calibrated on other token ids (a data set that changed)."""
        digest = hashlib.sha256(b"".join(batch.numpy().tobytes() for batch in batches)).hexdigest()
        path = self.root / "samples.json"
        if not path.is_file():
            write_json(path, digest)
        elif json.loads(path.read_text()) != digest:
            raise InputError(f"{self.root} holds an unfinished run on other calibration text: remove that directory to start over.")

    @property
    def started(self) -> bool:
        """Whether there is finished work to continue."""
        return bool(self.blocks.done or self.search.done or self.search_result.is_file())

    @property
    def search_result(self) -> Path:
        return self.root / "search.json"

    @property
    def head_result(self) -> Path:
        return self.root / "head.json"

    def publish(self, result: Path) -> None:
        """Let `result`, the finished directory or file, appear under the output's name at once, and remove the rest."""
        for path in [*result.rglob("*"), result]:
            sync(path)
        if self.output.exists():
            raise InputError(f"{self.output} was made by something else during this run: remove it, and run the same command again.")
        result.rename(self.output)
        sync(self.output.parent)
        self._clear()

    def _empty(self) -> None:
        for leftover in self.root.iterdir():
            if leftover.name != LOCK:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def _clear(self) -> None:
        """Remove the directory, the lock last: until then no other process is at work in it, and afterwards it may be another's."""
        self._empty()
        (self.root / LOCK).unlink()
        with suppress(OSError):
            self.root.rmdir()


class Journal:
    """A pass over the blocks, one after the other, that can be continued: what each finished block left behind, in `directory`.

    Streams of hidden states are kept by name, per batch; there may be many, so they are written one at a time, before the block is
    finished.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @property
    def done(self) -> int:
        """How many blocks are complete; they are done in order."""
        return len(list(self.directory.glob("[0-9]*.json")))

    def keep_stream(self, index: int, name: str, stream: Sequence[Tensor]) -> None:
        """Write the hidden states of stream `name` that go into block `index`."""
        write_shard(self._stream(index, name), {f"{batch:06d}": hidden for batch, hidden in enumerate(stream)})

    def stream(self, name: str) -> Sequence[Tensor]:
        """The hidden states of stream `name` that go into the first block that is not done: on disk, one batch in memory at a time."""
        return StoredTensors(self._stream(self.done, name))

    def finish(self, index: int, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Block `index` is done, and its shard and the streams for the next one are on disk: keep `tensors`, then commit by writing the
        record."""
        write_shard(self.directory / f"{index:05d}.safetensors", tensors)
        write_json(self.directory / f"{index:05d}.json", record)
        for stream in self.directory.glob(self._stream(index, "*").name):
            stream.unlink()

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(self.directory.glob("[0-9]*.json"))]

    def tensors(self) -> dict[str, Tensor]:
        """What the finished blocks kept, together."""
        tensors: dict[str, Tensor] = {}
        for path in sorted(self.directory.glob("[0-9]*.safetensors")):
            tensors |= load_file(path)
        return tensors

    def _stream(self, index: int, name: str) -> Path:
        return self.directory / f"stream-{index:05d}-{name}.safetensors"


class StoredTensors(Sequence[Tensor]):
    """The tensors of a safetensors file, in the order of their names; each is read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with safe_open(path, framework="pt") as file:
            self._names = sorted(file.keys())

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: Any) -> Any:
        with safe_open(self._path, framework="pt") as file:
            return file.get_tensor(self._names[index]).clone()  # of a mapping that is closed again


def differences(earlier: Any, asked: Any, name: str = "") -> Iterator[str]:
    """'NAME was .. and is now ..' for each value that differs, as deep inside the two recipes as that is."""
    if isinstance(earlier, dict) and isinstance(asked, dict):
        for key in sorted({*earlier, *asked}):
            yield from differences(earlier.get(key), asked.get(key), f"{name}.{key}" if name else key)
    elif earlier != asked:
        yield f"{name} was {earlier!r} and is now {asked!r}"


def recorded_recipe(output: Path) -> Any:
    """The recipe that an existing output says it was made by; None when it does not say."""
    try:
        if output.is_dir():
            return json.loads((output / PLAN).read_text())["recipe"]
        with safe_open(output, framework="pt") as file:
            return json.loads((file.metadata() or {})["recipe"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None
