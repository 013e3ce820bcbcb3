"""The loss of the head in chunks of tokens equals the one of whole logits, with its gradients."""

from __future__ import annotations

import pytest
import torch
from model_families import VOCAB, model, tokens
from torch import Tensor
from torch.nn import functional as F

from suite.models import head_loss

DIM, TOKENS = 24, 37


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, a matrix and targets, some of which are ignored."""
    draw = torch.Generator().manual_seed(0)
    x_ND = torch.randn(TOKENS, DIM, dtype=torch.float64, generator=draw)
    matrix_VD = torch.randn(VOCAB, DIM, dtype=torch.float64, generator=draw)
    targets_N = torch.randint(0, VOCAB, (TOKENS,), generator=draw)
    targets_N[::5] = head_loss.IGNORED
    return x_ND.to(dtype).requires_grad_(), matrix_VD.to(dtype).requires_grad_(), targets_N


def whole(x_ND: Tensor, matrix_VD: Tensor, targets_N: Tensor) -> Tensor:
    return F.cross_entropy(x_ND @ matrix_VD.T, targets_N, reduction="sum", ignore_index=head_loss.IGNORED)


@pytest.mark.parametrize("at_once", [1, 3 * VOCAB, 10 * VOCAB + 7, TOKENS * VOCAB])
def test_loss_and_gradients_equal_those_of_whole_logits_in_float64(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_loss, "LOGITS_AT_ONCE", at_once)
    x_ND, matrix_VD, targets_N = inputs(torch.float64)
    loss, expected = head_loss.cross_entropy(x_ND, matrix_VD, targets_N), whole(x_ND, matrix_VD, targets_N)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    ours = torch.autograd.grad(loss / 7, (x_ND, matrix_VD))
    theirs = torch.autograd.grad(expected / 7, (x_ND, matrix_VD))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        torch.testing.assert_close(head_loss.cross_entropy(x_ND, matrix_VD, targets_N), expected, rtol=1e-13, atol=0)


def test_few_logits_are_computed_as_one_to_the_bit() -> None:
    x_ND, matrix_VD, targets_N = inputs(torch.float32)
    loss, expected = head_loss.cross_entropy(x_ND, matrix_VD, targets_N), whole(x_ND, matrix_VD, targets_N)
    assert loss.equal(expected)
    for ours, theirs in zip(
        torch.autograd.grad(loss, (x_ND, matrix_VD)), torch.autograd.grad(expected, (x_ND, matrix_VD)), strict=True
    ):
        assert ours.equal(theirs)


def test_under_autocast_products_are_in_bf16_and_sums_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    x_ND, matrix_VD, targets_N = inputs(torch.float32)
    results = []
    for at_once in (TOKENS * VOCAB, 5 * VOCAB):
        monkeypatch.setattr(head_loss, "LOGITS_AT_ONCE", at_once)
        with torch.autocast("cpu", torch.bfloat16):
            loss = head_loss.cross_entropy(x_ND, matrix_VD, targets_N)
        assert loss.dtype == torch.float32
        results.append((loss, *torch.autograd.grad(loss, (x_ND, matrix_VD))))
    (loss, grad_x, grad_matrix), (chunked, chunked_x, chunked_matrix) = results
    torch.testing.assert_close(chunked, loss, rtol=1e-6, atol=0)  # the logits are the same bf16 values
    torch.testing.assert_close(chunked_x, grad_x, rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(chunked_matrix, grad_matrix, rtol=2e-2, atol=2e-2)


def test_a_matrix_that_is_not_trained_gets_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_loss, "LOGITS_AT_ONCE", VOCAB)
    x_ND, matrix_VD, targets_N = inputs(torch.float64)
    matrix_VD.requires_grad_(False)
    head_loss.cross_entropy(x_ND, matrix_VD, targets_N).backward()
    assert matrix_VD.grad is None
    assert x_ND.grad is not None


def test_a_second_backward_pass_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_loss, "LOGITS_AT_ONCE", VOCAB)
    loss = head_loss.cross_entropy(*inputs(torch.float64))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@pytest.mark.parametrize("tied", [False, True])
def test_the_gradients_of_a_model_are_the_same_in_chunks(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    net, token_BT = model("dense", tie_embeddings=tied).double(), tokens(3, 12)
    gradients = []
    for at_once in (1 << 28, 4 * VOCAB):
        monkeypatch.setattr(head_loss, "LOGITS_AT_ONCE", at_once)
        net.zero_grad()
        net.loss(net.hidden(token_BT[:, :-1]), token_BT[:, 1:]).backward()
        gradients.append({name: parameter.grad for name, parameter in net.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
