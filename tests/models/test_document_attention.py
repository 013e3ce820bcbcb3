"""Attention within packed documents without a mask: the boundaries, and the same results as with a mask."""

from __future__ import annotations

import itertools

import pytest
import torch
from model_families import VOCAB, model, tokens
from torch import Tensor

from suite.models import document_attention
from suite.models.document_attention import Documents, offsets_of

SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [2, 2, 3, 3, 3, 3, 3, 3]])


def attend_to_each_document(q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, documents: Documents) -> Tensor:
    """What `attend` computes, one document after the other, by the formula."""
    offsets, group = documents.offsets_M.tolist(), q_NHK.shape[1] // k_NGK.shape[1]
    parts = []
    for begin, end in itertools.pairwise(offsets):
        assert end - begin <= documents.longest
        q, k, v = (part[begin:end].transpose(0, 1) for part in (q_NHK, k_NGK, v_NGK))
        scores = q @ k.repeat_interleave(group, 0).mT * q.shape[-1] ** -0.5
        hidden = torch.ones(end - begin, end - begin, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        parts.append((weights @ v.repeat_interleave(group, 0)).transpose(0, 1))
    return torch.cat(parts)


def test_boundaries_begin_at_rows_and_documents_and_repeat_the_end() -> None:
    offsets = offsets_of(SEGMENTS)
    assert offsets.dtype == torch.int32
    assert len(offsets) == document_attention.ROOM
    assert offsets[:6].tolist() == [0, 3, 5, 8, 10, 16]
    assert (offsets[5:] == 16).all()
    assert len(offsets_of(torch.arange(2 * document_attention.ROOM).view(2, -1))) == 3 * document_attention.ROOM


@pytest.mark.parametrize("kv_heads", [None, 1])
def test_documents_without_a_mask_equal_the_mask(kv_heads: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = model("dense")
    if kv_heads:
        for block in dense.layers:
            block.attention.kv_heads = kv_heads
            width = kv_heads * block.attention.head_dim
            for linear in (block.attention.wk, block.attention.wv):
                linear.weight = torch.nn.Parameter(linear.weight[:width].clone())
    ids = tokens(2, 8)
    assert int(ids.max()) < VOCAB
    masked = dense(ids, SEGMENTS)
    monkeypatch.setattr(document_attention, "takes", lambda *_: True)
    monkeypatch.setattr(document_attention, "attend", attend_to_each_document)
    packed = dense(ids, SEGMENTS, documents=Documents(offsets_of(SEGMENTS), 8))
    torch.testing.assert_close(packed, masked, rtol=1e-5, atol=1e-5)
