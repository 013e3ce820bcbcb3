"""Every text file is read and written as UTF-8, whatever the locale of the machine."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT_METHODS = ("read_text", "write_text", "open")
ASCII_ONLY = ("/sys", "/proc")
"""Files of the kernel."""


def calls_without_encoding(path: Path) -> Iterator[int]:
    """Yield the line of every call that reads or writes text in the encoding of the locale."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        is_method = isinstance(function, ast.Attribute) and function.attr in TEXT_METHODS
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        if not is_method and name not in ("open", "fdopen"):
            continue
        texts = [arg.value for arg in ast.walk(node) if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        is_binary = any("b" in text and len(text) <= 3 for text in texts)
        is_of_kernel = any(text.startswith(ASCII_ONLY) for text in texts)
        is_of_os = isinstance(function, ast.Attribute) and getattr(function.value, "id", "") in ("os", "mmap", "gzip")
        if not (is_binary or is_of_kernel or is_of_os or any(keyword.arg == "encoding" for keyword in node.keywords)):
            yield node.lineno


def test_every_text_file_is_utf_8() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for package in ("suite", "analysis", "kernels")
        for path in sorted((ROOT / package).rglob("*.py"))
        for line in calls_without_encoding(path)
    ]
    assert found == []
