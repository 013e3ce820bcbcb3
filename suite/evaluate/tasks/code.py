"""HumanEval and MBPP with stock prompts, run in the sandbox.

The stock definitions load a metric from the hub that runs programs inside the evaluator. Prompts, stop strings and
examples are stock; only the execution differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from suite.errors import UserError
from suite.evaluate.datasets import DataRoot, Doc
from suite.evaluate.sandbox import Sandbox

EXAMPLE_SPLIT = "prompt"
TEMPERATURE = 0.8
"""For several programs per problem: Chen et al. 2021 (arXiv 2107.03374), section 3.1, best for large k."""


@dataclass(frozen=True)
class Problems:
    """A data set of programming problems.

    program: the text that is run for a problem and a completion; canonical: the reference completion of a problem;
    examples: task_id of the rows of EXAMPLE_SPLIT in the stock prompt.
    """

    program: Callable[[Doc, str], str]
    canonical: Callable[[Doc], str]
    examples: tuple[int, ...] = ()


@dataclass(frozen=True)
class Programs:
    """How many programs a task draws for each problem; a single one is decoded greedily."""

    problems: Problems
    count: int


def _humaneval_program(doc: Doc, completion: str) -> str:
    return f"{doc['prompt']}{completion}\n{doc['test']}\ncheck({doc['entry_point']})\n"


def _mbpp_program(doc: Doc, completion: str) -> str:
    # Stock lm-eval leaves out test_setup_code, without which one problem cannot be solved.
    return "\n".join([completion, doc.get("test_setup_code", ""), *doc["test_list"][:3], ""])


HUMANEVAL = Problems(_humaneval_program, lambda doc: doc["canonical_solution"])
MBPP = Problems(_mbpp_program, lambda doc: doc["code"], examples=(2, 3, 4))


def configure(
    name: str, stock: dict[str, Any], programs: Programs, root: DataRoot, sandbox: Sandbox | None
) -> dict[str, Any]:
    """Return the lm-eval configuration of a task that runs programs.

    Args:
        name: The task's name.
        stock: The configuration in lm-eval's YAML file.
        programs: The programs to run for each problem.
        root: The data that the examples are read from.
        sandbox: Where programs run.

    Raises:
        UserError: `sandbox` is None.
    """
    if sandbox is None:
        raise needs_sandbox(name)
    options = {"max_gen_toks": 256} | stock["generation_kwargs"]
    if programs.count > 1:
        options |= {"do_sample": True, "temperature": TEMPERATURE}
    ks = tuple(dict.fromkeys((1, programs.count)))
    config = stock | {
        "task": name,
        "generation_kwargs": options,
        "repeats": programs.count,
        "metric_list": [{"metric": f"pass@{k}", "aggregation": "mean", "higher_is_better": True} for k in ks],
        "process_results": partial(_score, ks),
        "filter_list": [
            {
                "name": "run",
                "filter": [{"function": "custom", "filter_fn": partial(run, programs.problems.program, sandbox)}],
            }
        ],
    }
    if programs.problems.examples:
        rows = root.load(stock["dataset_path"], stock["dataset_name"], [EXAMPLE_SPLIT])[EXAMPLE_SPLIT]
        by_id = {doc["task_id"]: doc for doc in rows}
        examples = [by_id[task_id] | {"is_fewshot": True} for task_id in programs.problems.examples]
        config["fewshot_config"] = stock["fewshot_config"] | {"samples": examples}
    return config


def needs_sandbox(name: str) -> UserError:
    """Return the error for a task that runs programs if that is not allowed."""
    return UserError(f"task {name}: runs programs that the model writes; allow it with --run-code")


def run(
    program: Callable[[Doc, str], str], sandbox: Sandbox, resps: Sequence[Sequence[str]], docs: Sequence[Doc]
) -> list[list[bool]]:
    """Run every completion of every problem, over all cores.

    Args:
        program: The text that is run for a problem and a completion.
        sandbox: Where programs run.
        resps: The completions of each problem.
        docs: The problems.

    Returns:
        Whether each completion passed.
    """
    texts = [[program(doc, text) for text in completions] for completions, doc in zip(resps, docs, strict=True)]
    distinct = list(dict.fromkeys(text for of_problem in texts for text in of_problem))
    passed = dict(zip(distinct, (outcome.passed for outcome in sandbox.run_all(distinct)), strict=True))
    return [[passed[text] for text in of_problem] for of_problem in texts]


def _score(ks: Sequence[int], doc: Doc, results: Sequence[Sequence[bool]]) -> dict[str, float]:
    return {f"pass@{k}": pass_at(k, len(results[0]), sum(results[0])) for k in ks}


def pass_at(k: int, count: int, passed: int) -> float:
    """Estimate the probability that at least one of k programs passes, without bias (Chen et al. 2021, equation 1).

    Args:
        k: Programs drawn per problem.
        count: Programs that were run.
        passed: Number of these that passed.

    Returns:
        The estimate of pass@k.
    """
    return 1.0 - math.comb(count - passed, k) / math.comb(count, k)
