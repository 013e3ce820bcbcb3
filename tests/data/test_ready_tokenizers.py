"""Tokenizers from files: GPT-2's compared with published ids and a naive merge loop, and the other formats."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RustTokenizer

from suite.data import tokenizer_files, tokenizers
from suite.data.corpus import prepare
from suite.data.sources.bios import BiosData
from suite.data.sources.text_files import TextData
from suite.data.tokenizer_config import TokenizerConfig
from suite.errors import UserError
from suite.inference.loglikelihood import encode_pair

SHARED = Path(os.environ.get("SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
GPT2 = SHARED / "tokenizer"
needs_gpt2 = pytest.mark.skipif(
    not (GPT2 / "vocab.bpe").exists(), reason="no GPT-2 vocabulary: neither SHARED_DATA nor ../shared/data"
)
TEXTS = [f"The quick brown fox number {i} jumps over the lazy dog." for i in range(200)]


def trained(*special: AddedToken) -> RustTokenizer:
    tokenizer = RustTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def saved(tokenizer: RustTokenizer, folder: Path) -> Path:
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@needs_gpt2
def test_gpt2_gives_the_published_ids() -> None:
    gpt2 = tokenizer_files.read(GPT2)
    assert (gpt2.vocab_size, gpt2.eot_id) == (50257, 50256)
    # "Hello, my dog is cute" is the model card's and transformers' documented example.
    assert gpt2.encode("Hello, my dog is cute") == [15496, 11, 616, 3290, 318, 13779]
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode(" Hello world") == [18435, 995]
    assert 50256 not in gpt2.encode("the end<|endoftext|>")
    assert gpt2.decode(gpt2.encode("naïve 漢字 <|endoftext|>\n\n x")) == "naïve 漢字 <|endoftext|>\n\n x"
    assert gpt2.splits_at_spaces


@needs_gpt2
def test_gpt2_merges_equal_a_naive_loop_over_ranks() -> None:
    vocabulary = json.loads((GPT2 / "encoder.json").read_text())
    lines = (GPT2 / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    ranks = {tuple(line.split()): rank for rank, line in enumerate(lines) if line}
    gpt2 = tokenizer_files.read(GPT2 / "encoder.json")
    for word in ("hello", " antidisestablishmentarianism", " Memory", " 1984", "...", " zyzzyva", "aaaaaaaaab"):
        parts = list(word.replace(" ", "Ġ"))
        while pairs := [(ranks[pair], i) for i, pair in enumerate(itertools.pairwise(parts)) if pair in ranks]:
            _, i = min(pairs)
            parts[i : i + 2] = ["".join(parts[i : i + 2])]
        assert gpt2.encode(word) == [vocabulary[part] for part in parts], word


@needs_gpt2
def test_both_naming_schemes_of_gpt2_files_are_read(tmp_path: Path) -> None:
    shutil.copy(GPT2 / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(GPT2 / "vocab.bpe", tmp_path / "merges.txt")
    assert tokenizer_files.fingerprint(tmp_path) == tokenizer_files.fingerprint(GPT2)
    assert tokenizer_files.read(tmp_path).fingerprint == tokenizer_files.read(GPT2).fingerprint


@needs_gpt2
def test_a_text_is_prepared_with_gpt2_and_identified_by_content(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    ready = TokenizerConfig(kind="file", path=str(GPT2))
    config = TextData(kind="text", path=str(path), tokenizer=ready)
    corpus = prepare(config, tmp_path / "cache")
    assert corpus.vocab_size == 50257
    assert corpus.parts[0].rounds[0].tokens[0] == 50256
    shutil.copytree(GPT2, tmp_path / "elsewhere")
    moved = config.model_copy(update={"tokenizer": TokenizerConfig(kind="file", path=str(tmp_path / "elsewhere"))})
    assert prepare(moved, tmp_path / "cache").fingerprint == corpus.fingerprint
    named = TokenizerConfig(kind="file", path=str(GPT2), fingerprint="0" * 64)
    with pytest.raises(UserError, match=r"data\.tokenizer\.path: got .* allowed: the content 000000000000"):
        prepare(config.model_copy(update={"tokenizer": named}), tmp_path / "cache")


def test_a_tokenizer_json_is_used_unchanged_except_for_special_tokens(tmp_path: Path) -> None:
    library = trained(AddedToken("<|endoftext|>"), AddedToken("<|pad|>"))
    library.post_processor = processors.TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", library.token_to_id("<|pad|>"))]
    )
    library.enable_truncation(4)
    ours = tokenizer_files.read(saved(library, tmp_path))
    library.no_truncation()
    assert (ours.eot_id, ours.vocab_size) == (library.token_to_id("<|endoftext|>"), library.get_vocab_size())
    for text in TEXTS[:3]:
        assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids
        assert ours.decode(ours.encode(text)) == text
    spelt = "a <|endoftext|> b <|pad|>"
    assert not {ours.eot_id, library.token_to_id("<|pad|>")} & set(ours.encode(spelt))
    assert ours.decode(ours.encode(spelt)) == spelt
    assert ours.encode_batch([spelt, TEXTS[0]]) == [ours.encode(spelt), ours.encode(TEXTS[0])]
    again = tokenizers.from_json(ours.to_json())
    assert again.fingerprint == ours.fingerprint
    assert (again.encode(spelt), again.eot_id) == (ours.encode(spelt), ours.eot_id)


def test_the_end_of_text_is_named_recognised_or_added(tmp_path: Path) -> None:
    library = trained(AddedToken("<stop>"), AddedToken("</s>"))
    path = saved(library, tmp_path)
    assert tokenizer_files.read(path).eot_id == library.token_to_id("</s>")
    assert tokenizer_files.read(path, "<stop>").eot_id == library.token_to_id("<stop>")
    with pytest.raises(UserError, match=r"tokenizer\.json: data\.tokenizer\.eot: got '<end>', allowed: one of its"):
        tokenizer_files.read(path, "<end>")
    plain = trained()
    added = tokenizer_files.read(saved(plain, tmp_path))
    assert (added.eot_id, added.vocab_size) == (plain.get_vocab_size(), plain.get_vocab_size() + 1)
    assert added.decode([*added.encode("x y"), added.eot_id]) == "x y"


def test_an_end_of_text_that_is_an_ordinary_added_token_cannot_be_spelt(tmp_path: Path) -> None:
    library = trained()
    library.add_tokens([AddedToken("<stop>", special=False)])
    ours = tokenizer_files.read(saved(library, tmp_path), "<stop>")
    assert ours.eot_id not in ours.encode("a <stop> b")


def test_a_bpe_trained_for_one_corpus_serves_others(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    config = TextData(kind="text", path=str(path), tokenizer=TokenizerConfig(kind="bpe", vocab_size=400))
    corpus = prepare(config, tmp_path / "cache")
    ready = TokenizerConfig(kind="file", path=str(corpus.parts[0].folder / "tokenizer.json"))
    world = BiosData(kind="bios", people=20, tokenizer=ready, seq_len=128)
    assert prepare(world, tmp_path / "cache").tokenizer.fingerprint == corpus.tokenizer.fingerprint


BYTES = {f"<0x{number:02X}>": number + 2 for number in range(256)}


@pytest.mark.parametrize(
    ("model", "text", "lost"),
    [
        (models.WordLevel({"[UNK]": 0, "the": 1, "x": 2}, unk_token="[UNK]"), "the y x dog", ["dog", "y"]),
        (models.WordLevel({"[UNK]": 0, "x": 1, "y": 2}, unk_token="[UNK]"), "x yx", ["yx"]),
        (models.Unigram([("<unk>", 0.0), ("a", -1.0), ("é", -2.0)], unk_id=0), "aé 漢字", ["漢字"]),
        (models.BPE({"a": 0, "b": 1}, []), "ab漢b\u200b\n", ["漢"]),
        (models.BPE({"a": 0, "b": 1}, []), "abba", []),
        (models.BPE({"<unk>": 0, "a": 1} | BYTES, [], unk_token="<unk>", byte_fallback=True), "a漢", []),
    ],
)
def test_words_and_characters_that_are_lost_are_found(
    model: models.Model, text: str, lost: list[str], tmp_path: Path
) -> None:
    library = RustTokenizer(model)
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    read = tokenizer_files.read(saved(library, tmp_path))
    assert tokenizers.lost_parts(read, [text]) == lost


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that treats spaces like Llama's."""
    library = pytest.importorskip("sentencepiece", reason="the sentencepiece extra is not installed")
    path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    with open(path, "wb") as file:
        library.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS),
            model_writer=file,
            vocab_size=120,
            model_type="bpe",
            minloglevel=2,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
        )
    return path


