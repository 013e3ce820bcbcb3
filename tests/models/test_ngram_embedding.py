"""`ngram_embedding` compared with plain re-implementations in Python integers and numpy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_families import VOCAB, config, model, tokens

from suite.errors import UserError
from suite.grids import load_grid
from suite.models.accounting import account
from suite.models.lookup.ngram_embedding import NgramEmbeddingConfig
from suite.plan.gpus import GPUS
from suite.plan.plan import Assumptions, plan


def number(token_T: list[int], position: int, order: int) -> int:
    """Return the base-V number of the last ids as an unbounded integer; ids before the start are zero."""
    last = [token_T[position - back] if position >= back else 0 for back in range(order)]
    return sum(token * VOCAB**back for back, token in enumerate(last))


def rows_by_hand(module: Any, token_T: list[int], position: int) -> list[int]:
    tables, first, rows = len(module.hashes.moduli) // (module.window - 1), 0, []
    for table, count in enumerate(module.hashes.moduli):
        rows.append(first + number(token_T, position, 2 + table // tables) % count)
        first += count
    return rows


@pytest.mark.parametrize(
    "options",
    [
        {"form": "over_encoding"},
        {"form": "over_encoding", "amplify": "scale"},
        {"form": "longcat"},
        {"form": "longcat", "amplify": "norm", "max_order": 5},
    ],
)
def test_the_embedding_equals_a_loop_in_float64(options: dict[str, Any]) -> None:
    net = model("ngram_embedding", **options).eval().double()
    module, token_BT = net.input_embedding, tokens(1, 11)
    seen: list[np.ndarray] = []
    module.register_forward_hook(lambda _, __, y: seen.append(y[0].detach().numpy()))
    net(token_BT)
    table = module.tables[0].weight.detach().numpy()
    slices = np.split(module.projection.weight.detach().numpy(), len(module.hashes.moduli), axis=1)
    for position, token in enumerate(token_BT[0].tolist()):
        rows = rows_by_hand(module, token_BT[0].tolist(), position)
        terms = [net.embedding.weight[token].detach().numpy()]
        terms += [projection @ table[row] for projection, row in zip(slices, rows, strict=True)]
        expected = np.mean(terms, 0) if options["form"] == "longcat" else np.sum(terms, 0)
        amplify = options.get("amplify", "scale" if options["form"] == "longcat" else "none")
        if amplify == "scale":
            expected = expected * math.sqrt(32)
        elif amplify == "norm":
            expected = (expected - expected.mean()) / np.sqrt(expected.var() + 1e-5)
        np.testing.assert_allclose(seen[0][position], expected, rtol=1e-9, atol=1e-12)


def test_a_multiple_of_the_vocabulary_lets_ngrams_that_end_in_the_same_token_collide() -> None:
    """The reason for coprime counts: with R = 2 V a token leads to two rows only, with R = 2 V + 1 to nearly all."""

    def rows_of_one_token(rows: int) -> int:
        return len({(7 + VOCAB * earlier) % rows for earlier in range(VOCAB)})

    assert rows_of_one_token(2 * VOCAB) == 2
    assert rows_of_one_token(2 * VOCAB + 1) == VOCAB


def test_row_counts_ascend_in_steps_of_two_and_skip_factors_of_the_vocabulary() -> None:
    counts = config("ngram_embedding", table_rows=41, order_tables=4).moduli(50)
    assert counts == [41, 43, 47, 49, 51, 53, 57, 59]  # without 45 and 55
    assert config("ngram_embedding", table_rows=45, order_tables=1).moduli(50) == [47, 49]


@pytest.mark.parametrize(("rows", "shared", "nearest"), [(100, 2, 101), (250, 5, 251), (24, 12, 27)])
def test_counts_that_share_a_factor_with_the_vocabulary_are_refused_with_the_reason(rows, shared, nearest) -> None:
    with pytest.raises(ValueError, match=f"table_rows: got {rows}, allowed: .* e.g. {nearest}, .* share {shared} of"):
        model("ngram_embedding", table_rows=rows)


def test_the_plan_refuses_such_counts_in_one_line(tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text(
        "defaults:\n  model: {family: ngram_embedding, base: w32, table_rows: 514}\n"
        f"  data: {{kind: text, path: {tmp_path / 'text.jsonl'}, held_out: 0.3, tokenizer: {{kind: bytes}}}}\n"
        "  train: {batch_rows: 1, tokens: 256, lr: 1e-3}\nblocks: [{}]\n"
    )
    lines = [json.dumps({"text": f"Document {number} of the corpus."}) for number in range(40)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"model\.table_rows: got 514, allowed: a number without the factor 257 of"):
        plan(load_grid(str(grid)), Assumptions(gpu=GPUS["h100"]), tmp_path)


def test_the_total_of_longcat_flash_lite() -> None:
    longcat = NgramEmbeddingConfig(
        family="ngram_embedding",
        base="8b",
        form="longcat",
        dim=3072,
        heads=24,
        table_rows=78 * 131_072 + 1,
    )
    assert longcat.moduli(131_072) == [78 * 131_072 + 2 * table + 1 for table in range(12)]
    assert longcat.width == 256
    assert account(longcat, 131_072, 4096).params_memory == pytest.approx(31.4e9, rel=1e-3)


def test_a_trained_model_refuses_another_vocabulary() -> None:
    with pytest.raises(ValueError, match=f"vocabulary: got {VOCAB + 1} entries, allowed: {VOCAB}"):
        model("ngram_embedding").input_embedding.hashes.resize_vocabulary(VOCAB + 1)


def test_hashes_of_the_largest_tables_stay_within_63_bits() -> None:
    module = model("ngram_embedding", order_tables=1, max_order=5, row_width=1, table_rows=1_000_003).input_embedding
    ids_BTN = torch.full((1, 1, 5), VOCAB - 1)
    expected, first = [], 0
    for order, rows in enumerate(module.hashes.moduli, start=2):
        expected.append(first + (VOCAB**order - 1) % rows)
        first += rows
    assert module.hashes(ids_BTN).flatten().tolist() == expected
