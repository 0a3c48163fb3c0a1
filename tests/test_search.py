"""The search for alpha: what one pass over the weights finds is what quantizing and evaluating each candidate by itself finds."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import families
from smoothquant_plus.demo import CALIBRATION
from smoothquant_plus.demo.run import write_planted
from smoothquant_plus.method.search import GRID, best_alpha
from smoothquant_plus.models.checkpoint import Checkpoint
from smoothquant_plus.pipeline import quantize
from smoothquant_plus.preparation import Calibration
from smoothquant_plus.runtime.load import load
from smoothquant_plus.search import PIECE, Search, next_token_loss
from smoothquant_plus.text import load_tokenizer, take_samples
from smoothquant_plus.verification import verify

DEMO = Calibration(text=(str(CALIBRATION),), samples=3, seq_len=48)
SEARCH = Search(samples=2)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with outliers planted."""
    directory = tmp_path_factory.mktemp("planted") / "model"
    write_planted(directory)
    return directory


@torch.no_grad()
def run_by_itself(directory: Path, batches: list[torch.Tensor]) -> tuple[list[torch.Tensor], float]:
    """Final hidden states and next-token loss of a checkpoint, by transformers' own forward."""
    model = load(directory, dtype=torch.float32)
    hidden: list[torch.Tensor] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _m, args: hidden.append(args[0]))
    total = sum(model(ids, labels=ids).loss.item() * (ids.shape[1] - 1) for ids in batches)
    return hidden, total / sum(ids.shape[1] - 1 for ids in batches)


def brute_force(
    source: Path, folder: Path, calibration: Calibration, search: Search, alphas: Sequence[float] = GRID, **options: Any
) -> dict[Any, tuple[float, float]]:
    """{alpha or None: (mse, cross entropy)}, by one run of `quantize` for each."""
    samples = take_samples(calibration.texts, load_tokenizer(source), calibration.samples, calibration.seq_len)
    batches = [samples.batches[batch] for batch in search.choose(samples.batches)]
    expected, _ = run_by_itself(source, batches)
    found = {}
    for alpha in (None, *alphas):
        how = {"smooth": "none"} if alpha is None else {"alpha": alpha}
        quantize(source, folder / f"{alpha}", calibration=calibration, **{**options, **how})
        hidden, loss = run_by_itself(folder / f"{alpha}", batches)
        squares = sum((a - b).double().square().sum().item() for a, b in zip(hidden, expected, strict=True))
        found[alpha] = squares / sum(a.numel() for a in hidden), loss
    return found


def searched(source: Path, out: Path, calibration: Calibration, search: Search, **options: Any) -> dict[str, Any]:
    quantize(source, out, alpha="model", calibration=calibration, search=search, **options)
    return json.loads((out / "plan.json").read_text())


def check_against_brute_force(plan: dict[str, Any], expected: dict[Any, tuple[float, float]], tolerance: float) -> None:
    found = plan["search"]
    assert [c["alpha"] for c in found["candidates"]] == list(GRID)
    losses = {None: found["unsmoothed"], **{candidate["alpha"]: candidate for candidate in found["candidates"]}}
    for alpha, (mse, entropy) in expected.items():
        assert losses[alpha]["mse"] == pytest.approx(mse, rel=tolerance), alpha
        assert losses[alpha]["cross_entropy"] == pytest.approx(entropy, rel=tolerance), alpha
    assert plan["alpha"] == found["alpha"]
    if len(expected) == 1 + len(GRID):
        assert plan["alpha"] == best_alpha({a: mse for a, (mse, _) in expected.items() if a is not None}, expected[None][0])


@pytest.mark.slow
def test_one_pass_finds_what_a_run_for_each_alpha_finds(planted: Path, tmp_path: Path) -> None:
    plan = searched(planted, tmp_path / "out", DEMO, SEARCH, scheme="w4a16")
    expected = brute_force(planted, tmp_path, DEMO, SEARCH, scheme="w4a16")
    check_against_brute_force(plan, expected, 1e-5)
    assert 0 < plan["alpha"] < 1 and expected[plan["alpha"]][0] < 0.7 * expected[None][0]
    assert plan["search"]["full_precision"]["cross_entropy"] == pytest.approx(run_by_itself(planted, batches_of(planted))[1], rel=1e-5)
    # The checkpoint is what the alpha that was found gives, bit by bit.
    for shard in Checkpoint(tmp_path / "out").shards:
        assert (tmp_path / "out" / shard).read_bytes() == (tmp_path / str(plan["alpha"]) / shard).read_bytes()


