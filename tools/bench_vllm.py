"""Tokens a second inside vLLM on a CPU, of a random Llama in bfloat16 and quantized, on this package's kernels and on vLLM's own.

    python tools/bench_vllm.py --work DIR [--hidden 2048] [--layers 16] [--threads 1]       prints a markdown table (docs/benchmarks.md)

Needs vLLM (`make test-vllm` installs it in .venv-vllm). Each engine runs, compiled, in a process of its own; all of them stay loaded and
take turns. What vLLM cannot run on this processor is named with its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from make_random_model import SHAPES, make
from smoothquant_plus.evaluation.machine import describe
from smoothquant_plus.pipeline import quantize

ROUNDS = 7
NEW, LONG = 16, 512  # tokens that are decoded, and those of the long prompt
MEASURED = {"decode, batch 1": (1, 16, NEW), "decode, batch 16": (16, 16, NEW), f"prefill {LONG}": (1, LONG, 1)}


def worker(directory: str) -> None:
    """Load the model, say so, and answer each line of stdin, a name of MEASURED, with tokens a second."""
    import random

    from vllm import LLM, SamplingParams

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM's own words
    engine = LLM(directory, dtype="bfloat16", max_model_len=1024, max_num_seqs=16, gpu_memory_utilization=0.2, enable_prefix_caching=False)
    pick = random.Random(0)

    def seconds(batch: int, prompt: int, new: int) -> float:
        prompts = [{"prompt_token_ids": pick.choices(range(256), k=prompt)} for _ in range(batch)]
        how = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        start = time.perf_counter()
        engine.generate(prompts, how, use_tqdm=False)
        return time.perf_counter() - start

    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        batch, prompt, new = MEASURED[line.strip()]
        first = seconds(batch, prompt, 1)
        rate = prompt / first if new == 1 else batch * (new - 1) / (seconds(batch, prompt, new) - first)
        print(json.dumps(rate), file=answers, flush=True)
    engine.llm_engine.engine_core.shutdown()


def start(directory: Path, threads: int, plugins: bool) -> subprocess.Popen[str]:
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
    environment |= {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"} | ({} if plugins else {"VLLM_PLUGINS": ""})
    command = [sys.executable, __file__, "--worker", str(directory)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | environment, **pipes)


def ask(process: subprocess.Popen[str], name: str) -> float | None:
    """Tokens a second, None when the process has ended."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(f"{name}\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None
    answer = process.stdout.readline()
    return json.loads(answer) if answer else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help="directory for the models")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker)
        return
    name = f"{options.hidden}x{options.layers}"
    model = options.work / name
    if not model.exists():
        heads = options.hidden // 64
        shape = {"hidden": options.hidden, "intermediate": options.hidden * 11 // 4, "heads": heads, "kv_heads": heads}
        make(model, SHAPES["1b"] | shape | {"layers": options.layers}, torch.bfloat16)
    engines = {"bfloat16": (model, False)}
    for scheme in ("w8a8", "w4a16"):
        out = options.work / f"{name}-{scheme}"
        quantize(model, out, scheme=scheme, smooth="none")
        engines |= {f"{scheme}, vLLM's kernels": (out, False), f"{scheme}, ours": (out, True)}
    out = options.work / f"{name}-w4a16-head"
    quantize(model, out, scheme="w4a16", smooth="none", lm_head="w8a8")
    engines["w4a16, its head w8a8, ours"] = (out, True)
    processes: dict[str, subprocess.Popen[str]] = {}
    rates: dict[str, dict[str, list[float]]] = {}
    for engine, (directory, plugins) in engines.items():  # one after the other: each compiles, and runs everything once
        processes[engine] = start(directory, options.threads, plugins)
        ready = processes[engine].stdout.readline()  # type: ignore[union-attr]
        if ready and all(ask(processes[engine], measured) for measured in MEASURED):
            rates[engine] = {measured: [] for measured in MEASURED}
        else:
            print(f"{engine}: it does not run here, see its messages", file=sys.stderr)
    for _ in range(ROUNDS):
        for measured in MEASURED:
            for engine, found in rates.items():
                found[measured].append(ask(processes[engine], measured) or 0.0)
    for process in processes.values():
        process.communicate()  # the end of its input ends it, and the processes that it started
    machine = describe(options.threads, torch.device("cpu"))
    print(f"Llama, hidden {options.hidden}, {options.layers} layers; {', '.join(f'{key} {value}' for key, value in machine.items())}\n")
    print(f"| tokens/s (ratio to bfloat16) | {' | '.join(MEASURED)} |\n|---|{'---|' * len(MEASURED)}")
    for engine, found in rates.items():
        cells = [f"{median(own):.1f} ({median(own) / median(rates['bfloat16'][key]):.2f}x)" for key, own in found.items()]
        print(f"| {engine} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
