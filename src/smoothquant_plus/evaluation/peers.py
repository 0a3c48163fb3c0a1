"""What a benchmark compares our products with: `Peer`, a product of another library (cpu_peers.py, gpu_peers.py), and `Weights` in every form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple

from torch import Tensor

from smoothquant_plus.method.integers import QuantizedWeight

BF16 = "torch bf16"  # what all others are compared with


@dataclass(frozen=True)
class Weights:
    """One weight (N, K) in every form: bfloat16, and the integers of each scheme that is measured."""

    floats: Tensor
    quantized: dict[str, QuantizedWeight]

    def copy(self) -> Weights:
        """The same numbers elsewhere in memory."""

        def again(weight: QuantizedWeight) -> QuantizedWeight:
            zero_point = None if weight.zero_point is None else weight.zero_point.clone()
            return QuantizedWeight(weight.values.clone(), weight.scale.clone(), weight.quant, zero_point)

        copies = {id(weight): again(weight) for weight in self.quantized.values()}  # some schemes share theirs
        return Weights(self.floats.clone(), {scheme: copies[id(weight)] for scheme, weight in self.quantized.items()})


# A weight that was repacked for one library, waiting for activations: x bfloat16 (M, K) -> a call without arguments that multiplies, again
# and again, and gives y (M, N). What a model would not do at each layer, such as converting x to the library's own float type, is done before.
Product = Callable[[Tensor], Callable[[], Tensor]]


class Peer(NamedTuple):
    """`scheme` is what the peer is compared in ('bf16': in all of them); `arithmetic` what it multiplies in, 'int8' or 'float'; `packages`
    what it needs besides torch; `devices` where it runs. `build` raises whatever the library raises, or InputError with a reason."""

    scheme: str
    arithmetic: str
    packages: tuple[str, ...]
    devices: tuple[str, ...]
    build: Callable[[Weights], Product]

    def missing(self) -> str | None:
        """The first package that is not installed."""
        return next((package for package in self.packages if find_spec(package) is None), None)


def four_bits(weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
    """Values int8 (N, K), scales bfloat16 (N, groups) and zero points int8 (N, groups)."""
    weight = weights.quantized.get("w4a16") or weights.quantized["w4a8"]  # the same
    assert weight.zero_point is not None
    return weight.values, weight.scale, weight.zero_point
