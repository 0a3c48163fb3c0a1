"""The command `sqplus`: one function per command, which only hands its options on and prints what comes back."""

from __future__ import annotations

import errno
import functools
import io
import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from smoothquant_plus import __version__
from smoothquant_plus.errors import InputError, VerificationError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
bench = typer.Typer(no_args_is_help=True, help="Measure speed.")
app.add_typer(bench, name="bench")

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="Directory of a Hugging Face model (safetensors).", show_default=False)]
ModelOrOutput = Annotated[Path, typer.Argument(metavar="MODEL_OR_OUT", help="Directory of a model, quantized or not.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; everything else goes to stderr.")]
TEXT = "A .txt or .jsonl file, or hf:NAME?config=..&split=..&column=.. ; may be repeated."
Text = Annotated[list[str] | None, typer.Option("--text", metavar="FILE", help=f"Calibration text. {TEXT}")]
Pairs = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A .json file that declares the family of a model which this package does not know."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Samples = Annotated[int, typer.Option(help="Calibration samples, spread evenly over the text.")]
SeqLen = Annotated[int, typer.Option(help="Tokens in a sample.")]
ComputeDtype = Annotated[
    str,
    typer.Option(
        help="What blocks are run in while measuring: float32, or checkpoint: the weights' own dtype. Proofs are in float32 all the same."
    ),
]
LmHead = Annotated[
    str | None, typer.Option(help="What the output head becomes: w8a8 or w4a16; by default it stays as it is, as in both papers.")
]
Activations = Annotated[
    str | None, typer.Option(help="w8a8: token (per-token dynamic, the default), tensor (per-tensor dynamic) or static (per-tensor).")
]
Weights = Annotated[str | None, typer.Option(help="w8a8: channel (a scale per output channel, the default) or tensor.")]
GroupSize = Annotated[int | None, typer.Option(help="w4a16: input channels that share a scale: 128 (the default), 64 or 32.")]
Symmetric = Annotated[
    bool, typer.Option("--symmetric", help="w4a16: no zero points: a little smaller and less accurate, and what transformers reads.")
]
Smooth = Annotated[str, typer.Option(help="none, norms (SmoothQuant), or all (also v_proj -> o_proj and up_proj -> down_proj).")]
SamplesSearch = Annotated[int, typer.Option(help="How many of the calibration samples a search for alpha runs, 22 times each.")]
SearchMemory = Annotated[
    float | None,
    typer.Option(help="GB of memory for a search's hidden states, the rest goes to files; default: a quarter of what is free."),
]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; by default what config.json says.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; by default as many as torch takes.", min=1)]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures to this file.")]
Backend = Annotated[
    str | None, typer.Option(help="cpu, triton, torch or reference; by default the first of them that supports each layer.")
]
Arithmetic = Annotated[
    str | None, typer.Option(help="w4a8: activations of w4a16 layers in 8 bits per token too; faster, less accurate. Default: as they are.")
]
Attention = Annotated[
    str | None,
    typer.Option(help="int8: both products of attention, and the cache of keys and values, in 8 bits. Default: as in transformers."),
]

# Tables alone: whatever else is printed may be a path or a model's words, in which Rich would see markup, emoji and tabs.
out = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)


def say(text: str) -> None:
    """A line on stdout."""
    sys.stdout.write(f"{text}\n")


def complain(text: str) -> None:
    """A line on stderr."""
    sys.stderr.write(f"{text}\n")


# What a command that ran out of memory could have been given instead.
SMALLER = {
    **dict.fromkeys(("quantize", "calibrate", "eval"), "a smaller --seq-len"),
    **dict.fromkeys(("linear", "tune"), "fewer --tokens"),
    "model": "fewer --prompt-tokens",
    "tasks": "a smaller --batch-size",
    "generate": "fewer --max-new-tokens",
}
RESUMED = ("quantize", "calibrate")


