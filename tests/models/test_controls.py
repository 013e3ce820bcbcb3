"""Controls: each equals the family with its table changed by hand, and costs what the family costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_families import VOCAB, config, model, tokens

from suite.models.accounting import account
from suite.models.lookup.controls import DenseStandIn, tables_off
from suite.models.transformer import Transformer

TABLES = ["pkm", "memory_plus", "memory_plus varied", "memory_plus keep_ffn", "peer", "ultramem_v2"]
TABLES += ["token_table stem", "token_table tails", "engram", "ngram_embedding"]
every_family = pytest.mark.parametrize("case", TABLES)


def logits(net: Transformer) -> torch.Tensor:
    with torch.no_grad():
        return net.eval()(tokens(2, 20))


def with_rows(case: str, change: Any) -> torch.Tensor:
    """Return the logits of the family with the rows of its tables changed."""
    net = model(case)
    for table in net.memory_tables():
        table.weight.data = change(table.weight.data)
    return logits(net)


@every_family
def test_one_row_is_what_all_rows_read_as(case: str) -> None:
    net = model(case, control="one_row")
    ours = {name: parameter for name, parameter in model(case).named_parameters() if not name.startswith("tables.")}
    assert all(torch.equal(parameter, dict(net.named_parameters())[name]) for name, parameter in ours.items())
    first = [table.weight.data.clone() for table in net.memory_tables()]
    assert all(len(row) == 1 for row in first)
    rows = iter(first)
    torch.testing.assert_close(logits(net), with_rows(case, lambda old_RD: next(rows).expand_as(old_RD).clone()))


@every_family
def test_shuffled_addresses_lead_to_other_rows_in_one_fixed_order(case: str) -> None:
    net = model(case, control="shuffled")
    orders = [table.order_R.long() for table in net.memory_tables()]
    assert all(sorted(order_R.tolist()) == list(range(len(order_R))) for order_R in orders)
    assert all(not torch.equal(order_R, torch.arange(len(order_R))) for order_R in orders)
    assert [table.order_R.tolist() for table in model(case, seed=1, control="shuffled").memory_tables()] == [
        order_R.tolist() for order_R in orders
    ]
    remaining = iter(orders)
    torch.testing.assert_close(logits(net), with_rows(case, lambda old_RD: old_RD[next(remaining)]))
    assert not torch.allclose(logits(net), logits(model(case)))


@every_family
def test_a_frozen_table_is_that_of_the_family_without_a_gradient(case: str) -> None:
    net = model(case, control="frozen")
    torch.testing.assert_close(logits(net), logits(model(case)), rtol=0, atol=0)
    net.train()(tokens(2, 20)).sum().backward()
    assert all(not table.weight.requires_grad and table.weight.grad is None for table in net.memory_tables())
    assert all(p.grad is not None for name, p in net.named_parameters() if not name.startswith("tables."))


@pytest.mark.parametrize("case", ["memory_plus", "peer"])
def test_the_gradients_around_a_frozen_table_are_those_of_the_family(case: str) -> None:
    gradients = []
    for control in (None, "frozen"):
        net = model(case, control=control).double()
        net(tokens(2, 20)).square().sum().backward()
        gradients.append({name: p.grad for name, p in net.named_parameters() if not name.startswith("tables.")})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@every_family
def test_the_dense_stand_in_has_the_multiply_adds_of_the_memory(case: str) -> None:
    family, dense = (account(config(case, control=control), VOCAB, 64) for control in (None, "dense"))
    net = model(case, control="dense")
    stand_ins = [module for module in net.modules() if isinstance(module, DenseStandIn)]
    assert abs(dense.macs_total - family.macs_total) <= len(stand_ins) * 3 * 32 / 2
    assert (dense.params_memory, dense.memory_rows, len(stand_ins)) == (0, 0, len(model(case).memory_layers()))
    assert net.memory_layers() == {}


@every_family
@pytest.mark.parametrize("control", ["one_row", "frozen", "shuffled"])
def test_a_control_costs_what_the_family_costs(case: str, control: str) -> None:
    family, controlled = (account(config(case, control=kind), VOCAB, 64) for kind in (None, control))
    assert controlled.macs_per_token == family.macs_per_token
    assert controlled.params_active <= controlled.params_total
    assert controlled.params_total - controlled.params_memory == family.params_total - family.params_memory
    assert controlled.memory_rows == (1 if control == "one_row" else family.memory_rows)


@every_family
def test_tables_that_are_off_read_as_zeros_until_the_context_ends(case: str) -> None:
    net = model(case)
    before = logits(net)
    with tables_off(net.memory_tables()):
        torch.testing.assert_close(logits(net), with_rows(case, torch.zeros_like))
    assert torch.equal(logits(net), before)
    assert not torch.allclose(before, with_rows(case, torch.zeros_like))


def test_families_without_a_table_do_not_have_the_option() -> None:
    with pytest.raises(ValueError, match="control"):
        config("dense", control="frozen")
