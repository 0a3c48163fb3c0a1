"""Backends that multiply with quantized weights. Adding one is a file with these functions and an entry in `BACKENDS`
(docs/add-a-kernel.md)."""

from __future__ import annotations

import logging
from typing import Any, Protocol

import torch
from torch import Tensor

from smoothquant_plus.errors import InputError, did_you_mean
from smoothquant_plus.method.integers import QuantizedWeight
from smoothquant_plus.method.scheme import Scheme
from smoothquant_plus.runtime.kernels import cpu, reference, torch_int4, torch_int8, triton

log = logging.getLogger(__name__)


class Backend(Protocol):
    """What a kernel's file has.

    `supports` returns None, or the reason why it cannot run layers of this `shape` (N, K) there. `prepare` repacks a weight once, when it
    is loaded. `linear` multiplies x (..., K) with what `prepare` returned and gives (..., N) in x's dtype; `input_scale` is the static
    activation scale float32 (1,), None for dynamic activations.
    """

    def supports(self, scheme: Scheme, device: torch.device, shape: tuple[int, int]) -> str | None: ...

    def prepare(self, weight: QuantizedWeight) -> tuple[Tensor, ...]: ...

    def linear(
        self, x: Tensor, prepared: tuple[Tensor, ...], scheme: Scheme, input_scale: Tensor | None, bias: Tensor | None
    ) -> Tensor: ...


# The files of each backend, both in the order of preference.
BACKENDS: dict[str, tuple[Any, ...]] = {"cpu": (cpu,), "triton": (triton,), "torch": (torch_int8, torch_int4), "reference": (reference,)}


def backends(device: torch.device) -> list[str]:
    """The names that are tried on `device`, in the order of preference. Triton's interpreter, on the CPU, is for tests, which ask for it."""
    return [name for name in BACKENDS if name != "triton" or device.type != "cpu"]


def select(scheme: Scheme, device: torch.device, shape: tuple[int, int], name: str | None = None) -> tuple[str, Backend]:
    """The backend called `name`, or the first that supports the layer; each choice is logged with the reasons against the others.

    A backend asked for by name never falls back: InputError gives the reason.
    """
    if name is not None and name not in BACKENDS:
        raise InputError(f"unknown backend '{name}': choose one of {', '.join(BACKENDS)}.{did_you_mean(name, BACKENDS)}")
    reasons: list[str] = []
    for candidate in backends(device) if name is None else (name,):
        for kernels in BACKENDS[candidate]:
            reason = kernels.supports(scheme, device, shape)
            if reason is None:
                against = f" ({'; '.join(reasons)})" if reasons else ""
                log.info("%s %dx%d on %s: backend %s%s", scheme.name, *shape, device, candidate, against)
                return candidate, kernels
            reasons.append(f"{kernels.__name__.rpartition('.')[2]}: {reason}")
    who = "no backend can" if name is None else f"backend '{name}' cannot"
    raise InputError(f"{who} run a {shape[0]}x{shape[1]} layer in {scheme.name} on {device}: {'; '.join(reasons)}.")