def out_of_memory(error: BaseException) -> bool:
    """Whether torch, which is not imported here, or Python found no memory."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)


def command(function: Callable[..., Any], group: typer.Typer = app, **settings: Any) -> Callable[..., None]:
    """Run a command's function and end with its exit code: 0 done, 2 bad input, 3 verification failed, 130 interrupted.

    The command is named like the function, without a trailing underscore, and belongs to `group`; `settings` are typer's.
    """
    name = function.__name__.rstrip("_")

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        # Models are read from directories: nothing may look for a hub, unless data was asked for that is there. And nothing may talk on stdout.
        if name != "tasks" and not any(text.startswith("hf:") for text in kwargs.get("text") or ()):
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # what the terminal's encoding lacks is no reason to fail
        try:
            function(*args, **kwargs)
        except (InputError, VerificationError) as error:
            complain(f"error: {error}")
            raise typer.Exit(error.exit_code) from error
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            continues = ", it continues where it was" if name in RESUMED else ""
            hint = f" The disk is full: free some space and run the same command again{continues}." if full else ""
            complain(f"error: {error}.{hint}")
            raise typer.Exit(2) from error
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            smaller = [SMALLER[name]] if name in SMALLER else []
            elsewhere = ["--device cpu"] if kwargs.get("device", "cpu") != "cpu" else []
            instead = f": use {' or '.join([*smaller, *elsewhere])}" if smaller or elsewhere else ""
            complain(f"error: there is not enough memory{instead} ({str(error) or type(error).__name__}).")
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            again = ": what is finished is kept, run the same command again to continue." if name in RESUMED else "."
            complain(f"interrupted{again}")
            raise typer.Exit(130) from error

    return group.command(name, **settings)(run)


def show(value: Any, as_json: bool, human: Callable[[], None]) -> None:
    if as_json:
        sys.stdout.write(json.dumps(asdict(value) if is_dataclass(value) and not isinstance(value, type) else value) + "\n")
    else:
        human()


def show_tables(tables: Iterable[tuple[str, list[str], list[list[str]]]], remarks: Iterable[str]) -> None:
    """Each table, on a terminal; elsewhere its lines, each with the title and the names of the columns. Then the remarks."""
    for title, columns, lines in tables:
        if out.is_terminal:
            table = Table(*columns, title=title, title_justify="left")
            for cells in lines:
                table.add_row(*cells)
            out.print(table)
        else:
            for cells in lines:
                named = "; ".join(f"{column} {cell}" for column, cell in zip(columns[1:], cells[1:], strict=True))
                say(f"{title} {cells[0]}: {named}".replace("\n", ", "))
    for remark in remarks:
        say(remark)


def check_file(path: Path | None) -> None:
    """Raises InputError when there is no place for a file that is written only after long work."""
    if path is not None and (path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK)):
        raise InputError(f"--json {path}: give the name of a file in a directory that exists and can be written to.")


def save_json(path: Path | None, value: Any) -> None:
    from smoothquant_plus.files import write_json

    if path is not None:
        write_json(path, asdict(value))


def parse_dtype(name: str | None) -> Any:
    import torch

    if name is None:
        return None
    if name not in ("float32", "bfloat16", "float16"):
        raise InputError(f"unknown --dtype '{name}': choose float32, bfloat16 or float16.")
    return getattr(torch, name)


def make_search(samples: int, memory: float | None) -> Any:
    from smoothquant_plus.search import Search

    return Search(samples, None if memory is None else memory * 1e9)


@command
def quantize(
    model: Model,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="New directory for the quantized checkpoint.", show_default=False)],
    scheme: Annotated[str, typer.Option(help="What weights and activations become: w8a8 or w4a16.")] = "w8a8",
    activations: Activations = None,
    weights: Weights = None,
    group_size: GroupSize = None,
    symmetric: Symmetric = False,
    lm_head: LmHead = None,
    smooth: Smooth = "norms",
    alpha: Annotated[
        str,
        typer.Option(
            help="Smoothing strength 0..1; model: searched by the loss of the whole quantized model; block: searched for each block; "
            "default: the family's published value for w8a8, model for w4a16."
        ),
    ] = "default",
    text: Text = None,
    pairs: Pairs = None,
    statistics: Annotated[Path | None, typer.Option(help="Published activation maxima (.safetensors or .pt), instead of --text.")] = None,
    samples: Samples = 128,
    seq_len: SeqLen = 512,
    compute_dtype: ComputeDtype = "float32",
    device: Device = "cpu",
    target: Annotated[
        str, typer.Option("--for", help="vllm: refuse what vLLM could not read; here: this package's own runtime, which reads everything.")
    ] = "vllm",
    samples_search: SamplesSearch = 16,
    search_memory: SearchMemory = None,
    as_json: Json = False,
) -> None:
    """Smooth and quantize MODEL into the new checkpoint OUT. Killed at any moment, the same command continues."""
    from smoothquant_plus.pipeline import quantize as run
    from smoothquant_plus.preparation import Calibration

    calibration = Calibration(tuple(text or ()), statistics, samples, seq_len, compute_dtype, device)
    result = run(
        model,
        output,
        scheme=scheme,
        activations=activations,
        weights=weights,
        group_size=group_size,
        symmetric=symmetric,
        lm_head=lm_head,
        smooth=smooth,
        alpha=alpha,
        calibration=calibration,
        pairs=pairs,
        search=make_search(samples_search, search_memory),
        target=target,
    )

    def human() -> None:
        say(
            f"{result.output}: {result.scheme}, {result.blocks} blocks, alpha {result.alpha}, {result.bytes_before / 1e6:.1f} MB -> "
            f"{result.bytes_after / 1e6:.1f} MB, equivalence error {result.equivalence_error:.1e}, {result.seconds:.1f} s, "
            f"peak memory {result.peak_rss_mb / 1e3:.2f} GB"
        )

    show(result, as_json, human)


@command
def calibrate(
    model: Model,
    output: Annotated[Path, typer.Argument(metavar="FILE", help="New .safetensors file.", show_default=False)],
    text: Text = None,
    alpha: Annotated[
        str | None,
        typer.Option(
            help="Write smoothing factors instead of maxima, with what `quantize` takes as --alpha: a number, model, block or default."
        ),
    ] = None,
    scheme: Annotated[str, typer.Option(help="With --alpha, as all options for schemes: what is searched for, w4a16 or w8a8.")] = "w4a16",
    activations: Activations = None,
    weights: Weights = None,
    group_size: GroupSize = None,
    symmetric: Symmetric = False,
    smooth: Smooth = "norms",
    samples: Samples = 128,
    seq_len: SeqLen = 512,
    compute_dtype: ComputeDtype = "float32",
    device: Device = "cpu",
    pairs: Pairs = None,
    samples_search: SamplesSearch = 16,
    search_memory: SearchMemory = None,
    as_json: Json = False,
) -> None:
    """Measure MODEL alone: the per-channel activation maxima, for `quantize --statistics` and other tools, or with --alpha the smoothing
    factors, which as smoothing.safetensors beside MODEL are applied when vLLM quantizes it while loading."""
    from smoothquant_plus.pipeline import calibrate as run
    from smoothquant_plus.preparation import Calibration

    path = run(
        model,
        output,
        calibration=Calibration(tuple(text or ()), None, samples, seq_len, compute_dtype, device),
        pairs=pairs,
        alpha=alpha,
        scheme=scheme,
        activations=activations,
        weights=weights,
        group_size=group_size,
        symmetric=symmetric,
        smooth=smooth,
        search=make_search(samples_search, search_memory),
    )
    show({"output": str(path)}, as_json, lambda: say(str(path)))


@command
def verify(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Directory written by quantize.", show_default=False)],
    against: Annotated[Path | None, typer.Option(help="The model it was made of: repeat every block and prove the smoothing.")] = None,
    vllm: Annotated[
        bool, typer.Option("--vllm", help="Also load OUT in vLLM and compare what it answers with this package's runtime.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check hashes, shapes and every quantized weight of OUT, bit by bit."""
    from smoothquant_plus.verification import verify as run

    report = run(output, against, vllm)

    def human() -> None:
        say(f"{output}: {report.files} files, {report.tensors} tensors and {report.linears} quantized weights are as they were written")
        if report.equivalence_error is not None:
            table = Table("linear", "relative weight error")
            for name, error in report.weight_error.items():
                table.add_row(name, f"{error:.2e}")
            out.print(table)
            say(f"every tensor follows from {against}; largest equivalence error of a block {report.equivalence_error:.1e}")
        if report.vllm is not None:
            found = report.vllm
            say(
                f"vLLM answers the same: log-probabilities differ by {found.mean_difference:.1e} in the mean, {found.largest_difference:.1e} at "
                f"most ({found.own_difference:.1e} between two orders of adding up here), and {found.same_tokens} of {found.tokens} greedy "
                "tokens are the same"
            )

    show(report, as_json, human)


