"""The data of an imported checkpoint: its tokenizer, and no text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from suite.atomic import write_text
from suite.data.resumable_writer import Progress
from suite.data.shards import META
from suite.data.sources.registry import DataConfig, register
from suite.data.sources.streams import TOKENIZER
from suite.data.tokenizer_config import TokenizerConfig


@register
class TokenizerData(DataConfig):
    """No training text: the tokenizer of a checkpoint that was trained elsewhere."""

    kind: Literal["tokenizer"] = Field(description="no text: the tokenizer of an imported checkpoint")
    seq_len: int = Field(gt=1, description="tokens per row, the longest text that is scored at once")
    tokenizer: TokenizerConfig = Field(description="the checkpoint's tokenizer")

    determines_content: ClassVar[bool] = True
    has_text: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """See DataConfig."""
        return "no text"

    def write(self, folder: Path, progress: Progress) -> None:
        """See DataConfig."""
        write_text(folder / TOKENIZER, self.tokenizer.build(iter(())).to_json())
        write_text(folder / META, json.dumps({"rounds": 0}))
