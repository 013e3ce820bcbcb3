"""Tokenizers: words (for `bios`), byte-level BPE trained on the corpus, bytes, and ready-made ones.

Every tokenizer has an end-of-text token, with which documents start and to which no text encodes. BPE and bytes are
lossless for any text. Words are for the closed vocabulary of a synthetic world, and lossless for its text.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from suite.errors import UserError

_WORD = re.compile(r"\n|[.?]|[^\s.?]+")  # a line end, a full stop and a question mark are tokens
_CLOSING = {".", "?", "\n"}
_LONG_WORD = 1000  # characters; training merges takes time quadratic in a word's length
_RAW_INNER_SPACE = re.compile("[^Ġ▁][Ġ▁ ]")
"""A token with a space inside, as byte-level BPE (Ġ), SentencePiece (▁) and other vocabularies write it."""
_ASCII, _LAST_BYTES = range(0x21, 0x7F), range(0x100, 0x140)
_TWO_BYTES, _THREE_BYTES = range(0xBF, 0x800, 0x40), (0x800, *range(0x1000, 0x10000, 0x1000))
_FOUR_BYTES = (0x10000, *range(0x40000, 0x110000, 0x40000))
_EVERY_BYTE = [chr(code) for code in (*_ASCII, *_LAST_BYTES, *_TWO_BYTES, *_THREE_BYTES, *_FOUR_BYTES)]
"""Characters whose UTF-8 has every byte that printed text can have, many of them in no vocabulary of characters."""


class Tokenizer(Protocol):
    """The interface of every tokenizer. `eot_id` is the end-of-text token.

    `splits_at_spaces`: encode(prompt) + encode(answer) == encode(prompt + answer) if the answer starts with a single
    space. `unknown_id`: the token of whatever the vocabulary lacks, None if there is none. `loses_text`: some text is
    left out or becomes the unknown token; the others encode any text or raise UserError.
    """

    kind: str
    vocab_size: int
    eot_id: int
    unknown_id: int | None
    splits_at_spaces: bool
    loses_text: bool

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text; never contains eot_id."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of the tokens; eot_id is left out."""

    def to_json(self) -> str:
        """Return everything that `from_json` needs."""

    @property
    def fingerprint(self) -> str:
        """sha256 of to_json()."""


