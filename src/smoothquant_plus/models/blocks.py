"""A decoder as a stream of blocks: the skeleton has no weights, one block at a time is materialized, run and released."""

from __future__ import annotations

import ctypes
import hashlib
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smoothquant_plus.errors import InputError
from smoothquant_plus.method.statistics import ChannelMaxima
from smoothquant_plus.models.checkpoint import Checkpoint
from smoothquant_plus.models.experts import share_with_unreached
from smoothquant_plus.models.families import Pair, pairs_in
from smoothquant_plus.models.skeleton import (
    build_skeleton,
    check_pairs,
    decoder_blocks,
    disk_names,
    head_path,
    is_transposed,
    linears,
    load_config,
    open_family,
    path_of,
)

OUTSIDE_BYTES = 1 << 30

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # in glibc's malloc.h


@dataclass(frozen=True)
class Call:
    """The arguments of one block's forward, besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Stream:
    """Hidden states on their way through the decoder, per batch (samples, tokens, hidden), and how each block is called. Where later blocks read
    the keys and values of earlier ones (Gemma 4), those come along as more channels.

    `calls[batch][block]`: each block's own arguments, so that sliding windows and per-layer masks are right.
    """

    hidden: Sequence[Tensor]
    calls: list[list[Call]] = field(default_factory=list)


@dataclass(frozen=True)
class KeysAndValues:
    """What the attention of one block makes and later ones read: how the model calls it, and the channels of a head."""

    kind: str
    head_dim: int
    channels: int

    def heads(self, flat: Tensor) -> Tensor:
        """Keys or values (samples, tokens, channels) as attention has them, (samples, heads, tokens, channels of a head)."""
        return flat.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


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
        self._linears: dict[int, dict[str, nn.Linear]] = {}
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
    def parameter_names(self) -> set[str]:
        """Those of them that are parameters. Buffers, such as the bounds of an audio tower, may be infinite."""
        parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        return {disk for name, disk in self._names.items() if name in parameters}

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
        prefixes = tuple(self.family.spellings(self.path(index) + "."))
        return [name for name in self.checkpoint.tensors if name.startswith(prefixes)]

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
        tensor = self.checkpoint.read(self.disk_name(name), dtype=dtype)
        if is_transposed(self.family, name, tensor):
            tensor = tensor.t().contiguous()
        return tensor.to(self.device, dtype)

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """The linear layers of block `index` that are quantized, by their path inside it."""
        if index not in self._linears:  # of hundreds of experts, and asked for once for each of them
            self._linears[index] = linears(self.blocks[index], self.family)
        return self._linears[index]

    def pairs(self, index: int, pairs: Sequence[Pair]) -> list[Pair]:
        """The `pairs` as block `index` has them: with each expert's name."""
        return list(pairs_in(dict(self.blocks[index].named_modules()), pairs))

    @cached_property
    def shared(self) -> dict[int, KeysAndValues]:
        """By block, the keys and values that later blocks read."""
        return shared_by(self.blocks)

    @property
    def stream_channels(self) -> int:
        """How many channels a stream has at most."""
        return stream_channels(self.config, self.blocks)

    def _apart(self, states: Tensor, made: Iterable[KeysAndValues]) -> list[Tensor]:
        """The hidden states in a stream's (samples, tokens, channels), and behind them what was `made`: keys, values, keys, ..."""
        behind = [each.channels for each in made for _ in ("keys", "values")]
        return list(states.split([states.shape[-1] - sum(behind), *behind], dim=-1))

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
        # Gemma 4 gives each block something of each token's identity, which it would look for in the table of embeddings.
        by_token = [module for module in self.model.modules() if hasattr(module, "get_per_layer_inputs")]

        def replay(index: int, states: Tensor, call: Call) -> Tensor:
            return given[-1] if index == len(self.blocks) - 1 else states

        @torch.no_grad()
        def run(hidden: Tensor) -> tuple[Tensor, Tensor]:
            given[:] = self._apart(hidden.to(self.device, self.dtype), self.shared.values())[:1]
            # What goes in at the bottom is replaced at the last block, so that no embedding table has to be read for it (Gemma 4's wrapper, which
            # looks for images there, reads one all the same).
            logits = self.model(inputs_embeds=given[-1], use_cache=False).logits
            return final.pop(), logits

        hook = self.model.get_output_embeddings().register_forward_pre_hook(lambda _m, args: final.append(args[0]))
        for module in by_token:
            module.get_per_layer_inputs = lambda *_: None
        try:
            with self._with_stubs(replay):
                yield run
        finally:
            hook.remove()
            for module in by_token:
                del module.get_per_layer_inputs

    @torch.no_grad()
    def run(self, block: nn.Module, index: int, stream: Stream, batch: int, dtype: torch.dtype | None = None) -> Tensor:
        """The output of block `index` for one batch of the stream, on the CPU; computed in `dtype` (default: the compute dtype)."""
        call = stream.calls[batch][index]
        dtype = dtype or self.dtype
        earlier = [made for maker, made in self.shared.items() if maker < index]
        hidden, *flat = self._apart(stream.hidden[batch].to(self.device, dtype), earlier)
        known = UserDict({made.kind: tuple(map(made.heads, flat[2 * n :][:2])) for n, made in enumerate(earlier)})
        arguments = {name: known if isinstance(value, UserDict) else _cast(value, dtype) for name, value in call.kwargs.items()}
        output = block(hidden, *_cast(call.args, dtype), **arguments)
        if isinstance(output, tuple) != self.family.returns_tuple:
            raise InputError(
                f"{self.path(index)} returns {type(output).__name__}, and its family has returns_tuple {self.family.returns_tuple}."
            )
        new = known[self.shared[index].kind] if index in self.shared else ()
        flat += [each.transpose(1, 2).flatten(2) for each in new]
        return torch.cat([output[0] if isinstance(output, tuple) else output, *flat], dim=-1).cpu()

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


def shared_by(blocks: Any) -> dict[int, KeysAndValues]:
    """By block, the keys and values that later ones of the `blocks` read."""
    attentions = {index: block.self_attn for index, block in enumerate(blocks) if hasattr(block, "self_attn")}
    if not any(getattr(attention, "is_kv_shared_layer", False) for attention in attentions.values()):
        return {}
    return {
        index: KeysAndValues(attention.layer_type, attention.head_dim, attention.k_proj.out_features)
        for index, attention in attentions.items()
        if attention.store_full_length_kv
    }


def stream_channels(config: Any, blocks: Any) -> int:
    """How many channels a stream has at most: the hidden states', and those of the keys and values that come along."""
    return int(config.hidden_size) + sum(2 * made.channels for made in shared_by(blocks).values())


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
