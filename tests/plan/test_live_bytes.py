"""Live bytes, and layouts that are looked up instead of computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_families import OPTIONS, VOCAB, config
from torch import Tensor
from torch.nn import functional as F

from suite.models.accounting import meta_model
from suite.plan.activation_memory import Seen, one_row, parts
from suite.plan.fused_attention import Kernels, Precision
from suite.plan.live_bytes import LiveBytes, MetaLiveBytes


def test_live_bytes_are_those_of_storages_alive() -> None:
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


class Checked(MetaLiveBytes):
    """Asks torch, too, and counts what was looked up."""

    looked_up = 0

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        known = len(self._layouts)
        found = super().compute(func, args, kwargs)
        if isinstance(found, Tensor) and not func.is_view and not func._schema.is_mutable:
            asked = func(*args, **kwargs)
            assert (found.shape, found.stride(), found.dtype) == (asked.shape, asked.stride(), asked.dtype), func
            type(self).looked_up += len(self._layouts) == known
        return found


@pytest.mark.parametrize("case", list(OPTIONS))
def test_layouts_that_are_looked_up_are_those_torch_gives(case: str) -> None:
    model = meta_model(config(case), VOCAB)
    with torch.device("meta"), Checked({}):
        tokens_BT = torch.zeros(2, 24, dtype=torch.int64)
        logits_BTV = model(tokens_BT, torch.zeros_like(tokens_BT))
        F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT.flatten()).backward()
    assert Checked.looked_up > 100


def test_parts_do_not_depend_on_what_was_run_before() -> None:
    seen = Seen()
    for case in OPTIONS:
        for rows in (2, 3):
            model = meta_model(config(case), VOCAB)
            assert parts(model, 16, rows, seen=seen) == parts(model, 16, rows), case


def test_blocks_that_differ_in_a_setting_alone_are_told_apart() -> None:
    seen = Seen()
    plain, drawing = (parts(meta_model(config("pkm", random_rows=n), VOCAB), 16, 2, seen=seen) for n in (0, 8))
    assert [part.lookups for part in plain.parts] != [part.lookups for part in drawing.parts]


def test_what_models_of_a_base_have_in_common_is_run_once() -> None:
    seen = Seen()
    parts(meta_model(config("dense"), VOCAB), 16, 2, seen=seen)
    attention, feed_forward, head = 1, 1, 1
    assert len(seen.parts) == attention + feed_forward + head
    parts(meta_model(config("pkm"), VOCAB), 16, 2, seen=seen)
    memory = 1
    assert len(seen.parts) == attention + feed_forward + head + memory


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", list(OPTIONS))
def test_two_halves_need_what_their_block_does(case: str, precision: Precision) -> None:
    """But for the gradient a block is given, which a whole block holds to its end: training and halves do not."""
    model = meta_model(config(case), VOCAB)
    x_BTD = torch.empty(2, 16, model.size.dim, device="meta", requires_grad=True)
    with torch.device("meta"):
        rotation = model._rotation(0, 16, x_BTD.device)
        bias = torch.zeros(2, 1, 16, 16, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    for found, block in zip(parts(model, 16, 2, precision).parts[1:-1], model.layers, strict=True):
        copies = {id(weight): weight.bfloat16() for weight in block.parameters()} if precision == "bf16" else {}
        with one_row(model.memory_tables()):
            known = (x_BTD, *rotation, bias, *model.parameters(), *copies.values())
            with LiveBytes(*known) as live, Kernels(precision, copies):
                y_BTD = block(x_BTD, rotation, bias, None, 0)
                assert (found.forward, found.saved) == (live.peak, live.bytes)
                live.peak = live.bytes
                y_BTD.backward(torch.empty_like(y_BTD))
        assert found.backward <= live.peak <= found.backward + 4 * x_BTD.numel()
        model.zero_grad()
        del y_BTD
