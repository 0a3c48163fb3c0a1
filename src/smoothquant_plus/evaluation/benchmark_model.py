"""How fast whole models run, quantized or not, beside each other: prefill, decoding and memory."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from smoothquant_plus.errors import InputError, did_you_mean
from smoothquant_plus.evaluation.machine import describe
from smoothquant_plus.evaluation.timing import Table, captured, on, turns
from smoothquant_plus.method.scheme import SCHEMES
from smoothquant_plus.models.blocks import check_device
from smoothquant_plus.models.skeleton import check_positions, open_directory
from smoothquant_plus.progress import note, peak_rss_mb, steps
from smoothquant_plus.runtime.attention import cache_argument, check_attention
from smoothquant_plus.runtime.kernels import BACKENDS
from smoothquant_plus.runtime.linear import QuantLinear
from smoothquant_plus.runtime.load import load

# A model is timed so many times, or for so long.
ROUNDS, SECONDS = 5, 60.0


@dataclass(frozen=True)
class Row:
    """One model: medians over the rounds, and ratios to the first model.

    `scheme` is the float type of a model that is not quantized, whose `backend` is empty; `attention` is 'int8', or empty where none was asked
    for. `prefill_tokens_per_second` counts the tokens of all prompts of the batch over `time_to_first_token_s`: one forward pass over the
    prompts, which fills the cache, and the choice of a token. `decode_tokens_per_second` counts those after the first. `peak_memory_bytes` is
    the peak resident size of a process that loads and runs this model alone, Python and the libraries included; on CUDA the peak that torch
    allocated there.
    """

    model: str
    scheme: str
    backend: str
    attention: str
    prefill_tokens_per_second: float
    time_to_first_token_s: float
    decode_tokens_per_second: float
    peak_memory_bytes: int
    prefill_ratio: float
    decode_ratio: float


@dataclass(frozen=True)
class ModelBenchmark:
    machine: dict[str, Any]
    prompt_tokens: int
    new_tokens: int
    batch: int
    cuda_graphs: bool
    rows: list[Row]


@dataclass(frozen=True)
class Answer:
    """What a model's process says after a run."""

    backends: tuple[str, ...]
    first_s: float  # until the first token was there
    rest_s: float  # from then until the last one
    peak_memory: int


