"""Cached, batched generation compared with a loop of one forward pass per token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_families import config
from naive_scoring import VOCAB, naive_generate, naive_score

from suite import models
from suite.inference import generation, loglikelihood
from suite.models import registry
from suite.models.transformer import Transformer

tokens = st.integers(0, VOCAB - 1)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.lists(tokens, min_size=1, max_size=9), max_size=6),
    st.integers(0, 6),
    st.sets(tokens, max_size=12),
    st.sampled_from([1, 30, 1000]),
)
def test_generation_equals_a_loop_over_tokens(
    model: Transformer, prompts: list[list[int]], most: int, stops: set[int], budget: int
) -> None:
    generated = generation.generate(model, prompts, most, stops, token_budget=budget)
    assert generated == [naive_generate(model, prompt, most, stops) for prompt in prompts]


@pytest.mark.parametrize("training", [True, False])
def test_generation_restores_the_mode(model: Transformer, training: bool) -> None:
    model.train(training)
    generation.generate(model, [[1]], 2)
    assert model.training is training


def test_a_stop_function_ends_individual_rows(model: Transformer) -> None:
    prompts = [[1, 2], [3], [4, 5, 6, 7]]
    free = generation.generate(model, prompts, 8)
    stopped = generation.generate(model, prompts, 8, finished=lambda ids: ids == free[1][:3])
    assert stopped == [free[0], free[1][:3], free[2]]


def test_samples_follow_the_model_and_do_not_depend_on_the_batch(model: Transformer) -> None:
    sampling = generation.Sampling(temperature=1.5, seed=7)
    prompts = [[1, 2, 3]] * 4000
    draws = generation.generate(model, prompts, 1, sampling=sampling)
    assert draws[:50] == generation.generate(model, prompts[:50], 1, token_budget=20, sampling=sampling)
    with torch.no_grad():
        p_V = (model(torch.tensor([[1, 2, 3]]))[0, -1] / 1.5).softmax(-1)
    share_V = torch.bincount(torch.tensor([row[0] for row in draws]), minlength=VOCAB) / len(draws)
    assert float((share_V - p_V).abs().max()) < 4 * float((p_V * (1 - p_V) / len(draws)).sqrt().max())


@pytest.mark.parametrize("family", registry.families())
def test_every_family_scores_and_generates_like_a_loop_over_tokens(family: str) -> None:
    built = models.build(config(family), VOCAB, seed=1).double()
    prompts = [[1, 2, 3, 4, 5], [6], [7, 8]]
    requests = [(prompt, [9, 10, 11]) for prompt in prompts]
    scores = loglikelihood.score(built, requests)
    assert [log_p for log_p, _ in scores] == pytest.approx([naive_score(built, *r)[0] for r in requests], abs=1e-4)
    assert generation.generate(built, prompts, 6) == [naive_generate(built, prompt, 6, set()) for prompt in prompts]
