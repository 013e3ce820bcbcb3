"""The stand-alone memory layer inside a transformers Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from suite.models.dropin import MemoryFeedForward

transformers = pytest.importorskip("transformers", reason="transformers, an extra, is not installed")


def llama(memory: bool = True) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config)
    if memory:
        first = MemoryFeedForward(32, half_keys=16, top_k=8)
        model.model.layers[1].mlp = first
        model.model.layers[2].mlp = MemoryFeedForward(32, half_keys=16, top_k=8, table=first.table, seed=1)
    return model


def test_the_layer_trains_with_a_separate_parameter_group_for_the_shared_table() -> None:
    model = llama()
    first, second = model.model.layers[1].mlp, model.model.layers[2].mlp
    values = list(first.table.parameters())
    rest = [p for p in model.parameters() if all(p is not v for v in values)]
    optimizer = torch.optim.AdamW([{"params": rest, "lr": 3e-3}, {"params": values, "lr": 3e-2}])
    tokens = torch.randint(0, 40, (4, 16), generator=torch.Generator().manual_seed(0))
    before = first.table.weight.detach().clone()
    losses = []
    for _ in range(30):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.equal(first.table.weight, before)
    assert second.memory.tables[0] is first.table


def test_a_shared_table_is_saved_once_and_loads_back(tmp_path: Path) -> None:
    model = llama()
    names = [name for name in model.state_dict() if "table" in name]
    assert names == ["model.layers.1.mlp.table.weight"]
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = llama()
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        torch.testing.assert_close(other(tokens).logits, model(tokens).logits)


def test_generation_is_the_same_with_and_without_the_cache_of_transformers() -> None:
    model = llama().eval()
    tokens = torch.arange(6)[None]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(tokens, **options), model.generate(tokens, use_cache=False, **options))


def test_invalid_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="half_keys: got 4, allowed: at least top_k"):
        MemoryFeedForward(32, half_keys=4)
    table = MemoryFeedForward(32, half_keys=16, top_k=8).table
    with pytest.raises(ValueError, match="table: got 256 rows"):
        MemoryFeedForward(32, half_keys=32, top_k=8, table=table)
