"""Accuracy on the tasks of lm-eval, EleutherAI's evaluation harness: the zero-shot tasks of SmoothQuant's tables, HumanEval of SmoothQuant+'s,
and all others that it has, or that are declared for it in YAML."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from smoothquant_plus.errors import InputError, did_you_mean
from smoothquant_plus.models.checkpoint import read_config
from smoothquant_plus.runtime.load import load
from smoothquant_plus.text import load_tokenizer

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


# How often questions are drawn again for the standard error of a metric that has no formula for it, which is known to 2% then: lm-eval's 100,000
# times take minutes.
RESAMPLED = 1000
RUNS_CODE = "the task {} runs the code that the model writes on this machine: give --run-code to let it, in a sandbox of yours."


@dataclass(frozen=True)
class TaskScores:
    """`tasks`: for each task, and each group of tasks, its metrics by lm-eval's names, `metric,filter`, and the standard errors of those that
    have one (`metric_stderr,filter`)."""

    tasks: dict[str, dict[str, float]]


def evaluate_tasks(
    model: str | Path,
    tasks: Sequence[str],
    *,
    few_shot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    chat: bool = False,
    include: str | Path | None = None,
    run_code: bool = False,
    **options: Any,
) -> TaskScores:
    """Scores of the model in directory `model`, quantized or not, on `tasks` of lm-eval.

    `few_shot` examples stand before each question (default: what the task says), `limit` takes the first questions of a task only,
    `batch_size` is how many run at once. `chat` asks through the tokenizer's chat template. `include` is a directory with tasks in YAML, beside
    lm-eval's own. Tasks that run what the model wrote, such as HumanEval, need `run_code`: nothing protects this machine from it. `options` are
    those of `load`.

    Raises InputError, before the model is read, when lm-eval is missing, for tasks that it does not have, whose data cannot be had, or that do not
    take these options, and for a tokenizer without a chat template; and as `load` does.
    """
    try:
        import datasets
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(f"tasks need the extra 'tasks': pip install '.[tasks]' in a clone of this package ({error}).") from error
    if include is not None and not Path(include).is_dir():
        raise InputError(f"--include {include}: there is no such directory.")
    read_config(Path(model))  # its message for a directory that is not there
    tokenizer = load_tokenizer(Path(model))
    if chat and not getattr(tokenizer, "chat_template", None):
        raise InputError(f"--chat: the tokenizer in {model} has no chat template.")
    # lm-eval prints; and tasks of code ask, when they are made, whether it may be run.
    with contextlib.redirect_stdout(sys.stderr), environment("HF_ALLOW_CODE_EVAL", "1" if run_code else "0"):
        manager = TaskManager(include_path=None if include is None else str(include))
        check_names(tasks, manager)
        try:
            made = manager.load(list(tasks))["tasks"]
        except (OSError, ValueError, ImportError, RuntimeError, LookupError, datasets.exceptions.DatasetsError) as error:
            if "HF_ALLOW_CODE_EVAL" in str(error):
                raise InputError(RUNS_CODE.format(", ".join(tasks))) from error
            raise InputError(f"{', '.join(tasks)}: a task cannot be made, or its data cannot be read: {error}") from error
        for name, task in sorted(made.items()):
            if getattr(task, "UNSAFE_CODE", False) and not run_code:
                raise InputError(RUNS_CODE.format(name))
            if getattr(task, "MULTIMODAL", False):
                raise InputError(f"the task {name} shows pictures, and this package runs language models alone: leave it out.")
            if few_shot and task.config.num_fewshot == 0:  # lm-eval would go on without them
                raise InputError(f"the task {name} is asked without examples, always: leave --few-shot {few_shot} out.")
        wrapped = HFLM(pretrained=load(model, **options), tokenizer=tokenizer, batch_size=batch_size)
        with torch.inference_mode():
            found = lm_eval.simple_evaluate(
                model=wrapped,
                tasks=list(tasks),
                num_fewshot=few_shot,
                limit=limit,
                apply_chat_template=chat,
                task_manager=manager,
                confirm_run_unsafe_code=run_code,
                log_samples=False,
                bootstrap_iters=RESAMPLED,
            )
    scores = found["results"] | found.get("groups", {})
    return TaskScores({name: {metric: value for metric, value in row.items() if isinstance(value, float)} for name, row in scores.items()})


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """The variable `name` is `value` meanwhile."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def check_names(tasks: Sequence[str], manager: TaskManager) -> None:
    """Raises InputError for tasks that lm-eval does not have."""
    if not tasks:
        raise InputError("give --task NAME, for instance --task lambada_openai; lm-eval's own command lists them: lm-eval ls tasks.")
    known = manager.all_tasks
    for name in tasks:
        if name not in known:
            raise InputError(
                f"lm-eval has no task '{name}'.{did_you_mean(name, known)} Tasks of your own are found with --include DIRECTORY."
            )
