"""The project's tokenizers as files that transformers loads: the same ids for every text."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as RustTokenizer

from suite.data.tokenizers import SentencePieceTokenizer, Tokenizer

EOT = "<|endoftext|>"
TOKENIZATION = "tokenization_next_parameter"


def write_tokenizer(tokenizer: Tokenizer, target: Path, seq_len: int) -> None:
    """Write a tokenizer into a folder.

    Args:
        tokenizer: The tokenizer of a corpus.
        target: The folder, which exists.
        seq_len: Tokens per row, the maximum length that the files state.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        eot, kind = _write_sentencepiece(tokenizer, target)
    else:
        eot, kind = _write_fast(tokenizer, target)
    config = kind | {
        "bos_token": eot,
        "eos_token": eot,
        "pad_token": eot,
        "split_special_tokens": True,  # a text that spells the end of text is text, as in training
        "model_max_length": seq_len,
        "clean_up_tokenization_spaces": False,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _write_fast(tokenizer: Tokenizer, target: Path) -> tuple[str, dict[str, Any]]:
    """Write tokenizer.json; return the end-of-text token and the entries of the configuration that name the class."""
    fast = fast_tokenizer(tokenizer)
    eot = str(fast.id_to_token(tokenizer.eot_id))
    fast.post_processor = processors.TemplateProcessing(
        single=f"{eot} $A", pair=f"{eot} $A $B", special_tokens=[(eot, tokenizer.eot_id)]
    )
    (target / "tokenizer.json").write_text(fast.to_str(pretty=True), encoding="utf-8")
    return eot, {"tokenizer_class": "PreTrainedTokenizerFast"}


def _write_sentencepiece(tokenizer: SentencePieceTokenizer, target: Path) -> tuple[str, dict[str, Any]]:
    """Write the model and a tokenizer that reads it with its own library; returns as `_write_fast`."""
    from sentencepiece import SentencePieceProcessor  # an extra

    model = base64.b64decode(json.loads(tokenizer.to_json())["model"])
    (target / "tokenizer.model").write_bytes(model)
    source = Path(__file__).with_name("sentencepiece_tokenizer.py")
    (target / f"{TOKENIZATION}.py").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    automatic = {"AutoTokenizer": [f"{TOKENIZATION}.NextParameterTokenizer", None]}
    reader = SentencePieceProcessor(model_proto=model)
    pieces = [reader.id_to_piece(index) for index in range(reader.get_piece_size())]
    if tokenizer.eot_id < len(pieces):
        eot = pieces[tokenizer.eot_id]
    else:
        eot = EOT
        while eot in pieces:
            eot += "_"
    return eot, {"tokenizer_class": "NextParameterTokenizer", "auto_map": automatic}


def fast_tokenizer(tokenizer: Tokenizer) -> RustTokenizer:
    """Convert to a tokenizer of the `tokenizers` library, which gives the same ids for every text."""
    content = json.loads(tokenizer.to_json())
    if tokenizer.kind == "word":
        words = {word: index for index, word in enumerate(content["words"], start=1)}
        # The vocabulary lacks the token for unknown words, so that they raise, as they do in our own tokenizer.
        fast = RustTokenizer(models.WordLevel({EOT: 0, **words}, unk_token="<unknown>"))
        fast.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"[^\S\n]+"), "removed"),
                pre_tokenizers.Split(Regex(r"[\n.?]"), "isolated"),
            ]
        )
    elif tokenizer.kind == "bytes":
        fast = RustTokenizer(models.BPE(vocab=_byte_characters(), merges=[]))
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        fast.decoder = decoders.ByteLevel()
    else:
        fast = RustTokenizer.from_str(json.dumps(content["trained"]))
    if fast.id_to_token(tokenizer.eot_id) is None or tokenizer.kind == "word":
        fast.add_special_tokens([AddedToken(EOT, special=True)])
    assert fast.id_to_token(tokenizer.eot_id) is not None
    return fast


def _byte_characters() -> dict[str, int]:
    """Map the characters that represent the 256 bytes in byte-level vocabularies (GPT-2's table) to the bytes."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + index): byte for index, byte in enumerate(others)}
