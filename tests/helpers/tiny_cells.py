"""A tiny bios cell and its corpus."""

from pathlib import Path
from typing import Any

from suite.cells import Cell
from suite.data.corpus import Corpus, prepare


def tiny_cell(family: str = "dense", seed: int = 0, **train: Any) -> Cell:
    family, *options = family.split()
    model: dict[str, Any] = {"family": family, "base": "w32"}
    for option in options:
        name = "router" if option == "softmax" else "control"
        model |= {name: option} if option in ("softmax", "frozen", "shuffled") else {option: True}
    if family in ("pkm", "memory_plus", "ultramem_v2"):
        model |= {"half_keys": 16, "top_k": 4}
    if family == "ngram_embedding":
        model |= {"table_rows": 101, "order_tables": 2}
    if family in ("engram", "engram_moe"):
        model |= {"head_rows": 100, "hash_heads": 2}
    fields = {
        "batch_rows": 4,
        "epochs": 2.0,
        "lr": 5e-3,
        "warmup": 3,
        "log_every": 1,
        "checkpoint_every": 4,
        **train,
    }
    return Cell.model_validate(
        {
            "model": model,
            "data": {"kind": "bios", "people": 30, "questions": 0.5},
            "train": fields,
            "seed": seed,
        }
    )


def corpus_of(cell: Cell, cache: Path) -> Corpus:
    return prepare(cell.data, cache)
