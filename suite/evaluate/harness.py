"""Scoring a finished model with lm-eval: tasks built once, any number of models scored on them.

`evaluate` gives the content of a run's `eval/<hash8>.json`.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval.utils
from lm_eval import evaluator
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask

from suite.cells import EvalConfig
from suite.data.corpus import Corpus
from suite.evaluate import catalog
from suite.evaluate.adapter import Codec, SuiteLM
from suite.evaluate.datasets import DataRoot, Doc
from suite.evaluate.sandbox import Sandbox
from suite.models.transformer import Transformer

TOKEN_BUDGET = 16384
PACKAGES = ("lm-eval", "datasets", "torch")
_STDERR = "_se"
"""A task gives the standard error of its metric M as a metric M_se, where lm-eval has no formula for it."""


def evaluate(
    model: Transformer,
    corpus: Corpus,
    config: EvalConfig,
    data_root: Path | None = None,
    sandbox: Sandbox | None = None,
) -> dict[str, Any]:
    """Score one model.

    Args:
        model: left in the mode it is in.
        corpus: what it was trained on: its tokenizer, the documents of bios and held-out tasks, the row length.
        config: tasks, number of examples, limit of documents.
        data_root: where real tasks find their data; None: the hub.
        sandbox: where programs that the model writes are run; None: tasks that need it are refused.

    Returns:
        {"eval", "hash", "versions", "tokenizer", "tasks": {name: {"version", "few_shot", "n", "prompt_hash",
        "data_fingerprint", "cut", "metrics": {metric: {"value", "stderr"}}, "answers": {metric: "0110..."}}}}; "cut"
        counts requests whose context lost its start. A stderr is None where there is no estimate. "answers" has a
        character a question, in the data's order, for metrics that are means of zeros and ones; groups have none.

    Raises:
        UserError: a task is unknown, does not fit the corpus, or its data cannot be used.
    """
    return Evaluator(data_root, sandbox).evaluate(model, corpus, config)


class Evaluator:
    """`evaluate` for many checkpoints and models: what an evaluation asks of a corpus is prepared once and kept."""

    def __init__(self, data_root: Path | None = None, sandbox: Sandbox | None = None) -> None:
        self._data_root, self._sandbox = data_root, sandbox
        self._harnesses: dict[tuple[str, int, str], Harness] = {}

    def evaluate(self, model: Transformer, corpus: Corpus, config: EvalConfig) -> dict[str, Any]:
        """Scores of one model, as `evaluate`."""
        key = corpus.fingerprint, corpus.config.seq_len, config.hash8
        if key not in self._harnesses:
            self._harnesses[key] = Harness(corpus, config, self._data_root, self._sandbox)
        return self._harnesses[key].run(model)


class Harness:
    """The tasks of an evaluation with their requests, to be scored on many models that share the corpus."""

    def __init__(
        self,
        corpus: Corpus,
        config: EvalConfig,
        data_root: Path | None = None,
        sandbox: Sandbox | None = None,
    ) -> None:
        self._corpus, self._config = corpus, config
        self._codec = Codec(corpus.tokenizer)
        self._prepared = prepare(config, catalog.Sources(corpus, DataRoot(data_root), sandbox))

    def run(self, model: Transformer) -> dict[str, Any]:
        """Scores of one model, as `evaluate`."""
        lm = SuiteLM(model, self._codec, self._corpus.config.seq_len, TOKEN_BUDGET)
        lm.refuse_diverged()
        entries = scores_of(lm, self._prepared)
        return {
            "eval": self._config.model_dump(mode="json"),
            "hash": self._config.hash8,
            "versions": {package: version(package) for package in PACKAGES},
            "tokenizer": self._corpus.tokenizer.fingerprint,
            "tasks": {name: {**entry, "cut": self._cut(name, lm)} for name, entry in entries.items()},
        }

    def _cut(self, name: str, lm: SuiteLM) -> int:
        group = self._prepared.loaded.groups.get(name)
        return lm.cut[name] if group is None else sum(lm.cut[task.task_name] for task in group.get_all_tasks())


@dataclass(frozen=True)
class Prepared:
    """Tasks with their requests built, and a hash of each task's requests."""

    loaded: catalog.Loaded
    limit: int | None
    prompt_hashes: dict[str, str]


def prepare(config: EvalConfig, sources: catalog.Sources) -> Prepared:
    """Load the tasks and build their requests, once for any number of models.

    Raises:
        UserError: as `catalog.load`.
    """
    with _quiet(), _compiled_templates():
        loaded = catalog.load(config.tasks, sources, config.num_fewshot)
        for task in loaded.tasks.values():
            task.build_all_requests(limit=config.limit)
            # requests stay as they are: another model only forgets the answers of the one before
            task.build_all_requests = partial(_forget_answers, task)
    hashes = {name: catalog.prompt_hash(task) for name, task in loaded.tasks.items()}
    return Prepared(loaded, config.limit, hashes)


