"""Batched log-probabilities compared with a loop of one forward pass per token."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_scoring import VOCAB, naive_generate, naive_score

from suite import models
from suite.data import tokenizer_files
from suite.data.tokenizers import BPETokenizer, BytesTokenizer, Tokenizer
from suite.inference import loglikelihood
from suite.models.registry import ModelConfig
from suite.models.transformer import Transformer
from suite.plan.live_bytes import LiveBytes

tokens = st.integers(0, VOCAB - 1)
requests = st.lists(st.tuples(st.lists(tokens, min_size=1, max_size=9), st.lists(tokens, max_size=5)), max_size=8)


@settings(max_examples=25, deadline=None)
@given(requests, st.sampled_from([1, 12, 1000]))
def test_scores_equal_a_loop_over_tokens(model: Transformer, pairs: list, budget: int) -> None:
    scores = loglikelihood.score(model, pairs, budget)
    expected = [naive_score(model, *request) for request in pairs]
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]
    assert [log_p for log_p, _ in scores] == pytest.approx([log_p for log_p, _ in expected], abs=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(tokens, min_size=1, max_size=9), st.lists(st.lists(tokens, max_size=4), max_size=4)),
        max_size=4,
    ),
    st.sampled_from([1, 12, 40, 1000]),
)
def test_shared_contexts_do_not_change_scores(model: Transformer, families: list, budget: int) -> None:
    pairs = [(context, continuation) for context, continuations in families for continuation in continuations]
    scores = loglikelihood.score(model, pairs, budget)
    expected = [naive_score(model, *request) for request in pairs]
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]
    assert [log_p for log_p, _ in scores] == pytest.approx([log_p for log_p, _ in expected], abs=1e-4)


def test_a_long_context_is_read_once_for_all_its_continuations(model: Transformer) -> None:
    context = [n % VOCAB for n in range(50)]
    read = []
    hook = model.embedding.register_forward_hook(lambda _m, args, _out: read.append(args[0].numel()))
    scores = loglikelihood.score(model, [(context, [first, 2, 3]) for first in range(10)])
    hook.remove()
    assert sum(read) == 50 + 10 * 2
    assert scores[4][0] == pytest.approx(naive_score(model, context, [4, 2, 3])[0], abs=1e-4)


def test_logits_of_a_large_vocabulary_never_exist_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loglikelihood, "LOGITS_AT_ONCE", 1 << 18)
    vocabulary, positions = 20_000, 400
    model = models.build(ModelConfig(family="dense", base="w16"), vocabulary, seed=0)
    with LiveBytes() as live:
        loglikelihood.score(model, [(range(20), range(row, row + 40)) for row in range(positions // 40)])
    assert live.peak < 4 * vocabulary * positions / 3


def test_requests_with_a_common_beginning_share_rows(model: Transformer) -> None:
    choices = [([5, 6, 7], [choice]) for choice in range(4)]
    longer = [([5, 6, 7], [8, 9]), ([5], [6])]
    rows_seen = []
    hook = model.embedding.register_forward_hook(lambda _m, args, _out: rows_seen.append(tuple(args[0].shape)))
    loglikelihood.score(model, choices + longer)
    hook.remove()
    assert rows_seen == [(1, 4)]


def test_greedy_continuations_are_recognised(model: Transformer) -> None:
    continuation = naive_generate(model, [1, 2, 3], 4, set())
    wrong = [*continuation[:-1], (continuation[-1] + 1) % VOCAB]
    assert [g for _, g in loglikelihood.score(model, [([1, 2, 3], continuation), ([1, 2, 3], wrong)])] == [
        True,
        False,
    ]


def test_scores_do_not_depend_on_the_chunks_of_the_output_head(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [([1, 2], [3, 4, 5]), ([7], [8, 9])]
    whole = loglikelihood.score(model, pairs)
    monkeypatch.setattr(loglikelihood, "LOGITS_AT_ONCE", VOCAB * 2)
    assert [log_p for log_p, _ in loglikelihood.score(model, pairs)] == pytest.approx([log_p for log_p, _ in whole])


def test_an_empty_context_is_refused(model: Transformer) -> None:
    with pytest.raises(ValueError, match="end-of-text"):
        loglikelihood.score(model, [([], [1])])


@pytest.mark.parametrize("training", [True, False])
def test_scoring_restores_the_mode(model: Transformer, training: bool) -> None:
    model.train(training)
    loglikelihood.score(model, [([1], [2])])
    assert model.training is training


@settings(max_examples=40, deadline=None)
@given(st.lists(tokens, min_size=1, max_size=12), st.lists(tokens, min_size=1, max_size=20), st.integers(2, 15))
def test_windows_predict_every_token_once_and_fit(context: list[int], continuation: list[int], room: int) -> None:
    parts = loglikelihood.windows(context, continuation, room)
    assert [token for _, part in parts for token in part] == continuation
    whole, read = [*context, *continuation], len(context)
    for part_context, part in parts:
        assert part_context
        assert len(part_context) + len(part) - 1 <= room
        assert part_context == whole[read - len(part_context) : read]
        read += len(part)
    if len(context) + len(continuation) - 1 <= room:
        assert parts == [(context, continuation)]


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab .\n?é", max_size=12), st.text(alphabet="ab .\n", min_size=1, max_size=8), st.booleans())
def test_a_pair_is_the_whole_text_split_after_the_context(text: str, continuation: str, use_bytes: bool) -> None:
    tokenizer: Tokenizer = BytesTokenizer() if use_bytes else trained_bpe()
    context_ids, continuation_ids = loglikelihood.encode_pair(tokenizer, text, continuation)
    assert context_ids[0] == tokenizer.eot_id
    assert continuation_ids
    whole, head = tokenizer.encode(text + continuation), tokenizer.encode(text.rstrip(" "))
    assert context_ids[1:] + continuation_ids == whole
    if whole[: len(head)] == head and len(whole) > len(head):
        assert context_ids[1:] == head
    else:
        assert head[: len(context_ids) - 1] == context_ids[1:], "a token crosses the boundary and is scored"


@functools.cache
def trained_bpe() -> Tokenizer:
    """Return a BPE with merges across all characters of these tests."""
    return BPETokenizer.train(["a b ab. a\n ba bb\n\nab? é é b  a   b", "ab ab . \n a"] * 20, 300)


def test_continuations_are_not_empty_with_tokens_across_spaces(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    trained = RustTokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    pairs = [("Question: what is it?\nAnswer:", answer) for answer in (" a cat", " a", " the end of the day")]
    texts = [context + answer for context, answer in pairs] * 50
    trained.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    trained.save(str(tmp_path / "tokenizer.json"))
    tokenizer = tokenizer_files.read(tmp_path / "tokenizer.json")
    assert any(len(tokenizer.encode(a + b)) <= len(tokenizer.encode(a)) for a, b in pairs), (
        "without the split, the continuation would be empty"
    )
    for context, continuation in pairs:
        head, tail = loglikelihood.encode_pair(tokenizer, context, continuation)
        assert tail
        assert head[0] == tokenizer.eot_id
        assert tokenizer.decode(head[1:] + tail) == context + continuation
        assert tokenizer.decode(tail).endswith(continuation.strip())
