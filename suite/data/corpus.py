"""A prepared corpus: tokenizer, shards, and what it is evaluated on; cached on disk by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

from suite import cells
from suite.atomic import write_text
from suite.cells import BiosData, DataConfig, HubData, MixtureData, TextData, TextPart, identity
from suite.data import bios_text, resumable_writer, shards, text_files, tokenizers
from suite.data.bios import World
from suite.data.hub import HubReader
from suite.data.identify import check_text, identified, ready_tokenizer
from suite.data.loader import DocumentPacking, Loader, MixturePacking, WindowPacking
from suite.data.resumable_writer import HELD_OUT, Tell
from suite.data.shards import META, Round
from suite.data.text_files import FileReader, Reader
from suite.data.tokenizers import Tokenizer
from suite.errors import UserError

FORMAT = 1  # raise when the shards of an unchanged configuration change
TOKENIZER = "tokenizer.json"
BPE_CHARACTERS = 200_000_000
"""A BPE is trained on a corpus's beginning, up to the document that reaches this."""

StreamData = TextData | HubData


@dataclass(frozen=True)
class Part:
    """One folder of shards: its rounds, and what was said of it when it was written."""

    folder: Path
    rounds: list[Round]
    meta: dict[str, Any]

    @property
    def tokens(self) -> int:
        """Tokens of all rounds, end-of-text tokens included."""
        return sum(len(r.tokens) for r in self.rounds)

    def held_out(self) -> Iterator[str]:
        """The documents kept for evaluation."""
        if (self.folder / HELD_OUT).exists():
            with open(self.folder / HELD_OUT, encoding="utf-8", newline="\n") as file:
                yield from (json.loads(line)["text"] for line in file)


class Corpus:
    """What a run trains on: one part, or a mixture's several; `fingerprint` names the content.

    bios has a `world`, all others have `held_out`. The tokenizer is one for all parts.
    """

    def __init__(self, config: DataConfig, folders: Sequence[Path]) -> None:
        self.config = config
        self.tokenizer: Tokenizer = tokenizers.load(folders[0] / TOKENIZER)
        self.vocab_size: int = self.tokenizer.vocab_size
        self.parts = [self._part(folder) for folder in folders]
        self.fingerprint: str = self._fingerprint()
        self.world: World | None = World(config) if isinstance(config, BiosData) else None
        if isinstance(config, BiosData):
            longest = max(int(r.lengths.max()) for r in self.parts[0].rounds)
            if longest > config.seq_len:
                raise UserError(
                    f"data.seq_len: got {config.seq_len}, allowed: at least {longest}, the longest document"
                )

    def _part(self, folder: Path) -> Part:
        meta = json.loads((folder / META).read_text())
        return Part(folder, [shards.read_round(folder, i, self.vocab_size) for i in range(meta["rounds"])], meta)

    def _fingerprint(self) -> str:
        """The folder's name where that stands for the content; of a stream's content where it does not."""
        if isinstance(self.config, (BiosData, TextData)):
            return self.parts[0].folder.name
        content = [[part.folder.name, part.meta["content"]] for part in self.parts]
        return _digest({"parts": content, "weights": _weights(self.config)})

    @cached_property
    def held_out(self) -> list[str]:
        """The documents kept for evaluation, a mixture's parts in turn; none for bios."""
        in_turn: list[str] = []
        waiting = [part.held_out() for part in self.parts]
        while waiting:
            for documents in list(waiting):
                text = next(documents, None)
                if text is None:
                    waiting.remove(documents)
                else:
                    in_turn.append(text)
        return in_turn

    def loader(self, seed: int, batch_rows: int) -> Loader:
        """Rows of `config.seq_len` tokens in the order of `seed`, `batch_rows` a step.

        bios: documents whole, packed in rows, each epoch another round of templates; text: windows; mixtures:
        windows of each part, by weight.
        """
        shape = self.config.seq_len, self.tokenizer.eot_id, seed
        if isinstance(self.config, BiosData):
            return Loader(DocumentPacking(self.parts[0].rounds, *shape), batch_rows)
        packings = [WindowPacking(part.rounds, *shape, part=number) for number, part in enumerate(self.parts)]
        if isinstance(self.config, MixtureData):
            return Loader(MixturePacking(packings, _weights(self.config), seed), batch_rows)
        return Loader(packings[0], batch_rows)


