"""The examples of docs/adding-a-baseline.md, one for each point at which a module enters, as files of a user."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adding-a-baseline.md"
EXAMPLES = {
    name: block
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for name in re.findall(r'register\(Family\("(\w+)"', block)
}
POINTS = {
    "squared": "layers.0.feed_forward",
    "bigram_input": "input_embedding",
    "convolved": "layers.1.before_attention",
    "value_table": "layers.2.attention_values",
    "embedding_gate": "layers.0.skip",
}
"""The name of each example's module in its model."""


def file_of(name: str, folder: Path, *replaced: tuple[str, str]) -> Path:
    """Write the example of a family, with some of its text replaced."""
    source = EXAMPLES[name]
    for old, new in replaced:
        assert old in source
        source = source.replace(old, new)
    path = folder / "mine.py"
    path.write_text(source)
    return path
