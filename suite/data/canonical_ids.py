"""Canonical ids: tokens whose texts differ only in case, accents, width or surrounding white space share one.

Engram (arXiv 2601.07372, section 2.2, and its code) hashes canonical ids in place of token ids.
"""

from __future__ import annotations

import re
import unicodedata

from suite.data.tokenizers import Tokenizer

INVALID = "\ufffd"
"""The character in the text of a token whose bytes are not a whole character."""
WHITE_SPACE = re.compile(r"[^\S\x1c-\x1f]+")
"""Runs of Unicode white space, to which Python adds four control characters."""


def canonical_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the canonical id of every token, numbered in the order of the first token of each.

    A token has a separate id if its bytes are not a whole character, or if it has no text (the end of text).
    """
    numbers: dict[str | int, int] = {}
    return [numbers.setdefault(_key(tokenizer, token), len(numbers)) for token in range(tokenizer.vocab_size)]


def _key(tokenizer: Tokenizer, token: int) -> str | int:
    text = "" if token == tokenizer.eot_id else tokenizer.decode([token])
    return token if not text or INVALID in text else normalised(text) or token


def normalised(text: str) -> str:
    """Return a text in NFKC and then NFD, without accents, in lower case, and with single inner spaces only.

    A text of white space only becomes one space.
    """
    decomposed = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    bare = "".join(character for character in decomposed if unicodedata.category(character) != "Mn").lower()
    spaced = WHITE_SPACE.sub(" ", bare)
    return spaced if spaced == " " else spaced.strip(" ")
