"""Tokenizers are lossless, load unchanged, and have an end of text to which no text encodes."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from suite.data import tokenizers
from suite.data.bios.text import ROUNDS
from suite.data.bios.world import World
from suite.data.tokenizers import BPETokenizer, BytesTokenizer, WordTokenizer
from suite.errors import UserError

TEXTS = ["The quick brown fox. The quick dog!", "Zwölf Boxkämpfer jagen\n\nViktor — über 2,000 Meter."] * 20
BPE = BPETokenizer.train(TEXTS, 300)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(ANY_TEXT)
def test_bpe_and_bytes_are_lossless_for_any_text(text: str) -> None:
    for tokenizer in (BPE, BytesTokenizer()):
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        assert all(0 <= token < tokenizer.vocab_size for token in tokens)
        assert tokenizer.eot_id not in tokens
        assert tokenizer.decode([tokenizer.eot_id, *tokens, tokenizer.eot_id]) == text


def test_bytes_are_utf8() -> None:
    assert BytesTokenizer().encode("é\n") == [0xC3, 0xA9, 0x0A]
    assert BytesTokenizer().vocab_size == 257


def test_bpe_has_at_most_the_requested_entries_and_compresses() -> None:
    assert BPE.vocab_size == 300
    assert BPETokenizer.train(["ab"], 5000).vocab_size < 300
    assert len(BPE.encode(TEXTS[0])) < len(TEXTS[0]) / 2


def test_bpe_training_and_batches_are_deterministic() -> None:
    assert BPETokenizer.train(iter(TEXTS), 300).fingerprint == BPE.fingerprint
    assert BPE.encode_batch(TEXTS[:2]) == [BPE.encode(text) for text in TEXTS[:2]]


def test_words_are_lossless_for_a_world_and_worlds_of_one_size_share_a_vocabulary() -> None:
    worlds = [World(100, seed, questions=0.3) for seed in (0, 1)]
    first, second = (WordTokenizer.of(world.vocabulary_texts()) for world in worlds)
    assert first.fingerprint == second.fingerprint
    for world in worlds:
        for index in range(ROUNDS):
            for text in world.documents(index):
                assert first.decode(first.encode(text)) == text
        for probe in world.probes("extraction") + world.probes("paraphrase"):
            assert first.decode(first.encode(probe.prompt + probe.answer)) == probe.prompt + probe.answer


def test_words_end_at_full_stops_question_marks_and_lines() -> None:
    words = WordTokenizer.of(["Question: Who?\nAnswer: Ada Ann."])
    assert words.words == ("\n", ".", "?", "Ada", "Ann", "Answer:", "Question:", "Who")
    assert words.encode("Who?\nAnn  Ada.") == [8, 3, 1, 5, 4, 2]


def test_an_unknown_word_is_named() -> None:
    with pytest.raises(UserError, match=r"the word 'Zeno'.*allowed for any text: bpe, bytes"):
        WordTokenizer.of(["Ada Ann."]).encode("Ada Zeno.")


@pytest.mark.parametrize("tokenizer", [BPE, BytesTokenizer(), WordTokenizer.of(TEXTS)])
def test_a_saved_tokenizer_loads_unchanged(tokenizer: tokenizers.Tokenizer) -> None:
    again = tokenizers.from_json(tokenizer.to_json())
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.kind, again.vocab_size, again.eot_id) == (
        tokenizer.kind,
        tokenizer.vocab_size,
        tokenizer.eot_id,
    )
    assert again.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])


def test_a_bpe_is_trained_on_text_without_spaces_in_bounded_time() -> None:
    text = "".join(chr(0x4E00 + (i * i + 7 * i) % 500) for i in range(60_000))
    started = time.process_time()
    tokenizer = BPETokenizer.train([text], 1000)
    assert time.process_time() - started < 20
    assert tokenizer.decode(tokenizer.encode(text[:5000])) == text[:5000]
    words = ["a few ordinary words " * 5] * 10
    assert BPETokenizer.train(words, 290).to_json() == BPETokenizer.train([" ".join(words)], 290).to_json()
