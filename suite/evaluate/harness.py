"""Scoring a finished model with lm-eval: tasks built once, any number of models scored on them.

`evaluate` returns the content of a run's `eval/<hash8>.json`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval import evaluator
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask

from suite.cells import EvalConfig
from suite.data.corpus import Corpus
from suite.data.tokenizers import lost_parts
from suite.errors import UserError
from suite.evaluate import catalog
from suite.evaluate.adapter import Codec, SuiteLM
from suite.evaluate.datasets import DataRoot
from suite.evaluate.lm_eval_patches import closed_form_errors, compiled_templates, freeze_requests, quiet
from suite.evaluate.sandbox import Sandbox
from suite.inference import paired
from suite.inference.batching import products_in
from suite.models.lookup.controls import tables_off
from suite.models.transformer import Transformer

TOKEN_BUDGET = 16384
PACKAGES = ("lm-eval", "datasets", "torch")
_STDERR = "_se"
"""A task returns the standard error of its metric M as a metric M_se if lm-eval has no formula for it."""


def evaluate(
    model: Transformer,
    corpus: Corpus,
    config: EvalConfig,
    data_root: Path | None = None,
    sandbox: Sandbox | None = None,
) -> dict[str, Any]:
    """Score one model.

    Args:
        model: The model, whose mode is not changed.
        corpus: Its training data, with the tokenizer, the row length, and the documents of bios and held-out tasks.
        config: Tasks, number of examples, limit of documents, whether tables are switched off, and the precision.
        data_root: Folder of evaluation data; None: the hub.
        sandbox: Runs the programs that the model writes; None: tasks that need it are refused.

    Returns:
        {"eval", "hash", "versions", "tokenizer", "tasks": {name: {"version", "few_shot", "limit", "n", "prompt_hash",
        "data_fingerprint", "cut", "metrics": {metric: {"value", "stderr"}}, "answers": {metric: "0110..."}}}}; "cut"
        counts requests whose context was truncated at its start. A stderr is None if it cannot be estimated.
        "answers" has one character per question, in the order of the data, for metrics that are means of zeros and
        ones; groups have no answers.

    Raises:
        UserError: A task is unknown, does not fit the corpus, its data cannot be used, or the tokenizer cannot encode
            it.
    """
    return Evaluator(data_root, sandbox).evaluate(model, corpus, config)


class Evaluator:
    """`evaluate` for many checkpoints and models: the requests of an evaluation are built once per corpus."""

    def __init__(self, data_root: Path | None = None, sandbox: Sandbox | None = None) -> None:
        self._data_root, self._sandbox = data_root, sandbox
        self._harnesses: dict[tuple[str, int, str], Harness] = {}

    def evaluate(
        self,
        model: Transformer,
        corpus: Corpus,
        config: EvalConfig,
        reference: Transformer | None = None,
        on_progress: Callable[[float], None] = lambda share: None,
    ) -> dict[str, Any]:
        """Score one model; see the function `evaluate`.

        With a `reference`, another model of the same vocabulary, tasks have "differences" from it (`paired`).

        Args:
            model: The model.
            corpus: Its training data.
            config: Tasks, few-shot examples, limit, and whether tables are switched off.
            reference: Another model to compare with; None: none.
            on_progress: Called with the share of the requests that are done, after every batch.
        """
        key = corpus.fingerprint, corpus.config.seq_len, config.hash8
        if key not in self._harnesses:
            self._harnesses[key] = Harness(corpus, config, self._data_root, self._sandbox)
        return self._harnesses[key].run(model, reference, on_progress)


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
        for name, task in self._prepared.loaded.tasks.items():
            _refuse_lost_parts(corpus, name, task)

    def run(
        self,
        model: Transformer,
        reference: Transformer | None = None,
        on_progress: Callable[[float], None] = lambda share: None,
    ) -> dict[str, Any]:
        """Score one model; see `Evaluator.evaluate`."""
        requests = self._prepared.requests
        every = requests if reference is None else 2 * requests
        lm, outcome = self._outcome(model, lambda done: on_progress(done / every))
        records = records_of(outcome, self._prepared)
        if reference is not None:
            _, other = self._outcome(reference, lambda done: on_progress((requests + done) / every))
            for name, task in self._prepared.loaded.tasks.items():
                ours, theirs = (part["samples"][name][-records[name]["n"] :] for part in (outcome, other))
                metrics = {m: f for m, f in task.aggregation().items() if not m.endswith(_STDERR)}
                records[name]["differences"] = paired.differences(ours, theirs, metrics)
        return {
            "eval": self._config.model_dump(mode="json"),
            "hash": self._config.hash8,
            "versions": {package: version(package) for package in PACKAGES},
            "tokenizer": self._corpus.tokenizer.fingerprint,
            "tasks": {name: {**record, "cut": self._truncated(name, lm)} for name, record in records.items()},
        }

    def _outcome(self, model: Transformer, on_progress: Callable[[float], None]) -> tuple[SuiteLM, dict[str, Any]]:
        """Return the model under lm-eval, and what lm-eval returns."""
        lm = SuiteLM(model, self._codec, self._corpus.config.seq_len, TOKEN_BUDGET, on_progress)
        lm.refuse_diverged()
        off = model.memory_tables() if self._config.table_off else []
        with tables_off(off), products_in(self._config.precision, model.embedding.weight.device):
            return lm, outcome_of(lm, self._prepared)

    def _truncated(self, name: str, lm: SuiteLM) -> int:
        group = self._prepared.loaded.groups.get(name)
        return (
            lm.truncated[name] if group is None else sum(lm.truncated[task.task_name] for task in group.get_all_tasks())
        )


def _refuse_lost_parts(corpus: Corpus, name: str, task: ConfigurableTask) -> None:
    """Raise UserError if a request has a part that the tokenizer cannot encode, which would change its score."""
    if not corpus.tokenizer.loses_text:
        return
    # in lines, since choices and examples repeat most of them
    texts = {text for request in task.instances for text in request.args if isinstance(text, str)}
    lost = lost_parts(corpus.tokenizer, sorted({line for text in texts for line in text.splitlines(keepends=True)}))
    if lost:
        more = f" and {len(lost) - 1} other words or characters" if lost[1:] else ""
        raise UserError(
            f"task {name}: data.tokenizer.path: got {str(corpus.config.tokenizer.path)!r}, which has no token for"
            f" {lost[0][:40]!r}{more} of the task's texts and would not count them; allowed: a tokenizer that encodes"
            " any text (bpe, bytes, or a file with bytes for what its vocabulary lacks), or other tasks"
        )


@dataclass(frozen=True)
class Prepared:
    """Tasks with their requests built, and a hash of each task's requests."""

    loaded: catalog.Loaded
    limit: int | None
    prompt_hashes: dict[str, str]

    @property
    def requests(self) -> int:
        """The number of requests of all tasks, repetitions included."""
        return sum(request.repeats or 1 for task in self.loaded.tasks.values() for request in task.instances)


