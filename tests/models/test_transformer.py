"""The transformer compared with a naive float64 version, and properties of every family."""

from __future__ import annotations

import pytest
import torch
from model_families import OPTIONS, VOCAB, config, model, tokens
from torch.nn import functional as F

from suite.models import Transformer, build

every_family = pytest.mark.parametrize("case", list(OPTIONS))


def naive_llama(model: Transformer, token_T: torch.Tensor) -> torch.Tensor:
    """Return the logits of one document in float64, token by token and head by head, with complex rotary pairs."""
    size, weight = model.size, {name: p.detach().double() for name, p in model.named_parameters()}
    width, group = size.head_dim, size.heads // size.kv_heads

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight[name]

    def rotated(x_TK):
        pairs = torch.complex(x_TK[:, : width // 2], x_TK[:, width // 2 :])
        frequency = size.rope_theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        rotated_pairs = pairs * torch.exp(1j * torch.arange(len(x_TK)).double()[:, None] * frequency)
        return torch.cat((rotated_pairs.real, rotated_pairs.imag), 1)

    x = weight["embedding.weight"][token_T]
    for layer in range(size.layers):
        at = f"layers.{layer}."
        h = norm(x, at + "attention_norm.weight")
        q, k, v = (h @ weight[f"{at}attention.{name}.weight"].T for name in ("wq", "wk", "wv"))
        heads = []
        for head in range(size.heads):
            own, shared = slice(head * width, (head + 1) * width), head // group
            kv = slice(shared * width, (shared + 1) * width)
            score = rotated(q[:, own]) @ rotated(k[:, kv]).T / width**0.5
            future = torch.ones_like(score, dtype=torch.bool).triu(1)
            heads.append(score.masked_fill(future, -torch.inf).softmax(-1) @ v[:, kv])
        x = x + torch.cat(heads, 1) @ weight[at + "attention.wo.weight"].T
        h = norm(x, at + "feed_forward_norm.weight")
        w1, w2, w3 = (weight[f"{at}feed_forward.{name}.weight"] for name in ("w1", "w2", "w3"))
        x = x + (F.silu(h @ w1.T) * (h @ w3.T)) @ w2.T
    return norm(x, "norm.weight") @ weight["output.weight"].T


@pytest.mark.parametrize(
    "shape", [{}, {"heads": 4, "kv_heads": 2}, {"layers": 2, "dim": 48, "heads": 3, "kv_heads": 1}]
)
def test_dense_equals_a_naive_float64_version(shape):
    dense, token_BT = model("dense", **shape), tokens(2, 17)
    expected = torch.stack([naive_llama(dense, row) for row in token_BT])
    torch.testing.assert_close(dense(token_BT), expected.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dense.double()(token_BT), expected, rtol=1e-5, atol=1e-5)


@every_family
def test_earlier_logits_ignore_later_tokens_and_other_rows(case):
    net, token_BT = model(case).eval(), tokens(3, 40)
    logits = net(token_BT)
    changed = token_BT.clone()
    changed[0, 25:] = tokens(15, seed=1)
    changed[1:] = tokens(2, 40, seed=2)
    torch.testing.assert_close(net(changed)[0, :25], logits[0, :25], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(net(changed)[0, 25:], logits[0, 25:], atol=1e-3)


@every_family
def test_segments_equal_documents_run_alone(case):
    net, parts = model(case).eval(), (13, 1, 20)
    token_BT = tokens(2, sum(parts))
    segments_BT = torch.repeat_interleave(torch.arange(3), torch.tensor(parts)).expand(2, -1)
    alone = torch.cat([net(part) for part in token_BT.split(parts, dim=1)], dim=1)
    torch.testing.assert_close(net(token_BT, segments_BT), alone, rtol=1e-4, atol=1e-5)


@every_family
def test_decoding_with_a_cache_equals_the_whole_forward(case):
    net, token_BT = model(case).eval(), tokens(2, 24)
    cache = net.new_cache(2, 24)
    steps = [net(part, cache=cache) for part in token_BT.split([9, 1, 1, 8, 1, 4], dim=1)]
    assert cache.length == 24
    torch.testing.assert_close(torch.cat(steps, 1), net(token_BT), rtol=1e-4, atol=1e-5)


@every_family
def test_left_padding_does_not_change_logits_with_or_without_a_cache(case):
    net = model(case).eval()
    short, full = tokens(1, 11), tokens(1, 16, seed=1)
    padded = torch.cat((torch.cat((torch.zeros(1, 5, dtype=torch.int64), short), 1), full))
    pad_B = torch.tensor([5, 0])
    expected = net(short)[0], net(full)[0]
    cache = net.new_cache(2, 16)
    cached = [net(part, cache=cache, pad_B=pad_B) for part in padded.split([9, 1, 6], dim=1)]
    for logits in (net(padded, pad_B=pad_B), torch.cat(cached, 1)):
        assert logits.isfinite().all()
        torch.testing.assert_close(logits[0, 5:], expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits[1], expected[1], rtol=1e-4, atol=1e-5)


def test_cache_select_retains_the_selected_rows():
    net, token_BT = model("dense").eval(), tokens(3, 12)
    cache = net.new_cache(3, 12)
    net(token_BT[:, :8], cache=cache)
    cache.select(torch.tensor([2, 0, 2]))
    logits = net(token_BT[[2, 0, 2], 8:], cache=cache)
    torch.testing.assert_close(logits, net(token_BT)[[2, 0, 2], 8:], rtol=1e-4, atol=1e-5)


def test_segments_together_with_a_cache_raise_an_error():
    net, token_BT = model("dense"), tokens(1, 4)
    with pytest.raises(ValueError, match="segments"):
        net(token_BT, segments_BT=token_BT, cache=net.new_cache(1, 4))


def train(net: Transformer, steps: int) -> list[torch.Tensor]:
    token_BT = tokens(4, 33, seed=9)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(steps):
        F.cross_entropy(net(token_BT[:, :-1]).flatten(0, 1), token_BT[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        net.after_step()
    return [tensor.detach().clone() for tensor in net.state_dict().values()]


@every_family
def test_training_is_bitwise_reproducible(case):
    first, second = train(model(case), 3), train(model(case), 3)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_family
def test_every_parameter_gets_a_gradient_and_the_loss_falls(case):
    net, token_BT = model(case), tokens(4, 33)
    F.cross_entropy(net(token_BT[:, :-1]).flatten(0, 1), token_BT[:, 1:].flatten()).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []

    def loss() -> torch.Tensor:
        token_BT = tokens(4, 33, seed=9)
        with torch.no_grad():
            return F.cross_entropy(net.eval()(token_BT[:, :-1]).flatten(0, 1), token_BT[:, 1:].flatten())

    before = loss()
    train(net.train(), 20)
    assert loss() < before - 0.5


@every_family
def test_two_models_in_one_process_share_no_state(case):
    net, other = model(case), model(case, seed=1)
    before = [tensor.clone() for tensor in other.state_dict().values()]
    train(net, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, other.state_dict().values(), strict=True))
    storages = [{tensor.data_ptr() for tensor in m.state_dict().values()} for m in (net, other)]
    assert not storages[0] & storages[1]
    assert all(first is not second for first in net.tables for second in other.tables)


@every_family
def test_shared_parameters_start_equal_in_all_families(case):
    dense, net = dict(model("dense").named_parameters()), dict(model(case).named_parameters())
    shared = dense.keys() & net.keys()
    assert {"embedding.weight", "output.weight", "layers.2.attention.wq.weight"} <= shared
    assert all(torch.equal(dense[name], net[name]) for name in shared)
    other = dict(model(case, seed=1).named_parameters())
    assert not torch.equal(other["embedding.weight"], net["embedding.weight"])


@every_family
def test_a_state_dict_restores_the_model(case):
    net, other, token_BT = model(case).eval(), model(case, seed=1).eval(), tokens(1, 9)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(token_BT), net(token_BT))


@every_family
def test_bf16_autocast_stays_near_fp32(case):
    net, token_BT = model(case).eval(), tokens(2, 20)
    segments_BT = (torch.arange(20) > 9).long().expand(2, -1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(token_BT, segments_BT)
        cache = net.new_cache(2, 20)
        stepped = [net(part, cache=cache) for part in token_BT.split([12, 8], dim=1)]
    error = (logits.float() - net(token_BT, segments_BT)).abs().mean()
    assert error < 0.1
    assert torch.cat(stepped, 1).isfinite().all()


def test_embeddings_can_be_tied():
    net = model("dense", tie_embeddings=True)
    assert "output.weight" not in dict(net.named_parameters())
    x_BTD = net.hidden(tokens(1, 5))
    torch.testing.assert_close(net.head(x_BTD), x_BTD @ net.embedding.weight.T)


def test_the_meta_device_needs_no_memory():
    with torch.device("meta"):
        net = build(config("memory_plus", base="8b", half_keys=4096), 128256, seed=0)
    assert all(parameter.is_meta for parameter in net.parameters())


@pytest.mark.parametrize(
    ("case", "fields", "field"),
    [
        ("dense", {"base": "7b"}, "base"),
        ("dense", {"heads": 3}, "dim"),
        ("dense", {"heads": 4, "kv_heads": 3}, "kv_heads"),
        ("pkm", {"half_keys": 7}, "half_keys"),
        ("pkm", {"k_dim": 9}, "k_dim"),
        ("memory_plus", {"placement": (1, 4)}, "placement"),
        ("memory_plus", {"placement": (2, 2)}, "placement"),
        ("memory_plus", {"layers": 1}, "placement"),
        ("moe_topk", {"top_k": 17}, "top_k"),
    ],
)
def test_invalid_configurations_name_the_field(case, fields, field):
    bad = config(case, **fields)
    assert [problem[0] for problem in bad.problems()] == [field]
    with pytest.raises(ValueError, match=f"^{field}: got"):
        build(bad, VOCAB, 0)