@command
def plot(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Directory written by quantize.", show_default=False)],
    directory: Annotated[Path | None, typer.Option("--out", help="Directory for the pictures; default: OUT/plots.")] = None,
    as_json: Json = False,
) -> None:
    """Draw the loss against alpha, and the activations before and after smoothing, as PNG and SVG."""
    from smoothquant_plus.evaluation.plot import plot as run

    paths = [str(path) for path in run(output, directory)]
    show({"files": paths}, as_json, lambda: say("\n".join(paths)))


@command
def eval_(
    model: ModelOrOutput,
    text: Annotated[list[str] | None, typer.Option("--text", metavar="FILE", help=f"Needed: text to evaluate on. {TEXT}")] = None,
    seq_len: SeqLen = 512,
    stride: Annotated[
        int | None, typer.Option(help="How far the window moves; smaller than --seq-len gives more context. Default: seq-len.")
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    backend: Backend = None,
    arithmetic: Arithmetic = None,
    attention: Attention = None,
    as_json: Json = False,
) -> None:
    """Perplexity on text."""
    from smoothquant_plus.evaluation.perplexity import evaluate as run

    how = {"device": device, "dtype": parse_dtype(dtype), "backend": backend, "arithmetic": arithmetic, "attention": attention}
    result = run(model, tuple(text or ()), seq_len=seq_len, stride=stride, **how)
    show(result, as_json, lambda: say(f"perplexity {result.perplexity:.4f} (loss {result.loss:.5f}, {result.tokens} tokens)"))


@command
def tasks(
    model: ModelOrOutput,
    task: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Needed: a task of lm-eval, or a group of them; may be repeated.")
    ] = None,
    few_shot: Annotated[int | None, typer.Option(help="Examples before each question; by default as many as the task says.", min=0)] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many questions of each task, the first ones.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Questions at once.", min=1)] = 1,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the tokenizer's chat template.")] = False,
    include: Annotated[Path | None, typer.Option(metavar="DIR", help="A directory with tasks of your own, in lm-eval's YAML.")] = None,
    run_code: Annotated[
        bool, typer.Option("--run-code", help="Let tasks such as humaneval run what the model writes, on this machine.")
    ] = False,
    device: Device = "cpu",
    dtype: Dtype = None,
    backend: Backend = None,
    arithmetic: Arithmetic = None,
    attention: Attention = None,
    as_json: Json = False,
) -> None:
    """Accuracy on tasks of lm-eval, such as lambada_openai, hellaswag or humaneval. Their data comes from the Hugging Face hub."""
    from smoothquant_plus.evaluation.tasks import evaluate_tasks as run

    how = {"device": device, "dtype": parse_dtype(dtype), "backend": backend, "arithmetic": arithmetic, "attention": attention}
    result = run(
        model,
        tuple(task or ()),
        few_shot=few_shot,
        limit=limit,
        batch_size=batch_size,
        chat=chat,
        include=include,
        run_code=run_code,
        **how,
    )

    def human() -> None:
        table = Table("task", "metric", "value", "standard error")
        for name, scores in result.tasks.items():
            for metric, value in scores.items():
                if "_stderr," not in metric:
                    error = scores.get(metric.replace(",", "_stderr,"))
                    table.add_row(name, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}")
        out.print(table)

    show(result, as_json, human)


