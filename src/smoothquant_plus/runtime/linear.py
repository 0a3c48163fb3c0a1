"""A linear layer whose weight is integers, and one whose weight stayed in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smoothquant_plus.method.integers import QuantizedWeight
from smoothquant_plus.method.scheme import Scheme
from smoothquant_plus.runtime.kernels import cpu, select


@dataclass(frozen=True)
class QuantizedInput:
    """Activations that were quantized per token where they were made (`fuse`), in place of a tensor in `dtype`.

    `values` int8 (..., K filled up as the backend wants it), `scale` float32 (...).
    """

    values: Tensor
    scale: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """Of `values`: all that attention asks of its input besides products."""
        return self.values.shape


class QuantLinear(nn.Module):
    """y = x W^T + b with W as integers and, in W8A8, x quantized on the way in.

    x (..., in_features) in any float dtype; y (..., out_features) in the same. Inference only. The weight is repacked for the backend once,
    here, and no other copy of it is kept. `backend` is chosen by `select` unless it is named; a named one that cannot run the layer raises
    InputError.
    """

    input_scale: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        weight: QuantizedWeight,
        scheme: Scheme,
        *,
        input_scale: Tensor | None = None,
        bias: Tensor | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.values.shape
        if bias is not None and bias.shape != (self.out_features,):
            raise ValueError(f"a bias of shape {tuple(bias.shape)} does not fit {self.out_features} output channels")
        if scheme.static and input_scale is None:
            raise ValueError(f"static activation quantization needs the input scale of this {self.out_features}x{self.in_features} layer")
        self.scheme = scheme
        self.backend, self._kernels = select(scheme, weight.values.device, (self.out_features, self.in_features), backend)
        prepared = {f"prepared_{index}": tensor for index, tensor in enumerate(self._kernels.prepare(weight))}
        self._prepared_names = tuple(prepared)
        for name, tensor in prepared.items():
            self.register_buffer(name, tensor, persistent=False)
        self.register_buffer("input_scale", input_scale, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.contiguous(), persistent=False)

    @property
    def prepared(self) -> tuple[Tensor, ...]:
        """What the backend's `prepare` made of the weight."""
        return tuple(buffer for name in self._prepared_names if (buffer := self._buffers[name]) is not None)

    def forward(self, x: Tensor | QuantizedInput) -> Tensor:
        if isinstance(x, QuantizedInput):
            y: Tensor = self._kernels.product(x.values, x.scale, self.prepared, self.bias, x.dtype)  # type: ignore[attr-defined]
            return y
        return self.multiply(x, self.bias)

    @property
    def takes_integers(self) -> bool:
        """Whether `forward` takes a QuantizedInput too: W8A8 with scales per token, on a backend that has `product`."""
        inputs = self.scheme.inputs
        return inputs is not None and inputs.dynamic and inputs.strategy == "token" and hasattr(self._kernels, "product")

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`forward` with this `bias` (N,), or none, in place of the layer's own. Raises ValueError for x of other channels."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x has {x.shape[-1]} channels, and the layer {self.in_features} input channels")
        return self._kernels.linear(x, self.prepared, self.scheme, self.input_scale, bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """What `to`, `half` and the like do: they move all of it, and change the dtype of the bias alone. Scales are as the kernels want them."""

        def moved(tensor: Tensor) -> Tensor:
            made = fn(tensor)
            return made if made.dtype == tensor.dtype or tensor is self.bias else tensor.to(made.device)

        super()._apply(moved, recurse)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme.name}, backend={self.backend}"


class Bfloat16Linear(nn.Module):
    """What `linear` is, with its weight in bfloat16 repacked for the CPU kernels (where `cpu.multiplies_bfloat16`); of the original nothing is kept.

    x bfloat16 (..., in_features); y (..., out_features). Inference only.
    """

    packed: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.register_buffer("packed", cpu.prepare_bfloat16(linear.weight.detach()), persistent=False)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return cpu.linear_bfloat16(x, self.packed, self.bias, self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
