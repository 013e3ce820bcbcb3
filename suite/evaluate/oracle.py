"""Two simulated language models: one knows every answer, the other is always wrong.

They test data, prompts and scorers: on every accuracy-like metric the first must reach the ceiling and the second 0.
The ceiling is below 1 where a stock metric stops generation inside an answer; it is computed answer by answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask

from suite.cells import EvalConfig
from suite.data.corpus import Corpus
from suite.errors import UserError
from suite.evaluate import catalog, task_list
from suite.evaluate.adapter import before_stop
from suite.evaluate.datasets import DataRoot, Doc
from suite.evaluate.harness import prepare, scores_of
from suite.evaluate.sandbox import Sandbox
from suite.evaluate.tasks import answers
from suite.evaluate.tasks.code import Programs

ACCURACY_LIKE = ("em", "f1", "exact_match", "acc", "acc_norm", "greedy", "recall", "pass@1", "pass@10")
NONSENSE = " xqzv"
WRONG_LOG_P = -500.0
"""Of a wrong answer; e to the power of 500, a perplexity, is still a number."""


def run(
    tasks: Iterable[str],
    data_root: Path | None = None,
    corpus: Corpus | None = None,
    sandbox: Sandbox | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Score both models.

    Args:
        tasks: Names.
        data_root: Folder of evaluation data; None: the hub.
        corpus: Training data, for the tasks about it.
        sandbox: Runs programs, for the tasks that run code.
        limit: Score only the first N documents of each task.

    Returns:
        {"tasks": {name: {"n", "metrics": {metric: {"oracle", "wrong", "ceiling"}}}}} with the accuracy-like metrics;
        the ceiling is the mean score of the best accepted answer of each document.

    Raises:
        UserError: See `catalog.load`.
    """
    prepared = prepare(
        EvalConfig(tasks=tuple(tasks), limit=limit), catalog.Sources(corpus, DataRoot(data_root), sandbox)
    )
    loaded = prepared.loaded.tasks
    oracle, wrong = (scores_of(Knowing(loaded, right), prepared) for right in (True, False))
    return {
        "tasks": {
            name: {
                "n": record["n"],
                "metrics": {
                    metric: {
                        "oracle": score["value"],
                        "wrong": wrong[name]["metrics"][metric]["value"],
                        "ceiling": _ceiling(loaded.get(name), metric),
                    }
                    for metric, score in record["metrics"].items()
                    if metric in ACCURACY_LIKE
                },
            }
            for name, record in oracle.items()
        }
    }


def every_task(data_root: Path | None, run_code: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the tasks that read files: those whose files are in `data_root` (None: the hub), and the others.

    Raises:
        UserError: No task has its files there.
    """
    names = task_list.names(corpus=False, run_code=run_code)
    absent = [] if data_root is None else catalog.without_data(names, data_root)
    present = tuple(name for name in names if name not in absent)
    if not present:
        raise UserError(
            f"--data-root: {data_root} has the data of no task; get it with: suite data prefetch {data_root}"
        )
    return present, tuple(absent)


class Knowing(LM):
    """A model that looks up the answers and always returns the right one, or always a wrong one."""

    def __init__(self, tasks: dict[str, ConfigurableTask], right: bool) -> None:
        super().__init__()
        self._tasks, self._right = tasks, right

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return probability 1 for the gold continuation only, or for every other one."""
        return [(0.0, True) if self._is_certain(r) else (WRONG_LOG_P, False) for r in requests]

    def _is_certain(self, request: Instance) -> bool:
        task = self._tasks[_name(request)]
        if task.OUTPUT_TYPE != "multiple_choice":
            return self._right
        # with several contexts and one continuation (winogrande), the text is the number of the right context
        gold = task.doc_to_text(request.doc) if task.multiple_input else task.doc_to_target(request.doc)
        if isinstance(gold, str):
            gold = task.doc_to_choice(request.doc).index(gold)
        return (request.idx == gold) is self._right

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Return probability 1 for the whole text, or almost 0."""
        return [0.0 if self._right else WRONG_LOG_P for _ in requests]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return an accepted answer up to the first stop string, as with a real model, or nonsense."""
        if not self._right:
            return [NONSENSE] * len(requests)
        return [_best(self._tasks[_name(r)], r.doc, r.args[1]["until"]) for r in requests]


def _name(request: Instance) -> str:
    assert request.task_name is not None
    return request.task_name


def _best(task: ConfigurableTask, doc: Doc, stops: Sequence[str]) -> str:
    """Return the first accepted answer without a stop string, or the canonical one truncated at its first one."""
    texts = _accepted(task, doc)
    whole = [text for text in texts if before_stop(text, stops) == text]
    return whole[0] if whole else before_stop(texts[0], stops)


def _programs(task: ConfigurableTask) -> Programs | None:
    listed = task_list.TASKS.get(task.config.task)
    return None if listed is None else listed.programs


def _accepted(task: ConfigurableTask, doc: Doc) -> list[str]:
    """Return all answers that the task accepts, the canonical one first."""
    programs = _programs(task)
    if programs is not None:
        return [programs.problems.canonical(doc)]
    target = task.doc_to_target(doc)
    return [f" {text}" for text in (target if isinstance(target, list) else answers.accepted(doc))]


def _ceiling(task: ConfigurableTask | None, metric: str) -> float:
    """Return the mean over documents of the best score of an accepted answer, truncated at its first stop string."""
    if task is None or task.OUTPUT_TYPE != "generate_until" or _programs(task) is not None:
        return 1.0
    stops = task.config.generation_kwargs["until"]
    docs = {request.doc_id: request.doc for request in task.instances}.values()
    return sum(
        max(task.process_results(doc, [before_stop(text, stops).strip()])[metric] for text in _accepted(task, doc))
        for doc in docs
    ) / len(docs)
