"""Proof that a checkpoint is what was written, and that what was written follows from the model it was made of."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from smoothquant_plus.errors import InputError, VerificationError
from smoothquant_plus.files import sha256
from smoothquant_plus.method.scheme import Scheme
from smoothquant_plus.models.blocks import Decoder
from smoothquant_plus.models.checkpoint import CONFIG, INDEX, Checkpoint, companions, read_linear, wrong_layout
from smoothquant_plus.models.experts import recorded
from smoothquant_plus.models.families import FAMILY_FILE, Family, active_pairs
from smoothquant_plus.models.skeleton import declared_family, decoder_blocks, disk_names, head_path, is_transposed, linears, open_directory
from smoothquant_plus.models.statistics import SMOOTHING, STATISTICS, read_statistics
from smoothquant_plus.models.transform import (
    block_tensors,
    digest_of,
    head_tensors,
    prove_equivalent,
    quantize_block,
    quantize_head,
    smooth_block,
)
from smoothquant_plus.progress import steps
from smoothquant_plus.runtime.agreement import Agreement, compare_with_vllm
from smoothquant_plus.runtime.serve import check_vllm
from smoothquant_plus.text import synthetic_samples
from smoothquant_plus.workspace import PLAN

MANIFEST = "manifest.json"


@dataclass
class Report:
    """What was verified. `weight_error` is the relative Frobenius error of each quantized weight against the smoothed one."""

    files: int = 0
    tensors: int = 0
    linears: int = 0
    equivalence_error: float | None = None
    weight_error: dict[str, float] = field(default_factory=dict)
    vllm: Agreement | None = None


def manifest(directory: Path) -> dict[str, str]:
    """{file name: sha256} of everything in an output directory, but the manifest itself."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(directory).as_posix(): sha256(path) for path in files}


def read_plan(directory: Path) -> dict[str, Any]:
    """plan.json. Raises InputError when that is not a plan."""
    plan = _read_json(directory / PLAN)
    for key, kind in (("recipe", dict), ("blocks", list)):
        if not isinstance(plan, dict) or not isinstance(plan.get(key), kind):
            raise InputError(f"{directory / PLAN} cannot be read as a plan: it has no '{key}'")
    return plan