def batches_of(source: Path) -> list[torch.Tensor]:
    samples = take_samples(DEMO.texts, load_tokenizer(source), DEMO.samples, DEMO.seq_len)
    return [samples.batches[batch] for batch in SEARCH.choose(samples.batches)]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"scheme": "w8a8", "activations": "static"}),
        ("llama-mha-tied-biases", {"scheme": "w8a8", "activations": "token", "smooth": "all"}),
        ("opt", {"scheme": "w8a8", "activations": "tensor", "target": "here"}),
        ("gemma4-vision", {"scheme": "w8a8", "activations": "token"}),
        ("mistral-sliding-window", {"scheme": "w4a16", "group_size": 32, "symmetric": True, "smooth": "all"}),
    ],
    ids=lambda value: value if isinstance(value, str) else value["scheme"],
)
def test_every_scheme_and_layout(
    name: str, options: dict[str, Any], tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path
) -> None:
    source = tiny(name, torch.float32)
    plan = searched(source, tmp_path / "out", calibration, SEARCH, **options)
    some = (0.0, 0.35, 1.0)
    # On so few tokens one activation that falls on the other side of a rounding moves the loss by more than 1e-5.
    check_against_brute_force(plan, brute_force(source, tmp_path, calibration, SEARCH, some, **options), 1e-3)
    assert verify(tmp_path / "out", source).linears