class _Fingerprinted:
    unknown_id: int | None = None
    splits_at_spaces = True
    loses_text = False

    def to_json(self) -> str:
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """sha256 of to_json()."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


class WordTokenizer(_Fingerprinted):
    """A closed vocabulary of words; a word outside it is a UserError. Token 0 is the end of text."""

    kind = "word"
    eot_id = 0

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(words)
        self._ids = {word: index for index, word in enumerate(self.words, start=1)}
        self.vocab_size = len(self.words) + 1

    @classmethod
    def of(cls, texts: Iterable[str]) -> WordTokenizer:
        """Return the vocabulary of the texts, sorted."""
        return cls(sorted({word for text in texts for word in _WORD.findall(text)}))

    def encode(self, text: str) -> list[int]:
        """Return the ids of words, '.', '?' and line ends; other white space only separates."""
        try:
            return [self._ids[word] for word in _WORD.findall(text)]
        except KeyError as unknown:
            raise UserError(
                f"data.tokenizer.kind: got 'word' and the word {unknown.args[0]!r}, which is not among the"
                f" {len(self.words)} words of this world; allowed for any text: bpe, bytes"
            ) from None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text."""
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the words joined by single spaces, except before '.' and '?' and around a line end."""
        text = ""
        for token in tokens:
            if token == self.eot_id:
                continue
            word = self.words[token - 1]
            text += word if not text or text.endswith("\n") or word in _CLOSING else f" {word}"
        return text

    def to_json(self) -> str:
        """Return the word list."""
        return json.dumps({"kind": self.kind, "words": self.words}, ensure_ascii=False)


class BytesTokenizer(_Fingerprinted):
    """UTF-8 bytes 0-255; 256 is the end of text."""

    kind = "bytes"
    eot_id = 256
    vocab_size = 257

    def encode(self, text: str) -> list[int]:
        """Return the bytes of the text."""
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text."""
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of the bytes; invalid UTF-8, which a model may generate, becomes U+FFFD."""
        return bytes(token for token in tokens if token != self.eot_id).decode(errors="replace")

    def to_json(self) -> str:
        """Return its kind."""
        return json.dumps({"kind": self.kind})


class BPETokenizer(_Fingerprinted):
    """Byte-level BPE (GPT-2's pre-tokenizer); the end of text is the last token, to which no text encodes."""

    kind = "bpe"

    def __init__(self, trained: RustTokenizer) -> None:
        self._trained = trained
        self.eot_id: int = trained.get_vocab_size()
        self.vocab_size = self.eot_id + 1

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> BPETokenizer:
        """Train at most `vocab_size` tokens, 256 bytes and the end of text included; fewer for a tiny corpus."""
        trained = RustTokenizer(models.BPE())
        trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trained.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        trained.train_from_iterator((piece for text in texts for piece in _bounded_words(text)), trainer)
        return cls(trained)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of the text."""
        return list(self._trained.encode(text).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text, in parallel if the library can."""
        return [encoding.ids for encoding in self._trained.encode_batch_fast(list(texts))]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of the tokens."""
        return str(self._trained.decode([token for token in tokens if token != self.eot_id]))

    def to_json(self) -> str:
        """Return the `tokenizers` library's own format, together with this tokenizer's kind."""
        return json.dumps({"kind": self.kind, "trained": json.loads(self._trained.to_str())}, ensure_ascii=False)


class ReadyTokenizer(_Fingerprinted):
    """A tokenizer of the `tokenizers` library, unchanged except that no text encodes to its special tokens.

    `eot` names its end of text; None: it has none and gets one more token. Raises UserError if `eot` is not one of its
    tokens.
    """

    kind = "ready"

    def __init__(self, trained: RustTokenizer, eot: str | None) -> None:
        trained.encode_special_tokens = True  # a text that spells a special token out is text
        self._trained, self._eot = trained, eot
        vocabulary = trained.get_vocab(with_added_tokens=True)
        if eot is not None and eot not in vocabulary:
            raise UserError(f"data.tokenizer.eot: got {eot!r}, allowed: one of its {len(vocabulary)} tokens")
        above = max(vocabulary.values()) + 1
        self.eot_id: int = above if eot is None else vocabulary[eot]
        self.vocab_size: int = above + (eot is None)
        self.unknown_id = self._unknown_id()
        self.splits_at_spaces = not self._has_tokens_across_spaces() and _splits_at_spaces(self)
        self.loses_text = _loses_text(self)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of the text, without added special tokens."""
        return list(self._trained.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text, in parallel if the library can."""
        encodings = self._trained.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of the tokens."""
        text_tokens = [token for token in tokens if token != self.eot_id]
        return str(self._trained.decode(text_tokens, skip_special_tokens=False))

    def _unknown_id(self) -> int | None:
        """Return the id that the library gives to what the vocabulary lacks."""
        model = self._trained.model
        if isinstance(model, models.Unigram):  # its unk_id is in the JSON only
            number: int | None = json.loads(self._trained.to_str())["model"]["unk_id"]
            return number
        name = getattr(model, "unk_token", None)
        return None if name is None else self._trained.token_to_id(name)

    def _has_tokens_across_spaces(self) -> bool:
        """Return whether some token contains a space after another character, so that it may span two words."""
        candidates = [token for text, token in self._trained.get_vocab().items() if _RAW_INNER_SPACE.search(text)]
        return any(re.search(r"\S ", self.decode([token])) for token in candidates)

    def to_json(self) -> str:
        """Return the `tokenizers` library's own format, together with the kind and the end-of-text token."""
        trained = json.loads(self._trained.to_str())
        return json.dumps({"kind": self.kind, "eot": self._eot, "trained": trained}, ensure_ascii=False)


class SentencePieceTokenizer(_Fingerprinted):
    """A SentencePiece model, read by its own library (the `sentencepiece` extra).

    `model`: the .model file's bytes. The end of text is `eot`, else the model's own; a model without one gets one
    more token. Raises UserError if `eot` is not one of its pieces, or the library is not installed.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes, eot: str | None = None) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError:
            raise UserError(
                "data.tokenizer.path: got a SentencePiece model, which needs the sentencepiece package, allowed:"
                " pip install 'next-parameter[sentencepiece]', or a tokenizer.json"
            ) from None
        self._model, self._eot = model, eot
        self._pieces = SentencePieceProcessor(model_proto=model)
        entries = self._pieces.get_piece_size()
        if eot is not None and self._pieces.id_to_piece(self._pieces.piece_to_id(eot)) != eot:
            raise UserError(f"data.tokenizer.eot: got {eot!r}, allowed: one of its {entries} pieces")
        own = self._pieces.eos_id() if eot is None else self._pieces.piece_to_id(eot)
        self.eot_id: int = own if own >= 0 else entries
        self.vocab_size: int = entries + (own < 0)
        self.unknown_id = self._pieces.unk_id()
        self.splits_at_spaces = _splits_at_spaces(self)
        self.loses_text = _loses_text(self)

    def encode(self, text: str) -> list[int]:
        """Return the pieces of the text, without added special tokens."""
        return list(self._pieces.encode(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text."""
        return [list(tokens) for tokens in self._pieces.encode(list(texts))]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of the tokens."""
        return str(self._pieces.decode([token for token in tokens if token != self.eot_id]))

    def to_json(self) -> str:
        """Return the model's bytes in base64, and its end of text."""
        model = base64.b64encode(self._model).decode()
        return json.dumps({"kind": self.kind, "eot": self._eot, "model": model})


def lost_parts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    """Return what is lost when texts are encoded, sorted: characters without a token, and words that are unknown.

    Bits per byte of such a text would not count them. White space and characters that print nothing are left out.
    """
    if not tokenizer.loses_text:
        return []
    printed = sorted({character for character in set().union(*texts) if character.isprintable()} - {" "})
    lost = {character for character, tokens in zip(printed, tokenizer.encode_batch(printed), strict=True) if not tokens}
    unknown = tokenizer.unknown_id
    if unknown is not None:
        for text, tokens in zip(texts, tokenizer.encode_batch(texts), strict=True):
            if unknown in tokens:
                words = text.split()
                encoded = zip(words, tokenizer.encode_batch(words), strict=True)
                lost |= {word for word, parts in encoded if unknown in parts} or {text}
    return sorted(lost)


def _bounded_words(text: str) -> list[str]:
    """Return a text, split within words of more than _LONG_WORD characters."""
    return re.sub(rf"(\S{{{_LONG_WORD}}})(?=\S)", "\\1\0", text).split("\0")


def _loses_text(tokenizer: Tokenizer) -> bool:
    """Return whether some byte of UTF-8 has no token, so that a character may be lost."""
    return any(not ids or tokenizer.unknown_id in ids for ids in tokenizer.encode_batch(_EVERY_BYTE))


def _splits_at_spaces(tokenizer: Tokenizer) -> bool:
    """Return whether the parts of a few texts, split before a space, encode to the same tokens as the whole.

    With SentencePiece they do not, since it puts a space before every text.
    """
    pairs = (("Question: Who?\nAnswer:", " Ada"), ("The year", " 1984."), ("a, b and", " c"), ("", " x"))
    return all(tokenizer.encode(a) + tokenizer.encode(b) == tokenizer.encode(a + b) for a, b in pairs)


def from_json(text: str) -> Tokenizer:
    """Return the tokenizer whose to_json() gave the text."""
    content = json.loads(text)
    if content["kind"] == "word":
        return WordTokenizer(content["words"])
    if content["kind"] == "bytes":
        return BytesTokenizer()
    if content["kind"] == "sentencepiece":
        return SentencePieceTokenizer(base64.b64decode(content["model"]), content["eot"])
    if content["kind"] == "ready":
        return ReadyTokenizer(RustTokenizer.from_str(json.dumps(content["trained"])), content["eot"])
    return BPETokenizer(RustTokenizer.from_str(json.dumps(content["trained"])))


def load(path: Path) -> Tokenizer:
    """Return the tokenizer saved in a file."""
    return from_json(path.read_text(encoding="utf-8"))
