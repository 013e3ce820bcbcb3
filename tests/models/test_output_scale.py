"""A learned factor on what tables add: it starts where the configuration states, is counted, and is trained."""

import pytest
import torch
from model_families import VOCAB, config, model, tokens

from suite.models.accounting import account
from suite.models.transformer import Transformer

TABLES = ["pkm", "memory_plus", "memory_plus keep_ffn", "peer", "ultramem_v2", "engram"]
every_family = pytest.mark.parametrize("case", TABLES)


def logits(net: Transformer) -> torch.Tensor:
    with torch.no_grad():
        return net.eval()(tokens(2, 20))


@every_family
def test_a_factor_of_one_changes_nothing_and_a_tiny_one_removes_the_table(case: str) -> None:
    torch.testing.assert_close(logits(model(case, output_scale=1.0)), logits(model(case)))
    if case in ("memory_plus keep_ffn", "engram"):  # elsewhere the table stands in for a layer
        torch.testing.assert_close(logits(model(case, output_scale=1e-30)), logits(model("dense")))


@every_family
def test_every_gain_starts_at_one_is_counted_and_is_trained(case: str) -> None:
    net = model(case, output_scale=0.01)
    gains = {name: parameter for name, parameter in net.named_parameters() if name.endswith("output_gain")}
    assert gains
    assert all(gain.item() == 1 for gain in gains.values())
    counted, plain = (account(config(case, **more), VOCAB, 32) for more in ({"output_scale": 0.01}, {}))
    assert counted.params_total == plain.params_total + len(gains)
    assert counted.macs_total == plain.macs_total
    net.train()(tokens(2, 20)).square().mean().backward()
    assert all(gain.grad is not None and gain.grad.item() != 0 for gain in gains.values())


def test_a_dense_control_is_scaled_too() -> None:
    net = model("memory_plus keep_ffn", output_scale=1e-30, control="dense")
    torch.testing.assert_close(logits(net), logits(model("dense")))
