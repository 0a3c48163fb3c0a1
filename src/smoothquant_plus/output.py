"""What a quantized model is on disk, besides its blocks: everything outside them, and what makes shards a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from smoothquant_plus.files import write_bytes, write_json
from smoothquant_plus.method.scheme import Scheme
from smoothquant_plus.models.blocks import Decoder
from smoothquant_plus.models.checkpoint import CONFIG, companions, quantization_config, read_config, write_index, write_shard
from smoothquant_plus.models.families import FAMILY_FILE
from smoothquant_plus.models.skeleton import head_paths
from smoothquant_plus.models.statistics import SMOOTHING, STATISTICS
from smoothquant_plus.models.transform import head_tensors, quantize_head, unquantized
from smoothquant_plus.verification import MANIFEST, manifest
from smoothquant_plus.workspace import PLAN, Workspace

# What a finished block keeps, by the beginning of the names: its inputs' maxima and its smoothing factors.
MAXIMA, FACTORS = "maxima/", "factors/"


@dataclass(frozen=True)
class Shards:
    """The files of an output: of what lies outside the blocks, one for each group of `Decoder.outside`; of the blocks; and last of all, if
    it has one of its own, of the output head."""

    outside: list[str]
    blocks: list[str]
    head: str | None


def shard_names(decoder: Decoder, scheme: Scheme) -> Shards:
    outside, blocks = len(decoder.outside), len(decoder)
    head = bool(decoder.head_names) or scheme.head is not None
    count = outside + blocks + head
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    return Shards(names[:outside], names[outside : outside + blocks], names[-1] if head else None)


def copy_outside(decoder: Decoder, work: Workspace, scheme: Scheme) -> None:
    """Everything outside the blocks, as it is, one group of tensors in memory at a time; the output head quantized, if it is to be."""
    files = shard_names(decoder, scheme)
    groups = dict(zip(files.outside, decoder.outside, strict=True))
    if scheme.head is not None:
        if not work.head_result.is_file():
            write_head(decoder, work, scheme.head, files)
    elif files.head is not None:
        groups[files.head] = sorted(decoder.head_names)
    for file, names in groups.items():
        if not (work.directory / file).is_file():
            # What the model ignores may be infinite: the masks of old checkpoints are.
            write_shard(
                work.directory / file, {name: decoder.checkpoint.read(name, finite=name in decoder.parameter_names) for name in names}
            )


def write_head(decoder: Decoder, work: Workspace, scheme: Scheme, files: Shards) -> None:
    """The quantized output head, then what plan.json says of it: when that is on disk, the head is done."""
    assert files.head is not None
    quantized = quantize_head(decoder, scheme)
    write_shard(work.directory / files.head, head_tensors(decoder, quantized))
    write_json(work.head_result, {"name": decoder.head_path, "weight_error": quantized.error, "sha256": quantized.digest})


def head_note(decoder: Decoder, scheme: Scheme, record: dict[str, Any]) -> str:
    """What became of the output head, in a sentence."""
    tied = "" if decoder.head_is_stored else "; the embedding that it was tied to stays as it is, and a head of its own is stored"
    return (
        f"output head quantized, not smoothed: {record['name']}, {scheme.name}, relative weight error {record['weight_error']:.1e}{tied}."
    )


def with_own_head(config: dict[str, Any]) -> dict[str, Any]:
    """The content of a config.json whose output head is not tied to the embedding, whatever was said or left to the default."""
    own = {**config, "tie_word_embeddings": False}
    if isinstance(config.get("text_config"), dict):
        own["text_config"] = with_own_head(config["text_config"])
    return own


def finish(decoder: Decoder, work: Workspace, scheme: Scheme, recipe: dict[str, Any], facts: dict[str, Any]) -> None:
    """What makes the shards a checkpoint: index, config, tokenizer, statistics, plan, and the manifest over all of them."""
    directory, source = work.directory, decoder.checkpoint.directory
    for name in companions(source):
        (directory / name).parent.mkdir(exist_ok=True)
        write_bytes(directory / name, (source / name).read_bytes())
    if decoder.declared:
        write_bytes(directory / FAMILY_FILE, decoder.declared.read_bytes())
    config = with_own_head(read_config(source)) if scheme.head else read_config(source)
    declared = quantization_config(scheme, unquantized(decoder, scheme), head_paths(decoder.model, decoder.family))
    config.pop("auto_map", None)  # names code beside the source's config.json, which is not copied: no model here needs its own
    write_json(directory / CONFIG, {**config, "quantization_config": declared})
    write_index(directory)
    for kind, file in ((MAXIMA, STATISTICS), (FACTORS, SMOOTHING)):
        write_shard(directory / file, kept_of(work, kind))
    blocks = work.blocks.records()
    plan = {
        "recipe": recipe,
        "family": decoder.family_name,
        "equivalence_error": max(block["equivalence_error"] for block in blocks),
        "blocks": blocks,
        **facts,
    }
    if scheme.head:
        plan["head"] = json.loads(work.head_result.read_text())
    write_json(directory / PLAN, plan)
    write_json(directory / MANIFEST, manifest(directory))


def kept_of(work: Workspace, kind: str) -> dict[str, Tensor]:
    """What all blocks have kept of one kind, MAXIMA or FACTORS, by the paths of their modules."""
    return {name.removeprefix(kind): tensor for name, tensor in work.blocks.tensors().items() if name.startswith(kind)}