@command
def generate(
    model: ModelOrOutput,
    prompt: Annotated[str, typer.Option(help="The text to continue.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.", min=1)] = 64,
    device: Device = "cpu",
    dtype: Dtype = None,
    backend: Backend = None,
    arithmetic: Arithmetic = None,
    attention: Attention = None,
    as_json: Json = False,
) -> None:
    """Continue a prompt, greedily."""
    from smoothquant_plus.runtime.generate import generate as run

    how = {"device": device, "dtype": parse_dtype(dtype), "backend": backend, "arithmetic": arithmetic, "attention": attention}
    text = run(model, prompt, max_new_tokens=max_new_tokens, **how)
    show({"prompt": prompt, "text": text}, as_json, lambda: say(prompt + text))


@functools.partial(command, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: ModelOrOutput,
    scheme: Annotated[
        str | None,
        typer.Option(
            help="Quantize while loading, w8a8 or w4a16: rounded to nearest, but where `sqplus calibrate` left smoothing.safetensors in MODEL."
        ),
    ] = None,
) -> None:
    """Serve a model with vLLM, OpenAI-compatible; further options are vLLM's own, such as --port 8000 or --tensor-parallel-size 2."""
    from smoothquant_plus.runtime.serve import server_command

    server, environment = server_command(model, scheme, context.args)
    complain(" ".join([*(f"{name}={value}" for name, value in environment.items()), *server]))
    os.execve(server[0], server, os.environ | environment)


