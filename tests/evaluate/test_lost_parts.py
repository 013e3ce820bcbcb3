"""Texts that a tokenizer cannot encode are not scored, whatever the task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from invented_rows import LAMBADA, TASKS, write_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from suite.cells import EvalConfig
from suite.data.corpus import Corpus, prepare
from suite.data.sources.text_files import TextData
from suite.data.tokenizer_config import TokenizerConfig
from suite.errors import UserError
from suite.evaluate.harness import Harness

ALPHABET = [chr(code) for code in range(0x20, 0x7F)] + ["\n"]
BYTES = [f"<0x{number:02X}>" for number in range(256)]


def numbered(*tokens: str) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


def bpe(*tokens: str, **options: bool) -> Tokenizer:
    return Tokenizer(models.BPE(numbered("<unk>", *tokens), [], unk_token="<unk>", **options))


def corpus_of(library: Tokenizer, folder: Path) -> Corpus:
    library.save(str(folder / "tokenizer.json"))
    text = "".join(json.dumps({"text": f"The cat {number}"}) + "\n" for number in range(40))
    (folder / "corpus.jsonl").write_text(text)
    tokenizer = TokenizerConfig(kind="file", path=str(folder / "tokenizer.json"))
    config = TextData(kind="text", path=str(folder / "corpus.jsonl"), seq_len=256, held_out=0.3, tokenizer=tokenizer)
    return prepare(config, folder / "cache")


def write_questions(root: Path) -> Path:
    """Add questions with answers, for the tasks that generate and those that compare answers."""
    path = write_rows(root) / "google-research-datasets/nq_open/nq_open/validation.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"question": "who saw the owl", "answer": ["Ada"]}) + "\n")
    return root


@pytest.mark.parametrize("task", [*TASKS, "nq_open_qa", "nq_open_nll", "held_out"])
def test_every_kind_of_request_is_checked(task: str, tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel(numbered("[UNK]", "The", "cat"), unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    corpus = corpus_of(words, tmp_path)
    expected = (
        rf"task {task}: data\.tokenizer\.path: got '{tmp_path}/tokenizer\.json', which has no token for '\S+' and"
    )
    with pytest.raises(UserError, match=expected) as raised:
        Harness(corpus, EvalConfig(tasks=(task,)), write_questions(tmp_path / "data"))
    assert "\n" not in str(raised.value)


def test_a_vocabulary_without_bytes_scores_what_it_can_encode(tmp_path: Path) -> None:
    corpus, root = corpus_of(bpe(*ALPHABET), tmp_path), write_questions(tmp_path / "data")
    config = EvalConfig(tasks=(*TASKS, "nq_open_qa", "nq_open_nll", "held_out"))
    Harness(corpus, config, root)
    path = root / LAMBADA / "default/test.jsonl"
    path.write_text(path.read_text() + json.dumps({"text": "Ada wrote 漢 and ½, then 漢"}) + "\n")
    with pytest.raises(
        UserError, match=r"task lambada_openai: .* has no token for '½,' and 1 other words or characters"
    ):
        Harness(corpus, config, root)
    Harness(corpus, EvalConfig(tasks=("lambada_openai",), limit=8), root)


@pytest.mark.parametrize("kind", ["bytes of characters", "bytes of what the vocabulary lacks"])
def test_a_vocabulary_of_bytes_scores_any_text(kind: str, tmp_path: Path) -> None:
    if kind == "bytes of characters":
        library = bpe(*sorted(pre_tokenizers.ByteLevel.alphabet()))
        library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        library = bpe(*ALPHABET, *BYTES, byte_fallback=True)
        library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    corpus, root = corpus_of(library, tmp_path), write_rows(tmp_path / "data")
    assert not corpus.tokenizer.loses_text
    (root / LAMBADA / "default/test.jsonl").write_text(json.dumps({"text": "漢 and ½ and \U0001f600 \ue000"}) + "\n")
    harness = Harness(corpus, EvalConfig(tasks=TASKS), root)
    (request,) = harness._prepared.loaded.tasks["lambada_openai"].instances
    assert corpus.tokenizer.decode(corpus.tokenizer.encode("".join(request.args))).endswith(" \ue000")
