"""Ready-made tokenizers: tokenizer.json, GPT-2's vocabulary and merges, and SentencePiece models."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers

from suite.data import tokenizers
from suite.data.tokenizers import ReadyTokenizer, SentencePieceTokenizer, Tokenizer
from suite.errors import UserError

MERGES = {"vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}
"""GPT-2's vocabulary and the file of merges next to it, as named by transformers and by the release."""
_IN_FOLDERS = ("tokenizer.json", *MERGES, "tokenizer.model")
_ALLOWED = (
    "a tokenizer.json, a vocab.json with merges.txt or an encoder.json with vocab.bpe next to it, a SentencePiece"
    " .model, or a folder with one of these"
)
_EOT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")


def files(path: Path) -> list[Path]:
    """Return the tokenizer's file, and the merges that belong to it. Raises UserError for a path that holds none."""
    if os.path.isdir(path):  # unlike Path.is_dir, false for a text that is too long for a path
        path = next((path / name for name in _IN_FOLDERS if os.path.isfile(path / name)), path)
    if not os.path.isfile(path) or path.suffix not in (".json", ".model"):
        raise UserError(f"data.tokenizer.path: got {str(path)!r}, allowed: {_ALLOWED}")
    if path.name not in MERGES:
        return [path]
    merges = path.with_name(MERGES[path.name])
    if not merges.is_file():
        raise UserError(f"data.tokenizer.path: got {str(path)!r} without {merges.name} next to it, allowed: {_ALLOWED}")
    return [path, merges]


def fingerprint(path: Path) -> str:
    """Return the sha256 of the content, not of the path. Raises UserError for a path that holds no tokenizer."""
    digest = hashlib.sha256()
    for file in files(path):
        digest.update(hashlib.sha256(_bytes(file)).digest())
    return digest.hexdigest()


def read(path: Path, eot: str | None = None) -> Tokenizer:
    """Return the tokenizer in a file or folder.

    `eot` is the token that ends a text; None: the usual one of the format. A vocabulary without one gets one more
    token. Raises UserError if the file cannot be read or `eot` is not one of its tokens.
    """
    file, *merges = files(path)
    try:
        if file.suffix == ".model":
            return SentencePieceTokenizer(_bytes(file), eot)
        if merges:
            return _gpt2(file, merges[0], eot)
        content = json.loads(_bytes(file))
        if "kind" in content:  # of a prepared corpus of ours
            return tokenizers.from_json(json.dumps(content))
        return ReadyTokenizer(RustTokenizer.from_str(_as_trained(content, eot)), _eot_of(content, eot))
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except Exception as error:  # the Rust and C++ libraries raise bare Exception and RuntimeError
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{file}: not a readable tokenizer ({cause}), allowed: {_ALLOWED}") from None


def name_of_token(path: Path, token: int) -> str | None:
    """Return the name of a token in the tokenizer of a path; None if it has no such token. Raises UserError."""
    file, *merges = files(path)
    if file.suffix == ".model":
        from sentencepiece import SentencePieceProcessor  # an extra, which `read` requires

        pieces = SentencePieceProcessor(model_proto=_bytes(file))
        return str(pieces.id_to_piece(token)) if token < pieces.get_piece_size() else None
    if merges:
        names = {number: name for name, number in json.loads(_bytes(file)).items()}
        return names.get(token)
    name: str | None = RustTokenizer.from_file(str(file)).id_to_token(token)
    return name


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None


def _gpt2(vocabulary: Path, merges: Path, eot: str | None) -> Tokenizer:
    """Byte-level BPE as GPT-2's: merges never produce its end of text, so no text encodes to it."""
    trained = RustTokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    tokens = trained.get_vocab()
    return ReadyTokenizer(trained, eot or next((name for name in _EOT_NAMES if name in tokens), None))


def _eot_of(content: dict[str, object], eot: str | None) -> str | None:
    """Return the end-of-text token's name: `eot`, else a usual one among the added tokens."""
    added = content.get("added_tokens") or []
    assert isinstance(added, list)
    names = {token["content"] for token in added}
    return eot or next((name for name in _EOT_NAMES if name in names), None)


def _as_trained(content: dict[str, object], eot: str | None) -> str:
    """Return the tokenizer's JSON with three changes.

    The end-of-text token is marked special, so that a text which spells it does not encode to it; nothing is truncated
    or padded; and BPE dropout is off, so that a text always encodes to the same tokens.
    """
    end = _eot_of(content, eot)
    added = content.get("added_tokens") or []
    model = content.get("model")
    assert isinstance(added, list)
    marked = [{**token, "special": True} if token["content"] == end else token for token in added]
    without_dropout = {**model, "dropout": None} if isinstance(model, dict) and "dropout" in model else model
    changes = {"added_tokens": marked, "model": without_dropout, "truncation": None, "padding": None}
    return json.dumps({**content, **changes})
