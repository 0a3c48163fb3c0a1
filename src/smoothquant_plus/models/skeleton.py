"""A model without values, and what of it a checkpoint has: from config.json and the headers of the weights alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.pytorch_utils import Conv1D

from smoothquant_plus.errors import InputError, did_you_mean
from smoothquant_plus.method.scheme import Scheme
from smoothquant_plus.models.checkpoint import Checkpoint, read_config, read_scheme
from smoothquant_plus.models.experts import unfuse
from smoothquant_plus.models.families import (
    FAMILIES,
    FAMILY_FILE,
    Family,
    UnknownFamilyError,
    active_pairs,
    check_refusals,
    find_family,
    pairs_in,
    read_family,
    supported,
    unknown,
)
from smoothquant_plus.models.rows import source_rows

# What transformers raises for bad values in config.json: each family finds them in its own way, if only by dividing by them.
BAD_CONFIG = (
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError, OSError),
    StrictDataclassError,
)


def load_config(directory: Path) -> Any:
    """The transformers configuration of a model directory (config.json alone is enough).

    Remote code is never run. Raises InputError for a missing file, a model type that transformers does not know, or bad values.
    """
    declared = read_config(directory)
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except BAD_CONFIG as error:
        if "auto_map" in declared:
            raise InputError(
                f"{directory} brings its own model code (auto_map in config.json), which is not run. Use a version of the model that "
                f"transformers supports itself.{did_you_mean(str(declared.get('model_type')), supported())}"
            ) from error
        if declared.get("model_type") not in supported():
            raise unknown(str(declared.get("model_type") or "(none)")) from error
        raise InputError(f"{directory / 'config.json'} is not a usable configuration: {error!r}") from error
    layers = getattr(config.get_text_config(), "num_hidden_layers", 1)
    if layers < 1:
        raise InputError(f"{directory / 'config.json'} has num_hidden_layers {layers}: there is no decoder block.")
    # What is built from this is always the unquantized skeleton; linears are replaced by us.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def declared_family(directory: Path) -> Path | None:
    """The file beside config.json that declares the family of the model in `directory`, if there is one."""
    return directory / FAMILY_FILE if (directory / FAMILY_FILE).is_file() else None


def open_family(config: Any, declared: Path | None) -> tuple[str, Family]:
    """The family of a model, with its name: what the file `declared` says, or the row of the configuration's model_type. Raises InputError
    when there is none, naming the row that would fit."""
    if declared is not None:
        family = read_family(declared)
        check_refusals(family, config.get_text_config())
        return "declared", family
    try:
        return find_family(config)
    except UnknownFamilyError as error:
        raise InputError(f"{error}{_nearest(config)}") from None


def _nearest(config: Any) -> str:
    """' The nearest is ...', for the row whose blocks and pairs a model of no family has."""
    try:
        model: Any = build_skeleton(config, torch.float32)
    except InputError:
        return ""
    fitting: dict[str, int] = {}
    for name, family in FAMILIES.items():
        try:
            blocks = decoder_blocks(model, family)
            check_pairs(family, config.get_text_config(), blocks)
            modules = dict(blocks[0].named_modules())
            fitting[name] = len(list(pairs_in(modules, list(active_pairs(family, config.get_text_config(), "all")))))
        except (InputError, AttributeError, RuntimeError):
            continue
    if not fitting:
        return ""
    best = max(fitting, key=fitting.__getitem__)
    return f" The nearest is '{best}', whose pairs this model's blocks have too; whether they are right for it, a run's proof decides."


def build_skeleton(config: Any, dtype: torch.dtype) -> nn.Module:
    """The transformers model with every parameter on the meta device (no memory) and its computed buffers, such as rotary
    frequencies, real. Whatever computes as a linear layer, one of many fused experts too, is an nn.Linear.

    Raises InputError for a configuration that transformers cannot build."""
    # In this order: of a wrapper, AutoModelForCausalLM may give the language tower alone, under names that its checkpoint does not have (Qwen3.5).
    auto = AutoModelForImageTextToText if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else AutoModelForCausalLM
    try:
        with init_empty_weights(include_buffers=False):
            model = auto.from_config(config, dtype=dtype, trust_remote_code=False)
        unfuse(model)
    except BAD_CONFIG as error:
        raise InputError(f"{Path(config.name_or_path) / 'config.json'} does not describe a model that can be built: {error!r}") from error
    model.tie_weights()  # outside: the context gives each assigned parameter a tensor of its own
    for path, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            columns, rows = module.weight.shape
            model.set_submodule(path, nn.Linear(columns, rows, device="meta", dtype=dtype))
    return model.eval()


def check_positions(config: Any, tokens: int, asked: str) -> None:
    """Raises InputError when `asked`, an option that makes sequences of `tokens` tokens, is more than the model has positions for."""
    longest = getattr(config, "max_position_embeddings", None)
    if longest and tokens > longest:
        raise InputError(f"{asked} is more than the {longest} positions that the model has (max_position_embeddings in config.json).")


def decoder_blocks(model: nn.Module, family: Family) -> Any:
    """The list of the model's decoder blocks. Raises InputError when it is not where the family says."""
    path, _, leaf = family.blocks.rpartition(".")
    found = dict(model.named_modules()).get(path)
    blocks = getattr(found, leaf, None)
    if not isinstance(blocks, nn.ModuleList):
        lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        raise InputError(f"the model has no list of blocks at '{family.blocks}', as its family declares; there is {', '.join(lists)}.")
    return blocks


