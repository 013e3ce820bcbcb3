"""PEER compared with a naive float64 version, and inner products of rows and tokens with einsum."""

from __future__ import annotations

import pytest
import torch
from model_families import model, tokens
from torch.nn import functional as F

from suite.models import memory_table
from suite.models.memory_table import MemoryTable
from suite.models.peer import Peer
from suite.models.product_key import Addressing


def naive_peer(weight: dict[str, torch.Tensor], layer: Peer, x: torch.Tensor) -> torch.Tensor:
    """Run one token through the layer, expert by expert."""
    n, half = layer.half_keys, layer.k_dim // 2
    query = (weight["query.weight"] @ x + weight["query.bias"]).view(layer.heads, 2, half)
    y = torch.zeros_like(x)
    for head in range(layer.heads):
        first, second = (weight["keys"][head, side] @ query[head, side] for side in (0, 1))
        best = (first[:, None] + second[None, :]).view(n * n).topk(layer.top_k)
        for score, expert in zip(best.values.softmax(0), best.indices, strict=True):
            y = y + score * F.gelu(weight["u"][expert] @ x) * weight["v"][expert]
    return y


def test_peer_outputs_and_gradients_equal_a_naive_float64_version():
    generator = torch.Generator().manual_seed(1)
    u, v = MemoryTable(9 * 9, 12), MemoryTable(9 * 9, 12)
    layer = Peer(u, v, Addressing(half_keys=9, heads=2, top_k=5, k_dim=6))
    parameters = dict(layer.named_parameters()) | {"u": u.weight, "v": v.weight}
    for parameter in parameters.values():
        parameter.data.normal_(generator=generator)
    x_BTD = torch.randn(2, 5, 12, generator=generator).requires_grad_()
    grad_BTD = torch.randn(2, 5, 12, generator=generator)

    exact = {name: p.detach().double().requires_grad_() for name, p in parameters.items()}
    x_exact = x_BTD.detach().double().requires_grad_()
    y_exact = torch.stack([naive_peer(exact, layer, x) for x in x_exact.view(-1, 12)]).view(2, 5, 12)
    (y_exact * grad_BTD).sum().backward()
    y_BTD = layer(x_BTD)
    (y_BTD * grad_BTD).sum().backward()

    torch.testing.assert_close(y_BTD.double(), y_exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x_BTD.grad.double(), x_exact.grad, rtol=1e-3, atol=1e-4)
    for name, parameter in parameters.items():
        scale = exact[name].grad.abs().max()
        assert (parameter.grad.double() - exact[name].grad).abs().max() < 1e-4 * scale, name


@pytest.mark.parametrize("at_once", [1, 60, 1 << 24])
def test_products_computed_in_parts_equal_the_einsum(monkeypatch, at_once):
    monkeypatch.setattr(memory_table, "ROWS_AT_ONCE", at_once)
    table = MemoryTable(30, 5)
    torch.nn.init.normal_(table.weight)
    rows_NS = torch.randint(30, (7, 4))
    x_ND = torch.randn(7, 5, requires_grad=True)
    products_NS = table.products(rows_NS, x_ND)
    grad_NS = torch.randn(7, 4)
    ours = torch.autograd.grad(products_NS, (table.weight, x_ND), grad_NS)
    plain_NS = torch.einsum("nsd,nd->ns", table.weight[rows_NS], x_ND)
    torch.testing.assert_close(products_NS, plain_NS)
    for mine, expected in zip(ours, torch.autograd.grad(plain_NS, (table.weight, x_ND), grad_NS), strict=True):
        torch.testing.assert_close(mine, expected)


def test_both_tables_are_value_tables_and_call_their_listeners():
    net = model("peer")
    down, up = net.memory_tables()
    read: list[str] = []
    down.before_read.append(lambda rows: read.append("down"))
    up.before_read.append(lambda rows: read.append("up"))
    net(tokens(1, 5))
    assert read == ["down", "up"]
