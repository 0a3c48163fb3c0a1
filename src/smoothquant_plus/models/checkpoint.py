"""A checkpoint on disk: read tensor by tensor, written shard by shard in the compressed-tensors format."""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from smoothquant_plus.errors import InputError, did_you_mean
from smoothquant_plus.files import sha256, write_atomic, write_json
from smoothquant_plus.method.integers import INT4_MIN, QuantizedWeight, pack_int4, unpack_int4
from smoothquant_plus.method.scheme import ACTIVATIONS, Quant, Scheme
from smoothquant_plus.models.tensors import TensorInfo, in_fp8, multiply, read_header, separate_experts, with_scales

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# Everything else that belongs to a model directory and is copied beside the quantized weights, where the source has it.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
TEMPLATES = "additional_chat_templates"  # a directory of .jinja files, named ones beside chat_template.jinja


FINGERPRINT_PAGES = 64


class Checkpoint:
    """A model directory with safetensors weights. Opening it reads headers only; `read` brings one tensor into memory.

    Raises InputError, naming the file, for anything that is missing, damaged or not allowed.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = read_config(directory)
        self.shards = _find_shards(directory)
        self.tensors: dict[str, TensorInfo] = {}
        for shard, expected in self.shards.items():
            found = read_header(directory / shard)
            for name in expected or found:
                if name not in found:
                    raise InputError(
                        f"{directory / INDEX} says that {shard} holds '{name}', but it does not: download the checkpoint again."
                    )
                self.tensors[name] = found[name]
        self.tensors = separate_experts(with_scales(self.tensors, self.config, directory))

    def read(self, name: str, finite: bool = True, rows: slice | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor `name`, or some of its rows, in memory of its own. One in FP8 is multiplied by its scales in float32 and rounded to `dtype`
        (None: what it counts as); every other one has the dtype that it is stored in. Raises InputError when it is not there, and with `finite`
        for values that are NaN or infinite."""
        if name not in self.tensors:
            raise InputError(f"{self.directory} has no tensor '{name}'.{did_you_mean(name, self.tensors)}")
        info = self.tensors[name]
        if info.scales is None:
            tensor = self._stored(name, info, rows)
        else:
            tensor = self._stored(name, info).float()
            multiply(tensor, self._stored(name, info.scales).float(), info.block)
            tensor = tensor[rows or slice(None)].to(dtype or info.dtype)
        # The smallest and the largest value show NaN and infinities too, in one pass and without a copy.
        if finite and tensor.is_floating_point() and tensor.numel() and not all(bool(value.isfinite()) for value in tensor.aminmax()):
            raise InputError(
                f"'{name}' in {self.directory / info.shard} has values that are NaN or infinite: the checkpoint is damaged or was trained to that."
            )
        return tensor

    def _stored(self, name: str, info: TensorInfo, rows: slice | None = None) -> Tensor:
        """What lies on disk of the tensor `name`."""
        path = self.directory / info.shard
        shape, offset = info.shape, info.offset
        if info.columns is not None:
            shape = (info.shape[1], info.columns[1])
        elif rows is not None:
            first, end, _ = rows.indices(info.shape[0])
            row = info.dtype.itemsize * torch.Size(info.shape[1:]).numel()
            shape, offset = (end - first, *info.shape[1:]), info.offset + first * row
        tensor = torch.empty(shape, dtype=info.stored_dtype)
        try:
            # Not mapped: while a mapping is copied, a table of a gigabyte is in memory twice.
            with path.open("rb") as file:
                file.seek(offset)
                complete = file.readinto(tensor.view(-1).view(torch.uint8).numpy()) == tensor.nbytes
        except OSError as error:
            raise InputError(f"cannot read '{name}' from {path}: {error}") from error
        if not complete:
            raise InputError(f"cannot read '{name}' from {path}: the file has become shorter since it was opened.")
        if info.columns is not None:
            tensor = tensor[:, info.columns[0] :][:, : info.shape[0]].t()[rows or slice(None)].contiguous()
        return tensor

    @property
    def nbytes(self) -> int:
        """As what its tensors count as: those in FP8 as 16 bits."""
        return sum(info.nbytes for info in self.tensors.values())

    def fingerprint(self) -> dict[str, Any]:
        """What tells this checkpoint from another without reading all of it: config.json, and of each shard its size, its header and pages
        of its contents, evenly spread."""
        shards = {}
        for shard in self.shards:
            path = self.directory / shard
            size = path.stat().st_size
            digest = hashlib.sha256()
            with path.open("rb") as file:
                length = file.read(8)
                digest.update(length + file.read(int.from_bytes(length, "little")))
                for page in range(FINGERPRINT_PAGES):
                    file.seek(size * page // FINGERPRINT_PAGES)
                    digest.update(file.read(4096))
            shards[shard] = {"bytes": size, "sample_sha256": digest.hexdigest()}
        return {"config_sha256": sha256(self.directory / CONFIG), "shards": shards}

    def modified(self) -> dict[str, int]:
        """When each shard was last modified, in nanoseconds."""
        return {shard: (self.directory / shard).stat().st_mtime_ns for shard in self.shards}


def read_config(directory: Path) -> dict[str, Any]:
    """config.json as a dictionary. Raises InputError when the directory or the file is missing or is not JSON."""
    if not directory.is_dir():
        if directory.exists():
            raise InputError(f"{directory} is a file: give the directory of the model.")
        raise InputError(f"no such model directory: {directory}. Models are read from local directories: download it first.")
    path = directory / CONFIG
    if not path.is_file():
        raise InputError(f"{directory} has no {CONFIG}: it is not a Hugging Face model directory.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}): download it again.") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} is not a JSON object.")
    return config


