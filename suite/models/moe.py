"""Mixtures of experts: `moe`, the paper's baseline, and `moe_topk`, the stronger one with two kinds of router.

Shapes: B rows, T tokens per row, N = B*T tokens, D model width, F hidden width of an expert, E experts, K
experts per token, C tokens per expert and row, X blocks of tokens of one expert, L tokens per block (padded), S = N*K.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.product_key import best
from suite.models import fused
from suite.models.cost import Cost
from suite.models.feedforward import SwiGLU
from suite.models.precision import at_least_fp32, product_dtype
from suite.models.registry import Family, ModelConfig, Problem, register

PAPER_EXPERTS = {"134m": 16, "373m": 8, "720m": 6, "1.3b": 4}
"""Experts in the paper: the fewest that exceed the parameters of its "Memory" row."""
OTHER_EXPERTS = 8


def tally(expert: Tensor, experts: int) -> Tensor:
    """Return how often each expert occurs, [E] int64; like torch.bincount, but also on the meta device."""
    return torch.zeros(experts, dtype=torch.int64, device=expert.device).index_add_(0, expert, torch.ones_like(expert))


class Experts(nn.Module):
    """E SwiGLUs, each applied to its own tokens.

    `before_read` holds functions that are called with the experts of each token before `routed` applies them.
    `busiest` is the load of the busiest expert relative to the mean load. It is used on the meta device only, where
    routing has no values to count.
    """

    matrices: ClassVar[tuple[str, ...]] = ("w1", "w2", "w3")
    busiest = 1.0

    def __init__(self, experts: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.count = experts
        self.before_read: list[Callable[[Tensor], None]] = []
        self.w1 = nn.Parameter(torch.empty(experts, hidden, dim))
        self.w2 = nn.Parameter(torch.empty(experts, dim, hidden))
        self.w3 = nn.Parameter(torch.empty(experts, hidden, dim))

    def forward(self, x: Tensor, expert_NK: Tensor | None = None) -> Tensor:
        """Apply the experts to their own tokens [E, L, D] or, if a router has chosen them, as `routed` does.

        Both are passes of the module, before which FSDP gathers its weights.
        """
        return _swiglus(x, self.w1, self.w2, self.w3) if expert_NK is None else self.routed(x, expert_NK)

    def routed(self, x_ND: Tensor, expert_NK: Tensor) -> Tensor:
        """Return each token's outputs of its K experts, [N, K, D]; experts are int64 in [0, E).

        Tokens are grouped by expert. Where a GPU has a kernel for grouped products, they need no padding. Elsewhere one
        batched product serves all: of one group per expert, padded to the count of the busiest one; or, where the host
        must not read that count, of blocks of the mean count, of which there are fewer than 2 E. Padding repeats token
        0, and its results are discarded.
        """
        for listener in self.before_read:
            listener(expert_NK)
        if self._has_grouped_kernel(x_ND):
            return self.grouped(x_ND, expert_NK, torch.bfloat16)
        if x_ND.is_cuda or torch.compiler.is_compiling():
            return self.in_blocks(x_ND, expert_NK)
        expert = expert_NK.flatten()
        counts_E = tally(expert, self.count)
        longest = math.ceil(self.busiest * len(expert) / self.count) if expert.is_meta else int(counts_E.max())
        number_E = torch.arange(self.count, device=expert.device)
        x_ELD, place = _padded(x_ND, expert_NK, counts_E, number_E, self.count, longest)
        y_ELD = _swiglus(x_ELD, self.w1, self.w2, self.w3)
        return y_ELD.flatten(0, 1).index_select(0, place).view(*expert_NK.shape, -1)

    def in_blocks(self, x_ND: Tensor, expert_NK: Tensor) -> Tensor:
        """Return what `routed` returns, by products of blocks of tokens with copies of their experts.

        No count is read by the host: any load fits into 2 E - 1 blocks of the mean load.

        Args:
            x_ND: Tokens.
            expert_NK: Their experts, int64 in [0, E).

        Returns:
            The outputs [N, K, D].
        """
        length, blocks = max(1, -(-expert_NK.numel() // self.count)), 2 * self.count - 1
        counts_E = tally(expert_NK.flatten(), self.count)
        ends_E = (-(-counts_E // length)).cumsum(0)
        first_E = torch.cat((ends_E.new_zeros(1), ends_E[:-1]))
        number_X = torch.arange(blocks, device=expert_NK.device)
        expert_X = torch.searchsorted(ends_E, number_X, right=True).clamp(max=self.count - 1)
        x_XLD, place = _padded(x_ND, expert_NK, counts_E, first_E, blocks, length)
        y_XLD = _swiglus(x_XLD, *(weight[expert_X] for weight in (self.w1, self.w2, self.w3)))
        return y_XLD.flatten(0, 1).index_select(0, place).view(*expert_NK.shape, -1)

    def grouped(self, x_ND: Tensor, expert_NK: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what `routed` returns, by products over groups of tokens that end at `ends_E`.

        No count is read by the host, and no token is padded.

        Args:
            x_ND: Tokens.
            expert_NK: Their experts, int64 in [0, E).
            dtype: The dtype of the products: fp32 or bf16.

        Returns:
            The outputs [N, K, D] in `dtype`.
        """
        expert_S, order_S = expert_NK.flatten().sort(stable=True)
        number_E = torch.arange(self.count, device=expert_S.device)
        ends_E = torch.searchsorted(expert_S, number_E, right=True, out_int32=True)
        x_SD = x_ND.to(dtype).index_select(0, order_S // expert_NK.shape[1])
        if fused.casts(x_SD, self.w1, self.w3):
            gate_SF, up_SF = fused.products(x_SD, self.w1, self.w3, ends_E=ends_E).chunk(2, -1)
        else:
            gate_SF, up_SF = (F.grouped_mm(x_SD, w.to(dtype).mT, offs=ends_E) for w in (self.w1, self.w3))
        y_SD = F.grouped_mm(F.silu(gate_SF) * up_SF, self.w2.to(dtype).mT, offs=ends_E)
        return torch.empty_like(y_SD).index_copy_(0, order_S, y_SD).view(*expert_NK.shape, -1)

    def _has_grouped_kernel(self, x_ND: Tensor) -> bool:
        if not x_ND.is_cuda:
            return False
        capability = torch.cuda.get_device_capability(x_ND.device)[0]
        return self.has_grouped_kernel(product_dtype(x_ND.dtype, x_ND.device), capability)

    def has_grouped_kernel(self, dtype: torch.dtype, capability: int) -> bool:
        """Return whether torch has a kernel for grouped products, which elsewhere read their offsets.

        It needs bf16, rows of a multiple of 16 bytes, and a GPU whose major compute capability is 9 or 10.
        """
        return dtype == torch.bfloat16 and capability in (9, 10) and not any(n % 8 for n in self.w1.shape[1:])

    def cost(self, active: int) -> Cost:
        """Count all experts; each token reads the weights of `active` ones."""
        weights = self.w1.numel() + self.w2.numel() + self.w3.numel()
        read = weights * active // self.count
        return Cost({"experts": weights}, {"experts": read}, {"ffn": read})


def _swiglus(x_ELD: Tensor, w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor) -> Tensor:
    """Apply a SwiGLU to each stack of tokens."""
    if fused.casts(x_ELD, w1_EFD, w3_EFD):
        gate_ELF, up_ELF = fused.products(x_ELD, w1_EFD, w3_EFD).chunk(2, -1)
        return (F.silu(gate_ELF) * up_ELF) @ w2_EDF.mT
    h_ELF = F.silu(x_ELD @ w1_EFD.mT) * (x_ELD @ w3_EFD.mT)
    return h_ELF @ w2_EDF.mT


def _padded(
    x_ND: Tensor, expert_NK: Tensor, counts_E: Tensor, first_E: Tensor, blocks: int, length: int
) -> tuple[Tensor, Tensor]:
    """Copy tokens into blocks by expert, in their order.

    Args:
        x_ND: Tokens.
        expert_NK: Their experts.
        counts_E: Choices of each expert.
        first_E: The first block of each expert.
        blocks: Number of blocks (X).
        length: Tokens of a block (L).

    Returns:
        The blocks [X, L, D], and the place of each choice in them, [N*K].
    """
    expert = expert_NK.flatten()
    order = expert.argsort(stable=True)
    rank = torch.arange(len(expert), device=expert.device)
    within = rank - (counts_E.cumsum(0) - counts_E)[expert[order]]
    place = torch.empty_like(expert)
    place[order] = first_E[expert[order]] * length + within
    token = torch.zeros(blocks * length, dtype=torch.int64, device=expert.device)
    token[place] = rank // expert_NK.shape[1]
    return x_ND.index_select(0, token).view(blocks, length, -1), place


class Router(nn.Linear):
    """One logit per expert, without bias, and in fp32 even if the model computes in bf16."""

    def __init__(self, dim: int, experts: int) -> None:
        super().__init__(dim, experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            wide = at_least_fp32(x.dtype)
            return F.linear(x.to(wide), self.weight.to(wide))

    def cost(self) -> Cost:
        """Count one dense matrix."""
        weights = self.weight.numel()
        return Cost({"router": weights}, {"router": weights}, {"router": weights})


class ExpertChoice(nn.Module):
    """The paper's mixture: full-size experts choose tokens in training; in evaluation, tokens use their best expert.

    Zhou et al. 2022 (arXiv 2202.09368). "Memory Layers at Scale" states neither capacity nor pool. Our choices: the
    gate is the softmax over experts, the pool is one row, the capacity factor is 1 (ceil(T / E) tokens per expert), and
    tokens that no expert chooses pass through the residual alone. In training the choice depends on later tokens; in
    evaluation it does not.
    """

    def __init__(self, dim: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.router = Router(dim, experts)
        self.experts = Experts(experts, dim, hidden)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTE = self.router(x_BTD).softmax(dim=-1)
        return self._experts_choose(x_BTD, gate_BTE) if self.training else self._best_expert(x_BTD, gate_BTE)

    def _experts_choose(self, x_BTD: Tensor, gate_BTE: Tensor) -> Tensor:
        rows, tokens, dim = x_BTD.shape
        capacity = -(-tokens // self.experts.count)
        # Ties are common (equal tokens at the start of documents); the earlier token wins in every process.
        gate_BET = gate_BTE.transpose(1, 2)
        position_BEC = best(gate_BET, capacity)
        gate_BEC = gate_BET.gather(-1, position_BEC)
        first_B = torch.arange(0, rows * tokens, tokens, device=x_BTD.device)
        position = (position_BEC + first_B[:, None, None]).transpose(0, 1).flatten()
        x_ELD = x_BTD.flatten(0, 1).index_select(0, position).view(self.experts.count, rows * capacity, dim)
        y_ELD = self.experts(x_ELD) * gate_BEC.transpose(0, 1).flatten(1).unsqueeze(-1)
        y_ND = torch.zeros(rows * tokens, dim, dtype=y_ELD.dtype, device=x_BTD.device)
        return y_ND.index_add(0, position, y_ELD.flatten(0, 1)).view_as(x_BTD).to(x_BTD.dtype)

    def _best_expert(self, x_BTD: Tensor, gate_BTE: Tensor) -> Tensor:
        gate_N1, expert_N1 = gate_BTE.flatten(0, 1).max(dim=-1, keepdim=True)
        y_ND = self.experts(x_BTD.flatten(0, 1), expert_N1).squeeze(1) * gate_N1
        return y_ND.view_as(x_BTD).to(x_BTD.dtype)

    def cost(self) -> Cost:
        """Count top-1 routing, which is also the mean of expert choice at capacity 1."""
        return self.router.cost() + self.experts.cost(active=1)


class RoutedExperts(nn.Module):
    """Many small experts, of which each token uses its best K; subclasses choose them and balance their load.

    A subclass has `route(logits_NE) -> (experts [N, K] int64, gates [N, K])`.
    """

    def __init__(self, dim: int, hidden: int, experts: int, top_k: int, shared_hidden: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.router = Router(dim, experts)
        self.experts = Experts(experts, dim, hidden)
        self.shared = SwiGLU(dim, shared_hidden) if shared_hidden else None

    def route(self, logits_NE: Tensor) -> tuple[Tensor, Tensor]:
        """Return each token's experts and their gates."""
        raise NotImplementedError

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        expert_NK, gate_NK = self.route(self.router(x_ND))
        y_ND = (self.experts(x_ND, expert_NK) * gate_NK.unsqueeze(-1)).sum(dim=1).to(x_BTD.dtype)
        if self.shared is not None:
            y_ND = y_ND + self.shared(x_ND)
        return y_ND.view_as(x_BTD)

    def cost(self) -> Cost:
        """Count the chosen experts and the shared one."""
        shared = Cost() if self.shared is None else self.shared.cost()
        return self.router.cost() + self.experts.cost(self.top_k) + shared


class TokenChoice(RoutedExperts):
    """Load is balanced without an auxiliary loss, by a bias per expert (`router: sigmoid`).

    Affinities are sigmoids, normalised over the chosen experts (DeepSeek-V3, arXiv 2412.19437, equations 12 to 16). A
    bias per expert, used only for the choice, moves by `balance_rate` after each step, up for experts that received
    fewer tokens than the mean (Wang et al. 2024, arXiv 2408.15664, algorithm 1). `load_E` counts tokens since the last
    step; processes that share a batch must sum it before `after_step`.
    """

    balance_E: Tensor
    load_E: Tensor

    def __init__(
        self, dim: int, hidden: int, experts: int, top_k: int, shared_hidden: int, balance_rate: float
    ) -> None:
        super().__init__(dim, hidden, experts, top_k, shared_hidden)
        self.balance_rate = balance_rate
        self.register_buffer("balance_E", torch.zeros(experts))
        self.register_buffer("load_E", torch.zeros(experts), persistent=False)

    def route(self, logits_NE: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts of the largest biased affinities, and their normalised affinities without the bias."""
        affinity_NE = logits_NE.sigmoid()
        expert_NK = (affinity_NE + self.balance_E).topk(self.top_k).indices
        if self.training:
            self.load_E.scatter_(0, expert_NK.flatten(), 1.0, reduce="add")
        gate_NK = affinity_NE.gather(-1, expert_NK)
        return expert_NK, gate_NK / gate_NK.sum(dim=-1, keepdim=True)

    @torch.no_grad()
    def after_step(self) -> None:
        """Update the balancing bias and reset the counts."""
        self.balance_E.add_(torch.sign(self.load_E.mean() - self.load_E), alpha=self.balance_rate)
        self.load_E.zero_()


class LossBalanced(RoutedExperts):
    """Load is balanced by an auxiliary loss (`router: softmax`, as in OLMoE, arXiv 2409.02060, section 2).

    Gates are the softmax over all experts and are not normalised over the chosen ones. In training, `auxiliary` holds
    two losses with their weights: the balance loss E * sum_e f_e * p_e, where f_e is the share of the choices that fell
    on expert e and p_e its mean gate, and the mean squared logsumexp of the logits (Zoph et al. 2022, arXiv 2202.08906,
    equation 5). Our choice: the pool is the micro-batch of all processes, padding included, and layers are averaged.
    Each process holds its own tokens' part of both losses.
    """

    def __init__(
        self, dim: int, hidden: int, experts: int, top_k: int, shared_hidden: int, weights: dict[str, float]
    ) -> None:
        super().__init__(dim, hidden, experts, top_k, shared_hidden)
        self.weights = weights
        self.auxiliary: dict[str, tuple[float, Tensor]] = {}

    def share_counts(self, counts_E: Tensor) -> Tensor:
        """Return counts summed over the processes that share a batch; here there is one."""
        return counts_E

    def route(self, logits_NE: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts of the largest gates, and these gates; set the auxiliary losses in training."""
        gate_NE = logits_NE.softmax(dim=-1)
        gate_NK, expert_NK = gate_NE.topk(self.top_k)
        if self.training:
            counts_E = self.share_counts(tally(expert_NK.flatten(), self.experts.count)).to(gate_NE.dtype)
            choices = counts_E.sum()
            tokens = choices / self.top_k
            balance = self.experts.count * (counts_E / choices * (gate_NE.sum(0) / tokens)).sum()
            z = logits_NE.logsumexp(dim=-1).square().sum() / tokens
            losses = {"balance_loss": balance, "z_loss": z}
            self.auxiliary = {name: (self.weights[name], loss) for name, loss in losses.items()}
        return expert_NK, gate_NK

    def after_step(self) -> None:
        """Release the losses, and with them the activations that they refer to."""
        self.auxiliary = {}


class MoEConfig(ModelConfig):
    """`moe`: every feed-forward replaced by full-size experts."""

    experts: int | None = Field(default=None, gt=1, description="experts per layer; None: the paper's, else 8")

    @property
    def expert_count(self) -> int:
        """Number of experts per layer."""
        return self.experts or PAPER_EXPERTS.get(self.base, OTHER_EXPERTS)


class MoETopKConfig(ModelConfig):
    """`moe_topk`: by default 8 of 64 experts per token (laptop bases: 4 of 16), as wide together as the dense layer."""

    experts: int | None = Field(default=None, gt=1, description="experts per layer; None: 64, laptop sizes 16")
    top_k: int | None = Field(
        default=None, gt=0, description="experts per token besides shared; None: 8, laptop sizes 4"
    )
    expert_hidden: int | None = Field(
        default=None, gt=0, description="width; None: ffn_hidden // (top_k + shared_experts)"
    )
    shared_experts: int = Field(default=0, ge=0, description="experts that every token uses")
    router: Literal["sigmoid", "softmax"] = Field(
        default="sigmoid", description="sigmoid: balanced by a bias (DeepSeek-V3); softmax: balanced by a loss (OLMoE)"
    )
    balance_rate: float = Field(default=1e-3, ge=0, description="router sigmoid: step size of the balancing bias")
    balance_loss: float = Field(default=1e-2, ge=0, description="router softmax: weight of the balance loss")
    z_loss: float = Field(default=1e-3, ge=0, description="router softmax: weight of the squared logsumexp of logits")

    @property
    def routing(self) -> tuple[int, int, int]:
        """Experts per layer, routed experts per token, and hidden width of an expert."""
        laptop = not self.size.vocab_size
        experts, top_k = self.experts or (16 if laptop else 64), self.top_k or (4 if laptop else 8)
        return experts, top_k, self.expert_hidden or self.size.ffn_hidden // (top_k + self.shared_experts)

    @property
    def batch_statistics(self) -> bool:
        """Whether the balance loss counts choices over the micro-batch."""
        return self.router == "softmax" and self.balance_loss > 0

    def family_problems(self) -> list[Problem]:
        experts, top_k, hidden = self.routing
        if top_k > experts:
            return [("top_k", top_k, f"at most experts ({experts})")]
        if hidden == 0:
            return [("top_k", top_k, f"a smaller number, or set expert_hidden: ffn_hidden is {self.size.ffn_hidden}")]
        other = ("balance_loss", "z_loss") if self.router == "sigmoid" else ("balance_rate",)
        defaults = {name: type(self).model_fields[name].default for name in other}
        return [
            (name, getattr(self, name), f"{default} with router {self.router}")
            for name, default in defaults.items()
            if getattr(self, name) != default
        ]


def expert_choice_feed_forwards(config: MoEConfig) -> list[nn.Module]:
    """Return an expert-choice mixture for every layer."""
    size = config.size
    return [ExpertChoice(size.dim, size.ffn_hidden, config.expert_count) for _ in range(size.layers)]


def token_choice_feed_forwards(config: MoETopKConfig) -> list[nn.Module]:
    """Return a token-choice mixture for every layer."""
    experts, top_k, hidden = config.routing
    shape = (config.size.dim, hidden, experts, top_k, config.shared_experts * hidden)
    weights = {"balance_loss": config.balance_loss, "z_loss": config.z_loss}

    def mixture() -> RoutedExperts:
        return TokenChoice(*shape, config.balance_rate) if config.router == "sigmoid" else LossBalanced(*shape, weights)

    return [mixture() for _ in range(config.size.layers)]


register(Family("moe", MoEConfig, expert_choice_feed_forwards))
register(Family("moe_topk", MoETopKConfig, token_choice_feed_forwards))
