"""Attention within the documents of packed rows: one variable-length kernel for all of them, elsewhere a mask.

Shapes: B rows, T positions, N = B*T, L keys (T plus the cached tokens), H heads, G key-value heads, K head width, M
boundaries of documents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from suite.models.precision import product_dtype

ROOM = 64
"""Boundaries are padded to a multiple of this many, so that few shapes occur."""


class Documents(NamedTuple):
    """Boundaries of documents in rows laid end to end, int32, ascending from 0 to N; and T, which none exceeds."""

    offsets_M: Tensor
    longest: int


def offsets_of(segments_BT: Tensor) -> Tensor:
    """Return the boundaries of documents, int32 on the host: a row or another segment number begins a document.

    The last boundary repeats: the documents between are empty.
    """
    begins_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    begins_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    first_M = begins_BT.flatten().nonzero().squeeze(1)
    room = -(-(len(first_M) + 1) // ROOM) * ROOM
    offsets_M = torch.full((room,), segments_BT.numel(), dtype=torch.int32)
    offsets_M[: len(first_M)] = first_M
    return offsets_M


def attend(q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, documents: Documents) -> Tensor:
    """Return causal attention within documents, [N, H, K], by the flash kernel; fp16 or bf16 on CUDA.

    Args:
        q_NHK: Queries.
        k_NGK: Keys.
        v_NGK: Values.
        documents: The boundaries of documents.
    """
    # Imported here because it registers operators, which only a GPU needs.
    from torch.nn.attention.varlen import varlen_attn

    offsets_M, longest = documents
    grouped = q_NHK.shape[1] != k_NGK.shape[1]
    y_NHK = varlen_attn(
        q_NHK, k_NGK, v_NGK, offsets_M, offsets_M, longest, longest, window_size=(-1, 0), enable_gqa=grouped
    )
    assert isinstance(y_NHK, Tensor)
    return y_NHK


def takes(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether `attend` can be used: in fp16 or bf16 on CUDA, where autocast may choose the dtype."""
    return device.type == "cuda" and product_dtype(dtype, device) in (torch.float16, torch.bfloat16)


def mask_of(tokens_BT: Tensor, past: int, segments_BT: Tensor | None, pad_B: Tensor | None) -> Tensor | None:
    """Compute which keys each token attends to.

    Args:
        tokens_BT: Token ids.
        past: Number of cached tokens.
        segments_BT: Document numbers; None if every row is one document.
        pad_B: Number of padding tokens at the left of each row; None for none.

    Returns:
        The mask [B or 1, 1, T, L], True where a token attends; None if plain causal attention is enough.
    """
    tokens = tokens_BT.shape[1]
    if segments_BT is None and pad_B is None and (past == 0 or tokens == 1):
        return None
    key_L = torch.arange(past + tokens, device=tokens_BT.device)
    query_T = key_L[past:]
    mask_BTL = (key_L <= query_T[:, None])[None]
    if segments_BT is not None:
        mask_BTL = mask_BTL & (segments_BT[:, :, None] == segments_BT[:, None, :])
    if pad_B is not None:
        # A padding token attends to itself, since a softmax over nothing is NaN.
        mask_BTL = mask_BTL & ((key_L >= pad_B[:, None, None]) | (key_L == query_T[:, None]))
    return mask_BTL[:, None]


def as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask as a bias added to scores, in the dtype of attention; all layers share it."""
    bias = torch.zeros(mask.shape, dtype=product_dtype(dtype, mask.device), device=mask.device)
    return bias.masked_fill_(~mask, -torch.inf)
