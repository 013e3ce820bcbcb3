"""A SentencePiece model as a transformers tokenizer; copied into exports.

The sentencepiece library itself encodes, so ids equal those of training for every text. A text that spells a special
token is plain text. With `add_special_tokens` the end-of-text token precedes a text.
"""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from transformers import PreTrainedTokenizer


class NextParameterTokenizer(PreTrainedTokenizer):
    """Tokens are pieces. `eos_token` is a piece or, if the model has no end of text, one token after the last piece."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012 (transformers reads a plain attribute)
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        self.vocab_file = vocab_file
        self.pieces = SentencePieceProcessor(model_file=vocab_file)
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        """The number of pieces."""
        return int(self.pieces.get_piece_size())

    def get_vocab(self) -> dict[str, int]:
        """Return the ids of all tokens."""
        pieces = {self.pieces.id_to_piece(index): index for index in range(self.vocab_size)}
        return pieces | self.added_tokens_encoder

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        # Through ids: the text of an unknown piece could be the name of another.
        return [self.pieces.id_to_piece(index) for index in self.pieces.encode(text)]

    def _convert_token_to_id(self, token: str) -> int:
        return int(self.pieces.piece_to_id(token))

    def _convert_id_to_token(self, index: int) -> str:
        return str(self.pieces.id_to_piece(index))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Return the text of the tokens; the end-of-text token appears by its name."""
        parts = []
        for is_eot, group in itertools.groupby(tokens, lambda token: token == self.eos_token):
            run = [*group]
            parts.append("".join(run) if is_eot else self.pieces.decode(run))
        return "".join(parts)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Return the end-of-text token and the ids of one or two texts."""
        return [self.eos_token_id, *token_ids_0, *(token_ids_1 or [])]

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """Return 1 for the end-of-text token and 0 for others."""
        if already_has_special_tokens:
            return [int(token == self.eos_token_id) for token in token_ids_0]
        return [1] + [0] * len(token_ids_0 + (token_ids_1 or []))

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copy the model file, and return its path."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        target = Path(save_directory) / f"{prefix}{self.vocab_files_names['vocab_file']}"
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)
