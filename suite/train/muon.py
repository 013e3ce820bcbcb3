"""torch.optim.Muon over named parameters: matrices, and stacks of matrices such as those of experts.

Newton-Schulz needs whole matrices. Under FSDP the gradient of a 2-D parameter is therefore gathered and every process
orthogonalises it redundantly, with a momentum buffer that each process holds whole; each keeps its own shard of the
update. A stack [E, A, B] is sharded by matrices, so each process updates those that it holds.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class NamedMuon:
    """Muon with Nesterov momentum 0.95 and five Newton-Schulz steps, torch's defaults.

    Updates are scaled by 0.2 sqrt(max(A, B)) (Liu et al. 2025, arXiv 2502.16982), which gives them the RMS of AdamW's:
    the same learning rate and weight decay serve both. State is kept by name, so that a checkpoint can hold it.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], weight_decay: float) -> None:
        self.parameters, self.weight_decay = dict(parameters), weight_decay
        self.momentum = {name: _momentum_buffer(parameter) for name, parameter in self.parameters.items()}

    def step(self, lr: float) -> None:
        """One step of every parameter that has a gradient."""
        matrices, buffers = [], []
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            of_parameter = _matrices(parameter.detach())
            for matrix, gradient in zip(of_parameter, _gradients(parameter.grad), strict=True):
                matrix.grad = gradient
            matrices += of_parameter
            buffers += _matrices(self.momentum[name])
        if not matrices:
            return
        muon = torch.optim.Muon(matrices, lr=lr, weight_decay=self.weight_decay, adjust_lr_fn="match_rms_adamw")
        for matrix, buffer in zip(matrices, buffers, strict=True):
            muon.state[matrix]["momentum_buffer"] = buffer
        muon.step()


def _momentum_buffer(parameter: nn.Parameter) -> Tensor:
    zeros = torch.zeros_like(parameter.detach())
    return _replicated(zeros) if parameter.dim() == 2 else zeros


def _matrices(tensor: Tensor) -> list[Tensor]:
    """A 2-D tensor itself; of a stack, views of the matrices that this process holds."""
    if tensor.dim() == 2:
        return [tensor]
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # a DTensor sharded over the first dimension
    return list(local.unbind(0))


def _gradients(gradient: Tensor) -> list[Tensor]:
    return [_replicated(gradient)] if gradient.dim() == 2 else _matrices(gradient)


def _replicated(tensor: Tensor) -> Tensor:
    """A DTensor gathered in every process; any other tensor unchanged."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate  # takes a second to import

    assert isinstance(tensor, DTensor)
    return tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)
