"""A decoder as a stream of blocks: the skeleton has no weights, one block at a time is materialized, run and released."""

from __future__ import annotations

import ctypes
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
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
from smoothquant_plus.method.statistics import ChannelMaxima
from smoothquant_plus.models.checkpoint import Checkpoint, read_config, read_scheme
from smoothquant_plus.models.experts import share_with_unreached, unfuse
from smoothquant_plus.models.families import (
    FAMILIES,
    FAMILY_FILE,
    Family,
    Pair,
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

OUTSIDE_BYTES = 1 << 30

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # in glibc's malloc.h

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
            raise unknown(declared.get("model_type") or "(none)") from error
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


@dataclass(frozen=True)
class Call:
    """The arguments of one block's forward, besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Stream:
    """Hidden states on their way through the decoder, per batch (samples, tokens, hidden), and how each block is called.

    `calls[batch][block]`: each block's own arguments, so that sliding windows and per-layer masks are right.
    """

    hidden: Sequence[Tensor]
    calls: list[list[Call]] = field(default_factory=list)


class _StopForward(Exception):
    """Raised in the last block, to end the model's forward before its head."""


class Decoder:
    """The model in `checkpoint` as a stream of blocks. `dtype` is what blocks compute in, `device` where they do; `declared` is a file that
    declares its family."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, device: str = "cpu", declared: Path | None = None
    ) -> None:
        give_memory_back()
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.device = torch.device(device)
        config = load_config(checkpoint.directory)
        self.config: Any = config.get_text_config()
        self.declared = declared
        self.family_name, self.family = open_family(config, self.declared)
        self.model: Any = build_skeleton(config, dtype)
        for name, buffer in list(self.model.named_buffers()):
            assign(self.model, name, buffer.to(self.device))
        self.blocks: Any = decoder_blocks(self.model, self.family)
        self._names = disk_names(self.model, checkpoint, self.family)
        check_pairs(self.family, self.config, self.blocks)
        for name in self.family.unquantized if declared is not None else ():
            if not any(name in dict(block.named_modules()) for block in self.blocks):
                raise InputError(f"{declared} leaves '{name}' unquantized, which no block has.")

    def __len__(self) -> int:
        return len(self.blocks)

    def path(self, index: int) -> str:
        """The module path of block `index`, such as 'model.layers.3'."""
        return f"{self.family.blocks}.{index}"

    def in_blocks(self, name: str) -> bool:
        return name.startswith(f"{self.family.blocks}.")

    @cached_property
    def known_names(self) -> set[str]:
        """Names in the checkpoint of the tensors that the model has."""
        return set(self._names.values())

    @cached_property
    def head_path(self) -> str:
        """The module path of the output head, such as 'lm_head'; empty when the model has none."""
        return head_path(self.model) or ""

    @cached_property
    def head_names(self) -> set[str]:
        """Names in the checkpoint of the output head's own tensors: none when it is tied to the input embedding and not stored."""
        return {disk for name, disk in self._names.items() if name.startswith(f"{self.head_path}.")}

    @property
    def head_is_stored(self) -> bool:
        """Whether the output head has a weight of its own in the checkpoint, and is not tied to the input embedding."""
        return f"{self.head_path}.weight" in self._names

    def disk_name(self, name: str) -> str:
        """The name in the checkpoint of the model's tensor `name`; of an output head that is tied and not stored, the embedding's."""
        if name == f"{self.head_path}.weight" and not self.head_is_stored:
            name = f"{path_of(self.model, self.model.get_input_embeddings())}.weight"
        return self._names[name]

    def stored_dtype(self, name: str) -> torch.dtype:
        return self.checkpoint.tensors[self.disk_name(name)].dtype

    def block_tensors(self, index: int) -> list[str]:
        """Names in the checkpoint of every tensor under block `index`, the model's own and any that it ignores."""
        prefix = self.path(index) + "."
        return [name for name in self.checkpoint.tensors if name.startswith(tuple(self.family.spellings(prefix)))]

    @cached_property
    def outside(self) -> list[list[str]]:
        """Names in the checkpoint of everything outside the blocks except the output head's own tensors, in groups of about a gigabyte or of
        one tensor: what may be in memory together."""
        inside = {name for index in range(len(self)) for name in self.block_tensors(index)}
        groups: list[list[str]] = []
        size = 0
        for name, info in self.checkpoint.tensors.items():
            if name in inside or name in self.head_names:
                continue
            if not groups or size + info.nbytes > OUTSIDE_BYTES:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += info.nbytes
        return groups

    @contextmanager
    def block(self, index: int, dtype: torch.dtype | None = None, linears: bool = True) -> Iterator[nn.Module]:
        """Block `index` with its weights in memory, in `dtype` (default: the compute dtype), those of the linears that are quantized only
        where `linears` says so; released on leaving."""
        block = self.blocks[index]
        try:
            self.materialize(index, dtype or self.dtype, linears)
            yield block
        finally:
            for name in block.state_dict():
                assign(block, name, torch.empty_like(_get(block, name), device="meta"))

    def materialize(self, index: int, dtype: torch.dtype, linears: bool = True) -> None:
        """Read the weights of block `index`, anew if they were read before, as `dtype`."""
        # Buffers, such as a router's correction of its scores, stay in the dtype that they are stored in.
        buffers = dict(self.blocks[index].named_buffers())
        left_out = set() if linears else {f"{name}.weight" for name in self.linears(index)}
        for name in self.blocks[index].state_dict():
            if name not in left_out:
                assign(self.blocks[index], name, self.read(f"{self.path(index)}.{name}", None if name in buffers else dtype))

    def read(self, name: str, dtype: torch.dtype | None) -> Tensor:
        """The model's tensor `name`, as the model has it and in `dtype` (None: the stored one)."""
        tensor = self.checkpoint.read(self.disk_name(name))
        if is_transposed(self.family, name, tensor):
            tensor = tensor.t().contiguous()
        return tensor.to(self.device, dtype)

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """The linear layers of block `index` that are quantized, by their path inside it."""
        return linears(self.blocks[index], self.family)

    def pairs(self, index: int, pairs: Sequence[Pair]) -> list[Pair]:
        """The `pairs` as block `index` has them: with each expert's name."""
        return list(pairs_in(dict(self.blocks[index].named_modules()), pairs))

    @contextmanager
    def _with_stubs(self, stub: Callable[[int, Tensor, Call], Tensor]) -> Iterator[None]:
        """Let the model be called with `stub(index, hidden states, other arguments)` in place of its blocks.

        The modules around the blocks are read when they are first called, and released at the end.
        """
        inside = {id(module) for module in self.blocks.modules()}
        outside = {
            name: m for name, m in self.model.named_modules() if id(m) not in inside and any(True for _ in m.parameters(recurse=False))
        }
        loaded: list[nn.Module] = []
        hooks = []

        def load(module: nn.Module, path: str) -> None:
            if module in loaded:
                return
            loaded.append(module)
            # Embedding tables stay in their stored dtype: rows are converted when they are looked up.
            dtype = None if isinstance(module, nn.Embedding) else self.dtype
            for name in [name for name, _ in module.named_parameters(recurse=False)]:
                assign(module, name, self.read(f"{path}.{name}", dtype))

        for path, module in outside.items():
            hooks.append(module.register_forward_pre_hook(lambda m, _args, path=path: load(m, path)))
            if isinstance(module, nn.Embedding):
                hooks.append(module.register_forward_hook(lambda _m, _args, output: output.to(self.dtype)))

        def stand_in(index: int) -> Callable[..., Any]:
            def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
                output = stub(index, hidden, Call(args, kwargs))
                return (output,) if self.family.returns_tuple else output

            return forward

        for index, block in enumerate(self.blocks):
            block.forward = stand_in(index)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for block in self.blocks:
                del block.forward
            for module in loaded:
                for name, parameter in list(module.named_parameters(recurse=False)):
                    assign(module, name, torch.empty_like(parameter, device="meta"))

    @torch.no_grad()
    def embed(self, batches: list[Tensor]) -> Stream:
        """Run token ids, per batch (samples, tokens), up to the first block: the hidden states there and every block's arguments.

        Only the modules on the way (embeddings, positions) are read, and released again.
        """
        hidden: list[Tensor] = []
        stream = Stream(hidden)
        calls: list[Call] = []
        known: dict[Any, Tensor] = {}

        def catch(index: int, states: Tensor, call: Call) -> Tensor:
            if index == 0:
                hidden.append(states.to("cpu", self.dtype))
            calls.append(Call(_share(call.args, known), _share(call.kwargs, known)))
            if index == len(self.blocks) - 1:
                raise _StopForward
            return states

        with self._with_stubs(catch):
            for batch in batches:
                calls = []
                try:
                    self.model(input_ids=batch.to(self.device), use_cache=False)
                except _StopForward:
                    stream.calls.append(calls)
        return stream

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], tuple[Tensor, Tensor]]]:
        """A function from the last block's output (samples, tokens, hidden) to the final hidden states, which are what the output head
        reads (behind the last norm), and the logits (samples, tokens, vocabulary), both in the compute dtype.

        The last norm and the head stay in memory until the end.
        """
        given: list[Tensor] = []
        final: list[Tensor] = []

        def replay(index: int, states: Tensor, call: Call) -> Tensor:
            return given[-1] if index == len(self.blocks) - 1 else states

        @torch.no_grad()
        def run(hidden: Tensor) -> tuple[Tensor, Tensor]:
            given[:] = [hidden.to(self.device, self.dtype)]
            # What goes in at the bottom is replaced at the last block, so that no embedding table has to be read for it.
            logits = self.model(inputs_embeds=given[-1], use_cache=False).logits
            return final.pop(), logits

        hook = self.model.get_output_embeddings().register_forward_pre_hook(lambda _m, args: final.append(args[0]))
        try:
            with self._with_stubs(replay):
                yield run
        finally:
            hook.remove()

    @torch.no_grad()
    def run(self, block: nn.Module, index: int, stream: Stream, batch: int, dtype: torch.dtype | None = None) -> Tensor:
        """The output of block `index` for one batch of the stream, on the CPU; computed in `dtype` (default: the compute dtype)."""
        call = stream.calls[batch][index]
        dtype = dtype or self.dtype
        output = block(stream.hidden[batch].to(self.device, dtype), *_cast(call.args, dtype), **_cast(call.kwargs, dtype))
        if isinstance(output, tuple) != self.family.returns_tuple:
            raise InputError(
                f"{self.path(index)} returns {type(output).__name__}, and its family has returns_tuple {self.family.returns_tuple}."
            )
        return (output[0] if isinstance(output, tuple) else output).cpu()

    def run_all(self, block: nn.Module, index: int, stream: Stream, dtype: torch.dtype) -> list[Tensor]:
        """The outputs of block `index` for the whole stream, per batch."""
        return [self.run(block, index, stream, batch, dtype) for batch in range(len(stream.hidden))]

    def measure(
        self, block: nn.Module, index: int, stream: Stream, progress: Callable[[int], None] = lambda done: None
    ) -> tuple[dict[str, ChannelMaxima], list[Tensor]]:
        """Run the whole stream through a block: the per-channel maxima of each linear's input, and the block's outputs per batch. An expert
        that no token reached has the maxima of all the others."""
        layers = linears(block, self.family)
        maxima = {name: ChannelMaxima.empty(linear.in_features) for name, linear in layers.items()}
        hooks = [
            linear.register_forward_pre_hook(lambda _m, args, name=name: maxima[name].update(args[0])) for name, linear in layers.items()
        ]
        try:
            outputs = []
            for batch in range(len(stream.hidden)):
                outputs.append(self.run(block, index, stream, batch))
                progress(batch + 1)
        finally:
            for hook in hooks:
                hook.remove()
        share_with_unreached(maxima)
        for name, channels in maxima.items():
            if not bool(torch.isfinite(channels.maxima).all()):
                advice = "the model itself overflows" if self.dtype == torch.float32 else "use --compute-dtype float32"
                raise InputError(f"the input of {self.path(index)}.{name} is not finite on the calibration text in {self.dtype}: {advice}.")
        return maxima, outputs


