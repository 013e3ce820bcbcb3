"""The bios tasks: a document is one probe, and the answer with its stop is scored. Task files name these functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.samplers import ContextSampler

from suite.data.bios.metrics import METRICS, Scored, bits, bits_max, bits_se, nll, nll_se, recall, recall_se
from suite.evaluate.datasets import Doc

__all__ = ["OtherPeople", "bits", "bits_max", "bits_se", "nll", "nll_se", "recall", "recall_se", "score_probe"]


class OtherPeople(ContextSampler):
    """Few-shot examples about people other than the one in question, whose facts they would give away."""

    def sample(self, n: int, eval_doc: Doc | None = None, df: Any = None, **_: Any) -> list[Doc]:
        """Return `n` documents, drawn without replacement."""
        pool = [doc for doc in self.fewshot_docs() if eval_doc is None or doc["person"] != eval_doc["person"]]
        return self.rnd.sample(pool, n)


def score_probe(doc: Doc, results: Sequence[tuple[float, bool]]) -> dict[str, Scored]:
    """Return the scored probe under the name of every metric; lm-eval aggregates."""
    return dict.fromkeys(METRICS, Scored(doc["probe"], *results[0]))
