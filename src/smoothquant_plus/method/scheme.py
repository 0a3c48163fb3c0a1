"""What numbers become: a quantization scheme is pure data.

docs/add-a-scheme.md says what else a new kind of number touches.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from smoothquant_plus.errors import InputError, did_you_mean

GROUP_SIZES = (128, 64, 32)


class Quant(BaseModel):
    """How one operand is turned into integers.

    `strategy` says how many numbers share a scale, in the terms of compressed-tensors: `tensor` (all of them), `channel` (an output
    channel of a weight), `group` (`group_size` neighbours along a weight's input channels) or `token` (a row of activations). `dynamic`
    scales are computed from the values when they are used; the others are stored. Symmetric means that no zero point is stored; zero is
    an integer either way.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: Literal[4, 8]
    strategy: Literal["tensor", "channel", "group", "token"]
    group_size: Literal[128, 64, 32] | None = None
    symmetric: bool = True
    dynamic: bool = False

    @model_validator(mode="after")
    def _is_defined(self) -> Quant:
        """What method/integers.py gives a meaning: 8 bits symmetric, or 4 bits in groups."""
        if (self.bits == 4) != (self.strategy == "group") or (self.group_size is not None) != (self.strategy == "group"):
            raise ValueError("4 bits go with strategy 'group' and a group_size, 8 bits with the other strategies")
        if self.bits == 8 and not self.symmetric:
            raise ValueError("8 bits are symmetric")
        return self


class Scheme(BaseModel):
    """What the two operands of every linear layer in the decoder blocks become (`inputs` None: they stay as they are), and what those of the
    output head become: None leaves it alone, as both papers do. `ignore` names linear layers that stay as they are, or begins with `re:` and is a
    pattern of such names: `quantize` leaves none, checkpoints of others do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    weights: Quant
    inputs: Quant | None
    head: Scheme | None = None
    ignore: tuple[str, ...] = Field(default=(), exclude=True)  # what a checkpoint says, and no part of a recipe

    @property
    def static(self) -> bool:
        """Whether activation scales are calibrated and stored."""
        return self.inputs is not None and not self.inputs.dynamic


ACTIVATIONS: dict[str, Quant] = {
    # The three settings of SmoothQuant (arXiv 2211.10438, Table 2).
    "token": Quant(bits=8, strategy="token", dynamic=True),  # O1
    "tensor": Quant(bits=8, strategy="tensor", dynamic=True),  # O2
    "static": Quant(bits=8, strategy="tensor", dynamic=False),  # O3
}

SCHEMES: dict[str, Scheme] = {
    "w8a8": Scheme(name="w8a8", weights=Quant(bits=8, strategy="channel"), inputs=ACTIVATIONS["token"]),
    # SmoothQuant+ (arXiv 2312.03788, Section 3).
    "w4a16": Scheme(name="w4a16", weights=Quant(bits=4, strategy="group", group_size=128, symmetric=False), inputs=None),
}


def find_scheme(
    name: str,
    activations: str | None = None,
    weights: str | None = None,
    group_size: int | None = None,
    symmetric: bool = False,
    lm_head: str | None = None,
) -> Scheme:
    """The scheme called `name`, with its own granularities replaced where others are given: for w8a8 `activations` ('token', 'tensor',
    'static') and `weights` ('channel', 'tensor'), for w4a16 `group_size` (128, 64, 32) and `symmetric`. `lm_head` is the name of the output
    head's own scheme: w8a8 always per channel and per token, for nothing calibrates the head's input, or w4a16 with the same groups.

    Raises InputError for a name or a value that is not there, and for an option that neither scheme has.
    """
    scheme = SCHEMES.get(name)
    if scheme is None:
        raise InputError(f"unknown scheme '{name}': choose one of {', '.join(SCHEMES)}.{did_you_mean(name, SCHEMES)}")
    if lm_head is not None and lm_head not in SCHEMES:
        known = ", ".join(SCHEMES)
        raise InputError(f"unknown --lm-head '{lm_head}': choose one of {known}, or leave it out.{did_you_mean(lm_head, SCHEMES)}")
    head = None if lm_head is None else SCHEMES[lm_head]
    groups = any(each is not None and each.weights.strategy == "group" for each in (scheme, head))
    for option, given, belongs in (
        ("--activations", activations is not None, scheme.inputs is not None),
        ("--weights", weights is not None, scheme.weights.strategy != "group"),
        ("--group-size", group_size is not None, groups),
        ("--symmetric", symmetric, groups),
    ):
        if given and not belongs:
            raise InputError(f"{option} does not apply to scheme {name}: leave it out.")
    if activations is not None:
        if activations not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise InputError(f"unknown --activations '{activations}': choose one of {known}.{did_you_mean(activations, ACTIVATIONS)}")
        scheme = scheme.model_copy(update={"inputs": ACTIVATIONS[activations]})
    if weights is not None and weights not in ("channel", "tensor"):
        raise InputError(f"unknown --weights '{weights}': choose channel or tensor.")
    if group_size is not None and group_size not in GROUP_SIZES:
        raise InputError(f"--group-size {group_size}: choose {', '.join(map(str, GROUP_SIZES))}.")
    if weights is not None:
        scheme = scheme.model_copy(update={"weights": scheme.weights.model_copy(update={"strategy": weights})})
    if head is not None:
        head = _in_groups(head, group_size, symmetric)
    return _in_groups(scheme, group_size, symmetric).model_copy(update={"head": head})


def _in_groups(scheme: Scheme, group_size: int | None, symmetric: bool) -> Scheme:
    """The scheme with these groups, if it has groups."""
    if scheme.weights.strategy != "group":
        return scheme
    changes: dict[str, Any] = {"group_size": group_size or scheme.weights.group_size, "symmetric": symmetric}
    return scheme.model_copy(update={"weights": scheme.weights.model_copy(update=changes)})


def with_arithmetic(scheme: Scheme, arithmetic: str | None) -> Scheme:
    """`scheme` as it is multiplied, when that is not what it says: 'w4a8' rounds the activations of a W4A16 layer to 8 bits per token, so that
    integers are multiplied. None changes nothing. It is the user's choice alone: the result is no longer weight-only.

    Raises InputError for another name and another scheme.
    """
    if arithmetic is None:
        return scheme
    if arithmetic != "w4a8":
        raise InputError(f"unknown arithmetic '{arithmetic}': there is w4a8, or none.")
    if scheme.name != "w4a16":
        raise InputError(f"arithmetic w4a8 is for w4a16 checkpoints, and this one is {scheme.name}: leave it out.")
    return scheme.model_copy(update={"name": "w4a8", "inputs": ACTIVATIONS["token"]})