def companions(directory: Path) -> list[str]:
    """What of COMPANIONS and TEMPLATES is in a model directory, as paths inside it."""
    templates = sorted(path.relative_to(directory).as_posix() for path in (directory / TEMPLATES).glob("*.jinja"))
    return [name for name in COMPANIONS if (directory / name).is_file()] + templates


def _find_shards(directory: Path) -> dict[str, list[str] | None]:
    """The safetensors files of a checkpoint with the tensors that the index expects in each (None: whatever is in it)."""
    index = directory / INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards: dict[str, list[str] | None] = {}
            for name, shard in sorted(weight_map.items()):
                names = shards.setdefault(shard, [])
                assert names is not None
                names.append(name)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index} is not a safetensors index ({error!r}): download it again.") from error
        for shard in shards:
            # A file name and nothing else: an index must not reach outside the model directory.
            if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
                raise InputError(f"{index} names '{shard}', which is not a file name or outside the model directory: refused.")
            if not (directory / shard).is_file():
                raise InputError(f"{directory / shard} is missing, but {INDEX} lists it: download it again.")
        return dict(sorted(shards.items()))
    if (directory / SINGLE).is_file():
        return {SINGLE: None}
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in directory.glob(pattern))
    if pickled:
        raise InputError(
            f"{directory} has only pickled weights ({pickled[0]}), which can run code when they are read. Convert them once, in an environment "
            "you trust: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR) writes safetensors."
        )
    raise InputError(f"{directory} has no weights: neither {SINGLE} nor {INDEX} is there.")


# What a quantized linear layer is on disk (docs/formats.md), by suffix. 8 bits: int8 `weight` (N, K), in GPT-2 (K, N), float32 `weight_scale`
# (N, 1) or (1,), and for static activations float32 `input_scale` (1,); llm-compressor writes both scales in the model's dtype. 4 bits: int32
# `weight_packed` (N, K / 8), `weight_scale` (N, K / g) in the dtype of the weight that was quantized, `weight_shape` int64 (2,), which may be
# missing, and for asymmetric ones int32 `weight_zero_point` (N / 8, K / g), packed along N. The bias keeps its name and dtype.

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]

SHAPE = "weight_shape"  # of 4-bit layers: known without it


def linear_tensors(weight: QuantizedWeight, input_scale: Tensor | None, transposed: bool = False) -> dict[str, Tensor]:
    """The tensors that a linear layer is stored as, by suffix; `transposed` if its weight is a Conv1D's, which matters for 8 bits alone."""
    if weight.quant.bits == 4:
        packed = pack_int4(weight.values).view(torch.int32)
        tensors = {"weight_packed": packed, "weight_scale": weight.scale, SHAPE: torch.tensor(weight.values.shape)}
        if weight.zero_point is not None:
            channels = torch.nn.functional.pad(weight.zero_point.t(), (0, -len(weight.zero_point) % 8), value=INT4_MIN)
            tensors["weight_zero_point"] = pack_int4(channels).view(torch.int32).t()
        return tensors
    tensors = {"weight": weight.values.t() if transposed else weight.values, "weight_scale": weight.scale}
    return tensors if input_scale is None else {**tensors, "input_scale": input_scale}


