"""All uses of lm-eval's private parts and all replacements of its functions; written for 0.4.13."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import lru_cache, partial
from typing import Any

import lm_eval.evaluator_utils
import lm_eval.utils
from lm_eval.api import metrics
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from suite.evaluate.datasets import Doc
from suite.evaluate.tasks.answers import ratio_stderr

__all__ = ["closed_form_errors", "compiled_templates", "freeze_requests", "load_yaml", "quiet"]


def freeze_requests(task: ConfigurableTask) -> None:
    """Reuse the requests that the task has built: `evaluate` then only clears the responses of the previous model.

    Building them again would take long and would draw different few-shot examples.
    """
    task.build_all_requests = partial(_clear_responses, task)


def _clear_responses(task: ConfigurableTask, **_: Any) -> None:
    for request in task.instances:
        request.resps, request.filtered_resps = [], {}


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress lm-eval's progress bars and warnings; errors are still logged and raised."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def compiled_templates() -> Iterator[None]:
    """Compile each Jinja template once, and render it once per document.

    lm-eval compiles a template on every use and renders the few-shot examples again for every question, which is where
    most of its time goes.
    """
    compiled = lru_cache(4096)(lm_eval.utils.env.from_string)
    original = lm_eval.utils.apply_template
    # The value references the document, so that its id is not reused.
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
        lm_eval.utils.apply_template = original


Items = Sequence[Any]
"""The values of a metric, one for each document."""


@contextmanager
def closed_form_errors() -> Iterator[None]:
    """Compute standard errors by formulas only; a metric without one has none.

    For perplexities lm-eval has none, or draws 100,000 bootstrap samples of the documents in a pool of processes.
    """
    formulas: dict[Any, Callable[[Items], float]] = {
        metrics.mean: metrics.mean_stderr,
        metrics.perplexity: lambda items: float(metrics.perplexity(items) * metrics.mean_stderr(items)),
        metrics.weighted_perplexity: lambda items: float(metrics.weighted_perplexity(items)) * ratio_stderr(items),
        metrics.bits_per_byte: lambda items: ratio_stderr(items) / math.log(2),
    }
    original = lm_eval.evaluator_utils.stderr_for_metric
    lm_eval.evaluator_utils.stderr_for_metric = lambda metric, bootstrap_iters: formulas.get(metric)
    try:
        yield
    finally:
        lm_eval.evaluator_utils.stderr_for_metric = original
