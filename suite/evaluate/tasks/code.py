"""HumanEval and MBPP: stock prompts, our sandbox.

lm-eval's own definitions load a metric from the hub that runs programs inside the evaluator; theirs are the prompts,
stop strings and examples here, not the execution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lm_eval.tasks._yaml_loader import load_yaml

from suite.errors import UserError
from suite.evaluate.datasets import DataRoot, Doc
from suite.evaluate.sandbox import Sandbox

TASKS: dict[str, tuple[str, int]] = {
    "humaneval": ("humaneval/humaneval.yaml", 1),
    "humaneval_10": ("humaneval/humaneval.yaml", 10),
    "mbpp": ("mbpp/mbpp.yaml", 1),
    "mbpp_10": ("mbpp/mbpp.yaml", 10),
}
"""name -> (stock file, programs drawn for a problem); one program is the greedy one"""

TEMPERATURE = 0.8
"""For several programs a problem: Chen et al. 2021 (arXiv 2107.03374), section 3.1, best for large k."""

_MBPP_EXAMPLES = (2, 3, 4)
"""task_id of the examples in the stock prompt"""


def config(name: str, stock: Path, root: DataRoot, sandbox: Sandbox | None) -> dict[str, Any]:
    """The lm-eval configuration of a task of TASKS.

    Raises:
        UserError: no sandbox was given.
    """
    if sandbox is None:
        raise UserError(f"task {name}: runs programs that the model writes, allowed: with --run-code only")
    file, count = TASKS[name]
    made = load_yaml(stock / file, resolve_func=False)
    options = made["generation_kwargs"]
    options.setdefault("max_gen_toks", 256)
    if count > 1:
        options |= {"do_sample": True, "temperature": TEMPERATURE}
    ks = [k for k in (1, count) if k <= count]
    made |= {
        "task": name,
        "repeats": count,
        "metric_list": [
            {"metric": f"pass@{k}", "aggregation": "mean", "higher_is_better": True} for k in dict.fromkeys(ks)
        ],
        "process_results": partial(_score, tuple(dict.fromkeys(ks))),
        "filter_list": [{"name": "run", "filter": [{"function": "custom", "filter_fn": partial(run, name, sandbox)}]}],
    }
    if name.startswith("mbpp"):
        rows = {
            doc["task_id"]: doc for doc in root.load(made["dataset_path"], made["dataset_name"], ["prompt"])["prompt"]
        }
        made["fewshot_config"]["samples"] = [rows[task_id] | {"is_fewshot": True} for task_id in _MBPP_EXAMPLES]
    return made


def program(name: str, doc: Doc, completion: str) -> str:
    """What is run: the completion and the problem's tests.

    MBPP's `test_setup_code` is run before the tests; stock lm-eval leaves it out, and one problem cannot pass there.
    """
    if name.startswith("humaneval"):
        return f"{doc['prompt']}{completion}\n{doc['test']}\ncheck({doc['entry_point']})\n"
    return "\n".join([completion, doc.get("test_setup_code", ""), *doc["test_list"][:3], ""])


def canonical(name: str, doc: Doc) -> str:
    """The reference completion."""
    return doc["canonical_solution"] if name.startswith("humaneval") else doc["code"]


def run(name: str, sandbox: Sandbox, resps: Sequence[Sequence[str]], docs: Sequence[Doc]) -> list[list[bool]]:
    """Run every completion of every problem, over all cores; whether each passed."""
    programs = [[program(name, doc, text) for text in texts] for texts, doc in zip(resps, docs, strict=True)]
    distinct = list(dict.fromkeys(text for of_problem in programs for text in of_problem))
    passed = dict(zip(distinct, (outcome.passed for outcome in sandbox.run_all(distinct)), strict=True))
    return [[passed[text] for text in of_problem] for of_problem in programs]


def _score(ks: Sequence[int], doc: Doc, results: Sequence[Sequence[bool]]) -> dict[str, float]:
    return {f"pass@{k}": pass_at(k, len(results[0]), sum(results[0])) for k in ks}


def pass_at(k: int, count: int, passed: int) -> float:
    """Unbiased chance that one of k programs drawn passes, from `passed` of `count` (Chen et al. 2021, equation 1)."""
    return 1.0 - math.comb(count - passed, k) / math.comb(count, k)