@command
def inspect(model: Model, samples: Samples = 128, seq_len: SeqLen = 512, lm_head: LmHead = None, as_json: Json = False) -> None:
    """What MODEL is and what it would become: family, pairs, sizes, memory. A config.json alone is enough."""
    from smoothquant_plus.inspection import inspect as run

    found = run(model, samples, seq_len, lm_head)

    def human() -> None:
        alpha = "0.5, as none is published" if found.alpha is None else f"{found.alpha:g} (published)"
        say(f"family {found.family}, {found.blocks} blocks, {found.parameters / 1e9:.3f} B parameters")
        say(f"alpha by default: {alpha} for w8a8; searched for w4a16")
        if found.quantized is not None:
            say(f"it is quantized already ({found.quantized}): what follows is said of the full-precision model that it was made of")
        pairs = Table("source", "feeds", "smoothed by")
        for pair in found.pairs:
            pairs.add_row(pair["source"], ", ".join(pair["sinks"]), f"--smooth {pair['smooth']}")
        sizes = Table("weights", "GB on disk and to serve", "ratio")
        before = next(iter(found.sizes.values()))
        for name, size in found.sizes.items():
            sizes.add_row(name, f"{size / 1e9:.3f}", f"{before / size:.2f}x smaller" if size != before else "")
        out.print(pairs)
        out.print(sizes)
        memory = f"about {found.memory_to_quantize / 1e9:.1f} GB, and what a search for alpha may use"
        say(f"memory to quantize with {samples} samples of {seq_len} tokens: {memory}")

    show(found, as_json, human)


@command
def demo(
    output: Annotated[Path | None, typer.Option("--out", help="Keep the models of the demo in this new directory.")] = None,
    as_json: Json = False,
) -> None:
    """Quantize the small model that ships with this package, naively, with SmoothQuant and with SmoothQuant+, and compare."""
    from smoothquant_plus.demo.run import run

    found = run(output)

    def human() -> None:
        say(found.introduction)
        table = Table("model", "alpha", "perplexity", "size MB", "tokens/s")
        for row in found.rows:
            alpha = "" if row.alpha is None else f"{row.alpha:g}"
            table.add_row(row.name, alpha, f"{row.perplexity:.3f}", f"{row.megabytes:.2f}", f"{row.tokens_per_second:.0f}")
        out.print(table)
        for row in found.rows:
            say(f"\n--- {row.name}")
            say(found.prompt + row.text)
        say(found.closing)

    show(found, as_json, human)


