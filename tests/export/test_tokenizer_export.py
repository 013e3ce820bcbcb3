"""Exported tokenizers, read by transformers: the ids of training for any text, those that spell special tokens too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stock_lm_eval import lm_eval_model
from tokenizers import AddedToken, decoders, pre_tokenizers, trainers
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models as rust_models

from suite import models
from suite.cells import Cell
from suite.data.corpus import Corpus, prepare
from suite.data.tokenizers import BPETokenizer, BytesTokenizer, ReadyTokenizer, SentencePieceTokenizer, Tokenizer
from suite.errors import UserError
from suite.export.export import export
from suite.export.tokenizer import EOT, write_tokenizer
from suite.models import registry

transformers = pytest.importorskip("transformers", reason="transformers, an extra, is not installed")
pytestmark = pytest.mark.usefixtures("isolated_transformers")
NAMES = ("Ada", "Bob", "Cy", "Di", "Ed", "Fay")
THINGS = ("old king", "new city", "red word", "big mind", "far tree", "own road")
LINES = [f"The {thing} of {name} </s> was born in {1900 + len(thing + name)}." for name in NAMES for thing in THINGS]
TEXTS = [
    "",
    "plain text",
    " two  spaces ",
    "line\nends\n\n",
    f"a{EOT}b",
    f"{EOT}",
    f"Say {EOT} twice {EOT}",
    "</s> and <s> and <unk> <pad>",
    "x</s>",
    "Zürich ☃ 日本\u00a0\u3000\t.",
    "\u2581 is a piece's space",
]


def sentencepiece_model(folder: Path, **options: Any) -> Path:
    library = pytest.importorskip("sentencepiece", reason="sentencepiece, an extra, is not installed")
    path = folder / "tokenizer.model"
    with path.open("wb") as file:
        library.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES), model_writer=file, minloglevel=2, hard_vocab_limit=False, **options
        )
    return path


def gpt2_like() -> ReadyTokenizer:
    """A byte-level BPE tokenizer whose end of text is a special token of its own, as GPT-2's."""
    trained = RustTokenizer(rust_models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    trained.train_from_iterator(LINES, trainer)
    trained.add_special_tokens([AddedToken(EOT, special=True)])
    return ReadyTokenizer(trained, EOT)


SENTENCEPIECE: dict[str, dict[str, Any]] = {
    "unigram": {"vocab_size": 60, "model_type": "unigram"},
    "bpe, bytes": {
        "vocab_size": 330,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
    },
    "no end of text": {"vocab_size": 60, "model_type": "unigram", "eos_id": -1, "bos_id": -1},
    "special pieces": {"vocab_size": 70, "model_type": "unigram", "eos_id": -1, "user_defined_symbols": [EOT]},
}


def build(kind: str, folder: Path) -> Tokenizer:
    if kind == "bytes":
        return BytesTokenizer()
    if kind == "bpe":
        return BPETokenizer.train(LINES, 320)
    if kind == "gpt2":
        return gpt2_like()
    return SentencePieceTokenizer(sentencepiece_model(folder, **SENTENCEPIECE[kind]).read_bytes())


def loaded(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize("kind", ["bytes", "bpe", "gpt2", *SENTENCEPIECE])
def test_transformers_gives_the_ids_of_training(kind: str, tmp_path: Path) -> None:
    ours = build(kind, tmp_path)
    target = tmp_path / "out"
    target.mkdir()
    write_tokenizer(ours, target, 64)
    first = loaded(target)
    first.save_pretrained(tmp_path / "again")
    for theirs in (first, loaded(tmp_path / "again")):
        assert theirs.eos_token_id == theirs.bos_token_id == theirs.pad_token_id == ours.eot_id
        assert len(theirs) == ours.vocab_size
        assert theirs.decode([ours.eot_id]) == theirs.eos_token
        for text in TEXTS:
            expected = ours.encode(text)
            assert ours.eot_id not in expected
            assert theirs.encode(text, add_special_tokens=False) == expected, text
            assert theirs(text).input_ids == [ours.eot_id, *expected], text
            assert theirs.decode(expected) == ours.decode(expected), text
            assert theirs.decode([ours.eot_id, *expected], skip_special_tokens=True) == ours.decode(expected), text
    batch = first(TEXTS, padding=True, return_tensors="pt")
    assert batch.input_ids.shape == batch.attention_mask.shape
    assert first.model_max_length == 64


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_lm_eval_scores_texts_that_spell_the_end_of_text_as_the_model_does(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    from suite.evaluate.adapter import Codec, SuiteLM

    corpus, model = text_corpus(kind, tmp_path)
    export(model, tmp_path / "out", corpus, 64)
    stock = lm_eval_model(tmp_path / "out")
    ours = SuiteLM(model, Codec(corpus.tokenizer), 64, 1024)
    pairs = [("Say", f" {EOT} twice."), (f"The{EOT}", " old king"), ("The </s>", " city </s>"), ("", "The word")]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    for pair, one, other in zip(pairs, ours.loglikelihood(requests), stock.loglikelihood(requests), strict=True):
        assert other[0] == pytest.approx(one[0], abs=1e-4), pair
        assert other[1] == one[1]


def text_corpus(kind: str, folder: Path) -> tuple[Corpus, models.Transformer]:
    """A corpus of LINES with such a tokenizer, and an untrained dense model for it."""
    (folder / "corpus.txt").write_text("\n\n".join(LINES * 20))
    tokenizer: dict[str, Any] = {"kind": "bpe", "vocab_size": 320}
    if kind in SENTENCEPIECE:
        tokenizer = {"kind": "file", "path": str(sentencepiece_model(folder, **SENTENCEPIECE[kind]))}
    cell = Cell.model_validate(
        {
            "model": {"family": "dense", "base": "w32"},
            "data": {"kind": "text", "path": str(folder / "corpus.txt"), "seq_len": 64, "tokenizer": tokenizer},
            "train": {"batch_rows": 1, "tokens": 1024, "lr": 1e-3},
        }
    )
    corpus = prepare(cell.data, folder / "cache")
    return corpus, models.build(cell.model, corpus.vocab_size, 0).eval()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float, tmp_path: Path) -> None:
    config = registry.family("dense").config(family="dense", base="w32")
    model = models.build(config, 50, 0)
    with torch.no_grad():
        model.layers[1].attention.wq.weight[3, 4] = value
    with pytest.raises(UserError, match=r"layers\.1\.attention\.wq\.weight") as error:
        export(model, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
