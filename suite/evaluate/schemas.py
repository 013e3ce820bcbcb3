"""What the rows of each data set must hold; a row that does not is named, before anything is scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from suite.errors import UserError
from suite.evaluate.datasets import Doc

Check = tuple[Callable[[Any], bool], str]
"""(test of the field's value, what is allowed in words)"""


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _texts(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and bool(value) and all(map(_text, value))


TEXT: Check = (_text, "text that is not empty")
TEXTS: Check = (_texts, "a list of texts, none empty")
NUMBER: Check = (lambda value: isinstance(value, int), "an integer")

SCHEMAS: dict[str, dict[str, Check]] = {
    "mandarjoshi/trivia_qa": {
        "question": TEXT,
        "answer": (
            lambda value: isinstance(value, dict) and _text(value.get("value")) and _texts(value.get("aliases")),
            "an object with value (text) and aliases (texts, none empty)",
        ),
    },
    "google-research-datasets/nq_open": {"question": TEXT, "answer": TEXTS},
    "hotpotqa/hotpot_qa": {"question": TEXT, "answer": TEXT},
    "cais/mmlu": {
        "question": TEXT,
        "choices": (lambda value: _is_list(value, 4), "a list of 4 texts"),
        "answer": (lambda value: value in (0, 1, 2, 3), "0, 1, 2 or 3"),
    },
    "Rowan/hellaswag": {
        "activity_label": TEXT,
        "ctx_a": TEXT,
        "ctx_b": (lambda value: isinstance(value, str), "text"),
        "endings": (lambda value: _is_list(value, 4), "a list of 4 texts"),
        "label": (lambda value: str(value) in ("0", "1", "2", "3"), "0, 1, 2 or 3"),
    },
    "baber/piqa": {
        "goal": TEXT,
        "sol1": TEXT,
        "sol2": TEXT,
        "label": (lambda value: value in (0, 1), "0 or 1"),
    },
    "allenai/openbookqa": {
        "question_stem": TEXT,
        "choices": (
            lambda value: isinstance(value, dict) and _texts(value.get("text")) and _texts(value.get("label")),
            "an object with text and label (lists of texts)",
        ),
        "answerKey": TEXT,
    },
    "openai/openai_humaneval": dict.fromkeys(("task_id", "prompt", "canonical_solution", "test", "entry_point"), TEXT),
    "google-research-datasets/mbpp": {"text": TEXT, "code": TEXT, "test_list": TEXTS, "task_id": NUMBER},
}


def _is_list(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length and all(isinstance(text, str) for text in value)


def check(repo: str, docs: Sequence[Doc], where: str) -> None:
    """Every field of every row against the data set's schema.

    Raises:
        UserError: the first row that fails, with its number (from 1), field, value and what is allowed.
    """
    for number, doc in enumerate(docs, start=1):
        for field, (holds, allowed) in SCHEMAS.get(repo, {}).items():
            if field not in doc:
                raise UserError(f"{where}: row {number}: no field {field}, allowed: {allowed}")
            if not holds(doc[field]):
                raise UserError(f"{where}: row {number}: {field}: got {doc[field]!r:.80}, allowed: {allowed}")
