"""Part `correct` of `suite.bench.gpu`, of what the models compute with PyTorch's own kernels on a GPU.

Shapes: B rows, T positions, N = B*T tokens, H heads, G key-value heads, K head width or experts per token, D width, F
hidden width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.bench.cases import dtype_name
from suite.bench.gpu_checks import Row, compared
from suite.models import document_attention
from suite.models.document_attention import Documents, offsets_of
from suite.models.moe import Experts

BF16 = 2e-2
"""The largest error of bf16 products next to float64."""


def rows(device: str, rehearsal: bool) -> Iterator[Row]:
    """Compare attention of packed documents and routed experts with float64, gradients included."""
    for heads, kv_heads, width in ((2, 2, 8), (4, 2, 8)) if rehearsal else ((12, 12, 64), (32, 8, 128)):
        yield from _attention(heads, kv_heads, width, 16 if rehearsal else 1024, device)
    yield from _experts(device, *((4, 16, 8, 12) if rehearsal else (16, 768, 384, 2048)))


def _attention(heads: int, kv_heads: int, width: int, tokens: int, device: str) -> Iterator[Row]:
    """Compare the mask, in fp32 and bf16, and the variable-length kernel with a softmax of masked scores."""
    generator = torch.Generator(device).manual_seed(6)
    begins_BT = torch.rand(2, tokens, generator=generator, device=device) < 4 / tokens
    segments_BT = begins_BT.flatten().cumsum(0).view(2, tokens)

    def drawn(heads: int) -> Tensor:
        return torch.randn(2, heads, tokens, width, generator=generator, device=device).bfloat16()

    inputs, grad_BHTK = (drawn(heads), drawn(kv_heads), drawn(kv_heads)), drawn(heads)
    expected = _with_gradients(partial(_masked_softmax, segments_BT), inputs, grad_BHTK, torch.float64)
    shape = f"{heads} heads of {width}, {kv_heads} for keys, {tokens} tokens"

    def masked(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
        mask = document_attention.mask_of(segments_BT, 0, segments_BT, None)
        assert mask is not None
        k_BHTK, v_BHTK = (part.repeat_interleave(heads // kv_heads, 1) for part in (k_BGTK, v_BGTK))
        bias = document_attention.as_bias(mask, q_BHTK.dtype)
        return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, attn_mask=bias)

    for dtype, allowed in ((torch.float32, 1e-5), (torch.bfloat16, BF16)):
        name = f"{shape}, {dtype_name(dtype)}"
        yield compared("attention, mask", name, (_with_gradients(masked, inputs, grad_BHTK, dtype), expected), allowed)

    def without_mask(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
        documents = Documents(offsets_of(segments_BT.cpu()).to(device), tokens)
        q_NHK, k_NGK, v_NGK = (part.transpose(1, 2).flatten(0, 1) for part in (q_BHTK, k_BGTK, v_BGTK))
        y_NHK = document_attention.attend(q_NHK, k_NGK, v_NGK, documents)
        return y_NHK.view(2, tokens, heads, width).transpose(1, 2)

    if not document_attention.takes(torch.device(device), torch.bfloat16):
        yield {"operator": "attention, variable length", "shape": shape, "note": "not run: its kernel needs CUDA"}
        return
    ours = _with_gradients(without_mask, inputs, grad_BHTK, torch.bfloat16)
    yield compared("attention, variable length", f"{shape}, bfloat16", (ours, expected), BF16)


def _masked_softmax(segments_BT: Tensor, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
    """Return causal attention within segments, by the formula."""
    k_BHTK, v_BHTK = (part.repeat_interleave(q_BHTK.shape[1] // part.shape[1], 1) for part in (k_BGTK, v_BGTK))
    seen_BTT = (segments_BT[:, :, None] == segments_BT[:, None, :]).tril()
    scores_BHTT = q_BHTK @ k_BHTK.mT * q_BHTK.shape[-1] ** -0.5
    return scores_BHTT.masked_fill(~seen_BTT[:, None], -torch.inf).softmax(-1) @ v_BHTK


def _experts(device: str, experts: int, dim: int, hidden: int, tokens: int) -> Iterator[Row]:
    """Compare grouped products, and products in blocks, with one expert after the other.

    The first expert has half of all choices, and the last one none. bf16 products are those of training, under
    autocast with weights in fp32.
    """
    generator, top_k = torch.Generator(device).manual_seed(7), 2

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).bfloat16().float()

    mixture = Experts(experts, dim, hidden).to(device)
    with torch.no_grad():
        for weight in mixture.parameters():
            weight.copy_((drawn(*weight.shape) / weight.shape[-1] ** 0.5).bfloat16())
    x_ND, grad_NKD = drawn(tokens, dim), drawn(tokens, top_k, dim)
    expert_NK = torch.randint(1, experts - 1, (tokens, top_k), generator=generator, device=device)
    expert_NK[:, 0] = 0

    def one_by_one(x_ND: Tensor, w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor) -> Tensor:
        y_NKD = x_ND.new_zeros(tokens, top_k, dim)
        for expert in range(experts):
            place_S = (expert_NK == expert).flatten().nonzero().squeeze(1)
            x_SD = x_ND[place_S // top_k]
            y_SD = (F.silu(x_SD @ w1_EFD[expert].mT) * (x_SD @ w3_EFD[expert].mT)) @ w2_EDF[expert].mT
            y_NKD = y_NKD.flatten(0, 1).index_copy(0, place_S, y_SD).view_as(y_NKD)
        return y_NKD

    def ours(method: Callable[..., Tensor], in_bf16: bool) -> list[Tensor]:
        leaf_ND = x_ND.clone().requires_grad_()
        with torch.autocast(device, torch.bfloat16, enabled=in_bf16):
            y_NKD = method(leaf_ND, expert_NK)
        grads = torch.autograd.grad(y_NKD, (leaf_ND, *mixture.parameters()), grad_NKD.to(y_NKD.dtype))
        return [y_NKD.detach(), *grads]

    inputs = (x_ND, mixture.w1.detach(), mixture.w2.detach(), mixture.w3.detach())
    expected = _with_gradients(one_by_one, inputs, grad_NKD, torch.float64)
    shape = f"{experts} experts, {dim} to {hidden}, {tokens} tokens"
    for in_bf16, allowed in ((False, 1e-5), (True, BF16)):
        name = f"{shape}, {'bfloat16' if in_bf16 else 'float32'}"
        yield compared("experts, in blocks", name, (ours(mixture.in_blocks, in_bf16), expected), allowed)
    name = f"{shape}, bfloat16"
    if device == "cuda" and not mixture.has_grouped_kernel(torch.bfloat16, torch.cuda.get_device_capability()[0]):
        yield {"operator": "experts, grouped", "shape": name, "note": "not run: this GPU has no kernel for it"}
        return

    def grouped(x_ND: Tensor, expert_NK: Tensor) -> Tensor:
        return mixture.grouped(x_ND, expert_NK, torch.bfloat16)

    yield compared("experts, grouped", name, (ours(grouped, True), expected), BF16)


def _with_gradients(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """Return a function's output and the gradients of its inputs, all in a dtype."""
    leaves = [part.to(dtype, copy=True).requires_grad_() for part in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]
