"""Probes during training: bits learned about a fixed sample of people, and evaluation-mode loss.

They are scored without an evaluation library, so that training needs only torch, numpy and pydantic. The evaluation
harness gives the same numbers for the same people (tests/evaluate/test_harness.py).

Shapes: B rows, T positions, D model width, N scored positions, V vocabulary.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from suite.data import seeded_random
from suite.data.bios import metrics
from suite.data.bios.world import Probe, ProbeKind, World
from suite.data.corpus import Corpus
from suite.data.loader import Batch
from suite.data.packing import IGNORED
from suite.inference import loglikelihood
from suite.inference.batching import evaluation_mode
from suite.models.transformer import Transformer

SAMPLE_SEED = 0
PEOPLE = 100
LOSS_TOKENS = 8192
TOKEN_BUDGET = 16384


class Prober:
    """The probes of a corpus, the same for every model.

    Args:
        corpus: A bios corpus (probes, and loss on training rows) or a text corpus (loss on held-out windows).
        people: Number of people in the fixed sample of each kind of probe; all people of a smaller world.
    """

    def __init__(self, corpus: Corpus, people: int = PEOPLE) -> None:
        self._probes: dict[ProbeKind, list[Probe]] = {}
        self._requests: dict[ProbeKind, list[loglikelihood.Request]] = {}
        if corpus.world is not None:
            for kind in kinds(corpus.world):
                probes = corpus.world.probes(kind, sample(corpus.world, kind, people))
                self._probes[kind] = probes
                self._requests[kind] = [
                    loglikelihood.encode_pair(corpus.tokenizer, probe.prompt, probe.answer) for probe in probes
                ]
        self.rows = _loss_rows(corpus)

    def run(self, model: Transformer) -> dict[str, Any]:
        """Score the model: {"eval_loss": nats per token, "probe": {kind: {bits, bits_max, nll, recall, n}}}.

        "probe" is absent for text. `n` is the number of probes. The model's mode is restored.
        """
        scores: dict[str, Any] = {"eval_loss": loss(model, self.rows)}
        if self._probes:
            scores["probe"] = {kind: self._bits(model, kind) for kind in self._probes}
        return scores

    def _bits(self, model: Transformer, kind: ProbeKind) -> dict[str, float]:
        results = loglikelihood.score(model, self._requests[kind], TOKEN_BUDGET)
        items = [metrics.Scored(probe, *result) for probe, result in zip(self._probes[kind], results, strict=True)]
        values = {name: metrics.METRICS[name](items) for name in ("bits", "bits_max", "nll", "recall")}
        return {**values, "n": len(items)}


def kinds(world: World) -> tuple[ProbeKind, ...]:
    """Return the kinds of probes of a world: extraction only if questions are part of the training text."""
    return ("storage", "paraphrase", "extraction") if len(world.with_questions) else ("storage", "paraphrase")


def sample(world: World, kind: ProbeKind, people: int) -> list[int]:
    """Draw a fixed sample of people.

    Args:
        world: The world.
        kind: The kind of probe; for extraction, only people whose questions are not in the training text are drawn.
        people: Size of the sample; all people of a smaller world.

    Returns:
        The people's indices, ascending.
    """
    eligible = world.without_questions if kind == "extraction" else range(world.people)
    order = seeded_random.permutation(len(eligible), SAMPLE_SEED, world.seed)
    return sorted(int(eligible[i]) for i in order[:people])


def _loss_rows(corpus: Corpus) -> Batch:
    """Return the fixed rows of the evaluation-mode loss."""
    rows = max(1, LOSS_TOKENS // corpus.config.seq_len)
    if corpus.world is not None:
        loader = corpus.loader(SAMPLE_SEED, rows)
        return corpus.loader(SAMPLE_SEED, min(rows, loader.rows_per_epoch)).batch(0)
    return held_out_rows(corpus, rows)


def held_out_rows(corpus: Corpus, rows: int) -> Batch:
    """Return the first held-out documents, packed into rows as in training."""
    eot, length = corpus.tokenizer.eot_id, corpus.config.seq_len
    stream = (token for text in corpus.held_out for token in (eot, *corpus.tokenizer.encode(text)))
    ids = list(itertools.islice(stream, rows * length + 1))
    count = max(1, (len(ids) - 1) // length)
    ids_T = torch.full((count * length + 1,), eot)
    filled = min(len(ids), len(ids_T))
    ids_T[:filled] = torch.tensor(ids[:filled])
    targets_T = ids_T[1:].clone()
    targets_T[filled - 1 :] = IGNORED
    tokens_BT = ids_T[:-1].view(count, length)
    return Batch(tokens_BT, targets_T.view(count, length), (tokens_BT == eot).cumsum(1))


def held_out_bytes(corpus: Corpus) -> tuple[int, int] | None:
    """Return the targets of the evaluation-mode loss and the bytes of their text; None for bios, which has no text."""
    if corpus.world is not None:
        return None
    rows = _loss_rows(corpus)
    scored = rows.targets_BT[(rows.targets_BT != IGNORED) & (rows.targets_BT != corpus.tokenizer.eot_id)]
    return int((rows.targets_BT != IGNORED).sum()), len(corpus.tokenizer.decode(scored.tolist()).encode())


def loss(model: Transformer, rows: Batch) -> float:
    """Return the mean cross-entropy in nats per target, in evaluation mode and fp32."""
    total = 0.0
    step = max(1, TOKEN_BUDGET // rows.tokens_BT.shape[1])
    with evaluation_mode(model) as device:
        for start in range(0, len(rows.tokens_BT), step):
            tokens_BT, targets_BT, segments_BT = (
                part[start : start + step].to(device) for part in (rows.tokens_BT, rows.targets_BT, rows.segments_BT)
            )
            x_BTD = model.hidden(tokens_BT, segments_BT)
            scored_BT = targets_BT != IGNORED
            total += float(model.loss(x_BTD[scored_BT], targets_BT[scored_BT]))
    return total / int((rows.targets_BT != IGNORED).sum())
