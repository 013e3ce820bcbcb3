"""torch.optim.Muon over named parameters: matrices, and stacks of matrices such as those of experts.

Newton-Schulz needs whole matrices. Under FSDP the gradient and the momentum of a 2-D parameter are therefore gathered,
one parameter at a time, and every process computes the same update and applies its shard of it. A stack [E, A, B] is
sharded by matrices for the update, and each process updates those that it holds.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class NamedMuon:
    """Muon with Nesterov momentum 0.95 and five Newton-Schulz steps, torch's defaults.

    Updates are scaled by 0.2 sqrt(max(A, B)) (Liu et al. 2025, arXiv 2502.16982), which gives them the RMS of AdamW's:
    the same learning rate and weight decay serve both. State is stored by parameter name, as checkpoints need it.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], weight_decay: float) -> None:
        self.parameters, self.weight_decay = dict(parameters), weight_decay
        self.momentum = {name: torch.zeros_like(parameter.detach()) for name, parameter in self.parameters.items()}

    def step(self, lr: float) -> None:
        """Update every parameter that has a gradient."""
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                self._step(parameter.detach(), parameter.grad, self.momentum[name], lr)

    def _step(self, parameter: Tensor, gradient: Tensor, momentum: Tensor, lr: float) -> None:
        if parameter.dim() == 2:
            buffer = _gathered(momentum)
            self._update([parameter], [_gathered(gradient)], [buffer], lr)
            _scatter(buffer, momentum)
        else:
            moved, buffer = _by_matrices(parameter), _by_matrices(momentum)
            gradients = _local_matrices(_by_matrices(gradient))
            self._update(_local_matrices(moved), gradients, _local_matrices(buffer), lr)
            _scatter(moved, parameter)
            _scatter(buffer, momentum)

    def _update(self, matrices: list[Tensor], gradients: list[Tensor], buffers: list[Tensor], lr: float) -> None:
        if not matrices:  # fewer experts than processes
            return
        muon = torch.optim.Muon(matrices, lr=lr, weight_decay=self.weight_decay, adjust_lr_fn="match_rms_adamw")
        for matrix, gradient, buffer in zip(matrices, gradients, buffers, strict=True):
            matrix.grad = gradient
            muon.state[matrix]["momentum_buffer"] = buffer
        muon.step()


def _by_matrices(stack: Tensor) -> Tensor:
    """Return a DTensor sharded over the first dimension; other tensors are returned unchanged."""
    if not hasattr(stack, "to_local"):
        return stack
    from torch.distributed.tensor import DTensor, Shard  # takes a second to import

    assert isinstance(stack, DTensor)
    return stack if stack.placements == (Shard(0),) else stack.redistribute(placements=[Shard(0)])


def _local_matrices(stack: Tensor) -> list[Tensor]:
    """Return views of the matrices of a stack that this process holds."""
    local = stack.to_local() if hasattr(stack, "to_local") else stack  # a DTensor sharded over the first dimension
    return list(local.unbind(0))


def _gathered(tensor: Tensor) -> Tensor:
    """Return a DTensor replicated in every process; other tensors are returned unchanged."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate  # takes a second to import

    assert isinstance(tensor, DTensor)
    return tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)


def _scatter(moved: Tensor, target: Tensor) -> None:
    """Copy this process's shard of a tensor that was gathered, or sharded otherwise, back to `target`."""
    if moved is not target:
        target.copy_(moved)
