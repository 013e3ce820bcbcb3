"""Product keys: the search compared with all n*n sums, the layer with a naive float64 version."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_families import VOCAB, config, model, tokens

from kernels.product_key import product_key
from suite.models.accounting import account
from suite.models.feedforward import SwiGLUPlusMemory
from suite.models.memory_table import MemoryTable
from suite.models.product_key import Addressing, ProductKeyMemory


def search(scores_M2Nn: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Search half scores: one-hot queries select them from the keys unchanged."""
    heads, _, queries, _ = scores_M2Nn.shape
    one_hot = torch.eye(queries, dtype=scores_M2Nn.dtype)
    return product_key(one_hot[:, None, None].expand(-1, heads, 2, -1), scores_M2Nn.mT.contiguous(), top_k)


def brute_force(first: torch.Tensor, second: torch.Tensor, top_k: int) -> list[int]:
    """Return the rows of the top_k of all n*n sums, with ties in the documented order (stable sorts)."""
    i, j = (half.argsort(descending=True, stable=True) for half in (first, second))
    sums = (first[i, None] + second[None, j]).flatten()
    rows = (i[:, None] * len(first) + j[None, :]).flatten()
    return rows[sums.argsort(descending=True, stable=True)[:top_k]].tolist()


coarse = st.integers(-3, 3).map(lambda value: value / 2)  # many exact ties
fine = st.floats(-1e4, 1e4, width=32)
extreme = st.sampled_from([-3e38, -1.0, -1e-40, -0.0, 0.0, 1e-40, 1.0, 1e8, 3e38])


