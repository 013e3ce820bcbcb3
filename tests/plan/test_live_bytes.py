"""Live bytes of tensors, and parts that are traced once for all models that contain them."""

from __future__ import annotations

import pytest
import torch
from model_families import OPTIONS, VOCAB, config

from suite.models.accounting import meta_model
from suite.models.cache import EarlierTokens
from suite.plan.activation_memory import PartCache, StepTracer, one_row
from suite.plan.fused_attention import Kernels, Precision
from suite.plan.live_bytes import LiveBytes


def test_live_bytes_count_each_storage_while_it_is_alive() -> None:
    with LiveBytes() as live:
        a = torch.zeros(10)
        view = a.view(2, 5)
        b = torch.ones(100)
        assert live.bytes == 440
        del a
        assert live.bytes == 440
        del view, b
        assert live.bytes == 0
        assert live.peak == 440


def test_parts_do_not_depend_on_models_traced_earlier() -> None:
    cache: PartCache = {}
    for case in OPTIONS:
        for rows in (2, 3):
            model = meta_model(config(case), VOCAB)
            assert StepTracer(model, 16, cache=cache).parts(rows) == StepTracer(model, 16).parts(rows), case


def test_blocks_that_differ_only_in_a_setting_are_traced_separately() -> None:
    cache: PartCache = {}
    plain, random = (
        StepTracer(meta_model(config("pkm", random_rows=rows), VOCAB), 16, cache=cache).parts(2) for rows in (0, 8)
    )
    assert [part.lookups for part in plain.parts] != [part.lookups for part in random.parts]


def test_a_block_that_several_models_contain_is_traced_once() -> None:
    cache: PartCache = {}
    block, head, memory = 1, 1, 1
    StepTracer(meta_model(config("dense"), VOCAB), 16, cache=cache).parts(2)
    assert len(cache) == block + head
    StepTracer(meta_model(config("pkm"), VOCAB), 16, cache=cache).parts(2)
    assert len(cache) == block + head + memory


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", list(OPTIONS))
def test_every_block_uses_the_memory_predicted_for_its_part(case: str, precision: Precision) -> None:
    """Every layer is run, also equal ones, with the rotation and the attention bias of the transformer."""
    model = meta_model(config(case), VOCAB)
    x_BTD, embedding_BTD = (torch.empty(2, 16, model.size.dim, device="meta", requires_grad=True) for _ in range(2))
    with torch.device("meta"):
        rotation = model._rotation(0, 16, x_BTD.device)
        bias = torch.zeros(2, 1, 16, 16, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
        ids_BTW = torch.zeros(2, 16, model.window, dtype=torch.int64)
        earlier = EarlierTokens(segments_BT=torch.zeros(2, 16, dtype=torch.int64))
    parts = StepTracer(model, 16, precision).parts(2).parts
    for part, block in zip(parts[-1 - len(model.layers) : -1], model.layers, strict=True):
        copies = {id(weight): weight.bfloat16() for weight in block.parameters()} if precision == "bf16" else {}
        with one_row(model.memory_tables()):
            excluded = (
                x_BTD,
                embedding_BTD,
                *rotation,
                bias,
                ids_BTW,
                earlier.segments_BT,
                *model.parameters(),
                *copies.values(),
            )
            with LiveBytes(*excluded) as live, Kernels(precision, copies):
                read_BTD = embedding_BTD if block.reads_embedding else None
                y = block(x_BTD, rotation, bias, None, 0, ids_BTW, read_BTD, earlier)
                y_BTD = y if block.skip is None else y[0] + y[1]
                del y
                assert (part.forward, part.saved) == (live.peak, live.bytes)
                live.peak = live.bytes
                y_BTD.backward(torch.empty_like(y_BTD))
        # Here the caller holds the gradient of the output to the end; in a training step it is freed.
        assert part.backward <= live.peak <= part.backward + y_BTD.numel() * y_BTD.element_size()
        model.zero_grad()
        del y_BTD
