"""Mixtures of experts compared with plain loops."""

from __future__ import annotations

import torch
from model_families import model, tokens
from torch.nn import functional as F

from suite.models.moe import ExpertChoice, Experts, TokenChoice


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(0.0, 0.5, generator=generator)
    return module


def one_expert(experts: Experts, expert: int, x_D: torch.Tensor) -> torch.Tensor:
    w1, w2, w3 = experts.w1[expert], experts.w2[expert], experts.w3[expert]
    return w2 @ (F.silu(w1 @ x_D) * (w3 @ x_D))


def choices_by_loop(layer: ExpertChoice, x_TD: torch.Tensor, capacity: int) -> torch.Tensor:
    gate_TE = torch.softmax(x_TD @ layer.router.weight.T, dim=1)
    y_TD = torch.zeros_like(x_TD)
    for expert in range(layer.experts.count):
        chosen = sorted(range(len(x_TD)), key=lambda t, e=expert: -gate_TE[t, e].item())[:capacity]
        for token in chosen:
            y_TD[token] = y_TD[token] + gate_TE[token, expert] * one_expert(layer.experts, expert, x_TD[token])
    return y_TD


def test_expert_choice_equals_a_loop_over_rows_and_experts():
    layer = randomise(ExpertChoice(dim=12, hidden=20, experts=5)).train()
    x_BTD = torch.randn(3, 13, 12, generator=torch.Generator().manual_seed(1))
    expected = torch.stack([choices_by_loop(layer, x_TD, capacity=3) for x_TD in x_BTD])
    torch.testing.assert_close(layer(x_BTD), expected, rtol=1e-4, atol=1e-5)


def test_expert_choice_gradients_equal_those_of_the_loop():
    layer = randomise(ExpertChoice(dim=6, hidden=10, experts=3)).train()
    x_BTD = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(1))
    layer(x_BTD).square().sum().backward()
    got = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    torch.stack([choices_by_loop(layer, x_TD, capacity=3) for x_TD in x_BTD]).square().sum().backward()
    for a, b in zip(got, [p.grad for p in layer.parameters()], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_tokens_that_no_expert_chooses_have_zero_output():
    layer = randomise(ExpertChoice(dim=4, hidden=8, experts=2)).train()
    layer.router.weight.data[1] = layer.router.weight.data[0]  # equal gates: both experts choose the same half
    x_BTD = torch.randn(1, 8, 4)
    assert int((layer(x_BTD) == 0).all(-1).sum()) == 4


def test_top_1_equals_a_loop_over_tokens():
    layer = randomise(ExpertChoice(dim=12, hidden=20, experts=5)).eval()
    x_BTD = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(1))
    expected = torch.zeros_like(x_BTD)
    for b in range(2):
        for t in range(9):
            gate_E = torch.softmax(layer.router.weight @ x_BTD[b, t], dim=0)
            best = int(gate_E.argmax())
            expected[b, t] = gate_E[best] * one_expert(layer.experts, best, x_BTD[b, t])
    torch.testing.assert_close(layer(x_BTD), expected, rtol=1e-4, atol=1e-5)


def token_choice_by_loop(layer: TokenChoice, x_D: torch.Tensor) -> torch.Tensor:
    affinity_E = torch.sigmoid(layer.router.weight @ x_D)
    order = sorted(range(layer.experts.count), key=lambda e: -(affinity_E[e] + layer.balance_E[e]).item())
    chosen = order[: layer.top_k]
    total = sum(affinity_E[e] for e in chosen)
    y_D = sum(affinity_E[e] / total * one_expert(layer.experts, e, x_D) for e in chosen)
    return y_D if layer.shared is None else y_D + layer.shared(x_D)


def test_token_choice_equals_a_loop_over_tokens():
    for shared_hidden in (0, 14):
        layer = TokenChoice(12, 8, experts=6, top_k=3, shared_hidden=shared_hidden, balance_rate=0.1)
        randomise(layer)
        layer.balance_E[:] = torch.linspace(-0.5, 0.5, 6)
        x_BTD = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y_BTD = layer(x_BTD)
        y_BTD.square().sum().backward()
        got = [x_BTD.grad.clone()] + [p.grad.clone() for p in layer.parameters()]
        x_BTD.grad = None
        layer.zero_grad()
        expected = torch.stack([token_choice_by_loop(layer, x) for x in x_BTD.view(-1, 12)]).view(2, 9, 12)
        torch.testing.assert_close(y_BTD, expected, rtol=1e-4, atol=1e-5)
        expected.square().sum().backward()
        for a, b in zip(got, [x_BTD.grad] + [p.grad for p in layer.parameters()], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def worst_share(layer: TokenChoice, x_BTD: torch.Tensor) -> float:
    """Return the load of the busiest expert relative to the mean load."""
    layer(x_BTD)
    share = float(layer.load_E.max() / layer.load_E.mean())
    layer.load_E.zero_()
    return share


def test_the_bias_balances_experts_with_very_unequal_load():
    layer = TokenChoice(16, 8, experts=16, top_k=4, shared_hidden=0, balance_rate=1e-2)
    randomise(layer)
    generator = torch.Generator().manual_seed(3)
    fixed = 1.5 * torch.ones(16) + torch.randn(4, 128, 16, generator=generator)
    before = worst_share(layer, fixed)
    for _ in range(300):
        layer(1.5 * torch.ones(16) + torch.randn(4, 128, 16, generator=generator))
        layer.after_step()
    after = worst_share(layer, fixed)
    assert before > 2.5
    assert after < 1.3


def test_the_bias_moves_by_its_rate_towards_idle_experts_and_counts_over_micro_batches():
    layer = randomise(TokenChoice(8, 4, experts=4, top_k=1, shared_hidden=0, balance_rate=0.25))
    layer(torch.randn(1, 5, 8))
    layer(torch.randn(1, 3, 8))
    load_E = layer.load_E.clone()
    assert load_E.sum() == 8
    layer.after_step()
    assert torch.equal(layer.balance_E, 0.25 * torch.sign(2.0 - load_E))
    assert not layer.load_E.any()
    layer.eval()(torch.randn(1, 5, 8))
    assert not layer.load_E.any()


def test_the_balance_is_saved_with_the_weights():
    net = model("moe_topk")
    net(tokens(2, 20))
    net.after_step()
    saved = {name for name, value in net.state_dict().items() if "balance_E" in name and value.any()}
    assert len(saved) == net.size.layers
