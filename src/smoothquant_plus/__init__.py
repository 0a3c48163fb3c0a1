"""SmoothQuant and SmoothQuant+ for large language models.

The public names are loaded on first use: importing the package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from smoothquant_plus.errors import InputError, VerificationError
    from smoothquant_plus.evaluation.perplexity import evaluate
    from smoothquant_plus.evaluation.plot import plot
    from smoothquant_plus.evaluation.tasks import evaluate_tasks
    from smoothquant_plus.inspection import inspect
    from smoothquant_plus.method.scheme import SCHEMES
    from smoothquant_plus.pipeline import calibrate, quantize
    from smoothquant_plus.preparation import Calibration
    from smoothquant_plus.runtime.generate import generate
    from smoothquant_plus.runtime.load import load
    from smoothquant_plus.search import Search
    from smoothquant_plus.verification import verify

__all__ = [
    "SCHEMES",
    "Calibration",
    "InputError",
    "Search",
    "VerificationError",
    "calibrate",
    "evaluate",
    "evaluate_tasks",
    "generate",
    "inspect",
    "load",
    "plot",
    "quantize",
    "verify",
]

_HOMES = {
    "SCHEMES": "method.scheme",
    "Calibration": "preparation",
    "InputError": "errors",
    "Search": "search",
    "VerificationError": "errors",
    "calibrate": "pipeline",
    "evaluate": "evaluation.perplexity",
    "evaluate_tasks": "evaluation.tasks",
    "generate": "runtime.generate",
    "inspect": "inspection",
    "load": "runtime.load",
    "plot": "evaluation.plot",
    "quantize": "pipeline",
    "verify": "verification",
}


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'smoothquant_plus' has no attribute '{name}'")
    return getattr(importlib.import_module(f"smoothquant_plus.{_HOMES[name]}"), name)
