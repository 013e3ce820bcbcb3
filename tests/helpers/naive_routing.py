"""The auxiliary losses of a softmax router, computed token by token."""

from __future__ import annotations

import torch

from suite.models.moe import RoutedExperts


def auxiliary_by_loop(layer: RoutedExperts, x_ND: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compute the balance loss and the z-loss of a softmax router token by token."""
    experts, top_k = layer.experts.count, layer.top_k
    logits = [layer.router.weight @ x_D for x_D in x_ND]
    gates = [torch.exp(logit_E) / torch.exp(logit_E).sum() for logit_E in logits]
    choices = [0] * experts
    for gate_E in gates:
        for expert in sorted(range(experts), key=lambda e, gate_E=gate_E: -gate_E[e].item())[:top_k]:
            choices[expert] += 1
    balance = sum(choices[e] / (len(gates) * top_k) * sum(gate_E[e] for gate_E in gates) for e in range(experts))
    z = sum(torch.log(torch.exp(logit_E).sum()) ** 2 for logit_E in logits)
    return {"balance_loss": experts * balance / len(gates), "z_loss": z / len(logits)}