def scores_of(lm: LM, prepared: Prepared) -> dict[str, dict[str, Any]]:
    """The entry of every task and group: version, few_shot, n, prompt_hash, data_fingerprint, metrics; tasks' answers,
    too."""
    loaded = prepared.loaded
    with _quiet(), _compiled_templates(), _kept_answers(loaded.tasks) as kept:
        outcome = evaluator.evaluate(
            lm,
            {"tasks": loaded.tasks, "groups": loaded.groups},
            limit=prepared.limit,
            log_samples=False,
            # our sandbox runs the programs, and tasks that have any are refused without one
            confirm_run_unsafe_code=True,
        )
    assert outcome is not None
    results = outcome["results"]
    entries = {
        name: {
            "version": task.VERSION,
            "few_shot": task.config.num_fewshot,
            "n": results[name]["sample_len"],
            "prompt_hash": prepared.prompt_hashes[name],
            "data_fingerprint": loaded.fingerprints[name],
            "metrics": _metrics(results[name]),
            "answers": _answers(kept[name], results[name]["sample_len"], _metrics(results[name])),
        }
        for name, task in loaded.tasks.items()
    }
    for name, group in loaded.groups.items():
        members = [entries[task.task_name] for task in group.get_all_tasks()]
        entries[name] = {
            "version": group.version,
            "few_shot": members[0]["few_shot"],
            "n": sum(member["n"] for member in members),
            "prompt_hash": catalog.digest(member["prompt_hash"] for member in members),
            "data_fingerprint": catalog.digest(member["data_fingerprint"] for member in members),
            "metrics": _metrics(results[name]),
        }
    return entries


def _metrics(result: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Values and standard errors from lm-eval's `metric,filter` and `metric_stderr,filter`."""
    values: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in result.items():
        metric, comma, _ = key.partition(",")
        if not comma or not isinstance(value, int | float):
            continue
        if metric.endswith("_stderr"):
            errors[metric.removesuffix("_stderr")] = float(value)
        elif metric.endswith(_STDERR):
            errors[metric.removesuffix(_STDERR)] = float(value)
        else:
            values[metric] = float(value)
    return {metric: {"value": value, "stderr": errors.get(metric)} for metric, value in values.items()}


@contextmanager
def _kept_answers(tasks: dict[str, ConfigurableTask]) -> Iterator[dict[str, dict[str, list[Any]]]]:
    """What each question scores while lm-eval only averages it: task -> metric -> values."""
    kept: dict[str, dict[str, list[Any]]] = {name: {} for name in tasks}

    def keep(name: str, process: Any, doc: Doc, results: list[Any]) -> dict[str, Any]:
        scores: dict[str, Any] = process(doc, results)
        for metric, value in scores.items():
            kept[name].setdefault(metric, []).append(value)
        return scores

    for name, task in tasks.items():
        task.process_results = partial(keep, name, task.process_results)
    try:
        yield kept
    finally:
        for task in tasks.values():
            del task.process_results


def _answers(kept: dict[str, list[Any]], n: int, metrics: dict[str, dict[str, float | None]]) -> dict[str, str]:
    """A character a question, of metrics that are means of zeros and ones (of the last filter, as in `_metrics`)."""
    found = {}
    for metric, values in kept.items():
        last = values[-n:]
        reported = metrics.get(metric, {}).get("value")
        if reported is None or not all(isinstance(value, int | float) and value in (0, 1) for value in last):
            continue
        if abs(sum(last) / n - reported) < 1e-9:
            found[metric] = "".join(str(int(value)) for value in last)
    return found


def _forget_answers(task: ConfigurableTask, **_: Any) -> None:
    for request in task.instances:
        request.resps, request.filtered_resps = [], {}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's progress bars and advice; errors are raised and seen."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _compiled_templates() -> Iterator[None]:
    """Compile each Jinja template once, and render it once a document: lm-eval spends most of its time there.

    lm-eval renders a task's examples anew for every question.
    """
    compiled = lru_cache(4096)(lm_eval.utils.env.from_string)
    plain = lm_eval.utils.apply_template
    # the document is kept beside its text: while it lives, nothing else has its id
    rendered: dict[tuple[str, int], tuple[Doc, str]] = {}

    def render(template: str, doc: Doc) -> str:
        key = template, id(doc)
        if key not in rendered:
            rendered[key] = doc, compiled(template).render(**doc)
        return rendered[key][1]

    lm_eval.utils.apply_template = render
    try:
        yield
    finally:
        lm_eval.utils.apply_template = plain