def linears(block: nn.Module, family: Family) -> dict[str, nn.Linear]:
    """The linear layers of a block that are quantized, by their path inside it."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear) and name not in family.unquantized}


def quantized_linears(model: Any, family: Family, scheme: Scheme) -> dict[str, tuple[nn.Linear, Scheme]]:
    """Every linear layer of the model that `scheme` quantizes, by its path, with what becomes of it: those of the blocks that it does not ignore,
    and the output head if the scheme has one for it. Raises InputError for a head that is not a linear layer."""
    names = {name for name in scheme.ignore if not name.startswith("re:")}
    patterns = [re.compile(name.removeprefix("re:")) for name in scheme.ignore if name.startswith("re:")]

    def ignored(path: str) -> bool:
        """As compressed-tensors reads it: names are whole, patterns begin at the beginning."""
        spellings = [spelling.removesuffix(".weight") for spelling in family.spellings(f"{path}.weight")]
        return not names.isdisjoint(spellings) or any(pattern.match(spelling) for pattern in patterns for spelling in spellings)

    found = {
        f"{family.blocks}.{index}.{name}": (linear, scheme)
        for index, block in enumerate(decoder_blocks(model, family))
        for name, linear in linears(block, family).items()
        if not ignored(f"{family.blocks}.{index}.{name}")
    }
    if scheme.head is not None:
        path, head = head_path(model), model.get_output_embeddings()
        if path is None or not isinstance(head, nn.Linear):
            raise InputError(f"the output head of this model, {type(head).__name__}, is not a linear layer: leave out --lm-head.")
        found[path] = (head, scheme.head)
    return found


def is_transposed(family: Family, name: str, tensor: Tensor) -> bool:
    """Whether the model's tensor `name` is stored as (in, out)."""
    return family.transposed and name.startswith(f"{family.blocks}.") and name.endswith(".weight") and tensor.ndim == 2


def check_pairs(family: Family, config: Any, blocks: Any) -> None:
    """Raises InputError when a pair names a module that a block does not have, or channels that do not match."""
    for block in blocks:
        modules = dict(block.named_modules())
        quantized = set(linears(block, family))
        for pair in pairs_in(modules, list(active_pairs(family, config, "all"))):
            source = modules[pair.source]
            if getattr(source, "weight", torch.empty(1)) is not None and not _is_source(source):
                raise InputError(f"'{pair.source}' is the source of a pair, and neither a norm nor a linear layer.")
            if isinstance(source, nn.Linear) and pair.source not in quantized:  # rescaled, its weight would be rounded to 16 bits
                raise InputError(f"'{pair.source}' is the source of a pair, and left unquantized: a linear layer cannot be both.")
            for sink in pair.sinks:
                if getattr(getattr(modules[sink], "weight", None), "ndim", 0) != 2:
                    raise InputError(f"'{sink}' is a sink of {pair.source}, and not a linear layer.")
                found = modules[sink].weight.shape[1]
                channels = found
                if getattr(source, "weight", None) is not None:
                    channels = len(source_rows(pair.rows, config, len(source.weight), found))
                # The heads that share a value head read more channels than it has.
                if found != channels if pair.rows in ("each", "last_half") else found % channels:
                    raise InputError(
                        f"the pair {pair.source} -> {sink} does not fit: {channels} channels out and {found} in, with rows '{pair.rows}'. "
                        "Its row in models/families.py does not fit this model."
                    )
            if not quantized.intersection(pair.sinks):
                raise InputError(f"none of the sinks of {pair.source} is quantized, so there is nothing to smooth it for.")


