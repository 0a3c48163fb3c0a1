"""The table of docs/families.md: python tests/family_table.py rewrites it, from the rows in models/families.py and measurements on
the tiny models in tests/families.py."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch

import families
from smoothquant_plus.models.families import FAMILIES, WRAPPERS, Family, find_family

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"
# What was loaded in a real vLLM, with the same logits: docs/formats.md says how. "W8A8" is per token and static.
DENSE = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "olmo2", "cohere", "phi3", "glm", "glm4", "starcoder2", "opt"),
    *("gpt2", "gpt_neox", "gptj", "falcon", "smollm3", "granite", "seed_oss", "ernie4_5", "hunyuan", "ministral", "exaone4", "nemotron"),
    *("apertus", "phi", "helium", "arcee", "olmo"),
)
EXPERTS = "W8A8 `token`, W4A16 (without AMX on CPUs: with this package's plugin)"
VLLM: dict[str, str] = {
    **dict.fromkeys(DENSE, "W8A8, W4A16"),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "deepseek", "olmoe", "glm4_moe", "cohere2_moe"), EXPERTS),
    "bloom": "W8A8 `token`, W4A16",
    "gemma4": f"W8A8, W4A16; with experts {EXPERTS}",
    "granite_moe": f"`granitemoe`: {EXPERTS}",
}
HEADER = (
    "| family | `model_type` | smoothed by `--smooth norms` | and by `all` | error | schemes | transformers reads | vLLM reads "
    "| published alpha |"
)


def tiny_of(family: str) -> list[str]:
    """The tiny models of a family, those inside a wrapper left out."""
    return [name for name, config in families.TINY.items() if find_family(config)[0] == family and config.model_type not in WRAPPERS]


def row(name: str, family: Family) -> list[str]:
    """What the table says of a family, but for its error."""

    def sinks(when: str) -> str:
        pairs = {f"{pair.source} → {', '.join(pair.sinks)}": None for pair in family.pairs if pair.when == when}
        return "<br>".join(f"`{pair}`" for pair in pairs) or "nothing"

    schemes = {"w8a8": "W8A8", "w4a16": "W4A16"}
    read = [title for scheme, title in schemes.items() if not all((tiny, scheme) in families.UNREADABLE for tiny in tiny_of(name))]
    alphas = [family.alpha, *(alpha for _, alpha in family.alpha_of_sizes)]
    alpha = " or ".join(f"{alpha:g}" for alpha in alphas if alpha is not None) or "none"
    types = ", ".join(f"`{model_type}`" for model_type in family.model_types)
    return [
        name,
        types,
        sinks("norms"),
        sinks("all"),
        ", ".join(schemes.values()),
        ", ".join(read) or "neither",
        VLLM.get(name, "not tried"),
        alpha,
    ]


def measure(name: str) -> str:
    """The largest relative change of logits in float64, random factors on every pair, rounded up to a power of ten."""
    with tempfile.TemporaryDirectory() as place:
        errors = [
            families.change_by_smoothing(families.write(tiny, Path(place) / tiny, torch.float64), torch.float64, "all")
            for tiny in tiny_of(name)
        ]
    return f"1e{math.ceil(math.log10(max(errors)))}"


def table() -> str:
    lines = [HEADER, "|---" * 9 + "|"]
    for name, family in FAMILIES.items():
        columns = row(name, family)
        columns.insert(4, measure(name))
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def main() -> None:
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
