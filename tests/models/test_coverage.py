"""What a run says of the layers that it smoothed, and of those that it did not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smoothquant_plus.pipeline import quantize
from smoothquant_plus.preparation import Calibration

BY_ALL = "--smooth all smooths it"
CASES: dict[str, tuple[str, dict[str, Any], dict[str, str], list[str]]] = {
    "llama": ("llama", {}, {"self_attn.o_proj": BY_ALL, "mlp.down_proj": BY_ALL}, []),
    "llama all": ("llama", {"smooth": "all"}, {}, []),
    "llama none": ("llama", {"smooth": "none"}, {"self_attn.q_proj": "--smooth none"}, []),
    "gelu": ("opt-gelu-untied", {"smooth": "all"}, {"fc2": "smoothing it would not be exact: activation_function is 'gelu'"}, []),
    "no pair": ("bloom", {"smooth": "all"}, {"mlp.dense_4h_to_h": "what feeds it takes no factor"}, []),
    "norms that feed nothing": ("olmo2", {"smooth": "all"}, {"self_attn.q_proj": "what feeds it takes no factor"}, []),
    "mixture": ("qwen2-moe", {}, {"mlp.experts.*.down_proj": BY_ALL}, ["mlp.gate", "mlp.shared_expert_gate"]),
    "searched": ("llama", {"alpha": "block"}, {"mlp.down_proj": BY_ALL}, []),
}


@pytest.mark.parametrize("case", CASES)
def test_coverage(case: str, tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path) -> None:
    name, options, unsmoothed, unquantized = CASES[case]
    out = tmp_path / "out"
    found = quantize(tiny(name), out, calibration=calibration, **options)
    plan = json.loads((out / "plan.json").read_text())
    block = plan["blocks"][0]
    coverage = block["coverage"]
    assert coverage["unsmoothed"].items() >= unsmoothed.items() and coverage["unquantized"] == unquantized
    assert bool(coverage["unsmoothed"]) == bool(unsmoothed)
    paired = {re.sub(r"experts\.\d+", "experts.*", sink) for pair in block["pairs"] for sink in pair["sinks"]}
    assert set(coverage["smoothed"]) == paired - set(unquantized)
    said = " ".join(found.notes)
    assert "smoothed and quantized: " in said
    assert all(reason in said and layer in said for layer, reason in unsmoothed.items())
    assert not unquantized or "left as they are: mlp.gate (in 1 of 2 blocks)" in said
