"""The two ways a command can end badly, besides being interrupted; each carries the exit code of the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """The user's input cannot be used. The message names the file, tensor or option and the way out."""

    exit_code = 2


class VerificationError(Exception):
    """Something that was proven, written or hashed is not what it must be."""

    exit_code = 3


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' Did you mean 'x'?' for the nearest known word, or an empty string when nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""