def prepare(config: EvalConfig, sources: catalog.Sources) -> Prepared:
    """Load the tasks and build their requests, once for any number of models.

    Raises:
        UserError: See `catalog.load`.
    """
    with quiet(), compiled_templates():
        loaded = catalog.load(config.tasks, sources, config.num_fewshot)
        for task in loaded.tasks.values():
            task.build_all_requests(limit=config.limit)
            freeze_requests(task)
    hashes = {name: catalog.prompt_hash(task) for name, task in loaded.tasks.items()}
    return Prepared(loaded, config.limit, hashes)


def scores_of(lm: LM, prepared: Prepared) -> dict[str, dict[str, Any]]:
    """Score a model; see `records_of`."""
    return records_of(outcome_of(lm, prepared), prepared)


def outcome_of(lm: LM, prepared: Prepared) -> dict[str, Any]:
    """Return lm-eval's results and samples of every task and group.

    Raises:
        UserError: A perplexity is too large for a number.
    """
    with quiet(), compiled_templates(), closed_form_errors():
        try:
            outcome = evaluator.evaluate(
                lm,
                {"tasks": prepared.loaded.tasks, "groups": prepared.loaded.groups},
                limit=prepared.limit,
                log_samples=True,
                # The sandbox runs the programs; tasks with programs are refused without one.
                confirm_run_unsafe_code=True,
            )
        except OverflowError:
            raise UserError("a perplexity is above 1e308: the model's training has diverged") from None
    assert outcome is not None
    return dict(outcome)


def records_of(outcome: dict[str, Any], prepared: Prepared) -> dict[str, dict[str, Any]]:
    """Return the record of every task and group: versions and counts, prompt and data hashes, and metrics.

    Those of tasks also have answers.
    """
    loaded = prepared.loaded
    results = outcome["results"]
    records = {
        name: {
            "version": task.VERSION,
            "few_shot": task.config.num_fewshot,
            "limit": prepared.limit,
            "n": results[name]["sample_len"],
            "prompt_hash": prepared.prompt_hashes[name],
            "data_fingerprint": loaded.fingerprints[name],
            "metrics": _metrics(results[name]),
            "answers": _answers(outcome["samples"][name], results[name]["sample_len"], _metrics(results[name])),
        }
        for name, task in loaded.tasks.items()
    }
    for name, group in loaded.groups.items():
        members = [records[task.task_name] for task in group.get_all_tasks()]
        records[name] = {
            "version": group.version,
            "few_shot": members[0]["few_shot"],
            "limit": prepared.limit,
            "n": sum(member["n"] for member in members),
            "prompt_hash": catalog.digest(member["prompt_hash"] for member in members),
            "data_fingerprint": catalog.digest(member["data_fingerprint"] for member in members),
            "metrics": _metrics(results[name]),
        }
    return records


def _metrics(result: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Return values and standard errors from lm-eval's `metric,filter` and `metric_stderr,filter`."""
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
    finite = {metric: error for metric, error in errors.items() if math.isfinite(error)}
    return {metric: {"value": value, "stderr": finite.get(metric)} for metric, value in values.items()}


def _answers(samples: list[dict[str, Any]], n: int, metrics: dict[str, dict[str, float | None]]) -> dict[str, str]:
    """Return one character per question, for metrics that are means of zeros and ones.

    Args:
        samples: lm-eval's log of every question, for each filter in turn; the last filter counts, as in `_metrics`.
        n: The number of questions.
        metrics: The reported values.
    """
    last = samples[-n:]
    answers = {}
    for metric, reported in metrics.items():
        values: list[Any] = [sample.get(metric) for sample in last]
        if reported["value"] is None or not all(isinstance(value, int | float) and value in (0, 1) for value in values):
            continue
        if abs(sum(values) / n - reported["value"]) < 1e-9:
            answers[metric] = "".join(str(int(value)) for value in values)
    return answers
