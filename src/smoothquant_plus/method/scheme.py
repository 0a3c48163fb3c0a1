"""What numbers become: a quantization scheme is pure data.

Adding a scheme is one row in `SCHEMES` (docs/add-a-scheme.md).
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from smoothquant_plus.errors import InputError, did_you_mean


class Quant(BaseModel):
    """How one operand is turned into integers.

    `strategy` says how many numbers share a scale, in the terms of compressed-tensors: `tensor` (all of them), `channel` (an output
    channel of a weight) or `token` (a row of activations). `dynamic` scales are computed from the values when they are used; the others
    are stored. Symmetric means that zero maps to zero and no zero point is stored.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: Literal[8]
    strategy: Literal["tensor", "channel", "token"]
    symmetric: Literal[True] = True
    dynamic: bool = False


class Scheme(BaseModel):
    """What the two operands of every linear layer in the decoder blocks become; `lm_head` stays as it is, as in both papers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    weights: Quant
    inputs: Quant
    ignore: tuple[str, ...] = ("lm_head",)


ACTIVATIONS: dict[str, Quant] = {
    # The three settings of SmoothQuant (arXiv 2211.10438, Table 2).
    "token": Quant(bits=8, strategy="token", dynamic=True),  # O1
    "tensor": Quant(bits=8, strategy="tensor", dynamic=True),  # O2
    "static": Quant(bits=8, strategy="tensor", dynamic=False),  # O3
}

SCHEMES: dict[str, Scheme] = {
    "w8a8": Scheme(name="w8a8", weights=Quant(bits=8, strategy="channel"), inputs=ACTIVATIONS["token"]),
}


def find_scheme(name: str, activations: str = "token", weights: str = "channel") -> Scheme:
    """The scheme called `name`, with its activation granularity ('token', 'tensor', 'static') and weight granularity
    ('channel', 'tensor') chosen.

    Raises InputError for a name that is not there.
    """
    if name not in SCHEMES:
        raise InputError(f"unknown scheme '{name}': choose one of {', '.join(SCHEMES)}.{did_you_mean(name, SCHEMES)}")
    if activations not in ACTIVATIONS:
        raise InputError(
            f"unknown activation quantization '{activations}': choose one of {', '.join(ACTIVATIONS)}.{did_you_mean(activations, ACTIVATIONS)}"
        )
    if weights not in ("channel", "tensor"):
        raise InputError(f"unknown weight quantization '{weights}': choose channel or tensor.")
    scheme = SCHEMES[name]
    return scheme.model_copy(
        update={"inputs": ACTIVATIONS[activations], "weights": scheme.weights.model_copy(update={"strategy": weights})}
    )