def linear_layout(scheme: Scheme, rows: int, columns: int, weight_dtype: torch.dtype, transposed: bool = False) -> Layout:
    """Suffix, dtype and shape of each tensor that `quantize` writes for a linear (rows, columns) whose weight was in `weight_dtype`, without its
    bias."""
    return _layout(scheme, rows, columns, weight_dtype if scheme.weights.group_size else torch.float32, transposed)


def _layout(scheme: Scheme, rows: int, columns: int, scale_dtype: torch.dtype, transposed: bool) -> Layout:
    layout: Layout
    if scheme.weights.group_size:
        groups = columns // scheme.weights.group_size
        layout = {
            "weight_packed": (torch.int32, (rows, columns // 8)),
            "weight_scale": (scale_dtype, (rows, groups)),
            SHAPE: (torch.int64, (2,)),
        }
        return layout if scheme.weights.symmetric else {**layout, "weight_zero_point": (torch.int32, (-(-rows // 8), groups))}
    scale = (rows, 1) if scheme.weights.strategy == "channel" else (1,)
    shape = (columns, rows) if transposed else (rows, columns)
    layout = {"weight": (torch.int8, shape), "weight_scale": (scale_dtype, scale)}
    return {**layout, "input_scale": (scale_dtype, (1,))} if scheme.static else layout


def stored_layout(checkpoint: Checkpoint, name: str, scheme: Scheme, rows: int, columns: int, transposed: bool = False) -> Layout:
    """`linear_layout` of the linear `name` (rows, columns) in a quantized `checkpoint`, whatever float dtype its scales are in."""
    found = checkpoint.tensors.get(f"{name}.weight_scale")
    dtype = found.dtype if found is not None and found.dtype.is_floating_point else torch.float32
    return _layout(scheme, rows, columns, dtype, transposed)


def wrong_layout(checkpoint: Checkpoint, name: str, scheme: Scheme, rows: int, columns: int, transposed: bool = False) -> list[str]:
    """What is wrong with the dtypes and shapes of the quantized linear `name` (rows, columns) in `checkpoint`, one sentence for each tensor."""
    problems = []
    for suffix, (dtype, shape) in stored_layout(checkpoint, name, scheme, rows, columns, transposed).items():
        info = checkpoint.tensors.get(f"{name}.{suffix}")
        if info is None and suffix == SHAPE:
            continue
        if info is None:
            problems.append(f"tensor '{name}.{suffix}' is missing")
        elif (info.dtype, info.shape) != (dtype, shape):
            problems.append(f"tensor '{name}.{suffix}' is {info.dtype} {info.shape} and must be {dtype} {shape}")
    return problems


def read_linear(
    checkpoint: Checkpoint, name: str, scheme: Scheme, rows: int, columns: int, transposed: bool = False
) -> tuple[QuantizedWeight, Tensor | None]:
    """The weight of the quantized linear `name` (rows, columns), and its static input scale if it has one.

    Raises InputError when one of its tensors is missing or is not what the scheme says.
    """
    problems = wrong_layout(checkpoint, name, scheme, rows, columns, transposed)
    if problems:
        raise InputError(
            f"{checkpoint.directory}: {'; '.join(problems)} as its {CONFIG} declares: it is damaged, or half of another checkpoint."
        )
    layout = stored_layout(checkpoint, name, scheme, rows, columns, transposed)
    tensors = {
        suffix: checkpoint.read(f"{name}.{suffix}") for suffix in layout if suffix != SHAPE or f"{name}.{suffix}" in checkpoint.tensors
    }
    if scheme.weights.bits == 8:
        values = tensors["weight"].t().contiguous() if transposed else tensors["weight"]
        scales = {suffix: scale.float() for suffix, scale in tensors.items() if suffix != "weight"}
        return QuantizedWeight(values, scales["weight_scale"], scheme.weights), scales.get("input_scale")
    if SHAPE in tensors and tensors[SHAPE].tolist() != [rows, columns]:
        raise InputError(f"{checkpoint.directory}: '{name}.{SHAPE}' is {tensors[SHAPE].tolist()}, and the layer is {[rows, columns]}.")
    return unpack(tensors["weight_packed"], tensors["weight_scale"], tensors.get("weight_zero_point"), scheme.weights), None


def unpack(packed: Tensor, scale: Tensor, zero_point: Tensor | None, quant: Quant) -> QuantizedWeight:
    """4-bit weights as they are stored, `packed` int32 (N, K / 8), `scale` (N, K / g) and `zero_point` int32 (N / 8, K / g), as integers."""
    if zero_point is not None:
        channels = zero_point.t().clone(memory_format=torch.contiguous_format)
        zero_point = unpack_int4(channels.view(torch.uint8))[:, : len(packed)].t().contiguous()
    return QuantizedWeight(unpack_int4(packed.view(torch.uint8)), scale, quant, zero_point)


# What compressed-tensors calls our schemes, what it calls several in one checkpoint, and the fields of a Quant.
FORMATS = {"w8a8": "int-quantized", "w4a16": "pack-quantized"}
MIXED = "mixed-precision"
# Keys of others' quantization_config that change what is computed.
NOT_RUN = {"kv_cache_scheme": "a quantized KV cache", "transform_config": "transforms of activations", "sparsity_config": "sparse weights"}
ARGUMENTS = {"bits": "num_bits", "strategy": "strategy", "group_size": "group_size", "symmetric": "symmetric", "dynamic": "dynamic"}


def head_targets(heads: Iterable[str]) -> list[str]:
    """What names the output head in a config group, in every reader: `heads` are its paths, and inside a wrapper there are longer ones."""
    return [f"re:.*{leaf}$" for leaf in dict.fromkeys(head.rpartition(".")[2] for head in heads)]


def quantization_config(scheme: Scheme, ignore: list[str], heads: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json: the compressed-tensors package's own schema, filled in. `heads` are the names of the output
    head. Where it is quantized it has a group of its own, even in the blocks' scheme: servers leave a head that is not named as it is."""
    from compressed_tensors.quantization import QuantizationConfig

    def arguments(quant: Quant | None) -> dict[str, Any] | None:
        return None if quant is None else {"type": "int", **{theirs: getattr(quant, ours) for ours, theirs in ARGUMENTS.items()}}

    def group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
        return {"targets": targets, "weights": arguments(scheme.weights), "input_activations": arguments(scheme.inputs)}

    form = FORMATS[scheme.name]
    groups = {"group_0": group(scheme, ["Linear"])}
    if scheme.head is not None:
        groups["group_1"] = {**group(scheme.head, head_targets(heads)), "format": FORMATS[scheme.head.name]}
        groups["group_0"]["format"] = form
        form = form if scheme.head.name == scheme.name else MIXED
    config = QuantizationConfig(config_groups=groups, format=form, quantization_status="compressed", ignore=ignore)
    return json.loads(config.model_dump_json(exclude_none=True))


def read_scheme(config: Mapping[str, Any], where: Path, heads: Sequence[str]) -> Scheme | None:
    """The scheme that a config.json declares, of a model whose output head has the names `heads`; None for a checkpoint that is not
    quantized.

    Raises InputError for a quantization that this package does not run.
    """
    declared = config.get("quantization_config")
    if declared is None or in_fp8(config):
        return None
    if not isinstance(declared, dict):
        raise InputError(f"{where / CONFIG} has a quantization_config that is not a JSON object.")
    groups_by_name = declared.get("config_groups") or {}
    if not isinstance(groups_by_name, dict) or not all(isinstance(group, dict) for group in groups_by_name.values()):
        raise InputError(f"{where / CONFIG} has config_groups that are not JSON objects.")
    groups = sorted(groups_by_name.values(), key=lambda group: group.get("targets") != ["Linear"])
    forms = [str(group.get("format") or declared.get("format")) for group in groups]
    if declared.get("quant_method") != "compressed-tensors" or not groups or not set(forms) <= set(FORMATS.values()):
        raise InputError(
            f"{where / CONFIG} declares a quantization that cannot be run here (quant_method {declared.get('quant_method')!r}, format "
            f"{', '.join(map(repr, forms)) or repr(declared.get('format'))}): only compressed-tensors checkpoints in format "
            f"{' or '.join(map(repr, FORMATS.values()))} can."
        )
    targets = [group.get("targets") for group in groups]
    named = head_targets(heads)
    known = {*heads, *named, *(target.removesuffix("$") for target in named)}
    if targets[0] != ["Linear"] or not (len(targets) == 1 or (len(targets) == 2 and targets[1] and known.issuperset(targets[1]))):
        raise InputError(
            f"{where / CONFIG} has config groups for {' and '.join(map(str, targets))}, which cannot be run here: one for ['Linear'] can, and "
            f"a second one for the output head alone, {named}."
        )
    for key, what in NOT_RUN.items():
        section = declared.get(key)
        dense = isinstance(section, dict) and section.get("format") == "dense"  # a section that says that there is nothing
        if section and not dense:
            raise InputError(f"{where / CONFIG} declares {what} ({key}), which cannot be run here.")
    try:
        schemes = [_scheme_of(group, form) for group, form in zip(groups, forms, strict=True)]
        ignore = declared.get("ignore") or []
        if not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore):
            raise ValueError(f"ignore is not a list of names: {ignore!r}")
        for name in ignore:
            re.compile(name.removeprefix("re:"))
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{where / CONFIG} declares a quantization that cannot be run here: {first['loc']}: {first['msg']}") from error
    except (KeyError, ValueError, re.error) as error:
        raise InputError(f"{where / CONFIG} declares a quantization that cannot be run here: {error}") from error
    return schemes[0].model_copy(update={"head": schemes[1] if len(schemes) > 1 else None, "ignore": tuple(ignore)})


def _scheme_of(group: Mapping[str, Any], form: str) -> Scheme:
    """The scheme of a config group in the format `form`. Raises ValueError, or KeyError, for one that this package does not run."""

    def quant(arguments: Any) -> Quant:
        if not isinstance(arguments, dict):
            raise ValueError(f"arguments that are not a JSON object: {arguments!r}")
        if arguments.get("actorder") not in (None, False, "static", "weight"):  # those leave no trace in what is stored
            raise ValueError("groups of reordered input channels (actorder)")
        if arguments.get("type", "int") != "int":
            raise ValueError(f"numbers of type {arguments['type']!r}")
        return Quant.model_validate({ours: arguments.get(theirs) for ours, theirs in ARGUMENTS.items()})

    if group.get("output_activations"):
        raise ValueError("quantized outputs (output_activations)")
    name = next(name for name, known in FORMATS.items() if known == form)
    weights = quant(group["weights"])
    if name == "w4a16":
        if group.get("input_activations") is not None or weights.bits != 4:
            raise ValueError("format 'pack-quantized' with other than 4 bits, or with quantized activations")
        return Scheme(name=name, weights=weights, inputs=None)
    if group.get("input_activations") is None:
        raise ValueError("format 'int-quantized' with activations that are not quantized")
    inputs = quant(group["input_activations"])
    if weights.strategy not in ("channel", "tensor") or weights.dynamic or inputs not in ACTIVATIONS.values():
        raise ValueError(
            f"format 'int-quantized' with weights of {weights.bits} bits per {weights.strategy} and activations of {inputs.bits} bits per "
            f"{inputs.strategy}, {'dynamic' if inputs.dynamic else 'static'}"
        )
    return Scheme(name=name, weights=weights, inputs=inputs)


def write_shard(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = MappingProxyType({"format": "pt"})) -> None:
    """One safetensors file, atomically. Equal tensors are equal bytes as long as `metadata` has one entry (the library does not order it)."""
    contiguous = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}

    def write(temporary: Path) -> None:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it: the library's files are their owner's alone
        try:
            save_file(contiguous, temporary, metadata=dict(metadata))
        except SafetensorError as error:
            # The library reports a full disk as its own error type.
            raise OSError(errno.ENOSPC if "No space left" in str(error) else errno.EIO, f"cannot write {path}: {error}") from error
        temporary.chmod(mode)

    write_atomic(path, write)


def write_index(directory: Path) -> None:
    """model.safetensors.index.json for the shards that lie in `directory`."""
    found = {path.name: read_header(path) for path in sorted(directory.glob("model-*.safetensors"))}
    weight_map = {name: shard for shard, tensors in found.items() for name in tensors}
    total = sum(info.nbytes for tensors in found.values() for info in tensors.values())
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
