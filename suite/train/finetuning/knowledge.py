"""Measurements of learning and forgetting while a model is trained on new facts.

A measurement scores every new fact of the stream, taught or not, and what the parent knew before: the people of its
world or its held-out text. Bits of a fact are log2 of its equally likely answers plus the mean over prompts of
log2 p(answer). The difference of two measurements is what was gained or lost, and each fact can be followed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from suite.data.bios.world import ProbeKind
from suite.data.corpus import Corpus
from suite.inference import loglikelihood
from suite.models.transformer import Transformer
from suite.train.probe import TOKEN_BUDGET, Prober, held_out_bytes

DIGITS = 4
"""Decimal places of the values of single facts."""


@dataclass(frozen=True)
class _Prompt:
    fact: int
    kind: ProbeKind
    request: loglikelihood.Request


class KnowledgeProber:
    """Scores new facts and known ones, the same for every model.

    Args:
        corpus: A stream of new facts.
        known: The parent's training data; None if it has none.
        facts_per_step: Facts that a step teaches.
    """

    def __init__(self, corpus: Corpus, known: Corpus | None, facts_per_step: int) -> None:
        self._facts = corpus.config.new_facts()
        self._facts_per_step = facts_per_step
        self._prompts = [
            _Prompt(number, kind, loglikelihood.encode_pair(corpus.tokenizer, prompt, fact.answer))
            for number, fact in enumerate(self._facts)
            for kind, prompts in fact.prompts.items()
            for prompt in prompts
        ]
        self._known = None if known is None else Prober(known)
        self._bytes = None if known is None else held_out_bytes(known)

    def run(self, model: Transformer, step: int) -> dict[str, Any]:
        """Score the model after `step` steps.

        Returns:
            {"new": {"taught": facts, "bits_max": entropies, kind: {"bits", "recall"}},
            "known": {"loss", "bits_per_byte", "probe"}}. `bits_max`, `bits` and `recall` (the share of prompts after
            which greedy decoding gives the answer) have a value for each fact, in the order of the stream, None where
            a fact has no prompt of the kind. "loss" is in nats per token.
        """
        taught = min(len(self._facts), step * self._facts_per_step)
        bits_max = [round(fact.entropy_bits, DIGITS) for fact in self._facts]
        line: dict[str, Any] = {"new": {"taught": taught, "bits_max": bits_max, **self._new(model)}}
        if self._known is not None:
            scores = self._known.run(model)
            line["known"] = {"loss": scores["eval_loss"], "probe": scores.get("probe", {})}
            if self._bytes is not None:
                tokens, size = self._bytes
                line["known"]["bits_per_byte"] = scores["eval_loss"] / math.log(2) * tokens / size
        return line

    def _new(self, model: Transformer) -> dict[str, dict[str, list[float | None]]]:
        results = loglikelihood.score(model, [prompt.request for prompt in self._prompts], TOKEN_BUDGET)
        values: dict[ProbeKind, list[list[tuple[float, bool]]]] = {}
        for prompt, result in zip(self._prompts, results, strict=True):
            by_fact = values.setdefault(prompt.kind, [[] for _ in self._facts])
            by_fact[prompt.fact].append(result)
        return {
            kind: {
                "bits": [
                    round(fact.entropy_bits + sum(log_p for log_p, _ in scored) / len(scored) / math.log(2), DIGITS)
                    if scored
                    else None
                    for fact, scored in zip(self._facts, by_fact, strict=True)
                ],
                "recall": [
                    round(sum(is_greedy for _, is_greedy in scored) / len(scored), DIGITS) if scored else None
                    for scored in by_fact
                ],
            }
            for kind, by_fact in values.items()
        }
