"""UltraMemV2 compared with a naive float64 version, and its pool with the published one."""

from __future__ import annotations

import itertools

import pytest
import torch
from model_families import config, model

from suite.models.accounting import account
from suite.models.lookup.ultramem import TuckerMemory, leading_directions
from suite.models.memory_table import MemoryTable


def naive_memory(weight: dict[str, torch.Tensor], layer: TuckerMemory, x: torch.Tensor) -> torch.Tensor:
    """Run one token through the layer, key by key and pair by pair."""
    n, width, top_k, pool = layer.half_keys, layer.width, layer.top_k, len(weight["table0"])

    def norm(vector: torch.Tensor, gain: str) -> torch.Tensor:
        centred = vector - vector.mean()
        return centred / (centred.square().mean() + 1e-5).sqrt() * weight[gain]

    queries = (weight["query.weight"] @ x).view(layer.heads, 2, 2, width)
    p = weight["factor.weight"] @ x
    parts = [torch.zeros(weight[f"table{core + 1}"].shape[1], dtype=x.dtype) for core in (0, 1)]
    for head in range(layer.heads):
        scores = torch.empty(2, n, 2, dtype=x.dtype)
        for side, key, rank in itertools.product(range(2), range(n), range(2)):
            query = norm(queries[head, side, rank], "query_norm.weight")
            scores[side, key, rank] = query @ norm(weight["keys"][head, side, rank, key], "key_norm.weight")
        left, _, right = torch.linalg.svd(weight["cores"][head].sum(0).detach())
        directions = torch.stack((left[:, 0], right[0])) * left[:, 0].sum().sign()
        halves = [(scores[side].detach() @ directions[side]).topk(top_k).indices.tolist() for side in (0, 1)]
        pairs = []
        for i in halves[0]:
            for j in halves[1]:
                by_core = [scores[0, i] @ weight["cores"][head, core] @ scores[1, j] for core in (0, 1)]
                pairs.append((i, j, by_core))
        pairs.sort(key=lambda pair: -(pair[2][0] + pair[2][1]).item())
        for i, j, by_core in pairs[:top_k]:
            row = (layer.first + int(layer.order_R[i * n + j])) % pool
            factor = p @ weight["table0"][row]
            for core in (0, 1):
                parts[core] = parts[core] + factor * by_core[core] * weight[f"table{core + 1}"][row]
    return weight["out.weight"] @ torch.cat(parts)


def test_scoring_and_pooling_equal_a_naive_version_with_their_gradients() -> None:
    generator = torch.Generator().manual_seed(1)
    tables = [MemoryTable(150, width) for width in (7, 3, 3)]
    layer = TuckerMemory(tables, dim=12, half_keys=9, heads=2, top_k=4, k_dim=10, first=100, seed=3).double()
    names = [f"table{number}" for number in range(3)]
    parameters = dict(layer.named_parameters()) | {
        name: table.double().weight for name, table in zip(names, tables, strict=True)
    }
    for parameter in parameters.values():
        parameter.data.normal_(generator=generator)
    layer.cores.data.uniform_(generator=generator)
    x_BTD = torch.randn(2, 3, 12, generator=generator, dtype=torch.float64).requires_grad_()
    expected = torch.stack([naive_memory(parameters, layer, x) for x in x_BTD.view(-1, 12)]).view_as(x_BTD)
    got = layer(x_BTD)
    torch.testing.assert_close(got, expected)
    inputs = [x_BTD, *parameters.values()]
    grad_BTD = torch.randn(2, 3, 12, generator=generator, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(y, inputs, grad_BTD) for y in (got, expected))
    for name, a, b in zip(["x", *parameters], ours, theirs, strict=True):
        torch.testing.assert_close(a, b, msg=name)
        assert a.any(), name


def test_the_leading_directions_are_singular_vectors() -> None:
    cores_MRR = torch.randn(50, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, singular, _ = torch.linalg.svd(cores_MRR)
    ours = leading_directions(cores_MRR)
    assert (ours[:, 0].sum(-1) > 0).all()
    torch.testing.assert_close((ours[:, 0] * left[:, :, 0]).sum(-1).abs(), torch.ones(50).double())
    products = torch.einsum("mr,mrs,ms->m", ours[:, 0], cores_MRR, ours[:, 1])
    torch.testing.assert_close(products, singular[:, 0])  # not its negative: the signs belong together


def test_layers_read_overlapping_parts_of_one_pool_each_in_an_order_of_its_own() -> None:
    net = model("ultramem_v2", half_keys=6, share_ratio=0.5, top_k=4)
    assert [tuple(table.weight.shape) for table in net.memory_tables()] == [(144, 8), (144, 4), (144, 4)]
    layers = list(net.memory_layers().values())
    assert [layer.half_keys for layer in layers] == [8] * 4  # floor(sqrt(144 / 2))
    orders = set()
    for number, layer in enumerate(layers):
        rows = layer.rows_of(torch.arange(64))
        assert sorted(rows.tolist()) == sorted((36 * number + row) % 144 for row in range(64))
        orders.add(tuple(layer.order_R.tolist()))
        assert all(one is other for one, other in zip(layer.tables, layers[0].tables, strict=True))
    assert len(orders) == 4


def test_values_and_factors_start_with_the_published_spread() -> None:
    net = model("ultramem_v2", half_keys=64)
    assert [table.weight.std().item() for table in net.memory_tables()] == pytest.approx([0.02] * 3, rel=0.02)


def test_the_pool_of_the_released_model_and_of_a_memory_plus_next_to_it_have_equal_size() -> None:
    """227M: 360 keys, 20 layers, rows of 192 + 192; Memory+ has 1138 keys and rows of 768, feed-forwards retained."""
    shape = {"base": "134m", "layers": 20, "dim": 768}
    ultramem = config("ultramem_v2", **shape, half_keys=360)
    assert (ultramem.pool_rows, ultramem.layer_keys, ultramem.widths) == (2_592_000, 1138, (384, 192, 192))
    pool = account(ultramem, 50_280, 4096).params_memory
    assert pool == pytest.approx(0.995e9, rel=1e-3)
    beside = {"keep_ffn": True, "qk_norm": True, "placement": tuple(range(20))}
    memory_plus = account(config("memory_plus", **shape, half_keys=1138, **beside), 50_280, 4096)
    assert memory_plus.params_memory == pytest.approx(pool, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"half_keys": 2}, "half_keys"),
        ({"k_dim": 7}, "k_dim"),
        ({"value_dim": 5}, "value_dim"),
        ({"placement": (1, 4)}, "placement"),
    ],
)
def test_invalid_options_name_the_field(options: dict, field: str) -> None:
    assert [problem[0] for problem in config("ultramem_v2", **options).problems()] == [field]
