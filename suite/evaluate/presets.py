"""Named sets of evaluations of real tasks.

`paper` is the protocol of "Memory Layers at Scale" (arXiv 2412.09764, section 4.2), as far as it is stated: EM or F1
for questions, pass@1 for programs, accuracy for choices, and the likelihood of the right answer. The numbers of
examples are our choice (the paper gives none, the released template 5 for NQ): 5 for questions and MMLU, 0 for other
choices and HumanEval, 3 for MBPP as in the stock prompt.

`quick` scores the first documents of each task, which are always the same. With 200 documents an accuracy of p has a
standard error of sqrt(p (1 - p) / 200), at most 0.035; the estimate is recorded with every score.
"""

from __future__ import annotations

from suite.cells import EvalConfig
from suite.errors import UserError

QUESTIONS = (
    "nq_open",
    "triviaqa",
    "nq_open_qa",
    "triviaqa_qa",
    "hotpotqa_qa",
    "nq_open_nll",
    "triviaqa_nll",
    "hotpotqa_nll",
)
CHOICES = ("hellaswag", "piqa", "openbookqa")
PROGRAMS = ("humaneval", "mbpp")

PRESETS: dict[str, tuple[EvalConfig, ...]] = {
    "paper": (
        EvalConfig(tasks=(*QUESTIONS, "mmlu"), num_fewshot=5),
        EvalConfig(tasks=CHOICES, num_fewshot=0),
        EvalConfig(tasks=PROGRAMS),
    ),
    "quick": (
        EvalConfig(tasks=("nq_open_qa", "triviaqa_qa", "hotpotqa_qa", "nq_open_nll"), num_fewshot=5, limit=200),
        EvalConfig(tasks=CHOICES, num_fewshot=0, limit=200),
        EvalConfig(tasks=("mmlu",), num_fewshot=5, limit=4),
    ),
}


def preset(name: str) -> tuple[EvalConfig, ...]:
    """Return the evaluations of a preset.

    Raises:
        UserError: No preset has that name.
    """
    if name not in PRESETS:
        raise UserError(f"--preset: got {name!r}, allowed: {', '.join(sorted(PRESETS))}")
    return PRESETS[name]
