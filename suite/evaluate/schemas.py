"""The fields that the rows of each data set must have; checked before anything is scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from suite.errors import UserError
from suite.evaluate.datasets import Doc


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("Unicode text, without half of a surrogate pair") from None
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("text that is not empty")
    return text


def _with_gap(text: str) -> str:
    if "_" not in text:
        raise ValueError("text with a gap, written _")
    return text


Unicode = Annotated[str, AfterValidator(_unicode)]
Text = Annotated[Unicode, AfterValidator(_not_blank)]
Texts = Annotated[list[Text], Field(min_length=1)]
WithGap = Annotated[Text, AfterValidator(_with_gap)]
FourTexts = Annotated[list[Unicode], Field(min_length=4, max_length=4)]


class TriviaQAAnswer(TypedDict):
    value: Text
    aliases: Texts


class TriviaQA(TypedDict):
    question: Text
    answer: TriviaQAAnswer


class NQOpen(TypedDict):
    question: Text
    answer: Texts


class HotpotQA(TypedDict):
    question: Text
    answer: Text


class MMLU(TypedDict):
    question: Text
    choices: FourTexts
    answer: Literal[0, 1, 2, 3]


class HellaSwag(TypedDict):
    activity_label: Text
    ctx_a: Text
    ctx_b: Unicode
    endings: FourTexts
    label: Literal["0", "1", "2", "3", 0, 1, 2, 3]


class PIQA(TypedDict):
    goal: Text
    sol1: Text
    sol2: Text
    label: Literal[0, 1]


class OpenBookQAChoices(TypedDict):
    text: Texts
    label: Texts


class OpenBookQA(TypedDict):
    question_stem: Text
    choices: OpenBookQAChoices
    answerKey: Text


class ARCChoices(TypedDict):
    text: Texts
    label: Texts


class ARC(TypedDict):
    question: Text
    choices: ARCChoices
    answerKey: Text


def _has_answer(row: ARC) -> ARC:
    labels = row["choices"]["label"]
    if len(labels) != len(row["choices"]["text"]):
        raise ValueError(f"choices.label: got {len(labels)} labels, allowed: one for each of choices.text")
    if row["answerKey"] not in labels:
        raise ValueError(f"answerKey: got {row['answerKey']!r}, allowed: {', '.join(labels)}")
    return row


class Winogrande(TypedDict):
    sentence: WithGap
    option1: Text
    option2: Text
    answer: Literal["1", "2"]


class Lambada(TypedDict):
    text: Text


class WikitextPage(TypedDict):
    page: Unicode


class HumanEval(TypedDict):
    task_id: Text
    prompt: Text
    canonical_solution: Text
    test: Text
    entry_point: Text


class MBPP(TypedDict):
    text: Text
    code: Text
    test_list: Texts
    task_id: int


ROWS: dict[str, TypeAdapter[Any]] = {
    "mandarjoshi/trivia_qa": TypeAdapter(TriviaQA),
    "google-research-datasets/nq_open": TypeAdapter(NQOpen),
    "hotpotqa/hotpot_qa": TypeAdapter(HotpotQA),
    "cais/mmlu": TypeAdapter(MMLU),
    "Rowan/hellaswag": TypeAdapter(HellaSwag),
    "baber/piqa": TypeAdapter(PIQA),
    "allenai/openbookqa": TypeAdapter(OpenBookQA),
    "allenai/ai2_arc": TypeAdapter(Annotated[ARC, AfterValidator(_has_answer)]),
    "allenai/winogrande": TypeAdapter(Winogrande),
    "EleutherAI/lambada_openai": TypeAdapter(Lambada),
    "EleutherAI/wikitext_document_level": TypeAdapter(WikitextPage),
    "openai/openai_humaneval": TypeAdapter(HumanEval),
    "google-research-datasets/mbpp": TypeAdapter(MBPP),
}
"""The type of a row, by data set."""


def check(repo: str, docs: Sequence[Doc], where: str) -> None:
    """Validate every row of a data set.

    Args:
        repo: The data set's name; one without a schema is not checked.
        docs: Its rows.
        where: Their file, for errors.

    Raises:
        UserError: The first invalid row, with its number (from 1), field, value and what is allowed.
    """
    rows = ROWS.get(repo)
    if rows is None:
        return
    for number, doc in enumerate(docs, start=1):
        try:
            rows.validate_python(doc, strict=True)
        except ValidationError as error:
            raise UserError(f"{where}: row {number}: {_explain(error)}") from None


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    field = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"]).removeprefix(".")
    if first["type"] == "missing":
        return f"no field {field}"
    allowed = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    # a check of several fields names them itself
    return f"{field}: got {first['input']!r:.80}, allowed: {allowed}" if field else allowed