def verify(directory: str | Path, against: str | Path | None = None, vllm: bool = False) -> Report:
    """Check every file's hash, every tensor's shape, the quantized ones' dtypes, and every quantized weight bit by bit against the plan.

    With `against`, the full-precision model it was made of, also repeat each block from it and compare all of its tensors bit by bit,
    and prove the smoothing equivalent in float32 on random tokens. With `vllm`, compare what vLLM answers with what this package does.
    Raises InputError when `directory` is not an output of this package, and VerificationError naming all that is wrong.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"no such directory: {directory}.")
    if not (directory / MANIFEST).is_file() and not (directory / PLAN).is_file():
        raise InputError(
            f"{directory} has no {MANIFEST} and no {PLAN}: it was not written by smoothquant-plus, so there is nothing to verify."
        )
    source = Checkpoint(Path(against)) if against is not None else None
    if vllm:
        check_vllm()
    report = Report()
    problems = _check_hashes(directory, report)
    try:
        _check_tensors(directory, report, problems)
    except InputError as error:  # a file that cannot even be read
        problems.append(str(error))
    if problems:
        raise VerificationError(f"{directory} is damaged: " + "; ".join(dict.fromkeys(problems)))
    if source is not None:
        _check_against(directory, source, report)
    if vllm:
        report.vllm = compare_with_vllm(directory)
    return report


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def _check_hashes(directory: Path, report: Report) -> list[str]:
    problems = []
    try:
        listed = _read_json(directory / MANIFEST)
    except InputError as error:
        return [str(error)]
    if not isinstance(listed, dict):
        return [f"{MANIFEST} does not list files with their sha256"]
    for name, expected in listed.items():
        path = directory / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif sha256(path) != expected:
            problems.append(f"{name} has changed (its sha256 is not the manifest's)")
        report.files += 1
    # Anything else, such as a model card, may lie beside what was written.
    read = [path.name for path in directory.glob("*.safetensors")] + [
        n for n in (CONFIG, INDEX, PLAN, FAMILY_FILE) if (directory / n).is_file()
    ]
    problems += [f"{name} is not in {MANIFEST}" for name in sorted([*read, *companions(directory)]) if name not in listed]
    return problems


def _check_tensors(directory: Path, report: Report, problems: list[str]) -> None:
    plan = read_plan(directory)
    checkpoint, family, model, scheme = open_directory(directory)
    if scheme is None:
        problems.append(f"{CONFIG} has no quantization_config, and {PLAN} says the model is quantized")
        return
    declared, planned = scheme.model_dump(include={"weights", "inputs", "head"}), plan["recipe"].get("scheme")
    if not isinstance(planned, dict) or any(planned.get(key) != value for key, value in declared.items()):
        problems.append(f"{CONFIG} declares another quantization than {PLAN}")
    blocks = list(decoder_blocks(model, family))
    if len(blocks) != len(plan["blocks"]):
        problems.append(f"{CONFIG} has {len(blocks)} blocks, and {PLAN} has {len(plan['blocks'])} blocks")
    with steps("verify block", len(plan["blocks"])) as progress:
        for index, (block, record) in enumerate(zip(blocks, plan["blocks"], strict=False)):
            for name, linear in linears(block, family).items():
                path = f"{family.blocks}.{index}.{name}"
                problems += _check_linear(checkpoint, family, path, linear, scheme, _recorded_digest(record, "linears", name))
                report.linears += 1
            progress.step()
    if scheme.head is not None:
        path, head = head_path(model) or "", model.get_output_embeddings()
        problems += _check_linear(checkpoint, family, path, head, scheme.head, _recorded_digest(plan, "head"))
        report.linears += 1
    report.tensors = len(checkpoint.tensors)
    if not problems:
        disk_names(
            model, checkpoint, family, scheme
        )  # raises for a tensor that is missing or has another shape, the norms and tables among them


def _check_linear(checkpoint: Checkpoint, family: Family, path: str, linear: Any, scheme: Scheme, digest: Any) -> list[str]:
    """What is wrong with the quantized linear `path`, whose weight must have this digest."""
    scale = f"{path}.weight_scale"
    disk = next((s for s in family.spellings(scale) if s in checkpoint.tensors), scale).removesuffix(".weight_scale")
    layer = (disk, scheme, linear.out_features, linear.in_features, is_transposed(family, f"{path}.weight", linear.weight))
    wrong = wrong_layout(checkpoint, *layer)
    if not wrong and digest_of(read_linear(checkpoint, *layer)[0]) != digest:
        wrong.append(f"the weight of '{disk}' in {checkpoint.tensors[f'{disk}.weight_scale'].shard} is not the one in {PLAN}")
    return wrong


def _recorded_digest(record: Any, *keys: str) -> Any:
    try:
        for key in (*keys, "sha256"):
            record = record[key]
    except (LookupError, TypeError):  # a plan that was edited
        return None
    return record


@torch.no_grad()
def _check_against(directory: Path, source: Checkpoint, report: Report) -> None:
    """Make each block again from the full-precision model and the recorded statistics; every tensor must come out the same."""
    plan = read_plan(directory)
    model = source.directory
    made_of = plan["recipe"]["model"]
    if source.fingerprint() != made_of:
        differs = "config.json" if source.fingerprint()["config_sha256"] != made_of["config_sha256"] else "the shards"
        raise VerificationError(f"{directory} was not made of {model}: {differs} differ from what {PLAN} says.")
    decoder = Decoder(source, declared=declared_family(directory))
    written = Checkpoint(directory)
    scheme = Scheme(**plan["recipe"]["scheme"])
    pairs = list(active_pairs(decoder.family, decoder.config, plan["recipe"]["smooth"]))
    statistics, factors = _load(directory / STATISTICS), _load(directory / SMOOTHING)
    if pairs or scheme.static or statistics:
        try:
            statistics = read_statistics(directory / STATISTICS, decoder)
        except InputError as damage:
            raise VerificationError(str(damage)) from damage
    stream = decoder.embed(synthetic_samples(decoder.config.vocab_size).batches)
    report.equivalence_error = 0.0
    made: set[str] = set()
    with steps("against block", len(decoder)) as progress:
        for index in range(len(decoder)):
            with decoder.block(index) as block:
                path = decoder.path(index)
                with recorded(block) as routing:
                    reference = decoder.run_all(block, index, stream, torch.float32)
                maxima = {name: statistics[f"{path}.{name}"] for name in decoder.linears(index) if f"{path}.{name}" in statistics}
                alpha = plan["blocks"][index]["alpha"]
                if pairs and alpha is not None:
                    smoothed = smooth_block(decoder, index, block, pairs, maxima, alpha)
                    error = prove_equivalent(decoder, block, index, stream, reference, routing, smoothed)
                    report.equivalence_error = max(report.equivalence_error, error)
                    for pair in smoothed:
                        stored = factors.pop(f"{path}.{pair.source}", None)
                        if stored is None or not torch.equal(stored, pair.s):
                            raise VerificationError(
                                f"the factors of '{path}.{pair.source}' in {directory / SMOOTHING} are not what {model} gives."
                            )
                quantized = quantize_block(decoder, index, block, scheme, maxima)
                report.weight_error |= {f"{path}.{name}": linear.error for name, linear in quantized.items()}
                expected = block_tensors(decoder, index, block, quantized)
                made |= set(expected)
                _compare(written, expected, model)
            stream.hidden = reference
            progress.step()
    for name in factors:
        raise VerificationError(f"'{name}' in {directory / SMOOTHING} is not of a norm or linear that was smoothed.")
    remade = {name for index in range(len(decoder)) for name in decoder.block_tensors(index)}
    if scheme.head is not None:
        head = quantize_head(decoder, scheme.head)
        report.weight_error[decoder.head_path] = head.error
        expected = head_tensors(decoder, head)
        made |= set(expected)
        remade |= decoder.head_names
        _compare(written, expected, model)
    outside = [name for name in source.tensors if name not in remade]
    for name in outside:
        _compare(written, {name: source.read(name, finite=False)}, model)
    for name in written.tensors:
        if name not in made and name not in outside:
            raise VerificationError(f"'{name}' in {directory / written.tensors[name].shard} does not come from {model}.")


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise VerificationError(f"{path} is missing or damaged ({error}): without it nothing can be made again.") from error


def _compare(written: Checkpoint, expected: dict[str, Tensor], model: Path) -> None:
    for name, tensor in expected.items():
        if name not in written.tensors:
            raise VerificationError(f"{written.directory} has no tensor '{name}', which {model} gives: is that the model it was made of?")
        found = written.read(name, finite=False)
        if found.dtype != tensor.dtype or not torch.equal(found, tensor):  # equal() is true across dtypes
            raise VerificationError(
                f"'{name}' in {written.directory / written.tensors[name].shard} is not what {model} gives: is that the model it was made of?"
            )
