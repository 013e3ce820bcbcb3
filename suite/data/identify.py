"""Data known by content: the fingerprints that a configuration leaves open, filled in from its files."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from suite import cells
from suite.cells import DataConfig, MixtureData, TextData, TextPart
from suite.data import text_files, tokenizer_files
from suite.data.tokenizers import Tokenizer
from suite.errors import UserError


def identified(config: DataConfig) -> DataConfig:
    """The configuration with the fingerprint of every file it names; those given stay as they are.

    A hub data set is known by its name and revision: nothing is looked up. Raises UserError for a file that
    cannot be read.
    """
    updates: dict[str, object] = {}
    if config.tokenizer.kind == "file" and config.tokenizer.fingerprint is None:
        content = _tokenizer_content(Path(str(config.tokenizer.path)))
        updates["tokenizer"] = config.tokenizer.model_copy(update={"fingerprint": content})
    if isinstance(config, TextData) and config.fingerprint is None:
        updates["fingerprint"] = _text_content(config.path)
    if isinstance(config, MixtureData):
        updates["parts"] = {
            name: part.model_copy(update={"fingerprint": _part_content(name, part.path)})
            if isinstance(part, TextPart) and part.fingerprint is None
            else part
            for name, part in config.parts.items()
        }
    return config.model_copy(update=updates)


def ready_tokenizer(config: cells.Tokenizer) -> Tokenizer:
    """The tokenizer in the configuration's file. Raises UserError if its content is not the one named."""
    path = Path(str(config.path))
    content = tokenizer_files.fingerprint(path)
    if config.fingerprint not in (None, content):
        raise changed("data.tokenizer", path, content, str(config.fingerprint))
    return tokenizer_files.read(path, config.eot)


def check_text(config: TextData) -> None:
    """Raise UserError if the text's content is not the one named."""
    content = text_files.fingerprint(Path(config.path))
    if config.fingerprint not in (None, content):
        raise changed("data", Path(config.path), content, str(config.fingerprint))


def changed(where: str, path: Path, content: str, named: str) -> UserError:
    """The complaint about a file that is not the one whose fingerprint is named."""
    return UserError(
        f"{where}.path: got {str(path)!r} with the content {content[:12]}..., allowed: the content"
        f" {named[:12]}... named by {where}.fingerprint"
    )


def _text_content(path: str) -> str:
    return _read_once(text_files.fingerprint, Path(path), _stamps(text_files.files(Path(path))))


def _part_content(name: str, path: str) -> str:
    try:
        return _text_content(path)
    except UserError as error:
        raise UserError(str(error).replace("data.path", f"data.parts.{name}.path", 1)) from None


def _tokenizer_content(path: Path) -> str:
    return _read_once(tokenizer_files.fingerprint, path, _stamps(tokenizer_files.files(path)))


def _stamps(files: list[Path]) -> tuple[tuple[str, int, int], ...]:
    return tuple((str(file), stat.st_size, stat.st_mtime_ns) for file in files for stat in (file.stat(),))


@functools.lru_cache(maxsize=16)
def _read_once(fingerprint: Callable[[Path], str], path: Path, stamps: tuple[tuple[str, int, int], ...]) -> str:
    """The content's fingerprint, read once for all cells of a grid, and again where `stamps` say it has changed."""
    return fingerprint(path)
