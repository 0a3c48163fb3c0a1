"""Mixtures of experts: fused 3-D expert weights seen as a linear layer each, and routing that a proof can repeat."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from smoothquant_plus.method.statistics import ChannelMaxima


class Expert(nn.Module):
    """down_proj(act(gate_proj(x)) * up_proj(x)), or without gates down_proj(act(up_proj(x))), for x (tokens, hidden)."""

    def __init__(self, hidden: int, intermediate: int, gated: bool, act_fn: Any, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False, dtype=dtype, device=device) if gated else None
        self.up_proj = nn.Linear(hidden, intermediate, bias=False, dtype=dtype, device=device)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False, dtype=dtype, device=device)
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        y: Tensor = self.down_proj(self.act_fn(up) if self.gate_proj is None else self.act_fn(self.gate_proj(x)) * up)
        return y


class Experts(nn.ModuleList):
    """In place of a transformers module that has all experts' weights in `gate_up_proj` (E, 2 * intermediate, hidden), or without gates in
    `up_proj` (E, intermediate, hidden), and in `down_proj` (E, hidden, intermediate)."""

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """For each token the weighted sum of its experts: `hidden` (tokens, hidden), the others (tokens, experts per token)."""
        output = torch.zeros_like(hidden)
        for expert in top_k_index.unique().tolist():
            token, place = torch.where(top_k_index == expert)
            y = self[expert](hidden[token]) * top_k_weights[token, place, None]
            output.index_add_(0, token, y.to(output.dtype))
        return output


def unfuse(model: nn.Module) -> None:
    """Replace each module of fused experts (on the meta device) by `Experts`. Raises ValueError for one whose layout is not known, or that
    does not compute the same."""
    checked: set[type] = set()
    for path, module in list(model.named_modules()):
        fused = dict(module.named_parameters(recurse=False))
        if "down_proj" not in fused or fused["down_proj"].ndim != 3:
            continue
        count, hidden, intermediate = fused["down_proj"].shape
        ups = {"gate_up_proj": (count, 2 * intermediate, hidden), "up_proj": (count, intermediate, hidden)}
        up = next((name for name, shape in ups.items() if fused.keys() == {name, "down_proj"} and fused[name].shape == shape), None)
        if up is None:
            raise ValueError(f"the experts in {path} are laid out in a way that is not known: {', '.join(fused)}")
        gated = up == "gate_up_proj"
        if type(module) not in checked and not _computes_the_same(module, gated):
            function = "down(act(gate) * up)" if gated else "down(act(up))"
            raise ValueError(f"the experts in {path} ({type(module).__name__}) compute something else than {function}")
        checked.add(type(module))
        down: Any = fused["down_proj"]
        experts = (Expert(hidden, intermediate, gated, module.act_fn, down.dtype, down.device) for _ in range(count))
        model.set_submodule(path, Experts(experts))


@torch.no_grad()
def _computes_the_same(module: Any, gated: bool) -> bool:
    """Whether fused experts give what `Experts` does, tried with small random weights in place of theirs."""
    hidden, intermediate, count, dtype = 8, 4, module.down_proj.shape[0], torch.float32
    generator = torch.Generator().manual_seed(0)
    small = copy.deepcopy(module)
    up = nn.Parameter(torch.randn(count, (2 if gated else 1) * intermediate, hidden, generator=generator, dtype=dtype))
    setattr(small, "gate_up_proj" if gated else "up_proj", up)
    small.down_proj = nn.Parameter(torch.randn(count, hidden, intermediate, generator=generator, dtype=dtype))
    experts = Experts(Expert(hidden, intermediate, gated, module.act_fn, dtype, torch.device("cpu")) for _ in range(count))
    for number in range(count):
        names = ("gate_proj.weight", "up_proj.weight") if gated else ("up_proj.weight",)
        weights = dict(zip(names, up[number].chunk(len(names)), strict=True))
        experts[number].load_state_dict({**weights, "down_proj.weight": small.down_proj[number]})
    x = 20 * torch.randn(6, hidden, generator=generator, dtype=dtype)  # large enough for any clamp
    arguments = (x, torch.arange(6)[:, None] % count, torch.rand(6, 1, generator=generator, dtype=dtype))
    try:
        return torch.allclose(small(*arguments), experts(*arguments), rtol=1e-3, atol=1e-3)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError):
        return False


def together(name: str) -> str:
    """The path `name` with the number of an expert replaced by `*`."""
    return re.sub(r"\bexperts\.\d+\.", "experts.*.", name)


def share_with_unreached(measured: Mapping[str, ChannelMaxima]) -> None:
    """Give each expert's linear that saw no token the maxima over all the other experts: for those behind a norm, which sends every token
    to some expert, that is the maxima of the norm's own output."""
    siblings: defaultdict[str, list[ChannelMaxima]] = defaultdict(list)
    for name, channels in measured.items():
        siblings[together(name)].append(channels)
    for group in siblings.values():
        shared = torch.stack([channels.maxima for channels in group]).amax(dim=0)
        for channels in group:
            if channels.tokens == 0:
                channels.maxima = shared.clone()


def tokens_of_experts(measured: Mapping[str, ChannelMaxima]) -> dict[str, list[int]]:
    """How many tokens each expert saw, by the path of its block's experts."""
    counts: defaultdict[str, list[int]] = defaultdict(list)
    for name, channels in measured.items():
        if found := re.fullmatch(r"((?:.*\.)?experts)\.\d+\.up_proj", name):
            counts[found[1]].append(channels.tokens)
    return dict(counts)


@dataclass
class Routing:
    """Which experts each token went to, call by call: (top_k_index, top_k_weights), each (tokens, experts per token)."""

    calls: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    tokens: int = 0
    flipped: int = 0


@contextmanager
def recorded(block: nn.Module) -> Iterator[Routing]:
    """Record the routing of whatever `block` runs inside the context."""
    routing = Routing()

    def record(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        routing.calls.append((args[1].cpu(), args[2].cpu()))

    with _hooks(block, record):
        yield routing


@contextmanager
def repeated(block: nn.Module, routing: Routing) -> Iterator[None]:
    """Send each token where `routing` says, while `block` runs the same batches once more; `routing` counts those that would have gone
    elsewhere. Otherwise a tie between two experts, decided by the last bit, would look like another function."""
    calls = iter(routing.calls)

    def repeat(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, index, weights = args
        before, before_weights = next(calls)
        before, before_weights = before.to(index.device), before_weights.to(weights)
        flipped = (index.sort(dim=-1).values != before.sort(dim=-1).values).any(dim=-1, keepdim=True)  # (tokens, 1)
        routing.tokens += len(flipped)
        routing.flipped += int(flipped.sum())
        return hidden, torch.where(flipped, before, index), torch.where(flipped, before_weights, weights)

    with _hooks(block, repeat):
        yield


@contextmanager
def _hooks(block: nn.Module, hook: Any) -> Iterator[None]:
    modules: Iterable[nn.Module] = (module for module in block.modules() if isinstance(module, Experts))
    handles = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