def bench_model(
    directories: Sequence[Path],
    prompt_tokens: int = 256,
    new_tokens: int = 32,
    batch: int = 1,
    number_of_threads: int | None = None,
    device: str = "cpu",
    backend: str | None = None,
    eager: bool = False,
    attention: str | None = None,
) -> ModelBenchmark:
    """Run the models in `directories` on the same random prompts (`batch` of them, `prompt_tokens` each), and let each generate `new_tokens`
    (at least 2).

    Each model is loaded in a process of its own, so that its memory is its own, and all of them stay loaded: they take turns, round by
    round, and nothing but the one whose turn it is computes. `backend` is for those that are quantized. On CUDA all of them run as CUDA
    graphs, unless `eager`. With `attention` each is also run with attention so computed (`load`), right after itself. Raises InputError before
    anything is loaded for a directory, a backend, a device, an attention or a length that cannot be used, for a model that cannot be captured in
    a graph, and when a process ends, such as for want of memory.
    """
    check_device(device)
    on_cuda = torch.device(device).type == "cuda"
    if eager and not on_cuda:
        raise InputError(f"--eager is for CUDA, where models run as CUDA graphs otherwise: on '{device}' there are none, leave it out.")
    graphs = on_cuda and not eager
    vocabulary, schemes = _check(directories, prompt_tokens, new_tokens, backend, attention, device)
    ways = (None,) if attention is None else (None, attention)
    directories, schemes = [one for one in directories for _ in ways], [one for one in schemes for _ in ways]
    attentions = list(ways) * (len(directories) // len(ways))
    prompts = torch.randint(vocabulary, (batch, prompt_tokens), generator=torch.Generator().manual_seed(0))
    count = number_of_threads or torch.get_num_threads()
    answers: list[list[Answer]] = [[] for _ in directories]
    options = [
        (count, device, backend if scheme in SCHEMES else None, own, graphs) for scheme, own in zip(schemes, attentions, strict=True)
    ]
    with _processes(directories, options) as ask:
        for index, directory in enumerate(directories):  # one after the other: the first run loads the model, and sets things up
            note(f"{directory}{named(attentions[index])}:")
            ask(index, prompts, new_tokens if graphs else 2)
        with steps("run", ROUNDS * len(directories)) as progress:
            for index in turns(range(len(directories)), ROUNDS, SECONDS):
                answers[index].append(ask(index, prompts, new_tokens))
                progress.step(f"{directories[index]}{named(attentions[index])}")
    first = [median(answer.first_s for answer in own) for own in answers]
    rest = [median(answer.rest_s for answer in own) for own in answers]
    rows = [
        Row(
            str(directory),
            schemes[index],
            ", ".join(answers[index][0].backends),
            attentions[index] or "",
            batch * prompt_tokens / first[index],
            first[index],
            batch * (new_tokens - 1) / rest[index],
            max(answer.peak_memory for answer in answers[index]),
            first[0] / first[index],
            rest[0] / rest[index],
        )
        for index, directory in enumerate(directories)
    ]
    return ModelBenchmark(describe(count, torch.device(device)), prompt_tokens, new_tokens, batch, graphs, rows)


def _check(
    directories: Sequence[Path], prompt_tokens: int, new_tokens: int, backend: str | None, attention: str | None, device: str
) -> tuple[int, list[str]]:
    """The size of the smallest vocabulary, and each model's scheme. Raises InputError for what `load` or a run would fail on later."""
    vocabulary, schemes = [], []
    for directory in directories:
        _, _, skeleton, scheme = open_directory(directory)
        config = skeleton.config
        if attention is not None:
            check_attention(skeleton, attention, device)
        text = config.get_text_config()
        check_positions(text, prompt_tokens + new_tokens, f"{directory}: --prompt-tokens {prompt_tokens} --new-tokens {new_tokens}")
        vocabulary.append(text.vocab_size)
        schemes.append(str(config.dtype or torch.float32).removeprefix("torch.") if scheme is None else scheme.name)
    if backend is not None and backend not in BACKENDS:
        raise InputError(f"unknown backend '{backend}': choose one of {', '.join(BACKENDS)}.{did_you_mean(backend, BACKENDS)}")
    if backend is not None and not set(schemes) & set(SCHEMES):
        raise InputError(f"--backend {backend}: none of the models is quantized, leave it out.")
    return min(vocabulary), schemes


@contextmanager
def _processes(
    directories: Sequence[Path], options: Sequence[tuple[int, str, str | None, str | None, bool]]
) -> Iterator[Callable[[int, Tensor, int], Answer]]:
    """A process for each model; gives ask(index, prompts, new tokens), which lets one of them run and returns its Answer."""
    # Forked from a process that has imported everything, once, and computed nothing: torch's threads do not survive a fork.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ends, workers = [], []
    for directory, own in zip(directories, options, strict=True):
        ours, theirs = context.Pipe()
        worker = context.Process(target=serve, args=(theirs, directory, *own), daemon=True)
        worker.start()
        theirs.close()  # so that the end of the process ends the pipe
        ends.append(ours)
        workers.append(worker)

    def ask(index: int, prompts: Tensor, new_tokens: int) -> Answer:
        try:
            ends[index].send((prompts.tolist(), new_tokens))
            answer = ends[index].recv()
        except (EOFError, ConnectionError) as error:
            workers[index].join()
            raise InputError(
                f"the process that runs {directories[index]} ended (exit code {workers[index].exitcode}). All the models are in memory at "
                "once: when there was not enough of it, measure fewer of them, or a smaller --batch."
            ) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    try:
        yield ask
    finally:
        for end, worker in zip(ends, workers, strict=True):
            end.close()
            worker.terminate()
            worker.join()


def serve(
    connection: Connection, directory: Path, threads: int, device: str, backend: str | None, attention: str | None, graphs: bool
) -> None:
    """A model's process: load it when first asked, and run it as often as asked, until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's, who ends this process
    torch.set_num_threads(threads)
    model: Any = None
    run_graphs: Callable[[], tuple[float, float]] | None = None
    while True:
        try:
            prompts, new_tokens = connection.recv()
        except EOFError:
            return
        try:
            model = load(directory, device=device, backend=backend, attention=attention) if model is None else model
            inputs = torch.tensor(prompts, device=model.device)
            with on(model.device):
                if graphs and run_graphs is None:  # for good: what is asked of a process is always the same
                    run_graphs = capture(model, inputs, new_tokens, directory)
                first, rest = run(model, inputs, new_tokens) if run_graphs is None else run_graphs()
        except (InputError, OSError, RuntimeError) as error:
            connection.send(error)
            return
        backends = tuple(sorted({module.backend for module in model.modules() if isinstance(module, QuantLinear)}))
        peak = torch.cuda.max_memory_allocated(model.device) if model.device.type == "cuda" else int(peak_rss_mb() * 1e6)
        connection.send(Answer(backends, first, rest, peak))


@torch.inference_mode()
def run(model: Any, prompts: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds until the first token after `prompts`, int64 (batch, tokens), and from then until the last of `new_tokens`.

    Greedy, with the model's own cache and forward passes as `generate` makes them, without what it does around them. The end of
    a text does not stop it.
    """
    only_last = _only_last(model)
    start = _now(model)
    token, cache = _next(model, prompts, **only_last)
    first = _now(model)
    for _ in range(new_tokens - 1):
        token, cache = _next(model, token, cache)
    return first - start, _now(model) - first


@torch.inference_mode()
def capture(model: Any, prompts: Tensor, new_tokens: int, directory: Path) -> Callable[[], tuple[float, float]]:
    """`run` of these arguments as two CUDA graphs, of the prompts and of a token's step, so that neither Python nor launches cost anything.

    The step's cache has room for all tokens from the start (transformers' StaticCache, in which the number of tokens is a tensor), and is
    filled anew before each run, which is not timed. Where attention has a window, longer than all tokens, the number is not a tensor and a
    replay's stays as it was: as much is computed, but not what the model would say. Raises InputError, which names `directory`, for a model
    that cannot be captured.
    """
    only_last = _only_last(model)
    positions = prompts.shape[1] + new_tokens + 1  # a window that ends with the last token would be full when the step is captured
    token = torch.empty_like(prompts[:, :1])
    try:
        prefill = captured([lambda: _next(model, prompts, **only_last)], model.device)  # before there is a second cache
        cache = StaticCache(config=model.config, max_cache_len=positions)
        windows = [layer.max_cache_len for layer in cache.layers if layer.is_sliding]
        if windows and min(windows) < positions:
            # There that number decides what is computed: a replay would write past the end.
            raise ValueError(f"its attention has a window of {min(windows)} tokens, and {positions} are needed")

        def fill() -> None:
            cache.reset()
            token.copy_(_next(model, prompts, cache, **only_last)[0])

        def step() -> None:
            token.copy_(_next(model, token, cache)[0])

        fill()
        decode = captured([step], model.device)
    except torch.OutOfMemoryError:
        raise  # which the command line explains
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{directory} cannot be run as a CUDA graph: {error}\nMeasure it, and all beside it, with --eager.") from error

    @torch.inference_mode()
    def run_graphs() -> tuple[float, float]:
        start = _now(model)
        prefill.replay()
        first = _now(model) - start
        fill()
        start = _now(model)
        for _ in range(new_tokens - 1):
            decode.replay()
        return first, _now(model) - start

    return run_graphs


def _only_last(model: Any) -> dict[str, int]:
    """The option that leaves out the logits of all tokens but the last, where the model has it."""
    return {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}


def _next(model: Any, tokens: Tensor, cache: Any = None, **options: int) -> tuple[Tensor, Any]:
    """The token (batch, 1) that follows `tokens` (batch, any number), and the cache with `tokens` in it; without one, the model's own."""
    name = cache_argument(model)
    output = model(input_ids=tokens, use_cache=True, **{name: cache}, **options)
    return output.logits[:, -1:].argmax(dim=-1), output[name]


def _now(model: Any) -> float:
    """The time, when all that was asked of the model's device is done."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def named(attention: str | None) -> str:
    """What a model's name is followed by."""
    return f", attention in {attention}" if attention else ""


def tables(found: ModelBenchmark) -> Iterator[Table]:
    columns = ["", "scheme", "backend", "prefill tokens/s", "first token s", "decode tokens/s", "peak memory GB"]
    lines = [
        [
            row.model + named(row.attention),
            row.scheme,
            row.backend or "-",
            f"{row.prefill_tokens_per_second:.1f} ({row.prefill_ratio:.2f}x)",
            f"{row.time_to_first_token_s:.3f}",
            f"{row.decode_tokens_per_second:.1f} ({row.decode_ratio:.2f}x)",
            f"{row.peak_memory_bytes / 1e9:.2f} ({row.peak_memory_bytes / found.rows[0].peak_memory_bytes:.2f}x)",
        ]
        for row in found.rows
    ]
    how = ", as CUDA graphs" if found.cuda_graphs else ""
    yield Table(f"{found.batch} x {found.prompt_tokens} tokens and {found.new_tokens} new ones{how}", columns, lines)


def remarks(found: ModelBenchmark) -> Iterator[str]:
    yield ", ".join(f"{name} {value}" for name, value in found.machine.items())
