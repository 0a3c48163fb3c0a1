"""The whole story: the request is checked, alpha found, every block quantized (blockwise.py), the rest copied (output.py), all of it verified."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from smoothquant_plus.blockwise import Method, calibrate_blocks, quantize_blocks
from smoothquant_plus.errors import InputError
from smoothquant_plus.method.scheme import find_scheme
from smoothquant_plus.models.checkpoint import Checkpoint, write_shard
from smoothquant_plus.models.coverage import summary
from smoothquant_plus.models.families import Pair
from smoothquant_plus.models.sizes import quantized_bytes
from smoothquant_plus.output import FACTORS, MAXIMA, copy_outside, finish, head_note, kept_of
from smoothquant_plus.preparation import (
    Calibration,
    check_calibration,
    check_groups,
    check_search,
    check_space,
    check_target,
    choose_alpha,
    choose_pairs,
    describe,
    environment,
    open_decoder,
    read_samples,
)
from smoothquant_plus.progress import note, peak_rss_mb
from smoothquant_plus.search import Search, search_model
from smoothquant_plus.verification import read_plan, verify
from smoothquant_plus.workspace import Workspace

NO_TEXT = Calibration()


@dataclass(frozen=True)
class Result:
    """What a finished run reports. `alpha` is the number that the model was smoothed with, 'block' where each block has its own, None where nothing
    was smoothed; `tokens` of calibration text were run; `equivalence_error` is the largest of any block, relative; `seconds` and `peak_rss_mb`
    (10**6 bytes) are of this process alone (a resumed run did less)."""

    output: str
    scheme: str
    alpha: float | str | None
    blocks: int
    bytes_before: int
    bytes_after: int
    peak_rss_mb: float
    seconds: float
    tokens: int
    equivalence_error: float
    notes: list[str] = field(default_factory=list)


def quantize(
    model: str | Path,
    output: str | Path,
    *,
    scheme: str = "w8a8",
    activations: str | None = None,
    weights: str | None = None,
    group_size: int | None = None,
    symmetric: bool = False,
    lm_head: str | None = None,
    smooth: str = "norms",
    alpha: str | float = "default",
    calibration: Calibration = NO_TEXT,
    search: Search = Search(),  # noqa: B008 (frozen)
    pairs: str | Path | None = None,
    target: str = "vllm",
) -> Result:
    """Smooth and quantize the model directory `model` into the new checkpoint directory `output`.

    `scheme` is 'w8a8' or 'w4a16'. For w8a8 `activations` is 'token' (O1), 'tensor' (O2) or 'static' (O3) and `weights` 'channel' or
    'tensor'; for w4a16 `group_size` is 128, 64 or 32, and `symmetric` leaves out zero points. `lm_head` is 'w8a8' or 'w4a16' to quantize the
    output head too, rounded to nearest and with dynamic activations whatever the blocks have; a head that is tied to the embedding then
    becomes one of its own, and the embedding stays as it is. `smooth` is 'none', 'norms' or 'all'.
    `alpha` is a number in 0..1; 'model', searched by the loss of the whole quantized model (SmoothQuant+); 'block', searched for each
    block by itself; or 'default', the family's published value for w8a8 and 'model' for w4a16. `pairs` is a file that declares
    the family of a model that has no row of its own (docs/add-a-family.md). `target` is 'vllm', which refuses what vLLM could not read, or
    'here', for this package's own runtime; it changes no byte of what is written. Killed at any moment, the same call continues where it was
    and gives the same bytes.
    Raises InputError for input that cannot be used, VerificationError when smoothing turned out to change the function.
    """
    start = time.monotonic()
    model, output = Path(model), Path(output)
    chosen = find_scheme(scheme, activations, weights, group_size, symmetric, lm_head)
    decoder = open_decoder(model, calibration, Path(pairs) if pairs else None)
    check_groups(decoder, chosen)
    remarks = check_target(decoder, chosen, target)
    notes: list[str] = []
    strength = choose_alpha(decoder, chosen, smooth, alpha, notes)
    active = choose_pairs(decoder, smooth)
    needs_maxima = smooth != "none" or chosen.static
    needs_runs = smooth != "none" or (needs_maxima and calibration.statistics is None)
    searched = check_search(calibration, search, strength)
    check_calibration(decoder, calibration, needs_maxima)
    recipe = {"scheme": chosen.model_dump(), "smooth": smooth, "alpha": strength, **describe(decoder, calibration)}
    if searched:
        recipe["samples_search"] = search.samples

    with Workspace(output, recipe, environment(decoder)) as work:
        if not work.complete:
            samples = read_samples(decoder, calibration) if needs_runs else None
            work.check_samples(samples.batches if samples else [])
            check_space(decoder, work, quantized_bytes(decoder, chosen), samples, search, 0 if work.search_result.is_file() else searched)
            copy_outside(decoder, work, chosen)  # before the long work: it reads, and so checks, the tables
            facts: dict[str, Any] = {"tokens": samples.tokens if samples and calibration.text else 0, "notes": notes}
            if strength == "model":
                assert samples is not None
                found = search_model(decoder, work, chosen, active, samples, search)
                facts["search"], strength = found, found["alpha"]
                notes.append(search_note(found))
            quantize_blocks(decoder, work, Method(chosen, smooth, active, strength), calibration, samples, search)
            notes += summary(work.blocks.records(), decoder.path)
            if chosen.head:
                notes.append(head_note(decoder, chosen.head, json.loads(work.head_result.read_text())))
            finish(decoder, work, chosen, recipe, {"alpha": strength, **facts})
            verify(work.directory)
            work.publish(work.directory)

    plan = read_plan(output)
    remarks += plan["notes"]
    for remark in remarks:
        note(remark)
    return Result(
        output=str(output),
        scheme=chosen.name,
        alpha=plan["alpha"],
        blocks=len(decoder),
        bytes_before=decoder.checkpoint.nbytes,
        bytes_after=Checkpoint(output).nbytes,
        peak_rss_mb=round(peak_rss_mb(), 1),
        seconds=round(time.monotonic() - start, 3),
        tokens=plan["tokens"],
        equivalence_error=plan["equivalence_error"],
        notes=remarks,
    )


@torch.no_grad()
def calibrate(
    model: str | Path,
    output: str | Path,
    *,
    calibration: Calibration,
    pairs: str | Path | None = None,
    alpha: str | float | None = None,
    scheme: str = "w4a16",
    activations: str | None = None,
    weights: str | None = None,
    group_size: int | None = None,
    symmetric: bool = False,
    smooth: str = "norms",
    search: Search = Search(),  # noqa: B008 (frozen)
) -> Path:
    """Measure on the calibration text, and write one safetensors file: the per-channel maxima of every linear's input, or with `alpha` the
    smoothing factors, the same as `quantize` with these options folds (its smoothing.safetensors).

    All that comes after `alpha` is as in `quantize`, and counts with it alone. Resumes like `quantize`. Raises InputError as it does.
    """
    model, output = Path(model), Path(output)
    if output.suffix != ".safetensors":
        raise InputError(f"{output}: statistics are written as safetensors; give a name that ends in .safetensors.")
    if calibration.statistics:
        raise InputError("calibrate measures statistics: give it text.")
    chosen = find_scheme(scheme, activations, weights, group_size, symmetric)
    if alpha is None and (chosen != find_scheme("w4a16") or smooth != "norms"):
        raise InputError(
            "maxima do not depend on a scheme or on what is smoothed: give --alpha for smoothing factors, or leave those options out."
        )
    decoder = open_decoder(model, calibration, Path(pairs) if pairs else None)
    notes: list[str] = []
    active: Sequence[Pair] = ()
    strength: float | str | None = None
    if alpha is not None:
        if smooth == "none":
            raise InputError("--smooth none has no factors: choose norms or all.")
        check_groups(decoder, chosen)
        strength = choose_alpha(decoder, chosen, smooth, alpha, notes)
        active = choose_pairs(decoder, smooth)
    check_calibration(decoder, calibration, needed=True)
    recipe: dict[str, Any] = {"calibrate": True, **describe(decoder, calibration)}
    if alpha is not None:
        recipe |= {"scheme": chosen.model_dump(), "smooth": smooth, "alpha": strength}
    searched = check_search(calibration, search, strength)
    if searched:
        recipe["samples_search"] = search.samples
    with Workspace(output, recipe, environment(decoder)) as work:
        if work.complete:
            return output
        samples = read_samples(decoder, calibration)
        work.check_samples(samples.batches)
        check_space(decoder, work, 0, samples, search, 0 if work.search_result.is_file() else searched)
        if strength == "model":
            found = search_model(decoder, work, chosen, active, samples, search)
            strength = found["alpha"]
            notes.append(search_note(found))
        calibrate_blocks(decoder, work, Method(chosen, smooth, active, strength), samples, search)
        kind = MAXIMA if alpha is None else FACTORS
        write_shard(work.directory / output.name, kept_of(work, kind), {"recipe": json.dumps(work.recipe, sort_keys=True)})
        work.publish(work.directory / output.name)
    for remark in notes:
        note(remark)
    return output


def search_note(found: dict[str, Any]) -> str:
    """What the search over the whole model found, in a sentence."""
    losses = {candidate["alpha"]: candidate["mse"] for candidate in found["candidates"] if "mse" in candidate}
    unsmoothed = found["unsmoothed"].get("mse", math.inf)
    if found["alpha"] is None:
        return f"smoothing does not help this model: the smallest loss is {min(losses.values()):.4g}, without smoothing {unsmoothed:.4g}."
    return f"alpha {found['alpha']:g} has the smallest loss of the whole model: {losses[found['alpha']]:.4g}, without smoothing {unsmoothed:.4g}."
