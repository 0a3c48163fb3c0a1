"""vLLM's own benchmark of its server, on models in full precision and quantized, one after the other."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import IO, Any

import torch

from smoothquant_plus.errors import InputError
from smoothquant_plus.evaluation.machine import describe
from smoothquant_plus.evaluation.timing import Table
from smoothquant_plus.method.scheme import SCHEMES
from smoothquant_plus.models.skeleton import load_config
from smoothquant_plus.progress import steps
from smoothquant_plus.runtime.serve import server_command, stored_scheme

ROUNDS = 3
START_SECONDS = 1800.0  # for a server to load its model, and to compile


@dataclass(frozen=True)
class Row:
    """One server: medians over the rounds, and ratios to the first. `scheme` is the float type of a model that is not quantized; one that was
    quantized while it was loaded says so. Throughput is of all requests together; the time to the first token and the time for each further
    one are the medians of the requests."""

    model: str
    scheme: str
    requests_per_second: float
    output_tokens_per_second: float
    time_to_first_token_ms: float
    time_per_output_token_ms: float
    throughput_ratio: float
    first_token_ratio: float
    output_token_ratio: float


@dataclass(frozen=True)
class ServeBenchmark:
    machine: dict[str, Any]
    requests: int
    input_tokens: int
    output_tokens: int
    concurrency: int
    rows: list[Row]


def bench_serve(
    directories: Sequence[Path],
    requests: int = 32,
    input_tokens: int = 256,
    output_tokens: int = 32,
    concurrency: int = 8,
    options: Sequence[str] = (),
) -> ServeBenchmark:
    """Start vLLM's server on each of the models in `directories`, and send it `requests` random prompts, `concurrency` of them at a time.

    One model alone, in full precision, is served as it is, and quantized while it is loaded as W8A8 and as W4A16. `options` are those of the
    server, as in `server_command`. Raises InputError as that does, before anything is started, and for a server that does not start.
    """
    if not directories:
        raise InputError("there is nothing to serve: give the directory of a model.")
    served: list[tuple[Path, str | None]] = [(directory, None) for directory in directories]
    if len(directories) == 1 and stored_scheme(directories[0]) is None:
        served += [(directories[0], scheme) for scheme in SCHEMES]
    commands = [server_command(directory, scheme, options) for directory, scheme in served]
    found: list[list[dict[str, Any]]] = []
    with steps("benchmark", ROUNDS * len(served)) as progress:
        for (directory, _), (command, environment) in zip(served, commands, strict=True):
            found.append([])
            with server(command, environment) as port:
                for _ in range(ROUNDS):
                    found[-1].append(run_benchmark(directory, port, requests, input_tokens, output_tokens, concurrency))
                    progress.step(str(directory))
    rows = [row(directory, scheme, own, found[0]) for (directory, scheme), own in zip(served, found, strict=True)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return ServeBenchmark(describe(torch.get_num_threads(), device), requests, input_tokens, output_tokens, concurrency, rows)


def row(directory: Path, scheme: str | None, own: list[dict[str, Any]], first: list[dict[str, Any]]) -> Row:
    def of(key: str, results: list[dict[str, Any]] = own) -> float:
        return float(median(result[key] for result in results))

    stored = stored_scheme(directory)
    name = str(load_config(directory).dtype or torch.float32).removeprefix("torch.") if stored is None else stored.name
    throughput, ttft, tpot = "output_throughput", "median_ttft_ms", "median_tpot_ms"
    return Row(
        str(directory),
        name if scheme is None else f"{scheme} while loading",
        of("request_throughput"),
        of(throughput),
        of(ttft),
        of(tpot),
        of(throughput) / of(throughput, first),
        of(ttft, first) / of(ttft),
        of(tpot, first) / of(tpot),
    )


@contextmanager
def server(command: Sequence[str], environment: dict[str, str]) -> Iterator[int]:
    """A running server, on this machine alone: its port. Raises InputError with its last words when it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = ["--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, *address], env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            wait_until_ready(process, port, log)
            yield port
        finally:
            stop(process)


def wait_until_ready(process: subprocess.Popen[bytes], port: int, log: IO[str]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        if process.poll() is not None or time.monotonic() > deadline:
            log.seek(0)
            last = "".join(log.readlines()[-20:])
            how = "did not answer in time" if process.poll() is None else f"ended with exit code {process.returncode}"
            raise InputError(f"vLLM's server {how}: {' '.join(map(str, process.args))}\n{last}")  # type: ignore[arg-type]
        time.sleep(0.5)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and the processes that it started, which are its session."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)


def run_benchmark(directory: Path, port: int, requests: int, input_tokens: int, output_tokens: int, concurrency: int) -> dict[str, Any]:
    """What `vllm bench serve` says, which prints its own table: that goes to stderr."""
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    how = {
        "model": directory,
        "host": "127.0.0.1",
        "port": port,
        "dataset-name": "random",
        "num-prompts": requests,
        "input-len": input_tokens,
        "output-len": output_tokens,
        "max-concurrency": concurrency,
        "num-warmups": min(requests, concurrency),
    }
    arguments = [word for name, value in how.items() for word in (f"--{name}", str(value))]
    with contextlib.redirect_stdout(sys.stderr):
        found: dict[str, Any] = main(parser.parse_args([*arguments, "--ignore-eos", "--disable-tqdm"]))
    if found["completed"] != requests:
        raise InputError(f"{directory}: vLLM answered {found['completed']} of {requests} requests, see its messages above.")
    return found


def tables(found: ServeBenchmark) -> Iterator[Table]:
    columns = ["", "scheme", "requests/s", "output tokens/s", "first token ms", "per output token ms"]
    lines = [
        [
            row.model,
            row.scheme,
            f"{row.requests_per_second:.2f}",
            f"{row.output_tokens_per_second:.1f} ({row.throughput_ratio:.2f}x)",
            f"{row.time_to_first_token_ms:.1f} ({row.first_token_ratio:.2f}x)",
            f"{row.time_per_output_token_ms:.1f} ({row.output_token_ratio:.2f}x)",
        ]
        for row in found.rows
    ]
    title = f"{found.requests} requests of {found.input_tokens} tokens and {found.output_tokens} new ones, {found.concurrency} at a time"
    yield Table(title, columns, lines)


def remarks(found: ServeBenchmark) -> Iterator[str]:
    yield "The servers ran one after the other, not in turns; ratios above 1 are faster than the first."
    yield ", ".join(f"{name} {value}" for name, value in found.machine.items())
