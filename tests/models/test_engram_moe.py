"""Experts with n-gram memories: the sum of the two families that it consists of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_families import VOCAB, config, model, tokens

from suite.models import registry
from suite.models.accounting import account
from suite.models.memory_table import MemoryTable

EXPERTS: dict[str, Any] = {"experts": 8, "top_k": 2, "shared_experts": 1}
MEMORIES: dict[str, Any] = {"head_rows": 40, "hash_heads": 2, "row_width": 8, "form": "qwen"}


def test_every_count_is_that_of_the_experts_plus_what_the_memories_add_to_dense() -> None:
    both, experts, memories, dense = (
        account(config(family, **options), VOCAB, 128)
        for family, options in [
            ("engram_moe", EXPERTS | MEMORIES),
            ("moe_topk", EXPERTS),
            ("engram", MEMORIES),
            ("dense", {}),
        ]
    )
    for count in ("params_total", "params_active", "params_memory", "macs_total", "bytes_per_token"):
        parts = [getattr(part, count) for part in (experts, memories, dense)]
        assert getattr(both, count) == parts[0] + parts[1] - parts[2], count
    assert both.params == {**memories.params, **experts.params} | {"norm": memories.params["norm"]}


def test_with_empty_tables_it_is_the_model_of_experts() -> None:
    """Values and the norms of values of zero rows are zero, and so is what a convolution makes of them."""
    both = model("engram_moe", **EXPERTS, projection_bias=True, kernel=4, gate="signed_root").eval()
    experts = model("moe_topk", **EXPERTS).eval()
    own = {name for name, _ in both.named_parameters()} - {name for name, _ in experts.named_parameters()}
    assert own
    assert all(".before_attention." in name or "table" in name for name in own)
    experts.load_state_dict(both.state_dict(), strict=False)
    ids_BT = tokens(2, 9)
    assert not torch.equal(both(ids_BT), experts(ids_BT))
    for table in (module for module in both.modules() if isinstance(module, MemoryTable)):
        torch.nn.init.zeros_(table.weight)
    torch.testing.assert_close(both(ids_BT), experts(ids_BT), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({"placement": (1, 4)}, ["placement"]),
        ({"top_k": 9}, ["top_k"]),
        ({"prime_rows": False, "balance_loss": 0.5}, ["prime_rows", "balance_loss"]),
    ],
)
def test_problems_of_both_families_are_reported(options: dict[str, Any], fields: list[str]) -> None:
    assert [problem[0] for problem in config("engram_moe", **options).problems()] == fields


def test_tables_have_the_rates_of_engram_and_micro_batches_matter_as_in_moe_topk() -> None:
    both, parent = config("engram_moe"), config("engram")
    assert (both.value_lr_ratio, both.default_value_weight_decay) == (
        parent.value_lr_ratio,
        parent.default_value_weight_decay,
    )
    assert config("engram_moe", router="softmax").batch_statistics
    assert not both.batch_statistics
    assert registry.family("engram_moe").has_memory
