"""Invented rows of data sets that no test data holds, in the hub's layout and with its field names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

THINGS = ("kettle", "ladder", "marble", "napkin", "orchid", "pillow", "quiver", "rocket")
PLACES = ("attic", "barn", "cellar", "den")

ARC = "allenai/ai2_arc"
WINOGRANDE = "allenai/winogrande"
LAMBADA = "EleutherAI/lambada_openai"
WIKITEXT = "EleutherAI/wikitext_document_level"
TASKS = ("arc_easy", "arc_challenge", "winogrande", "lambada_openai", "wikitext")
"""The tasks that read these rows."""


def _arc(number: int) -> dict[str, Any]:
    count = 3 + number % 3
    labels = "12345" if number % 2 else "ABCDE"
    texts = [f"the {THINGS[(number + shift) % 8]} of {shift} parts" for shift in range(count)]
    choices = {"text": texts, "label": list(labels[:count])}
    return {"question": f"What holds {number} cups?", "choices": choices, "answerKey": labels[number % count]}


def _winogrande(number: int) -> dict[str, Any]:
    one, other = THINGS[number], THINGS[(number + 3) % 8]
    sentence = f"Ada put the {one} by the {other}, but the _ was too {'tall' if number % 3 else 'wide'} to stay."
    return {"sentence": sentence, "option1": one, "option2": other, "answer": "12"[number % 2]}


def _lambada(number: int) -> dict[str, Any]:
    thing = THINGS[number]
    return {"text": f"The {thing} was in the {PLACES[number % 4]}.\n\nNobody but Ada had ever seen that {thing}"}


def _page(number: int) -> dict[str, Any]:
    end = f'It had {number} @,@ 000 parts , and one " name " . \n ' * (1 + number % 4)
    return {"page": f" \n = The {THINGS[number]} = \n \n {end}"}


SETS: dict[tuple[str, str], tuple[str, list[dict[str, Any]]]] = {
    (ARC, "ARC-Easy"): ("train validation test", [_arc(number) for number in range(8)]),
    (ARC, "ARC-Challenge"): ("train validation test", [_arc(number) for number in range(7, -1, -1)]),
    (WINOGRANDE, "winogrande_xl"): ("train validation", [_winogrande(number) for number in range(8)]),
    (LAMBADA, "default"): ("test", [_lambada(number) for number in range(8)]),
    (WIKITEXT, "wikitext-2-raw-v1"): ("test", [_page(number) for number in range(8)]),
}


def write_rows(root: Path) -> Path:
    """Write all of them, and return `root`."""
    for (repo, config), (splits, rows) in SETS.items():
        for split in splits.split():
            path = root / repo / config / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root