def check_device(device: str) -> str:
    """Raises InputError for a device that torch does not have here."""
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise InputError(f"unknown device '{device}': give cpu, cuda or cuda:N.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device '{device}' was asked for, but torch finds no CUDA device here: use --device cpu.")
    if kind == "cuda" and number and int(number) >= torch.cuda.device_count():
        raise InputError(f"device '{device}' was asked for, but torch finds {torch.cuda.device_count()} CUDA devices here, counted from 0.")
    return device


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


def give_memory_back() -> None:
    """Let the memory of a tensor go back to the system as soon as the tensor is gone, for the rest of this process.

    Otherwise glibc keeps what tensors of up to 32 MB were in, and often cannot use it again: aligned as torch asks for them, they do not
    fit where one of the same size was. A process then grows with every block, a 3B model's by 35 MB; trimming after each block slows that
    down and does not end it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # in glibc alone
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 20)


def take_memory_again() -> None:
    """End what `give_memory_back` began, in a process that computes on: there each new tensor would be paged in anew. These are the
    thresholds that glibc's own grow to."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, 64 << 20)


def assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put `tensor` where the parameter or buffer `name` of `module` is, whatever its device, dtype or shape was."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def _get(module: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    value = getattr(module.get_submodule(path), leaf)
    assert isinstance(value, Tensor)
    return value


def _share(value: Any, known: dict[Any, Tensor]) -> Any:
    """`value` with equal tensors replaced by one: batches of the same shape are called with equal masks and positions."""
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() if value.numel() else b""
        key = (value.shape, value.dtype, hashlib.sha256(content).digest())
        return known.setdefault(key, value)
    if isinstance(value, (tuple, list)):
        return type(value)(_share(item, known) for item in value)
    if isinstance(value, dict):
        return {key: _share(item, known) for key, item in value.items()}
    return value


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """`value` with every floating-point tensor in `dtype`."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(item, dtype) for item in value)
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    return value