def _is_source(module: Any) -> bool:
    """Whether it is a linear layer or has a gain for each channel."""
    return isinstance(module, nn.Linear) or getattr(getattr(module, "weight", None), "ndim", 0) == 1


def open_directory(directory: Path, dtype: torch.dtype | None = None) -> tuple[Checkpoint, Family, Any, Scheme | None]:
    """What lies in `directory`: its tensors, of which the headers are read; its family; its model without values, in `dtype` or what config.json
    says; and the scheme that it is quantized with, None for full precision. Raises InputError for what cannot be read or run."""
    config = load_config(directory)
    _, family = open_family(config, declared_family(directory))
    checkpoint = Checkpoint(directory)
    model = build_skeleton(config, dtype or config.dtype or torch.float32)
    return checkpoint, family, model, read_scheme(checkpoint.config, directory, head_paths(model, family))


def disk_names(model: nn.Module, checkpoint: Checkpoint, family: Family, scheme: Scheme | None = None) -> dict[str, str]:
    """{name in the model: name in the checkpoint} for every tensor of the model; an output head that is tied to the input embedding and
    not stored is left out. With the `scheme` of a quantized checkpoint, the weights of its linears are named as if they were not packed.

    Raises InputError for a tensor that is not in the checkpoint, has another shape, or is integers that nothing explains. Only headers are
    read for that.
    """
    quantized: dict[str, Scheme] = {}
    if scheme is not None:
        quantized = {f"{path}.weight": own for path, (_, own) in quantized_linears(model, family, scheme).items()}
    head = f"{head_path(model)}.weight"
    tied = head if getattr(model.config, "tie_word_embeddings", False) and head not in quantized else None
    names: dict[str, str] = {}
    missing = []
    for name, tensor in model.state_dict().items():
        ending = "_packed" if name in quantized and quantized[name].weights.bits == 4 else ""
        found = next((spelling for spelling in family.spellings(name) if spelling + ending in checkpoint.tensors), None)
        if found is not None:
            names[name] = found
            if not ending:
                shape = tensor.shape[::-1] if is_transposed(family, name, tensor) else tensor.shape
                _check_stored(checkpoint, found, shape, name in quantized)
        elif name != tied:
            missing.append(name)
        if name.endswith(".weight") and name not in quantized:
            bases = [spelling.removesuffix(".weight") for spelling in family.spellings(name)]
            stray = next((base for base in bases if f"{base}.weight_scale" in checkpoint.tensors), None)
            if stray is not None:
                raise InputError(
                    f"'{stray}' is quantized in {checkpoint.directory}, and its config.json does not say how: a layer that is not in a decoder "
                    "block needs a config group of its own, and one that `ignore` names has no scales."
                )
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"{checkpoint.directory} has no tensor '{missing[0]}'{more}, which its config.json asks for: the checkpoint is incomplete."
        )
    return names


def _check_stored(checkpoint: Checkpoint, name: str, shape: torch.Size, quantized: bool) -> None:
    info = checkpoint.tensors[name]
    path = checkpoint.directory / info.shard
    if info.shape != shape:
        raise InputError(
            f"'{name}' in {path} has shape {info.shape}, but config.json asks for {tuple(shape)}: one of the two belongs to another model."
        )
    if not info.dtype.is_floating_point and not quantized:
        dtype = str(info.dtype).removeprefix("torch.")
        if checkpoint.config.get("quantization_config"):
            raise InputError(f"'{name}' in {path} is {dtype}, and not one of the layers that its family quantizes.")
        raise InputError(
            f"'{name}' in {path} is {dtype}, and config.json has no quantization_config that says what it stands for: use the full-precision "
            "checkpoint."
        )


def head_path(model: Any) -> str | None:
    """The module path of the output head, such as 'lm_head'."""
    return path_of(model, model.get_output_embeddings())


def head_paths(model: Any, family: Family) -> list[str]:
    """The output head's path in the model, and what it is called in checkpoints."""
    return [name.removesuffix(".weight") for name in family.spellings(f"{head_path(model)}.weight")]


def path_of(model: nn.Module, wanted: Any) -> str | None:
    """The path of the module `wanted` in the model."""
    return next((path for path, module in model.named_modules() if module is wanted), None)
