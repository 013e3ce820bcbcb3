"""Evaluation data from a local folder in the hub's layout, or from the hub.

`<root>/<org>/<name>/<config>/<split>.jsonl` (or .parquet, sharded as the hub does). Files are read every
time, without a cache. (`datasets.load_dataset` keys its cache of a local folder by the folder's name alone, and may
return the rows of another folder.)
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from suite.data.reader import parse_object
from suite.errors import UserError

Doc = dict[str, Any]

SPLIT_FILE = re.compile(r"(?:-(?P<number>\d{5})(?P<count>-of-\d{5})(?:-[0-9a-f]+)?)?(?P<suffix>\.(?:jsonl|parquet))")
"""The part of a file's name after the split: for shards the hub's numbering, with or without a hash, and the suffix."""


class Docs(list[Doc]):
    """Rows with the two members that lm-eval needs of a data set: `features` and `map`."""

    @property
    def features(self) -> Doc:
        """The fields, by name."""
        return dict.fromkeys(self[0]) if self else {}

    def map(self, function: Callable[[Doc], Doc]) -> Docs:
        """Return each row updated with the result of `function`."""
        return Docs({**row, **function(row)} for row in self)


class DataRoot:
    """Where evaluation data comes from: a local folder, or the hub where `path` is None."""

    def __init__(self, path: Path | None) -> None:
        if path is not None and not path.is_dir():
            raise UserError(
                f"--data-root: got {str(path)!r}, allowed: a folder with <org>/<name>/<config>/<split>.jsonl"
            )
        self.path = path

    def load(self, repo: str, config: str | None, splits: Iterable[str]) -> dict[str, Docs]:
        """Read splits of a data set.

        Args:
            repo: The data set's name.
            config: Its configuration; None: its only one.
            splits: The splits.

        Returns:
            The rows of each split.

        Raises:
            UserError: A file is missing or incomplete, or a row is not an object.
        """
        return {split: self.split(repo, config, split) for split in splits}

    def split(self, repo: str, config: str | None, split: str) -> Docs:
        """Read one split; arguments and errors as for `load`."""
        if self.path is None:
            return _from_hub(repo, config, split)
        return _read(self.files(repo, config, split))

    def files(self, repo: str, config: str | None, split: str) -> list[Path]:
        """Return the local files of one split, in order: one file, or all shards of one set.

        Args:
            repo: The data set's name.
            config: Its configuration; None: its only one.
            split: The split's name.

        Raises:
            UserError: A file or a shard is missing or cannot be read, or several files could be the split.
        """
        assert self.path is not None
        folder = self._folder(repo, config)
        sources = self._sources(folder, split)
        if not sources:
            wanted = (folder / f"{split}.jsonl").relative_to(self.path)
            raise UserError(f"{self.path}: no {wanted} (nor .parquet); get it with: suite data prefetch {self.path}")
        if len(sources) > 1:
            names = ", ".join(paths[0].name for paths in sources.values())
            raise UserError(f"{folder}: {split} exists more than once ({names}); remove all but one")
        (files,) = sources.values()
        _refuse_missing_shards(files, split)
        _refuse_unreadable(files)
        return files

    def has(self, repo: str, config: str | None, split: str) -> bool:
        """Return whether any local file of a split exists; arguments as for `files`."""
        return bool(self._sources(self._folder(repo, config), split))

    def _sources(self, folder: Path, split: str) -> dict[str, list[Path]]:
        """Return the files that could be the split, by format and number of shards."""
        sources: dict[str, list[Path]] = {}
        for path in sorted(folder.glob(f"{split}[.-]*")):
            if match := SPLIT_FILE.fullmatch(path.name.removeprefix(split)):
                sources.setdefault(f"{match['count'] or ''}{match['suffix']}", []).append(path)
        return sources

    def where(self, repo: str, config: str | None, split: str) -> str:
        """Return the file or shards of a split, or its name on the hub, for errors; arguments as for `files`."""
        if self.path is None:
            return f"{repo} ({split})"
        first, *others = self.files(repo, config, split)
        return str(first.with_name(f"{split}-*{first.suffix}") if others else first)

    def _folder(self, repo: str, config: str | None) -> Path:
        """Return the folder of a configuration; for None the only one that exists, or `default`."""
        assert self.path is not None
        folder = self.path / repo
        if config is not None:
            return folder / config
        configs = [path for path in folder.glob("*") if path.is_dir() and not path.name.startswith(".")]
        return configs[0] if len(configs) == 1 else folder / "default"

    def fingerprint(self, repo: str, config: str | None, splits: Iterable[str]) -> str:
        """Return a hash of the files of splits, or the hub's revision; arguments as for `load`."""
        if self.path is None:
            return _hub_revision(repo)
        digest = hashlib.sha256()
        for split in sorted(set(splits)):
            for path in self.files(repo, config, split):
                digest.update(f"{split}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
        return f"sha256:{digest.hexdigest()[:16]}"


def _refuse_missing_shards(files: list[Path], split: str) -> None:
    matches = [SPLIT_FILE.fullmatch(path.name.removeprefix(split)) for path in files]
    numbers = [int(match["number"]) for match in matches if match is not None and match["number"]]
    count = int(matches[0]["count"].removeprefix("-of-")) if matches[0] is not None and matches[0]["count"] else 0
    if missing := sorted(set(range(count)) - set(numbers)):
        raise UserError(f"{files[0].parent}: {split}: shard {missing[0]} of {count} is missing; download it again")
    if len(set(numbers)) < len(numbers):
        raise UserError(f"{files[0].parent}: {split}: a shard exists more than once; remove all but one")


def _refuse_unreadable(files: list[Path]) -> None:
    for path in files:
        if not path.is_file():
            raise UserError(f"{path}: is a folder, a pipe or a link to nothing, allowed: a file; download it again")
        if not os.access(path, os.R_OK):
            raise UserError(f"{path}: cannot be read by this user; change its permissions")


def _read(files: list[Path]) -> Docs:
    """Return all rows of a split's files."""
    docs = Docs()
    for path in files:
        docs.extend(_read_parquet(path) if path.suffix == ".parquet" else _read_jsonl(path))
    if not docs:
        raise UserError(f"{files[0]}: got no rows, allowed: one JSON object per line")
    return docs


def _read_jsonl(path: Path) -> list[Doc]:
    lines = enumerate(path.read_bytes().splitlines(), start=1)
    return [parse_object(f"{path}:{number}", line) for number, line in lines if line.strip()]


def _read_parquet(path: Path) -> list[Doc]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not whole parquet ({str(error).splitlines()[0]})") from None


def _from_hub(repo: str, config: str | None, split: str) -> Docs:
    import datasets

    try:
        return Docs(datasets.load_dataset(repo, config, split=split).to_list())
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a data set that only a script can load
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{repo} ({config or 'default'}, {split}): not from the hub ({reason}); connect to a network, or use "
            "--data-root with files from `suite data prefetch`"
        ) from None


def _hub_revision(repo: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return f"hub:{HfApi().dataset_info(repo).sha}"
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return "hub:cached"
