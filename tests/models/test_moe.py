"""Mixtures of experts compared with plain loops."""

from __future__ import annotations

import pytest
import torch
from model_families import config, model, tokens
from naive_routing import auxiliary_by_loop
from torch.nn import functional as F

from suite.models import fused
from suite.models.moe import ExpertChoice, Experts, LossBalanced, TokenChoice


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


def softmax_choice_by_loop(layer: LossBalanced, x_D: torch.Tensor) -> torch.Tensor:
    gate_E = torch.softmax(layer.router.weight @ x_D, dim=0)
    chosen = sorted(range(layer.experts.count), key=lambda e: -gate_E[e].item())[: layer.top_k]
    return torch.stack([gate_E[e] * one_expert(layer.experts, e, x_D) for e in chosen]).sum(0)


def softmax_layer() -> LossBalanced:
    weights = {"balance_loss": 0.01, "z_loss": 0.001}
    layer = LossBalanced(12, 8, experts=6, top_k=3, shared_hidden=0, weights=weights).double()
    return randomise(layer)


def test_softmax_routing_equals_a_loop_over_tokens_and_does_not_normalise_the_chosen_gates() -> None:
    layer = softmax_layer()
    x_BTD = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.stack([softmax_choice_by_loop(layer, x) for x in x_BTD.view(-1, 12)]).view(2, 9, 12)
    torch.testing.assert_close(layer(x_BTD), expected)
    losses = {name: loss for name, (_, loss) in layer.auxiliary.items()}
    by_loop = auxiliary_by_loop(layer, x_BTD.view(-1, 12))
    for name, loss in by_loop.items():
        torch.testing.assert_close(losses[name], loss)
        got, want = (torch.autograd.grad(of[name], layer.router.weight, retain_graph=True) for of in (losses, by_loop))
        torch.testing.assert_close(got, want)


def test_the_balance_loss_is_one_for_equal_use_and_the_number_of_experts_for_one_expert() -> None:
    layer = LossBalanced(4, 8, experts=4, top_k=1, shared_hidden=0, weights={"balance_loss": 1.0, "z_loss": 0.0})
    randomise(layer)
    layer.router.weight.data = 100 * torch.eye(4)
    layer(torch.eye(4)[None])
    assert layer.auxiliary["balance_loss"][1].item() == 1.0
    layer(torch.eye(4)[:1].expand(3, -1)[None])
    assert layer.auxiliary["balance_loss"][1].item() == 4.0


def test_auxiliary_losses_exist_in_training_only_and_are_means_over_layers() -> None:
    net = model("moe_topk softmax")
    net.eval()(tokens(1, 8))
    assert net.auxiliary_losses() == {}
    net.train()(tokens(1, 8))
    of_layers = [layer.feed_forward.auxiliary["z_loss"][1].item() for layer in net.layers]
    weight, mean = net.auxiliary_losses()["z_loss"]
    assert (weight, mean.item()) == (1e-3, pytest.approx(sum(of_layers) / 4))
    net.after_step()
    assert net.auxiliary_losses() == {}
    assert model("moe_topk").train().auxiliary_losses() == {}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_grouped_products_equal_padded_ones_with_their_gradients(dtype: torch.dtype, tolerance: float) -> None:
    """On a CPU; the dtype on a GPU is bf16. One expert gets no token."""
    experts = randomise(Experts(5, 16, 24))
    generator = torch.Generator().manual_seed(1)
    x_ND = torch.randn(11, 16, generator=generator).requires_grad_()
    expert_NK = torch.tensor([[0, 1], [1, 4]])[torch.randint(2, (11,), generator=generator)]
    gradient_NKD = torch.randn(11, 2, 16, generator=generator)
    results = []
    for y_NKD in (experts.routed(x_ND, expert_NK), experts.grouped(x_ND, expert_NK, dtype)):
        results.append(
            (y_NKD, *torch.autograd.grad(y_NKD, (x_ND, *experts.parameters()), gradient_NKD.to(y_NKD.dtype)))
        )
    for padded, grouped in zip(*results, strict=True):
        assert (grouped.float() - padded).norm() <= tolerance * padded.norm()


def test_fused_products_of_grouped_inputs_equal_a_loop_over_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU and in fp32, which is set as the dtype of products on a GPU. One group is empty."""
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.float32)
    generator = torch.Generator().manual_seed(1)
    x_SD, w1_EFD, w3_EFD = (torch.randn(*shape, 16, generator=generator) for shape in ((11,), (3, 24), (3, 8)))
    gradient_SC = torch.randn(11, 32, generator=generator)
    inputs = [part.requires_grad_() for part in (x_SD, w1_EFD, w3_EFD)]
    y_SC = fused.products(*inputs, ends_E=torch.tensor([4, 4, 11], dtype=torch.int32))
    wide = [part.detach().double().requires_grad_() for part in inputs]
    groups = [(wide[0][:4], 0), (wide[0][4:], 2)]
    expected_SC = torch.cat([x @ torch.cat((wide[1][expert], wide[2][expert])).mT for x, expert in groups])
    ours, theirs = (
        (y, *torch.autograd.grad(y, parts, gradient_SC.to(y.dtype)))
        for y, parts in ((y_SC, inputs), (expected_SC, wide))
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("expert_NK", [[[0, 1]] * 9 + [[1, 4]] * 2, [[3]] * 7, [[0], [1], [2], [3], [4], [4]], [[2]]])
def test_blocks_of_the_mean_load_equal_padding_to_the_busiest_expert(expert_NK: list[list[int]]) -> None:
    experts = randomise(Experts(5, 16, 24)).double()
    chosen_NK = torch.tensor(expert_NK)
    generator = torch.Generator().manual_seed(1)
    x_ND = torch.randn(len(expert_NK), 16, dtype=torch.float64, generator=generator).requires_grad_()
    results = []
    for y_NKD in (experts.routed(x_ND, chosen_NK), experts.in_blocks(x_ND, chosen_NK)):
        results.append((y_NKD, *torch.autograd.grad(y_NKD.square().sum(), (x_ND, *experts.parameters()))))
    for padded, in_blocks in zip(*results, strict=True):
        torch.testing.assert_close(in_blocks, padded)


@pytest.mark.parametrize(
    ("options", "field"),
    [({"router": "softmax", "balance_rate": 0.1}, "balance_rate"), ({"z_loss": 0.1}, "z_loss")],
)
def test_an_option_of_the_other_router_is_refused(options: dict, field: str) -> None:
    assert [problem[0] for problem in config("moe_topk", **options).problems()] == [field]


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