def prepare(config: DataConfig, cache: Path, tell: Tell = resumable_writer.silent) -> Corpus:
    """Tokenize the corpus into `cache/<fingerprint>/` unless it is there, and open it.

    A text corpus that is there and whose fingerprint the configuration names is opened without its files, a hub
    data set that is there without the hub. A killed preparation goes on where its last piece ended. A mixture is
    its parts, each in a folder that a corpus of that part alone shares. `tell` is told of progress.
    Raises UserError for input that cannot be used.
    """
    return Corpus(config, [_build(part, cache, tell) for _, part in parts_of(config)])


def parts_of(config: DataConfig) -> list[tuple[str | None, BiosData | StreamData]]:
    """A mixture's parts by name, each as a corpus of its own; any other corpus itself, without a name."""
    if isinstance(config, MixtureData):
        return [(name, _alone(config, name)) for name in sorted(config.parts)]
    return [(None, config)]


def _alone(config: MixtureData, name: str) -> StreamData:
    part = config.parts[name]
    fields = part.model_dump(exclude={"weight"}) | {"seq_len": config.seq_len, "tokenizer": config.tokenizer}
    return TextData.model_validate(fields) if isinstance(part, TextPart) else HubData.model_validate(fields)


def _weights(config: DataConfig) -> list[float]:
    """The weights of a mixture's parts, in the order of their names."""
    return [config.parts[name].weight for name in sorted(config.parts)] if isinstance(config, MixtureData) else [1.0]


def _build(config: BiosData | StreamData, cache: Path, tell: Tell) -> Path:
    """The folder of the configuration's shards, written if it is not there."""
    known = identified(config)
    assert isinstance(known, (BiosData, TextData, HubData))
    folder = cache / _key(known)
    if isinstance(known, BiosData):
        shards.build_once(folder, partial(_write_bios, known))
        return folder
    if known.tokenizer.kind == "word":
        raise UserError("data.tokenizer.kind: got 'word', allowed for text: bpe, bytes, file (other words may come)")
    if isinstance(known, TextData) and not folder.exists():
        check_text(known)
    shards.build_once(folder, partial(_write_stream, known, tell))
    return folder


def _key(config: BiosData | StreamData) -> str:
    """24 hex digits of everything that shapes the shards; the length of rows does not."""
    content = identity(config) | {"format": FORMAT}
    if isinstance(config, BiosData):
        content |= {"template_set": bios_text.TEMPLATE_SET}
    content.pop("seq_len", None)
    return _digest(content)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


def _write_bios(config: BiosData, folder: Path) -> None:
    world = World(config)
    if config.tokenizer.kind == "word":
        tokenizer: Tokenizer = tokenizers.WordTokenizer.of(world.vocabulary_texts())
    else:
        rounds = (world.documents(index) for index in range(bios_text.ROUNDS))
        tokenizer = _open_vocabulary(config.tokenizer, chain.from_iterable(rounds))
    for index in range(bios_text.ROUNDS):
        shards.write_round(folder, index, world.documents(index), tokenizer)
    write_text(folder / TOKENIZER, tokenizer.to_json())
    write_text(folder / META, json.dumps({"rounds": bios_text.ROUNDS}))


def _write_stream(config: StreamData, tell: Tell, folder: Path) -> None:
    def reader_at(position: Any) -> Reader:
        if isinstance(config, HubData):
            return HubReader(config, position)
        return FileReader(Path(config.path), config.field, position)

    def beginning() -> Iterator[str]:
        characters = 0
        for text in reader_at(None):
            if not text_files.is_held_out(text, config.held_out):
                characters += len(text)
                yield text
            if characters >= BPE_CHARACTERS:
                return

    if (folder / TOKENIZER).exists():
        tokenizer = tokenizers.load(folder / TOKENIZER)
    else:
        tokenizer = _open_vocabulary(config.tokenizer, beginning())
        write_text(folder / TOKENIZER, tokenizer.to_json())
    most_tokens = config.tokens if isinstance(config, HubData) else None
    resumable_writer.write_stream(folder, reader_at, tokenizer, config.held_out, most_tokens, tell)


def _open_vocabulary(config: cells.Tokenizer, texts: Iterable[str]) -> Tokenizer:
    if config.kind == "file":
        return ready_tokenizer(config)
    if config.kind == "bytes":
        return tokenizers.BytesTokenizer()
    assert config.vocab_size is not None, "cells.Tokenizer demands it of bpe"
    trained = tokenizers.BPETokenizer.train(texts, config.vocab_size)
    if trained.vocab_size < config.vocab_size:
        allowed = f"at most {trained.vocab_size}, all that this corpus has pairs for"
        raise UserError(f"data.tokenizer.vocab_size: got {config.vocab_size}, allowed: {allowed}")
    return trained