def test_the_search_reads_each_weight_once(planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """22 candidates and the full-precision model, and no tensor is read twice: neither of the blocks nor around them."""
    reads: Counter[str] = Counter()
    read = Checkpoint.read

    def counted(checkpoint: Checkpoint, name: str, **how: Any) -> torch.Tensor:
        reads[name] += checkpoint.directory == planted
        return read(checkpoint, name, **how)

    class Stopped(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Stopped

    monkeypatch.setattr("smoothquant_plus.pipeline.copy_outside", lambda *_: None)
    monkeypatch.setattr("smoothquant_plus.pipeline.quantize_blocks", stop)
    monkeypatch.setattr(Checkpoint, "read", counted)
    with pytest.raises(Stopped):
        quantize(planted, tmp_path / "out", scheme="w4a16", alpha="model", calibration=DEMO, search=SEARCH)
    assert reads == dict.fromkeys(Checkpoint(planted).tensors, 1)


def contents(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


@pytest.mark.parametrize("alpha", ["model", "block"])
def test_memory_changes_nothing(alpha: str, tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path) -> None:
    """All streams in memory, some, or none: the same bytes."""
    one = 2 * 32 * 64 * 4  # samples, tokens, hidden size, bytes
    for memory in (None, 0, 7.5 * one):  # GB need not be whole
        options = {"scheme": "w4a16", "group_size": 32, "alpha": alpha, "search": Search(2, memory)}
        quantize(tiny("llama"), tmp_path / str(memory), calibration=calibration, **options)
    assert contents(tmp_path / "None") == contents(tmp_path / "0") == contents(tmp_path / str(7.5 * one))


@torch.no_grad()
def test_each_block_chooses_for_itself(planted: Path, tmp_path: Path) -> None:
    quantize(planted, tmp_path / "out", scheme="w4a16", alpha="block", calibration=DEMO, search=SEARCH)
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["alpha"] == "block"
    for block in plan["blocks"]:
        losses = {candidate["alpha"]: candidate["mse"] for candidate in block["search"]}
        assert list(losses) == [None, *GRID]
        assert block["alpha"] == best_alpha({a: mse for a, mse in losses.items() if a is not None}, losses[None])
        assert losses[block["alpha"]] < losses[None], "outliers are planted in every block"
    assert len({block["alpha"] for block in plan["blocks"]}) > 1
    # The first block reads the embeddings, which are not quantized: alone it is what one alpha for all blocks gives.
    quantize(planted, tmp_path / "same", scheme="w4a16", alpha=plan["blocks"][0]["alpha"], calibration=DEMO)
    shard = "model-00002-of-00007.safetensors"
    assert (tmp_path / "out" / shard).read_bytes() == (tmp_path / "same" / shard).read_bytes()
    assert verify(tmp_path / "out", planted).equivalence_error < 1e-3


def norms_and_sinks(model: Any) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    for block in model.model.layers:
        yield block.input_layernorm, (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)
        yield block.post_attention_layernorm, (block.mlp.gate_proj, block.mlp.up_proj)


def extreme(directory: Path, kind: str) -> Path:
    """A tiny Llama in which the entries of a column, behind a norm, differ in sign only, and columns, or the norm's gains, by up to 30.

    'weights': columns differ. With alpha 0 they all become 1 and -1, which 4 bits hold exactly. 'activations': gains differ. What is lost with
    static INT8 activations is then least when their channels are even, which is alpha 1: weights like these, without a tail, need less.
    """
    model = families.build("llama")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for norm, sinks in norms_and_sinks(model):
            size = 30 ** (torch.rand(64, generator=generator) - 0.5)
            norm.weight.copy_(size if kind == "activations" else 1.0)
            for sink in sinks:
                sink.weight.copy_(sink.weight.sign() / 8 * (size if kind == "weights" else 1.0))
    model.save_pretrained(directory)
    families.make_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options", "lowest", "highest"),
    [
        ("weights", {"scheme": "w4a16", "group_size": 32}, 0.0, 0.0),
        ("activations", {"scheme": "w8a8", "activations": "static"}, 0.8, 1.0),
    ],
    ids=["low", "high"],
)
def test_extremes_end_where_brute_force_says(
    kind: str, options: dict[str, Any], lowest: float, highest: float, calibration: Calibration, tmp_path: Path
) -> None:
    source = extreme(tmp_path / "source", kind)
    plan = searched(source, tmp_path / "out", calibration, SEARCH, **options)
    check_against_brute_force(plan, brute_force(source, tmp_path, calibration, SEARCH, **options), 1e-3)
    assert lowest <= plan["alpha"] <= highest


def test_ties_go_to_the_smallest_alpha() -> None:
    assert best_alpha(dict.fromkeys(GRID, 0.5), unsmoothed=0.5) == 0.0
    assert best_alpha({0.0: 2.0, 0.25: 1.0 + 1e-9, 0.5: 1.0, 0.75: 3.0}, unsmoothed=math.inf) == 0.25
    assert best_alpha({0.0: 2.0, 0.5: 1.0}, unsmoothed=0.9) is None
    assert GRID[0] == 0 and GRID[-1] == 1 and len(GRID) == 21


def test_an_alpha_that_cannot_be_stored_is_left_out(tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path) -> None:
    """A norm's gain near the end of float16, which small alphas push over it: they are refused with the reason, the others searched."""
    model = families.build("llama")
    with torch.no_grad():
        for norm, sinks in norms_and_sinks(model):
            norm.weight[5] = 3e4
            for sink in sinks:
                sink.weight[:, 5] *= 150
    source = tmp_path / "source"
    model.half().save_pretrained(source)
    families.make_tokenizer().save_pretrained(source)
    plan = searched(source, tmp_path / "out", calibration, SEARCH, scheme="w4a16", group_size=32)
    refused = [c for c in plan["search"]["candidates"] if "refused" in c]
    assert refused and len(refused) < len(GRID)
    assert all("overflows float16" in c["refused"] and "mse" not in c for c in refused)
    assert plan["alpha"] not in [c["alpha"] for c in refused]


def test_the_next_tokens_loss_in_pieces_is_that_of_the_whole() -> None:
    logits, ids = torch.randn(1, 2 * PIECE + 7, 50), torch.randint(50, (1, 2 * PIECE + 7))
    whole = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item()
    assert next_token_loss(logits, ids) == pytest.approx(whole, rel=1e-5)
