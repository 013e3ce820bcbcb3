"""Scoring and generation one token at a time, and a model whose predictions differ."""

from __future__ import annotations

import torch

from suite import models
from suite.data.corpus import Corpus
from suite.models.registry import ModelConfig
from suite.models.transformer import Transformer

VOCAB = 40


def small_model(corpus: Corpus, seed: int = 0) -> Transformer:
    """Return a dense model whose predictions differ."""
    return sharpened(models.build(ModelConfig(family="dense", base="w32"), corpus.vocab_size, seed))


def sharpened(model: Transformer) -> Transformer:
    """Scale up the weights, since initial weights predict all tokens almost equally."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model


def naive_score(model: Transformer, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Score a continuation with one forward pass per token, without batches or shared contexts."""
    model.eval()
    total, greedy, ids = 0.0, True, list(context)
    with torch.no_grad():
        for token in continuation:
            log_p_V = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
            total += float(log_p_V[token])
            greedy &= int(log_p_V.argmax()) == token
            ids.append(token)
    return total, greedy


def naive_generate(model: Transformer, prompt: list[int], most: int, stops: set[int]) -> list[int]:
    model.eval()
    made: list[int] = []
    with torch.no_grad():
        while len(made) < most:
            token = int(model(torch.tensor([prompt + made]))[0, -1].argmax())
            if token in stops:
                break
            made.append(token)
    return made
