"""What a run does to each layer of a block: which linears are quantized, which of them smoothed, and why the others are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from smoothquant_plus.models.blocks import Decoder
from smoothquant_plus.models.experts import together
from smoothquant_plus.models.families import SMOOTH, Pair, is_exact, pairs_in

UNPAIRED = "what feeds it takes no factor"
# The share of an input's channels that its one scale may round to 0 before the user hears of it.
MANY_LOST = 0.1


def coverage(decoder: Decoder, index: int, smooth: str, active: Sequence[Pair], alpha: float | None) -> dict[str, Any]:
    """`smoothed`: the linears of block `index` that are; `unsmoothed`: the others and why; `unquantized`: layers that stay as they are.

    Experts are listed once, as `experts.*`.
    """
    modules = dict(decoder.blocks[index].named_modules())
    quantized = decoder.linears(index)
    smoothed = {sink for pair in decoder.pairs(index, active) for sink in pair.sinks} if alpha is not None else set()
    reasons: dict[str, str] = {}
    for name in quantized:
        if name not in smoothed and together(name) not in reasons:  # once for all experts
            reasons[together(name)] = _reason(decoder, modules, name, smooth, alpha)
    kept = [name for name, module in modules.items() if getattr(getattr(module, "weight", None), "ndim", 0) == 2 and name not in quantized]
    return {
        "smoothed": list(dict.fromkeys(together(name) for name in quantized if name in smoothed)),
        "unsmoothed": reasons,
        "unquantized": kept,
    }


def _reason(decoder: Decoder, modules: dict[str, Any], name: str, smooth: str, alpha: float | None) -> str:
    if smooth == "none":
        return "--smooth none"
    feeding = [pair for pair in decoder.family.pairs if any(together(sink) == together(name) for sink in pair.sinks)]
    for pair in feeding:
        if is_exact(pair, decoder.config) and name in {sink for found in pairs_in(modules, [pair]) for sink in found.sinks}:
            if alpha is None and SMOOTH.index(pair.when) <= SMOOTH.index(smooth):
                return "no alpha was better than no smoothing"
            return f"--smooth {pair.when} smooths it"
    for pair in feeding:
        unmet = [f"{key} is {getattr(decoder.config, key)!r}" for key in pair.requires if not is_exact(pair, decoder.config)]
        if unmet:
            return f"smoothing it would not be exact: {', '.join(unmet)}"
    return UNPAIRED


def summary(records: Iterable[dict[str, Any]], path: Callable[[int], str]) -> list[str]:
    """What the user is told: the coverage of all blocks, experts that no text reached, and inputs that one scale cannot hold. `path` gives that of a
    block by its number."""
    blocks = 0
    smoothed, unsmoothed, kept = Counter[str](), Counter[tuple[str, str]](), Counter[str]()
    unreached = experts = 0
    lost: dict[str, float] = {}
    for record in records:
        lost |= {f"{path(blocks)}.{name}": linear.get("lost_channels", 0.0) for name, linear in record["linears"].items()}
        blocks += 1
        found = record["coverage"]
        smoothed.update(found["smoothed"])
        unsmoothed.update(found["unsmoothed"].items())
        kept.update(found["unquantized"])
        for tokens in record.get("experts", {}).get("tokens", {}).values():
            experts += len(tokens)
            unreached += tokens.count(0)

    def count(name: str, number: int) -> str:
        return name if number == blocks else f"{name} (in {number} of {blocks} blocks)"

    by_reason: dict[str, list[str]] = {}
    for (name, reason), number in unsmoothed.items():
        by_reason.setdefault(reason, []).append(count(name, number))
    lines = [f"smoothed and quantized: {', '.join(count(*item) for item in smoothed.items()) or 'nothing'}."]
    lines += [f"quantized, not smoothed ({reason}): {', '.join(names)}." for reason, names in by_reason.items()]
    if kept:
        lines.append(f"left as they are: {', '.join(count(*item) for item in kept.items())}.")
    if unreached:
        lines.append(
            f"{unreached} of {experts} experts were reached by no token of the calibration text and have the maxima of the other experts of "
            "their block (plan.json counts the tokens): more text would measure them."
        )
    worst = sorted((name for name, share in lost.items() if share >= MANY_LOST), key=lambda name: -lost[name])
    if worst:
        named = ", ".join(f"{name} ({lost[name]:.0%})" for name in worst[:3]) + (f" and {len(worst) - 3} more" if len(worst) > 3 else "")
        lines.append(
            f"one scale for all activations rounds channels of these inputs to 0, so large are a few others: {named}. Expect worse answers: "
            "--activations token has a scale for each token, and --smooth all also smooths what no norm feeds."
        )
    return lines
