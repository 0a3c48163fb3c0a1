"""Pictures of what a quantization did: the loss against alpha, and the activations before and after smoothing."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from smoothquant_plus.errors import InputError
from smoothquant_plus.files import write_atomic
from smoothquant_plus.models.skeleton import declared_family, load_config, open_family
from smoothquant_plus.models.statistics import SMOOTHING, STATISTICS
from smoothquant_plus.verification import read_plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BEFORE, AFTER, CHOSEN = "#d62728", "#1f77b4", "#2ca02c"


def plot(output: str | Path, directory: str | Path | None = None) -> list[Path]:
    """Draw what the checkpoint `output` records, as PNG and SVG in `directory` (default: `plots` inside it): the files that were written.

    `loss` is there when alpha was searched, `activations` when something was smoothed. Raises InputError when matplotlib is missing, when
    `output` has no plan, or when neither is there to be drawn.
    """
    output = Path(output)
    directory = output / "plots" if directory is None else Path(directory)
    try:
        from matplotlib.figure import Figure  # noqa: F401
    except ImportError as error:
        raise InputError("plots need the extra 'plot': pip install '.[plot]' in a clone of this package.") from error
    plan = read_plan(output)
    figures = {"loss": loss_figure(plan), "activations": activations_figure(output, plan)}
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    if not drawn:
        raise InputError(f"{output} has nothing to plot: nothing was smoothed, and no alpha was searched.")
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in drawn.items():
        for kind, metadata in (("png", {}), ("svg", {"Date": None})):
            path = directory / f"{name}.{kind}"
            write_atomic(path, partial(figure.savefig, format=kind, metadata=metadata, dpi=110))
            paths.append(path)
    return paths


def loss_figure(plan: dict[str, Any]) -> Figure | None:
    """The loss against alpha: of the whole model, or of each block."""
    from matplotlib.figure import Figure

    if "search" in plan:
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        _draw_model_search(axes, plan["search"])
        return figure
    if any("search" in block for block in plan["blocks"]):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        _draw_block_search(axes, plan["blocks"])
        return figure
    return None


def _draw_model_search(axes: Axes, search: dict[str, Any]) -> None:
    candidates = [candidate for candidate in search["candidates"] if "mse" in candidate]
    alphas = [candidate["alpha"] for candidate in candidates]
    axes.plot(alphas, [candidate["mse"] for candidate in candidates], "o-", color=AFTER, markersize=4, label="mean squared error")
    if "mse" in search["unsmoothed"]:
        axes.axhline(search["unsmoothed"]["mse"], color=AFTER, linestyle=":", label="the same, without smoothing")
    axes.set(xlabel="alpha", ylabel="final hidden states: mean squared error", xlim=(-0.02, 1.02))
    axes.set_title(f"Loss of the whole quantized model, {search['tokens']} tokens")
    entropy = axes.twinx()
    entropy.plot(alphas, [candidate["cross_entropy"] for candidate in candidates], ".-", color="0.6", linewidth=1, label="next-token loss")
    entropy.axhline(search["full_precision"]["cross_entropy"], color="0.6", linestyle="--", linewidth=1, label="the same, full precision")
    entropy.set_ylabel("next-token cross-entropy, nats")
    if search["alpha"] is not None:
        axes.axvline(search["alpha"], color=CHOSEN, label=f"chosen: alpha {search['alpha']:g}")
    handles = [axis.get_legend_handles_labels() for axis in (axes, entropy)]
    _legend(axes, handles[0][0] + handles[1][0], handles[0][1] + handles[1][1])


def _draw_block_search(axes: Axes, blocks: list[dict[str, Any]]) -> None:
    from matplotlib import colormaps

    for index, block in enumerate(blocks):
        losses = {candidate["alpha"]: candidate["mse"] for candidate in block["search"] if "mse" in candidate}
        unsmoothed = losses.pop(None, max(losses.values()))  # one that is not finite is worse than all
        color = colormaps["viridis"](index / max(1, len(blocks) - 1))
        ends = index in (0, len(blocks) - 1)
        relative = {alpha: loss / unsmoothed for alpha, loss in losses.items()}
        axes.plot(list(relative), list(relative.values()), color=color, linewidth=1, label=f"block {index}" if ends else None)
        if block["alpha"] is not None:
            axes.plot([block["alpha"]], [relative[block["alpha"]]], "o", color=color, markersize=4)
    axes.axhline(1.0, color="0.6", linestyle=":", label="without smoothing")
    axes.set(xlabel="alpha (the dots are chosen)", ylabel="squared error of a block, relative to no smoothing")
    _legend(axes, *axes.get_legend_handles_labels())


def _legend(axes: Axes, handles: list[Any], labels: list[str]) -> None:
    """Below the axes, where it hides nothing."""
    axes.legend(handles, labels, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)


def activations_figure(output: Path, plan: dict[str, Any]) -> Figure | None:
    """Per-channel maxima of the input of every smoothed pair that starts at a norm: one row for each block, one column for each norm."""
    from matplotlib.figure import Figure

    _, family = open_family(load_config(output), declared_family(output))
    norms = [pair.source for pair in family.pairs if pair.when == "norms"]
    smoothed = [{pair["source"]: pair["sinks"][0] for pair in block["pairs"] if pair["source"] in norms} for block in plan["blocks"]]
    columns = [norm for norm in norms if any(norm in block for block in smoothed)]
    if not columns:
        return None
    try:
        maxima, factors = load_file(output / STATISTICS), load_file(output / SMOOTHING)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{output}: {STATISTICS} and {SMOOTHING} cannot be read: {error}.") from error
    figure = Figure(figsize=(5 * len(columns), 1.3 * len(smoothed) + 0.8), layout="constrained")
    grid = figure.subplots(len(smoothed), len(columns), squeeze=False, sharex="col", sharey="col")
    for index, block in enumerate(smoothed):
        path = f"{family.blocks}.{index}"
        for column, norm in enumerate(columns):
            axes = grid[index][column]
            if norm in block:
                before = maxima[f"{path}.{block[norm]}"]
                axes.plot(before, color=BEFORE, linewidth=0.6, label="before smoothing")
                axes.plot(before / factors[f"{path}.{norm}"], color=AFTER, linewidth=0.6, label="after")
            axes.set_yscale("log")
            axes.tick_params(labelsize=7)
            if column == 0:
                axes.set_ylabel(f"block {index}", fontsize=8)
            if index == 0:
                axes.set_title(f"max|X| behind {norm}, per channel", fontsize=9)
    grid[0][0].legend(fontsize=7, loc="upper right")
    return figure
