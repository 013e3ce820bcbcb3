"""Probes during training."""

from __future__ import annotations

import math

import pytest
import torch
from naive_scoring import naive_score

from suite import models
from suite.data.bios import metrics
from suite.data.bios.metrics import bits_learned
from suite.data.corpus import Corpus
from suite.models import head_loss
from suite.models.registry import ModelConfig
from suite.models.transformer import Transformer
from suite.plan.live_bytes import LiveBytes
from suite.train import probe


def test_bits_equal_a_loop_over_tokens(bios: Corpus, bios_model: Transformer) -> None:
    assert bios.world is not None
    people = probe.sample(bios.world, "storage", 3)
    probes = bios.world.probes("storage", people)
    eot, encode = bios.tokenizer.eot_id, bios.tokenizer.encode
    naive = [naive_score(bios_model, [eot, *encode(p.prompt)], encode(p.answer)) for p in probes]
    expected = bits_learned(probes, [log_p / math.log(2) for log_p, _ in naive])

    storage = probe.Prober(bios, people=3).run(bios_model)["probe"]["storage"]
    assert storage["bits"] == pytest.approx(expected.bits, rel=1e-5)
    assert storage["bits_max"] == pytest.approx(3 * bios.world.H)
    assert storage["nll"] == pytest.approx(expected.nll, rel=1e-5)
    assert storage["recall"] == sum(greedy for _, greedy in naive) / len(naive)
    assert storage["n"] == len(probes)


def test_extraction_probes_only_people_without_questions_in_training(bios: Corpus) -> None:
    assert bios.world is not None
    assert not set(probe.sample(bios.world, "extraction", 30)) & set(bios.world.with_questions.tolist())


def test_loss_ignores_padding_and_separates_documents(bios: Corpus, bios_model: Transformer) -> None:
    batch = bios.loader(probe.SAMPLE_SEED, 3).batch(0)
    total, count = 0.0, 0
    for tokens_T, targets_T, segments_T in zip(batch.tokens_BT, batch.targets_BT, batch.segments_BT, strict=True):
        for segment in segments_T.unique():
            inside_T = segments_T == segment
            if (targets_T[inside_T] == -100).all():
                continue
            with torch.no_grad():
                log_p_TV = bios_model.eval()(tokens_T[inside_T][None])[0].log_softmax(-1)
            total -= float(log_p_TV.gather(1, targets_T[inside_T][:, None]).sum())
            count += int(inside_T.sum())
    assert probe.loss(bios_model, batch) == pytest.approx(total / count, rel=1e-5)


def test_logits_of_the_loss_never_exist_whole(bios: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_loss, "LOGITS_AT_ONCE", 1 << 18)
    vocabulary = 20_000
    rows = bios.loader(0, 2).batch(0)
    model = models.build(ModelConfig(family="dense", base="w16"), vocabulary, seed=0)
    with LiveBytes() as live:
        probe.loss(model, rows)
    scored = int((rows.targets_BT != head_loss.IGNORED).sum())
    assert live.peak < 4 * vocabulary * scored / 3


def test_held_out_rows_are_the_held_out_text(text: Corpus) -> None:
    rows = probe.held_out_rows(text, rows=1000)
    scored = rows.tokens_BT[rows.targets_BT != -100]
    whole = [token for document in text.held_out for token in (text.tokenizer.eot_id, *text.tokenizer.encode(document))]
    assert scored.tolist() == whole[: len(scored)]
    assert len(whole) - len(scored) <= text.config.seq_len


def test_a_text_corpus_has_a_loss_and_no_probes(text: Corpus, text_model: Transformer) -> None:
    text_model.train()
    scores = probe.Prober(text).run(text_model)
    assert set(scores) == {"eval_loss"}
    assert text_model.training


def test_standard_errors_are_over_people_not_probes(bios: Corpus) -> None:
    assert bios.world is not None
    probes = bios.world.probes("storage")
    once = [metrics.Scored(p, -float(p.person % 5), False) for p in probes if p.template == 0 and p.attribute == 0]
    thrice = [item for item in once for _ in range(3)]
    by_hand = torch.tensor([float(item.probe.person % 5) for item in once])
    expected = float(by_hand.std() / math.sqrt(len(by_hand)))
    assert metrics.nll_se(once) == pytest.approx(expected)
    assert metrics.nll_se(thrice) == pytest.approx(expected)