@command
def tune(
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="NxK", help="Output and input channels; may be repeated. Default: some of Llama 7B and 70B."),
    ] = None,
    tokens: Annotated[
        str, typer.Option(help="Numbers of tokens to tune for; the largest stands for all larger ones.")
    ] = "1,8,16,32,64,128,256,512,1024,4096",
    scheme: Annotated[str | None, typer.Option(help="w8a8 or w4a16; by default both.")] = None,
    device: Device = "cuda",
    as_json: Json = False,
) -> None:
    """Time the Triton kernels on this GPU, and keep what is fastest for its layers in a file that later runs read."""
    from smoothquant_plus.evaluation.tune import tables
    from smoothquant_plus.evaluation.tune import tune as run

    found = run(shape, tokens, scheme, device)
    show(asdict(found) | {"file": str(found.file)}, as_json, lambda: show_tables(tables(found), [f"written to {found.file}"]))


@functools.partial(command, group=bench)
def linear(
    scheme: Annotated[str | None, typer.Option(help="w8a8, w4a16 or w4a8 (w4a16 with activations in 8 bits, too); by default all.")] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="NxK", help="Output and input channels; may be repeated. Default: some of Llama 7B, 13B and 70B."),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="How many tokens are multiplied at once. Default: 1,4,16,64,256; on CUDA also 1024 and 4096.")
    ] = None,
    threads: Annotated[
        str | None, typer.Option(help="CPU threads; several, as 1,2, take turns and are compared. Default: as many as torch takes.")
    ] = None,
    device: Device = "cpu",
    json_file: JsonFile = None,
) -> None:
    """One linear layer: every backend and what other libraries offer, against the machine's limits."""
    from smoothquant_plus.evaluation.benchmark_linear import bench_linear, remarks, tables

    check_file(json_file)
    found = bench_linear(scheme, shape, tokens, threads, device)
    show_tables(tables(found), remarks(found))
    save_json(json_file, found)


@functools.partial(command, group=bench)
def model(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL_OR_OUT...", help="Directories of models.", show_default=False)],
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt, which are random.", min=1)] = 256,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=2)] = 32,
    batch: Annotated[int, typer.Option(help="Prompts at once.", min=1)] = 1,
    threads: Threads = None,
    device: Device = "cpu",
    backend: Backend = None,
    eager: Annotated[bool, typer.Option("--eager", help="On CUDA: without CUDA graphs, for models that they cannot hold.")] = False,
    attention: Annotated[
        str | None, typer.Option(help="int8: also run each model with both products of attention, and its cache, in 8 bits.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Whole models, quantized or not, beside each other: prefill, decoding and memory. Ratios are to the first."""
    from smoothquant_plus.evaluation.benchmark_model import bench_model, remarks, tables

    check_file(json_file)
    found = bench_model(models, prompt_tokens, new_tokens, batch, threads, device, backend, eager, attention)
    show_tables(tables(found), remarks(found))
    save_json(json_file, found)


@functools.partial(command, group=bench, context_settings={"ignore_unknown_options": True})
def serve_(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL_OR_OUT... [OPTIONS OF VLLM]",
            help="Directories of models. One alone in full precision is also quantized while it is loaded, in each scheme.",
            show_default=False,
        ),
    ],
    requests: Annotated[int, typer.Option(help="Requests in all.", min=1)] = 32,
    input_tokens: Annotated[int, typer.Option(help="Tokens of each prompt, which are random.", min=1)] = 256,
    output_tokens: Annotated[int, typer.Option(help="Tokens to generate for each.", min=2)] = 32,
    concurrency: Annotated[int, typer.Option(help="Requests at a time.", min=1)] = 8,
    json_file: JsonFile = None,
) -> None:
    """vLLM's server on each model, with vLLM's own benchmark: throughput, time to the first token and for each further one. Ratios are to the
    first; further options are the server's, such as --max-model-len 4096."""
    from smoothquant_plus.evaluation.benchmark_serve import bench_serve, remarks, tables

    check_file(json_file)
    first = next((index for index, word in enumerate(models) if word.startswith("-")), len(models))
    found = bench_serve([Path(word) for word in models[:first]], requests, input_tokens, output_tokens, concurrency, models[first:])
    show_tables(tables(found), remarks(found))
    save_json(json_file, found)


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """SmoothQuant and SmoothQuant+: 8-bit and 4-bit checkpoints of language models that answer like the original."""
    if version:
        say(__version__)
        raise typer.Exit(0)


def main() -> None:
    app(prog_name="sqplus")


if __name__ == "__main__":
    main()
