"""What numbers become: a quantization scheme is pure data.

docs/add-a-scheme.md says what else a new kind of number touches.
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


ACTIVATIONS: dict[str, Quant] = {
    # The three settings of SmoothQuant (arXiv 2211.10438, Table 2).
    "token": Quant(bits=8, strategy="token", dynamic=True),  # O1
    "tensor": Quant(bits=8, strategy="tensor", dynamic=True),  # O2
    "static": Quant(bits=8, strategy="tensor", dynamic=False),  # O3
}

SCHEMES: dict[str, Scheme] = {
    "w8a8": Scheme(name="w8a8", weights=Quant(bits=8, strategy="channel"), inputs=ACTIVATIONS["token"]),
}


def find_scheme(name: str, activations: str | None = None, weights: str | None = None) -> Scheme:
    """The scheme called `name`; `activations` ('token', 'tensor', 'static') and `weights` ('channel', 'tensor') replace its own
    granularities where they are given.

    Raises InputError for a name that is not there.
    """
    scheme = SCHEMES.get(name)
    if scheme is None:
        raise InputError(f"unknown scheme '{name}': choose one of {', '.join(SCHEMES)}.{did_you_mean(name, SCHEMES)}")
    if activations is not None:
        if activations not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise InputError(f"unknown --activations '{activations}': choose one of {known}.{did_you_mean(activations, ACTIVATIONS)}")
        scheme = scheme.model_copy(update={"inputs": ACTIVATIONS[activations]})
    if weights is not None:
        if weights not in ("channel", "tensor"):
            raise InputError(f"unknown --weights '{weights}': choose channel or tensor.")
        scheme = scheme.model_copy(update={"weights": scheme.weights.model_copy(update={"strategy": weights})})
    return scheme
