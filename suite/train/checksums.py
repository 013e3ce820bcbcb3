"""Checksums of a checkpoint's files, by which a damaged checkpoint is recognised before anything is read from it.

`checksums.json` is written last: {file: {"bytes": size, "crc32": hexadecimal}}. Other files are ignored.
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch.distributed as dist

from suite.atomic import write_json
from suite.train.parallel import World

MANIFEST = "checksums.json"
CHUNK = 1 << 22  # bytes


def write_manifest(folder: Path, world: World) -> None:
    """Write the checksums of all files in a folder. All processes call it together, each after its own files."""
    own = [path for path in folder.iterdir() if path.is_file() and _writer(path.name) == world.rank]
    entries = _merge({path.name: _checksum(path) for path in own}, world)
    if world.is_first:
        write_json(folder / MANIFEST, dict(sorted(entries.items())))


def has_manifest(folder: Path) -> bool:
    """Return whether a checkpoint has checksums; those of earlier versions have none."""
    return (folder / MANIFEST).exists()


def find_damage(folder: Path, world: World | None = None) -> str | None:
    """Compare a checkpoint with its checksums. All processes call it together; each reads a part of the files.

    Without checksums, only what torch.save itself stores is verified.

    Args:
        folder: The checkpoint.
        world: The processes that share the work; None: this process alone.

    Returns:
        The first damaged file and what is wrong with it, in all processes; None if the checkpoint is whole.
    """
    world = world or World()
    if not has_manifest(folder):
        problems = _damaged_archives(folder) if world.is_first else {}
    else:
        try:
            expected: dict[str, dict[str, Any]] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except ValueError:
            return f"{MANIFEST}: not readable"
        names = sorted(expected)[world.rank :: world.size]
        compared = {name: _difference(folder / name, expected[name]) for name in names}
        problems = {name: problem for name, problem in compared.items() if problem is not None}
    problems = _merge(problems, world)
    return next((f"{name}: {problem}" for name, problem in sorted(problems.items())), None)


def _writer(name: str) -> int:
    """Return the rank that writes a file: torch.distributed.checkpoint names shards `__<rank>_<number>.distcp`."""
    shard = re.match(r"__(\d+)_", name)
    return int(shard[1]) if shard else 0


def _checksum(path: Path) -> dict[str, Any]:
    crc, size = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return {"bytes": size, "crc32": f"{crc:08x}"}


def _difference(path: Path, expected: dict[str, Any]) -> str | None:
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    if size != expected["bytes"]:
        return f"{size} of {expected['bytes']} bytes"
    try:
        crc = _checksum(path)["crc32"]
    except OSError as error:
        return f"not readable ({error.strerror})"
    return None if crc == expected["crc32"] else f"its crc32 is {crc} instead of {expected['crc32']}"


def _damaged_archives(folder: Path) -> dict[str, str]:
    """Verify the files of torch.save by the checksums that these zip archives contain."""
    problems = {}
    for path in folder.glob("*.pt"):
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        except (zipfile.BadZipFile, OSError, EOFError):
            problems[path.name] = "incomplete"
            continue
        if damaged is not None:
            problems[path.name] = f"{damaged} has another crc32"
    return problems


def _merge(part: dict[str, Any], world: World) -> dict[str, Any]:
    """Collect the entries of all processes in each."""
    if not world.distributed:
        return part
    parts: list[dict[str, Any]] = [{} for _ in range(world.size)]
    dist.all_gather_object(parts, part)
    return {name: value for entries in parts for name, value in entries.items()}
