from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import torch

from smoothquant_plus.cli import app
from smoothquant_plus.demo import CALIBRATION, MODEL
from smoothquant_plus.errors import InputError
from smoothquant_plus.evaluation.tasks import evaluate_tasks
from smoothquant_plus.pipeline import quantize
from smoothquant_plus.preparation import Calibration
from smoothquant_plus.runtime.load import load
from smoothquant_plus.text import load_tokenizer, tokenize

QUESTIONS = [
    ("def add(self, other):\n    return self +", [" other", " class"], 0),
    ("import os\nimport", [" return", " sys"], 1),
    ("try:\n    import json\nexcept", [" ImportError", " range"], 0),
    ("for i in", [" None", " range"], 1),
    ("if x is not", [" None", " import"], 1),  # whose answer is wrong: nothing scores everything
]


@pytest.fixture(autouse=True)
def only_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval reads the thousands of files of its own tasks for seconds."""
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))


@pytest.fixture(scope="module")
def include(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with tasks of our own, whose data is in a file."""
    directory = tmp_path_factory.mktemp("tasks")
    lines = [json.dumps({"question": question, "choices": choices, "answer": answer}) for question, choices, answer in QUESTIONS]
    (directory / "questions.jsonl").write_text("\n".join(lines))
    common: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(directory / "questions.jsonl")}},
        "test_split": "test",
    }
    common |= {
        "doc_to_text": "{{question}}",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
    }
    common |= {"metric_list": [{"metric": "acc"}]}
    # Its standard error is bootstrapped, of which lm-eval tells on stdout.
    correlated = {"metric_list": [{"metric": "mcc", "aggregation": "matthews_corrcoef", "higher_is_better": True}]}
    tasks = {
        "python_words": {},
        "python_correlated": correlated,
        "python_code": {"unsafe_code": True},
        "python_zero": {"num_fewshot": 0},
        "python_lost": {"dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}},
    }
    for name, own in tasks.items():
        (directory / f"{name}.yaml").write_text(json.dumps({"task": name} | common | own))  # JSON is YAML
    return directory


def best_answer(model: Any, tokenizer: Any, question: str, choices: list[str]) -> int:
    """The choice with the largest log-likelihood after the question."""
    before = tokenize(question, tokenizer)
    scores = []
    for choice in choices:
        ids = torch.tensor([tokenize(question + choice, tokenizer)])
        with torch.inference_mode():
            logs = model(input_ids=ids).logits[0].log_softmax(-1)
        scores.append(sum(logs[i - 1, ids[0, i]].item() for i in range(len(before), ids.shape[1])))
    return scores.index(max(scores))


def test_scores_are_those_of_the_model(include: Path, tmp_path: Path) -> None:
    quantize(MODEL, tmp_path / "out", calibration=Calibration(text=(str(CALIBRATION),), samples=4, seq_len=64))
    for directory in (MODEL, tmp_path / "out"):
        tokenizer, model = load_tokenizer(directory), load(directory, dtype=torch.float32)
        expected = [best_answer(model, tokenizer, question, choices) == answer for question, choices, answer in QUESTIONS]
        assert 0 < sum(expected) < len(QUESTIONS)
        scores = evaluate_tasks(directory, ["python_words"], include=include, batch_size=2, dtype=torch.float32)
        assert scores.tasks["python_words"]["acc,none"] == pytest.approx(sum(expected) / len(expected))
        first = evaluate_tasks(directory, ["python_words"], include=include, limit=1, dtype=torch.float32)
        assert first.tasks["python_words"]["acc,none"] == expected[0]


def test_the_command_prints_scores(include: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "tasks",
        str(MODEL),
        "--task",
        "python_words",
        "--task",
        "python_correlated",
        "--include",
        str(include),
        "--dtype",
        "float32",
    ]
    app([*arguments, "--json"], standalone_mode=False)
    printed = capfd.readouterr().out
    assert printed.count("\n") == 1
    found = json.loads(printed)["tasks"]
    scores = found["python_words"]
    assert 0 < found["python_correlated"]["mcc_stderr,none"] < 1
    app(arguments, standalone_mode=False)
    assert f"{scores['acc,none']:.4f}" in capfd.readouterr().out


def test_bad_input(include: Path, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it before the model is read: this one has no weights that could be."""
    model = tiny()
    monkeypatch.setattr("smoothquant_plus.evaluation.tasks.load", lambda *_, **__: pytest.fail("the model is read"))
    for tasks, options, message in [
        ([], {}, "give --task NAME"),
        (["python_word"], {}, "no task 'python_word'. Did you mean 'python_words'"),
        (["python_code"], {}, "python_code runs the code .* --run-code"),
        (["python_lost"], {}, "python_lost: a task cannot be made, or its data cannot be read"),
        (["python_zero"], {"few_shot": 2}, "python_zero is asked without examples, always: leave --few-shot 2 out"),
        (["python_words"], {"include": include / "nothing"}, "there is no such directory"),
        (["python_words"], {"chat": True}, "has no chat template"),
    ]:
        with pytest.raises(InputError, match=message):
            evaluate_tasks(model, tasks, **{"include": include} | options)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"pip install '\.\[tasks\]'"):
        evaluate_tasks(model, ["python_words"])
