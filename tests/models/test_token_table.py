"""The forms of `token_table` compared with plain float64 versions, token by token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from model_families import VOCAB, config, model, tokens
from torch import Tensor

from suite.models.accounting import account
from suite.models.lookup.token_table import PerLayerEmbedding, Stem, ValueEmbedding
from suite.models.memory_table import MemoryTable

GELU_TANH = math.sqrt(2 / math.pi)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(GELU_TANH * (x + 0.044715 * x**3)))


def norm(x: Tensor, gain: Tensor) -> Tensor:
    return x / ((x * x).mean() + 1e-5).sqrt() * gain


def random(module: Any, table: MemoryTable) -> dict[str, Tensor]:
    """Return the random float64 parameters of a module, by name, with the rows as `table`."""
    generator = torch.Generator().manual_seed(0)
    parameters = dict(module.double().named_parameters()) | {"table": table.double().weight}
    for parameter in parameters.values():
        parameter.data.normal_(generator=generator)
    return parameters


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_BTD, e_BTD = torch.randn(2, 2, 5, 14, generator=generator, dtype=torch.float64)
    return x_BTD, torch.randint(9, (2, 5, 1), generator=generator), e_BTD


def by_token(one: Any, *batches: Tensor) -> Tensor:
    rows = [torch.stack([one(*(batch[b, t] for batch in batches)) for t in range(5)]) for b in range(2)]
    return torch.stack(rows)


def test_stem_multiplies_the_gate_by_the_row_of_the_token() -> None:
    table = MemoryTable(9, 6)
    module = Stem(table, 14)
    weight, (x_BTD, ids_BT1, _) = random(module, table), inputs()
    expected = by_token(
        lambda x, i: weight["w2.weight"] @ (silu(weight["w1.weight"] @ x) * weight["table"][int(i)]), x_BTD, ids_BT1
    )
    torch.testing.assert_close(module(x_BTD, ids_BT1), expected)


def test_a_per_layer_embedding_mixes_row_and_context_and_norms_what_it_adds() -> None:
    table = MemoryTable(9, 6)
    module = PerLayerEmbedding(table, 14, layers=3)
    weight, (x_BTD, ids_BT1, e_BTD) = random(module, table), inputs()

    def one(x: Tensor, i: Tensor, e: Tensor) -> Tensor:
        context = norm(weight["context.weight"] @ e, weight["context_norm.weight"])
        p = (context + weight["table"][int(i)] * math.sqrt(6)) / math.sqrt(2)
        return norm(weight["up.weight"] @ (gelu(weight["gate.weight"] @ x) * p), weight["up_norm.weight"])

    torch.testing.assert_close(module(x_BTD, ids_BT1, e_BTD), by_token(one, x_BTD, ids_BT1, e_BTD))


def test_a_value_embedding_is_gated_for_each_head_by_the_first_channels() -> None:
    table = MemoryTable(9, 8)
    module = ValueEmbedding(table, 14, kv_heads=2)
    weight, (x_BTD, ids_BT1, _) = random(module, table), inputs()

    def one(x: Tensor, i: Tensor) -> Tensor:
        gates = 3 / (1 + torch.exp(-(weight["gate.weight"] @ x[:12])))
        return torch.cat([gates[head] * weight["table"][int(i), 4 * head : 4 * head + 4] for head in (0, 1)])

    torch.testing.assert_close(module(x_BTD, ids_BT1), by_token(one, x_BTD, ids_BT1))


def test_tails_stand_before_the_attention_of_the_next_layer_and_the_last_next_to_its_feed_forward() -> None:
    names = {name for name in model("token_table tails").attached() if not name.endswith("feed_forward")}
    assert names == {*(f"layers.{layer}.before_attention" for layer in (1, 2, 3)), "layers.3.skip"}


@pytest.mark.parametrize(
    ("form", "layers", "expected"),
    [
        ("stem", 4, (1, 2, 3)),
        ("per_layer_embedding", 4, (0, 1, 2, 3)),
        ("value_embedding", 4, (1, 3)),
        ("value_embedding", 5, (0, 2, 4)),
    ],
)
def test_default_placement(form: str, layers: int, expected: tuple[int, ...]) -> None:
    assert config("token_table", form=form, layers=layers).memory_placement == expected


def test_sizes_are_the_published_ones() -> None:
    """Gemma 3n: 262,144 rows of 256 in 30 and 35 layers are 2.01 and 2.35 billion parameters."""
    for layers, billions in ((30, 2.01), (35, 2.35)):
        gemma = config("token_table", base="1.3b", form="per_layer_embedding", layers=layers)
        counted = account(gemma, 262_144, 64)
        assert counted.params_memory / 1e9 == pytest.approx(billions, abs=0.005)
        assert counted.memory_rows == 262_144


def test_stem_has_no_up_projection_and_a_dense_model_has_a_third_more_feed_forward() -> None:
    net = model("token_table stem")
    names = {name for name, _ in net.named_parameters() if name.startswith("layers.1.feed_forward.")}
    assert names == {"layers.1.feed_forward.w1.weight", "layers.1.feed_forward.w2.weight"}
    stem, dense = (account(config(case), VOCAB, 64).macs_per_token["ffn"] for case in ("token_table stem", "dense"))
    assert stem == dense * (1 + 3 * 2 / 3) / 4


def test_the_row_is_that_of_the_token_at_every_position() -> None:
    net, read = model("token_table values").eval(), []
    net.memory_tables()[0].before_read.append(lambda rows_N1: read.append(rows_N1))
    token_BT = tokens(2, 7)
    net(token_BT)
    assert torch.equal(read[0].view(2, 7), token_BT)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"row_width": 4}, "row_width"),
        ({"placement": (3, 4)}, "placement"),
        ({"layers": 1}, "placement"),
        ({"form": "value_embedding", "control": "dense"}, "control"),
    ],
)
def test_invalid_options_name_the_field(options: dict[str, Any], field: str) -> None:
    assert [problem[0] for problem in config("token_table", **options).problems()] == [field]