def test_a_sentencepiece_model_encodes_like_its_library(spm: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    library = SentencePieceProcessor(model_file=str(spm))
    ours = tokenizer_files.read(spm.parent)
    assert (ours.vocab_size, ours.eot_id) == (120, library.eos_id())
    for text in TEXTS[:3]:
        assert ours.encode(text) == library.encode(text)
        assert ours.decode(ours.encode(text)) == text
    assert ours.encode_batch(TEXTS[:2]) == [ours.encode(text) for text in TEXTS[:2]]
    assert ours.eot_id not in ours.encode("lazy</s> dog")
    again = tokenizers.from_json(ours.to_json())
    assert (again.fingerprint, again.encode(TEXTS[5])) == (ours.fingerprint, ours.encode(TEXTS[5]))


def test_a_continuation_is_split_from_the_whole_if_parts_encode_differently(spm: Path) -> None:
    ours = tokenizer_files.read(spm)
    assert not ours.splits_at_spaces
    context, continuation = encode_pair(ours, "The quick brown", " fox number 3")
    assert context + continuation == [ours.eot_id, *ours.encode("The quick brown fox number 3")]
    assert ours.decode(continuation) == "fox number 3"


def test_files_without_a_tokenizer_are_refused_in_one_line(tmp_path: Path) -> None:
    for path, complaint in (
        (tmp_path / "none.json", r"data\.tokenizer\.path: got '.*none\.json', allowed: a tokenizer\.json, a vocab"),
        (tmp_path, r"data\.tokenizer\.path: got '.*', allowed: a tokenizer\.json"),
    ):
        with pytest.raises(UserError, match=complaint):
            tokenizer_files.read(path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match=r"vocab\.json' without merges\.txt"):
        tokenizer_files.read(tmp_path)
    for name, content in (("tokenizer.json", b'{"model": 3}'), ("broken.json", b"{"), ("some.model", b"nothing")):
        (tmp_path / name).write_bytes(content)
        if name == "some.model":
            pytest.importorskip("sentencepiece")
        with pytest.raises(UserError, match=rf"{name}: not a readable tokenizer \(") as raised:
            tokenizer_files.read(tmp_path / name)
        assert "\n" not in str(raised.value)


def test_bpe_dropout_is_off(tmp_path: Path) -> None:
    path = saved(trained(), tmp_path)
    content = json.loads(path.read_text())
    plain = tokenizer_files.read(path)
    content["model"]["dropout"] = 0.5
    path.write_text(json.dumps(content))
    dropping = tokenizer_files.read(path)
    assert [dropping.encode(TEXTS[0]) for _ in range(5)] == [plain.encode(TEXTS[0])] * 5


def test_tokens_across_spaces_are_detected(tmp_path: Path) -> None:
    tokenizer = trained()
    assert tokenizer_files.read(saved(tokenizer, tmp_path)).splits_at_spaces
    across = RustTokenizer(models.BPE())
    across.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    across.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    across.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    assert not tokenizer_files.read(saved(across, tmp_path)).splits_at_spaces


def test_what_a_sentencepiece_model_does_not_know_is_found(spm: Path) -> None:
    ours = tokenizer_files.read(spm)
    assert tokenizers.lost_parts(ours, TEXTS) == []
    assert tokenizers.lost_parts(ours, [*TEXTS, "The 漢字 fox"]) == ["漢字"]