@settings(max_examples=300, deadline=None)
@given(data=st.data(), values=st.sampled_from([coarse, fine, extreme]), n=st.integers(1, 40))
def test_search_equals_brute_force_over_all_sums(data, values, n):
    top_k = data.draw(st.integers(1, n))
    half = st.lists(values, min_size=n, max_size=n)
    first, second = torch.tensor(data.draw(half)), torch.tensor(data.draw(half))
    rows, scores = search(torch.stack((first, second))[None, :, None], top_k)
    rows, scores = rows[0], scores[0]
    assert rows[0].tolist() == brute_force(first, second, top_k)
    assert torch.equal(scores[0], first[rows[0] // n] + second[rows[0] % n])


@pytest.mark.parametrize(("n", "top_k"), [(32, 32), (100, 32), (257, 16), (1024, 32)])
def test_search_over_many_queries_equals_brute_force(n, top_k):
    scores = torch.randn(3, 2, 5, n, generator=torch.Generator().manual_seed(0))
    rows, _ = search(scores, top_k)
    for head in range(3):
        for query in range(5):
            assert rows[head, query].tolist() == brute_force(*scores[head, :, query], top_k)


@pytest.mark.parametrize(("dtype", "wide"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)])
def test_scores_are_at_least_fp32_for_any_dtype_of_keys(dtype, wide):
    scores_2Nn = torch.randn(2, 4, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows, scores = (part[0] for part in search(scores_2Nn[None], 6))
    assert scores.dtype == wide
    expected = (scores_2Nn[0].to(wide)[:, :, None] + scores_2Nn[1].to(wide)[:, None]).flatten(1)
    torch.testing.assert_close(expected.gather(1, rows), expected.topk(6).values)


def naive_memory(weight: dict[str, torch.Tensor], memory: ProductKeyMemory, x: torch.Tensor) -> torch.Tensor:
    """Run one token through the layer with all n*n scores of each head, in the dtype of the weights."""
    n, heads, half = memory.half_keys, memory.heads, memory.k_dim // 2
    query = (weight["query.weight"] @ x + weight["query.bias"]).view(heads, 2, half)
    keys = weight["keys"]
    if memory.query_norm is not None:

        def norm(z, name):
            return z / (z.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight[name]

        query = norm(query, "query_norm.weight") / half**0.5
        keys = norm(keys, "key_norm.weight")
    y = torch.zeros_like(weight["table"][0])
    for head in range(heads):
        first, second = keys[head, 0] @ query[head, 0], keys[head, 1] @ query[head, 1]
        best = (first[:, None] + second[None, :]).view(n * n).topk(memory.top_k)
        scores, rows = best.values, weight["table"][best.indices]
        if "sink_keys" in weight:
            scores = torch.cat((scores, (weight["sink_keys"][head] @ query[head].flatten())[None]))
            rows = torch.cat((rows, weight["sink_value"]))
        y = y + scores.softmax(0) @ rows
    if memory.gate is not None:
        gate = weight["gate.weight"] @ x + weight["gate.bias"]
        y = y * gate * torch.sigmoid(gate)
    if memory.out is not None:
        y = weight["out.weight"] @ y + weight["out.bias"]
    if memory.scalar_gate is not None:
        y = y * torch.sigmoid(weight["scalar_gate.weight"] @ x + weight["scalar_gate.bias"])
    return y


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qk_norm": True},
        {"swilu": True},
        {"qk_norm": True, "swilu": True},
        {"value_dim": 8},
        {"value_dim": 28, "swilu": True},
        {"scalar_gate": True},
        {"sink": True},
        {"sink": True, "qk_norm": True, "value_dim": 12, "scalar_gate": True},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_memory_outputs_and_gradients_equal_a_naive_float64_version(options):
    options = dict(options)
    generator = torch.Generator().manual_seed(1)
    table = MemoryTable(11 * 11, options.pop("value_dim", 20))
    addressing = Addressing(half_keys=11, heads=3, top_k=7, k_dim=10, qk_norm=options.pop("qk_norm", False))
    memory = ProductKeyMemory(table, 20, addressing, **options)
    parameters = dict(memory.named_parameters()) | {"table": table.weight}
    for parameter in parameters.values():
        parameter.data.normal_(generator=generator)
    x_BTD = torch.randn(2, 6, 20, generator=generator).requires_grad_()
    grad_BTD = torch.randn(2, 6, 20, generator=generator)

    exact = {name: p.detach().double().requires_grad_() for name, p in parameters.items()}
    x_exact = x_BTD.detach().double().requires_grad_()
    y_exact = torch.stack([naive_memory(exact, memory, x) for x in x_exact.view(-1, 20)]).view(2, 6, 20)
    (y_exact * grad_BTD).sum().backward()
    y_BTD = memory(x_BTD)
    (y_BTD * grad_BTD).sum().backward()

    torch.testing.assert_close(y_BTD.double(), y_exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x_BTD.grad.double(), x_exact.grad, rtol=1e-3, atol=1e-4)
    for name, parameter in parameters.items():
        scale = exact[name].grad.abs().max()
        error = (parameter.grad.double() - exact[name].grad).abs().max()
        assert error < 1e-4 * scale, name


def test_rows_not_read_get_no_gradient():
    net = model("pkm", half_keys=32, top_k=2)
    (table,) = net.memory_tables()
    read: list[torch.Tensor] = []
    table.before_read.append(read.append)
    net(tokens(1, 10)).square().mean().backward()
    rows = torch.cat([indices.flatten() for indices in read]).unique()
    assert len(read) == 1
    assert read[0].shape == (10, 4 * 2)
    assert torch.equal(table.weight.grad.abs().sum(1).nonzero().flatten(), rows)


def test_memory_plus_layers_share_one_table_and_have_their_own_keys():
    net = model("memory_plus")
    assert list(net.memory_layers()) == [1, 2, 3]
    assert [name for name, _ in net.named_parameters() if "table" in name] == ["tables.0.weight"]
    assert {id(layer.tables[0]) for layer in net.memory_layers().values()} == {id(net.memory_tables()[0])}
    keys = [layer.keys for layer in net.memory_layers().values()]
    assert not torch.equal(keys[0], keys[1])
    read: list[torch.Tensor] = []
    net.memory_tables()[0].before_read.append(read.append)
    net(tokens(1, 4))
    assert len(read) == 3


def test_without_sharing_every_layer_has_its_own_table():
    net = model("memory_plus", share=False)
    assert len(net.memory_tables()) == 3
    assert account(net.config, VOCAB, 8).params_memory == 3 * 16 * 16 * 32


def test_random_rows_are_read_only_in_training_with_their_true_scores():
    layer = model("pkm", random_rows=3).memory_layers()[2]
    x_ND = torch.randn(6, 32)
    q_NM2W = layer.queries(x_ND)
    rows, scores = layer.find(q_NM2W)
    every = torch.einsum("nmhw,mhkw->nmhk", q_NM2W, layer.keys)
    assert rows.shape == scores.shape == (4, 6, 8 + 3)
    for head in range(4):
        for token in range(6):
            first, second = rows[head, token] // 16, rows[head, token] % 16
            expected = every[token, head, 0][first] + every[token, head, 1][second]
            torch.testing.assert_close(scores[head, token], expected)
    again, _ = layer.find(q_NM2W)
    assert torch.equal(again[..., :8], rows[..., :8])
    assert not torch.equal(again[..., 8:], rows[..., 8:])
    assert layer.eval().find(q_NM2W)[0].shape == (4, 6, 8)


def test_query_batch_norm_uses_running_statistics_in_evaluation():
    layer = model("pkm", query_batchnorm=True).memory_layers()[2]
    plain = model("pkm").memory_layers()[2]
    x_ND = torch.randn(200, 32) * 3
    q = plain.query(x_ND)
    normed = (q - q.mean(0)) / (q.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(layer.queries(x_ND).flatten(1), normed, rtol=1e-4, atol=1e-4)
    running = 0.9 + 0.1 * q.var(0)
    expected = (q - 0.1 * q.mean(0)) / (running + 1e-5).sqrt()
    layer.eval()
    for part in (x_ND, x_ND[:1]):  # the result does not depend on the batch, and running statistics do not change
        torch.testing.assert_close(layer.queries(part).flatten(1), expected[: len(part)], rtol=1e-4, atol=1e-4)


def test_the_memory_can_be_added_to_the_feed_forward():
    net = model("memory_plus keep_ffn")
    layer = net.layers[1].feed_forward
    assert isinstance(layer, SwiGLUPlusMemory)
    x_BTD = torch.randn(1, 3, 32)
    dense = model("dense").layers[1].feed_forward
    torch.testing.assert_close(layer(x_BTD), dense(x_BTD) + layer.memory(x_BTD))


@pytest.mark.parametrize(
    ("family", "base", "placement"),
    [
        ("memory_plus", "134m", (2, 6, 10)),
        ("memory_plus", "373m", (4, 12, 20)),
        ("memory_plus", "1.3b", (3, 11, 19)),
        ("memory_plus", "8b", (8, 16, 24)),
        ("pkm", "373m", (12,)),
        ("pkm", "w32", (2,)),
    ],
)
def test_placement_follows_the_paper(family, base, placement):
    assert config(family, base=base).memory_placement == placement


def test_a_default_placement_that_a_shallow_model_lacks_is_named_as_such() -> None:
    of_paper = config("memory_plus", base="134m", layers=2)
    assert of_paper.problems() == [
        (
            "placement",
            (-3, 1, 5),
            "increasing layer numbers from 0 to 1 (it is the default of the family, for deeper models: state another)",
        )
    ]
    stated = config("memory_plus", base="134m", layers=2, placement=(2,))
    assert stated.problems() == [("placement", (2,), "increasing layer numbers from 0 to 1")]


def test_the_key_width_is_that_of_the_paper_and_at_most_half_the_model_on_laptop_bases():
    widths = {base: config("pkm", base=base).key_dim for base in ("134m", "1.3b", "8b", "w32", "w64")}
    assert widths == {"134m": 256, "1.3b": 256, "8b": 256, "w32": 16, "w64": 32}
    assert config("memory_plus", base="1.3b").key_dim == 1024
