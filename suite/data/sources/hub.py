"""Data sets of the Hugging Face hub, streamed through `datasets`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field

from suite.data.reader import text_of
from suite.data.sources.registry import register
from suite.data.sources.streams import StreamData
from suite.data.tokenizer_config import TokenizerConfig
from suite.errors import UserError

Result = TypeVar("Result")


@register
class HubData(StreamData):
    """A data set of the Hugging Face hub; a commit as `revision` pins its content."""

    kind: Literal["hub"] = Field(description="a data set of the Hugging Face hub, read as a stream")
    name: str = Field(min_length=1, description="a hub data set's name, e.g. HuggingFaceFW/fineweb-edu")
    subset: str | None = Field(default=None, description="its configuration, e.g. sample-100BT")
    split: str = Field(default="train", description="split of the data set")
    revision: str | None = Field(default=None, description="branch, tag or commit; None: its main branch")
    field: str = Field(default="text", description="the text's field in its records")
    tokens: int | None = Field(default=None, gt=0, description="tokens to take from its beginning; None: all")
    held_out: float = Field(default=0.001, gt=0.0, lt=1.0, description="share of documents held out for evaluation")
    seq_len: int = Field(default=2048, gt=1, description="tokens per row")
    tokenizer: TokenizerConfig = Field(description="a tokenizer: kind file, bytes or bpe")

    @property
    def label(self) -> str:
        """See DataConfig."""
        return " ".join(filter(None, (self.name, self.subset, self.split)))

    @property
    def max_tokens(self) -> int | None:
        """See StreamData."""
        return self.tokens

    def reader(self, position: Any = None) -> HubReader:
        """See StreamData."""
        return HubReader(self, position)


class HubReader:
    """The documents of a hub data set, in its own order, downloaded as they are read.

    Its position holds the commit that is read, so that a resumed stream has the same content; the number of records
    read; and the state of the `datasets` stream. Raises UserError for a data set that cannot be reached or used.
    """

    share = None  # the length of a stream is unknown

    def __init__(self, config: HubData, position: Any = None) -> None:
        self._config = config
        self.skipped = 0
        self._read: int = position["records"] if position else 0
        self._commit: str | None = position["commit"] if position else self._request(self._newest_commit)
        self._stream = self._request(self._open)
        if position:
            self._stream.load_state_dict(position["state"])

    @property
    def position(self) -> dict[str, Any]:
        """The place after the last document yielded, as JSON."""
        return {"commit": self._commit, "records": self._read, "state": self._stream.state_dict()}

    def __iter__(self) -> Iterator[str]:
        """Yield the documents from the position on."""
        records = iter(self._stream)
        while (record := self._request(lambda: next(records, None))) is not None:
            self._read += 1
            text = text_of(f"{self._config.name}: record {self._read}", record, self._config.field)
            if text.strip():
                yield text
            else:
                self.skipped += 1

    def _newest_commit(self) -> str | None:
        """Return the commit that the revision currently names; None for a local folder in the layout of the hub."""
        if Path(self._config.name).is_dir():
            return None
        from huggingface_hub import HfApi

        return HfApi().dataset_info(self._config.name, revision=self._config.revision).sha

    def _open(self) -> Any:
        import datasets

        config = self._config
        stream = datasets.load_dataset(
            config.name, config.subset, split=config.split, revision=self._commit, streaming=True
        )
        columns = stream.column_names
        if columns is None:  # known only from the records
            return stream
        if config.field not in columns:
            raise UserError(
                f"data.field: got {config.field!r}, which {config.name} does not have, allowed: {', '.join(columns)}"
            )
        return stream.select_columns([config.field])

    def _request(self, action: Callable[[], Result]) -> Result:
        """Return the result of a request to the hub. Raises UserError, with the remedy, for any failure."""
        try:
            return action()
        except UserError:
            raise
        except Exception as error:  # datasets, huggingface_hub and their HTTP client have no common base
            cause = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        progress = f" after {self._read} records (the same command resumes there)" if self._read else ""
        raise UserError(
            f"data.name: got {self._config.name!r}, which cannot be read{progress}: {cause}; unset HF_HUB_OFFLINE if it"
            " is set, or use kind: text with data.path at local .parquet or .jsonl files"
        )
