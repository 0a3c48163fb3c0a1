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
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import families
from smoothquant_plus.cli import app
from smoothquant_plus.errors import InputError
from smoothquant_plus.models.blocks import Decoder
from smoothquant_plus.pipeline import calibrate, quantize
from smoothquant_plus.preparation import Calibration
from smoothquant_plus.search import Search
from smoothquant_plus.verification import verify
from smoothquant_plus.workspace import Workspace

PROCESSES = multiprocessing.get_context("forkserver")
PRELOADED = [
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

# No run takes long; this only ends one that hangs, on however slow a machine.
PATIENCE = 600

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


@pytest.fixture(scope="module", autouse=True)
def preloaded() -> None:
    """Children have imported everything when they are forked. A server that runs already was started by other tests, with less."""
    forkserver._forkserver._stop()
    PROCESSES.set_forkserver_preload(PRELOADED)


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
        process.join(PATIENCE)
        assert process.exitcode is not None, "the child hangs"
        return Ended(process.exitcode, home.with_name(f"{home.name}.log").read_text())


def contents(home: Path) -> dict[str, str]:
    """{path: sha256} of every file in `home`."""
    return {str(p.relative_to(home)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(home.rglob("*")) if p.is_file()}


@dataclass(frozen=True)
class Inputs:
    """A model of two blocks and little text, in a directory of their own."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def calibration(self) -> Calibration:
        return Calibration(text=(str(self.folder / "text.txt"),), samples=2, seq_len=16)

    def call(self, what: str, home: Path) -> Callable[[], Any]:
        """What is called again and again: the output is OUT in `home`."""
        if what == "calibrate":
            return partial(calibrate, self.model, home / "OUT.safetensors", calibration=self.calibration)
        if what == "factors":
            searched = {"group_size": 32, "alpha": "model", "search": Search(samples=1, memory=4 * 16 * 64 * 4)}
            return partial(calibrate, self.model, home / "OUT.safetensors", calibration=self.calibration, **searched)
        if what == "head":
            return partial(quantize, self.model, home / "OUT", smooth="none", lm_head="w8a8")
        searched = {"scheme": "w4a16", "group_size": 32, "alpha": what, "search": Search(samples=1, memory=4 * 16 * 64 * 4)}
        options = {} if what == "quantize" else searched
        return partial(quantize, self.model, home / "OUT", smooth="all", calibration=self.calibration, **options)

    def copy(self, folder: Path) -> Inputs:
        """The same, times of modification included."""
        shutil.copytree(self.folder, folder)
        return Inputs(folder)


@pytest.fixture(scope="module")
def inputs(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copytree(tiny("mistral-sliding-window"), folder / "model")
    (folder / "text.txt").write_text(families.TEXT[:2000])
    return Inputs(folder)


@dataclass(frozen=True)
class Whole:
    """An uninterrupted run: what it leaves, and how many operations that takes."""

    contents: dict[str, str]
    operations: int


@pytest.fixture(scope="module")
def whole(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Whole]:
    """whole('quantize'), whole('calibrate'), with a search for alpha whole('model'), whole('block') and whole('factors'), or with the output
    head quantized too, whole('head'), run once."""
    known: dict[str, Whole] = {}

    def get(what: str) -> Whole:
        if what not in known:
            home = tmp_path_factory.mktemp("whole")
            ended = run(inputs.call(what, home), home)
            assert ended.code == 0, ended.log
            assert ended.measured == {"model": [0, 1, 0, 1], "factors": [0, 1, 0, 1], "head": []}.get(what, [0, 1])
            known[what] = Whole(contents(home), len(ended.operations))
        return known[what]

    return get


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The directory in which an output is made; a child's log lies beside it."""
    path = tmp_path / "home"
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def killed_in_second_block(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the work of a killed run; not to be written to."""
    home = tmp_path_factory.mktemp("killed")
    ended = run(inputs.call("quantize", home), home, SECOND_BLOCK)
    assert ended.code == -signal.SIGKILL, ended.log
    return home


@pytest.mark.slow
@pytest.mark.parametrize(("what", "step"), [("quantize", 5), ("calibrate", 5), ("factors", 37), ("model", 31), ("block", 17)])
def test_killed_at_operation_after_operation(what: str, step: int, whole: Callable[[str], Whole], inputs: Inputs, home: Path) -> None:
    expected = whole(what)
    output = next(iter(expected.contents)).partition("/")[0]
    continued = set()
    for n in range(1, expected.operations + 1, step):
        shutil.rmtree(home)
        home.mkdir()
        killed = run(inputs.call(what, home), home, f"operation {n}: ")
        assert killed.code == -signal.SIGKILL, killed.log
        where = killed.operations[-1]
        found = contents(home)
        published = (home / output).exists()
        if published:
            assert {path: found[path] for path in found if path.startswith(output)} == expected.contents, where
        # What is on disk decides how the next run goes on, and an fsync does not change that: each state is continued from once.
        state = (*found.items(), *sorted(path for path in home.rglob("*") if path.is_dir()))
        if state in continued:
            continue
        continued.add(state)

        again = run(inputs.call(what, home), home)

        assert again.code == 0, f"{where}\n{again.log}"
        assert contents(home) == expected.contents, where
        assert [path.name for path in home.iterdir()] == [output], where
        # A block is done when its record is there, and is never measured again.
        expected_blocks = list(range(len([path for path in found if Path(path).match("blocks/*.json")]), 2))
        if what in ("model", "factors") and not any(Path(path).name == "search.json" for path in found):
            expected_blocks = [*range(len([path for path in found if Path(path).match("search/*.json")]), 2), 0, 1]
        assert again.measured == ([] if published else expected_blocks), where
    assert len(continued) > expected.operations / step / 3


def test_killed_again_and_again(whole: Callable[[str], Whole], inputs: Inputs, home: Path) -> None:
    stops = [
        (f"open {PARTIAL}/blocks/00000.json.tmp", [0]),
        (f"os.remove {PARTIAL}/blocks/stream-00000-full.safetensors\n", [0]),
        (SECOND_BLOCK, [1]),
        (f"open {PARTIAL}/output/manifest.json.tmp", [1]),
        (f"os.rename {PARTIAL}/output\n", []),
        (f"os.rmdir {PARTIAL}/blocks\n", []),
        (f"os.rmdir {PARTIAL}\n", []),
    ]
    for stop, measured in stops:
        ended = run(inputs.call("quantize", home), home, stop)
        assert ended.code == -signal.SIGKILL, f"not killed at {stop}: {ended.log}"
        assert ended.measured == measured, stop
        assert ("continuing at block 2 of 2" in ended.log) == (measured == [1]), stop
    assert run(inputs.call("quantize", home), home).code == 0
    assert contents(home) == whole("quantize").contents
    assert not (home / PARTIAL).exists()


def test_killed_while_the_head_is_written(whole: Callable[[str], Whole], inputs: Inputs, home: Path) -> None:
    head = "output/model-00004-of-00004.safetensors"
    for stop in (f"{head}.tmp", "head.json.tmp", f"open {PARTIAL}/blocks"):
        ended = run(inputs.call("head", home), home, stop)
        assert ended.code == -signal.SIGKILL, f"not killed at {stop}: {ended.log}"
    written = (home / PARTIAL / head).stat().st_mtime_ns
    assert run(inputs.call("head", home), home).code == 0
    assert contents(home) == whole("head").contents
    assert (home / "OUT" / Path(head).name).stat().st_mtime_ns == written, "a head that is done is not made again"


def test_half_written_files_are_ignored(killed_in_second_block: Path, whole: Callable[[str], Whole], inputs: Inputs, home: Path) -> None:
    shutil.copytree(killed_in_second_block / PARTIAL, home / PARTIAL)
    half = (home / PARTIAL / "blocks/stream-00001-full.safetensors").read_bytes()[:1000]
    final = [
        "recipe.json",
        "output/model-00003-of-00004.safetensors",
        "output/plan.json",
        "output/of-another-version.json",
        "blocks/00001.json",
    ]
    for name in [*final, "blocks/00001.safetensors", "blocks/stream-00002-full.safetensors"]:
        (home / PARTIAL / f"{name}.tmp").write_bytes(half)

    ended = run(inputs.call("quantize", home), home)

    assert ended.code == 0, ended.log
    assert ended.measured == [1]
    assert contents(home) == whole("quantize").contents


def test_half_written_recipe_is_ignored(whole: Callable[[str], Whole], inputs: Inputs, home: Path) -> None:
    (home / PARTIAL).mkdir()
    (home / PARTIAL / "recipe.json.tmp").write_text('{"alpha": 0.')
    assert run(inputs.call("quantize", home), home).code == 0
    assert contents(home) == whole("quantize").contents


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"alpha": 0.25}, "alpha was 0.8 and is now 0.25"),
        ({"smooth": "norms"}, "smooth was 'all' and is now 'norms'"),
        (
            {"activations": "static"},
            "scheme.inputs.dynamic was True and is now False; scheme.inputs.strategy was 'token' and is now 'tensor'",
        ),
        ({"weights": "tensor"}, "scheme.weights.strategy was 'channel' and is now 'tensor'"),
        ({"samples": 3}, "samples was 2 and is now 3"),
        ({"seq_len": 8}, "seq_len was 16 and is now 8"),
        ({"compute_dtype": "checkpoint"}, "compute_dtype was 'float32' and is now 'checkpoint'"),
    ],
)
def test_other_options_are_refused(
    changed: dict[str, Any], named: str, killed_in_second_block: Path, whole: Callable[[str], Whole], inputs: Inputs, home: Path
) -> None:
    shutil.copytree(killed_in_second_block / PARTIAL, home / PARTIAL)
    options = {key: value for key, value in changed.items() if key in ("alpha", "smooth", "activations", "weights")}
    calibration = replace(inputs.calibration, **{key: value for key, value in changed.items() if key not in options})

    with pytest.raises(InputError) as refused:
        quantize(inputs.model, home / "OUT", **{"smooth": "all", **options}, calibration=calibration)

    assert f"{home / PARTIAL} holds an unfinished run with other options or inputs: {named}. Run the original" in str(refused.value)
    assert contents(home) == contents(killed_in_second_block)
    again = run(inputs.call("quantize", home), home)
    assert again.measured == [1]
    assert contents(home) == whole("quantize").contents


SHARD = "model-00002-of-00004.safetensors"


def touch(inputs: Inputs) -> None:
    os.utime(inputs.model / SHARD)


def change_weight(inputs: Inputs) -> None:
    """Another value in a shard, which keeps its size."""
    content = bytearray((inputs.model / SHARD).read_bytes())
    content[-1] ^= 1
    (inputs.model / SHARD).write_bytes(content)


def change_header(inputs: Inputs) -> None:
    """Another header in a shard that keeps its size and its time of modification."""
    path = inputs.model / SHARD
    times = path.stat()
    path.write_bytes(path.read_bytes().replace(b'"format":"pt"', b'"format":"np"'))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def change_config(inputs: Inputs) -> None:
    path = inputs.model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 1e-5}))


def change_tokenizer(inputs: Inputs) -> None:
    with (inputs.model / "tokenizer_config.json").open("a") as file:
        file.write("\n")


def change_text(inputs: Inputs) -> None:
    (inputs.folder / "text.txt").write_text(families.TEXT[1:2001])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (touch, [f"modified.{SHARD}"]),
        (change_weight, [f"model.shards.{SHARD}.sample_sha256", f"modified.{SHARD}"]),
        (change_header, [f"model.shards.{SHARD}.sample_sha256"]),
        (change_config, ["model.config_sha256"]),
        (change_tokenizer, ["companions.tokenizer_config.json"]),
        (change_text, ["text"]),
    ],
)
def test_other_inputs_are_refused(
    change: Callable[[Inputs], None], named: list[str], killed_in_second_block: Path, inputs: Inputs, home: Path, tmp_path: Path
) -> None:
    shutil.copytree(killed_in_second_block / PARTIAL, home / PARTIAL)
    changed = inputs.copy(tmp_path / "inputs")
    change(changed)

    with pytest.raises(InputError, match=f"unfinished run with other options or inputs: {named[0]} was ") as refused:
        changed.call("quantize", home)()

    assert [word for word in named if f"{word} was " in str(refused.value)] == named
    assert str(refused.value).count(" was ") == len(named), "names more than what differs"
    assert contents(home) == contents(killed_in_second_block)


def test_moved_inputs_are_the_same_inputs(
    killed_in_second_block: Path, whole: Callable[[str], Whole], inputs: Inputs, home: Path, tmp_path: Path
) -> None:
    shutil.copytree(killed_in_second_block / PARTIAL, home / PARTIAL)
    assert run(inputs.copy(tmp_path / "moved").call("quantize", home), home).measured == [1]
    assert contents(home) == whole("quantize").contents


def times(home: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in home.rglob("*")}


def test_complete_output_is_left_alone(inputs: Inputs, home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = inputs.call("quantize", home)()
    before = times(home)
    capfd.readouterr()

    second = inputs.call("quantize", home)()

    assert "block" not in capfd.readouterr().err
    assert times(home) == before
    own = {"seconds": 0.0, "peak_rss_mb": 0.0}  # of each run
    assert asdict(replace(second, **own)) == asdict(replace(first, **own))
    with pytest.raises(InputError, match="exists already"):
        quantize(inputs.model, home / "OUT", smooth="norms", calibration=inputs.calibration)
    assert times(home) == before


def test_complete_output_of_other_weights_is_left_alone(inputs: Inputs, home: Path, tmp_path: Path) -> None:
    changed = inputs.copy(tmp_path / "inputs")
    changed.call("quantize", home)()
    before = times(home)
    touch(changed)
    changed.call("quantize", home)()  # the same weights, downloaded once more
    change_weight(changed)
    with pytest.raises(InputError, match="exists already"):
        changed.call("quantize", home)()
    assert times(home) == before


def test_complete_statistics_are_left_alone(inputs: Inputs, home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = inputs.call("calibrate", home)()
    before = times(home)
    capfd.readouterr()
    assert inputs.call("calibrate", home)() == first
    assert "block" not in capfd.readouterr().err
    assert times(home) == before
    with pytest.raises(InputError, match="exists already"):
        calibrate(inputs.model, first, calibration=replace(inputs.calibration, samples=1))
    assert times(home) == before


@pytest.mark.parametrize("what", ["quantize", "calibrate"])
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_is_not_ours_is_left_alone(what: str, kind: str, inputs: Inputs, home: Path) -> None:
    output = home / ("OUT.safetensors" if what == "calibrate" else "OUT")
    if kind == "file":
        output.write_text("of somebody else")
    else:
        output.mkdir()
    with pytest.raises(InputError, match="exists already"):
        inputs.call(what, home)()
    assert [path.name for path in home.iterdir()] == [output.name]


def test_a_run_that_was_ended_before_any_block_is_in_nobodys_way(
    tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path
) -> None:
    """Whatever its options were: there is nothing to lose."""
    out = tmp_path / "OUT"
    left = tmp_path / PARTIAL
    (left / "blocks").mkdir(parents=True)
    (left / "recipe.json").write_text('{"alpha": 0.1}')
    (left / "blocks" / "stream-00000-full.safetensors").write_bytes(b"")
    quantize(tiny(), out, calibration=calibration)
    verify(out)
    assert not left.exists()


def test_a_link_to_nothing_is_in_the_way_before_the_work(tiny: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "OUT"
    out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="exists already and is not the result of this command"):
        quantize(tiny(), out, smooth="none")
    assert list(tmp_path.iterdir()) == [out]


def test_one_process_at_a_time(whole: Callable[[str], Whole], inputs: Inputs, home: Path) -> None:
    with started(inputs.call("quantize", home), home, SECOND_BLOCK, signal.SIGSTOP) as first:
        wait_until_stopped(first.pid)
        before = contents(home)
        with pytest.raises(InputError, match="another process is writing"):
            inputs.call("quantize", home)()
        assert contents(home) == before
        os.kill(first.pid, signal.SIGCONT)
        first.join(PATIENCE)
        assert first.exitcode == 0
    assert contents(home) == whole("quantize").contents


def wait_until_stopped(pid: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < deadline, "the child was not stopped"
        time.sleep(0.01)


@contextmanager
def default_interrupt() -> Iterator[None]:
    """SIGINT as a terminal gives it to a child, even where the tests themselves run in the background with it ignored."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@pytest.mark.slow
def test_interrupted_command_continues(inputs: Inputs, text_file: Path, home: Path) -> None:
    options = [
        "--text",
        str(text_file),
        "--samples",
        "150",
        "--seq-len",
        "64",
    ]  # long enough to be in the second block when the signal comes
    command = ["quantize", str(inputs.model), str(home / "OUT"), *options]
    with default_interrupt():
        process = subprocess.Popen([sys.executable, "-m", "smoothquant_plus.cli", *command], stderr=subprocess.PIPE, text=True)
    guard = threading.Timer(PATIENCE, process.kill)
    guard.start()
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("block 1/"):
                break
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    finally:
        guard.cancel()
        process.kill()
    assert process.returncode == 130, errors
    assert "run the same command again" in errors
    assert "Traceback" not in errors
    assert [path.name for path in home.iterdir()] == [PARTIAL]

    again = CliRunner().invoke(app, command)

    assert again.exit_code == 0, again.output
    assert "continuing at block 2 of 2" in again.stderr
    assert [path.name for path in home.iterdir()] == ["OUT"]
    verify(home / "OUT")


def test_many_at_once(tmp_path: Path) -> None:
    """Each has the directory for itself, or is told that it has not: also while another one removes it."""
    found: list[object] = []

    def work(own: int) -> None:
        for number in range(150):
            try:
                with Workspace(tmp_path / "OUT", {"of": own}, {}) as workspace:
                    for name in ("a", "b", "c"):
                        (workspace.directory / name).write_text(str(own))
                    assert {path.read_text() for path in workspace.directory.iterdir()} == {str(own)}
                    if number % 2:
                        workspace.publish(workspace.directory)
                        shutil.rmtree(tmp_path / "OUT")
                    else:
                        raise InputError("refused")
                found.append("published")
            except InputError as error:
                found.append("refused" if "refused" in str(error) else "another")
            except (OSError, AssertionError) as error:
                found.append(error)

    threads = [threading.Thread(target=work, args=(own,)) for own in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) <= {"published", "refused", "another"} and {"published", "refused"} <= set(found)


@pytest.mark.parametrize("link", [False, True])
def test_what_is_where_the_work_would_be_kept_is_named(link: bool, tmp_path: Path) -> None:
    kept = tmp_path / ".OUT.partial"
    kept.symlink_to(tmp_path / "nowhere") if link else kept.touch()
    with pytest.raises(InputError, match=r"\.OUT\.partial, .*, is not a directory: remove it"):
        Workspace(tmp_path / "OUT", {}, {}).__enter__()


def test_a_link_to_nothing_above_the_output_is_no_endless_wait(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        Workspace(tmp_path / "link" / "OUT", {}, {}).__enter__()


def test_what_appears_during_the_run_is_not_replaced(tmp_path: Path) -> None:
    output = tmp_path / "factors.safetensors"
    with pytest.raises(InputError, match="was made by something else during this run"), Workspace(output, {}, {}) as workspace:
        (workspace.directory / output.name).write_text("ours")
        output.write_text("theirs")
        workspace.publish(workspace.directory / output.name)
    assert output.read_text() == "theirs"
