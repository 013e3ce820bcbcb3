"""Rotary positions in Triton: one program per position and block of pairs.

Checked in Triton's interpreter and by compiling; not run on a device yet.

Shapes: B rows, T positions, C columns: heads x 2*I, I pairs of a head.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PAIRS = 512
"""Most pairs of a program."""


@triton.jit(do_not_specialize=["tokens"])
def _rotate_kernel(
    x,
    cos,
    sin,
    out,
    tokens,
    row_stride,
    token_stride,
    angle_stride,
    pairs: tl.constexpr,
    half: tl.constexpr,
    DIRECTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    pair = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < pairs
    column = pair // half * 2 * half + pair % half
    angle = token * angle_stride + pair % half
    c = tl.load(cos + angle, mask=inside, other=0.0)
    s = tl.load(sin + angle, mask=inside, other=0.0) * DIRECTION
    source = x + row * row_stride + token * token_stride + column
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    target = out + (row * tokens + token) * 2 * pairs + column
    tl.store(target, first * c - second * s, mask=inside)
    tl.store(target + half, second * c + first * s, mask=inside)


def rotate(x_BTC: Tensor, cos_TI: Tensor, sin_TI: Tensor, direction: int) -> Tensor:
    """See reference.rotate."""
    (rows, tokens, columns), half = x_BTC.shape, cos_TI.shape[1]
    x_BTC = x_BTC if x_BTC.stride(2) == 1 else x_BTC.contiguous()
    out_BTC = torch.empty(rows, tokens, columns, dtype=x_BTC.dtype, device=x_BTC.device)
    block = min(PAIRS, triton.next_power_of_2(columns // 2))
    if rows * tokens:
        _rotate_kernel[(tokens, triton.cdiv(columns // 2, block), rows)](
            x_BTC,
            cos_TI,
            sin_TI,
            out_BTC,
            tokens,
            x_BTC.stride(0),
            x_BTC.stride(1),
            cos_TI.stride(0),
            columns // 2,
            half,
            DIRECTION=direction,
            BLOCK=block,
            num_warps=max(1, min(4, block // 128)),
        )
    return out_BTC
