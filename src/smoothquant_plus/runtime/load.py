"""A checkpoint as a transformers model on a device, tensor by tensor: there is never a full-precision copy of a quantized model."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from smoothquant_plus.errors import InputError
from smoothquant_plus.method.scheme import Scheme, with_arithmetic
from smoothquant_plus.models.blocks import assign, check_device
from smoothquant_plus.models.checkpoint import Checkpoint, read_linear
from smoothquant_plus.models.families import Family
from smoothquant_plus.models.skeleton import decoder_blocks, disk_names, head_path, is_transposed, open_directory, quantized_linears
from smoothquant_plus.progress import note, steps
from smoothquant_plus.runtime.attention import check_attention, use_int8
from smoothquant_plus.runtime.fuse import fuse
from smoothquant_plus.runtime.linear import QuantLinear
from smoothquant_plus.runtime.unquantized import multiplies, speed_up


def load(
    directory: str | Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    arithmetic: str | None = None,
    attention: str | None = None,
) -> Any:
    """The model in `directory`, quantized or not, ready to call, `generate()` and torch.compile.

    `dtype` is what everything but the quantized products is computed in (default: what config.json says). `backend` is 'cpu', 'triton', 'torch',
    'reference', or None to choose for each layer. `arithmetic` 'w4a8' multiplies the 4-bit weights of a W4A16 checkpoint with activations
    rounded to 8 bits per token: faster, and less accurate. `attention` 'int8' computes both products of attention in 8 bits and keeps
    keys and values in them. Raises InputError for a checkpoint, device, backend or attention that cannot be used.
    """
    directory = Path(directory)
    device = check_device(device)
    checkpoint, family, model, scheme = open_directory(directory, dtype)
    dtype = dtype or model.config.dtype or torch.float32
    if attention is not None:
        check_attention(model, attention, device)
    if scheme is None and backend is not None:
        raise InputError(f"{directory} is not quantized, so no backend can be chosen for it.")
    if scheme is None and arithmetic is not None:
        raise InputError(f"{directory} is not quantized, so no arithmetic can be chosen for it.")
    if scheme is not None:
        with_arithmetic(scheme, arithmetic)  # raises before anything is read
    if scheme is None and torch.device(device).type == "cpu" and not multiplies(dtype):
        name = str(dtype).removeprefix("torch.")
        note(
            f"PyTorch has no instructions of this processor for products in {name}: in float32 (--dtype float32) this model is several times as fast"
        )
    if (directory / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{directory / 'generation_config.json'} cannot be read: {error}") from error
    names = disk_names(model, checkpoint, family, scheme)
    buffers = dict(model.named_buffers())
    for name, buffer in buffers.items():
        assign(model, name, buffer.to(device))

    blocks = decoder_blocks(model, family)
    quantized = quantized_linears(model, family, scheme) if scheme else {}
    head_at = head_path(model)
    with steps("load layer", len(quantized)) as progress:
        for path, (linear, own) in quantized.items():
            run_as = with_arithmetic(own, arithmetic) if scheme and own.name == scheme.name else own  # a head may have another scheme
            model.set_submodule(path, _read_linear(checkpoint, family, names, path, linear, run_as, device, dtype, backend))
            progress.step()
    kept = in_float32(model, dtype)
    for name, disk in names.items():
        if name.rpartition(".")[0] not in quantized:
            wanted = torch.float32 if kept and kept.search(name) else dtype
            tensor = checkpoint.read(disk, finite=name not in buffers, dtype=wanted)
            if is_transposed(family, name, tensor):
                tensor = tensor.t().contiguous()
            # Buffers, such as a router's correction of its scores, keep their own dtype.
            assign(model, name, tensor.to(device, tensor.dtype if name in buffers else wanted))
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    stored = head_at in {name.rpartition(".")[0] for name in names}
    if head_at in quantized or (stored and not torch.equal(head.weight, table.weight)):
        model.config.tie_word_embeddings = False  # whatever config.json says, the checkpoint has a head of its own
    model.tie_weights()
    fuse(blocks)
    if attention is not None:
        use_int8(model)
    if scheme is not None:
        model.save_pretrained = partial(_refuse_to_save, directory)
        if model.device.type == "cpu":  # what is not quantized stays as transformers has it
            speed_up(model)
    return model.eval()


def _refuse_to_save(directory: Path, *_: Any, **__: Any) -> None:
    raise InputError(f"a quantized model cannot be saved: its weights are packed for the kernels here. Copy its directory, {directory}.")


def in_float32(model: Any, dtype: torch.dtype) -> re.Pattern[str] | None:
    """What transformers keeps in float32 in a model of 16 bits, as a pattern for names: routers of some mixtures, whose ties 16 bits would make."""
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) if dtype in (torch.float16, torch.bfloat16) else None
    return re.compile("|".join(rf"(^|\.){path}($|\.)" for path in kept)) if kept else None


def _read_linear(
    checkpoint: Checkpoint,
    family: Family,
    names: dict[str, str],
    path: str,
    linear: nn.Linear,
    scheme: Scheme,
    device: str,
    dtype: torch.dtype,
    backend: str | None,
) -> QuantLinear:
    disk = names[f"{path}.weight"].removesuffix(".weight")
    transposed = is_transposed(family, f"{path}.weight", linear.weight)
    weight, input_scale = read_linear(checkpoint, disk, scheme, linear.out_features, linear.in_features, transposed)
    bias = checkpoint.read(names[f"{path}.bias"]).to(device=device, dtype=dtype) if linear.bias is not None else None
    input_scale = None if input_scale is None else input_scale.to(device)
    return QuantLinear(weight.to(device), scheme, input_scale=input_scale, bias=bias, backend=backend)
